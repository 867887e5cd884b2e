"""Adapters of models for lm-eval: subclasses of its own `HFLM`.

Prompts, log-likelihoods and metrics are lm-eval's. These classes add what `HFLM` lacks: requests
that read the same tokens are evaluated once (the choices of a depth task are one token each);
batches are formed by the number of tokens, and halved when a GPU runs out of memory; answers are
stored, so that an interrupted evaluation resumes; progress is shown.

`LmEvalModel` runs a model of transformers, and `DecoderModel` a decoder of this project. The import
of this file takes seconds, so `measuring` imports it only if a result is missing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from iiet.decoder import Decoder
from orchestrator.evaluation.answers import (
    answer_settings,
    generate_answers,
    smaller_batch,
    usual_max_new_tokens,
)
from orchestrator.evaluation.store import AnswerJournal, MeasuredTask, item_values
from orchestrator.evaluation.tasks import FEWSHOT_SEED, suppress_output
from orchestrator.models.hub import offline
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.records.evaluation import FILTER_MARK, NO_FILTER, standard_error
from orchestrator.records.metrics import STDERR_SUFFIX
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import end_if_stop_requested
from orchestrator.workspace.errors import UserError, first_line, out_of_memory_text
from orchestrator.workspace.provenance import content_key

MAX_TOKENS_ON_CPU = 2048
"""Most tokens of one pass on a CPU; more do not fit its caches and are a third slower."""
_ANY_SIZE = 1 << 30
"""Batch size that lm-eval is told, as it gets one batch at a time."""
_AGGREGATIONS = {function: name for name, function in AGGREGATION_REGISTRY.items()}
"""lm-eval's aggregation function -> its name."""


class BatchRow(NamedTuple):
    """One sequence of a batch, and the requests that it answers."""

    batch_kind: Any
    """What all sequences of a batch must share, such as options of the answers."""
    size: int
    """Tokens, or 1 if batches are limited by the number of sequences."""
    requests: list[int]
    """Indices of the requests."""


class LmEvalModel(HFLM):  # type: ignore[misc]
    """A model of transformers for lm-eval; log-likelihoods are summed in float32.

    `journal` has the answers of the current task from before an interruption.
    """

    journal = AnswerJournal()
    num_items_before = 0
    """Number of items of the tasks before the current one."""
    task_name = "a task"
    """The current task."""
    num_items = 0
    """Number of items of the current task."""
    num_cut = 0
    """Number of prompts whose beginning was cut off."""

    def __init__(
        self,
        model: Any,
        text_tokenizer: ModelTokenizer,
        batch_size: int = 32,
        *,
        prompts: Prompts | None = None,
        progress: Progress | None = None,
        max_length: int | None = None,
    ) -> None:
        self.text_tokenizer = text_tokenizer
        """The model's own tokenizer, which encodes all texts."""
        self.prompts = prompts or Prompts()
        self.progress = progress or Progress()
        tokenizer = text_tokenizer.loaded or PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=text_tokenizer.tokenizer,
            eos_token=text_tokenizer.tokenizer.id_to_token(text_tokenizer.prefix_id),
        )
        if self.prompts.template_name:
            tokenizer = copy(tokenizer)  # The model may later be asked with other prompts.
            tokenizer.chat_template = text_tokenizer.template(self.prompts.template_name)
        with suppress_output():
            super().__init__(
                model,
                tokenizer=tokenizer,
                batch_size=_ANY_SIZE,
                softmax_dtype="float32",
                max_length=max_length,
            )
        self._num_rows = batch_size
        # The choices of a question are consecutive, and each encodes the same context.
        self._encode_cached = lru_cache(maxsize=8)(text_tokenizer.encode)

    @property
    def max_gen_toks(self) -> int:
        """Largest number of tokens of an answer, for tasks that set none."""
        return usual_max_new_tokens(self.max_length)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode text as the model's tokenizer does."""
        return list(self._encode_cached(string, add_special_tokens=add_special_tokens is not False))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        symbol = self.text_tokenizer.symbol_id(continuation)
        if symbol is None or context[-1:].isspace():
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        # Encode the context once, not for each of many symbols.
        return self.tok_encode(context), [symbol]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        if self.text_tokenizer.loaded is None:
            # Without context lm-eval starts with the end-of-text token; opening tokens may follow.
            opening = list(self.text_tokenizer.encode_document(""))
            requests = [
                (text, opening if text and not text[0] else context, continuation)
                for text, context, continuation in requests
            ]
        # Requests by the computed sequence: requests of one key are answered by one sequence.
        by_row: defaultdict[tuple[bool, tuple[int, ...], int], list[int]] = defaultdict(list)
        for number, (_text, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"{self.task_name} has a text of {len(continuation)} tokens to score, and the "
                    f"model reads 1 to {self.max_length} at once; leave the task out, raise "
                    "evaluation.sequence_length if it is set, or train a model with a longer "
                    "context"
                )
            self.num_cut += len(context) + len(continuation) > self.max_length + 1
            # lm-eval shares the evaluation of equal inputs, but correctly only if they are split
            # alike: https://github.com/EleutherAI/lm-evaluation-harness, `Collator.get_cache`.
            is_single = len(continuation) == 1
            input_ids = (*context, *continuation[:-1])[-self.max_length :]
            by_row[is_single, input_ids, 0 if is_single else number].append(number)

        def score(is_single: bool, numbers: list[int]) -> list[tuple[float, bool]]:
            self.logits_cache = is_single
            batch = [requests[number] for number in numbers]
            return HFLM._loglikelihood_tokens(self, batch, disable_tqdm=True)  # type: ignore[no-any-return]

        max_tokens = self._num_rows * self.max_length
        if self.device.type == "cpu":
            max_tokens = min(max_tokens, MAX_TOKENS_ON_CPU)
        rows = [
            BatchRow(is_single, len(input_ids), numbers)
            for (is_single, input_ids, _), numbers in by_row.items()
        ]
        rows.sort(key=lambda row: (not row.batch_kind, -row.size))
        scores = self._in_batches([request[1:] for request in requests], rows, max_tokens, score)
        # Those of the journal are lists.
        return [(log_likelihood, is_greedy) for log_likelihood, is_greedy in scores]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Score whole texts in windows of `max_length` tokens, each token once."""
        by_text = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            by_text.append([utils.make_disjoint_window(window) for window in rolled])
        windows = [(None, *window) for windows in by_text for window in windows]
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in windows) for windows in by_text]

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Generate the answer to each (context, generation_kwargs)."""
        prompts_and_options = [request.args[:2] for request in requests]
        ordered = []
        for number, (text, options) in enumerate(prompts_and_options):
            length = len(self.tok_encode(text))
            max_new_tokens = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            self.num_cut += length + max_new_tokens > self.max_length
            ordered.append((json.dumps(options, sort_keys=True), -length, number))
        ordered.sort()  # By options, the longest prompts first.
        rows = [BatchRow(options, 1, [number]) for options, _, number in ordered]

        def answer_batch(_: Any, numbers: list[int]) -> list[str]:
            return self._generate([requests[number] for number in numbers], numbers)

        return self._in_batches(prompts_and_options, rows, self._num_rows, answer_batch)

    def _generate(self, requests: list[Instance], seeds: list[int]) -> list[str]:
        """Answer requests with the same options in one batch."""
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seeds[0])
                return HFLM.generate_until(self, requests, disable_tqdm=True)  # type: ignore[no-any-return]
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"transformers cannot generate the answers of {requests[0].task_name}: "
                f"{first_line(error)}"
            ) from None

    def _in_batches(
        self,
        questions: Sequence[Any],
        rows: list[BatchRow],
        max_size: int,
        answer_batch: Callable[[Any, list[int]], list[Any]],
    ) -> list[Any]:
        """Return the answers to requests; batches that the journal has are not run again.

        Args:
            questions: What each request asks, as JSON values.
            rows: Sequences that together answer all requests. Sequences of a kind are consecutive,
                the largest first, to whose size a batch is padded.
            max_size: Largest number of sequences of a batch times the size of the largest one; a
                single sequence may be larger.
            answer_batch: Answers a batch, given its kind and the indices of its requests.

        Raises:
            DeviceError: If the memory is too small for one sequence.
        """
        answers: dict[int, Any] = {}
        for batch_kind, rows_of_kind in groupby(rows, key=lambda row: row.batch_kind):
            waiting = list(rows_of_kind)
            while waiting:
                end_if_stop_requested()
                batch = waiting[: max(1, max_size // waiting[0].size)]
                numbers = [number for row in batch for number in row.requests]
                key = content_key("answers", numbers, [questions[number] for number in numbers])
                problem = ""
                batch_answers = self.journal.get(key)
                if batch_answers is None:
                    try:
                        batch_answers = answer_batch(batch_kind, numbers)
                        self.journal.add({key: batch_answers})
                    except torch.OutOfMemoryError as error:
                        problem = out_of_memory_text(error)
                if batch_answers is None:
                    # Outside of the handler, where the error would still hold the batch's tensors.
                    num_rows = smaller_batch(len(batch), problem, self.progress.note)
                    max_size = num_rows * waiting[0].size
                    continue
                answers |= zip(numbers, batch_answers, strict=True)
                del waiting[: len(batch)]
                # An item may have several questions.
                num_done = self.num_items * len(answers) // len(questions)
                self.progress.advance(self.num_items_before + num_done)
        return [answers[number] for number in range(len(questions))]


class DecoderModel(LmEvalModel):
    """A decoder of this project, with the interface of a model of transformers for lm-eval."""

    def __init__(
        self,
        decoder: Decoder,
        text_tokenizer: ModelTokenizer,
        *args: Any,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        stand_in = SimpleNamespace(device=decoder.device, config=SimpleNamespace(model_type="iiet"))
        length = max_length or decoder.config.context_length
        super().__init__(stand_in, text_tokenizer, *args, max_length=length, **options)
        self.decoder = decoder.eval()

    def _model_call(self, inps: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.decoder(inps)
        return logits

    def _generate(self, requests: list[Instance], seeds: list[int]) -> list[str]:
        settings = answer_settings(requests[0].args[1], self.max_length)
        num_read = self.max_length - settings.max_new_tokens
        contexts = [
            (self.tok_encode(request.args[0]) or [self.prefix_token_id])[-num_read:]
            for request in requests
        ]
        return generate_answers(self.decoder, self.text_tokenizer, contexts, settings, seeds)


def run_task(name: str, task: Task, model: LmEvalModel, limit: int | None = None) -> MeasuredTask:
    """Run one task, with analytic standard errors.

    Args:
        limit: Number of first items to run; all if unset.
    """
    task.set_fewshot_seed(FEWSHOT_SEED)  # Every run draws the same examples.
    model.task_name = name
    model.num_items = min(len(task.eval_docs), limit or len(task.eval_docs))
    with suppress_output(), offline(), _templates_compiled_once():
        output: dict[str, Any] = evaluator.evaluate(
            lm=model,
            task_dict={"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            system_instruction=model.prompts.system_instruction,
            apply_chat_template=model.prompts.chat_template,
            fewshot_as_multiturn=model.prompts.fewshot_as_multiturn,
        )
    samples = output.pop("samples")[name]
    for config in output["configs"].values():
        config.pop("custom_dataset", None)  # A function, which has no meaning in a file.
    items, values = item_values(samples)
    aggregations = {
        metric: _AGGREGATIONS.get(function, "") for metric, function in task.aggregation().items()
    }
    for label, values_of_metric in values.items():
        metric, _, filter_name = label.partition(FILTER_MARK)
        error = standard_error(aggregations.get(metric, ""), values_of_metric)
        if error is not None:
            key = f"{metric}{STDERR_SUFFIX},{filter_name or NO_FILTER}"
            output["results"][name][key] = error
    return MeasuredTask(name=name, output=output, samples=samples, items=items, values=values)


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    # lm-eval compiles a template for each item, which takes longer than a small model runs.
    environment = utils.env
    environment.from_string = lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # Restores the method of the class.
