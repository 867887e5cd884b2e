"""Cached decoding and generation equal the full forward and refuse what does not fit."""

import itertools
import math

import pytest
import torch
from live_tensors import LargestTensor
from model_cases import left_padding, make_model, tokens
from refusals import refused

from iiet import IterationSchedule, KeyValueCache
from iiet.decoding.sampling import LogitsNotFinite
from iiet.model.context import make_context
from iiet.model.layers import attend

PROMPT = tokens(2, 5)
SHORT = tokens(2, 9)
MASK = left_padding(0, 3, time=9)
"""The second row of `SHORT` begins with padding."""


def decoder_of(schedule=(2, 0, 1), method="iiet"):
    return make_model(method, schedule)


def cache_of(decoder, **settings):
    settings = {"batch_size": 2, "max_tokens": 12, "dtype": torch.float64, **settings}
    return KeyValueCache(decoder.config, **settings)


def test_a_cache_copies_nothing():
    cache = cache_of(decoder_of())
    ones = torch.ones(2, 2, 1, 4, dtype=torch.float64)
    keys, values = cache.update(ones, 2 * ones, 5)
    longer_keys, _ = cache.update(ones, 2 * ones, 5)
    assert longer_keys.shape == (2, 2, 2, 4)
    assert longer_keys.data_ptr() == keys.data_ptr()
    assert values.data_ptr() != keys.data_ptr()


@torch.no_grad()
def test_the_last_strategy_is_exact_without_corrections_and_not_with_them():
    """With one slot per layer, the first step attends to other keys than the full forward does."""
    ids = tokens(2, 12)

    def distance(decoder):
        cache = cache_of(decoder, strategy="last")
        full = decoder(ids)
        prefill = decoder(ids[:, :8], cache=cache)
        torch.testing.assert_close(prefill, full[:, :8], rtol=0, atol=1e-11)
        steps = [decoder(ids[:, time : time + 1], cache=cache) for time in range(8, 12)]
        return float((torch.cat(steps, 1) - full[:, 8:]).abs().max() / full.std())

    assert distance(decoder_of(method="vanilla")) < 1e-11
    assert distance(decoder_of((0, 0, 0))) < 1e-11
    assert distance(decoder_of()) > 0.01


@torch.no_grad()
def test_a_cache_of_another_dtype_than_the_keys_is_refused():
    decoder = decoder_of().bfloat16()
    cache = KeyValueCache(decoder.config, batch_size=2, max_tokens=9)
    with refused(ValueError, "torch.float32", "dtype=torch.bfloat16"):
        decoder(PROMPT, cache=cache)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 4}])
@pytest.mark.parametrize("draft", [None, "auto"])
def test_logits_that_are_not_finite_choose_no_token(draft, settings):
    """The logits of the prompt's pass are checked, and those of later passes."""
    for bad_pass in (0, 3):
        decoder = decoder_of()
        passes = itertools.count()

        def spoil(module, inputs, output, passes=passes, bad_pass=bad_pass):
            return output * math.nan if next(passes) == bad_pass else output

        decoder.model.norm.register_forward_hook(spoil)
        streamed = []
        with refused(LogitsNotFinite, "finite"):
            for step in decoder.stream(PROMPT, max_new_tokens=20, draft=draft, **settings):
                streamed.append(step)
        if draft is None:
            assert len(streamed) == bad_pass, "no reader sees a token of such logits"


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["exact", "last"])
@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize("other", [(3, 3, 3), (1, 1, 1), (0, 0, 0)])
def test_a_cache_refuses_another_schedule(strategy, is_filled, other):
    """A cache refuses another schedule with as many evaluations, and before its first token."""
    decoder = decoder_of()
    other = IterationSchedule(other)
    cache = cache_of(decoder, strategy=strategy)
    if is_filled:
        decoder(PROMPT, cache=cache)
    for ids in (PROMPT, PROMPT[:, :1]):
        with refused(ValueError, "3,1,2"):
            decoder(ids, schedule=other, cache=cache)
        with refused(ValueError, "iteration schedule"):
            decoder.with_schedule(other)(ids, cache=cache)
    decoder(PROMPT[:, :1], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("schedule", [(0, 0, 0), (1, 0, 1), (2, 0, 1)])
def test_a_view_serves_fewer_corrections_in_the_same_memory(schedule):
    """A view holds the tokens of its cache, padding among them, and gets its own length."""
    decoder = decoder_of()
    fewer = decoder.with_schedule(IterationSchedule(schedule))
    cache = cache_of(decoder)
    decoder(SHORT[:, :6], cache=cache, attention_mask=MASK[:, :6])
    with LargestTensor() as largest:
        view = cache.view(fewer.config)
    assert largest.num_values == 0
    assert view.get_seq_length() == 6
    drafted = fewer(SHORT[:, 6:], cache=view)
    assert (cache.get_seq_length(), view.get_seq_length()) == (6, 9)
    expected = decoder(SHORT, attention_mask=MASK)[:, 6:]
    assert torch.allclose(drafted, expected) == (schedule == (2, 0, 1))
    # The full schedule writes over what the view wrote.
    torch.testing.assert_close(decoder(SHORT[:, 6:], cache=cache), expected, rtol=0, atol=1e-11)


def test_greedy_equals_the_full_forward_token_by_token():
    decoder = decoder_of()
    ids = decoder.generate(PROMPT, max_new_tokens=9)
    assert ids.shape == (2, 14)
    assert torch.equal(ids[:, :5], PROMPT)
    for time in range(5, 14):
        assert torch.equal(decoder(ids[:, :time])[:, -1].argmax(-1), ids[:, time])


@torch.no_grad()
def test_a_mask_that_contradicts_the_cache_is_refused():
    decoder = decoder_of()
    whole = torch.ones_like(MASK)
    for first_mask, second_mask in ((MASK, whole), (whole, MASK)):
        cache = cache_of(decoder)
        decoder(SHORT[:, :6], cache=cache, attention_mask=first_mask[:, :6])
        with refused(ValueError, "attention_mask"):
            decoder(SHORT[:, 6:], cache=cache, attention_mask=second_mask)


@torch.no_grad()
def test_tokens_at_the_end_of_a_cached_row_may_be_hidden_later():
    """A padded batch of contexts can so be continued, each row after its own end."""
    decoder = decoder_of()
    ids = tokens(2, 8)
    mask = torch.ones(2, 8).bool()
    mask[1, 3:6] = False
    cache = cache_of(decoder)
    decoder(ids[:, :6], cache=cache)
    continued = decoder(ids[:, 6:], cache=cache, attention_mask=mask)
    unpadded = decoder(ids[1:, mask[1]])[:, -2:]
    torch.testing.assert_close(continued[1:], unpadded, rtol=0, atol=1e-11)


def test_the_seed_determines_the_samples_and_each_row_may_have_its_own():
    decoder = decoder_of()
    settings = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 20}
    expected = decoder.generate(PROMPT, seed=1, **settings)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for same_seed in (1, [1]):
        assert torch.equal(decoder.generate(PROMPT, seed=same_seed, **settings), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(decoder.generate(PROMPT, seed=2, **settings), expected)
    together = decoder.generate(PROMPT, seed=[7, 8], **settings)
    for row, seed in enumerate((7, 8)):
        single_row = decoder.generate(PROMPT[row : row + 1], seed=seed, **settings)
        assert torch.equal(together[row], single_row[0])


@pytest.mark.parametrize("draft", [None, "0"])
def test_without_a_seed_the_generator_of_pytorch_decides(draft):
    decoder = decoder_of()
    options = {"max_new_tokens": 6, "temperature": 1.5, "draft": draft}
    torch.manual_seed(5)
    first = decoder.generate(PROMPT, **options)
    second = decoder.generate(PROMPT, **options)
    torch.manual_seed(5)
    assert torch.equal(decoder.generate(PROMPT, **options), first)
    assert torch.equal(decoder.generate(PROMPT, **options), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    decoder.generate(PROMPT, max_new_tokens=6, draft=draft)
    assert torch.equal(torch.get_rng_state(), state), "the likeliest token needs no noise"


def test_end_tokens_end_rows_and_then_the_batch():
    decoder = decoder_of()
    endless = decoder.generate(PROMPT, max_new_tokens=10)
    stop_tokens = [int(endless[0, 6]), int(endless[1, 8])]
    ends = [
        next(time for time in range(5, 15) if int(endless[row, time]) in stop_tokens)
        for row in range(2)
    ]
    ended = decoder.generate(PROMPT, max_new_tokens=10, eos_token_id=stop_tokens)
    assert ended.size(1) == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(ended[row, : end + 1], endless[row, : end + 1])
        assert (ended[row, end:] == endless[row, end]).all()


def test_the_mask_of_a_gpu_that_continues_a_cache_is_the_causal_one():
    from torch.nn.attention.bias import CausalBias

    decoder = decoder_of()
    cache = cache_of(decoder)
    decoder(PROMPT[:, :4], cache=cache)
    masks = {
        device: make_context(torch.empty(2, 3, 16, device=device), decoder.rope, cache=cache).mask
        for device in ("meta", "cpu")
    }
    assert isinstance(masks["meta"], CausalBias)
    queries = torch.randn(2, 4, 3, 8)
    keys = torch.randn(2, 2, 7, 8)
    mixed = [attend(queries, keys, keys, mask=mask, is_causal=False) for mask in masks.values()]
    torch.testing.assert_close(*mixed)
