"""The field of a layer: one pre-norm Llama block, a function from hidden states to hidden states.

    u    = x + self_attn(input_layernorm(x))
    F(x) = u + mlp(post_attention_layernorm(u))

Both residual connections are inside, so the plain decoder is `h_l = F_l(h_{l-1})`, and every other
method is a way to evaluate the same F more often. One run of a field is an *evaluation*, the unit
of cost. Modules have the names that they have in transformers' Llama, so weights do, too.

A decoding step on a CPU has a form of its own, `field_of_one_token`. Each weight is read once
there, which evicts the interpreter from the processor's cache, so each operation, view and module
call costs several times as much: it makes few of them, and its products run at memory's speed.
In half precision, some values and parameters stay float32 (`at_least_float32`, `KeepsFloat32`).

Source: Touvron et al. 2023 (Llama); rotary embedding, Su et al. 2021 (RoFormer, section 3.2);
grouped key/value heads as in Ainslie et al. 2023; SwiGLU, Shazeer 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from iiet.model.cache import KeyValueCache
from iiet.model.config import ModelConfig, RopeScaling
from iiet.model.fast import (
    add_few_rows_product,
    can_use_fast_linear,
    can_use_rms_norm,
    few_rows_product,
    few_rows_products,
    gated_product,
    is_bare,
    needs_all_derivatives,
    normalize_few_rows,
    rms_norm,
    rotate_in_place,
)

__all__ = [
    "HALF",
    "Attention",
    "Block",
    "FeedForward",
    "KeepsFloat32",
    "PassContext",
    "RMSNorm",
    "Rope",
    "RotaryAngles",
    "at_least_float32",
    "attend",
    "draw_weights",
    "initial_weights",
    "make_embedding",
    "product_dtype",
    "rope_attention_factor",
    "rotate",
    "scaled_frequencies",
]


HALF = (torch.bfloat16, torch.float16)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a float32 or float64 tensor as it is, and any other as float32."""
    # `torch.promote_types` says the same and costs a decoding step as much as a kernel.
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a product of the tensor is computed."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


class KeepsFloat32(nn.Module):
    """A module whose own parameters stay float32 when the model is moved to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype not in HALF or tensor.dtype in HALF:
                return result
            return tensor.to(result.device, torch.float32)

        module: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return module


class RotaryAngles(NamedTuple):
    """Cosines and sines of some positions, each (time, 1, head_dim) or (batch, time, 1, head_dim).

    The sine's first half is negative, so that rotating is `x * cos + swap_halves(x) * sin`.
    """

    cos: Tensor
    sin: Tensor


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads`, (batch, time, heads, head_dim). With `-sin` it rotates back."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    return (heads * cos).addcmul_(swapped, sin).to(heads.dtype)


class Rope:
    """The rotary embedding of one model; it has nothing in the state dict.

    Each pair of a head's channels turns by an angle that grows with the position; channels j and
    j + head_dim/2 are a pair (Llama's layout). Angles are computed in each pass, for its positions
    alone: a table of a long context would take more memory than the model's keys and values.
    Angles, cosines and sines are float32 also in a bf16 model; a rotated head is rounded once.
    """

    def __init__(
        self, head_dim: int, num_positions: int, theta: float, scaling: RopeScaling | None = None
    ) -> None:
        self.head_dim = head_dim
        self.num_positions = num_positions
        self.theta = theta
        self.scaling = scaling
        self._frequencies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, positions: Tensor, device: torch.device, dtype: torch.dtype) -> RotaryAngles:
        """Compute the angles of positions, (time,) or (batch, time); `dtype` is that of the hidden
        states."""
        # As exact as the model, and at least float32.
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions.to(device, dtype)[..., None, None] * self._frequencies_on(device, dtype)
        cos = angles.cos()
        sin = angles.sin()
        size = 1.0 if self.scaling is None else rope_attention_factor(self.scaling)
        if size != 1.0:
            cos = size * cos
            sin = size * sin
        return RotaryAngles(cos, sin)

    def _frequencies_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return radians per token, (head_dim,); the first half is negative, so its sines are, and
        a cosine does not change."""
        if torch.compiler.is_compiling():  # A graph must not fill a dictionary outside of it.
            return self._make_frequencies(device, dtype)
        frequencies = self._frequencies.get((device, dtype))
        if frequencies is None:
            # Tensors made in inference mode could not serve training later.
            with torch.inference_mode(False), torch.no_grad():
                frequencies = self._make_frequencies(device, dtype)
            # Fake tensors (tracing) hold no numbers and are valid in one mode only: do not keep.
            if type(frequencies) is Tensor:
                self._frequencies[device, dtype] = frequencies
        return frequencies

    def _make_frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # On the CPU, because a GPU's powers have other last digits.
        channels = torch.arange(0, self.head_dim, 2, dtype=dtype, device="cpu") / self.head_dim
        frequencies = 1.0 / self.theta**channels
        if self.scaling is not None:
            frequencies = scaled_frequencies(frequencies, self.theta, self.scaling)
        return torch.cat([-frequencies, frequencies]).to(device)


def scaled_frequencies(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Return the frequencies, (head_dim / 2,) in radians per token, under a scaling.

    Each is `(1 - kept) frequency / factor + kept * frequency`. For linear scaling nothing is kept.
    With n = turns of the pair within the earlier context, `frequency * context / (2 pi)`:

        llama3   kept = clamp((n - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        yarn     kept = 1 - clamp((j - first) / (last - first), 0, 1) for pair j, where first and
                 last are the pairs that turn beta_fast and beta_slow times, perhaps rounded outward

    Source: Llama 3.1's published code; Peng et al. 2023 (YaRN, section 3.2); transformers.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    context = scaling.original_max_position_embeddings
    assert context is not None
    if scaling.rope_type == "llama3":
        low = scaling.low_freq_factor
        high = scaling.high_freq_factor
        assert low is not None
        assert high is not None
        turns = frequencies * context / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        num_pairs = len(frequencies)

        def pair_that_turns(times: float) -> float:
            return num_pairs * math.log(context / (times * 2 * math.pi)) / math.log(theta)

        first = pair_that_turns(scaling.beta_fast or 32.0)
        last = pair_that_turns(scaling.beta_slow or 1.0)
        if scaling.truncate:
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        # The published code bounds a number of pairs by the number of channels.
        last = min(last, 2 * num_pairs - 1)
        if first == last:
            last += 0.001
        pairs = torch.arange(num_pairs, dtype=frequencies.dtype, device=frequencies.device)
        kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_attention_factor(scaling: RopeScaling) -> float:
    """Return the number that multiplies cosines and sines, so that scores grow by its square."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (1 + scaling.mscale * growth) / (1 + scaling.mscale_all_dim * growth)
    return 1 + growth


@dataclass(frozen=True)
class PassContext:
    """What all evaluations of one forward pass share."""

    rope: RotaryAngles
    mask: Tensor | None
    """(batch or 1, 1, time, total): bool, true where a query may look, or a number that is added to
    the scores; or PyTorch's object for the causal mask of a pass that continues a cache; or
    None."""
    is_causal: bool
    """Whether the kernel's own causal mask applies; false with a mask."""
    cache: KeyValueCache | None
    """Keys and values of earlier tokens; None when all tokens are in this pass."""
    step_weights: Mapping[Block, StepWeights] | None = None
    """By layer, what its field reads in a decoding step of `iiet.model.fast`; else None."""
    window_masks: Mapping[int, Tensor | None] = field(default_factory=dict)
    """Sliding window, in tokens -> the mask of layers that have it, for the latest tokens that such
    a layer reads; None where it sees all of these."""

    def seen_through(
        self, window: int | None, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Return the keys and values that a layer with this window reads, its mask, and whether
        the kernel's own causal mask applies."""
        if window is None or window not in self.window_masks:
            return keys, values, self.mask, self.is_causal
        mask = self.window_masks[window]
        # Without a mask this is a single token, which sees all that the window holds.
        num_seen = window if mask is None else mask.size(-1)
        first = keys.size(2) - num_seen
        return keys.narrow(2, first, num_seen), values.narrow(2, first, num_seen), mask, False


class RMSNorm(nn.RMSNorm):
    """Scale each token to a root mean square of one, then by a learned weight per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim)."""
        if can_use_rms_norm(x, self.weight):
            assert self.eps is not None
            return rms_norm(x, self.weight, self.eps)
        # The fused kernel needs one dtype, and autocast would make that float32.
        weight = self.weight.to(x.dtype)
        if x.dtype in HALF and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim) by causal attention with rotary positions.

    `rotates` and `window` are the config's for this layer (`ModelConfig.rotary_layers`,
    `sliding_windows`), the first being 0.
    """

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.rotates = config.rotates(layer)
        self.window = config.window_of(layer)
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        q_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.attention_out_bias)
        self.q_norm = self.k_norm = None
        if config.head_norms:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, context: PassContext, slot: int | None) -> Tensor:
        """Attend within `x` and to the tokens in the cache's `slot`."""
        x = x.to(product_dtype(x))  # Once; autocast would make and keep a copy for each product.
        by_head = (*x.shape[:2], -1, self.head_dim)
        queries = self.q_proj(x).view(by_head)
        keys = self.k_proj(x).view(by_head)
        values = self.v_proj(x).view(by_head).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            queries = self.q_norm(queries)
            keys = self.k_norm(keys)
        if self.rotates:
            queries = rotate(queries, *context.rope)
            keys = rotate(keys, *context.rope)
        queries = queries.transpose(1, 2)
        keys = keys.transpose(1, 2)
        if slot is not None and context.cache is not None:
            keys, values = context.cache.update(keys, values, slot)
        keys, values, mask, is_causal = context.seen_through(self.window, keys, values)
        mixed = attend(queries, keys, values, mask=mask, is_causal=is_causal)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """Map (batch, time, dim) to the same by `down(silu(gate) * up)`, each token by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        x = x.to(product_dtype(x))  # As in `Attention`.
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        if can_use_fast_linear(self.down_proj, x):
            return gated_product(gate, up, self.down_proj.weight)
        result: Tensor = self.down_proj(F.silu(gate) * up)
        return result


class StepWeights(NamedTuple):
    """What a decoding step reads of a block, looked up once per pass: each look-up of an attribute
    of a module takes as long as a small kernel."""

    input_layernorm: nn.RMSNorm
    self_attn: Attention
    """Read for its sizes alone."""
    post_attention_layernorm: nn.RMSNorm
    linear: dict[str, Tensor]
    """By name, such as `q_proj`, the weights of its linear layers."""


class Block(nn.Module):
    """The modules of one layer's block, and the field that they make."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.dim, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def field(self, x: Tensor, context: PassContext, slot: int | None = None) -> Tensor:
        """Evaluate F(x), (batch, time, dim) to (batch, time, dim).

        Args:
            x: where to evaluate.
            context: what all evaluations of this pass share.
            slot: the cache slot of this evaluation; None without a cache.
        """
        if context.step_weights is not None:
            return field_of_one_token(x, context.step_weights[self], context, slot)
        u: Tensor = x + self.self_attn(self.input_layernorm(x), context, slot)
        result: Tensor = u + self.mlp(self.post_attention_layernorm(u))
        return result

    def step_weights(self) -> StepWeights | None:
        """Return what `field_of_one_token` reads, or None where it may not replace `field`.

        It may where no module of the block, nor the field itself, was replaced, wrapped or hooked,
        and attention is that of a plain Llama: it has no biases or head norms, rotates, and sees
        all earlier tokens.
        """
        if "field" in self.__dict__ or type(self).field is not Block.field:
            return None
        modules = self._modules  # Attribute access would take three times as long.
        attention = modules["self_attn"]
        if type(attention) is Attention and (attention.window or not attention.rotates):
            return None
        linear_weights: dict[str, Tensor] = {}
        for name, module_type in _MODULES.items():
            module = modules[name]
            if module is None or not is_bare(module, module_type):
                return None
            # Head norms are no linear layers, and a linear layer with a bias is not bare.
            for linear_name, linear in module._modules.items():
                if linear is None or not is_bare(linear, nn.Linear):
                    return None
                linear_weights[linear_name] = cast("Tensor", linear._parameters["weight"])
        return StepWeights(
            cast("RMSNorm", modules["input_layernorm"]),
            cast("Attention", attention),
            cast("RMSNorm", modules["post_attention_layernorm"]),
            linear_weights,
        )

    def field_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the block, without what a method adds to the layer."""
        for name in _MODULES:
            yield from getattr(self, name).parameters()


_MODULES: dict[str, type[nn.Module]] = {
    "input_layernorm": RMSNorm,
    "self_attn": Attention,
    "post_attention_layernorm": RMSNorm,
    "mlp": FeedForward,
}
"""The modules of a block, by name."""


def field_of_one_token(
    x: Tensor, block: StepWeights, context: PassContext, slot: int | None
) -> Tensor:
    """Do `Block.field` for one token per row, (batch, 1, dim), with a cache."""
    assert slot is not None
    assert context.cache is not None
    weights = block.linear
    num_heads = block.self_attn.num_heads
    num_kv_heads = block.self_attn.num_kv_heads
    num_rows = x.size(0)
    normed = normalize_few_rows(x, block.input_layernorm)
    projections = (weights["q_proj"], weights["k_proj"], weights["v_proj"])
    # With one token, heads before time is the same memory as time before heads.
    heads = few_rows_products(normed, projections, num_rows)
    heads = heads.view(num_rows, -1, 1, block.self_attn.head_dim)
    rotate_in_place(heads.narrow(1, 0, num_heads + num_kv_heads), *context.rope)
    held = context.cache.append(heads.narrow(1, num_heads, 2 * num_kv_heads), slot)
    mixed = attend(heads.narrow(1, 0, num_heads), *held, mask=context.mask, is_causal=False)
    u = add_few_rows_product(x, mixed, weights["o_proj"], num_rows)
    normed = normalize_few_rows(u, block.post_attention_layernorm)
    gate = few_rows_product(normed, weights["gate_proj"], num_rows)
    up = few_rows_product(normed, weights["up_proj"], num_rows)
    return add_few_rows_product(u, F.silu(gate).mul_(up), weights["down_proj"], num_rows)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Mix values by how well their keys match the queries; query heads may share key heads.

    Args:
        queries: (batch, heads, time, head_dim), as the result.
        keys: (batch, key heads, tokens, head_dim); heads is a multiple of key heads.
        values: of the shape of the keys.
        mask: as in `PassContext`; `is_causal` too.
    """
    # PyTorch's fused kernels support a first backward pass and no other derivative.
    if needs_all_derivatives():
        with sdpa_kernel(SDPBackend.MATH):
            return _attend(queries, keys, values, mask, is_causal)
    return _attend(queries, keys, values, mask, is_causal)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    num_sharing = queries.size(1) // keys.size(1)
    # Without a fused kernel PyTorch would use its math kernel, which stores all scores. Repeating a
    # cache's keys takes ten times as long as attending to them.
    shares = num_sharing > 1 and (
        _CPU_SHARES_HEADS if queries.is_cpu else mask is None and queries.dtype in HALF
    )
    if num_sharing > 1 and not shares:
        if queries.size(2) == 1:  # As many tokens of one head as query heads that share it.
            together = queries.reshape(len(queries), keys.size(1), num_sharing, -1)
            mixed = F.scaled_dot_product_attention(together, keys, values, mask)
            return mixed.reshape(queries.shape)
        keys = keys.repeat_interleave(num_sharing, dim=1)
        values = values.repeat_interleave(num_sharing, dim=1)
    return F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=is_causal, enable_gqa=shares
    )


_CPU_SHARES_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
"""Whether the fused CPU kernel supports shared key heads (pytorch/pytorch#157893)."""


def make_embedding(num_rows: int, dim: int) -> nn.Embedding:
    """Return an embedding on the current device; weights are not drawn on the meta device.

    Drawing there would import PyTorch's compiler, which takes a second.
    """
    if torch.get_default_device().type == "meta":
        weight = torch.empty(num_rows, dim)
        made: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        return made
    return nn.Embedding(num_rows, dim)


def draw_weights(module: nn.Module, std: float) -> None:
    """Draw a linear layer's or an embedding's weights from a normal distribution; zero its bias.

    On the meta device there is nothing to draw.
    """
    if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def initial_weights(decoder: nn.Module, std: float) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight), drawn as by the constructor of a decoder, on the CPU.

    A sharded model is made on the meta device, and no worker has room for all of its weights: this
    holds one module's at a time.

    Args:
        decoder: on the meta device, and so afterwards.
        std: the config's `initializer_std`.
    """
    drawn = (nn.Linear, nn.Embedding)
    # PyTorch's constructors draw weights that the decoder's replaces; they take random numbers.
    for module in decoder.modules():
        if isinstance(module, drawn):
            _reset_on_cpu(module)
            module.to_empty(device="meta", recurse=False)
    for prefix, module in decoder.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if not names:
            continue
        if isinstance(module, drawn):
            draw_weights(module.to_empty(device="cpu", recurse=False), std)
        else:
            _reset_on_cpu(module)
        for name in names:
            yield f"{prefix}.{name}", getattr(module, name).detach()
        module.to_empty(device="meta", recurse=False)


def _reset_on_cpu(module: nn.Module) -> None:
    module.to_empty(device="cpu", recurse=False)
    module.reset_parameters()  # type: ignore[operator]
