"""Model card of an exported model: architecture, use, cost, quality, influence, provenance.

Markdown under the metadata that model hubs read, which the hub's library writes. A part that was
not measured says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iiet.cost import inference_cost
from iiet.hf.plain_models import is_plain
from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.evaluation.heldout import is_heldout_task
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.metrics import STDERR_SUFFIX, stderr_name
from orchestrator.reporting.command_tables import influence_table
from orchestrator.reporting.sections import bullets, markdown_table
from orchestrator.terminal.render import format_parameters, join_names

OMITTED_PROVENANCE = (
    "checksums", "environment", "recipe", "distillation", "imported", "elastic",
)  # fmt: skip
"""Parts of a provenance that have their own lines, or mean nothing outside the run's folder."""
PIPELINE = "text-generation"
"""What the hub calls the models' task."""
REQUIREMENTS = ("torch>=2.9", "transformers>=5.24,<6")
"""Packages that the code of an exported folder needs."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Content of a model card."""

    name: str
    config: ModelConfig
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The provenance that the checkpoint's file holds."""
    evaluation: EvaluationResult | None = None
    influence: InfluenceTable | None = None
    """The table that the schedule was chosen by: the model's own, or its teacher's."""
    chosen: str = ""
    """Sentence on how the model was picked from a sweep; empty if it was not."""
    prompt: str = "Once"
    """A text that the model's tokenizer reads, for the example."""
    served: Sequence[IterationSchedule] = ()
    """Schedules that the weights learned."""
    full: ModelConfig | None = None
    """The full model, to compare costs; None if this is the full model."""
    dtype: str = "fp32"
    """Type of the weights in the folder."""
    is_rounded: bool = False
    """Whether that type rounds the weights of the model, whose quality was measured."""
    base_model: str = ""
    """Repository of the hub, `OWNER/NAME`, that the weights come from; empty if there is none."""
    license: str = ""
    """License of that model, as its own card names it; empty if it is not known."""
    datasets: Sequence[str] = ()
    """Data sets of the hub that the model was trained on."""

    def to_markdown(self) -> str:
        """Return the whole card."""
        config = self.config
        cost = inference_cost(config)
        evaluations = cost.evaluations_per_token
        compared_with_full = ""
        if self.full is not None:
            full = inference_cost(self.full).evaluations_per_token
            compared_with_full = f", {evaluations / full:.0%} of the {full} of the full model"
        costs = [
            ("field evaluations (NFE) per token", evaluations, ",.0f"),
            ("FLOPs per token, decoding at full context", cost.decode_flops_per_token, ",.4g"),
            ("FLOPs per token, reading a full context", cost.prefill_flops_per_token, ",.4g"),
            ("key/value bytes kept per token (float32)", cost.kv_bytes_per_token, ",.0f"),
            ("key/value bytes read per token (float32)", cost.kv_bytes_read_per_token, ",.0f"),
            ("weight bytes read per token (float32)", cost.weight_bytes_per_token, ",.0f"),
            ("parameters", cost.num_parameters, ",.0f"),
        ]
        parts = [
            f"---\n{self._metadata()}\n---",
            f"# {self.name}",
            f"A causal language model of method `{config.method}` with "
            f"{format_parameters(cost.num_parameters)} parameters: {config.num_layers} layers of "
            f"width {config.dim}, {config.vocab_size:,} tokens, a context of "
            f"{config.context_length:,}. It makes {evaluations} field evaluations per token"
            f"{compared_with_full}. The weights are stored as {self.dtype}.",
            self.chosen and f"Chosen as {self.chosen}",
            "## Use",
            _USE.format(
                prompt=json.dumps(self.prompt),
                trust="" if is_plain(config) else ", trust_remote_code=True",
                code=(
                    "It is a folder of a class of transformers, without code of its own."
                    if is_plain(config)
                    else "The model's code is in the same folder."
                ),
                packages=" ".join(f'"{requirement}"' for requirement in REQUIREMENTS),
            ),
            "## Iteration schedule",
            self._schedule(),
            "## Cost",
            markdown_table(
                ("cost, counted from shapes", ""),
                ((name, f"{value:{form}}") for name, value, form in costs),
            ),
            "## Quality",
            "Not measured." if self.evaluation is None else self._quality(self.evaluation),
        ]
        if table := self.influence:
            parts += [
                f"## Influence of each correction ({table.metric})",
                f"Measured over {table.num_tokens:,} tokens under the schedule "
                f"`{table.schedule}`. A cheaper schedule leaves out the corrections below a "
                "threshold.",
                influence_table(table).to_markdown(),
            ]
        parts += ["## Provenance", bullets(_provenance(self.provenance)) or "Not recorded."]
        return "\n\n".join(part.rstrip() for part in parts if part) + "\n"

    def _metadata(self) -> str:
        """Return what the hub reads: origin, license, and the quality as its `model-index`."""
        from huggingface_hub import EvalResult, ModelCardData  # Takes a while to import.

        evaluation_results = []
        if self.evaluation is not None:
            for name, result in self.evaluation.results.items():
                for metric, value in result.metrics.items():
                    if metric.endswith(STDERR_SUFFIX):
                        continue
                    evaluation_results.append(
                        EvalResult(
                            task_type=PIPELINE,
                            dataset_type=name,
                            dataset_name=name,
                            metric_type=metric,
                            metric_value=value,
                        )
                    )
        metadata = ModelCardData(
            library_name="transformers",
            pipeline_tag=PIPELINE,
            tags=["iterative-transformer", self.config.method],
            license=self.license or None,
            base_model=self.base_model or None,
            datasets=list(self.datasets) or None,
            model_name=self.name,
            eval_results=evaluation_results or None,
        )
        return str(metadata.to_yaml())

    def _schedule(self) -> str:
        corrections = self.config.schedule
        if corrections is None:
            return "This method makes no corrections."
        other_schedules = [f"`{served}`" for served in self.served if served != corrections]
        learned = ""
        if other_schedules:
            learned = f" The weights also learned {join_names(other_schedules)}."
        return (
            f"Corrections per layer: `{corrections}`. A layer with r corrections evaluates its "
            "block 1 + r times; decoding keeps keys and values of every evaluation. "
            "`from_pretrained` takes `corrections=[...]` to load the same weights under another "
            f"schedule, which this card does not describe.{learned}"
        )

    def _quality(self, evaluation: EvaluationResult) -> str:
        """Return the metrics, the origin of the tasks, and how to reproduce the numbers."""
        rows = []
        for name, result in evaluation.results.items():
            for metric, value in result.metrics.items():
                if not metric.endswith(STDERR_SUFFIX):
                    error = result.metrics.get(stderr_name(metric))
                    spread = "" if error is None else f"{error:.4f}"
                    rows.append((name, metric, f"{value:.4f}", spread, str(result.num_items)))
        heads = ("task", "metric", "value", "standard error", "items")
        lines = [markdown_table(heads, rows, left_columns=(0, 1)), ""]
        heldout = [name for name in evaluation.results if is_heldout_task(name)]
        public = [name for name in evaluation.results if name not in heldout]
        if heldout:
            names = ", ".join(f"`{name}`" for name in heldout)
            lines.append(
                "These tasks are made from data that were held out of the model's training: "
                f"{names}. lm-eval does not have them; `iiet-orch evaluate` measures them."
            )
        if public:
            lines += [""] if heldout else []
            arguments = "pretrained=FOLDER"
            if not is_plain(self.config):
                arguments += ",trust_remote_code=True"
            if self.dtype != "fp32":
                arguments += ",dtype=float32"
            lines.append(
                f"`lm_eval --model hf --model_args {arguments} --tasks "
                f"{','.join(public)}` gives the same numbers. Add `--include_path` for tasks that "
                "are not part of lm-eval, and `--limit` for fewer items than a task has."
            )
        if self.is_rounded:
            lines += ["", f"Measured before the weights were rounded to {self.dtype}."]
        return "\n".join(lines)


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
model = AutoModelForCausalLM.from_pretrained(folder{trust})
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
tokens = model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```

{code} It only needs
`pip install {packages}`."""


def _provenance(values: Mapping[str, Any]) -> Iterable[str]:
    for name, value in values.items():
        if name not in OMITTED_PROVENANCE:
            yield f"{name}: `{value}`"
    for part in ("imported", "recipe", "distillation", "environment"):
        if values.get(part):
            known = {name: value for name, value in values[part].items() if value is not None}
            yield f"{part}: {', '.join(f'{name} {value}' for name, value in known.items())}"
