"""Numbers are formatted for people."""

from __future__ import annotations

import pytest

from orchestrator.terminal.formatting import (
    format_bytes,
    format_count,
    format_flop_rates,
    format_hours,
    format_hours_range,
    format_number,
    format_parameters,
    format_schedule,
    format_seconds,
    format_with_error,
    join_names,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(1, "trial"), "1 trial"),
        (format_count(1234, "trial"), "1,234 trials"),
        (format_count(2, "pass", "passes"), "2 passes"),
        (format_bytes(512), "0.5 KiB"),
        (format_bytes(3 * 2**20), "3.0 MiB"),
        (format_bytes(1.5 * 2**30), "1.5 GiB"),
        (format_parameters(1_484_032), "1.48 M"),
        (format_parameters(23_264), "23.3 K"),
        (format_parameters(1.34e9), "1.34 B"),
        (format_number(17410), "17,410"),
        (format_number(2.5), "2.5"),
        (format_number(3.0), "3"),
        (format_seconds(12.3), "12 s"),
        (format_seconds(150), "2 min"),
        (format_seconds(5400), "1.5 h"),
        (format_hours(0.01), "36 seconds"),
        (format_hours(0.5), "30 minutes"),
        (format_hours(72), "3 days"),
        (format_hours_range(2, 3), "2 to 3 hours"),
        (format_hours_range(0.5, 2), "30 minutes to 2 hours"),
        (format_hours_range(2, 2), "2 hours"),
        (format_flop_rates(312e12, 156e12), "312 to 156 TFLOP/s"),
        (format_schedule((2, 1, 0)), "2,1,0"),
        (format_schedule((3,) * 4 + (1,) * 20), "3*4,1*20"),
        (format_schedule(None), ""),
        (format_with_error(0.444, 0.012, is_percent=True), "44.4 ± 1.2"),
        (format_with_error(2.34567, None, is_percent=False), "2.346"),
        (join_names(["a", "b"]), "a, b"),
        (join_names(["2,1", "0"]), "2,1; 0"),
    ],
)
def test_text_of_a_number(text: str, expected: str) -> None:
    assert text == expected
