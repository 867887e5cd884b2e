"""The cost of IIET relative to a vanilla model of the same shape, from 1M to 25M parameters.

Three costs: a training step (forward, backward, clipping, AdamW), a decoded token at batch 1, and a
sweep's trial (the training and evaluation that `run_trial` makes; `sweep` shows that Ray adds
nothing to it). The three models of a size take turns. An IIET with r corrections makes 1 + r times
the evaluations; embedding, head and what a trial does beside them cost the same, so its ratio to
vanilla is smaller in small models. All run on one thread, so processor time is measured: it depends
less on what else the machine does. `benchmarks/model_size_figure.py` draws the stored numbers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.decoded_tokens import largest_regret
from benchmarks.report import Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns
from iiet import Decoder, ModelConfig, num_parameters, stream
from iiet.losses import next_token_loss
from orchestrator.data.preparation import prepare
from orchestrator.evaluation.decode_timing import random_prompt
from orchestrator.pipelines.sweeps import load_tasks, plan_iterations
from orchestrator.settings import Settings, resolve_settings
from orchestrator.sweeping.trial_run import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import open_workspace

__all__ = ["COSTS", "MODELS", "VANILLA", "measure"]

COSTS = ("training step", "decoded token", "trial of a sweep")
VANILLA = "vanilla"
MODELS: Mapping[str, int | None] = {VANILLA: None, "r = 1": 1, "r = 3": 3}
"""Label to corrections per layer; None for the vanilla method."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Size:
    shapes: tuple[tuple[int, int], ...] = ((128, 4), (192, 6), (256, 9), (448, 10))
    """Width and number of layers: about 1M, 3M, 8M and 25M parameters."""
    vocab_size: int = 2048
    context_length: int = 128
    num_sequences: int = 2
    prompt_tokens: int = 32
    new_tokens: int = 32
    repetitions: int = 5
    num_trial_steps: int = 8
    num_items: int = 20
    num_documents: int = 100
    trial_repetitions: int = 1


_FULL = _Size()
_QUICK = _Size(
    shapes=((32, 2),),
    vocab_size=400,
    context_length=64,
    prompt_tokens=4,
    new_tokens=4,
    repetitions=2,
    num_trial_steps=2,
    num_items=20,
    trial_repetitions=1,
)


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure the three costs of three models at each size.

    `quick`: one tiny size, which only tests the benchmark. `say` reports progress.
    """
    size = _QUICK if quick else _FULL
    rows: list[Row] = []
    checks: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        trials = _Trials(size, Path(folder))
        for dim, num_layers in size.shapes:
            configs = {label: _config(size, dim, num_layers, r) for label, r in MODELS.items()}
            decoders = {label: fresh_decoder(config) for label, config in configs.items()}
            place = f"{num_parameters(configs[VANILLA]) / 1e6:.2g}M parameters"
            checks += [_check(label, decoder, place) for label, decoder in decoders.items()]
            say(f"model_size: {place}")
            measured = (
                _training_steps(decoders, size),
                _decoded_tokens(decoders, size),
                trials.milliseconds(dim, num_layers),
            )
            for cost, times in zip(COSTS, measured, strict=True):
                rows += _rows(cost, place, times, configs)
    setting = (
        "processor time; "
        f"heads of 64, ffn 2.75 d, vocabulary {size.vocab_size}, float32; a step has "
        f"{size.num_sequences} x {size.context_length} tokens, {size.repetitions} repetitions in "
        f"turns; decoding at batch 1 after {size.prompt_tokens} tokens; a trial has "
        f"{size.num_trial_steps} such steps, two held-out tasks of {size.num_items} items and the "
        f"validation loss, {size.trial_repetitions} repetitions"
    )
    return Report(title="model_size", setting=setting, rows=tuple(rows), checks=tuple(checks))


def _config(size: _Size, dim: int, num_layers: int, corrections: int | None) -> ModelConfig:
    return shaped_config(
        dim,
        num_layers=num_layers,
        vocab_size=size.vocab_size,
        context_length=size.context_length,
        method="vanilla" if corrections is None else "iiet",
        num_corrections=corrections,
    )


def _check(label: str, decoder: Decoder, place: str) -> str:
    """Compare decoded tokens with the likeliest ones of the full forward."""
    regret = largest_regret(decoder, random_prompt(decoder, 1, 8), 8)
    what = f"logits of decoded tokens and the full forward's largest, {label}, {place},"
    return checked(what, regret, _TOLERANCE)


def _training_steps(decoders: Mapping[str, Decoder], size: _Size) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(1)
    shape = (size.num_sequences, size.context_length)
    input_ids = torch.randint(size.vocab_size, shape, generator=generator)

    def task(decoder: Decoder) -> Callable[[], float]:
        # No rate: each repetition has the same weights.
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.0)

        def step() -> None:
            torch.autograd.backward(next_token_loss(decoder(input_ids), input_ids))
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return stopwatch(step, clock=time.process_time)

    tasks = {label: task(decoder.train()) for label, decoder in decoders.items()}
    seconds = take_turns(tasks, repetitions=size.repetitions)
    return {label: [1e3 * value for value in values] for label, values in seconds.items()}


def _decoded_tokens(decoders: Mapping[str, Decoder], size: _Size) -> dict[str, list[float]]:
    def task(decoder: Decoder) -> Callable[[], float]:
        prompt = random_prompt(decoder, 1, size.prompt_tokens)

        def decode() -> float:
            steps = stream(decoder, prompt, max_new_tokens=size.new_tokens)
            next(steps)  # The prefill is not part of a token's cost.
            started = time.process_time()
            for _ in steps:
                pass
            return 1e3 * (time.process_time() - started) / (size.new_tokens - 1)

        return decode

    tasks = {label: task(decoder.eval()) for label, decoder in decoders.items()}
    return take_turns(tasks, repetitions=size.repetitions)


class _Trials:
    """Trials of sweeps over the three models, each in a new workspace."""

    def __init__(self, size: _Size, folder: Path) -> None:
        self.size, self.folder = size, folder
        self._num_sweeps = 0

    def milliseconds(self, dim: int, num_layers: int) -> dict[str, list[float]]:
        """Run the trials in turns, a sweep for each repetition."""
        found: dict[str, list[float]] = {label: [] for label in MODELS}
        for _ in range(self.size.trial_repetitions):
            settings = self._settings(dim, num_layers)
            self._num_sweeps += 1
            workspace = open_workspace(self.folder / str(self._num_sweeps))
            tokens = prepare(settings.data, workspace, Progress())
            plan = plan_iterations(settings, workspace, tokens, hashes={})
            load_tasks(settings.evaluation, tokens, plan.trials[0].model, Progress())
            for trial in plan.trials:
                started = time.process_time()
                run_trial(trial)
                found[trial.label].append(1e3 * (time.process_time() - started))
        return found

    def _settings(self, dim: int, num_layers: int) -> Settings:
        size = self.size
        config = _config(size, dim, num_layers, None)
        model: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("dim", "num_layers", "num_heads", "ffn_dim", "context_length")
        }
        recipe = {
            "num_steps": size.num_trial_steps,
            "num_tokens_per_step": size.num_sequences * size.context_length,
            "num_validation_tokens": size.context_length,
            "iterate_from_fraction": 0.0,
        }
        counts = [r for r in MODELS.values() if r is not None]
        return resolve_settings(
            {
                "data": {"vocab_size": size.vocab_size, "max_documents": size.num_documents},
                "model": model,
                "training": recipe,
                "evaluation": {"num_items": size.num_items},
                "sweep": {
                    "kind": "iterations",
                    "methods": ["vanilla", "iiet"],
                    "iterations": counts,
                },
            }
        )


def _rows(
    cost: str, place: str, times: Mapping[str, list[float]], configs: Mapping[str, ModelConfig]
) -> list[Row]:
    vanilla = Quantity(VANILLA, Spread.of(times[VANILLA]), "ms")
    rows = []
    for label in list(MODELS)[1:]:
        parameters = Spread.of([num_parameters(configs[label]) / 1e6])
        rows.append(
            Row(
                what=f"{cost}, {label} / vanilla, {place}",
                quantities=(
                    Quantity(label, Spread.of(times[label]), "ms"),
                    vanilla,
                    Quantity("size", parameters, "M parameters"),
                ),
                ratio=paired_ratio(times[label], times[VANILLA]),
            )
        )
    return rows
