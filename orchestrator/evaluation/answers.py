"""Generate answers: texts that continue contexts, until a stop text or a stop token.

Contexts are padded on the left and decoded together with the key/value cache. The batch does not
change answers: padding is masked, and each sampled context has its own seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.decoding.sampling import LogitsNotFinite
from iiet.model.cache import KvStrategy
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.workspace.errors import DeviceError, RunFailed, UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Decode = Callable[..., Iterator[Tensor]]

USUAL_NEW_TOKENS = 64

_TAIL_MARGIN = 8
"""Extra tokens to decode before a possible stop text, as the first ones may be parts of
characters."""
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}
"""Options of a task's answers that have no effect at these values."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when they end."""

    max_new_tokens: int | None = None
    """Most tokens to add; when unset 64, or fewer if only these fit the context."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, without being part of it."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among so many of the likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability."""
    kv_strategy: KvStrategy = "exact"
    """A cache slot per evaluation, or one per layer."""
    seed: int | None = None
    """Random seed for sampling; random when unset."""

    def options(self, free_tokens: int) -> dict[str, Any]:
        """Return options of `iiet.Decoder.stream`.

        Args:
            free_tokens: Tokens of the context that remain for the answer to the longest prompt.
        """
        options = asdict(self)
        del options["stop"]
        if self.max_new_tokens is None:
            # At least one, so that a prompt without room for an answer is an error.
            options["max_new_tokens"] = max(1, min(USUAL_NEW_TOKENS, free_tokens))
        return options


def generate_answers(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    contexts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    decode: Decode = Decoder.stream,
) -> list[str]:
    """Return the continuation of each context, without the stop text, decoded as one batch.

    Args:
        decoder: The model in evaluation mode, under its own schedule.
        tokenizer: Its tokenizer; its end tokens end an answer, too.
        contexts: Tokens of each context, at least one. The beginning of a context is cut off if
            there is no room for the answer.
        seeds: Random seed of each context, if tokens are sampled.
        decode: Yields the tokens of a batch, step by step, as `iiet.Decoder.stream` does.

    Raises:
        ValueError: If a setting is out of range.
        RunFailed: If logits are not finite.
    """
    context_length = decoder.config.context_length
    options = sampling.options(context_length - max(map(len, contexts)))
    num_read = context_length - options["max_new_tokens"]
    rows = [list(context[-num_read:]) for context in contexts]
    length = max(map(len, rows))
    paddings = [length - len(row) for row in rows]
    padded = [[0] * padding + row for padding, row in zip(paddings, rows, strict=True)]
    is_token = torch.arange(length) >= torch.tensor(paddings)[:, None]
    steps = decode(
        decoder,
        torch.tensor(padded, device=decoder.device),
        attention_mask=is_token.to(decoder.device) if any(paddings) else None,
        **{**options, "seed": seeds, "eos_token_id": tokenizer.end_ids},
    )
    stops = [text for text in sampling.stop if text]
    # A token is at least one byte.
    tail_length = max((len(text.encode()) for text in stops), default=0) + _TAIL_MARGIN
    answers: list[list[int]] = [[] for _ in rows]
    unfinished = set(range(len(rows)))
    try:
        for step in steps:
            tokens = step.tolist()
            for row in sorted(unfinished):
                if tokens[row] in tokenizer.end_ids:
                    unfinished.remove(row)
                    continue
                answers[row].append(tokens[row])
                if stops:
                    # A stop text may be a special token, and may begin within a token.
                    tail = tokenizer.decode(answers[row][-tail_length:], skip_special_tokens=False)
                    if any(stop in tail for stop in stops):
                        unfinished.remove(row)
            if not unfinished:
                break
    except LogitsNotFinite as error:
        raise RunFailed(str(error)) from None
    texts = [tokenizer.decode(tokens) for tokens in answers]
    for stop in stops:
        texts = [text.partition(stop)[0] for text in texts]
    return texts


def usual_max_new_tokens(context_length: int) -> int:
    """Return the default length of answers in tokens: lm-eval's, or half the context."""
    return max(1, min(256, context_length // 2))


def answer_settings(options: Mapping[str, Any], context_length: int) -> Sampling:
    """Return a task's `generation_kwargs` as settings of the generator.

    Raises:
        UserError: If an option is unknown or has a value that the generator does not support.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    unread = dict(normalize_gen_kwargs(dict(options), usual_max_new_tokens(context_length)))
    samples = unread.pop("do_sample")
    temperature = unread.pop("temperature", None)
    if temperature is None:  # As transformers does.
        temperature = 1.0 if samples else 0.0
    max_new_tokens = unread.pop("max_gen_toks")
    settings = Sampling(
        stop=tuple(map(str, unread.pop("until"))),
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        top_k=unread.pop("top_k", None) or None,
        top_p=unread.pop("top_p", None),
    )
    unsupported = [
        f"{name}={value}" for name, value in unread.items() if (name, value) not in _NEUTRAL.items()
    ]
    if unsupported:
        raise UserError(
            f"its generation_kwargs ask for {', '.join(unsupported)}; supported are until, "
            "max_gen_toks, do_sample, temperature, top_k and top_p"
        )
    if max_new_tokens >= context_length:
        raise UserError(
            f"its answers have up to {max_new_tokens} tokens (max_gen_toks), and the model reads "
            f"{context_length} at once, question included"
        )
    return settings


def check_answer_settings(tasks: Mapping[str, Task], context_length: int) -> None:
    """Raise `UserError` for a task whose answers a decoder cannot generate, before any task
    runs."""
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


def smaller_batch(size: int, problem: str, note: Callable[[str], None] | None = None) -> int:
    """Return a smaller batch size after a batch ran out of memory, and note it.

    Args:
        size: Size of the batch that did not fit.
        problem: PyTorch's message.

    Raises:
        DeviceError: If the batch cannot be smaller.
    """
    if size <= 1:
        raise DeviceError(
            f"the evaluation of one sequence ran out of memory ({problem}); use a GPU with more "
            "memory, or --set evaluation.precision=bf16"
        )
    torch.cuda.empty_cache()
    if note:
        note(
            f"a batch of the evaluation ran out of memory; from here on, it has at most "
            f"{size // 2:,} sequences"
        )
    return size // 2
