"""Steps of fixed shapes decode what the ordinary steps decode, from values on the device alone."""

import gc
import weakref

import pytest
import torch
from live_tensors import SeenOperations
from model_cases import VOCAB, left_padding, make_model, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from iiet.decoding import static_steps
from iiet.decoding.generation import until_all_end
from iiet.decoding.static_steps import StaticSteps, keep_steps, kept_steps
from iiet.model import fast

PROMPTS = tokens(3, 6)
PADDING = left_padding(0, 2, 2, time=6)


def decoder_of(method="iiet", schedule=(2, 0, 1), dtype=torch.float64, **changes):
    return make_model(method, schedule, dtype=dtype, context_length=128, **changes)


@pytest.fixture
def small_windows(monkeypatch):
    """Several windows in a short generation."""
    monkeypatch.setattr(static_steps, "WINDOW", 16)


@pytest.fixture
def early_graphs(monkeypatch):
    """Five steps are enough for a graph."""
    monkeypatch.setattr(static_steps, "MIN_TOKENS", 4)


@pytest.fixture
def gpu_forms(monkeypatch):
    """Tokens are computed by the plain formulas, as on a GPU."""
    monkeypatch.setattr(fast, "ENABLED", False)


def ordinary_and_fixed(decoder, *, steps=None, batch=2, **options):
    """Return what ordinary steps and steps of fixed shapes generate."""
    options = {"max_new_tokens": 16, **options}
    steps = steps or StaticSteps(decoder)
    return (
        decoder.generate(PROMPTS[:batch], **options),
        decoder.generate(PROMPTS[:batch], steps=steps, **options),
    )


@pytest.mark.parametrize(
    ("method", "schedule", "strategy", "padded"),
    [
        ("vanilla", (0, 0, 0), "exact", True),
        ("iiet", (0, 0, 0), "exact", False),
        ("iiet", (2, 0, 1), "exact", True),
        ("iiet", (3, 3, 3), "last", True),
        ("pcformer", (2, 2, 2), "exact", False),
        ("looped", (2, 2, 2), "exact", True),
    ],
)
def test_the_tokens_are_the_same(method, schedule, strategy, padded, small_windows, gpu_forms):
    decoder = decoder_of(method, schedule)
    masks = {"attention_mask": PADDING[:2]} if padded else {}
    expected, generated = ordinary_and_fixed(decoder, kv_strategy=strategy, **masks)
    assert torch.equal(expected, generated)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_in_bfloat16_each_token_is_the_likeliest_but_for_rounding(batch, small_windows, gpu_forms):
    decoder = decoder_of(dtype=torch.bfloat16)
    _, generated = ordinary_and_fixed(decoder, batch=batch)
    logits = decoder.float()(generated)[:, 5:-1]
    chosen = logits.gather(-1, generated[:, 6:, None])
    assert (logits.amax(-1, keepdim=True) - chosen).max() < 0.05 * logits.std()


@pytest.mark.parametrize("options", [{}, {"seed": [4, 5], "top_k": 9}, {"top_p": 0.8}])
def test_sampling_and_end_tokens_are_the_same(options, small_windows):
    decoder = decoder_of()
    options = {"temperature": 1.0, "seed": 7, **options}
    endless, _ = ordinary_and_fixed(decoder, **options)
    for stops in (
        [int(endless[0, 6]), int(endless[1, 9])],
        range(8),
        range(VOCAB),
    ):
        expected, generated = ordinary_and_fixed(decoder, eos_token_id=stops, **options)
        assert torch.equal(expected, generated)


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("num_until_end", [1, 2, 6, 7, 20])
def test_steps_after_the_end_are_dropped_and_few_where_the_end_is_looked_for_rarely(
    interval, num_until_end
):
    computed = []

    def steps():
        for number in range(1, 13):
            computed.append(number)
            yield torch.tensor([number]), torch.tensor([number >= num_until_end, number == 99])

    tokens = torch.cat(list(until_all_end(steps(), interval))).tolist()
    assert tokens == list(range(1, min(num_until_end, 12) + 1))
    assert len(computed) < len(tokens) + interval


class Recorder:
    """A capture that runs each step anew, and first twice, as a CUDA graph's capture does."""

    def __init__(self, error=None):
        self.num_captured = self.num_replayed = 0
        self.error = error

    def __call__(self, step, device):
        self.num_captured += 1
        first_result = step().clone()
        if self.error:
            raise self.error
        assert torch.equal(step(), first_result)

        def replay():
            self.num_replayed += 1
            return step()

        return replay


def test_each_window_has_one_graph_which_later_generations_reuse(early_graphs, small_windows):
    decoder = decoder_of()
    capture = Recorder()
    steps = StaticSteps(decoder, capture=capture)
    for masks in ({}, {"attention_mask": PADDING[:2]}, {}):
        expected, generated = ordinary_and_fixed(decoder, steps=steps, **masks)
        assert torch.equal(expected, generated)
    # Up to 16 and 32 tokens are read; the prompt's pass chooses the first new token.
    assert (capture.num_captured, capture.num_replayed) == (2, 3 * 15)
    ordinary_and_fixed(decoder, steps=steps, max_new_tokens=6)
    assert capture.num_captured == 2
    expected, generated = ordinary_and_fixed(decoder, steps=steps, batch=3)
    assert torch.equal(expected, generated)
    assert capture.num_captured == 4
    with torch.no_grad():
        decoder.model.embed_tokens.weight.mul_(2.0)  # In place: a graph reads the new values.
        expected, generated = ordinary_and_fixed(decoder, steps=steps, batch=3)
        decoder.model.embed_tokens.weight = torch.nn.Parameter(
            decoder.model.embed_tokens.weight.flip(0)
        )
    assert torch.equal(expected, generated)
    assert capture.num_captured == 4
    expected, generated = ordinary_and_fixed(decoder, steps=steps, batch=3)
    assert torch.equal(expected, generated)
    assert capture.num_captured == 6


def test_a_decoder_keeps_the_graphs_used_last_for_its_next_generation(
    monkeypatch, early_graphs, small_windows
):
    """Shown with a recorder in the place of `capture_graph`: a CPU has no CUDA graphs, so neither
    their streams nor their workspaces are tested here."""
    monkeypatch.setattr(static_steps, "MAX_GRAPHS", 2)
    decoder = decoder_of()
    capture = Recorder()
    first_steps = StaticSteps(decoder, capture=capture)
    list(keep_steps(decoder, first_steps, iter(())))

    def run(decoder, max_new_tokens=24):
        steps = kept_steps(decoder)
        options = {"max_new_tokens": max_new_tokens, "attention_mask": PADDING[:2]}
        return keep_steps(
            decoder, steps, decoder.stream(PROMPTS[:2], steps=steps, **options)
        ), steps

    unfinished, steps = run(decoder, 60)
    assert steps is first_steps
    assert next(unfinished).shape == (2,)
    # Another generation meanwhile has a cache of its own.
    assert kept_steps(decoder) is not first_steps
    expected = decoder.generate(PROMPTS[:2], max_new_tokens=60, attention_mask=PADDING[:2])
    generated = torch.stack(list(unfinished), 1)
    assert torch.equal(generated, expected[:, 7:])
    # Windows of 16, 32, 48 and 64 tokens; the last two remain.
    assert capture.num_captured == 4
    assert len(list(run(decoder, 60)[0])) == 60
    assert capture.num_captured == 8
    assert len(list(run(decoder)[0])) == 24
    assert capture.num_captured == 10
    assert len(list(run(decoder)[0])) == 24
    assert capture.num_captured == 10
    with decoder.model.norm.register_forward_hook(lambda *_: None):  # Which no graph would call.
        list(run(decoder)[0])
        assert capture.num_captured == 10
    list(run(decoder)[0])
    assert capture.num_captured == 12, "the graphs are gone"
    reference = weakref.ref(first_steps)
    del unfinished, steps, first_steps, decoder
    gc.collect()
    assert reference() is None


def test_no_graph_where_it_would_not_pay_or_not_be_right(early_graphs):
    decoder = decoder_of()
    capture = Recorder()
    steps = StaticSteps(decoder, capture=capture)
    ordinary_and_fixed(decoder, steps=steps, max_new_tokens=static_steps.MIN_TOKENS)
    with decoder.model.norm.register_forward_hook(lambda *_: None):
        ordinary_and_fixed(decoder, steps=steps)
    assert not capture.num_captured
    ordinary_and_fixed(decoder, steps=steps, max_new_tokens=static_steps.MIN_TOKENS + 1)
    assert capture.num_captured == 1


def test_graphs_do_not_depend_on_the_forms_for_cpus(early_graphs, gpu_forms):
    decoder = decoder_of()
    capture = Recorder()
    ordinary_and_fixed(decoder, steps=StaticSteps(decoder, capture=capture))
    assert capture.num_captured == 1


def test_a_capture_that_fails_is_told_once_and_decoding_continues(early_graphs, small_windows):
    decoder = decoder_of()
    capture = Recorder(RuntimeError("operation not permitted"))
    steps = StaticSteps(decoder, capture=capture)
    with pytest.warns(UserWarning, match="without CUDA graphs.*operation not permitted") as caught:
        expected, generated = ordinary_and_fixed(decoder, steps=steps)
    assert torch.equal(expected, generated)
    assert len(caught) == 1
    ordinary_and_fixed(decoder, steps=steps)
    assert capture.num_captured == 1


@torch.no_grad()
def test_an_ordinary_pass_may_follow():
    """An ordinary pass sees the tokens of the steps, and the padding of the prompts."""
    decoder = decoder_of()
    steps = StaticSteps(decoder)
    cache = steps.empty_cache(batch_size=2, max_tokens=16, strategy="exact")
    ids = tokens(2, 12)
    mask = left_padding(0, 2, time=12)
    expected = decoder(ids, attention_mask=mask)
    decoder(ids[:, :6], cache=cache, attention_mask=mask[:, :6])
    steps.begin(2)
    for time in (6, 7):
        torch.testing.assert_close(steps(ids[:, time]), expected[:, time])
    cache.window = None
    torch.testing.assert_close(decoder(ids[:, 8:], cache=cache), expected[:, 8:])
    cache.set_length(7)
    torch.testing.assert_close(decoder(ids[:, 7:9], cache=cache), expected[:, 7:9])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_step_waits_for_the_device(temperature, gpu_forms):
    decoder = decoder_of()
    options = {"seed": [1, 2], "top_k": 9, "top_p": 0.9, "eos_token_id": [VOCAB]}
    steps = decoder.stream(
        PROMPTS[:2],
        max_new_tokens=6,
        temperature=temperature,
        attention_mask=PADDING[:2],
        steps=StaticSteps(decoder),
        **options,
    )
    next(steps)  # The prompt's pass reads the mask.
    with SeenOperations() as operations:
        assert len(list(steps)) == 5
    assert "index_copy_" in operations.names
    waiting = {"_local_scalar_dense", "multinomial", "nonzero", "_unique2", "equal", "isin"}
    assert not waiting.intersection(operations.names)


@pytest.mark.slow
def test_all_steps_are_one_compiled_graph(gpu_forms):
    decoder = decoder_of(schedule=(1, 0))
    graphs = CompileCounterWithBackend("aot_eager")
    steps = StaticSteps(decoder)
    steps.run = torch.compile(steps.run, backend=graphs, fullgraph=True)
    expected, generated = ordinary_and_fixed(
        decoder, steps=steps, max_new_tokens=9, attention_mask=PADDING[:2]
    )
    assert torch.equal(expected, generated)
    assert graphs.frame_count == 1
