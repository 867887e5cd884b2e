"""The depth tasks of some settings, and the vocabulary that they share."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models

from orchestrator.data.depth.chains import PointerChains
from orchestrator.data.depth.induction import PHopInduction
from orchestrator.data.depth.permutation_words import PermutationWords
from orchestrator.data.depth.task import DepthTask, numbered_symbols
from orchestrator.models.tokenizer import END_OF_TEXT
from orchestrator.settings.data import DepthSettings, parse_task_name
from orchestrator.workspace.errors import UserError


def make_tasks(settings: DepthSettings) -> tuple[DepthTask, ...]:
    """Return the tasks that the settings name.

    Raises:
        UserError: If they name none, or a sequence cannot hold its task.
    """
    if not settings.tasks:
        raise UserError(
            "data.source is `depth`, but data.depth.tasks is empty; name depth tasks, such as "
            "--set 'data.depth.tasks=[phop_6]'"
        )
    return tuple(_make(name, settings) for name in settings.tasks)


def _make(name: str, settings: DepthSettings) -> DepthTask:
    kind, depth = parse_task_name(name)
    if kind == PHopInduction.kind:
        return PHopInduction(depth, num_symbols=settings.num_symbols, length=settings.length)
    if kind == PointerChains.kind:
        return PointerChains(depth, num_chains=settings.num_chains)
    return PermutationWords(depth)


def marker(task: DepthTask) -> str:
    """Return the token with which a sequence begins if there are several tasks."""
    return f"<|{task.name}|>"


def vocabulary(tasks: Sequence[DepthTask], *, with_markers: bool) -> tuple[str, ...]:
    """Return the texts of all tokens of the tasks: symbols, then the tasks' markers."""
    symbols = {symbol: None for task in tasks for symbol in task.symbols}
    # Shared symbols first and in their order, so that a longer alphabet extends a shorter one.
    shared = [symbol for symbol in numbered_symbols(len(symbols)) if symbol in symbols]
    ordered = dict.fromkeys([*shared, *symbols])
    return (*ordered, *(marker(task) for task in tasks if with_markers))


def symbol_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a tokenizer that knows nothing but symbols and the end of a text, id 0."""
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0}))
    tokenizer.add_special_tokens([END_OF_TEXT])
    add_symbols(tokenizer, texts)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def add_symbols(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Add symbols to a tokenizer, after its own tokens. No text is ever merged with a symbol."""
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
