"""`torch.compile` for the part of a step that is worth it: the fields.

A field is the same for all evaluations, layers and iteration schedules, so one compiled graph
serves them all, and a ramp of corrections compiles nothing anew; only another number of sequences,
a mask or the validation's mode does. What happens between fields (the mix) stays as it is.
Compiling changes the rounding of results, as recomputation and passes do, and nothing else.
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
    """Compile each field, when it runs for the first time; before a decoder is sharded.

    The method and not the module, so that what sharding does around a field stays outside.

    Args:
        decoder: Whose fields run compiled from now on.
        backend: What makes code of a graph, as `torch.compile` takes it.
    """
    for field in decoder.fields:
        field.forward = torch.compile(field.forward, backend=backend)


def check_compiler(section: str) -> None:
    """Find out before a run starts whether PyTorch could compile here.

    Args:
        section: Of the settings that the recipe stands in, for the error.

    Raises:
        UserError: If there is no C++ compiler; says what to do.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"{section}.compile=true needs a C++ compiler, and there is no {name}; install one "
            "(`apt install g++`), name yours in the environment variable CXX, or set "
            f"{section}.compile=false"
        )
