"""A back end passes if its decode steps are the model's, and fails if its cache is not exact."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iiet.config import preset
from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.check_conformance import check, command_back_end, main
from orchestrator.evaluation.conformance import FILE, decode_logits, write_conformance


def decoder_of(method: str = "iiet", **overrides: Any) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "dim": 16,
        "num_layers": 3,
        "num_heads": 2,
        "ffn_dim": 24,
        "vocab_size": 31,
    }
    if METHODS[method].has_corrections:
        sizes["schedule"] = "2"
    return Decoder(preset("tiny", method=method, initializer_std=0.3, **{**sizes, **overrides}))


def decode(
    decoder: Decoder, ids: np.ndarray, num_prompt: int, schedule: str, **options: Any
) -> np.ndarray:
    wanted = None if schedule == "-" else IterationSchedule.parse(schedule, num_layers=3)
    found = decode_logits(decoder, torch.from_numpy(ids), num_prompt, wanted, **options)
    return np.asarray(found)


@pytest.mark.parametrize("method", METHODS)
def test_our_own_decoder_passes(method: str, tmp_path: Path) -> None:
    decoder = decoder_of(method)
    write_conformance(decoder, tmp_path)
    findings = check(tmp_path / FILE, partial(decode, decoder))
    assert len(findings) == (3 if METHODS[method].has_corrections else 1)
    assert all(finding.passed and finding.same_choice == 1 for finding in findings)


def test_one_slot_per_layer_fails_where_there_are_corrections(tmp_path: Path) -> None:
    decoder = decoder_of()
    write_conformance(decoder, tmp_path)
    findings = check(tmp_path / FILE, partial(decode, decoder, kv_strategy="last"))
    assert {finding.schedule: finding.passed for finding in findings} == {
        "2,2,2": False,
        "2,0,2": False,
        "0,0,0": True,
    }
    assert max(finding.largest_error for finding in findings) > 0.1


def test_a_model_of_a_short_context_has_fewer_steps(tmp_path: Path) -> None:
    decoder = decoder_of(context_length=20)
    write_conformance(decoder, tmp_path)
    assert all(finding.passed for finding in check(tmp_path / FILE, partial(decode, decoder)))


def test_results_of_another_shape_or_without_numbers_do_not_pass(tmp_path: Path) -> None:
    decoder = decoder_of()
    write_conformance(decoder, tmp_path)

    def broken(ids: np.ndarray, num_prompt: int, schedule: str) -> np.ndarray:
        return decode(decoder, ids, num_prompt, schedule) * float("nan")

    assert not any(finding.passed for finding in check(tmp_path / FILE, broken))
    with pytest.raises(ValueError, match=r"under schedule 0,0,0 must be \(64, 31\), got \(31,\)"):
        check(tmp_path / FILE, lambda *_: np.zeros(31))
    (tmp_path / "other").write_text("no safetensors")
    with pytest.raises(ValueError, match="is no conformance file"):
        check(tmp_path / "other", broken)


ENGINE = """\
import sys
import torch
from safetensors.torch import load_file, save_file
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.conformance import decode_logits

folder, strategy, ids, schedule, logits = sys.argv[1:]
given = load_file(ids)
wanted = IterationSchedule.parse(schedule, num_layers=3)
found = decode_logits(
    Decoder.load(folder), given["ids"], int(given["num_prompt"]), wanted, kv_strategy=strategy
)
save_file({"logits": found}, logits)
"""
ARGUMENTS = ["{ids}", "{schedule}", "{logits}"]


@pytest.mark.slow
def test_the_script_runs_a_command_for_each_schedule(tmp_path: Path) -> None:
    """The script that is written beside the file, as a program of its own."""
    decoder = decoder_of()
    decoder.save(tmp_path)
    write_conformance(decoder, tmp_path)
    engine = tmp_path / "engine.py"
    engine.write_text(ENGINE)
    for strategy, code in (("exact", 0), ("last", 1)):
        script = [sys.executable, str(tmp_path / "check_conformance.py"), str(tmp_path / FILE)]
        command = [sys.executable, str(engine), str(tmp_path), strategy, *ARGUMENTS]
        found = subprocess.run(
            [*script, "--", *command], check=False, capture_output=True, text=True
        )
        assert found.returncode == code, found.stdout + found.stderr
        assert found.stdout.count("schedule ") == 3
        assert ("FAIL" in found.stdout) == (strategy == "last")


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_conformance(decoder_of(), tmp_path)
    file = str(tmp_path / FILE)
    for arguments, message in (
        ([file, "--callable", "nothing"], "takes MODULE:FUNCTION"),
        ([file, "--callable", "no_such_module:logits"], "No module named"),
        (["missing", "--callable", "os:getcwd"], "is no conformance file"),
        (
            [file, "--", sys.executable, "-c", "raise SystemExit(3)"],
            "wrote no logits (exit code 3)",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([file])
    assert caught.value.code == 2
    with pytest.raises(ValueError, match="wrote no logits"):
        command_back_end([sys.executable, "-c", ""])(np.zeros(2, dtype=np.int64), 1, "0")
