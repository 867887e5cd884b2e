"""A decoder as a model class of lm-eval: text in, log-likelihoods or generated answers out.

lm-eval's own class for Hugging Face models gives the same log-likelihoods up to rounding, but takes
longer (docs/benchmarks.md): it runs a shared beginning once per choice, and the head everywhere.
Its cache of logits, on by default, returns wrong scores for some inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from iiet.decoder import Decoder
from orchestrator.evaluation.answers import Question, generate_answers
from orchestrator.evaluation.harness.answer_settings import answer_settings
from orchestrator.evaluation.harness.chat import ChatModel
from orchestrator.evaluation.scoring import Score, score_continuations
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.provenance import content_key


class DecoderModel(ChatModel, TemplateLM):  # type: ignore[misc]
    """A decoder as a model of lm-eval: text in, log-likelihoods or generated answers out."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: ModelTokenizer,
        batch_size: int,
        *,
        prompts: Prompts,
        progress: Progress,
    ) -> None:
        super().__init__()
        self.text, self.prompts, self.progress = tokenizer, prompts, progress
        self.num_cut = 0
        # The choices of a question follow each other, and each encodes the same context.
        self._ids = lru_cache(maxsize=8)(tokenizer.encode)
        self._decoder = decoder
        self._batch_size = batch_size
        self._num_items = self._num_items_done = 0

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
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        # The context is not encoded again for each of many symbols.
        return self.tok_encode(context), [symbol]

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Score (context, continuation) texts."""
        self._num_items = num_items(requests)
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Score whole texts in windows of the decoder's context, each token once."""
        self._num_items = num_items(requests)
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._decoder.config.context_length,
                context_len=1,
            )
            of_text = [utils.make_disjoint_window(window) for window in rolled]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._score(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Generate the answer to each (context, generation_kwargs)."""
        self._num_items = num_items(requests)
        context_length = self._decoder.config.context_length
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
        advance = self._advance()
        return generate_answers(
            self._decoder,
            self.text,
            questions,
            batch_size=self._batch_size,
            on_answered=lambda done: advance(done, len(questions)),
            note=self.progress.note,
            journal=self.journal,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self._decoder.config.context_length + 1
        self.num_cut += sum(len(a) + len(b) > longest for _, a, b in requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(score.log_likelihood, score.is_greedy) for score in self._score(pairs)]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        return score_continuations(
            self._decoder,
            pairs,
            batch_size=self._batch_size,
            on_scored=self._advance(),
            note=self.progress.note,
            journal=self.journal,
        )

    def _advance(self) -> Callable[[int, int], None]:
        """Return what shows the progress of these requests as (done, total)."""
        before = self._num_items_done
        self._num_items_done += self._num_items
        return lambda done, total: self.progress.advance(before + self._num_items * done // total)


def num_items(requests: list[Instance]) -> int:
    """Return the number of items that the requests belong to."""
    return len({(request.task_name, request.doc_id) for request in requests})
