"""The `generation_kwargs` of a task as settings of the generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from orchestrator.evaluation.answers import AnswerSettings
from orchestrator.workspace.errors import UserError

GENERATED = "generate_until"
"""lm-eval's output type of tasks whose answers are generated."""

_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}
"""Options that change nothing at these values."""


def usual_max_new_tokens(context_length: int) -> int:
    """Return the length of answers where a task sets none: lm-eval's, or half the context."""
    return max(1, min(256, context_length // 2))


def answer_settings(options: Mapping[str, Any], context_length: int) -> AnswerSettings:
    """Return a task's `generation_kwargs` as settings of the generator.

    Args:
        options: As in the task's file; see `usual_max_new_tokens` if it sets no `max_gen_toks`.

    Raises:
        UserError: If an option is unknown or has a value that the generator does not support.
    """
    usual = usual_max_new_tokens(context_length)
    found: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), usual))
    samples = found.pop("do_sample")
    temperature = found.pop("temperature", None)
    if temperature is None:  # As transformers does.
        temperature = 1.0 if samples else 0.0
    settings = AnswerSettings(
        stop=tuple(map(str, found.pop("until"))),
        max_new_tokens=found.pop("max_gen_toks"),
        temperature=float(temperature),
        top_k=found.pop("top_k", None) or None,
        top_p=found.pop("top_p", None),
    )
    others = {k: v for k, v in found.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
    if others:
        raise UserError(
            f"its generation_kwargs ask for {', '.join(f'{k}={v}' for k, v in others.items())}; "
            "supported are until, max_gen_toks, do_sample, temperature, top_k and top_p"
        )
    if settings.max_new_tokens >= context_length:
        raise UserError(
            f"its answers have up to {settings.max_new_tokens} tokens (max_gen_toks), and the "
            f"model's context holds {context_length}, question included"
        )
    return settings


def check_answer_settings(tasks: Mapping[str, Task], context_length: int) -> None:
    """Check that a decoder can generate the answers of all tasks, before one of them runs.

    Raises:
        UserError: Names each task that it cannot run, and why.
    """
    problems = []
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == GENERATED:
            try:
                answer_settings(task.get_config("generation_kwargs") or {}, context_length)
            except UserError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise UserError(
            f"cannot generate answers for {'; '.join(problems)}. Leave the task out, or write one "
            "with other generation_kwargs (`include: NAME` in a file of evaluation.include_path)"
        )
