"""`torch.compile` for the fields of a decoder in training; it changes only the rounding of results.

One compiled graph serves all evaluations, layers and iteration schedules; another number of
sequences, or a mask, compiles another one. Passes without gradients run as they are: a graph of
their own would take longer than the few validations of a run. A failure of the compiler is one
event; training then continues uncompiled. PyTorch's limit on the graphs of a job is one as well;
what has no graph then runs uncompiled.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from iiet.decoder import Decoder
from orchestrator.workspace.errors import shortened

_PARTITION = {
    # Recompute what is cheap, as the uncompiled forms do: a fifth less memory for 3 % more time
    # (340M, estimated from its kernels), and no more than the plan.
    "ban_recompute_materialized_backward": False,
    # Compile the backward pass with the forward pass: both fail, or take their time, in one place.
    "force_non_lazy_backward_lowering": True,
}

_LIMIT_HIT = (
    "training needs more compiled graphs than PyTorch keeps "
    "(torch._dynamo.config.recompile_limit), so some passes run uncompiled, slower on GPUs"
)


def compile_fields(
    decoder: Decoder, event: Callable[..., None], backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile each field in place, at its first call with gradients.

    Args:
        decoder: The model.
        event: Gets `compiled` with the seconds, or `not compiled` with a text.
        backend: PyTorch's name of a compiler, or a function from graph and inputs to a callable.
    """
    compiler = _Compiler(backend, event)
    for field in decoder.fields:
        # Compile the method, not the module: the hooks of sharding stay outside the graph.
        field.forward = compiler.compiled(field.forward)


class _Compiler:
    """Compiles the fields of one decoder, and stops at its first failure."""

    def __init__(self, backend: str | Callable[..., Any], event: Callable[..., None]) -> None:
        # Importing them takes two seconds.
        from torch._dynamo import config as dynamo
        from torch._dynamo import lookup_backend
        from torch._functorch import config

        # Each job has a backend of its own, and Dynamo keeps graphs for eight of them.
        torch.compiler.reset()
        dynamo.fail_on_recompile_limit_hit = True  # Else only a log tells of it.

        warnings.filterwarnings("ignore", message=r"The \.grad attribute", category=UserWarning)
        self._event = event
        self._num_graphs = 0
        self._has_failed = False
        make = lookup_backend(backend) if isinstance(backend, str) else backend

        # An older PyTorch lacks some of these; the graphs are right without them.
        known = {name: value for name, value in _PARTITION.items() if hasattr(config, name)}

        def make_graph(graph: fx.GraphModule, inputs: list[Any]) -> Any:
            self._num_graphs += 1
            with config.patch(known):
                return make(graph, inputs)

        self._backend = make_graph  # One object for all fields, so that they share graphs.

    def compiled(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that is compiled where that works, and else `forward`."""
        fast = torch.compile(forward, backend=self._backend)

        def run(*args: Any, **options: Any) -> Tensor:
            if self._has_failed or not torch.is_grad_enabled():
                return forward(*args, **options)
            num_graphs, started = self._num_graphs, time.perf_counter()
            try:
                result = fast(*args, **options)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                torch._dynamo.config.fail_on_recompile_limit_hit = False
                self._event("not compiled", text=_LIMIT_HIT)
                return fast(*args, **options)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._has_failed = True
                self._event("not compiled", text=_failure(error))
                return forward(*args, **options)
            if self._num_graphs > num_graphs:
                self._event("compiled", seconds=time.perf_counter() - started)
            return result

        return run


def _failure(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)
    reason = shortened(" ".join(f"{type(cause).__name__}: {cause}".split()))
    return f"torch.compile failed, so training runs uncompiled, slower on GPUs: {reason}"
