"""Times of work on the device alone: memory bandwidth, and reading the weights of layers.

On a GPU the work is captured as a CUDA graph, so that starting kernels takes no time. Times are the
best of several: nothing can make memory faster than it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_WARM_UPS = 3


def best_seconds(work: Callable[[], None], device: str, *, repetitions: int = 20) -> float:
    """Return the shortest time of some work: of a CUDA graph of it, or of the call on a CPU."""
    if device == "cpu":
        times = []
        for _ in range(NUM_WARM_UPS + repetitions):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times[NUM_WARM_UPS:])
    cuda: Any = torch.cuda  # Parts of it have no types.
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # Capture requires warm-ups on another stream.
        for _ in range(NUM_WARM_UPS):
            work()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        work()
    times = []
    for _ in range(NUM_WARM_UPS + repetitions):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times[NUM_WARM_UPS:])


def bytes_per_second(device: str, num_bytes: int) -> float:
    """Measure the memory bandwidth by copying a block, which reads and writes it once."""
    block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)

    def copy() -> None:
        target.copy_(block)

    return 2 * num_bytes / best_seconds(copy, device)


def seconds_to_read(
    layers: Sequence[Sequence[Tensor]], times_each: int, device: str, *, repetitions: int = 20
) -> float:
    """Multiply each layer's matrices with a vector, `times_each` times in a row for each layer.

    This is the part of decoding that reads weights: a layer's evaluations follow each other, and
    find its matrices in the processor's cache if they fit.
    """
    vectors = {
        matrix.size(1): torch.randn(matrix.size(1), device=device, dtype=matrix.dtype)
        for matrices in layers
        for matrix in matrices
    }

    def read() -> None:
        for matrices in layers:
            for _ in range(times_each):
                for matrix in matrices:
                    torch.mv(matrix, vectors[matrix.size(1)])

    with torch.inference_mode():
        return best_seconds(read, device, repetitions=repetitions)
