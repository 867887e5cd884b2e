"""Gradients of a decoder under the published names of its weights."""

from torch import Tensor

from iiet import Decoder
from iiet.published import _to_published


def published_gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of the gradients, where there are any."""
    gradients = {
        name: parameter.grad
        for name, parameter in decoder.named_parameters()
        if parameter.grad is not None
    }
    return _to_published(decoder.config, gradients)
