"""A settings file for one's own data and size, made from a shipped sweep of that size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from orchestrator.settings.rendering import explained_yaml
from orchestrator.settings.resolve import read_settings
from orchestrator.settings.schema import Settings
from orchestrator.settings.shipped import shipped_sweeps

Size = Literal["tiny", "55m", "340m"]
SIZES: tuple[Size, ...] = get_args(Size)
_SWEEP_OF_SIZE = {"tiny": "toy", "55m": "paper-55m", "340m": "paper-340m"}
_VOCABULARY_OF_PAPER = 32000
_ALWAYS_WRITTEN = (
    "data.source", "data.files", "data.hub_name", "data.text_field", "data.tokenizer",
    "data.vocab_size", "model.preset", "model.method", "model.corrections", "training.num_steps",
    "training.num_tokens_per_step", "training.learning_rate", "training.seed",
    "distillation.training.num_steps", "distillation.training.learning_rate", "evaluation.suite",
    "sweep.kind", "sweep.num_schedules", "cluster.num_gpus",
)  # fmt: skip
"""What a beginner changes first; beside it what differs from the defaults is written."""


def starting_settings(
    size: Size,
    *,
    files: Sequence[str] = (),
    hub_name: str | None = None,
    tokenizer: str = "train",
    steps: int | None = None,
    gpus: int | None = None,
) -> Settings:
    """Return the settings of a shipped sweep of a size, for other data.

    Raises:
        UserError: If they are not valid.
    """
    sweep = shipped_sweeps()[_SWEEP_OF_SIZE[size]]
    data: dict[str, Any] = {
        "data.source": "hub" if hub_name else "files",
        "data.files": list(files),
        "data.hub_name": hub_name or "",
        "data.tokenizer": tokenizer,
        "data.max_documents": None,
    }
    if size != "tiny":
        data["data.vocab_size"] = _VOCABULARY_OF_PAPER
    given = {"training.num_steps": steps, "cluster.num_gpus": gpus}
    return read_settings(sweep, (), data | {k: v for k, v in given.items() if v is not None})


def starting_yaml(settings: Settings) -> str:
    """Return such settings as a commented YAML file."""
    unused = "data.files" if settings.data.source == "hub" else "data.hub_name"

    def choose(name: str, value: Any, default: Any) -> bool:
        return name != unused and (name in _ALWAYS_WRITTEN or value != default)

    head = (
        f"# A sweep on your own text: a {settings.model.preset} teacher, its influence, and\n"
        "# a front of distilled schedules. What is not written here has its default:\n"
        "# `iiet-orch config show` prints all settings.\n\n"
    )
    return head + explained_yaml(settings, choose).rstrip("\n") + "\n"
