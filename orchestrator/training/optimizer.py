"""AdamW that decays the weight matrices of linear layers and nothing else.

Norms, embeddings and the learned mix are not decayed: the rows of the mix sum to one at the start,
and decay towards zero would shrink the hidden state. A head that is tied to the embedding counts as
the embedding. Linear layers are found by module type, because the mix is a matrix too.
"""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.settings import TrainingSettings


def make_optimizer(model: nn.Module, recipe: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW over the parameters of a bare decoder on its device; fused on CUDA.

    They are in two groups, with and without decay.
    """
    decayed = _linear_weights(model)
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if id(p) in decayed],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        fused=all(p.is_cuda for p in parameters),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _linear_weights(model: nn.Module) -> set[int]:
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return linear - embeddings
