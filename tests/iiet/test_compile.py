"""A decoder compiled as a whole is one graph and equals the eager one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import left_padding, make_model
from model_cases import tokens as random_tokens
from torch._dynamo.testing import CompileCounter

from iiet import METHODS, KeyValueCache, next_token_loss

BATCH = 2
TIME = 6
GRAPHS = {"backend": "aot_eager", "fullgraph": True}
FOLDER = Path(__file__).resolve().parent


def decoder_of(method, num_layers=1):
    return make_model(method, (1, 0)[:num_layers])


def tokens():
    return random_tokens(BATCH, TIME)


def masks(masked):
    """Return a mask with left padding in one of two rows, or none."""
    return {"attention_mask": left_padding(2, 0, time=TIME)} if masked else {}


def trained(decoder, run, **masks):
    """Return logits and gradients."""
    decoder.zero_grad()
    logits = run(tokens(), **masks)
    next_token_loss(logits, tokens()).backward()
    return logits.detach(), [parameter.grad for parameter in decoder.parameters()]


@torch.inference_mode()
def decoded(decoder, run, cuts, **masks):
    """Return the logits of a prefill and of the steps after it."""
    cache = KeyValueCache(decoder.config, batch_size=BATCH, max_tokens=TIME, dtype=torch.float64)
    logits = []
    num_tokens = 0
    for part in tokens()[:, : sum(cuts)].split(cuts, 1):
        num_tokens += part.size(1)
        masks_so_far = {name: mask[:, :num_tokens] for name, mask in masks.items()}
        logits.append(run(part, cache=cache, **masks_so_far))
    return torch.cat(logits, 1)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def cases(*slow):
    """Return every method, and IIET also with a mask: some cases slow, the others long."""

    def marks(case):
        return pytest.mark.slow if case in slow else pytest.mark.long

    all_cases = {("iiet", True), *slow, *((method, False) for method in METHODS)}
    return [pytest.param(*case, marks=marks(case)) for case in sorted(all_cases)]


@pytest.mark.parametrize(("method", "masked"), cases(("iiet", True)))
def test_training_and_inference_are_one_graph_each(method, masked):
    decoder = decoder_of(method, num_layers=2 if method == "iiet" else 1)
    compiled = torch.compile(decoder, **GRAPHS)
    options = masks(masked)
    torch.testing.assert_close(
        trained(decoder, compiled, **options), trained(decoder, decoder, **options)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(), **options), decoder(tokens(), **options))


@pytest.mark.parametrize(("method", "masked"), cases(("iiet", False)))
def test_prefill_and_each_step_are_one_graph(method, masked):
    decoder = decoder_of(method)
    compiled = torch.compile(decoder, **GRAPHS)
    cuts = [4, 1, 1]
    options = masks(masked)
    torch.testing.assert_close(
        decoded(decoder, compiled, cuts, **options), decoded(decoder, decoder, cuts, **options)
    )


@pytest.mark.slow
@torch.inference_mode()
def test_a_schedule_in_any_form_is_one_graph_and_no_table_of_the_context_is_in_it():
    """Warnings are errors here: reading the text must trace into no lookup of packages."""
    decoder = make_model("iiet", (1, 0), context_length=4096)
    sizes = []

    def backend(graph, _):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        sizes.append(max(value.numel() for value in values if isinstance(value, torch.Tensor)))
        return graph.forward

    compiled = torch.compile(decoder, backend=backend, fullgraph=True)
    for schedule in ("0,1", (0, 0), 1):
        expected = decoder(tokens(), schedule=schedule)
        torch.testing.assert_close(compiled(tokens(), schedule=schedule), expected)
    assert max(sizes) < decoder.config.context_length


@pytest.mark.slow
@torch.inference_mode()
def test_longer_decoding_recompiles_nothing():
    """From the second step on, the number of cached tokens is a symbol of the step's graph."""
    decoder = decoder_of("vanilla")
    graphs = CompileCounter()
    compiled = torch.compile(decoder, backend=graphs, fullgraph=True)
    ids = random_tokens(BATCH, 8)
    cache = KeyValueCache(decoder.config, batch_size=BATCH, max_tokens=8, dtype=torch.float64)
    steps = [compiled(part, cache=cache) for part in ids.split([3, 1, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), decoder(ids))
    assert graphs.frame_count <= 3


@pytest.mark.long
def test_a_fresh_process_compiles():
    """No earlier run has filled a table or imported a module."""
    script = """
import torch
from test_compile import decoded, decoder_of, masks, tokens, trained
decoder = decoder_of("iiet")
compiled = torch.compile(decoder, backend="aot_eager")
for options in map(masks, (True, False)):
    results = trained(decoder, compiled, **options), decoded(decoder, compiled, [4, 1], **options)
    expected = trained(decoder, decoder, **options), decoded(decoder, decoder, [4, 1], **options)
    torch.testing.assert_close(results, expected)
assert not torch._dynamo.utils.counters["graph_break"]
"""
    path = os.pathsep.join([str(FOLDER), *sys.path])
    subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, check=True
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler warns of itself.
@pytest.mark.parametrize(
    "masked", [pytest.param(masked, marks=pytest.mark.long) for masked in (False, True)]
)
def test_the_default_compiler_gives_the_same(masked):
    decoder = decoder_of("iiet")
    compiled = torch.compile(decoder)
    options = masks(masked)
    torch.testing.assert_close(
        trained(decoder, compiled, **options), trained(decoder, decoder, **options)
    )
    cuts = [4, 1, 1]
    torch.testing.assert_close(
        decoded(decoder, compiled, cuts, **options), decoded(decoder, decoder, cuts, **options)
    )


@pytest.mark.slow
def test_a_compiled_pass_remembers_and_obeys_the_mask_of_its_cache():
    """A graph knows no values, so it keeps every mask; eager passes can continue the cache."""
    decoder = decoder_of("vanilla")
    compiled = torch.compile(decoder, **GRAPHS)
    mask = masks(True)["attention_mask"]
    expected = decoded(decoder, decoder, [4, 2], attention_mask=mask)
    cache = KeyValueCache(decoder.config, batch_size=BATCH, max_tokens=TIME, dtype=torch.float64)
    with torch.inference_mode():
        compiled(tokens()[:, :4], cache=cache, attention_mask=mask[:, :4])
        torch.testing.assert_close(decoder(tokens()[:, 4:], cache=cache), expected[:, 4:])
