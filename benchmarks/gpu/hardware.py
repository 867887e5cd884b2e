"""Sections that say what parts of a training reach alone: attention, the mix, sums over GPUs, and
the tokenizing of text on the CPUs."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import Row
from benchmarks.runner import Setup
from iiet.decoder import Decoder
from iiet.model.config import preset
from iiet.model.mix import Mix
from orchestrator.data.preparation import prepare
from orchestrator.data.store import TOKENIZER_NAME
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training.devices import compile_layers
from orchestrator.workspace.layout import open_workspace

REPETITIONS = 10


def median_seconds(task: Callable[[], object], device: str) -> float:
    """Return the median seconds of a task whose kernels run on a device, after three warm-ups."""
    times = []
    for _ in range(3 + REPETITIONS):
        started = time.perf_counter()
        task()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Return the bytes per second of copying a block, read and written."""
    block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    return 2 * num_bytes / median_seconds(lambda: target.copy_(block), device)


def kernels(setup: Setup) -> Iterator[Row]:
    """Time attention by each of PyTorch's backends, and the sums of the learned mix, both ways.

    Sizes are those of a pass of `paper-340m`. The bytes of the mix are those that have to move:
    each estimate is read once and each sum written once, and once more for the gradients.
    """
    device = setup.world.device
    config = preset("tiny" if setup.is_toy else "340m", schedule=1)
    num_sequences, num_tokens = (1, 64) if setup.is_toy else (8, config.context_length)
    yield from _attention(config.num_heads, config.head_dim, num_sequences, num_tokens, device)

    bandwidth = copy_bandwidth(device, 2**22 if setup.is_toy else 2**30)
    yield Row(what="copying a block", figures={"GB/s": bandwidth / 1e9})
    with torch.device(device):
        decoder = Decoder(config).train()
    mix: Mix = decoder.model.layers[-1].mix  # type: ignore[assignment]
    estimates = [
        torch.zeros(num_sequences, num_tokens, config.dim, device=device, requires_grad=True)
        for _ in range(config.num_layers)
    ]

    def sum_both_ways() -> None:
        points, hidden = mix.sums(estimates, corrects=True)
        assert points is not None, "the layer corrects"
        torch.autograd.backward([points.earlier, hidden.earlier], [gradient, gradient])
        for estimate in estimates:
            estimate.grad = None

    gradient = torch.zeros_like(estimates[0])
    # Forward: estimates and two sums; backward: two gradients and the estimates are read, and the
    # gradients of the estimates are written.
    num_moved = (config.num_layers + 2 + 2 + 2 * config.num_layers) * gradient.nbytes
    for form in ("eager",) if setup.is_toy else ("eager", "compiled"):
        if form == "compiled":
            compile_layers(decoder, lambda *_, **__: None)
        seconds = median_seconds(sum_both_ways, device)
        yield Row(
            what=f"sums of the mix, {config.num_layers} estimates, {form}",
            figures={
                "ms": 1e3 * seconds,
                "GB/s": num_moved / seconds / 1e9,
                "share of copying": num_moved / seconds / bandwidth,
            },
        )


def _attention(
    num_heads: int, head_dim: int, num_sequences: int, num_tokens: int, device: str
) -> Iterator[Row]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (num_sequences, num_heads, num_tokens, head_dim)
    queries, keys, values = (
        torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn_like(queries)

    def attend() -> None:
        mixed: Tensor = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        torch.autograd.grad(mixed, (queries, keys, values), gradient)

    # Two products forward and five backward, half of which a causal mask leaves out.
    num_flops = 7 * num_sequences * num_heads * num_tokens**2 * head_dim
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        what = f"attention, {backend.name.lower()}"
        try:
            with sdpa_kernel([backend]):
                seconds = median_seconds(attend, device)
        except RuntimeError as error:  # This device has no such kernel.
            yield Row(what=what, skipped=str(error).splitlines()[0])
            continue
        yield Row(what=what, figures={"ms": 1e3 * seconds, "TFLOP/s": num_flops / seconds / 1e12})


def network(setup: Setup) -> Iterator[Row]:
    """Sum blocks over all GPUs of this machine, as gradients are summed.

    Raises:
        Skipped: If there is one GPU.
    """
    on_gpus = setup.device == "cuda"
    number = setup.num_ranks
    sizes = [2**16] if setup.is_toy else [2**20, 25 * 2**20, 2**30]
    for size in sizes:
        answer = setup.folder / f"all-reduce-{size}.json"
        meeting = setup.folder / f"meeting-{size}"
        arguments = (number, on_gpus, size, str(meeting), str(answer))
        multiprocessing: Any = torch.multiprocessing
        multiprocessing.spawn(_sum_blocks, arguments, nprocs=number)
        seconds = json.loads(answer.read_text(encoding="utf-8"))
        # What each link carries, whatever the number of GPUs.
        carried = 2 * (number - 1) / number * size
        yield Row(
            what=f"all-reduce of {size / 2**20:.3g} MiB over {number}",
            figures={"ms": 1e3 * seconds, "GB/s of each link": carried / seconds / 1e9},
        )


def _sum_blocks(
    rank: int, number: int, on_gpus: bool, size: int, meeting: str, answer: str
) -> None:
    device = f"cuda:{rank}" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=number,
        device_id=torch.device(device) if on_gpus else None,
    )
    block = torch.zeros(size // 4, device=device)
    seconds = median_seconds(lambda: dist.all_reduce(block), device)
    if rank == 0:
        Path(answer).write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


def tokenizing(setup: Setup) -> Iterator[Row]:
    """Tokenize made-up documents by `prepare`, in all processes that it uses."""
    lines = [line for text in topics.values() for line in text.splitlines() if line.strip()]
    draw = random.Random(0)
    file = setup.folder / "made-up.jsonl"
    num_bytes = 0
    with file.open("w", encoding="utf-8") as stream:
        while num_bytes < (200_000 if setup.is_toy else 200_000_000):
            text = "\n".join(draw.choices(lines, k=50))
            num_bytes += len(text.encode())
            stream.write(json.dumps({"text": text}) + "\n")
    data = DataSettings(
        source="files",
        files=(str(file),),
        tokenizer=str(setup.tokens() / TOKENIZER_NAME),
        validation_fraction=0.01,
    )
    started = time.perf_counter()
    prepare(data, open_workspace(setup.folder / "tokenizing"), Progress())
    seconds = time.perf_counter() - started
    yield Row(
        what=f"{num_bytes / 1e6:.3g} MB of text",
        figures={"CPUs": os.cpu_count() or 1, "MB/s": num_bytes / seconds / 1e6},
    )
