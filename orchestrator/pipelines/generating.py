"""Generate text from a checkpoint.

One prompt is streamed in pieces of whole characters, as a byte-level token may end inside of one.
Several prompts are one batch, padded on the left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream

from iiet.cache import KvStrategy
from iiet.decoder import Decoder
from iiet.generation import generate as generate_tokens
from iiet.generation import stream as stream_tokens
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.model_tokenizer import ModelTokenizer, checkpoint_tokenizer
from orchestrator.pipelines.context import open_context
from orchestrator.terminal.progress import Progress
from orchestrator.training.model_loading import AUTO, load_model
from orchestrator.training.model_lookup import parse_schedule, resolve_model
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 128
    """Maximum number of tokens to add."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability."""
    seed: int | None = None
    """Random seed for sampling; random when unset."""
    stop: tuple[str, ...] = ()
    """Tokens, as texts, that end a row in addition to the end of text."""
    kv_strategy: KvStrategy = "exact"
    """A cache slot per evaluation, or one per layer."""


def generate(
    prompts: Sequence[str],
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    schedule: str | None = None,
    sampling: Sampling | None = None,
    chat: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Return the continuation of each prompt, all decoded as one batch.

    Args:
        prompts: Texts to continue.
        model: A checkpoint or run, by path or name; the newest IIET or imported model when unset.
        schedule: Iteration schedule as typed, if not the checkpoint's own.
        sampling: How tokens are chosen, and when to stop.
        chat: Put each prompt into the model's chat template, as a user's message.

    Raises:
        UserError: If the model is missing, damaged, has no tokenizer or no chat template, the
            schedule does not fit it, or prompts and new tokens do not fit its context.
    """
    writer, texts = _open(prompts, workspace, model, schedule, progress, chat=chat)
    return writer.continue_all(texts, sampling or Sampling())


def generate_stream(
    prompt: str,
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    schedule: str | None = None,
    sampling: Sampling | None = None,
    chat: bool = False,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Yield the continuation of one prompt, piece by piece; arguments and errors as `generate`."""
    writer, texts = _open([prompt], workspace, model, schedule, progress, chat=chat)
    return writer.stream(texts[0], sampling or Sampling())


def _open(
    prompts: Sequence[str],
    workspace: Workspace | Path | str,
    model: Path | str | None,
    schedule: str | None,
    progress: Progress | None,
    *,
    chat: bool,
) -> tuple[TextGenerator, list[str]]:
    context = open_context(workspace, progress)
    path = Path(model) if model else None
    checkpoint = resolve_model(context.workspace, path, context.progress.note)
    writer = TextGenerator(checkpoint, parse_schedule(schedule, checkpoint))
    return writer, [writer.chat(text) if chat else text for text in prompts]


class TextGenerator:
    """A checkpoint, under its own iteration schedule or another, with its tokenizer.

    Raises:
        UserError: If the checkpoint is damaged, has no tokenizer, or cannot use the schedule.
    """

    def __init__(self, checkpoint: Path, schedule: IterationSchedule | None = None) -> None:
        self.text: ModelTokenizer = checkpoint_tokenizer(checkpoint)
        self.decoder: Decoder = load_model(checkpoint, device=AUTO, schedule=schedule)

    def chat(self, prompt: str) -> str:
        """Return a user's message as the model's chat template writes it, ready to be answered."""
        message = {"role": "user", "content": prompt}
        return self.text.chat([message], opens_answer=True, template=None)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield the continuation of a prompt in pieces of whole characters.

        Raises:
            UserError: At the call: a setting is out of range, or prompt and new tokens do not fit
                the context.
        """
        ids = torch.tensor([self.text.encode_document(prompt)], device=self.decoder.device)
        stops = self._stop_tokens(sampling)
        try:
            steps = stream_tokens(self.decoder, ids, stop_tokens=stops, **_options(sampling))
        except ValueError as error:
            raise UserError(str(error)) from None
        return self._pieces((int(step) for step in steps), stops)

    def continue_all(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the continuation of each prompt, all decoded as one batch. Raises as `stream`."""
        encoded = [self.text.encode_document(prompt) for prompt in prompts]
        length = max(map(len, encoded))
        rows = [[self.text.prefix_id] * (length - len(row)) + [*row] for row in encoded]
        mask = [[False] * (length - len(row)) + [True] * len(row) for row in encoded]
        stops, device = self._stop_tokens(sampling), self.decoder.device
        try:
            written = generate_tokens(
                self.decoder,
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                stop_tokens=stops,
                **_options(sampling),
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return ["".join(self._pieces(row, stops)) for row in written[:, length:].tolist()]

    def _pieces(self, tokens: Iterable[int], stops: Collection[int]) -> Iterator[str]:
        decoding = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            if token in stops:
                return
            piece = decoding.step(self.text.tokenizer, token)
            if piece:
                yield piece

    def _stop_tokens(self, sampling: Sampling) -> set[int]:
        stops = set(self.text.end_ids)
        for text in sampling.stop:
            ids = self.text.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise UserError(
                    f"--stop takes texts that are one token; {text!r} is {len(ids)} of them"
                )
            stops.add(ids[0])
        return stops


def _options(sampling: Sampling) -> dict[str, Any]:
    values = asdict(sampling)
    del values["stop"]
    return values
