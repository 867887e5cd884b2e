"""Commands that write a job file for SLURM or KubeRay, which runs another command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from orchestrator.cli.app import app
from orchestrator.cli.cluster import WORDS_LAST, CommandArgument, parse_command
from orchestrator.cli.help import Application
from orchestrator.cli.option_values import one_schedule, read_options
from orchestrator.cli.options import MAX_COUNT
from orchestrator.terminal.layout import print_line
from orchestrator.workspace.errors import UserError, quoted

if TYPE_CHECKING:
    from orchestrator.cluster.deployment import Deployment

SETTINGS_OF_OPTIONS = {
    "gpus": "cluster__num_gpus",
    "workers": "cluster__num_workers",
    "preset": "model__preset",
    "method": "model__method",
    "corrections": "model__corrections",
    "steps": "training__num_steps",
}
"""Options of commands that decide how many nodes they need, and how large ones."""

GpusPerNodeOption = Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="GPUs of a node.")]
CpusPerNodeOption = Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="CPUs of a node.")]
VariablesOption = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME", help="Environment variable that the command needs."),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write (default: print it).")
]

manifest = Application(no_args_is_help=True, help="Write a job file for SLURM or KubeRay.")
app.add_typer(manifest, name="manifest", rich_help_panel="Clusters")


@manifest.command("slurm", context_settings=WORDS_LAST)
def write_slurm(
    command: CommandArgument,
    gpus_per_node: GpusPerNodeOption = 8,
    cpus_per_node: CpusPerNodeOption = 64,
    time: Annotated[str, typer.Option(help="Time limit, as SLURM reads it.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.")] = None,
    env: VariablesOption = None,
    output: OutputOption = None,
) -> None:
    """Write a script for sbatch that starts Ray on all nodes and runs a command.

    Example: iiet-orch manifest slurm --gpus-per-node 4 -o job.sh pretrain --gpus 8 -w /shared/work
    """
    _check("--time", time, r"[\d:-]+", "a time such as 24:00:00")
    _check("--partition", partition, r"[\w.,-]+", "the name of a partition")
    from orchestrator.cluster.slurm import batch_script

    deployment = _deployment(command, gpus_per_node, cpus_per_node, env or [])
    _write(batch_script(deployment, time_limit=time, partition=partition), output)


@manifest.command("kuberay", context_settings=WORDS_LAST)
def write_kuberay(
    command: CommandArgument,
    image: Annotated[str, typer.Option(help="Image with this package and its extra `cluster`.")],
    claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim (ReadWriteMany) of the workspace.")
    ],
    secret: Annotated[str | None, typer.Option(help="Secret with the variables of --env.")] = None,
    gpus_per_node: GpusPerNodeOption = 8,
    cpus_per_node: CpusPerNodeOption = 64,
    env: VariablesOption = None,
    output: OutputOption = None,
) -> None:
    """Write a RayJob that starts a cluster in Kubernetes and runs a command.

    Example: iiet-orch manifest kuberay --image my/image --claim disk pretrain -w /shared
    """
    if env and secret is None:
        raise UserError("--env takes the variables from a Secret; name it by --secret")
    from orchestrator.cluster.kuberay import ray_job, to_yaml

    deployment = _deployment(command, gpus_per_node, cpus_per_node, env or [])
    _write(to_yaml(ray_job(deployment, image=image, claim=claim, secret=secret)), output)


def _deployment(
    words: Sequence[str], gpus_per_node: int, cpus_per_node: int, variables: Sequence[str]
) -> Deployment:
    for name in variables:
        _check("--env", name, r"[A-Za-z_]\w*", "the name of a variable")
    options = parse_command(words)
    if options.get("continue_"):
        raise UserError("--continue takes the settings of a run, which a job file cannot read")
    from orchestrator.pipelines.manifests import plan_deployment

    given: dict[str, Any] = {
        setting: options[name] for name, setting in SETTINGS_OF_OPTIONS.items() if name in options
    }
    if "model__corrections" in given:
        given["model__corrections"] = one_schedule(given["model__corrections"])
    config = options.get("config", options.get("file"))
    return plan_deployment(
        words,
        read_options(config, options.get("set_"), train_on=options.get("device"), **given),
        workspace=options["workspace"],
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        variables=variables,
    )


def _check(option: str, value: str | None, pattern: str, meaning: str) -> None:
    if value is not None and not re.fullmatch(pattern, value, flags=re.ASCII):
        raise UserError(f"{option} takes {meaning}; got {quoted(value)}")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    output.write_text(text, encoding="utf-8")
    print_line(Console(), f"written: {output}")
