"""Load a model of transformers, a looped one at a depth, and compare what runs with its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.evaluation.tasks import suppress_output
from orchestrator.models.hub import offline
from orchestrator.models.loops import Depth, LoopedModel
from orchestrator.workspace.errors import UserError, first_line

NUM_TOKENS = 8
"""Tokens that a model reads when it is checked."""
SEED = 0
"""Seed of the states that a model starts at random, in each forward pass."""


@contextmanager
def watched(model: nn.Module, loops: LoopedModel) -> Iterator[tuple[list[nn.Module], list[Tensor]]]:
    """Yield lists that fill while a model runs: the layers that ran, the states after each loop.

    Raises:
        UserError: If the model has no module of a path that its class names.
    """
    ran: list[nn.Module] = []
    states: list[Tensor] = []

    def add_layer(layer: nn.Module, *_: Any) -> None:
        ran.append(layer)

    def add_state(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks: list[Any] = []
    try:
        try:
            for path in loops.layers:
                for layer in model.get_submodule(path).children():
                    hooks.append(layer.register_forward_hook(add_layer))
            hooks.append(model.get_submodule(loops.loop_end()).register_forward_hook(add_state))
        except AttributeError as error:
            raise UserError(f"it is not built as {type(loops).__name__} says: {error}") from None
        yield ran, states
    finally:
        for hook in hooks:
            hook.remove()


def check_loops(model: Any, loops: LoopedModel, depth: Depth) -> None:
    """Run a model on a few tokens, and compare what ran with what its class says.

    Raises:
        UserError: If the number of layer runs, of layers with their own weights, of loops, or of
            numbers in the cache differs; says both.
    """
    tokens = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device=model.device)
    with torch.no_grad(), watched(model, loops) as (ran, states):
        output = model(tokens, use_cache=True)
    cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)
    own = {next(layer.parameters()).data_ptr() for layer in ran}
    pairs = {
        "layer runs of a token": (loops.layer_runs(depth), len(ran)),
        "layers with weights of their own": (loops.num_layers, len(own)),
        "loops": (depth[0], len(states)),
    }
    if slots := getattr(cache, "layers", None):
        stored = sum(slot.keys.numel() + slot.values.numel() for slot in slots) // NUM_TOKENS
        pairs["numbers that a token adds to the cache"] = (loops.kv_numbers(depth), stored)
    if wrong := [
        f"{found} {n} instead of {due}" for n, (due, found) in pairs.items() if due != found
    ]:
        shown = ",".join(map(str, depth))
        raise UserError(
            f"at depth {shown} it does not run as {type(loops).__name__} says: {', '.join(wrong)}"
        )


def load_transformers(
    folder: Path,
    loops: LoopedModel | None = None,
    depth: Depth | None = None,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> Any:
    """Load a model of transformers, a looped one at a depth, and check that it runs so.

    Missing weights are an error; transformers would fill them with random numbers and only warn.

    Raises:
        UserError: If transformers cannot load it, it needs code that is not trusted, weights are
            missing, or it does not run as its class says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with suppress_output(), offline():
            if loops and depth:
                # Of a model that sees pictures, the part that reads text.
                config: Any = AutoConfig.from_pretrained(folder, **options).get_text_config()
                for name, value in loops.changes(depth).items():
                    setattr(config, name, value)
                options["config"] = config
            model, found = load(folder, dtype="auto", output_loading_info=True, **options)
    except Exception as error:  # Its files, and code that comes with them, fail in many ways.
        line, hint = first_line(error), ""
        if "trust_remote_code" in str(error):
            line, hint = "it needs code in the folder", "; --trust-remote-code runs it"
        raise UserError(f"transformers cannot load {folder}: {line}{hint}") from None
    if missing := sorted(found.get("missing_keys", ())):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the weights in {folder} are not complete: {missing[0]}{more} missing")
    model = model.to(device).eval()
    if loops and depth:
        if loops.starts_at_random:
            model.forward = _seeded(model.forward)
        try:
            check_loops(model, loops, depth)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    model.config.use_cache = False  # Scoring would fill a cache and discard it.
    return model


def _seeded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)  # transformers reads its arguments.
    def seeded(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return forward(*args, **options)

    return seeded
