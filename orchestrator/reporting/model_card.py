"""Model card of an exported model: architecture, use, cost, quality, influence, provenance.

Markdown with the front matter that model hubs read. A part that was not measured says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.influence import InfluenceTable
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.heldout import is_heldout_task
from orchestrator.evaluation.python_tasks import TASKS
from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.reporting.influence_tables import influence_markdown
from orchestrator.reporting.markdown import bullets, markdown_table
from orchestrator.terminal.render import format_parameters, join_names

OMITTED_PROVENANCE = (
    "checksums", "environment", "recipe", "distillation", "imported", "elastic",
)  # fmt: skip
"""Parts of a provenance that have their own lines, or mean nothing outside the run's folder."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Content of a model card."""

    name: str
    config: ModelConfig
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """As in the checkpoint."""
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

    def to_markdown(self) -> str:
        """Return the whole card."""
        parts = [
            _front_matter(self.config),
            f"# {self.name}",
            self._summary(),
            self.chosen and f"Chosen as {self.chosen}",
            "## Use",
            _use(self.prompt),
            "## Iteration schedule",
            self._schedule(),
            "## Cost",
            self._cost(),
            "## Quality",
            self._quality(),
            *self._influence(),
            "## Provenance",
            bullets(_provenance(self.provenance)) or "Not recorded.",
        ]
        return "\n\n".join(part.rstrip() for part in parts if part) + "\n"

    def _summary(self) -> str:
        config, cost = self.config, inference_cost(self.config)
        size = f"{format_parameters(cost.num_parameters)} parameters"
        text = (
            f"A causal language model of method `{config.method}` with {size}: "
            f"{config.num_layers} layers of width {config.dim}, {config.vocab_size:,} tokens, a "
            f"context of {config.context_length:,}. It makes {cost.evaluations_per_token} field "
            "evaluations per token"
        )
        if self.full is None:
            return text + "."
        full = inference_cost(self.full).evaluations_per_token
        share = cost.evaluations_per_token / full
        return f"{text}, {share:.0%} of the {full} of the full model."

    def _schedule(self) -> str:
        corrections = self.config.schedule
        if corrections is None:
            return "This method makes no corrections."
        text = (
            f"Corrections per layer: `{corrections}`. A layer with r corrections evaluates its "
            "block 1 + r times; decoding keeps keys and values of every evaluation. "
            "`from_pretrained` takes `corrections=[...]` to load the same weights under another "
            "schedule, which this card does not describe."
        )
        others = [f"`{served}`" for served in self.served if served != corrections]
        return text + (f" The weights also learned {join_names(others)}." if others else "")

    def _cost(self) -> str:
        cost = inference_cost(self.config)
        rows: list[tuple[str, float, str]] = [
            ("field evaluations (NFE) per token", cost.evaluations_per_token, ",.0f"),
            ("FLOPs per token, decoding at full context", cost.decode_flops_per_token, ",.4g"),
            ("FLOPs per token, reading a full context", cost.prefill_flops_per_token, ",.4g"),
            ("key/value bytes kept per token (float32)", cost.kv_bytes_per_token, ",.0f"),
            ("key/value bytes read per token (float32)", cost.kv_bytes_read_per_token, ",.0f"),
            ("weight bytes read per token (float32)", cost.weight_bytes_per_token, ",.0f"),
            ("parameters", cost.num_parameters, ",.0f"),
        ]
        cells = ((name, f"{value:{form}}") for name, value, form in rows)
        return markdown_table(("cost, counted from shapes", ""), cells)

    def _quality(self) -> str:
        if self.evaluation is None:
            return "Not measured."
        rows = []
        for name, result in self.evaluation.results.items():
            for metric, value in result.metrics.items():
                if not metric.endswith(STDERR_SUFFIX):
                    error = result.metrics.get(metric + STDERR_SUFFIX)
                    spread = "" if error is None else f"{error:.4f}"
                    rows.append((name, metric, f"{value:.4f}", spread, str(result.num_items)))
        heads = ("task", "metric", "value", "standard error", "items")
        table = markdown_table(heads, rows, left=(0, 1))
        return "\n".join([table, "", *_reproduction(self.evaluation)])

    def _influence(self) -> list[str]:
        if self.influence is None:
            return []
        table = self.influence
        return [
            f"## Influence of each correction ({table.metric})",
            f"Measured over {table.num_tokens:,} tokens under the schedule `{table.schedule}`. "
            "A cheaper schedule leaves out the corrections below a threshold.",
            influence_markdown(table),
        ]


REQUIREMENTS = ("torch>=2.8", "transformers>=5.24,<6")
"""Packages that the code of an exported folder needs."""


def _use(prompt: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = model.generate(**tokenizer({json.dumps(prompt)}, return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```

The model's code is in the same folder. It only needs
`pip install {" ".join(f'"{requirement}"' for requirement in REQUIREMENTS)}`."""


def _reproduction(evaluation: EvaluationResult) -> Iterable[str]:
    """Yield sentences on the origin of the tasks and how to reproduce their numbers."""
    own = [name for name in evaluation.results if is_heldout_task(name)]
    added = {name: TASKS.names.package(name) for name in evaluation.results if name in TASKS}
    others = [name for name in evaluation.results if name not in {*own, *added}]
    if own:
        names = ", ".join(f"`{name}`" for name in own)
        yield (
            f"These tasks are made from data that were held out of the model's training: {names}. "
            "lm-eval does not have them; `iiet-orch evaluate` measures them."
        )
    for name, package in added.items():
        yield f"The task `{name}` is of the package {package}; `iiet-orch evaluate` measures it."
    if others and (own or added):
        yield ""
    if others:
        yield (
            "`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks "
            f"{','.join(others)}` gives the same numbers. Add `--include_path` for tasks that are "
            "not part of lm-eval, and `--limit` for fewer items than a task has."
        )


def _front_matter(config: ModelConfig) -> str:
    tags = ["iterative-transformer", config.method]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _provenance(values: Mapping[str, Any]) -> Iterable[str]:
    for name, value in values.items():
        if name not in OMITTED_PROVENANCE:
            yield f"{name}: `{value}`"
    for part in ("imported", "recipe", "distillation", "environment"):
        if values.get(part):
            known = {name: value for name, value in values[part].items() if value is not None}
            pairs = ", ".join(f"{name} {value}" for name, value in known.items())
            yield f"{part}: {pairs}"
