"""Decoding at batch 1 against the memory bandwidth, and whether the L2 cache keeps a layer.

Tokens are decoded as `generate` does it, by CUDA graphs on a GPU, and must be those that the full
forward pass finds likeliest. A step has to read the weights of each evaluation, and its keys and
values. The bound is these bytes (`iiet/cost.py`) divided by the bandwidth, which is measured here.

An IIET evaluates a layer 1 + r times in a row: if the layer's weights stay in the L2 cache, a
correction costs less than a prediction. The rows `matrices only` measure that without anything
else. A correction that takes less time than its weights take from memory proves it; small kernels
take longer than both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.decoded_tokens import largest_regret
from benchmarks.gpu.bandwidth import bytes_per_second, seconds_to_read
from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.setup import Setup
from iiet.config import preset
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from orchestrator.evaluation.decode_timing import decode_milliseconds, random_prompt, threads

CORRECTIONS = 3
GAIN = 0.9
"""A correction that takes less than this share of a prediction gains from the cache."""
REGRET_TOLERANCE = 0.1
"""By how much the logit of a decoded token may be below the largest: bf16 rounds by about 0.01."""
_PROMPT, _NEW = 128, 128
_TOY_PROMPT, _TOY_NEW = 8, 8
# Eight layers of the largest size show the same as all.
_SIZES: dict[str, dict[str, Any]] = {"55m": {}, "340m": {}, "1.3b": {"num_layers": 8}}
_TOY = {"num_layers": 2, "dim": 32, "num_heads": 2, "ffn_dim": 64, "vocab_size": 400}
_COPIED_BYTES, _TOY_COPIED_BYTES = 2**30, 2**22


def decoding(setup: Setup) -> Iterator[Finding]:
    """Time decoding under r = 0 and r = 3 for each size, and the reading of its weights."""
    device = setup.world.device
    copied = _TOY_COPIED_BYTES if setup.is_toy else _COPIED_BYTES
    bandwidth = bytes_per_second(device, copied)
    yield Finding(what="memory bandwidth, by copying", figures={"GB/s": bandwidth / 1e9})
    sizes = {"tiny": _TOY} if setup.is_toy else _SIZES
    for name, changes in sizes.items():
        config = preset(name, schedule=CORRECTIONS, **changes)
        label = f"{name}, {config.num_layers} layers"
        with torch.device(device):
            decoder = Decoder(config).to(torch.bfloat16).eval()
        yield _tokens(label, decoder, new=_TOY_NEW if setup.is_toy else _NEW)
        yield from _decode(setup, label, decoder, bandwidth)
        yield _matrices(setup, label, decoder, bandwidth)


def _tokens(label: str, decoder: Decoder, new: int) -> Finding:
    """Compare decoded tokens with those of the full forward pass."""
    regret = largest_regret(decoder, random_prompt(decoder, 1, new), new)
    return Finding(
        what=f"{label}, decoded tokens",
        figures={"logits below the largest (std)": regret, "tolerance": REGRET_TOLERANCE},
        # A comparison with NaN is false.
        problem=None if regret <= REGRET_TOLERANCE else "they are not the full forward's",
    )


def _decode(setup: Setup, label: str, decoder: Decoder, bandwidth: float) -> Iterator[Finding]:
    prompt, new = (_TOY_PROMPT, _TOY_NEW) if setup.is_toy else (_PROMPT, _NEW)
    none = decoder.schedule.none(decoder.config.num_layers)
    decoders = {"r = 0": decoder.with_schedule(none), f"r = {CORRECTIONS}": decoder}
    with threads(1):
        timings = decode_milliseconds(
            decoders, prompt_tokens=prompt, new_tokens=new, repetitions=3 if setup.is_toy else 7
        )
    before: tuple[float, int] | None = None
    for name, one in decoders.items():
        cost = inference_cost(one.config, context_length=prompt + new // 2, bytes_per_value=2)
        read = cost.weight_bytes_per_token + cost.kv_bytes_read_per_token
        milliseconds, evaluations = timings[name].median, cost.evaluations_per_token
        bound = 1e3 * read / bandwidth
        figures: dict[str, Figure] = {
            "ms/token": milliseconds,
            "bound (ms)": bound,
            "share of the bound": bound / milliseconds,
            "us/evaluation": 1e3 * milliseconds / evaluations,
        }
        if before:  # What corrections add to r = 0.
            added = evaluations - before[1]
            figures["us/correction"] = 1e3 * (milliseconds - before[0]) / added
        before = milliseconds, evaluations
        yield Finding(what=f"{label}, {name}", figures=figures)


def _matrices(setup: Setup, label: str, decoder: Decoder, bandwidth: float) -> Finding:
    layers = [[p for p in field.parameters() if p.dim() == 2] for field in decoder.fields]
    layer_bytes = sum(matrix.nbytes for matrix in layers[0])
    repetitions = 3 if setup.is_toy else 20
    device = setup.world.device
    once = seconds_to_read(layers, 1, device, repetitions=repetitions)
    often = seconds_to_read(layers, 1 + CORRECTIONS, device, repetitions=repetitions)
    prediction, correction = once / len(layers), (often - once) / (CORRECTIONS * len(layers))
    return Finding(
        what=f"{label}, matrices only",
        figures={
            "MB of a layer": layer_bytes / 1e6,
            "us/evaluation": 1e6 * often / ((1 + CORRECTIONS) * len(layers)),
            "us/prediction": 1e6 * prediction,
            "us/correction": 1e6 * correction,
            "us from memory": 1e6 * layer_bytes / bandwidth,
            "correction / prediction": correction / prediction,
            "the cache saves time": "yes" if correction < GAIN * prediction else "no",
        },
    )
