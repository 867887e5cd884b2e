"""`torch.compile` for the fields of a decoder; it changes only the rounding of results.

One compiled graph serves all evaluations, layers and iteration schedules. A new batch size, a mask
or validation compiles another graph.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from iiet.decoder import Decoder
from orchestrator.workspace.errors import UserError


def compile_fields(decoder: Decoder, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each field in place, at its first call."""
    for field in decoder.fields:
        # Compile the method, not the module: the hooks of sharding stay outside the graph.
        field.forward = torch.compile(field.forward, backend=backend)


def check_compiler(section: str) -> None:
    """Check that this machine has the C++ compiler that PyTorch needs.

    Raises:
        UserError: If there is no C++ compiler.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"{section}.compile=true needs a C++ compiler, and there is no {name}; install one "
            "(`apt install g++`), name yours in the environment variable CXX, or set "
            f"{section}.compile=false"
        )
