"""Evaluation against lm-eval's own class for transformers (`lm_eval --model hf`), item for item.

Both programs read the same folder: an IIET as `iiet-orch export` writes it, and a Llama of
transformers. lm-eval runs as well as its users can run it: loaded once, float32, no bootstrap, the
faster of two batch sizes, and task by task (one call for several tasks can score wrongly where
they share a text). Models and tasks are loaded before; building the prompts, tokenizing and the
metrics are part of the time. The ratios are of CPU seconds, which a busy machine changes less.

Tasks: the held-out suite of the demo's corpus; and official items of PIQA, ARC and LAMBADA if the
environment variable `IIET_BENCHMARK_TASKS` names a folder with lm-eval's files of such tasks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from benchmarks.decoding import llama_of
from benchmarks.report import RATIO, Goal, Row, checked
from benchmarks.runner import Setup
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, take_turns
from iiet import published_from_decoder
from iiet.exporting import export, fast_tokenizer
from orchestrator.data.store import open_tokens
from orchestrator.evaluation.adapter import DecoderModel, run_task, suppress_output
from orchestrator.evaluation.heldout import heldout_folder, read_suite
from orchestrator.evaluation.tasks import Suite, TaskSelection, load_suite
from orchestrator.models.open import open_model
from orchestrator.records.evaluation import STDERR_SUFFIX, TaskResult
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress

_OFFICIAL_VARIABLE = "IIET_BENCHMARK_TASKS"
_OFFICIAL_NAMES = {
    "PIQA": "local_piqa",
    "ARC easy": "local_arc_easy",
    "LAMBADA": "local_lambada_openai",
}
_TOLERANCE = 1e-4
_GOAL = Goal("at least", 1.3)
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class _Size:
    dim: int = 256
    num_layers: Mapping[str, int] = field(default_factory=lambda: {"llama": 12, "iiet": 6})
    vocab_size: int = 8192
    max_documents: int | None = None
    context_length: int = 512
    num_items: int = 32
    """Items of each task."""
    batch_sizes: tuple[int, ...] = (16, 32)
    repetitions: int = 2
    goal: Goal | None = _GOAL


_QUICK = _Size(
    dim=16, num_layers={"llama": 2, "iiet": 2}, vocab_size=512, max_documents=200,
    context_length=64, num_items=4, batch_sizes=(2,), repetitions=2, goal=None,
)  # fmt: skip


def evaluation(setup: Setup) -> Iterator[Row]:
    """Measure items per second of both programs; at toy size of the held-out suite only."""
    size = _QUICK if setup.is_toy else _Size()
    given = None if setup.is_toy else os.environ.get(_OFFICIAL_VARIABLE)
    tokens = setup.tokens(
        DataSettings(vocab_size=size.vocab_size, max_documents=size.max_documents)
    )
    heldout = heldout_folder(
        tokens, num_items=size.num_items, context_length=size.context_length, make=Progress()
    )
    compared = {name: [task] for name, task in _OFFICIAL_NAMES.items()} if given else {}
    compared["held-out suite"] = list((read_suite(heldout) or {})["tasks"])
    selection = TaskSelection(
        names=tuple(task for tasks in compared.values() for task in tasks),
        folders=(Path(given),) if given else (),
        heldout=heldout,
    )
    suite = load_suite(selection)
    yield Row(
        what=f"width {size.dim}, vocabulary {open_tokens(tokens).vocab_size:,}, float32, up to "
        f"{size.num_items} items per task, lm-eval with the best batch size of {size.batch_sizes};"
        f" ratios of CPU seconds; {size.repetitions} repetitions in turns"
    )
    for kind, layers in size.num_layers.items():
        pair = _Pair(_save_model(kind, size, tokens, setup.folder / kind), suite, size)
        for name, tasks in compared.items():
            shape = f"{layers} layers" + (", r = 2" if kind == "iiet" else "")
            yield from pair.compare(f"{name}, {kind} ({shape})", tasks)


def _save_model(kind: str, size: _Size, tokens: Path, folder: Path) -> Path:
    """Write a folder for transformers with random weights, and return it."""
    store = open_tokens(tokens)
    config = shaped_config(
        size.dim,
        size.num_layers[kind],
        store.vocab_size,
        size.context_length,
        method="vanilla" if kind == "llama" else kind,
        schedule=2 if kind == "iiet" else None,
    )
    decoder, file = fresh_decoder(config), store.tokenizer_path
    with suppress_output():
        if kind == "iiet":
            return export(decoder, folder, tokenizer_file=file, end_of_text=_END_OF_TEXT)
        llama_of(config, published_from_decoder(decoder)).save_pretrained(folder)
    tokenizer = fast_tokenizer(file, end_of_text=_END_OF_TEXT, context_length=size.context_length)
    tokenizer.save_pretrained(folder)
    return folder


class _Pair:
    """One model, loaded by both programs."""

    def __init__(self, folder: Path, suite: Suite, size: _Size) -> None:
        self._suite, self._size = suite, size
        model = open_model(folder)
        self._decoder, self._tokenizer = model.decoder(), model.tokenizer()
        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "trust_remote_code": True}
        with suppress_output():
            self._by_batch_size = {
                batch_size: HFLM(pretrained=str(folder), batch_size=batch_size, **options)
                for batch_size in size.batch_sizes
            }

    def compare(self, what: str, tasks: Sequence[str]) -> Iterator[Row]:
        """Check that all numbers agree, and measure both programs on some tasks."""
        found = self._ours(tasks)
        times: dict[int, float] = {}
        for batch_size, stock in self._by_batch_size.items():
            started = time.process_time()
            reference = self._stock(stock, tasks)
            times[batch_size] = time.process_time() - started
        yield checked(f"numbers of {what}", _largest_difference(found, reference), _TOLERANCE)
        best = self._by_batch_size[min(times, key=times.__getitem__)]

        def timed(work: Callable[[], object]) -> tuple[float, float]:
            """Return the seconds of processor and clock."""
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            return time.process_time() - cpu, time.perf_counter() - wall

        pairs = take_turns(
            {
                "lm-eval": lambda: timed(lambda: self._stock(best, tasks)),
                "ours": lambda: timed(lambda: self._ours(tasks)),
            },
            repetitions=self._size.repetitions,
            warm_ups=0,
        )
        num_items = sum(self._suite.num_items(name, self._size.num_items) for name in tasks)
        cpu, wall = ({name: [pair[i] for pair in pairs[name]] for name in pairs} for i in (0, 1))
        speeds = {
            f"{name}, {clock} (items/s)": Spread.of([num_items / t for t in each])
            for clock, seconds in (("cpu", cpu), ("wall", wall))
            for name, each in seconds.items()
        }
        ratio = paired_ratio(cpu["lm-eval"], cpu["ours"])
        yield Row(what=what, figures={**speeds, RATIO: ratio}, goal=self._size.goal)

    def _ours(self, tasks: Sequence[str]) -> dict[str, TaskResult]:
        model, limit = DecoderModel(self._decoder, self._tokenizer), self._size.num_items
        return {
            name: run_task(name, self._suite.tasks[name], model, limit).result for name in tasks
        }

    def _stock(self, model: HFLM, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
        results = {}
        with suppress_output():
            for name in tasks:
                output = evaluator.evaluate(
                    lm=model,
                    task_dict={"tasks": {name: self._suite.tasks[name]}},
                    limit=self._size.num_items,
                    bootstrap_iters=0,
                )
                results[name] = output["results"][name]
        return results


def _largest_difference(
    ours: Mapping[str, TaskResult], stock: Mapping[str, Mapping[str, Any]]
) -> float:
    """Compare all metrics but standard errors: absolute below 1, else relative."""
    largest: float = max(
        abs(value - stock[name][f"{metric},none"]) / max(1.0, abs(value))
        for name, result in ours.items()
        for metric, value in result.metrics.items()
        if not metric.endswith(STDERR_SUFFIX)
    )
    return largest
