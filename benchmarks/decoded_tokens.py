"""Whether cached decoding chooses the tokens that the full forward pass finds likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from iiet import Decoder, generate


def largest_regret(decoder: Decoder, prompt: Tensor, new_tokens: int) -> float:
    """Return by how much a greedily decoded token's logit is below the largest one, at most.

    Logits are those of the full forward pass, the unit is their standard deviation. Rounding alone
    makes it positive where two tokens are almost equally likely.
    """
    tokens = generate(decoder.eval(), prompt, max_new_tokens=new_tokens)
    with torch.inference_mode():
        logits = decoder(tokens)[:, prompt.size(1) - 1 : -1].float()
    chosen = logits.gather(-1, tokens[:, prompt.size(1) :, None])
    regret = (logits.amax(-1, keepdim=True) - chosen).max() / logits.std()
    return float(regret)
