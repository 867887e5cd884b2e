"""Models that no decoder of ours can run, through lm-eval's class for transformers.

Its cache of logits is off: it gives wrong scores for a text that is split in two ways. Missing
weights are an error; transformers would fill them with random numbers and only warn.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from orchestrator.evaluation.adapter import ChatModel, suppress_output, usual_max_new_tokens
from orchestrator.models.loops import load_transformers
from orchestrator.models.open import OpenedModel
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError, first_line
from orchestrator.workspace.provenance import content_key

SEED = 1234
"""Random seed of sampled answers, lm-eval's default."""


class TransformersModel(ChatModel, HFLM):  # type: ignore[misc]
    """Tells how far it is with the choices of a task, and stores their scores."""

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[Any]:
        """Score (context, continuation) texts, with one call of lm-eval's method for each batch."""
        advance = self.start_requests(requests)
        texts = ["".join(request.args) for request in requests]
        order = sorted(range(len(requests)), key=lambda n: (-len(texts[n]), texts[n]))
        scores: dict[int, Any] = {}
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            batch = [requests[number] for number in numbers]
            key = content_key("scores", [request.args for request in batch])
            found = self.journal.get(key)
            if found is None:
                found = super().loglikelihood(batch, disable_tqdm=True)
                self.journal.add({key: found})
            scores |= zip(numbers, map(tuple, found), strict=True)
            advance(len(scores), len(requests))
        return [scores[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Instance], **options: Any) -> Any:
        """Generate the answer to each (context, generation_kwargs)."""
        try:
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                return super().generate_until(requests, **options)
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"transformers cannot generate the answers of {requests[0].task_name}: "
                f"{first_line(error)}"
            ) from None

    @property
    def max_gen_toks(self) -> int:
        """Largest number of tokens of an answer, for tasks that set none."""
        return usual_max_new_tokens(self.max_length)


def load_transformers_model(
    model: OpenedModel,
    *,
    device: str,
    batch_size: int,
    trust_remote_code: bool = False,
    prompts: Prompts | None = None,
    progress: Progress | None = None,
) -> TransformersModel:
    """Load a model that transformers runs as a model of lm-eval; `prompts` say how items are asked.

    Raises:
        UserError: As `load_transformers`.
    """
    text = ModelTokenizer(model.text_folder, trust_remote_code=trust_remote_code)
    with suppress_output():
        loaded = load_transformers(
            model.path, model.loops, model.depth, trust_remote_code=trust_remote_code, device=device
        )
        loaded.config.use_cache = False  # Scoring would fill a cache and discard it.
        runner = TransformersModel(
            pretrained=loaded,
            tokenizer=text.loaded,
            batch_size=batch_size,
            logits_cache=False,
        )
    runner.text, runner.prompts = text, prompts or Prompts()
    runner.progress = progress or Progress()
    return runner
