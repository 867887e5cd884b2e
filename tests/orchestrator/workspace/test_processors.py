"""What Linux says of processors, and how many of them a container's quota leaves."""

import os

import pytest

from orchestrator.workspace.processors import cpu_flags, num_cpus, processor_name
from orchestrator.workspace.provenance import timing_environment

X86 = "model name\t: Fast 9000\nflags\t\t: sse2 avx512_bf16\n\nmodel name\t: other\n"


@pytest.mark.parametrize(
    ("text", "flags", "name"),
    [
        (X86, {"sse2", "avx512_bf16"}, "Fast 9000"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}, None),
        (None, set(), None),
    ],
)
def test_the_first_processor_is_described(tmp_path, text, flags, name):
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert cpu_flags(cpuinfo) == flags
    # A processor without a name is called by the kind of machine.
    assert processor_name(cpuinfo) == (name or processor_name(tmp_path / "missing"))
    assert processor_name(cpuinfo)


def test_a_quota_limits_the_cpus(tmp_path):
    affinity = num_cpus(tmp_path)
    assert 1 <= affinity <= (os.cpu_count() or 1)
    for quota, cpus in ("max 100000", affinity), ("50000 100000", 1), ("1000000000 1", affinity):
        (tmp_path / "cpu.max").write_text(quota)
        assert num_cpus(tmp_path) == cpus


def test_times_name_the_processor_and_its_cpus():
    environment = timing_environment()
    assert (environment["processor"], environment["cpus"]) == (processor_name(), num_cpus())
