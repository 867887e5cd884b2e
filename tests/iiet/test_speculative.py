"""Speculative decoding generates what plain decoding does, whatever drafts, in any batch."""

import math

import pytest
import torch

from iiet import METHODS, Decoder, generation, preset, speculative
from iiet.draft_plan import DraftCosts
from iiet.drafts import PromptLookup
from iiet.speculative import DraftRecord
from tests.method_schedules import schedule_for

VOCAB = 37
SIZES = {"dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24, "vocab_size": VOCAB}


def decoder_of(schedule="2,0,1", method="iiet", **overrides):
    torch.manual_seed(0)
    config = preset(
        "tiny",
        method=method,
        **{"initializer_std": 0.3, **SIZES, "schedule": schedule, **overrides},
    )
    return Decoder(config).double()


def prompts(batch=3, time=6):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def padding(batch=3, time=6):
    mask = torch.ones(batch, time, dtype=torch.bool)
    for row in range(1, batch):
        mask[row, : 2 * row] = False
    return mask


def drafts(draft, draft_tokens="auto", **others):
    return {"draft": draft, "draft_tokens": draft_tokens, **others}


def both(decoder, drafting=None, *, batch=3, max_new_tokens=40, **options):
    """Return what plain and speculative decoding generate, and the record."""
    options = {"max_new_tokens": max_new_tokens, "attention_mask": padding(batch), **options}
    expected = generation.generate(decoder, prompts(batch), **options)
    found = speculative.generate(decoder, prompts(batch), **(drafting or {}), **options)
    return expected, *found


@pytest.mark.parametrize("draft", ["0", "2,0,0", "0,0,1", "2,0,1", "2,1,1", "3,0,0"])
def test_the_tokens_are_those_of_plain_decoding(draft):
    """Drafts within the schedule, equal to it, and with more corrections."""
    expected, found, record = both(decoder_of(), drafts(draft, 3))
    assert torch.equal(expected, found)
    assert 0 < record.acceptance <= 1
    assert (record.acceptance == 1) == (draft == "2,0,1")


SAMPLING = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 8, "seed": [5, 6, 7]},
    {"temperature": 1.2, "top_p": 0.8, "seed": 4},
]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("draft", ["0", "3,0,0"])
def test_sampled_tokens_are_those_of_plain_decoding(sampling, draft):
    expected, found, record = both(decoder_of(), drafts(draft, 4), **sampling)
    assert torch.equal(expected, found)
    assert 0 < record.acceptance < 1


@pytest.mark.parametrize("method", METHODS)
def test_of_every_method(method):
    schedule = schedule_for(method, (2, 0, 1))
    decoder = decoder_of(schedule, method)
    expected, found, record = both(decoder, max_new_tokens=24)
    assert torch.equal(expected, found)
    assert bool(record.drafted) == METHODS[method].has_corrections
    if schedule is None:
        with pytest.raises(ValueError, match=f"draft='0': the method '{method}' makes no correct"):
            both(decoder, drafts("0"))
    else:
        expected, found, record = both(decoder, drafts("0", 2), max_new_tokens=24)
        assert torch.equal(expected, found)


def lengths_seen(monkeypatch):
    """Collect the lengths of all rows, in each pass of a model."""
    seen = []
    call = speculative.CachedModel.__call__

    def noted(self, firsts, num, **options):
        seen.append(tuple(firsts))
        return call(self, firsts, num, **options)

    monkeypatch.setattr(speculative.CachedModel, "__call__", noted)
    return seen


@pytest.mark.parametrize("other", ["schedule", "decoder", "lookup"])
def test_rows_keep_different_numbers_of_tokens(other, monkeypatch):
    draft = {
        "schedule": "0",
        "decoder": decoder_of("1,0,0"),
        "lookup": PromptLookup(),
    }[other]
    seen = lengths_seen(monkeypatch)
    expected, found, record = both(decoder_of(), drafts(draft, 3), max_new_tokens=60)
    assert torch.equal(expected, found)
    assert sum(len(set(firsts)) == 3 for firsts in seen) > 10
    assert record.plain_steps < 5 or other == "lookup"


def test_stop_tokens_end_rows_as_in_plain_decoding():
    decoder = decoder_of()
    free = generation.generate(decoder, prompts(), max_new_tokens=40, attention_mask=padding())
    for stops in ([int(free[0, 9])], [int(free[0, 9]), int(free[1, 30])], free[:, 12].tolist()):
        for draft in ("0", "3,0,0"):
            expected, found, _ = both(decoder, drafts(draft, 4), stop_tokens=stops)
            assert torch.equal(expected, found)


def test_an_own_cache_follows_plain_steps():
    """A draft that lags behind reads what it lacks, in one pass."""
    decoder, other = decoder_of(), decoder_of(None, "vanilla", num_layers=1)
    costs = DraftCosts(draft=0.4, further_token=0.3)
    expected, found, record = both(decoder, drafts(other, costs=costs), max_new_tokens=100)
    assert len(record.rounds_by_draft) == 1
    assert torch.equal(expected, found)
    assert record.plain_steps > 60
    assert record.drafted > 0


def test_drafts_share_the_cache_only_within_the_schedule(monkeypatch):
    sizes = []
    new_cache = speculative._new_cache

    def noted(decoder, rows):
        cache = new_cache(decoder, rows)
        sizes.append(cache.num_bytes)
        return cache

    monkeypatch.setattr(speculative, "_new_cache", noted)
    for draft, num in (("0", 1), ("1,0,1", 1), ("0,1,0", 2), ("auto", 1)):
        sizes.clear()
        both(decoder_of(), drafts(draft), max_new_tokens=12)
        assert len(sizes) == num


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_each_token_is_the_likeliest_but_for_rounding(precision):
    """Rows of different lengths, query heads that share a key head."""
    decoder = decoder_of(num_kv_heads=1)
    decoder.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    mask = padding()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        tokens, record = speculative.generate(
            decoder, prompts(), attention_mask=mask, max_new_tokens=30, **drafts("0", 3)
        )
    assert 0 < record.acceptance < 1
    mask = torch.cat([mask, mask.new_ones(3, 30)], 1)
    with torch.no_grad():
        logits = decoder.float()(tokens, attention_mask=mask)[:, 5:-1]
    regret = logits.amax(-1) - logits.gather(-1, tokens[:, 6:, None])[..., 0]
    assert regret.max() < (1e-4 if precision == "float32" else 0.1) * logits.std()


def test_the_stream_is_plain_tensors_and_the_same_twice():
    decoder, record = decoder_of(), DraftRecord()
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2, "draft": "0"}
    steps = list(speculative.stream(decoder, prompts(), record=record, **options))
    assert [step.shape for step in steps] == [(3,)] * 20
    tokens, again = speculative.generate(decoder, prompts(), **options)
    assert torch.equal(torch.stack(steps, 1), tokens[:, 6:])
    assert record == again
    decoder(tokens).sum().backward()


@pytest.mark.slow
def test_ten_thousand_tokens_are_those_of_plain_decoding(monkeypatch):
    """Greedy, by several drafts, in padded batches whose rows keep different numbers."""
    decoder, num_tokens = decoder_of("2,1,2", context_length=256), 0
    expected = generation.generate(
        decoder, prompts(8, 16), attention_mask=padding(8, 16), max_new_tokens=210
    )
    records, seen = [], lengths_seen(monkeypatch)
    for draft, draft_tokens in (
        ("0", 4),
        ("2,1,0", 3),
        ("0,0,2", 5),
        ("auto", 2),
        ("3,0,0", 4),
        (decoder_of("1,0,0", context_length=256), 3),
    ):
        tokens, record = speculative.generate(
            decoder,
            prompts(8, 16),
            attention_mask=padding(8, 16),
            max_new_tokens=210,
            draft=draft,
            draft_tokens=draft_tokens,
        )
        assert torch.equal(tokens, expected)
        num_tokens += tokens[:, 16:].numel()
        records.append(record)
        assert sum(len(set(firsts)) > 2 for firsts in seen) > 100
        seen.clear()
    assert num_tokens >= 10_000
    assert all(0.05 < record.acceptance < 1 for record in records)


def chi_square(chosen, exact):
    """Return how many standard deviations the chi-square statistic is above its mean."""
    expected = exact * len(chosen)
    counts = torch.bincount(chosen, minlength=len(exact)).double()
    possible = exact > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    degrees = int(possible.sum()) - 1
    return float((statistic - degrees) / math.sqrt(2 * degrees))


def exact_probabilities(logits, temperature, top_k=None, top_p=None):
    """By sorting, apart from the sampler's code."""
    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[: top_k or len(order)]
    total, mass = sum(float(probabilities[token]) for token in kept), 0.0
    nucleus = []
    for token in kept:
        if mass / total >= (top_p or 1.0):
            break
        nucleus.append(token)
        mass += float(probabilities[token])
    result = torch.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus] / mass
    return result


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}]
)
@torch.no_grad()
def test_the_distribution_is_the_models(sampling):
    """Chi-square of the third token, which is drafted, given the first two."""
    decoder, count = decoder_of(vocab_size=9, initializer_std=0.15), 3000
    prompt = torch.tensor([[1, 2, 3]])
    sampling = {"temperature": 1.0, **sampling}
    tokens, record = speculative.generate(
        decoder,
        prompt.expand(count, -1),
        max_new_tokens=4,
        draft="0",
        draft_tokens=2,
        seed=list(range(count)),
        **sampling,
    )
    assert 0 < record.acceptance < 1
    pairs, counts = tokens[:, 3:5].unique(dim=0, return_counts=True)
    for pair in pairs[counts.topk(min(3, len(pairs))).indices]:
        logits = decoder(torch.cat([prompt[0], pair])[None])[0, -1]
        chosen = tokens[(tokens[:, 3:5] == pair).all(1), 5]
        assert chi_square(chosen, exact_probabilities(logits, **sampling)) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_strategy": "last"}, "kv_strategy='exact', got 'last'"),
        ({"draft": "1,0"}, "schedule 1,0 is for 2 layers, the model has 3"),
        ({"draft": decoder_of(vocab_size=36)}, "vocabulary of 37 tokens"),
        ({"draft": decoder_of(context_length=8)}, "at least the 16 asked for, .* with 37 and 8"),
        ({"draft_tokens": -1}, "draft_tokens must be 'auto' or at least 0, got -1"),
        ({"costs": DraftCosts(0.5, 0.1)}, "one for each of 2 drafts, got 1"),
        ({"temperature": -1.0, "top_k": 0}, "temperature must be .*top_k must be"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        speculative.stream(decoder_of(), prompts(), max_new_tokens=10, **options)
