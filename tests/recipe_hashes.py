"""Hashes of what a recipe trains: settings, order of the data, initial weights, and keys.

`python tests/recipe_hashes.py` writes them to `fixtures/recipe/hashes.json`, with which a test
compares them. Do so only when a change of recipe is meant: the same command then trains another
model than before. Settings and orders are integers and texts, equal on every machine. Weights are
drawn by PyTorch's generator on the CPU, whose last bits may differ between processors; so their
names, shapes and values rounded to two decimals (half a standard deviation) are hashed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from model_cases import schedule_for

from iiet import METHODS, Decoder, IterationSchedule, preset
from iiet.model.config import ATTENTION_OPTIONS, DistillationConfig
from orchestrator.data.depth import write_depth
from orchestrator.data.mixture import open_data
from orchestrator.data.order import ComponentOrder, WindowOrder, positions_of_step
from orchestrator.data.split import is_validation
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.settings import (
    DataSettings,
    ElasticSettings,
    Settings,
    TrainingSettings,
    read_settings,
)
from orchestrator.settings.data import DepthSettings
from orchestrator.settings.evaluation import Prompts
from orchestrator.settings.files import shipped_sweeps
from orchestrator.training.job import job_key
from orchestrator.training.schedules import drawn_by_step
from orchestrator.workspace.layout import PROVENANCE

FILE = Path(__file__).resolve().parent / "fixtures" / "recipe" / "hashes.json"
SECTIONS = (
    "data", "model", "source_training", "training", "distillation", "influence", "evaluation",
    "sweep", "search",
)  # fmt: skip
"""Sections of the settings that say what is trained and measured, as far as they are there."""
ADDED = (
    "training.sequence_length", "distillation.training.sequence_length",
    "evaluation.sequence_length", "data.chat_template", "data.passage_characters",
    "training.gate_rate_factor", "distillation.training.gate_rate_factor",
    "training.source", "distillation.training.source",
    "training.trained_layers", "distillation.training.trained_layers",
    "training.source_kl_weight", "distillation.training.source_kl_weight",
    *(
        f"{section}.{name}"
        for section in ("source_training", "training", "distillation.training")
        for name in ("optimizer", "muon_rate_factor", "muon_momentum")
    ),
    "sweep.source_controls", "evaluation.retention", "data.depth.symbols",
    *(f"model.{name}" for name in ("head_dim", *ATTENTION_OPTIONS)),
)  # fmt: skip
"""Settings that came later; at their defaults they change nothing, and are not hashed."""
DEPTH_TASKS = ("phop_2", "chain_3", "lookup_2", "s5_4")
CONTEXT = 32
POSITIONS = np.arange(600, dtype=np.int64)


def recipe_hashes() -> dict[str, dict[str, str]]:
    """Return group -> name -> hash."""
    # Not those of packages that happen to be installed.
    own_methods = [name for name in METHODS if METHODS[name].__module__.startswith("iiet.")]
    return {
        "settings": _settings(),
        "order of the data": _orders(),
        "initial weights": {method: _hash(_weights(method)) for method in own_methods},
        "keys of trainings": _keys(),
        "keys of evaluations": _evaluation_keys(),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _settings() -> dict[str, str]:
    shipped = {name: _sections(read_settings(name)) for name in shipped_sweeps()}
    default_hashes = {
        f"default {name}": _hash(value) for name, value in _sections(Settings()).items()
    }
    return default_hashes | {f"sweep {name}": _hash(value) for name, value in shipped.items()}


def _sections(settings: Settings) -> dict[str, Any]:
    tree = settings.model_dump(mode="json")
    defaults = Settings().model_dump(mode="json")
    defaults["source_training"] = defaults["training"]  # A section of the same type.
    for key in ADDED:
        *sections, name = key.split(".")
        section = reduce(getitem, sections, tree)
        if section is not None and section[name] == reduce(getitem, sections, defaults)[name]:
            del section[name]
    return {name: tree[name] for name in SECTIONS if tree[name] is not None}


def _orders() -> dict[str, str]:
    windows = [WindowOrder(10_007, CONTEXT, seed).starts(POSITIONS) for seed in (0, 1)]
    shares = [positions_of_step(3, global_batch=7, rank=r, world_size=2) for r in (0, 1)]
    sources = ComponentOrder.of_shares((0.5, 0.3, 0.2)).split(POSITIONS, key=1)
    texts = map("document {}".format, range(200))
    elastic = TrainingSettings(num_steps=100, elastic=ElasticSettings(num_drawn=2))
    drawn = drawn_by_step(IterationSchedule((3, 2)), elastic)
    return {
        "windows of a text": _hash([order.tolist() for order in windows]),
        "shares of workers": _hash([share.tolist() for share in shares]),
        "sources of a mixture": _hash([[v.tolist() for v in source] for source in sources]),
        "held-out documents": _hash([is_validation(text, 0.1) for text in texts]),
        "elastic schedules": _hash([[str(s) for s in drawn(step)] for step in range(100)]),
        **{f"sequences of {task}": _hash(_sequences(task)) for task in DEPTH_TASKS},
    }


def _sequences(task: str) -> list[list[int]]:
    depth = DepthSettings(tasks=(task,), length=CONTEXT)
    with TemporaryDirectory() as parent:
        folder = write_depth(DataSettings(source="depth", depth=depth), Path(parent))
        data = open_data(folder)
        batch = data.sequences(POSITIONS[:8], context_length=CONTEXT, seed=0)
    return [*batch.input_ids.tolist(), *batch.targets.tolist()]


def _weights(method: str) -> list[Any]:
    sizes = {"num_layers": 2, "dim": 32, "num_heads": 2, "ffn_dim": 48, "vocab_size": 64}
    schedule = schedule_for(method, (2, 1))
    torch.manual_seed(0)
    weights = Decoder(preset("tiny", method=method, schedule=schedule, **sizes)).state_dict()
    return [
        [name, list(weight.shape), (weight.double() * 100).round().int().flatten().tolist()]
        for name, weight in sorted(weights.items())
    ]


def _keys() -> dict[str, str]:
    """Return the keys by which finished trainings are found again, by what is trained."""
    model = preset("tiny", vocab_size=64, schedule=IterationSchedule((2, 1)), num_layers=2)
    vanilla = replace(model, method="vanilla", schedule=IterationSchedule((0, 0)))
    elastic = ElasticSettings(schedules=("1",), num_drawn=2)
    with TemporaryDirectory() as folder:
        (Path(folder) / PROVENANCE).write_text(
            '{"checksums": {"model.safetensors": "0123456789abcdef"}}'
        )
        student = {"teacher_folder": folder, "initial_folder": folder, "objective": "distill"}
        reverse = DistillationConfig(divergence="reverse", start_step=3)
        jobs: dict[str, dict[str, Any]] = {
            "pretraining": {},
            "vanilla": {"model": vanilla},
            "other recipe": {"recipe": TrainingSettings(decay="wsd", spike_factor=9.0, seed=3)},
            "shorter sequences": {"recipe": TrainingSettings(sequence_length=8)},
            "elastic": {"recipe": TrainingSettings(elastic=elastic)},
            "student": student,
            "student of another loss": {**student, "distillation": reverse},
            "student without a teacher": {**student, "objective": "cross_entropy"},
            "student of fewer layers": {**student, "kept_layers": (0, 3)},
        }
        usual = {"run_folder": "", "tokens_folder": "", "model": model}
        return {
            name: job_key(TrainingJob(**{**usual, "recipe": TrainingSettings(), **fields}))
            for name, fields in jobs.items()
        }


def _evaluation_keys() -> dict[str, str]:
    """Return the keys by which trials and the results of tasks are found again."""
    usual_suite = Suite(tokens_folder="tokens", tokens="0123", suite="heldout-4567", batch_size=16)
    changes: dict[str, Any] = {
        "tasks": ("a", "b"),
        "limit": 3,
        "num_fewshot": 2,
        "precision": "bf16",
    }
    changes |= {"prompts": Prompts(chat_template=True), "sequence_length": 8}
    other_suite = usual_suite.model_copy(update={**changes, "fingerprints": {"a": "89ab"}})
    result = {"model_key": ["weights", "text"], "fingerprint": "89ab", "context_length": 16}
    return {
        "a suite": usual_suite.key,
        "another suite": other_suite.key,
        "a result": usual_suite.result_key(**result, precision="fp32"),
        "a result of shorter sequences": other_suite.result_key(
            **result, precision="bf16", limit=3
        ),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(recipe_hashes(), indent=2) + "\n", encoding="utf-8")
