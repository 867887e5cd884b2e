"""Depth tasks: sequences of symbols whose answers need a known number of serial steps.

A task makes sequences of random numbers, with the answers that a model must give at some positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from itertools import permutations
from typing import ClassVar, NamedTuple

import numpy as np

from orchestrator.data.order import uniform_below
from orchestrator.settings import DataSettings
from orchestrator.settings.data import parse_task_name
from orchestrator.workspace.errors import UserError

NO_ANSWER = -1
MAX_SEQUENCE_LENGTH = 100_000
"""Longest sequence; a longer one is a typing error and would only fill the memory."""
ELEMENTS = tuple(permutations(range(5)))
"""The elements of the group S5."""
WORDS = (
    "red", "blue", "green", "gold", "stone", "water", "fire", "glass",
    "horse", "bird", "fish", "river", "house", "table", "book", "moon",
    "king", "salt", "snow", "wind", "road", "ship", "train", "coin",
    "bread", "rain", "star", "wood", "paper", "door", "lake", "child",
)  # fmt: skip
"""Symbols as words; in byte-level tokenizers each is one token, with the space before it."""
NUMBER_WORDS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten", "eleven", "twelve",
)  # fmt: skip


class Sequences(NamedTuple):
    """Generated sequences and their answers, both int64, (sequences, length)."""

    symbols: np.ndarray
    """Numbers of symbols, each an index of the task's `symbols`."""
    answers: np.ndarray
    """Number of the symbol to predict at each position, or `NO_ANSWER`."""


class DepthTask(ABC):
    """A kind of task at one depth: the number of serial steps from the question to the answer.

    Args:
        depth: At least 1.
    """

    kind: ClassVar[str]
    length: int
    """Symbols of a sequence."""
    symbols: tuple[str, ...]
    """The texts of the symbols."""
    chance: float
    """Chance level: the accuracy of guessing among the possible answers."""
    num_random: int
    """Random numbers that one sequence takes."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    @property
    def name(self) -> str:
        """Name with the depth, such as `phop_6`."""
        return f"{self.kind}_{self.depth}"

    @property
    def marker(self) -> str:
        """The first token of a sequence if there are several tasks."""
        return f"<|{self.name}|>"

    @property
    def name_with_chance(self) -> str:
        """Name and chance level, for display."""
        return f"{self.name} (chance {100 * self.chance:.3g}%)"

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices of a test's questions."""
        return self.symbols

    @abstractmethod
    def generate(self, bits: np.ndarray) -> Sequences:
        """Make one sequence of each row of random numbers, uint64, (sequences, num_random)."""

    def may_be_asked(self, answers: np.ndarray) -> np.ndarray:
        """Return a mask of the positions at which a test may ask: those with an answer."""
        has_answer: np.ndarray = answers != NO_ANSWER
        return has_answer

    def asked_positions(self, answers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Return the position of each sequence at which a test asks, or `NO_ANSWER` for none.

        The position is random among those that may be asked, so that tests resemble training.

        Args:
            answers: As in `Sequences`.
            bits: One random number per sequence, uint64.
        """
        may_be_asked = self.may_be_asked(answers)
        num_candidates = may_be_asked.sum(axis=1)
        # A number from 0 to the row's `num_candidates` - 1; `uniform_below` takes one limit for
        # all rows.
        chosen = uniform_below(bits, 1 << 32) * num_candidates >> 32
        # The n-th candidate has n candidates before it.
        candidates_before = may_be_asked.cumsum(axis=1) - 1
        position = ((candidates_before == chosen[:, None]) & may_be_asked).argmax(axis=1)
        return np.where(num_candidates > 0, position, NO_ANSWER)


class PHopInduction(DepthTask):
    """`phop_6`: repeat the step of an induction head 6 times, over independent, uniform symbols.

    One hop leads from a position to the one after the latest earlier occurrence of its symbol. The
    answer at a position is the symbol that many hops away; a position whose hops leave the sequence
    has none. All others count.
    Source: Sanford, Hsu and Telgarsky, 2024 (arXiv 2402.09268).

    Raises:
        UserError: If the hops of a sequence's last position do not usually fit into it.
    """

    kind = "phop"

    def __init__(
        self, depth: int, *, num_symbols: int, length: int, in_words: bool = False
    ) -> None:
        super().__init__(depth)
        # In a uniform sequence, one hop goes back by about `num_symbols` positions.
        if length < depth * num_symbols:
            raise UserError(
                f"data.depth.length={length} is too short for {self.name}: {depth} hops over "
                f"{num_symbols} symbols take about {depth * num_symbols} positions; set a larger "
                "length, fewer symbols or a smaller depth"
            )
        self.num_symbols = num_symbols
        self.length = length
        self.num_random = length
        self.symbols = symbol_texts(num_symbols, in_words=in_words)
        self.chance = 1 / num_symbols  # All symbols are equally frequent answers.

    def generate(self, bits: np.ndarray) -> Sequences:
        symbols = uniform_below(bits, self.num_symbols)
        hop = after_previous_occurrence(symbols, self.num_symbols)
        # The position that each position's hops have reached so far; negative outside.
        reached = np.broadcast_to(np.arange(self.length), symbols.shape)
        for _ in range(self.depth):
            reached = np.where(reached >= 0, _take(hop, reached), NO_ANSWER)
        answers = np.where(reached >= 0, _take(symbols, reached), NO_ANSWER)
        return Sequences(symbols, answers)


def after_previous_occurrence(symbols: np.ndarray, num_symbols: int) -> np.ndarray:
    """Return for each position the one after its symbol's previous occurrence, or `NO_ANSWER`."""
    hop = np.full_like(symbols, NO_ANSWER)
    positions = np.arange(symbols.shape[1])
    for symbol in range(num_symbols):
        is_symbol = symbols == symbol
        latest = np.maximum.accumulate(np.where(is_symbol, positions, NO_ANSWER), axis=1)
        # Shifted by one: the latest occurrence before a position, without the position itself.
        previous = np.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=NO_ANSWER)
        hop[is_symbol] = np.where(previous[is_symbol] >= 0, previous[is_symbol] + 1, NO_ANSWER)
    return hop


def _take(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    # The values at positions of the same row; any value where a position is negative.
    return np.take_along_axis(values, np.maximum(positions, 0), axis=1)


class PointerChains(DepthTask):
    """`chain_8`: follow a pointer 8 times, among several chains that are interleaved.

    A sequence lists every pointer as a pair of symbols, in random order, and ends with one symbol,
    the question. The chains are closed: each symbol is the first of one pair and the second of
    another, so neither counts nor ends reveal the answer. A chain is twice as long as the depth, so
    going backwards is no shorter.

    Raises:
        UserError: If the sequence would be too long.
    """

    kind = "chain"

    def __init__(self, depth: int, *, num_chains: int, in_words: bool = False) -> None:
        super().__init__(depth)
        self.num_chains = num_chains
        self.num_symbols = 2 * num_chains * depth  # Each sequence has all of them.
        self.num_random = 2 * self.num_symbols
        self.length = 2 * self.num_symbols + 1
        if self.length > MAX_SEQUENCE_LENGTH:
            raise UserError(
                f"{self.name} with data.depth.num_chains={num_chains} has sequences of "
                f"{self.length:,} symbols, more than {MAX_SEQUENCE_LENGTH:,}"
            )
        self.symbols = symbol_texts(self.num_symbols, in_words=in_words)
        self.chance = 1 / (self.num_symbols - 1)  # Any symbol but that of the question.

    def generate(self, bits: np.ndarray) -> Sequences:
        num_sequences = len(bits)
        # A random permutation of the symbols: one chain after the other, in order of the pointers.
        chained = np.argsort(bits[:, : self.num_symbols], axis=1, kind="stable")
        chains = chained.reshape(num_sequences, self.num_chains, 2 * self.depth)
        # Each symbol with its successor; that of a chain's last symbol is its first.
        pairs = np.stack([chains, np.roll(chains, -1, axis=2)], axis=-1)
        pairs = pairs.reshape(num_sequences, self.num_symbols, 2)
        order = np.argsort(bits[:, self.num_symbols :], axis=1, kind="stable")
        shuffled_pairs = np.take_along_axis(pairs, order[:, :, None], axis=1)
        shuffled_symbols = shuffled_pairs.reshape(num_sequences, 2 * self.num_symbols)
        # The question is the first symbol of the first chain.
        symbols = np.concatenate([shuffled_symbols, chained[:, :1]], axis=1)
        answers = np.full_like(symbols, NO_ANSWER)
        answers[:, -1] = chained[:, self.depth]
        return Sequences(symbols, answers)


class IteratedLookup(DepthTask):
    """`lookup_4`: look a symbol up in a table, then what stands there, and so on, 1 to 4 times.

    A sequence lists the table as pairs of symbols, in random order, and ends with the question: the
    number of lookups, drawn for each sequence, and the symbol to begin with. The table leads
    through all symbols and back to the first, so neither counts nor ends reveal the answer; it is
    at least twice as long as the depth, so going backwards is no shorter.
    Source: iterated lookup as in arXiv 2608.11233; the form is this project's.

    Raises:
        UserError: If the table is too short for the depth, or there is no word for the depth.
    """

    kind = "lookup"

    def __init__(self, depth: int, *, num_symbols: int, in_words: bool = False) -> None:
        super().__init__(depth)
        if num_symbols < 2 * depth:
            raise UserError(
                f"data.depth.num_symbols={num_symbols}: {self.name} needs a table of at least "
                f"{2 * depth} entries, twice its steps; raise it, or take a smaller depth"
            )
        self.num_symbols = num_symbols
        self.length = 2 * num_symbols + 2
        self.num_random = 2 * num_symbols + 1
        if self.length > MAX_SEQUENCE_LENGTH:
            raise UserError(
                f"{self.name} with data.depth.num_symbols={num_symbols} has sequences of "
                f"{self.length:,} symbols, more than {MAX_SEQUENCE_LENGTH:,}"
            )
        self._table_symbols = symbol_texts(num_symbols, in_words=in_words)
        self.symbols = (*self._table_symbols, *_number_texts(depth, in_words=in_words))
        self.chance = 1 / (num_symbols - 1)  # Any symbol but that of the question.

    @property
    def choices(self) -> tuple[str, ...]:
        return self._table_symbols

    def generate(self, bits: np.ndarray) -> Sequences:
        num = self.num_symbols
        # A random permutation of the symbols: the way through the table.
        way = np.argsort(bits[:, :num], axis=1, kind="stable")
        pairs = np.stack([way, np.roll(way, -1, axis=1)], axis=-1)
        order = np.argsort(bits[:, num : 2 * num], axis=1, kind="stable")
        table = np.take_along_axis(pairs, order[:, :, None], axis=1).reshape(len(bits), 2 * num)
        num_lookups = 1 + uniform_below(bits[:, 2 * num :], self.depth)
        # The symbols of the numbers stand after those of the table.
        number = num + num_lookups - 1
        symbols = np.concatenate([table, number, way[:, :1]], axis=1)
        answers = np.full_like(symbols, NO_ANSWER)
        answers[:, -1:] = np.take_along_axis(way, num_lookups, axis=1)
        return Sequences(symbols, answers)


class PermutationWords(DepthTask):
    """`s5_16`: words of 16 permutations of five things; each position asks for the product so far.

    A test asks for the product of all. The group S5 is not solvable, so constant depth is not
    enough for long words (Barrington's theorem).
    Source: Liu et al., 2022 (arXiv 2210.10749); Merrill et al., 2024 (arXiv 2404.08819).

    Raises:
        UserError: If the word would be too long.
    """

    kind = "s5"
    # Permutations in one-line notation: `<|21345|>` exchanges the first two things.
    symbols = tuple(f"<|{''.join(str(i + 1) for i in element)}|>" for element in ELEMENTS)
    chance = 1 / len(ELEMENTS)  # A product with a uniform factor is uniform.

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        if depth > MAX_SEQUENCE_LENGTH:
            raise UserError(f"{self.name} is a word of more than {MAX_SEQUENCE_LENGTH:,} symbols")
        self.length = depth
        self.num_random = depth

    def generate(self, bits: np.ndarray) -> Sequences:
        symbols = uniform_below(bits, len(ELEMENTS))
        answers = symbols.copy()
        for place in range(1, self.length):
            answers[:, place] = products()[answers[:, place - 1], symbols[:, place]]
        return Sequences(symbols, answers)

    def may_be_asked(self, answers: np.ndarray) -> np.ndarray:
        """Return a mask of the last positions, which ask for the product of all."""
        is_last = np.zeros(answers.shape, dtype=bool)
        is_last[:, -1] = True
        return is_last


@cache
def products() -> np.ndarray:
    """Return the multiplication table, (120, 120): the first permutation, then the second."""
    number_of = {element: number for number, element in enumerate(ELEMENTS)}
    return np.array(
        [
            [number_of[tuple(second[thing] for thing in first)] for second in ELEMENTS]
            for first in ELEMENTS
        ]
    )


class DepthTasks(NamedTuple):
    """The depth tasks of some data."""

    tasks: tuple[DepthTask, ...]
    has_markers: bool
    """Whether each sequence begins with the token of its task."""
    in_words: bool = False
    """Whether the symbols are words of a text's tokenizer, without markers and new tokens."""

    @classmethod
    def of(cls, settings: DataSettings) -> DepthTasks:
        """Return the tasks of data that hold nothing else, or of a mixture.

        Raises:
            UserError: If there must be tasks and none is named, or a sequence cannot hold its task.
        """
        is_mixed = settings.source == "mixture"
        depth = settings.tasks if is_mixed else settings.depth
        if not (is_mixed or depth.tasks):
            raise UserError(
                "data.source is `depth`, but data.depth.tasks is empty; name depth tasks, such as "
                "--set 'data.depth.tasks=[phop_6]'"
            )
        in_words = depth.in_words
        if in_words and len(depth.tasks) > 1:
            raise UserError(
                f"data.depth.symbols=words: there are {len(depth.tasks)} depth tasks, and "
                "sequences of words do not show their task; leave one task, or take letters"
            )
        tasks: list[DepthTask] = []
        for kind, steps in map(parse_task_name, depth.tasks):
            if kind == "phop":
                tasks.append(
                    PHopInduction(
                        steps,
                        num_symbols=depth.num_symbols,
                        length=depth.length,
                        in_words=in_words,
                    )
                )
            elif kind == "chain":
                tasks.append(PointerChains(steps, num_chains=depth.num_chains, in_words=in_words))
            elif kind == "lookup":
                tasks.append(
                    IteratedLookup(steps, num_symbols=depth.num_symbols, in_words=in_words)
                )
            elif in_words:
                raise UserError(
                    f"data.depth.symbols=words: {kind}_{steps} has permutations for symbols, and "
                    "there are no words for them; leave it out, or take another task"
                )
            else:
                tasks.append(PermutationWords(steps))
        has_markers = not in_words and (is_mixed or len(tasks) > 1)
        return cls(tuple(tasks), has_markers=has_markers, in_words=in_words)

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence; 0 if there are no tasks."""
        return max((task.length + self.has_markers for task in self.tasks), default=0)

    def check_length(self, context_length: int) -> None:
        """Raise a `UserError` if the longest sequence does not fit into the context."""
        if self.sequence_length > context_length:
            raise UserError(
                f"the depth tasks have sequences of {self.sequence_length} tokens, and "
                f"{context_length} are read at once; raise model.context_length, and "
                f"training.sequence_length if it is set, to {self.sequence_length}, or make the "
                "tasks shorter"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The texts of all tokens: symbols, then the tasks' markers."""
        symbols = {symbol: None for task in self.tasks for symbol in task.symbols}
        # Shared symbols first and in their order, so that a longer alphabet extends a shorter one.
        shared = [symbol for symbol in numbered_symbols(len(symbols)) if symbol in symbols]
        ordered = dict.fromkeys([*shared, *symbols])
        return (*ordered, *(task.marker for task in self.tasks if self.has_markers))

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The texts that a text's tokenizer gets as new tokens."""
        return () if self.in_words else self.vocabulary


def symbol_texts(num: int, *, in_words: bool) -> tuple[str, ...]:
    """Return the texts of some symbols.

    Raises:
        UserError: If the symbols are words, and there are too few words.
    """
    if not in_words:
        return numbered_symbols(num)
    if num > len(WORDS):
        raise UserError(
            f"data.depth.symbols=words: the task has {num} symbols, and there are {len(WORDS)} "
            "words; take fewer symbols, or letters"
        )
    return tuple(f" {word}" for word in WORDS[:num])


def _number_texts(most: int, *, in_words: bool) -> tuple[str, ...]:
    """Return the texts of the numbers from 1 to `most`; errors are those of `symbol_texts`."""
    if not in_words:
        return tuple(f"<|{number} steps|>" for number in range(1, most + 1))
    if most > len(NUMBER_WORDS):
        raise UserError(
            f"data.depth.symbols=words: the task has up to {most} steps, and there are "
            f"{len(NUMBER_WORDS)} words for numbers; take fewer steps, or letters"
        )
    return tuple(f" {word}" for word in NUMBER_WORDS[:most])


def numbered_symbols(num: int) -> tuple[str, ...]:
    """Return the texts of the symbols that several kinds of tasks share."""
    return tuple(f"<|{number}|>" for number in range(num))
