"""A method of one's own: momentum between the layers."""

from dataclasses import dataclass

import torch
from torch import nn

from iiet.methods import Advance, Layer
from iiet.model.facts import LayerCounts, MethodFacts


@dataclass(frozen=True, kw_only=True)
class HeavyBallOptions:
    """Set by `model.method_options`."""

    momentum: float = 0.1
    """Where the learned momentum of each layer starts."""

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")


def counts(layer, num_corrections, options):
    """One evaluation; each layer but the first adds a term, and keeps it for its gradient."""
    num_terms = min(layer, 1)
    return LayerCounts(num_differentiated=1, num_terms=num_terms, num_kept=num_terms)


class HeavyBall(Layer):
    """h_l = F_l(h_{l-1}) + m_l (h_{l-1} - h_{l-2}); m_l is learned in each layer but the first."""

    facts = MethodFacts(Options=HeavyBallOptions, counts=counts)

    def build(self, config):
        self.momentum = nn.Parameter(torch.empty(1)) if self.index > 0 else None
        self.reset_parameters()

    def reset_parameters(self):
        if self.momentum is not None:
            nn.init.constant_(self.momentum, self.options.momentum)

    def advance(self, evaluate, hidden, state, *, num_corrections, shared):
        result = evaluate(hidden)
        if self.momentum is not None:  # `state` is what the layer before has left.
            result = result + self.momentum * (hidden - state)
        return Advance(result, hidden)
