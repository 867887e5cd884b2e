"""The files for SLURM and KubeRay, which users edit: their commands, signals and fields."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import PATIENCE_SECONDS, wait_until
from typer.main import get_command

from orchestrator import cli

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"
SCRIPT = (DEPLOY / "slurm.sbatch").read_text(encoding="utf-8")
# What SLURM, Ray and this package install, as programs that write what they are told into a file.
SAY = 'echo "$*" | sed "s/$port/PORT/g" >> "$RECORD"'
PROGRAMS = {
    "scontrol": f'#!/bin/bash\nset -- scontrol "$@"\n{SAY}\n',
    "srun": '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nSLURM_NODEID=0 exec "$@"\n',
    "ray": f"""#!/bin/bash
trap 'set -- ray ends; {SAY}; exit' TERM
set -- ray "$@"
{SAY}
while true; do sleep 0.05; done
""",
    "iiet-orch": f"""#!/bin/bash
trap 'set -- saved; {SAY}; exit 130' TERM
set -- "$1" "$RAY_ADDRESS" "$RAY_AUTH_MODE" "$RAY_TMPDIR"
{SAY}
while true; do sleep 0.05; done
""",
    # Prints the head's address as Ray would. All nodes have joined when Ray has been asked twice.
    "python": """#!/bin/bash
case "$2" in
    *ray.init*) echo asked >> "$RECORD.nodes"; [ "$(wc -l < "$RECORD.nodes")" = "$3" ] ;;
    *) echo 127.0.0.1 ;;
esac
""",
}


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A function that runs the script, on two nodes, as the job of this id."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "record").touch()
    started = []

    def run(job_id: str) -> subprocess.Popen[str]:
        variables = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "RECORD": str(tmp_path / "record"),
            "SLURM_JOB_ID": job_id,
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_ON_NODE": "8",
        }
        process = subprocess.Popen(
            ["bash", "-c", SCRIPT],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGTERM, ["scontrol requeue 77"]), (signal.SIGUSR1, [])]
)
def test_a_signal_reaches_the_command_alone_which_saves_its_state(
    start, tmp_path, number, requeued
):
    def record() -> list[str]:
        return (tmp_path / "record").read_text().splitlines()

    script = start("77")
    wait_until(lambda: len(record()) == 2, record)
    os.kill(script.pid, number)
    printed, _ = script.communicate(timeout=PATIENCE_SECONDS)
    assert script.returncode == 130, printed
    wait_until(lambda: "ray ends" in record(), record)
    ray, command, saved, *rest = record()
    assert ray == (
        "ray start --block --head --node-ip-address=127.0.0.1 --port=PORT --num-cpus=64 "
        "--num-gpus=8 --object-store-memory=2147483648"
    )
    assert command == "pretrain 127.0.0.1:PORT token /tmp/ray-77"
    assert saved == "saved"
    assert sorted(rest) == ["ray ends", *requeued]
    assert (tmp_path / "record.nodes").read_text().count("asked") == 2


def num_gpus(name: str, *words: str) -> int:
    """Return the GPUs that a command asks for; exits if an option is unknown."""
    command: Any = get_command(cli.commands)
    gpus: int = command.commands[name].make_context(name, [*words]).params["gpus"]
    return gpus


def test_the_commands_in_both_files_exist_and_their_nodes_hold_them():
    (line,) = re.findall(r"^command=\(iiet-orch (.*?)\)", SCRIPT, flags=re.MULTILINE)
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text(encoding="utf-8"))
    program, *words = shlex.split(job["spec"]["entrypoint"])
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (program, words) == ("iiet-orch", shlex.split(line))
    assert num_gpus(*words) == workers["replicas"] * int(limits["nvidia.com/gpu"])
    nodes, gpus = re.findall(
        r"^#SBATCH --(?:nodes|gpus-per-node)=(\d+)", SCRIPT, flags=re.MULTILINE
    )
    assert num_gpus(*words) == int(nodes) * int(gpus)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        names = {variable["name"]: variable.get("value") for variable in container["env"]}
        drain = int(names["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain < pod["terminationGracePeriodSeconds"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
