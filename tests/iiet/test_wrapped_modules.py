"""A module that was wrapped, replaced or hooked is called: in training, evaluation and decoding.

Adapters such as LoRA replace a linear layer by one that adds a low-rank product and still has a
`weight`. Code that only reads weights would miss that product.
"""

import pytest
import torch
from torch import nn

from iiet import Decoder, IterationSchedule, KeyValueCache, next_token_loss, preset

LINEARS = ["attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"]
NORMS = ["attention_norm", "feed_forward_norm"]
CONTAINERS = ["attention", "feed_forward"]


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
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "vocab_size": 20}
    config = preset("tiny", schedule="2,0", tie_embeddings=False, initializer_std=0.3, **sizes)
    return Decoder(config).double()


def tokens():
    return torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(1))


def test_a_hook_on_a_decoder_is_not_one_on_its_twin_under_another_schedule():
    decoder, seen = fresh_decoder(), []
    twin = decoder.with_schedule(IterationSchedule.none(2))
    twin.register_forward_hook(lambda *_: seen.append("twin"))
    decoder.register_forward_pre_hook(lambda *_: seen.append("decoder"))
    decoder(tokens())
    twin(tokens())
    assert seen == ["decoder", "twin"]


def all_logits(decoder, dtype=torch.float64):
    """Logits with gradients, without, and step by step."""
    cache = KeyValueCache(decoder.config, batch_size=2, max_tokens=8, dtype=dtype)
    with_gradients = decoder(tokens())
    with torch.no_grad():
        steps = [decoder(part, cache=cache) for part in tokens().split([4, 1, 1, 1, 1], 1)]
        return with_gradients, decoder(tokens()), torch.cat(steps, 1)


def replace(decoder, path, make):
    """Replace a module of each field, or of the decoder."""
    for parent in [decoder] if path == "head" else decoder.fields:
        parent.set_submodule(path, make(parent.get_submodule(path)))


@pytest.mark.parametrize("path", [*LINEARS, "head"])
def test_a_low_rank_adapter_works_as_if_merged_and_learns(path):
    decoder = fresh_decoder()
    plain = decoder(tokens())
    replace(decoder, path, LowRank)
    assert not torch.allclose(decoder(tokens()), plain)
    next_token_loss(decoder(tokens()), tokens()).backward()
    adapters = [module for module in decoder.modules() if isinstance(module, LowRank)]
    for adapter in adapters:
        assert adapter.up.weight.grad.abs().sum() > 0
        assert adapter.down.weight.grad.abs().sum() > 0
    adapted = all_logits(decoder)
    replace(decoder, path, LowRank.merged)
    for logits in adapted:
        torch.testing.assert_close(logits, decoder(tokens()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", [*LINEARS, *NORMS, *CONTAINERS, "head"])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_a_hook_or_a_replaced_forward_works_everywhere(path, how):
    decoder = fresh_decoder()
    plain = decoder(tokens())

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
