"""Where and at which size the sections run, and what they share: tokens and training jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iiet.config import ModelConfig
from orchestrator.data.preparation import prepare
from orchestrator.records.training import TrainingJob
from orchestrator.settings import DataSettings, TrainingSettings
from orchestrator.training.distributed import World
from orchestrator.workspace.layout import open_workspace


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Device, size and folder of all sections."""

    device: Literal["cpu", "cuda"]
    num_gpus: int
    """GPUs of this machine; 0 if the sections run on the CPU."""
    is_toy: bool
    """Tiny sizes, which only test the sections."""
    folder: Path
    """Workspace of all sections."""

    @property
    def world(self) -> World:
        """A single worker on the device."""
        return World(device="cuda:0" if self.device == "cuda" else "cpu")

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """Arithmetic of trainings on this device, as settings choose it."""
        return "bf16" if self.device == "cuda" else "fp32"

    @property
    def data(self) -> DataSettings:
        """The English texts that come with Python."""
        if self.is_toy:
            return DataSettings(max_documents=250, vocab_size=400)
        return DataSettings()

    def tokens(self) -> Path:
        """Return the folder of prepared tokens; the first call prepares them."""
        return prepare(self.data, open_workspace(self.folder))

    def job(self, name: str, model: ModelConfig, **recipe: Any) -> TrainingJob:
        """Return a training in a new folder: corrections from the first step, no checkpoint.

        Args:
            recipe: Fields of `TrainingSettings`; `num_steps` is one of them.
        """
        rest = {
            "precision": self.precision,
            "compile": False,
            "iterate_from_fraction": 0.0,
            "warmup_steps": 10,
            "learning_rate": 1e-3,
            "validate_every_steps": recipe["num_steps"],
            "num_validation_tokens": model.context_length,
            "checkpoint_every_steps": recipe["num_steps"],
        }
        return TrainingJob(
            run_folder=str(self.folder / "trainings" / name),
            tokens_folder=str(self.tokens()),
            model=model,
            recipe=TrainingSettings(**{**rest, **recipe}),
        )

    @property
    def command_settings(self) -> dict[str, Any]:
        """Settings of a small pretraining by `iiet-orch`: key to value."""
        data = self.data
        values = {
            "data.vocab_size": data.vocab_size,
            "model.corrections": 1,
            "training.iterate_from_fraction": 0.0,
            "training.learning_rate": 1e-3,
            "training.warmup_steps": 10,
        }
        if not self.is_toy:
            return values | {
                "model.preset": "55m",
                "training.num_tokens_per_step": 8 * 2048,
            }
        return values | {
            "data.max_documents": data.max_documents,
            "model.dim": 32,
            "model.num_layers": 2,
            "model.num_heads": 2,
            "model.ffn_dim": 64,
            "model.context_length": 64,
            "training.num_tokens_per_step": 4 * 64,
            "training.num_validation_tokens": 64,
            "evaluation.num_items": 20,
        }
