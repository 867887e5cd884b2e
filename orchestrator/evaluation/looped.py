"""Run models with transformers: load them, decode with looped ones at a depth, and count FLOPs.

Each loaded looped model runs once on a few tokens. The layers that ran are compared with its class
in `models.loops`, from which costs and plans are computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iiet.cost import InferenceCost
from orchestrator.evaluation.tasks import suppress_output
from orchestrator.models.hub import offline
from orchestrator.models.loops import Depth, LoopedModel
from orchestrator.models.open import OpenedModel
from orchestrator.workspace.errors import UserError, first_line

NUM_TOKENS = 8
"""Tokens of the check of a model."""
SEED = 0
"""Seed of the random initial states of a model, set in each forward pass."""


@contextmanager
def _watch_loops(
    model: nn.Module, loops: LoopedModel
) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
    """Yield two lists that fill while a model runs: its layers, and the modules that end loops.

    Raises:
        UserError: If the model lacks a module that its class names.
    """
    ran: list[nn.Module] = []
    ended: list[nn.Module] = []
    hooks: list[Any] = []
    try:
        stacks = [model.get_submodule(path) for path in loops.layers]
        for layer in (layer for stack in stacks for layer in stack.children()):
            hooks.append(layer.register_forward_hook(lambda layer, *_: ran.append(layer)))
        loop_end = model.get_submodule(loops.loop_end())
        hooks.append(loop_end.register_forward_hook(lambda module, *_: ended.append(module)))
    except AttributeError as error:
        raise UserError(f"it is not built as {type(loops).__name__} says: {error}") from None
    try:
        yield ran, ended
    finally:
        for hook in hooks:
            hook.remove()


def check_loops(model: Any, loops: LoopedModel, depth: Depth) -> None:
    """Run a model on a few tokens, and compare the layers that ran with its class.

    Raises:
        UserError: If the number of layer runs, of layers with their own weights, of loops, or of
            numbers in the cache differs; names both numbers.
    """
    tokens = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device=model.device)
    with torch.no_grad(), _watch_loops(model, loops) as (ran, ended):
        output = model(tokens, use_cache=True)
    distinct_weights = {next(layer.parameters()).data_ptr() for layer in ran}
    # What is counted -> number by the class, and number that ran.
    counts = {
        "layer runs of a token": (loops.layer_runs(depth), len(ran)),
        "layers with weights of their own": (loops.num_layers, len(distinct_weights)),
        "loops": (depth[0], len(ended)),
    }
    if slots := getattr(_cache_of(output), "layers", None):
        num_cached = sum(slot.keys.numel() + slot.values.numel() for slot in slots)
        per_token = num_cached // NUM_TOKENS
        counts["numbers that a token adds to the cache"] = (loops.kv_numbers(depth), per_token)
    differences = [
        f"{counted} {noun} instead of {expected}"
        for noun, (expected, counted) in counts.items()
        if expected != counted
    ]
    if differences:
        shown_depth = ",".join(map(str, depth))
        raise UserError(
            f"at depth {shown_depth} it does not run as {type(loops).__name__} says: "
            f"{', '.join(differences)}"
        )


def _cache_of(output: Any) -> Any:
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


def load_transformers(
    opened: OpenedModel,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model of transformers; check that a looped one runs at its depth.

    Missing weights are an error; transformers would fill them with random numbers and only warn.

    Args:
        dtype: Of weights and arithmetic; that of the files when unset.

    Raises:
        UserError: If transformers cannot load it, it needs code that is not trusted, weights are
            missing, or it does not run as its class says.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = opened.path
    loops = opened.loops
    depth = opened.depth
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with suppress_output(), offline():
            if loops and depth:
                # The text part of a model that also reads pictures.
                config: Any = AutoConfig.from_pretrained(folder, **options).get_text_config()
                for name, value in loops.changes(depth).items():
                    setattr(config, name, value)
                options["config"] = config
            model, info = load(folder, dtype=dtype or "auto", output_loading_info=True, **options)
    except Exception as error:  # Files, and the code in them, fail in many ways.
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code in the folder; --trust-remote-code runs it"
        raise UserError(f"transformers cannot load {folder}: {reason}") from None
    if missing := sorted(info.get("missing_keys", ())):
        and_others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the weights in {folder} are not complete: {missing[0]}{and_others} missing"
        )
    # PyTorch's counter of FLOPs looks for the gradient function of an input that needs a gradient.
    model = model.to(device).eval().requires_grad_(False)
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


class LoopedDecoder:
    """A looped model at a depth, with the decoding and cost interface of this project's decoders.

    Args:
        opened: The model.
        shares_with: The same model at another depth, to share its weights.

    Raises:
        UserError: As `load_transformers`.
    """

    def __init__(
        self,
        opened: OpenedModel,
        *,
        trust_remote_code: bool = False,
        device: str = "cpu",
        shares_with: LoopedDecoder | None = None,
    ) -> None:
        self.loops, self.depth = opened.looped()
        self.model = load_transformers(opened, trust_remote_code=trust_remote_code, device=device)
        self.device = self.model.device
        self.parameters = self.model.parameters
        if shares_with is not None:
            others = shares_with.parameters()
            for parameter, shared in zip(self.parameters(), others, strict=False):
                parameter.data = shared.data
        self.config = SimpleNamespace(
            context_length=opened.context_length, vocab_size=self.loops.number("vocab_size")
        )

    def stream(self, prompt: Tensor, new_tokens: int) -> Iterator[Tensor]:
        """Yield the likeliest next token of each row, with the cache."""
        names = inspect.signature(self.model.forward).parameters
        name = "cache" if "cache" in names else "past_key_values"  # Before transformers 5.
        tokens = prompt
        cache = None
        for _ in range(new_tokens):
            with torch.inference_mode():
                output = self.model(tokens, use_cache=True, **{name: cache})
                tokens = output.logits[:, -1:].argmax(-1)
                cache = _cache_of(output)
            yield tokens[:, 0]

    @cached_property
    def _flops(self) -> tuple[float, float]:
        return count_flops(self.model)

    def cost(self, *, context_length: int | None = None, bytes_per_value: int = 4) -> InferenceCost:
        """Return the model's cost, as `iiet.cost.inference_cost` defines it.

        The bytes of weights that are read are unknown. A layer with windowed attention is counted
        as one that attends to the whole context.
        """
        length = context_length or self.config.context_length
        flops_alone, flops_per_token_seen = self._flops
        head = 2 * self.loops.number("hidden_size", "n_embd") * self.config.vocab_size
        # On average, a token attends to half of the text.
        forward = flops_alone + flops_per_token_seen * (length + 1) / 2
        kv_bytes = bytes_per_value * self.loops.kv_numbers(self.depth)
        return InferenceCost(
            evaluations_per_token=self.loops.layer_runs(self.depth),
            forward_flops_per_token=forward,
            prefill_flops_per_token=forward - head + head / length,
            decode_flops_per_token=flops_alone + flops_per_token_seen * length,
            kv_bytes_per_token=kv_bytes,
            kv_bytes_read_per_token=kv_bytes * length,
            weight_bytes_per_token=math.nan,
            num_parameters=sum(parameter.numel() for parameter in self.parameters()),
        )


def count_flops(model: Any) -> tuple[float, float]:
    """Return the FLOPs of a token's matrix products, and of its attention to one other token.

    They are computed from the FLOPs of texts of three lengths, in which each token attends to all:
    a text of n tokens takes `n a + n^2 b`, plus what does not depend on its length.
    """
    counts = []
    for length in (2, 4, 6):
        tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
        counter = FlopCounterMode(display=False, custom_mapping=_EXPERTS)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(tokens, use_cache=False)
        counts.append(counter.get_total_flops())
    of_two, of_four, of_six = counts
    per_token_seen = (of_six - 2 * of_four + of_two) / 8
    return (of_four - of_two) / 2 - 6 * per_token_seen, per_token_seen


def _expert_flops(tokens: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * int(math.prod(tokens) * weights[-1])


_EXPERTS: dict[Any, Any] = {torch.ops.aten._grouped_mm: _expert_flops}
