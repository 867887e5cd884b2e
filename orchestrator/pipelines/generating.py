"""Generate text from a checkpoint.

One prompt is streamed in pieces of whole characters, because a byte-level token may end within a
character. Several prompts are decoded as one batch, with the same texts as one by one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream

from iiet.decoder import Decoder
from iiet.decoding.generation import does_not_fit
from iiet.decoding.sampling import LogitsNotFinite
from iiet.decoding.speculative import DraftRecord
from iiet.model.facts import facts_of
from orchestrator.evaluation.answers import Decode, Sampling, generate_answers
from orchestrator.models.folder import served_schedules
from orchestrator.models.load import DTYPES, best_device, device_precision
from orchestrator.models.lookup import picked_model
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.models.tokenizer import Message
from orchestrator.pipelines.context import open_context
from orchestrator.pipelines.models import imported_model, plan_pick
from orchestrator.planning.machine import check_device
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.layout import Workspace

INCOMPLETE = "\ufffd"
"""Replaces the bytes of an incomplete character."""


def generate(
    prompts: str | Sequence[str],
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    draft: str | None = None,
    draft_tokens: int | Literal["auto"] = "auto",
    device: str | None = None,
    chat: bool = False,
    progress: Progress | None = None,
    **sampling: Any,
) -> Any:
    """Return the continuation of a prompt, or a list of those of several as one batch.

    Args:
        prompts: Text to continue, or several.
        model: A checkpoint, run, trial or exported folder, by path or name; or a sweep, whose
            picked model is used. When unset, the newest of finished runs and the last pick.
        schedule: Iteration schedule as typed, if not the model's own.
        draft: Cheaper schedule that drafts tokens, or `auto`; the text stays the same.
        draft_tokens: Tokens per draft; `auto`: the fastest number.
        device: `cpu`, `cuda` or `cuda:N`; a GPU if there is one when unset.
        chat: Put each prompt into the model's chat template, as a user's message.
        sampling: Fields of `Sampling`: `max_new_tokens`, `temperature`, `seed`, `stop`, ...

    Raises:
        UserError: If the model is missing or damaged, or has no tokenizer or chat template; if
            the schedule does not fit the model, or prompts and new tokens do not fit its context;
            or if this machine lacks the device.
    """
    writer = open_generator(
        workspace,
        model,
        schedule,
        draft,
        draft_tokens=draft_tokens,
        device=device,
        progress=progress,
    )
    all_prompts = [prompts] if isinstance(prompts, str) else prompts
    texts = writer.texts_to_continue(all_prompts, chat=chat)
    continuations = writer.continue_all(texts, Sampling(**sampling))
    return continuations[0] if isinstance(prompts, str) else continuations


def generate_stream(
    prompt: str,
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    chat: bool = False,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt, piece by piece; arguments and errors as `generate`."""
    writer = open_generator(workspace, model, schedule)
    (text,) = writer.texts_to_continue([prompt], chat=chat)
    return writer.stream(text, Sampling(**sampling))


def open_generator(
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    draft: str | None = None,
    *,
    draft_tokens: int | Literal["auto"] = "auto",
    device: str | None = None,
    progress: Progress | None = None,
) -> TextGenerator:
    """Load the model that generates; arguments and errors as `generate`."""
    if device is not None:
        check_device(device)
    context = open_context(workspace, progress)
    space = context.workspace
    note = context.progress.note
    name = imported_model(model, space, context.progress)
    picked_schedule = None
    if name is not None and _is_sweep(space, name):
        if picked := picked_model(space, name.name):
            name = Path(picked.checkpoint)
            picked_schedule = picked.schedule
        else:  # No model was picked from this sweep yet.
            trial = plan_pick(name.name, workspace=space, allow_loss=True).model
            name = Path(str(trial.checkpoint))
            picked_schedule = trial.opened_schedule
    opened = open_model(name, space, schedule or picked_schedule, folders="exports", note=note)
    return TextGenerator(opened, draft, draft_tokens=draft_tokens, device=device, note=note)


def _is_sweep(workspace: Workspace, name: Path) -> bool:
    """Return whether a name is that of a sweep, and not of a folder or run, which come first."""
    is_other = name.exists() or (workspace.runs / name).exists()
    return (workspace.sweeps / name).is_dir() and not is_other


class TextGenerator:
    """A model that generates text, under its own iteration schedule or another.

    Args:
        model: The model.
        draft: Cheaper schedule that drafts tokens, or `auto`; the text stays the same.
        draft_tokens: Tokens per draft; `auto`: the fastest number.
        device: As in `generate`.
        note: Called after each generation with a sentence on its drafts.

    Raises:
        UserError: If the model is damaged, or has no tokenizer, or the draft's schedule does not
            fit it.
    """

    def __init__(
        self,
        model: OpenedModel,
        draft: str | None = None,
        *,
        draft_tokens: int | Literal["auto"] = "auto",
        device: str | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.checkpoint = model.path
        self._note = note
        self.tokenizer = model.tokenizer()
        device = device or best_device()
        dtype = DTYPES[device_precision(device)]  # As in an evaluation.
        self.decoder: Decoder = model.decoder(dtype, device=device)
        has_corrections = facts_of(self.decoder.config.method).has_corrections
        self.schedule = tuple(self.decoder.config.corrections) if has_corrections else ()
        """The model's iteration schedule; empty if its method has none."""
        self._stream: Decode = Decoder.stream
        self.record: DraftRecord | None = None
        """Statistics of the drafts of all generations; None without drafts."""
        if draft is not None:
            self.record = DraftRecord()
            is_chosen = draft == "auto"
            self._stream = partial(
                Decoder.stream,
                draft=draft if is_chosen else model.with_schedule(draft, "--draft").schedule,
                draft_tokens=draft_tokens,
                family=served_schedules(model.path),
                record=self.record,
            )

    def texts_to_continue(self, prompts: Sequence[str], *, chat: bool) -> list[str]:
        """Return the texts to continue: the prompts, with `chat` in the model's chat template.

        Raises:
            UserError: If there is no template, or it fails.
        """
        if not chat:
            return list(prompts)
        return [self.tokenizer.chat([Message(role="user", content=prompt)]) for prompt in prompts]

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield the continuation of a prompt in pieces of whole characters.

        Raises:
            UserError: At the call, if a setting is out of range, or prompt and new tokens do not
                fit the context.
        """
        context = self.tokenizer.encode_document(prompt)
        input_ids = torch.tensor([context], device=self.decoder.device)
        end_ids = set(self.tokenizer.end_ids)
        for stop in sampling.stop:
            stop_ids = self.tokenizer.encode(stop, add_special_tokens=False)
            # A stop text may be a special token, which the pieces do not contain.
            if len(stop_ids) == 1:
                end_ids.update(stop_ids)
        options = sampling.options(self.decoder.config.context_length - len(context))
        try:
            steps = self._stream(self.decoder, input_ids, eos_token_id=end_ids, **options)
        except ValueError as error:
            raise UserError(str(error)) from None
        tokens = takewhile(lambda token: token not in end_ids, map(int, steps))
        return self.pieces(tokens, [stop for stop in sampling.stop if stop])

    def continue_all(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the continuation of each prompt, all decoded as one batch.

        Raises:
            UserError: If there is no prompt, and as `stream`.
        """
        if not prompts:
            raise UserError("there is nothing to continue; give at least one prompt")
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        contexts = [self.tokenizer.encode_document(prompt) for prompt in prompts]
        longest = max(map(len, contexts))
        context_length = self.decoder.config.context_length
        max_new_tokens = sampling.options(context_length - longest)["max_new_tokens"]
        if longest + max_new_tokens > context_length:
            raise UserError(does_not_fit(longest, max_new_tokens, context_length))
        seeds = [seed + row for row in range(len(contexts))]
        try:
            texts = generate_answers(
                self.decoder, self.tokenizer, contexts, sampling, seeds, self._stream
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        self._note_drafts()
        return [text.rstrip(INCOMPLETE) for text in texts]

    def pieces(self, tokens: Iterable[int], stops: Sequence[str]) -> Iterator[str]:
        """Yield the text of tokens; a possible beginning of a stop text is held back."""
        decoding = DecodeStream(skip_special_tokens=True)
        held = ""
        try:
            for token in tokens:
                held += decoding.step(self.tokenizer.tokenizer, token) or ""
                stop_places = [held.index(stop) for stop in stops if stop in held]
                if stop_places:
                    held = held[: min(stop_places)]
                    break
                num_held = max((_num_begun(held, stop) for stop in stops), default=0)
                ready = held[: len(held) - num_held]
                held = held[len(held) - num_held :]
                if ready:
                    yield ready
        except LogitsNotFinite as error:
            raise RunFailed(str(error)) from None
        if held:
            yield held
        self._note_drafts()

    def _note_drafts(self) -> None:
        if self.record is not None:
            self._note(str(self.record))


def _num_begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    lengths = [length for length in range(1, len(stop)) if text.endswith(stop[:length])]
    return max(lengths, default=0)
