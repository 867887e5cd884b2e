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
from orchestrator.evaluation.heldout import TASKS as HELDOUT_TASKS
from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.reporting.influence_tables import influence_markdown

OMITTED_PROVENANCE = ("checksums", "environment", "recipe", "distillation", "imported")
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
            "With `corrections=[...]`, `from_pretrained` loads the same weights under another "
            "schedule; this card describes this one."
        )

    def _cost(self) -> str:
        cost = inference_cost(self.config)
        rows: list[tuple[str, float, str]] = [
            ("field evaluations per token", cost.evaluations_per_token, ",.0f"),
            ("FLOPs per token, decoding at full context", cost.decode_flops_per_token, ",.4g"),
            ("FLOPs per token, reading a full context", cost.prefill_flops_per_token, ",.4g"),
            ("key/value bytes kept per token (float32)", cost.kv_bytes_per_token, ",.0f"),
            ("key/value bytes read per token (float32)", cost.kv_bytes_read_per_token, ",.0f"),
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
                if metric.endswith(STDERR_SUFFIX):
                    continue
                error = result.metrics.get(metric + STDERR_SUFFIX)
                spread = "" if error is None else f"{error:.4f}"
                lines.append(f"| {name} | {metric} | {value:.4f} | {spread} | {result.num_items} |")
        return "\n".join([*lines, "", *_origins(self.evaluation)])

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


REQUIREMENTS = ("torch>=2.6", "transformers>=5.24,<6")
"""What the code of an exported folder needs; no other package of this project's."""

_USE = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```

The model's code lies beside the weights. It needs
`pip install {" ".join(f'"{requirement}"' for requirement in REQUIREMENTS)}` and nothing else."""


def _origins(evaluation: EvaluationResult) -> Iterable[str]:
    """Say where the tasks come from, and how to reproduce their numbers."""
    own = [name for name in evaluation.results if name in HELDOUT_TASKS]
    others = [name for name in evaluation.results if name not in HELDOUT_TASKS]
    if own:
        names = ", ".join(f"`{name}`" for name in own)
        yield (
            f"Tasks of the project that trained this model, made from text that was held out of "
            f"its training: {names}. lm-eval has no tasks of these names; `iiet-orch evaluate` "
            "measures them."
        )
    if own and others:
        yield ""
    if others:
        yield (
            "`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks "
            f"{','.join(others)}` gives the same numbers; tasks that are not part of lm-eval need "
            "`--include_path` too, and fewer items than a task has need `--limit`."
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


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Not recorded."
