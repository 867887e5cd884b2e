"""A module that was wrapped, replaced or hooked is called: in training, evaluation and decoding.

Adapters such as LoRA replace a linear layer by one that adds a low-rank product and still has a
`weight`. Code that only reads weights would miss that product.
"""

import pytest
import torch
from model_cases import make_model, tokens
from torch import nn

from iiet import IterationSchedule, KeyValueCache, next_token_loss

IDS = tokens(2, 8)

LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
NORMS = ["input_layernorm", "post_attention_layernorm"]
CONTAINERS = ["self_attn", "mlp"]


class LowRank(nn.Module):
    """A linear layer and a low-rank product beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight + self.up.weight @ self.down.weight)
        return linear


def fresh_decoder():
    return make_model(schedule=(2, 0), tie_embeddings=False)


def test_a_hook_on_a_decoder_is_not_one_on_its_twin_under_another_schedule():
    decoder = fresh_decoder()
    called = []
    twin = decoder.with_schedule(IterationSchedule.none(2))
    twin.register_forward_hook(lambda *_: called.append("twin"))
    decoder.register_forward_pre_hook(lambda *_: called.append("decoder"))
    decoder(IDS)
    twin(IDS)
    assert called == ["decoder", "twin"]


def all_logits(decoder):
    """Return the logits with gradients, without, and step by step."""
    cache = KeyValueCache(decoder.config, batch_size=2, max_tokens=8, dtype=torch.float64)
    with_gradients = decoder(IDS)
    with torch.no_grad():
        steps = [decoder(part, cache=cache) for part in IDS.split([4, 1, 1, 1, 1], 1)]
        return with_gradients, decoder(IDS), torch.cat(steps, 1)


def replace(decoder, path, make):
    """Replace a module of each layer, or of the decoder."""
    for parent in [decoder] if path == "lm_head" else decoder.model.layers:
        parent.set_submodule(path, make(parent.get_submodule(path)))


@pytest.mark.parametrize("path", [*LINEARS, "lm_head"])
def test_a_low_rank_adapter_works_as_if_merged_and_learns(path):
    decoder = fresh_decoder()
    plain = decoder(IDS)
    replace(decoder, path, LowRank)
    assert not torch.allclose(decoder(IDS), plain)
    next_token_loss(decoder(IDS), IDS).backward()
    adapters = [module for module in decoder.modules() if isinstance(module, LowRank)]
    for adapter in adapters:
        assert adapter.up.weight.grad.abs().sum() > 0
        assert adapter.down.weight.grad.abs().sum() > 0
    adapted = all_logits(decoder)
    replace(decoder, path, LowRank.merged)
    for logits in adapted:
        torch.testing.assert_close(logits, decoder(IDS), rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", [*LINEARS, *NORMS, *CONTAINERS, "lm_head"])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_hook_or_a_replaced_forward_works_everywhere(path, how):
    decoder = fresh_decoder()
    plain = decoder(IDS)

    def changed(module):
        if how == "hook":
            module.register_forward_hook(lambda module, args, output: 1.5 * output)
        else:
            forward = module.forward
            module.forward = lambda *args: 1.5 * forward(*args)
        return module

    replace(decoder, path, changed)
    full, *others = all_logits(decoder)
    assert not torch.allclose(full, plain)
    for logits in others:
        torch.testing.assert_close(logits, full, rtol=0, atol=1e-11)
