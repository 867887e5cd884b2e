"""The field of a layer: one pre-norm Llama block, a function from hidden states to hidden states.

    u    = x + attention(norm1(x))
    F(x) = u + feed_forward(norm2(u))

Both residual connections are inside, so the plain decoder is `h_l = F_l(h_{l-1})`, and every other
method is a way to evaluate the same F more often. One run of a field is an *evaluation*, the unit
of cost. These are the plain formulas; `iiet.fast` replaces some of them on CPUs.

Source: Touvron et al. 2023 (Llama); rotary embedding, Su et al. 2021 (RoFormer, section 3.2);
grouped key/value heads as in Ainslie et al. 2023; SwiGLU, Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from iiet.arithmetic import HALF, needs_all_derivatives
from iiet.cache import KeyValueCache
from iiet.config import ModelConfig

__all__ = [
    "Attention",
    "FeedForward",
    "Field",
    "PassContext",
    "RMSNorm",
    "Rope",
    "RopeTables",
    "attend",
    "draw_weights",
    "initial_weights",
    "make_embedding",
    "rotate",
]


class RopeTables(NamedTuple):
    """Cosines and sines of some positions, each (time, 1, head_dim) or (batch, time, 1, head_dim).

    The sine's first half is negative, so that rotating is `x * cos + swap_halves(x) * sin`.
    """

    cos: Tensor
    sin: Tensor


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads`, (batch, time, heads, head_dim). With `-sin` it rotates back."""
    swapped = heads.roll(heads.size(-1) // 2, dims=-1)
    return torch.addcmul(heads * cos, swapped, sin).to(heads.dtype)


class Rope:
    """The rotary tables of one model, made on first use; not part of the state dict.

    Each pair of a head's channels turns by an angle that grows with the position; channels j and
    j + head_dim/2 are a pair (Llama's layout). Angles, cosines and sines are float32 also in a bf16
    model; a rotated head is rounded once.
    """

    def __init__(self, head_dim: int, num_positions: int, theta: float) -> None:
        self.head_dim = head_dim
        self.num_positions = num_positions
        self.theta = theta
        self._tables: dict[tuple[torch.device, torch.dtype], RopeTables] = {}

    def at(self, positions: Tensor | slice, device: torch.device, dtype: torch.dtype) -> RopeTables:
        """Look up positions: a slice, or (batch, time); `dtype` is that of the hidden states."""
        # A table as exact as the model, and at least float32.
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = self._all_positions(device, dtype)
        return RopeTables(cos[positions], sin[positions])

    def _all_positions(self, device: torch.device, dtype: torch.dtype) -> RopeTables:
        if torch.compiler.is_compiling():  # A graph must not fill a dictionary outside of it.
            return self._make_tables(device, dtype)
        tables = self._tables.get((device, dtype))
        if tables is None:
            # Tables made in inference mode could not serve training later.
            with torch.inference_mode(False), torch.no_grad():
                tables = self._make_tables(device, dtype)
            # Fake tensors (tracing) hold no numbers and are valid in one mode only: do not keep.
            if type(tables.cos) is Tensor:
                self._tables[device, dtype] = tables
        return tables

    def _make_tables(self, device: torch.device, dtype: torch.dtype) -> RopeTables:
        channels = torch.arange(0, self.head_dim, 2, dtype=dtype, device="cpu") / self.head_dim
        positions = torch.arange(self.num_positions, dtype=dtype, device="cpu")
        angles = torch.outer(positions, 1.0 / self.theta**channels)
        cos, sin = angles.cos(), angles.sin()
        return RopeTables(
            torch.cat([cos, cos], -1).unsqueeze(1).to(device),
            torch.cat([-sin, sin], -1).unsqueeze(1).to(device),
        )


@dataclass(frozen=True)
class PassContext:
    """What all evaluations of one forward pass share."""

    rope: RopeTables
    mask: Tensor | None
    """(batch or 1, 1, time, total): bool, true where a query may look, or a number that is added to
    the scores; or PyTorch's object for the causal mask of a pass that continues a cache; or
    None."""
    is_causal: bool
    """Whether the kernel's own causal mask applies; false with a mask."""
    cache: KeyValueCache | None
    """Keys and values of earlier tokens; None when all tokens are in this pass."""
    is_token_step: bool = False
    """Whether this is a decoding step that `iiet.fast` computes."""


class RMSNorm(nn.RMSNorm):
    """Scale each token to a root mean square of one, then by a learned weight per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim)."""
        # The fused kernel needs one dtype, and autocast would make that float32.
        weight = self.weight.to(x.dtype)
        if x.dtype in HALF and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim) by causal attention with rotary positions.

    One matrix makes queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim + 2 * num_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: PassContext, slot: int | None) -> Tensor:
        """Attend within `x` and to the tokens in the cache's `slot`."""
        queries, keys, values = self.heads(x, context.rope)
        if slot is not None and context.cache is not None:
            keys, values = context.cache.update(keys, values, slot)
        mixed = attend(queries, keys, values, mask=context.mask, is_causal=context.is_causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result

    def heads(self, x: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each (batch, its heads, time, head_dim)."""
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).view(x.size(0), x.size(1), -1, self.head_dim)
        turned, values = heads.split_with_sizes([num_heads + num_kv_heads, num_kv_heads], 2)
        queries, keys = rotate(turned, *rope).split_with_sizes([num_heads, num_kv_heads], 2)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


class FeedForward(nn.Module):
    """Map (batch, time, dim) to (batch, time, dim), each token by itself: `down(silu(gate) * up)`.

    One matrix makes gate and up.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class Field(nn.Module):
    """One layer's block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps=eps)
        self.attention = Attention(dim, config.num_heads, config.num_kv_heads)
        self.feed_forward_norm = RMSNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, config.ffn_dim)

    def forward(self, x: Tensor, context: PassContext, slot: int | None = None) -> Tensor:
        """Evaluate F(x), (batch, time, dim) to (batch, time, dim).

        Args:
            x: where to evaluate.
            context: what all evaluations of this pass share.
            slot: the cache slot of this evaluation; None without a cache.
        """
        u: Tensor = x + self.attention(self.attention_norm(x), context, slot)
        result: Tensor = u + self.feed_forward(self.feed_forward_norm(u))
        return result


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
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, drawn):
            draw_weights(module.to_empty(device="cpu", recurse=False), std)
        else:
            _reset_on_cpu(module)
        for name in own:
            yield f"{prefix}.{name}", getattr(module, name).detach()
        module.to_empty(device="meta", recurse=False)


def _reset_on_cpu(module: nn.Module) -> None:
    module.to_empty(device="cpu", recurse=False)
    module.reset_parameters()  # type: ignore[operator]
