"""Show what a model is, what it costs, and what can be done with it, without running it.

For a model that a decoder runs, everything follows from its configuration. For any other model,
sizes come from its files, and the FLOPs are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import RenderableType

from iiet.cost import inference_cost
from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.facts import facts_of
from orchestrator.models.folder import (
    StoredTensor,
    load_provenance,
    precision_of,
    read_config,
    stored_tensors,
    weight_files,
)
from orchestrator.models.lookup import load_influence_table
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.pipelines.training import plan_pretrain
from orchestrator.planning.price import Price
from orchestrator.reporting.command_tables import price_rows
from orchestrator.reporting.output import Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes, shortest_schedule
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, find_workspace

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2}
DROPPED_SHARE = 4
"""One in so many layers is named as a candidate to leave out."""
SIZE_SETTINGS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "key/value heads": ("num_key_value_heads",),
    "feed-forward width": ("intermediate_size", "n_inner"),
    "vocabulary": ("vocab_size",),
}
"""What a size is called here -> its names in transformers' configurations."""


class InspectedModel(Result):
    """What a model is, and what it costs."""

    path: Path
    """Folder of the model, or its checkpoint."""
    name: str
    """Name of the model in this program's tables."""
    kind: str
    """The method, or transformers' name of the architecture."""
    is_native: bool
    """Whether this program can train it, iterate it and export it."""
    reason: str
    """Why it cannot; empty if it can."""
    sizes: dict[str, int | str]
    """Layers, width, heads, vocabulary, context, and what differs from a plain Llama."""
    schedule: str | None
    """Corrections of each layer; None for a method without them."""
    precision: str
    """Type of the stored weights."""
    num_parameters: int
    """All weights."""
    weight_bytes: int
    """Bytes of the stored weights."""
    evaluations_per_token: int | None
    """Field evaluations per token (NFE), or the layers that a token passes in a looped model; None
    if unknown."""
    flops_per_token: float | None
    """Forward FLOPs per token, as a mean over the context; None if only transformers runs the
    model."""
    kv_bytes_per_token: int | None
    """Keys and values that a token adds to the cache, in the type of the stored weights."""
    kept_layers: list[int]
    """For a model that leaves layers out: the layers that it keeps of its teacher, or of the
    checkpoint under the given schedule, counted from 1. Otherwise empty."""
    influence_metric: str | None
    """Metric of the stored influence; None if none is stored."""
    layer_influence: list[float]
    """Influence of each whole layer; empty if not stored."""
    corrections_influence: list[list[float]]
    """Influence of each correction of each layer; empty if not stored."""
    drop_candidates: list[int]
    """The layers with the least influence, in increasing order; counted from 1."""
    retrofit: Price | None
    """What `pretrain --from` takes on this machine with the given settings."""
    retrofit_steps: int | None
    """Steps of that training."""
    retrofit_problems: dict[str, str | None]
    """Machine or cluster -> why that training does not fit there, or what to change first."""
    context_length: int = Field(exclude=True)
    """The context length in tokens."""

    def shown(self) -> Iterable[RenderableType]:
        """Return the model's table, the influence of its layers, and the next steps."""
        yield two_column_table(self.name, list(self._model_rows()))
        if self.layer_influence:
            yield f"Influence of each whole layer ({self.influence_metric})"
            influences = enumerate(self.layer_influence, start=1)
            # Not as a title, which would be wrapped at the width of these numbers.
            yield two_column_table(
                None, [(str(layer), f"{value:.3g}") for layer, value in influences]
            )
        if self.is_native:
            yield two_column_table(self._retrofit_title(), list(self._retrofit_rows()))
        yield from self._next_steps()

    def _retrofit_title(self) -> str:
        if self.retrofit_steps is None:
            return f"A training from it: pretrain --from {self.name}"
        return (
            f"A training from it here: pretrain --from {self.name}, {self.retrofit_steps:,} steps"
        )

    def _model_rows(self) -> Iterable[tuple[str, str]]:
        yield "folder", str(self.path)
        support = self.reason
        if self.is_native:
            support = "this program trains, iterates and exports it"
        yield "type", f"{self.kind}; {support}"
        for size, value in self.sizes.items():
            yield size, f"{value:,}" if isinstance(value, int) else value
        if self.kept_layers:
            yield "kept layers", ", ".join(map(str, self.kept_layers))
        yield (
            "parameters",
            f"{self.num_parameters:,}, stored as {self.precision} in "
            f"{format_bytes(self.weight_bytes)}",
        )
        if self.schedule is not None:
            yield "corrections", self.schedule
        if self.evaluations_per_token is not None:
            yield "evaluations a token", f"{self.evaluations_per_token:,} (NFE)"
        if self.flops_per_token is not None:
            yield "forward FLOPs a token", f"{self.flops_per_token:.3g}"
        if self.kv_bytes_per_token is not None:
            whole = format_bytes(self.kv_bytes_per_token * self.context_length)
            yield (
                "keys and values",
                f"{format_bytes(self.kv_bytes_per_token)} a token; {whole} at the whole context",
            )

    def _retrofit_rows(self) -> Iterable[tuple[str, str]]:
        if self.retrofit is not None:
            yield from price_rows(self.retrofit, self.retrofit_problems)
        else:
            yield "cannot be priced", "; ".join(filter(None, self.retrofit_problems.values()))

    def _next_steps(self) -> Iterable[str]:
        if not self.is_native:
            yield f"`iiet-orch evaluate {self.path}` measures it; nothing else takes it."
            return
        if not self.layer_influence:
            parts = "layer" if self.schedule is None else "correction and each layer"
            yield f"`iiet-orch influence {self.name}` measures how much each {parts} matters."
        if self.drop_candidates:
            layers = ", ".join(map(str, self.drop_candidates))
            yield (
                f"Layers with the least influence, in increasing order: {layers}. "
                f"`iiet-orch sweep-threshold {self.name} --leave-out-layers "
                f"{len(self.drop_candidates)}` trains students that leave out up to so many layers."
            )
        if any(self.corrections_influence):
            best = self._layers_by_correction()
            layers = ", ".join(map(str, best))
            yield f"Layers whose corrections have the most influence: {layers}."
        elif self.schedule is None:
            yield (
                "To see where corrections pay, train a few hundred steps: `iiet-orch pretrain "
                f"--from {self.name} --set model.method_options.start=identity "
                "--set training.trained_layers=added`. Then run `iiet-orch influence` on that run."
            )

    def _layers_by_correction(self) -> list[int]:
        """Return up to 4 layers with corrections, by decreasing influence of these."""
        largest = {
            layer: max(values)
            for layer, values in enumerate(self.corrections_influence, start=1)
            if values
        }
        return sorted(largest, key=lambda layer: -largest[layer])[:4]


def inspect_model(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    progress: Progress | None = None,
) -> InspectedModel:
    """Return what a model is, what it costs, and the price of a training from it here.

    Args:
        settings: Settings of that training: sections `data`, `model`, `training`, `cluster`,
            `influence`.
        model: A run, a trial, a checkpoint or a model folder, by path or name; the newest finished
            run when unset.
        schedule: Iteration schedule, or a looped model's depth, instead of the model's own.

    Raises:
        UserError: If there is no such model, it is damaged, or the schedule does not fit it.
    """
    space = find_workspace(workspace)
    opened = open_model(model, space, schedule, note=(progress or Progress()).note)
    tensors = stored_tensors(opened.path)
    precision = precision_of(tensors)
    facts: dict[str, Any] = {
        "path": opened.path,
        "name": opened.label,
        "kind": opened.architecture,
        "is_native": opened.config is not None,
        "reason": opened.why_no_decoder,
        "precision": precision,
        "weight_bytes": sum(file.stat().st_size for file in weight_files(opened.path)),
        "context_length": opened.context_length,
        "kept_layers": [layer + 1 for layer in _kept_layers(opened)],
    }
    if opened.config is None:
        return InspectedModel(**facts, **_facts_of_other(opened, tensors, precision))
    table = None
    if not opened.is_external:  # Only a checkpoint of this program has stored influence.
        table = load_influence_table(opened.path, settings.influence.metric)
    return InspectedModel(
        **facts,
        **_facts_of_decoder(opened.config, precision),
        **_facts_of_influence(table),
        **_retrofit(settings, space, opened),
    )


def _kept_layers(model: OpenedModel) -> Sequence[int]:
    """Return the layers that a model keeps of its teacher or checkpoint; empty if it keeps all."""
    if model.schedule_in_checkpoint is not None:
        return model.schedule_in_checkpoint.kept_layers
    if model.is_external:
        return ()
    kept_layers: Sequence[int] | None = load_provenance(model.path).get("kept_layers")
    return kept_layers or ()


def _facts_of_decoder(config: ModelConfig, precision: str) -> dict[str, Any]:
    """Return sizes and costs of a model that a decoder runs, as fields."""
    cost = inference_cost(config, bytes_per_value=BYTES_PER_VALUE[precision])
    sizes: dict[str, int | str] = {
        "layers": config.num_layers,
        "width": config.dim,
        "heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "head width": config.head_dim,
        "feed-forward width": config.ffn_dim,
        "vocabulary": config.vocab_size,
        "context": config.context_length,
        "head": "the embeddings" if config.tie_embeddings else "weights of its own",
    }
    differences = {
        "biases of queries, keys, values": config.qkv_bias,
        "bias of attention's output": config.attention_out_bias,
        "norms of queries and keys": config.head_norms,
        "layers without rotation": config.rotary_layers is not None,
    }
    features = [name for name, is_there in differences.items() if is_there]
    if config.rope_scaling is not None:
        features.append(f"rotary angles scaled by {config.rope_scaling.rope_type}")
    features += [f"a window of {window:,} tokens" for window in config.windows]
    if features:
        sizes["beyond a plain Llama"] = "; ".join(features)
    has_corrections = facts_of(config.method).has_corrections
    return {
        "sizes": sizes,
        "schedule": shortest_schedule(tuple(config.corrections)) if has_corrections else None,
        "num_parameters": cost.num_parameters,
        "evaluations_per_token": cost.evaluations_per_token,
        "flops_per_token": cost.forward_flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
    }


def _facts_of_influence(table: InfluenceTable | None) -> dict[str, Any]:
    """Return what the stored influence says, as fields."""
    layer_influence = list(table.layer_values) if table else []
    by_influence = sorted(range(len(layer_influence)), key=lambda layer: layer_influence[layer])
    num_dropped = len(layer_influence) // DROPPED_SHARE
    return {
        "influence_metric": table.metric if table else None,
        "layer_influence": layer_influence,
        "corrections_influence": [list(row) for row in table.value_rows] if table else [],
        "drop_candidates": [layer + 1 for layer in by_influence[:num_dropped]],
    }


def _retrofit(settings: Settings, workspace: Workspace, model: OpenedModel) -> dict[str, Any]:
    """Return the price of a training from the model, as fields; or why it cannot be planned."""
    try:
        plan = plan_pretrain(settings, workspace=workspace, source=model.path)
    except UserError as error:
        return {
            "retrofit": None,
            "retrofit_steps": None,
            "retrofit_problems": {"this machine": str(error)},
        }
    return {
        "retrofit": plan.price,
        "retrofit_steps": settings.training.num_steps,
        "retrofit_problems": plan.problems,
    }


def _facts_of_other(
    model: OpenedModel, tensors: Mapping[str, StoredTensor], precision: str
) -> dict[str, Any]:
    """Return sizes and costs of a model that transformers runs, as fields."""
    values = read_config(model.path)
    values = values.get("text_config") or values
    sizes: dict[str, int | str] = {}
    for size, names in SIZE_SETTINGS.items():
        for name in names:
            if isinstance(values.get(name), int):
                sizes[size] = values[name]
                break
    sizes["context"] = model.context_length

    evaluations = None
    kv_bytes = None
    if model.loops:
        loops, depth = model.looped()
        evaluations = loops.layer_runs(depth)
        kv_bytes = loops.kv_numbers(depth) * BYTES_PER_VALUE[precision]
    return {
        "sizes": sizes,
        "schedule": None,
        "num_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "evaluations_per_token": evaluations,
        "flops_per_token": None,
        "kv_bytes_per_token": kv_bytes,
        **_facts_of_influence(None),
        "retrofit": None,
        "retrofit_steps": None,
        "retrofit_problems": {},
    }
