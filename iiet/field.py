"""The field of a layer: one pre-norm Llama block as a function from hidden states to hidden states.

    u    = x + attention(norm1(x))
    F(x) = u + feed_forward(norm2(u))

Both residual connections are inside, so the plain decoder is `h_l = F_l(h_{l-1})`, and every other
method is a way to evaluate the same F more often. One run of a field is an *evaluation*, the unit
of cost.
"""

from __future__ import annotations

from torch import Tensor, nn

from iiet.attention import Attention
from iiet.context import AttentionContext
from iiet.decoding_step import evaluate_token
from iiet.feed_forward import FeedForward
from iiet.norm import RMSNorm

__all__ = ["Field"]


class Field(nn.Module):
    """One layer's block.

    Args:
        dim: width of the hidden state.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        ffn_dim: inner width of the feed-forward network.
        rms_norm_eps: epsilon of both norms.
    """

    def __init__(
        self, dim: int, *, num_heads: int, num_kv_heads: int, ffn_dim: int, rms_norm_eps: float
    ) -> None:
        super().__init__()
        self.norm_eps = rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps=rms_norm_eps)
        self.attention = Attention(dim, num_heads, num_kv_heads)
        self.feed_forward_norm = RMSNorm(dim, eps=rms_norm_eps)
        self.feed_forward = FeedForward(dim, ffn_dim)

    def forward(self, x: Tensor, context: AttentionContext, slot: int) -> Tensor:
        """Evaluate F(x), (batch, time, dim) to (batch, time, dim).

        Args:
            x: where to evaluate.
            context: what all evaluations of this forward pass share.
            slot: the cache slot of this evaluation; without a cache it means nothing.
        """
        if context.is_token_step:
            return evaluate_token(self, x, context, slot)
        u: Tensor = x + self.attention(self.attention_norm(x), context, slot)
        y: Tensor = u + self.feed_forward(self.feed_forward_norm(u))
        return y
