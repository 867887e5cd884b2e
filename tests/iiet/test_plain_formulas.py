"""The decoder equals the formulas, written out plainly in float64.

No fused products, no prefix sums, no cache, no shared code: complex numbers rotate the heads, a
loop over query heads picks the key/value head. It covers what the stored reference cases do not:
Runge-Kutta of order 4, the ODE Transformer's blocks, grouped heads, untied heads, other rotary
bases.
"""

import math

import pytest
import torch
from model_cases import make_model, tokens
from torch.nn.functional import layer_norm, softmax

from iiet import next_token_loss

METHODS = ["vanilla", "iiet", "pcformer", "pcformer_rk4"]


class PlainModel:
    """Computes logits from the weights of a decoder, one formula after the other."""

    def __init__(self, config, weights):
        self.config = config
        self.w = weights

    def rms(self, x, name):
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * self.w[name]

    def ln(self, x, name):
        weight = self.w[f"{name}.weight"]
        bias = self.w[f"{name}.bias"]
        return layer_norm(x, (x.size(-1),), weight, bias, self.config.layer_norm_eps)

    def turn(self, x):
        """Rotate (time, head_dim): channels j and j + half are one complex number."""
        half = x.size(-1) // 2
        speeds = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * speeds
        z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1)

    def attention(self, x, name):
        """Attend within one sequence, (time, dim)."""
        config = self.config
        width = self.config.head_dim
        q, k, v = (x @ self.w[f"{name}.{part}_proj.weight"].T for part in "qkv")
        future = torch.ones(len(x), len(x)).triu(1).bool()
        mixed = []
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            query = self.turn(q[:, head * width : (head + 1) * width])
            key = self.turn(k[:, group * width : (group + 1) * width])
            scores = (query @ key.T / math.sqrt(width)).masked_fill(future, -math.inf)
            mixed.append(softmax(scores, -1) @ v[:, group * width : (group + 1) * width])
        return torch.cat(mixed, -1) @ self.w[f"{name}.o_proj.weight"].T

    def field(self, layer):
        base = f"model.layers.{layer}"

        def evaluate(x):
            normed = self.rms(x, f"{base}.input_layernorm.weight")
            u = x + torch.stack([self.attention(row, f"{base}.self_attn") for row in normed])
            n = self.rms(u, f"{base}.post_attention_layernorm.weight")
            gate = n @ self.w[f"{base}.mlp.gate_proj.weight"].T
            up = n @ self.w[f"{base}.mlp.up_proj.weight"].T
            return u + (gate * torch.sigmoid(gate) * up) @ self.w[f"{base}.mlp.down_proj.weight"].T

        return evaluate

    def predictor(self, field, h, layer):
        a = self.w["model.shared.alpha"]
        if self.config.method == "pcformer":
            k1 = self.ln(field(h), "model.shared.norms.0")
            if self.config.schedule[layer] < 2:
                return h + a * k1
            k2 = self.ln(field(h + k1), "model.shared.norms.1")
            return h + a * (1 - a) * k1 + a * k2
        k1 = self.ln(field(h), "model.shared.norms.0")
        k2 = self.ln(field(h + k1 / 2), "model.shared.norms.1")
        k3 = self.ln(field(h + k2 / 2), "model.shared.norms.2")
        k4 = self.ln(field(h + k3), "model.shared.norms.3")
        return h + a * (1 - a) ** 3 * k1 + a * (1 - a) ** 2 * k2 + a * (1 - a) * k3 + a * k4

    def multistep(self, layer, field, h, s):
        base = f"model.layers.{layer}"
        method = self.config.method
        *a, a_last = self.w[f"{base}.mix.inner"]
        c = self.w[f"{base}.mix.outer"]
        if method == "iiet":
            guess = field(h)
            count = self.config.schedule[layer]
        else:
            guess = self.predictor(field, h, layer)
            count = 0 if self.config.corrections[layer] == 0 and method == "pcformer" else 1
        e = self.ln(guess, f"{base}.prediction_norm")
        for _ in range(count):
            x = sum(a[k] * s[k] for k in range(len(a))) + a_last * e
            e = self.ln(field(x), f"{base}.correction_norm")
        s.append(e)
        return sum(c[k] * s[k] for k in range(len(c)))

    def __call__(self, input_ids):
        h = self.w["model.embed_tokens.weight"][input_ids]
        s = [h]
        for layer in range(self.config.num_layers):
            field = self.field(layer)
            h = field(h) if self.config.method == "vanilla" else self.multistep(layer, field, h, s)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return self.rms(h, "model.norm.weight") @ head.T


CASES = [*((method, (2, 0, 3)) for method in METHODS), ("pcformer", (1, 2, 0))]


@pytest.mark.parametrize(
    ("method", "corrections", "tied"),
    [(*case, number % 2 == 0) for number, case in enumerate(CASES)],
)
def test_logits_and_gradients_equal_the_formulas(method, corrections, tied):
    decoder = make_model(method, corrections, tie_embeddings=tied, rope_theta=500.0)
    with torch.no_grad():  # Norms, too, are far from their starting point.
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {name: value.clone().requires_grad_() for name, value in decoder.state_dict().items()}
    input_ids = tokens(2, 9)
    plain = PlainModel(decoder.config, weights)(input_ids)
    logits = decoder(input_ids)
    torch.testing.assert_close(logits, plain, rtol=1e-10, atol=1e-10)
    next_token_loss(plain, input_ids).backward()
    next_token_loss(logits, input_ids).backward()
    for name, parameter in decoder.named_parameters():
        expected = weights[name].grad
        if expected is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-8)
