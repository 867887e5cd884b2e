"""The numbers of the command: traces as plain values."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Literal

from benchmarks.gpu_model.device import pretended_gpu
from benchmarks.gpu_model.roofline import by_share, total_seconds, utilization
from benchmarks.gpu_model.steps import decoding, training_step
from benchmarks.gpu_model.trace import Kernel, Trace, count_places
from iiet.config import ModelConfig, preset
from iiet.cost import inference_cost, training_flops_per_token
from iiet.training_memory import training_memory


def estimate(options: Namespace) -> list[dict[str, Any]]:
    """Trace what the command's options ask for."""
    overrides = {} if options.layers is None else {"num_layers": options.layers}
    config = preset(options.preset, method=options.method, **overrides)
    name = f"{options.preset} {options.method} {options.precision}"
    with pretended_gpu():
        if options.decode:
            trace = decoding(config, num_tokens=options.decode)
            numbers = _numbers(trace, trace.kernels)
            return [{"what": f"{name}, {options.decode} tokens decoded", **numbers}]
        return [
            _training(f"{name}, {way}", config, options, is_compiled=way == "compiled")
            for way in ("eager", "compiled")
        ]


def _training(
    name: str, config: ModelConfig, options: Namespace, *, is_compiled: bool
) -> dict[str, Any]:
    teacher = None
    if options.distill is not None:
        teacher = config
        config = preset(
            options.preset,
            method=options.method,
            num_layers=config.num_layers,
            schedule=options.distill,
        )
        name += f", distillation to r = {options.distill}"
    precision: Literal["bf16", "fp32"] = options.precision
    trace = training_step(
        config,
        num_sequences=options.sequences,
        num_passes=options.passes,
        teacher=teacher,
        precision=precision,
        activation_checkpointing=options.checkpointing,
        compile=is_compiled,
    )
    plan = training_memory(
        config,
        num_sequences=options.sequences,
        precision=precision,
        on_gpus=True,
        activation_checkpointing=options.checkpointing,
        num_passes=options.passes,
        has_teacher=teacher is not None,
    )
    passes = [kernel for kernel in trace.kernels if kernel.phase != "update"]
    flops = training_flops_per_token(config)
    if teacher:
        flops += inference_cost(teacher).forward_flops_per_token
    tokens = options.passes * options.sequences * config.context_length
    return {
        "what": f"{name}, {options.passes} x {options.sequences} sequences",
        **_numbers(trace, passes),
        "mfu": utilization(flops * tokens, passes),
        "planned_gib": plan.total / 2**30,
        "update_kernels": trace.num_launches - sum(kernel.launches for kernel in passes),
        "update_milliseconds": 1e3 * (total_seconds(trace.kernels) - total_seconds(passes)),
    }


def _numbers(trace: Trace, kernels: list[Kernel]) -> dict[str, Any]:
    return {
        "kernels": sum(kernel.launches for kernel in kernels),
        "milliseconds": 1e3 * total_seconds(kernels),
        "gigabytes": sum(kernel.num_bytes for kernel in kernels) / 1e9,
        "peak_gib": trace.peak_bytes / 2**30,
        "waits": len(trace.waits),
        "waits_by_place": count_places(trace.waits),
        "copies_to_gpu": count_places(trace.copies_to_gpu),
        "products": _by_dtype(kernel for kernel in kernels if kernel.is_product),
        "attention": _by_dtype(kernel for kernel in kernels if kernel.is_attention),
        "by_kernel": _lines(by_share(kernels, lambda kernel: kernel.name)),
        "by_place": _lines(by_share(kernels, lambda kernel: f"{kernel.phase:8} {kernel.place}")),
    }


def _by_dtype(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Sum the FLOPs of kernels by type."""
    flops: dict[str, float] = {}
    for kernel in kernels:
        name = str(kernel.dtype).removeprefix("torch.")
        flops[name] = flops.get(name, 0.0) + kernel.flops
    return flops


def _lines(shares: dict[str, tuple[int, float, float]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "launches": n, "gigabytes": moved / 1e9, "milliseconds": 1e3 * time}
        for name, (n, moved, time) in shares.items()
    ]
