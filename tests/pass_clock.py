"""A clock that only models advance, so that measured times are known exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from iiet.decoder import Decoder


@contextmanager
def clock_of_passes(seconds: Callable[[Decoder, Tensor], float]) -> Iterator[None]:
    """Let no time pass within the block but while a decoder reads tokens.

    Args:
        seconds: Returns how long a pass takes, from the decoder and the tokens, (batch, time).
    """
    passed = [0.0]

    def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Decoder):
            passed.append(passed[-1] + seconds(module, inputs[0]))

    hook = register_module_forward_pre_hook(read)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: passed[-1])
            yield
    finally:
        hook.remove()
