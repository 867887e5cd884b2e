"""Models and tensors on a pretended GPU: fake tensors with `device="cuda"`, without contents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils

from benchmarks.gpu_model.trace import FUSED_ON_GPUS
from iiet.config import ModelConfig
from iiet.decoder import Decoder


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Make all tensors fake; `stub.register_gpu` must have run before PyTorch was imported."""
    with ExitStack() as stack:
        if not torch.version.cuda:
            library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
            stack.callback(library._destroy)
            for name in FUSED_ON_GPUS:
                library.impl(name, _no_kernel, "CUDA")  # type: ignore[no-untyped-call]
            # Autocast asks for a device that runs; tensors do not.
            common = torch.cuda.amp.common
            stack.enter_context(patch.object(common, "amp_definitely_not_available", lambda: False))
            stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda: True))
        stack.enter_context(patch.object(FakeTensor, "tolist", _tolist))
        # PyTorch updates lists of tensors by one kernel if it knows their class.
        types = [*_foreach_utils._foreach_supported_types, FakeTensor]
        stack.enter_context(patch.object(_foreach_utils, "_foreach_supported_types", types))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _tolist(tensor: Tensor) -> Any:
    """Read all elements by one copy; `FakeTensor.tolist` would wait for each."""
    tensor = tensor.cpu()
    return tensor.item() if not tensor.dim() else [_tolist(part) for part in tensor.unbind()]


def _no_kernel(*_: Any) -> None:
    raise AssertionError("a pretended GPU computes nothing")


def decoder_on_gpu(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a decoder on the pretended GPU; norms and mix of a method stay float32."""
    # Fake parameters cannot be converted in place, so it gets its types on the meta device.
    with unset_fake_temporarily(), torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    for module in decoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cuda"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return decoder
