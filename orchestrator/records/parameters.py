"""Parameters of tracked runs: those that apply to a run, each under one name on every run.

A method without corrections has no schedule, a recipe without a teacher has no divergence, and what
is switched off is left out. Settings that change no result (how often to save, how to share the
memory) are no parameters either: they are in the `settings.yaml` of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from iiet.methods import METHODS
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings, TrainingSettings

SIZES = (
    "num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "context_length",
    "tie_embeddings",
)  # fmt: skip
RECIPE = (
    "num_steps", "num_tokens_per_step", "learning_rate", "warmup_steps", "decay", "weight_decay",
    "beta1", "beta2", "clip_norm", "precision", "seed",
)  # fmt: skip


def method_parameters(model: ModelConfig) -> dict[str, str]:
    """Return a model's method, and its schedule if the method makes corrections."""
    params = {"method": model.method}
    if METHODS[model.method].has_corrections:
        params["schedule"] = str(model.corrections)
    return params


def schedule_parameters(model: ModelConfig) -> dict[str, str]:
    """Return a model's method and corrections; `r_NN` are those of a layer, for charts."""
    params = method_parameters(model)
    if "schedule" in params:
        params |= {f"r_{layer:02d}": str(r) for layer, r in enumerate(model.corrections, start=1)}
    return params


def model_parameters(model: ModelConfig) -> dict[str, str]:
    """Return the method, the corrections, the sizes, and the options that are no defaults."""
    options = model.to_dict().get("method_options", {})
    chosen = {f"option.{name}": value for name, value in options.items()}
    sizes = {name: getattr(model, name) for name in SIZES}
    return schedule_parameters(model) | _texts({**chosen, **sizes})


def job_parameters(job: TrainingJob) -> dict[str, str]:
    """Return the parameters of a training: its model, and the part of the recipe that applies."""
    recipe = job.recipe
    params: dict[str, Any] = {name: getattr(recipe, name) for name in RECIPE}
    params |= {"objective": job.objective, **_curve(recipe)}
    if any(job.model.corrections):
        params |= _stages(recipe)
    if recipe.elastic:
        params |= _elastic(recipe.elastic)
    # What is off is None.
    params |= {"spike_factor": recipe.spike_factor, "skip_bad_steps": recipe.skip_bad_steps or None}
    if job.objective == "distill":
        params |= _distillation(job.distillation or DistillationConfig())
    if job.kept_layers is not None:
        params["kept_layers"] = ",".join(map(str, job.kept_layers))
    if "teacher" in job.provenance:
        params["teacher"] = job.teacher_folder or job.initial_folder
    return model_parameters(job.model) | _texts(params)


def shared_parameters(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the parameters that have one value in all runs."""
    first, *others = runs or [{}]
    return {n: v for n, v in first.items() if all(other.get(n) == v for other in others)}


def _curve(recipe: TrainingSettings) -> dict[str, Any]:
    # How the learning rate falls.
    if recipe.decay == "constant":
        return {}
    last = {"final_learning_rate_fraction": recipe.final_learning_rate_fraction}
    return last | ({"decay_fraction": recipe.decay_fraction} if recipe.decay == "wsd" else {})


def _stages(recipe: TrainingSettings) -> dict[str, Any]:
    return {
        "iterate_from_fraction": recipe.iterate_from_fraction,
        "iterate_ramp_fraction": recipe.iterate_ramp_fraction or None,
    }


def _elastic(elastic: ElasticSettings) -> dict[str, Any]:
    values = elastic.model_dump(mode="json")
    values["schedules"] = " ".join(map(str, elastic.schedules)) or None
    return {f"elastic.{name}": value for name, value in values.items()}


def _distillation(loss: DistillationConfig) -> dict[str, Any]:
    has_divergence = loss.kl_weight > 0
    return {
        "kl_weight": loss.kl_weight,
        "temperature": loss.temperature if has_divergence else None,
        "divergence": loss.divergence if has_divergence else None,
        "cache_top_k": loss.top_k,
        "hidden_weight": loss.hidden_weight or None,
        "teacher_from_step": loss.start_step or None,
        "teacher_until_step": loss.end_step,
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}
