"""A batch script for SLURM: one Ray on each node, the command beside it on the first node.

SLURM signals the batch shell before the time limit. The script passes the signal on to the command
alone: Ray has to live until the checkpoint is written. For the same reason the command is not
started by `srun` or `ray symmetric-run`, which pass a signal on to Ray, or to nobody.
"""

from __future__ import annotations

import shlex

from orchestrator.cluster.deployment import GRACE_SECONDS, OBJECT_STORE_BYTES, Deployment
from orchestrator.workspace.folders import ENVIRONMENT_NAME

_START = r"""
# This script runs on the first node, whose Ray is the head.
head=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
port=$((20000 + SLURM_JOB_ID % 10000))
# Without a token, everyone who reaches the nodes could run programs on them.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export head port RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# shellcheck disable=SC2016  # Each node expands the variables.
srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    if [ "$SLURM_NODEID" = 0 ]; then where="--head --node-ip-address=$head --port=$port"
    else where="--address=$head:$port"; fi
    exec ray start --block $where RAY_OPTIONS' &
ray=$!
export RAY_ADDRESS=$head:$port
until python -c 'import ray; ray.init()' > /dev/null 2>&1; do
    kill -0 "$ray" || exit 1
    sleep 1
done

COMMAND &
run=$!
requeue=
trap 'requeue=yes; kill -TERM "$run"' TERM
trap 'kill -TERM "$run"' USR1
while kill -0 "$run" 2> /dev/null; do wait "$run"; done  # A signal ends `wait`, not the command.
wait "$run"
code=$?
kill -TERM "$ray"
if [ "$requeue" ] && [ "$code" = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def batch_script(deployment: Deployment, *, time_limit: str, partition: str | None = None) -> str:
    """Return the script for `sbatch`.

    Args:
        time_limit: As SLURM reads it, such as `24:00:00`.
    """
    options: dict[str, str | int | None] = {
        "job-name": deployment.name,
        "nodes": deployment.num_nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": deployment.cpus_per_node,
        "gpus-per-node": deployment.gpus_per_node,
        "mem": 0,  # all of the node's
        "exclusive": None,
        "partition": partition,
        "time": time_limit,
        "signal": f"B:TERM@{GRACE_SECONDS}",
        "requeue": None,
        "open-mode": "append",
        "output": f"{deployment.name}-%j.log",
        "export": "ALL",
    }
    if not deployment.gpus_per_node:
        del options["gpus-per-node"]
    if partition is None:
        del options["partition"]
    ray_options = (
        f"--num-cpus={deployment.cpus_per_node} --num-gpus={deployment.gpus_per_node} "
        f"--object-store-memory={OBJECT_STORE_BYTES}"
    )
    start = _START.replace("RAY_OPTIONS", ray_options)
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{k}" + (f"={v}" if v is not None else "") for k, v in options.items()),
            "#",
            f"# {GRACE_SECONDS} seconds before the time limit the command saves a checkpoint.",
            "# Then the job is queued again and resumes. To stop it after a checkpoint, type",
            "#   scancel --batch --signal=USR1 JOBID",
            "",
            "set -u",
            f"export {ENVIRONMENT_NAME}={shlex.quote(deployment.workspace)}",
            *(f': "${{{name}:?set it where sbatch is called}}"' for name in deployment.variables),
            start.replace("COMMAND", shlex.join(deployment.words)),
        ]
    )
