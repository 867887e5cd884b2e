"""Generate text from a checkpoint.

One prompt is streamed in pieces of whole characters, as a byte-level token may end inside of one.
Several prompts are one batch; a batch says what each prompt alone says.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from iiet.decoder import Decoder
from iiet.generation import stream as stream_tokens
from iiet.quantization import quantize_weights
from iiet.quantized_linear import WeightFormat
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.answers import AnswerSettings, Question, generate_answers
from orchestrator.evaluation.model_tokenizer import ModelTokenizer, checkpoint_tokenizer
from orchestrator.pipelines.context import open_context
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import DTYPES
from orchestrator.training.model_loading import best_device, load_model
from orchestrator.training.model_lookup import parse_schedule, resolve_model
from orchestrator.training.precision import device_precision
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace

INCOMPLETE = "\ufffd"
"""Stands for the bytes of a character whose last byte was not generated."""


@dataclass(frozen=True, kw_only=True)
class Sampling(AnswerSettings):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 128
    """Maximum number of tokens to add."""
    seed: int | None = None
    """Random seed for sampling; random when unset."""


def generate(
    prompts: Sequence[str],
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    schedule: str | None = None,
    sampling: Sampling | None = None,
    weights: WeightFormat | None = None,
    chat: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Return the continuation of each prompt, all decoded as one batch.

    Args:
        prompts: Texts to continue.
        model: A checkpoint or run, by path or name; the newest IIET or imported model when unset.
        schedule: Iteration schedule as typed, if not the checkpoint's own.
        sampling: How tokens are chosen, and when to stop.
        weights: Decode on the CPU with the weights in this format; faster than float32, less exact.
        chat: Put each prompt into the model's chat template, as a user's message.

    Raises:
        UserError: If the model is missing, damaged, has no tokenizer or no chat template, the
            schedule does not fit it, prompts and new tokens do not fit its context, or the CPU
            lacks the instructions for these weights.
    """
    writer, texts = _open(prompts, workspace, model, schedule, weights, progress, chat=chat)
    return writer.continue_all(texts, sampling or Sampling())


def generate_stream(
    prompt: str,
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    schedule: str | None = None,
    sampling: Sampling | None = None,
    weights: WeightFormat | None = None,
    chat: bool = False,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Yield the continuation of one prompt, piece by piece; arguments and errors as `generate`."""
    writer, texts = _open([prompt], workspace, model, schedule, weights, progress, chat=chat)
    return writer.stream(texts[0], sampling or Sampling())


def _open(
    prompts: Sequence[str],
    workspace: Workspace | Path | str,
    model: Path | str | None,
    schedule: str | None,
    weights: WeightFormat | None,
    progress: Progress | None,
    *,
    chat: bool,
) -> tuple[TextGenerator, list[str]]:
    context = open_context(workspace, progress)
    path = Path(model) if model else None
    checkpoint = resolve_model(context.workspace, path, context.progress.note)
    writer = TextGenerator(checkpoint, parse_schedule(schedule, checkpoint), weights)
    return writer, [writer.chat(text) if chat else text for text in prompts]


class TextGenerator:
    """A checkpoint, under its own iteration schedule or another, with its tokenizer.

    Raises:
        UserError: If the checkpoint is damaged, has no tokenizer, or cannot use the schedule, or
            if the CPU lacks the instructions for the format of the weights.
    """

    def __init__(
        self,
        checkpoint: Path,
        schedule: IterationSchedule | None = None,
        weights: WeightFormat | None = None,
    ) -> None:
        self.text: ModelTokenizer = checkpoint_tokenizer(checkpoint)
        device = best_device() if weights is None else "cpu"
        dtype = DTYPES[device_precision(device)]  # As it is evaluated.
        self.decoder: Decoder = load_model(
            checkpoint, device=device, dtype=dtype, schedule=schedule
        )
        if weights is not None:
            try:
                self.decoder = quantize_weights(self.decoder, weights)
            except ValueError as error:
                raise UserError(f"--weights {weights}: {error}") from None

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
        one_token = [self.text.encode(stop, add_special_tokens=False) for stop in sampling.stop]
        # A stop text that is one token may be a special token, which no piece shows.
        ends = self.text.end_ids.union(*(tokens for tokens in one_token if len(tokens) == 1))
        options = asdict(sampling)
        del options["stop"]
        try:
            steps = stream_tokens(self.decoder, ids, stop_tokens=ends, **options)
        except ValueError as error:
            raise UserError(str(error)) from None
        tokens = takewhile(lambda token: token not in ends, map(int, steps))
        return self._pieces(tokens, [stop for stop in sampling.stop if stop])

    def continue_all(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the continuation of each prompt, all decoded as one batch. Raises as `stream`."""
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        contexts = [self.text.encode_document(prompt) for prompt in prompts]
        longest, room = max(map(len, contexts)), self.decoder.config.context_length
        if longest + sampling.max_new_tokens > room:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} do not "
                f"fit the context_length of {room}"
            )
        asked = [Question(context, sampling, seed + row) for row, context in enumerate(contexts)]
        try:
            texts = generate_answers(self.decoder, self.text, asked, batch_size=len(asked))
        except ValueError as error:
            raise UserError(str(error)) from None
        return [text.rstrip(INCOMPLETE) for text in texts]

    def _pieces(self, tokens: Iterable[int], stops: Sequence[str]) -> Iterator[str]:
        """Yield the text of tokens; what may be the beginning of a stop text is held back."""
        decoding = DecodeStream(skip_special_tokens=True)
        held = ""
        for token in tokens:
            held += decoding.step(self.text.tokenizer, token) or ""
            if found := [held.index(stop) for stop in stops if stop in held]:
                held = held[: min(found)]
                break
            starts = [stop[:size] for stop in stops for size in range(1, len(stop))]
            num_held = max((len(start) for start in starts if held.endswith(start)), default=0)
            ready, held = held[: len(held) - num_held], held[len(held) - num_held :]
            if ready:
                yield ready
        if held:
            yield held
