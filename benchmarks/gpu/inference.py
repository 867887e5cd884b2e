"""Sections that use a finished model: decoding against the memory bandwidth, and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import TOY_MODEL
from benchmarks.gpu.hardware import copy_bandwidth
from benchmarks.gpu.training import training_job
from benchmarks.report import Figure, Row, problem_unless
from benchmarks.runner import Setup
from benchmarks.shape import largest_regret
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.model.config import preset
from orchestrator.evaluation.decode_timing import decode_milliseconds, random_prompt, torch_threads
from orchestrator.pipelines.evaluating import evaluate
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.settings.training import Precision
from orchestrator.terminal.progress import Progress
from orchestrator.training.trainer import run_job

CORRECTIONS = 3
REGRET_TOLERANCE = 0.1
"""By how much the logit of a decoded token may be below the largest: bf16 rounds by about 0.01."""


def decoding(setup: Setup) -> Iterator[Row]:
    """Time decoding under r = 0 and r = 3 for each size, and the reading of its weights.

    Tokens are decoded as `generate` does it, by CUDA graphs on a GPU, and must be those that the
    full forward pass finds likeliest. A step has to read the weights of each evaluation, and its
    keys and values. The bound is these bytes (`iiet/cost.py`) divided by the bandwidth, which is
    measured here.
    """
    device = setup.world.device
    bandwidth = copy_bandwidth(device, 2**22 if setup.is_toy else 2**30)
    yield Row(what="memory bandwidth, by copying", figures={"GB/s": bandwidth / 1e9})
    # Eight layers of the largest size show the same as all.
    sizes: dict[str, Any] = {"55m": {}, "340m": {}, "1.3b": {"num_layers": 8}}
    for name, changes in ({"tiny": TOY_MODEL} if setup.is_toy else sizes).items():
        config = preset(name, schedule=CORRECTIONS, **changes)
        label = f"{name}, {config.num_layers} layers"
        with torch.device(device):
            decoder = Decoder(config).to(torch.bfloat16).eval()
        new = 8 if setup.is_toy else 128
        regret = largest_regret(decoder, random_prompt(decoder, 1, new), new)
        yield Row(
            what=f"{label}, decoded tokens",
            figures={"logits below the largest (std)": regret, "tolerance": REGRET_TOLERANCE},
            problem=problem_unless(regret, REGRET_TOLERANCE, "they are not the full forward's"),
        )
        yield from _decoded(setup, label, decoder, bandwidth)


def _without_graphs(step: Callable[[], Tensor], _: torch.device) -> Callable[[], Tensor]:
    """Start the kernels of each step, of the same shapes as in a graph."""
    return step


def _decoded(setup: Setup, label: str, decoder: Decoder, bandwidth: float) -> Iterator[Row]:
    prompt, new, repetitions = (8, 8, 3) if setup.is_toy else (128, 128, 7)
    none = decoder.schedule.none(decoder.config.num_layers)
    decoders = {"r = 0": decoder.with_schedule(none), f"r = {CORRECTIONS}": decoder}
    with torch_threads(1):
        timings, timings_without_graphs = (
            decode_milliseconds(
                decoders,
                prompt_tokens=prompt,
                new_tokens=new,
                repetitions=repetitions,
                capture=capture,
            )
            for capture in (None, _without_graphs)
        )
    before: tuple[float, int] | None = None
    for name, one in decoders.items():
        cost = inference_cost(one.config, context_length=prompt + new // 2, bytes_per_value=2)
        read = cost.weight_bytes_per_token + cost.kv_bytes_read_per_token
        milliseconds = timings[name].median
        evaluations = cost.evaluations_per_token
        bound = 1e3 * read / bandwidth
        figures: dict[str, Figure] = {
            "ms/token": milliseconds,
            "without graphs (ms)": timings_without_graphs[name].median,
            "bound (ms)": bound,
            "share of the bound": bound / milliseconds,
            "us/evaluation": 1e3 * milliseconds / evaluations,
        }
        if before:  # What corrections add to r = 0.
            added = evaluations - before[1]
            figures["us/correction"] = 1e3 * (milliseconds - before[0]) / added
        before = milliseconds, evaluations
        yield Row(what=f"{label}, {name}", figures=figures)


BITS_TOLERANCE = 0.01
"""Largest difference of bits per byte from float32's."""


class _Timer(Progress):
    """Takes the time from the start of the tasks to their end."""

    def start(self, *_: Any, **__: Any) -> None:
        self._started = self._ended = time.perf_counter()

    def advance(self, *_: Any, **__: Any) -> None:
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._ended - self._started


def evaluation(setup: Setup) -> Iterator[Row]:
    """Evaluate one model, trained for a few steps, by `orchestrator.evaluate` in both precisions.

    The time is that of the tasks: without loading the model and opening MLflow's store. Accuracies
    may change by rounding; bits per byte must hardly change.
    """
    model = preset("tiny", **TOY_MODEL) if setup.is_toy else preset("55m")
    steps, sequences = (4, 2) if setup.is_toy else (50, 8)
    num_tokens = sequences * model.context_length
    job = training_job(setup, "evaluated", model, steps, num_tokens_per_step=num_tokens)
    checkpoint = Path(str(run_job(job, world=setup.world).checkpoint))
    num_items = 20 if setup.is_toy else EvaluationSettings().num_items
    exact: dict[str, float] = {}
    runs: tuple[tuple[str, Precision, int | None], ...] = (
        ("warm-up", "fp32", 5),
        ("fp32", "fp32", None),
        ("bf16", "bf16", None),
    )
    for what, precision, limit in runs:
        timer = _Timer()
        settings = EvaluationSettings(num_items=num_items, precision=precision, limit=limit)
        found = evaluate(
            Settings(evaluation=settings),
            workspace=setup.folder,
            models=[checkpoint],
            progress=timer,
        )
        [result] = found.evaluations.values()
        quality = result.quality()
        exact = exact if what == "bf16" else quality
        difference = abs(quality["bits_per_byte"] - exact["bits_per_byte"])
        differ = f"bits per byte differ by {difference:.2g} from those in fp32"
        if what != "warm-up":
            yield Row(
                what=what,
                figures={
                    "items": result.num_items,
                    "items/s": result.num_items / timer.seconds,
                    "accuracy": quality["accuracy"],
                    "bits per byte": quality["bits_per_byte"],
                },
                problem=problem_unless(difference, BITS_TOLERANCE, differ),
            )
