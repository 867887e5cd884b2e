"""How much memory a piece of work takes at its peak, in bytes that PyTorch's allocator handed out.

On a GPU the allocator keeps that number itself. On a CPU it is added up from the allocator's own
events, each of which says how many bytes were taken or given back. The obvious other way, the
resident size of the process, depends on what the C library kept from earlier work, and is no
property of the model. What lived before counts as nothing: add the weights to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

HOW_MEASURED = "bytes that PyTorch's allocator handed out at once, weights included"


def peak_bytes(work: Callable[[], None], device: torch.device | str = "cpu") -> int:
    """Return the most bytes that were allocated at once during the work, beyond those before it.

    Args:
        work: Run once.
        device: Where it allocates.
    """
    device = torch.device(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    results = record.profiler.kineto_results if record.profiler else None
    assert results is not None, "a profile that has ended has results"
    # The public tables sum over operations and lose the order, in which alone there is a peak.
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    live = most = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        live += num_bytes
        most = max(most, live)
    return most
