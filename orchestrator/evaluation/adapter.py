"""lm-eval's view of our models, and a run of one task: prompts and metrics are lm-eval's.

lm-eval's own class for transformers gives the same log-likelihoods up to rounding, but takes longer
(research/benchmarks): it evaluates a context once per choice, and the head everywhere. Models of
other architectures run with it (`transformers_model`).
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache, partial
from typing import Any

from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from iiet.decoder import Decoder
from orchestrator.evaluation.answers import AnswerSettings, Question, generate_answers
from orchestrator.evaluation.scoring import Score, score_continuations
from orchestrator.evaluation.store import AnswerJournal, MeasuredTask, item_values
from orchestrator.models.hub import offline
from orchestrator.models.tokenizer import Message, ModelTokenizer
from orchestrator.records.evaluation import FILTER_MARK, NO_FILTER, STDERR_SUFFIX, standard_error
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key

FEWSHOT_SEED = 1234
"""lm-eval's default, so that prompts are the usual ones."""
AGGREGATIONS = {function: key for key, function in AGGREGATION_REGISTRY.items()}
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}
"""Options of generated answers that change nothing at these values."""


class ChatModel:
    """What our model classes share: chat templates, progress, answers stored before.

    `journal` has the answers to the current task that were given before an interruption.
    """

    text: ModelTokenizer
    prompts = Prompts()
    progress = Progress()
    journal = AnswerJournal()
    tokenizer_name = ""
    """Part of lm-eval's key of stored requests, which are not used here."""
    num_items_before = 0
    """Items of the tasks before the current one."""
    num_cut = 0
    """Prompts that lost their beginning."""

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the model's template writes them.

        Some templates refuse messages of the system. As in lm-eval, a task's description is then
        left out; an instruction of the user is not.

        Raises:
            UserError: If the model has no such template, or it fails.
        """
        write = partial(
            self.text.chat, opens_answer=add_generation_prompt, template=self.prompts.template_name
        )
        others = [message for message in chat_history if message["role"] != "system"]
        if len(others) < len(chat_history) and self.prompts.system_instruction is None:
            with suppress(UserError):
                return write(chat_history)
            chat_history = others
        return write(chat_history)

    def start_requests(self, requests: Sequence[Instance]) -> Callable[[int, int], None]:
        """Return what shows the progress of these requests in items, as (done, total)."""
        before = self.num_items_before
        count = len({(request.task_name, request.doc_id) for request in requests})
        return lambda done, total: self.progress.advance(before + count * done // max(1, total))


class DecoderModel(ChatModel, TemplateLM):  # type: ignore[misc]
    """A decoder as a model of lm-eval: text in, log-likelihoods or generated answers out."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: ModelTokenizer,
        batch_size: int = 32,
        *,
        prompts: Prompts | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.text, self.prompts = tokenizer, prompts or Prompts()
        self.progress = progress or Progress()
        # The choices of a question follow each other, and each encodes the same context.
        self._ids = lru_cache(maxsize=8)(tokenizer.encode)
        self._decoder, self._batch_size = decoder.eval(), batch_size

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        return self.text.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode text as the model's tokenizer does."""
        return list(self._ids(string, add_special_tokens=add_special_tokens is not False))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        symbol = self.text.symbol_id(continuation)
        if symbol is None or context[-1:].isspace():
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        # The context is not encoded again for each of many symbols.
        return self.tok_encode(context), [symbol]

    def loglikelihood(self, requests: list[Instance], **_: Any) -> Any:
        """Score (context, continuation) texts."""
        self._advance = self.start_requests(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self._decoder.config.context_length + 1
        self.num_cut += sum(len(a) + len(b) > longest for _, a, b in requests)
        scores = self._score([(context, continuation) for _, context, continuation in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Score whole texts in windows of the decoder's context, each token once."""
        self._advance = self.start_requests(requests)
        length, by_text = self._decoder.config.context_length, []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, length, 1)
            by_text.append([utils.make_disjoint_window(window) for window in rolled])
        scores = iter(self._score([window for windows in by_text for window in windows]))
        return [sum(next(scores).log_likelihood for _ in windows) for windows in by_text]

    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        return score_continuations(
            self._decoder,
            pairs,
            batch_size=self._batch_size,
            on_scored=self._advance,
            note=self.progress.note,
            journal=self.journal,
        )

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Generate the answer to each (context, generation_kwargs)."""
        advance, context_length = self.start_requests(requests), self._decoder.config.context_length
        seen: Counter[str] = Counter()
        questions = []
        for request in requests:
            text, options = request.args[:2]
            settings = answer_settings(options, context_length)
            context = tuple(self.tok_encode(text)) or (self.prefix_token_id,)
            self.num_cut += len(context) + settings.max_new_tokens > context_length
            # A task may ask for several samples of one answer.
            seed = int(content_key("answer", text, seen[text])[:8], 16)
            seen[text] += 1
            questions.append(Question(context, settings, seed))
        return generate_answers(
            self._decoder,
            self.text,
            questions,
            batch_size=self._batch_size,
            on_answered=lambda done: advance(done, len(questions)),
            note=self.progress.note,
            journal=self.journal,
        )


def usual_max_new_tokens(context_length: int) -> int:
    """Return the length of answers where a task sets none: lm-eval's, or half the context."""
    return max(1, min(256, context_length // 2))


def answer_settings(options: Mapping[str, Any], context_length: int) -> AnswerSettings:
    """Return a task's `generation_kwargs` as settings of the generator.

    Raises:
        UserError: If an option is unknown or has a value that the generator does not support.
    """
    found = dict(normalize_gen_kwargs(dict(options), usual_max_new_tokens(context_length)))
    samples, temperature = found.pop("do_sample"), found.pop("temperature", None)
    if temperature is None:  # As transformers does.
        temperature = 1.0 if samples else 0.0
    settings = AnswerSettings(
        stop=tuple(map(str, found.pop("until"))),
        max_new_tokens=found.pop("max_gen_toks"),
        temperature=float(temperature),
        top_k=found.pop("top_k", None) or None,
        top_p=found.pop("top_p", None),
    )
    if others := [f"{k}={v}" for k, v in found.items() if (k, v) not in NEUTRAL.items()]:
        raise UserError(
            f"its generation_kwargs ask for {', '.join(others)}; supported are until, "
            "max_gen_toks, do_sample, temperature, top_k and top_p"
        )
    if settings.max_new_tokens >= context_length:
        raise UserError(
            f"its answers have up to {settings.max_new_tokens} tokens (max_gen_toks), and the "
            f"model's context holds {context_length}, question included"
        )
    return settings


def check_answer_settings(tasks: Mapping[str, Task], context_length: int) -> None:
    """Raise `UserError` for a task whose answers a decoder cannot generate, before any runs."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            try:
                answer_settings(task.get_config("generation_kwargs") or {}, context_length)
            except UserError as error:
                raise UserError(
                    f"cannot generate answers for {name}: {error}. Leave the task out, or write "
                    "one with other generation_kwargs (`include: NAME` in a file of "
                    "evaluation.include_path)"
                ) from None


def run_task(name: str, task: Task, model: LM, limit: int | None = None) -> MeasuredTask:
    """Run one task; its results get the analytic standard errors.

    Args:
        model: A `ChatModel`, or any model of lm-eval.
        limit: Number of items, the first ones; all if unset.
    """
    task.set_fewshot_seed(FEWSHOT_SEED)  # Each run draws the same examples.
    prompts: Prompts = getattr(model, "prompts", Prompts())
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
    samples = output.pop("samples")[name]
    for config in output["configs"].values():
        config.pop("custom_dataset", None)  # A function, which says nothing in a file.
    items, values = item_values(samples)
    aggregations = {k: AGGREGATIONS.get(v, "") for k, v in task.aggregation().items()}
    for label, of_items in values.items():
        metric, _, filter_name = label.partition(FILTER_MARK)
        error = standard_error(aggregations.get(metric, ""), of_items)
        if error is not None:
            key = f"{metric}{STDERR_SUFFIX},{filter_name or NO_FILTER}"
            output["results"][name][key] = error
    return MeasuredTask(name=name, run=output, samples=samples, items=items, values=values)


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    # lm-eval compiles a template again for each item, which takes longer than a small model needs.
    environment = utils.env
    environment.from_string = lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # The method of the class is visible again.


@contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress lm-eval's prints, progress bars, warnings and log lines within the block."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
