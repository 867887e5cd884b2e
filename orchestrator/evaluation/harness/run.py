"""Runs a suite on a model and keeps metrics, their standard errors and one value per item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval import evaluator, utils
from lm_eval.api.model import LM
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import Task

from iiet.decoder import Decoder
from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.evaluation.harness.answer_settings import check_answer_settings
from orchestrator.evaluation.harness.decoder_model import DecoderModel
from orchestrator.evaluation.harness.suite import Suite
from orchestrator.evaluation.harness.suppressed_output import suppress_output
from orchestrator.models.hub import offline
from orchestrator.models.tokenizer import ModelTokenizer, check_template
from orchestrator.records.evaluation import (
    HASH_LENGTH,
    STDERR_SUFFIX,
    EvaluationResult,
    TaskResult,
    metric_label,
    plain_value,
    standard_error,
)
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress

OnResult = Callable[[TaskResult], None]
JournalOf = Callable[[str], AnswerJournal]
"""Opens the answers to a task, by its name, that were stored before an interruption."""

FEWSHOT_SEED = 1234
"""lm-eval's default, so that prompts are the usual ones."""

AGGREGATIONS = {function: key for key, function in AGGREGATION_REGISTRY.items()}


def run_suite(
    suite: Suite,
    decoder: Decoder,
    tokenizer: Path | ModelTokenizer,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    progress: Progress | None = None,
    on_result: OnResult | None = None,
    journal_of: JournalOf = lambda _: AnswerJournal(),
) -> EvaluationResult:
    """Run the tasks of a suite on a decoder, one after the other.

    Args:
        decoder: The model; it uses its own schedule.
        tokenizer: The `tokenizer.json` that it was trained with, or how it reads text.
        batch_size: Sequences of full length in one forward pass.
        limit: Number of items of each task, the first ones; all if unset.
        progress: Shows the items done; the caller ends the stage.
        on_result: Called with the result of each task when it is complete.
        journal_of: Stores the answers to a task while it runs.

    Raises:
        UserError: If the tokenizer is missing or damaged, or a task wants answers that the decoder
            cannot generate.
    """
    progress = progress or Progress()
    if isinstance(tokenizer, Path):
        tokenizer = ModelTokenizer(tokenizer)
    check_answer_settings(suite.tasks, decoder.config.context_length)
    prompts = suite.prompts or Prompts()
    check_template(tokenizer, prompts)
    model = DecoderModel(decoder, tokenizer, batch_size, prompts=prompts, progress=progress)
    result = run_model(
        suite,
        model,
        limit=limit,
        progress=progress,
        on_result=on_result,
        journal_of=journal_of,
    )
    if model.num_cut:
        progress.note(
            f"{model.num_cut} prompts lost their beginning: they are longer than the "
            f"{decoder.config.context_length} tokens of the model's context"
        )
    return result


def run_model(
    suite: Suite,
    model: LM,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
    on_result: OnResult | None = None,
    journal_of: JournalOf = lambda _: AnswerJournal(),
) -> EvaluationResult:
    """Run a suite on any model of lm-eval; arguments as in `run_suite`."""
    progress = progress or Progress()
    prompts = suite.prompts or Prompts()
    progress.start("evaluate", sum(suite.num_items(name, limit) for name in suite.tasks))
    results: dict[str, TaskResult] = {}
    for name, task in suite.tasks.items():
        with journal_of(name) as model.journal:
            output = evaluate_task(task, name, model, prompts, limit)
        results[name] = task_result(task, name, output)
        progress.advance(sum(result.num_items for result in results.values()))
        if on_result:
            on_result(results[name])
    return EvaluationResult(results=results, groups=suite.groups, skipped=suite.skipped)


def evaluate_task(
    task: Task, name: str, model: LM, prompts: Prompts, limit: int | None
) -> dict[str, Any]:
    """Return lm-eval's output for one task, without standard errors."""
    task.set_fewshot_seed(FEWSHOT_SEED)  # Each run draws the same examples.
    with suppress_output(), offline(), _templates_compiled_once():
        output: dict[str, Any] = evaluator.evaluate(
            lm=model,
            task_dict={"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            system_instruction=prompts.system_instruction,
            apply_chat_template=prompts.chat_template,
            fewshot_as_multiturn=prompts.fewshot_as_multiturn,
        )
    return output


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    # lm-eval compiles a template again for each item, which takes longer than a small model needs.
    environment = utils.env
    environment.from_string = lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # The method of the class is visible again.


def task_result(task: Task, name: str, output: dict[str, Any]) -> TaskResult:
    """Convert lm-eval's output: one value per metric, filter and item."""
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in output["samples"][name]:
        by_filter.setdefault(sample["filter"], []).append(sample)
    metrics: dict[str, float] = {}
    values: dict[str, list[Any]] = {}
    for filter_name, samples in by_filter.items():
        for metric, aggregate in task.aggregation().items():
            total = output["results"][name].get(f"{metric},{filter_name}")
            if not isinstance(total, int | float):
                continue
            label = metric_label(metric, filter_name)
            metrics[label] = float(total)
            found = [plain_value(sample[metric]) for sample in samples if metric in sample]
            if None in found:  # Texts, such as those that BLEU compares.
                continue
            values[label] = found
            error = standard_error(AGGREGATIONS.get(aggregate, ""), found)
            if error is not None:
                metrics[label + STDERR_SUFFIX] = error
    samples = next(iter(by_filter.values()), [])
    responses = [sample["resps"] for sample in samples]  # By request, then by repetition.
    texts = [[r for rs in of_item for r in rs if isinstance(r, str)] for of_item in responses]
    is_generated = any(texts)
    scored = [] if is_generated else [[rs[0] for rs in of_item] for of_item in responses]
    return TaskResult(
        name=name,
        version=str(task.VERSION),
        num_items=len(samples),
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        metrics=metrics,
        items=[sample["doc_hash"][:HASH_LENGTH] for sample in samples],
        values=values,
        log_likelihoods=[[_score(response) for response in of_item] for of_item in scored],
        is_greedy=[[bool(r[1]) for r in of_item if _is_pair(r)] for of_item in scored],
        answers=texts if is_generated else [],
    )


def _score(response: Any) -> float:
    return float(response[0] if _is_pair(response) else response)


def _is_pair(response: Any) -> bool:
    """Whether it is (log-likelihood, is_greedy); whole texts have a log-likelihood only."""
    return isinstance(response, tuple | list)
