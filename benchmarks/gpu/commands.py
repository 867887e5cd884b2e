"""Sections that run `iiet-orch` as a user would: a killed training, a whole node, and a sweep.

Each command has a process of its own. A rank fails by what a machine does to it: a killed process,
or a file that it cannot write.
"""

from __future__ import annotations

import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.gpu import NUM_COMPARED, ROUNDED_LOSS, TOY_MODEL
from benchmarks.report import Figure, Row, problem_unless
from benchmarks.runner import Setup, Skipped
from iiet.hf.weights import WEIGHTS
from orchestrator.reporting.results import load_sweep_results
from orchestrator.workspace.journal import JournalRecord, read_journal
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints, open_workspace


class CommandFailed(Exception):
    """A command ended with another exit code than 0; holds the end of its output."""


@dataclass(frozen=True)
class Run:
    """The journal of a run that a command has made."""

    folder: Path

    @property
    def records(self) -> list[JournalRecord]:
        return read_journal(self.folder)[0]

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric by step; of a step that was trained twice, the later value."""
        return {
            record["step"]: record["values"][metric]
            for record in self.records
            if record["kind"] == "metrics" and metric in record["values"]
        }

    def events(self, name: str) -> list[JournalRecord]:
        return [record for record in self.records if record.get("name") == name]


class Commands:
    """`iiet-orch` commands of one workspace, in processes of their own."""

    def __init__(self, setup: Setup, name: str, settings: Mapping[str, Any] | None = None) -> None:
        """Make the workspace; `settings` replace those of a small model, for all commands."""
        self.workspace = open_workspace(setup.folder / name)
        self._log = self.workspace.root / "commands.log"
        self._settings: dict[str, Any]
        if settings is not None:
            self._settings = dict(settings)
            return
        data = setup.data
        self._settings = {
            "data.vocab_size": data.vocab_size,
            "model.corrections": 1,
            "training.iterate_from_fraction": 0.0,
            "training.learning_rate": 1e-3,
            "training.warmup_steps": 10,
        }
        if setup.is_toy:
            shape = {name: size for name, size in TOY_MODEL.items() if name != "vocab_size"}
            self._settings |= {f"model.{name}": size for name, size in shape.items()} | {
                "data.max_documents": data.max_documents,
                "model.context_length": 64,
                "training.num_tokens_per_step": 4 * 64,
                "training.num_validation_tokens": 64,
            }
        else:
            self._settings |= {"model.preset": "55m", "training.num_tokens_per_step": 8 * 2048}

    def run_record(self, name: str) -> Run:
        """Return the journal of `pretrain --name NAME`."""
        return Run(self.workspace.runs / name)

    def run(
        self,
        *arguments: str,
        settings: Mapping[str, Any] = MappingProxyType({}),
        watch: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
        expected: int = 0,
    ) -> float:
        """Run a command to its end, and return its seconds.

        Args:
            watch: Called many times a second while it runs; may kill it.
            expected: Its exit code.

        Raises:
            CommandFailed: If it has another one.
        """
        options = [f"--set={key}={value}" for key, value in {**self._settings, **settings}.items()]
        call = [sys.executable, "-m", "orchestrator.cli", *arguments, *options]
        started = time.monotonic()
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*call, "--workspace", str(self.workspace.root)], stdout=log, stderr=log
            )
        while process.poll() is None:
            watch(process)
            time.sleep(0.02)
        if process.returncode != expected:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            what = f"iiet-orch {arguments[0]} ended with exit code {process.returncode}"
            raise CommandFailed("\n".join([what, *lines[-15:]]))
        return time.monotonic() - started


WEIGHT_TOLERANCE = 1e-2
"""On GPUs: relative difference of the weights of a resumed training after the last step."""


def resume(setup: Setup) -> Iterator[Row]:
    """Compare a training that is killed after its first checkpoint and resumed with a whole one.

    On a CPU losses and weights must be bitwise those of the whole run; on a GPU they agree up to
    rounding, because some kernels add in another order each time.

    Raises:
        Skipped: If there are several GPUs: `node` kills one of their workers.
    """
    if setup.num_gpus > 1:
        raise Skipped("with several GPUs, node kills one of their workers instead")
    commands = Commands(setup, "resume")
    steps, every = (120, 30) if setup.is_toy else (60, 20)
    settings = {
        "training.num_steps": steps,
        "training.checkpoint_every_steps": every,
        "training.validate_every_steps": steps,
    }
    # Ray takes seconds to start, which a toy does not have.
    place = ["--gpus", "1"] if setup.device == "cuda" else ["--local"]
    commands.run("pretrain", "--name", "whole", *place, settings=settings)
    whole = commands.run_record("whole")
    killed = commands.run_record("killed")
    again = ["pretrain", "--name", "killed", *place]

    def kill(process: subprocess.Popen[bytes]) -> None:
        if find_checkpoints(killed.folder):
            process.kill()

    commands.run(*again, settings=settings, watch=kill, expected=-signal.SIGKILL)
    seconds = commands.run(*again, settings=settings)
    resumed = [event["step"] for event in killed.events("resumed")]
    if not resumed:
        yield Row(what="resumed", problem="it started from the beginning, or never stopped")
        return
    yield Row(
        what="resumed", figures={"after step": resumed[0], "whole second command (s)": seconds}
    )

    ours = killed.values("train/loss")
    theirs = whole.values("train/loss")
    if ours.keys() != theirs.keys():
        yield Row(what="losses", problem="the runs recorded other steps")
        return
    weights = [load_file(find_checkpoints(r.folder)[-1] / WEIGHTS) for r in (killed, whole)]
    flat = [torch.cat([w[name].double().flatten() for name in weights[1]]) for w in weights]
    losses = max(abs(ours[step] - theirs[step]) for step in theirs)
    last = ((flat[0] - flat[1]).norm() / flat[1].norm()).item()
    for what, name, difference, tolerance in (
        (f"losses of {len(theirs)} steps", "largest difference", losses, ROUNDED_LOSS),
        ("weights after the last step", "relative difference", last, WEIGHT_TOLERANCE),
    ):
        allowed = tolerance if setup.device == "cuda" else 0.0
        yield Row(
            what=what,
            figures={name: difference, "tolerance": allowed},
            problem=problem_unless(difference, allowed, f"they differ by {difference:.2g}"),
        )


END_SECONDS = 60
"""Longest time until the failure of one rank has ended or restarted all."""


def node(setup: Setup) -> Iterator[Row]:
    """Train on all GPUs, lose a rank, and stop.

    Raises:
        Skipped: If there is one GPU.
    """
    on_gpus = setup.device == "cuda"
    number = setup.num_ranks
    commands = Commands(setup, "node")
    count = "--gpus" if on_gpus else "--workers"
    steps = 6 if setup.is_toy else 50
    short = _steps(steps)
    commands.run("pretrain", "--name", "one", count, "1", settings=short)
    one = commands.run_record("one")
    alone = one.values("train/loss")
    compared = sorted(one.values("train/loss"))[:NUM_COMPARED]
    yield Row(what="one worker", figures={"tokens/s": _tokens_per_second(one)})
    all_workers = ["pretrain", count, str(number)]
    for parallel in ("ddp", "fsdp"):
        settings = {**short, "cluster.parallel": parallel}
        commands.run(*all_workers, "--name", parallel, settings=settings)
        run = commands.run_record(parallel)
        ours = run.values("train/loss")
        tolerance = ROUNDED_LOSS if on_gpus else 1e-4
        difference = max(abs(ours[step] - alone[step]) for step in compared)
        differ = f"losses differ by {difference:.2g} nats from those of one worker"
        problem = problem_unless(difference, tolerance, differ)
        if (started := run.events("started")[0]["num_workers"]) != number:
            problem = f"it ran with {started} workers"
        yield Row(
            what=f"{number} workers, {parallel}",
            figures={
                "tokens/s": _tokens_per_second(run),
                "all / one": _tokens_per_second(run) / _tokens_per_second(one),
                "largest loss difference": difference,
                "checkpoint (s)": max(event["seconds"] for event in run.events("checkpoint")),
            },
            problem=problem,
        )
    # A toy step takes a millisecond, and the training must not end before it is disturbed.
    long = _steps(steps * (100 if setup.is_toy else 6), steps)
    yield from _failures(commands, [*all_workers, "--name"], long)


def _steps(steps: int, every: int | None = None) -> dict[str, Any]:
    settings = {f"training.{name}": steps for name in ("num_steps", "validate_every_steps")}
    return {**settings, "training.checkpoint_every_steps": every or steps}


def _tokens_per_second(run: Run) -> float:
    values = list(run.values("train/tokens_per_second").values())
    return statistics.median(values[len(values) // 2 :])


class _Once:
    """Acts once on the workers of a command that runs, and says when."""

    def __init__(
        self, run: Run, act: Callable[[subprocess.Popen[bytes], list[psutil.Process]], None]
    ) -> None:
        self.run = run
        self.act = act
        self.at = 0.0

    def __call__(self, command: subprocess.Popen[bytes]) -> None:
        if self.at or not find_checkpoints(self.run.folder):
            return
        first = {event["pid"] for event in self.run.events("started")}
        children = psutil.Process(command.pid).children(recursive=True)
        workers = [child for child in children if "TrainWorker" in " ".join(child.cmdline())]
        self.at = time.monotonic()
        self.act(command, sorted(workers, key=lambda worker: worker.pid not in first))

    @property
    def seconds(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.at


def _failures(commands: Commands, call: list[str], settings: dict[str, Any]) -> Iterator[Row]:
    """Kill one rank, which resumes; let another fail; and end a training by SIGTERM."""

    def kill(_: subprocess.Popen[bytes], workers: list[psutil.Process]) -> None:
        workers[-1].kill()

    def refuse_files(_: subprocess.Popen[bytes], workers: list[psutil.Process]) -> None:
        # The first rank writes checkpoints, so its next one is an error.
        workers[0].rlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    def terminate(command: subprocess.Popen[bytes], _: list[psutil.Process]) -> None:
        command.send_signal(signal.SIGTERM)

    for what, act, code in (
        ("one rank killed", kill, 0),
        ("an error on one rank", refuse_files, 1),
        ("SIGTERM", terminate, 130),
    ):
        run = commands.run_record(what.replace(" ", "-"))
        once = _Once(run, act)
        arguments = [*call, run.folder.name]
        commands.run(*arguments, settings=settings, watch=once, expected=code)
        figures: dict[str, Any] = {"until the end (s)": once.seconds}
        resumed = run.events("resumed")
        if code == 0:
            figures = {"resumed after step": resumed[0]["step"] if resumed else "never"}
        problem = None
        if not once.at:
            problem = "the training ended before anything was done to it"
        elif code == 0 and not resumed:
            problem = "no worker resumed"
        elif code and once.seconds > END_SECONDS:
            problem = f"it took longer than {END_SECONDS} s"
        elif code and (run.folder / DONE_NAME).exists():
            problem = "it trained to its end"
        elif not find_checkpoints(run.folder):
            problem = "nothing was saved"
        yield Row(what=what, figures=figures, problem=problem)


NUM_TRIALS = 2


def sweep(setup: Setup) -> Iterator[Row]:
    """Run a sweep of two trials with a GPU each.

    With two GPUs both trials run at once, with one GPU one after the other. On a CPU the sweep runs
    without GPUs.
    """
    on_gpus = setup.device == "cuda"
    commands = Commands(setup, "sweep")
    steps = 4 if setup.is_toy else 60
    settings: dict[str, Any] = {
        "sweep.methods": "[vanilla, iiet]",
        "sweep.iterations": "[1]",
        "training.num_steps": steps,
        "training.checkpoint_every_steps": steps,
    }
    if setup.is_toy:
        settings["evaluation.num_items"] = 20
    if on_gpus:
        settings["cluster.num_gpus"] = min(setup.num_gpus, NUM_TRIALS)
        settings["sweep.gpus_per_trial"] = 1.0
    seconds = commands.run("sweep-iterations", "--name", "two", settings=settings)
    runs = [Run(path) for path in sorted(commands.workspace.runs.iterdir())]
    spans = [(run.records[0]["time"], run.records[-1]["time"]) for run in runs]
    overlap = min(end for _, end in spans) - max(start for start, _ in spans)
    figures: dict[str, Figure] = {
        "seconds": seconds,
        "overlap (s)": max(0.0, overlap / 1000),  # Both trials trained.
    }
    starts = [run.events("started")[0] for run in runs]
    gpus = [str(start.get("visible_gpus")) for start in starts]
    if on_gpus:
        figures["GPUs of the trials"] = " and ".join(gpus)

    trials = load_sweep_results(commands.workspace, "two").results
    num_finished = sum(trial.value("quality/accuracy") is not None for trial in trials)
    problem = None
    if num_finished != NUM_TRIALS:
        problem = f"{num_finished} of {NUM_TRIALS} trials have an accuracy"
    elif devices := {str(start["device"]) for start in starts} - {setup.device}:
        problem = f"trials ran on {', '.join(devices)}, not on {setup.device}"
    elif on_gpus and setup.num_gpus >= NUM_TRIALS and len(set(gpus)) != NUM_TRIALS:
        problem = f"both trials ran on GPU {gpus[0]}"
    what = "a GPU for each trial" if on_gpus else "on CPUs"
    yield Row(what=what, figures=figures, problem=problem)
