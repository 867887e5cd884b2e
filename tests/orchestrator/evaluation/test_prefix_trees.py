"""Rows share each beginning once, hold every segment, and stop where sharing costs more."""

from __future__ import annotations

import random

import pytest

from orchestrator.evaluation.prefix_trees import PrefixTree, Segment, prefix_trees


def tree_of(*segments: Segment) -> PrefixTree:
    (tree,) = prefix_trees(segments, max_tokens=10_000, keys_per_token=10_000)
    return tree


def test_a_tree_in_depth_first_order() -> None:
    #   1 2 3 4 5      two choices of the context (1, 2, 3) that begin with 4
    #         \ 6 7
    #       \ 8        and a third that does not
    segments = [Segment((1, 2, 3), rest) for rest in ((4, 5, 9), (4, 6, 7, 9), (8, 9))]
    tree = tree_of(*segments)
    assert tree.tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    assert tree.depths == [0, 1, 2, 3, 4, 4, 5, 3]
    assert tree.ends() == [8, 8, 8, 7, 5, 7, 7, 8]
    assert tree.predicting == [[2, 3, 4], [2, 3, 5, 6], [2, 7]]
    assert tree.is_branched


def test_sequences_that_continue_each_other_have_no_branches() -> None:
    # One text, split in two ways, and its beginning.
    tree = tree_of(Segment((1, 2), (3, 4)), Segment((1,), (2, 3, 4)), Segment((1, 2), (3, 4, 5)))
    assert tree.tokens == [1, 2, 3, 4]
    assert not tree.is_branched
    assert tree.ends() == [4] * 4


@pytest.mark.parametrize("keys_per_token", [0, 4, 64])
@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
def test_every_segment_is_in_one_row_under_its_own_tokens(
    keys_per_token: int, max_tokens: int
) -> None:
    draw = random.Random(0)
    segments = {
        Segment(tuple(draw.choices((1, 2), k=draw.randint(1, 9))), tuple(draw.choices((1, 2), k=k)))
        for k in draw.choices(range(1, 9), k=200)
    }
    trees = prefix_trees(segments, max_tokens=max_tokens, keys_per_token=keys_per_token)
    assert sorted(s for tree in trees for s in tree.segments) == sorted(segments)
    keys = [(tree.is_branched, -len(tree.tokens)) for tree in trees]
    assert keys == sorted(keys)
    longest = max(len(segment.inputs) for segment in segments)
    for tree in trees:
        assert len(tree.tokens) <= max(max_tokens, longest)
        ends = tree.ends()
        for segment, columns in zip(tree.segments, tree.predicting, strict=True):
            seen = [c for c in range(columns[-1] + 1) if ends[c] > columns[-1]]
            assert tuple(tree.tokens[column] for column in seen) == segment.inputs
            assert [tree.depths[column] for column in seen] == list(range(len(seen)))
            assert seen[len(segment.context) - 1 :] == columns


def test_a_short_beginning_is_not_worth_a_long_row() -> None:
    contexts = [(1, *[n] * 50) for n in range(2, 30)]
    choices = [Segment(context, (n, 1)) for context in contexts for n in (40, 50)]
    trees = prefix_trees(choices, max_tokens=10_000, keys_per_token=256)
    assert [len(tree.segments) for tree in trees] == [2] * len(contexts)
