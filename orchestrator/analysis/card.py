"""The model card of an exported model: what it is, what it costs, how good it is, where it is from.

Markdown with the front matter that model hubs read. Only what was measured stands in it; a part
that nobody measured says so in one sentence, so that a reader never takes silence for a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.influence import InfluenceTable
from orchestrator.analysis.evaluation import STDERR, EvaluationResult
from orchestrator.analysis.report import influence_markdown

LEFT_OUT = ("checksums", "environment", "recipe", "distillation", "imported")
"""Parts of a provenance that get lines of their own, or say nothing outside of its folder."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card tells."""

    name: str
    """Its heading."""
    config: ModelConfig
    """Sizes, method and iteration schedule."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What produced the weights, as in the checkpoint."""
    evaluation: EvaluationResult | None = None
    """Its quality; None if it was not measured."""
    influence: InfluenceTable | None = None
    """The table that the schedule was chosen by: its own, or its teacher's."""
    chosen: str = ""
    """How it was chosen among others, as a sentence; empty if it was not."""
    full: ModelConfig | None = None
    """The full model's configuration, for the share of its cost; None if this is it."""

    def to_markdown(self) -> str:
        """Return the whole card."""
        parts = [
            _front_matter(self.config),
            f"# {self.name}",
            self._summary(),
            self.chosen and f"Chosen as {self.chosen}",
            "## Use",
            _USE,
            "## Iteration schedule",
            self._schedule(),
            "## Cost",
            self._cost(),
            "## Quality",
            self._quality(),
            *self._influence(),
            "## Provenance",
            _list(_provenance(self.provenance)),
        ]
        return "\n\n".join(part.rstrip() for part in parts if part) + "\n"

    def _summary(self) -> str:
        config, cost = self.config, inference_cost(self.config)
        size = f"{cost.num_parameters / 1e6:.4g} million parameters"
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
        return (
            f"Corrections per layer: `{corrections}`. A layer with r corrections evaluates its "
            "block 1 + r times; decoding keeps keys and values of every evaluation. "
            "`from_pretrained(folder, corrections=[...])` loads the same weights under another "
            "schedule; this card tells of this one."
        )

    def _cost(self) -> str:
        cost = inference_cost(self.config)
        rows: list[tuple[str, float, str]] = [
            ("field evaluations per token", cost.evaluations_per_token, ",.0f"),
            ("FLOPs per token, decoding at full context", cost.decode_flops_per_token, ",.4g"),
            ("FLOPs per token, reading a full context", cost.prefill_flops_per_token, ",.4g"),
            ("key/value bytes per token (float32)", cost.kv_bytes_per_token, ",.0f"),
            ("weight bytes read per token (float32)", cost.weight_bytes_per_token, ",.0f"),
            ("parameters", cost.num_parameters, ",.0f"),
        ]
        lines = ["| cost, counted from shapes | |", "| --- | ---: |"]
        return "\n".join(lines + [f"| {name} | {value:{form}} |" for name, value, form in rows])

    def _quality(self) -> str:
        if self.evaluation is None:
            return "Not measured."
        lines = ["| task | metric | value | standard error | items |"]
        lines.append("| --- | --- | ---: | ---: | ---: |")
        for name, result in self.evaluation.results.items():
            for metric, value in result.metrics.items():
                if metric.endswith(STDERR):
                    continue
                error = result.metrics.get(metric + STDERR)
                spread = "" if error is None else f"{error:.4f}"
                lines.append(f"| {name} | {metric} | {value:.4f} | {spread} | {result.num_items} |")
        lines += [
            "",
            "By lm-eval's tasks of these names; "
            "`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True` gives the "
            "same numbers.",
        ]
        return "\n".join(lines)

    def _influence(self) -> list[str]:
        if self.influence is None:
            return []
        table = self.influence
        return [
            f"## Influence of each correction ({table.metric})",
            f"Measured over {table.num_tokens:,} tokens under the schedule `{table.schedule}`; "
            "corrections under a threshold are what a cheaper schedule leaves out.",
            influence_markdown(table),
        ]


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```

The model's code lies beside the weights and needs torch and transformers only."""


def _front_matter(config: ModelConfig) -> str:
    tags = ["iterative-transformer", config.method]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _provenance(values: Mapping[str, Any]) -> Iterable[str]:
    for name, value in values.items():
        if name not in LEFT_OUT:
            yield f"{name}: `{value}`"
    for part in ("imported", "recipe", "distillation", "environment"):
        if values.get(part):
            known = {name: value for name, value in values[part].items() if value is not None}
            pairs = ", ".join(f"{name} {value}" for name, value in known.items())
            yield f"{part}: {pairs}"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Not recorded."
