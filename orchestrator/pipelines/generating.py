"""Generate text from a checkpoint.

One prompt is streamed in pieces of whole characters, as a byte-level token may end inside of one.
Several prompts are one batch; a batch says what each prompt alone says.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream

from iiet.decoder import Decoder
from iiet.generation import does_not_fit
from iiet.sampling import LogitsNotFinite
from iiet.schedule import IterationSchedule
from iiet.speculative import DraftRecord
from iiet.weights import CONFIG, MODEL_TYPE
from orchestrator.evaluation.answers import Decode, Sampling, generate_answers
from orchestrator.evaluation.looped import LoopedDecoder, fix_start
from orchestrator.models import folder as model_folders
from orchestrator.models import lookup
from orchestrator.models.hub import download, is_hub_name
from orchestrator.models.loops import LOOPED_MODELS
from orchestrator.models.open import (
    DTYPES,
    OpenedModel,
    best_device,
    device_precision,
    load_model,
    open_model,
)
from orchestrator.models.tokenizer import Message, ModelTokenizer
from orchestrator.pipelines.context import open_context
from orchestrator.pipelines.models import local_model, plan_pick
from orchestrator.planning.machine import check_device
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import RunFailed, UserError, quoted
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.layout import Workspace

INCOMPLETE = "\ufffd"
"""Stands for the bytes of a character whose last byte was not generated."""


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How a cheaper schedule of the model drafts tokens, which changes none of them."""

    draft: str
    """Iteration schedule of the draft, as typed, or `auto`."""
    num_tokens: int | Literal["auto"] = "auto"
    """Tokens to draft at once."""


def generate(
    prompts: str | Sequence[str],
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    chat: bool = False,
    system: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **sampling: Any,
) -> Any:
    """Return the continuation of a prompt, or a list of those of several as one batch.

    Args:
        prompts: Text to continue, or several.
        model: A checkpoint, run or exported folder, by path or name, or a sweep: its picked model;
            or a folder of a looped model. When unset the newest of finished runs and the last pick.
        schedule: Iteration schedule or depth as typed, if not the model's own.
        draft: Cheaper schedule that drafts tokens, or `auto`; changes none of them.
        device: `cpu`, `cuda` or `cuda:N`; a GPU if there is one when unset.
        chat: Put each prompt into the model's chat template, as a user's message.
        system: The system's message before it; the template's own when unset.
        trust_remote_code: Whether code in a looped model's folder may run.
        sampling: Fields of `Sampling`: `max_new_tokens`, `temperature`, `seed`, `stop`, ...

    Raises:
        UserError: If the model is missing, damaged, has no tokenizer or no chat template, the
            schedule does not fit it, prompts and new tokens do not fit its context, this machine
            lacks the device, or a system's message is given without `chat`.
    """
    drafting = Drafting(draft=draft) if draft else None
    writer = open_generator(
        workspace,
        model,
        schedule,
        drafting,
        device=device,
        trust_remote_code=trust_remote_code,
        seed=sampling.get("seed"),
        progress=progress,
    )
    asked = [prompts] if isinstance(prompts, str) else prompts
    texts = writer.continue_all(
        writer.as_asked(asked, chat=chat, system=system), Sampling(**sampling)
    )
    return texts[0] if isinstance(prompts, str) else texts


def generate_stream(
    prompt: str,
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    chat: bool = False,
    system: str | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt, piece by piece; arguments and errors as `generate`."""
    writer = open_generator(workspace, model, schedule)
    (text,) = writer.as_asked([prompt], chat=chat, system=system)
    return writer.stream(text, Sampling(**sampling))


def open_generator(
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    schedule: str | None = None,
    drafting: Drafting | None = None,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
) -> TextGenerator:
    """Load the model that generates; arguments and errors as `generate`."""
    if device is not None:
        check_device(device)
    context = open_context(workspace, progress)
    space, note = context.workspace, context.progress.note
    if model is not None and (looped := _looped_folder(Path(model))):
        opened = open_model(looped, schedule)
        options: Any = {"trust_remote_code": trust_remote_code, "device": device, "seed": seed}
        return LoopedGenerator(opened, drafting, **options)
    path, own = local_model(model, space, context.progress), None
    folder = None
    if path is None:
        folder, own = lookup.resolve_model(space, note=note)
    elif (space.sweeps / path).is_dir() and not (path.exists() or (space.runs / path).exists()):
        if picked := lookup.picked_model(space, path.name):
            folder, own = picked.model
        elif (trial := plan_pick(workspace=space, sweep=path.name).model).checkpoint:
            folder = Path(trial.checkpoint)
            own = None if trial.schedule is None else IterationSchedule(trial.schedule)
    if folder is None:
        folder = lookup.find_model_folder(space, Path(str(path)), model_types={MODEL_TYPE})
        is_export = not model_folders.is_checkpoint(folder) and (folder / CONFIG).is_file()
        if not is_export or model_folders.read_config(folder).get("model_type") != MODEL_TYPE:
            folder = model_folders.resolve_checkpoint(folder)
    wanted = lookup.parse_schedule(schedule, folder) or own
    return TextGenerator(folder, wanted, drafting, device=device, note=note)


def _looped_folder(model: Path) -> Path | None:
    """Return the folder of a looped model of another project; None for any other model."""
    folder = download(model) if is_hub_name(model) else expand_user(model)
    if not (folder / CONFIG).is_file():
        return None
    return folder if model_folders.read_config(folder).get("model_type") in LOOPED_MODELS else None


class TextGenerator:
    """A model folder, under its own iteration schedule or another, with its tokenizer.

    Raises:
        UserError: If the checkpoint is damaged, has no tokenizer, or cannot use the schedule.
    """

    def __init__(
        self,
        checkpoint: Path,
        schedule: IterationSchedule | None = None,
        drafting: Drafting | None = None,
        *,
        device: str | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.checkpoint, self._note = checkpoint, note
        self.text = ModelTokenizer(checkpoint)
        where = device or best_device()
        dtype = DTYPES[device_precision(where)]  # As it is evaluated.
        self.decoder: Decoder = load_model(checkpoint, device=where, dtype=dtype, schedule=schedule)
        self.schedule: tuple[int, ...] = tuple(self.decoder.config.schedule or ())
        """Its iteration schedule, if it has one; or the depth of a looped model."""
        self._stream: Decode = Decoder.stream
        self.record: DraftRecord | None = None
        """What drafts did, in all generations together; None: nothing is drafted."""
        if drafting is not None:
            self.record, text = DraftRecord(), drafting.draft
            self._stream = partial(
                Decoder.stream,
                draft=text
                if text == "auto"
                else lookup.parse_schedule(text, checkpoint, "--draft"),
                draft_tokens=drafting.num_tokens,
                family=model_folders.served_schedules(checkpoint),
                record=self.record,
            )

    def as_asked(
        self, prompts: Sequence[str], *, chat: bool, system: str | None = None
    ) -> list[str]:
        """Return the texts to continue: the prompts, or what the chat template makes of them.

        Raises:
            UserError: If a system's message is given without `chat`, or there is no template.
        """
        if system is not None and not chat:
            raise UserError(
                f"the system's message {quoted(system)} is for a chat; give --system together with "
                "--chat"
            )
        texts = list(prompts)
        if chat:
            first: list[Message] = [{"role": "system", "content": system}] if system else []
            chats = [[*first, Message(role="user", content=prompt)] for prompt in prompts]
            texts = [self.text.chat(each) for each in chats]
        return texts

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Yield the continuation of a prompt in pieces of whole characters.

        Raises:
            UserError: At the call: a setting is out of range, or prompt and new tokens do not fit
                the context.
        """
        context = self.text.encode_document(prompt)
        ids = torch.tensor([context], device=self.decoder.device)
        one_token = [self.text.encode(stop, add_special_tokens=False) for stop in sampling.stop]
        # A stop text that is one token may be a special token, which no piece shows.
        ends = self.text.end_ids.union(*(tokens for tokens in one_token if len(tokens) == 1))
        options = sampling.options(self.decoder.config.context_length - len(context))
        try:
            steps = self._stream(self.decoder, ids, eos_token_id=ends, **options)
        except ValueError as error:
            raise UserError(str(error)) from None
        tokens = takewhile(lambda token: token not in ends, map(int, steps))
        return self._pieces(tokens, [stop for stop in sampling.stop if stop])

    def continue_all(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return the continuation of each prompt, all decoded as one batch. Raises as `stream`."""
        if not prompts:
            raise UserError("there is nothing to continue; give at least one prompt")
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        contexts = [self.text.encode_document(prompt) for prompt in prompts]
        longest, room = max(map(len, contexts)), self.decoder.config.context_length
        most = sampling.options(room - longest)["max_new_tokens"]
        if longest + most > room:
            raise UserError(does_not_fit(longest, most, room))
        seeds = [seed + row for row in range(len(contexts))]
        try:
            texts = generate_answers(
                self.decoder, self.text, contexts, sampling, seeds, self._stream
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        self._note_drafts()
        return [text.rstrip(INCOMPLETE) for text in texts]

    def _pieces(self, tokens: Iterable[int], stops: Sequence[str]) -> Iterator[str]:
        """Yield the text of tokens; what may be the beginning of a stop text is held back."""
        decoding = DecodeStream(skip_special_tokens=True)
        held = ""
        try:
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
        except LogitsNotFinite as error:
            raise RunFailed(str(error)) from None
        if held:
            yield held
        self._note_drafts()

    def _note_drafts(self) -> None:
        if self.record is not None:
            self._note(str(self.record))


class LoopedGenerator(TextGenerator):
    """A looped model of another project at a depth, for which a lower one may draft.

    Args:
        seed: Gives all tokens one start state, where the loops start from random ones.

    Raises:
        UserError: If the model cannot be loaded, the draft is not a depth of it, or the draft needs
            a start state that no seed fixes.
    """

    def __init__(
        self,
        opened: OpenedModel,
        drafting: Drafting | None = None,
        *,
        trust_remote_code: bool = False,
        device: str | None = None,
        seed: int | None = None,
    ) -> None:
        assert opened.loops is not None, "it is a looped model"
        self.checkpoint, self.schedule, self.record = opened.path, opened.depth or (), None
        self.text = opened.tokenizer(trust_remote_code=trust_remote_code)
        where = str(device or best_device())
        load = partial(LoopedDecoder, trust_remote_code=trust_remote_code, device=where)
        decoder: Any = load(opened)
        self.decoder, draft = decoder, None
        if drafting is not None:
            depth = opened.loops.parse(drafting.draft)
            draft = load(replace(opened, depth=depth), like=decoder)
        if opened.loops.starts_at_random and (draft or seed is not None):
            if seed is None:
                raise UserError(
                    f"the loops of {opened.path} start from a random state, so a draft would "
                    "change the text; --seed N gives all tokens one start state"
                )
            for each in filter(None, (decoder, draft)):
                fix_start(each.model, seed)
        number = drafting.num_tokens if drafting else "auto"
        self._stream = partial(LoopedDecoder.generate, draft=draft, draft_tokens=number)
