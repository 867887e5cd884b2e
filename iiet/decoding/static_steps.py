"""Decode on a GPU by CUDA graphs: a step is recorded once, and replayed for each token.

To decode one token, a GPU runs over a thousand kernels. Starting each of them takes the CPU longer
than the kernel runs. A CUDA graph is a recorded list of kernels that start together, always with
the same arguments and shapes. So values that change from token to token are stored on the device
(`iiet.model.cache.Window`), and attention reads the cache up to a multiple of `WINDOW` tokens.
There is one graph for each decoder (with its iteration schedule), batch size and multiple. A
decoder keeps the graphs that were used last, also after a generation.

A matrix product needs scratch memory, its workspace. PyTorch keeps one workspace per CUDA stream,
and frees it when any graph that was captured on the stream is destroyed (pytorch#193402); other
graphs would go on to write there. So the workspace is freed before and after each capture: each
graph then has a workspace in its own memory, which lives as long as the graph. All captures use
one stream, which nothing else uses: the streams that PyTorch would choose are shared.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from iiet.decoding.request import GenerativeModel
from iiet.model.cache import KeyValueCache, KvStrategy, Window
from iiet.model.fast import may_read_weights

__all__ = ["Capture", "StaticSteps", "capture_graph", "keep_steps", "kept_steps"]

WINDOW: Final = 256
"""Steps in tokens by which attention reads more of the cache."""
MIN_TOKENS: Final = 16
"""Steps that repay the capture of a graph, which takes as long as a few steps without it."""
MAX_GRAPHS: Final = 16
"""Graphs that a decoder keeps; another one replaces the least recently used."""
_ALIGNMENT: Final = 16  # A mask of another length would be copied by each call of attention.

Step = Callable[[], Tensor]
Capture = Callable[[Step, torch.device], Step]
_Shape = tuple[int, torch.dtype, KvStrategy, torch.device]


class StaticSteps:
    """Decodes with one decoder; later generations reuse the cache and the graphs.

    Args:
        decoder: under its own schedule.
        capture: makes a function that repeats a step's kernels; by default `capture_graph` on a
            GPU. Elsewhere, under autocast, and where a module has a hook, each step runs.
    """

    def __init__(self, decoder: GenerativeModel, *, capture: Capture | None = None) -> None:
        # Weak, so that memory kept for a decoder (`keep_steps`) goes with it.
        self._decoder = weakref.ref(decoder)
        if capture is None and decoder.device.type == "cuda":
            capture = capture_graph
        self._capture = capture
        self._buffers: _Buffers | None = None
        self._weights: list[int] = []
        """Addresses of the weights when a graph was captured, from which it reads them."""
        self._length = 0
        self._end = 0
        self._may_capture = False

    @property
    def decoder(self) -> GenerativeModel:
        """The decoder, which the caller must hold.

        Raises:
            ValueError: it is gone.
        """
        decoder = self._decoder()
        if decoder is None:
            raise ValueError("the decoder of these steps is gone; keep a reference to it")
        return decoder

    def empty_cache(
        self, *, batch_size: int, max_tokens: int, strategy: KvStrategy
    ) -> KeyValueCache:
        """Return a cache to fill with the prompt; then `begin` follows."""
        shape = (batch_size, self.decoder.cache_dtype, strategy, self.decoder.device)
        buffers = self._buffers
        if buffers is None or buffers.shape != shape or buffers.cache.max_tokens < max_tokens:
            # Both names are cleared, so that the old buffers are freed before new ones are made.
            buffers = None
            self._buffers = None
            max_tokens = math.ceil(max_tokens / _ALIGNMENT) * _ALIGNMENT
            buffers = _Buffers(self.decoder, shape, max_tokens)
            self._buffers = buffers
        buffers.cache.clear()
        return buffers.cache

    @torch.inference_mode()
    def begin(self, num_steps: int) -> None:
        """Prepare to continue the tokens in the cache by at most `num_steps` steps."""
        assert self._buffers is not None
        cache = self._buffers.cache
        self._length = cache.get_seq_length()
        self._end = self._length + num_steps
        # Unused tokens have no weight in attention, but zero times infinity is not zero.
        cache.zero_unused()
        cache.window = self._buffers.window
        cache.window.move(self._length, cache.attention_mask)
        self._may_capture = self._capture is not None and _can_capture(self.decoder)
        if not self._may_capture or _addresses(self.decoder) != self._weights:
            self._buffers.steps.clear()

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, (batch,); return the logits of the next, (batch, vocab).

        The next call overwrites them. Nothing here waits for the device.
        """
        assert self._buffers is not None
        assert self._length < self._end, "more steps than were announced"
        buffers = self._buffers
        window = buffers.window
        buffers.tokens.copy_(tokens.unsqueeze(1))
        needed = math.ceil((self._length + 1) / WINDOW) * WINDOW
        window.size = min(needed, buffers.cache.max_tokens)
        logits = self._step(window.size)()
        window.advance()
        self._length += 1
        buffers.cache.set_length(self._length)
        return logits

    def _step(self, size: int) -> Step:
        assert self._buffers is not None
        steps = self._buffers.steps
        num_left = min(size, self._end) - self._length
        if size not in steps and num_left >= MIN_TOKENS and self._may_capture:
            assert self._capture is not None
            self._weights = _addresses(self.decoder)
            try:
                steps[size] = self._capture(self.run, self.decoder.device)
            except RuntimeError as error:
                self._capture = None
                self._may_capture = False
                warnings.warn(
                    "decoding continues without CUDA graphs, and is slower, because capturing one "
                    f"failed: {error}",
                    stacklevel=2,
                )
        if size not in steps:
            return self.run
        step = steps.pop(size)
        steps[size] = step  # As the last entry, the most recently used one.
        if len(steps) > MAX_GRAPHS:
            del steps[next(iter(steps))]
        return step

    def run(self) -> Tensor:
        """Compute the step in the window, without graphs; doing it twice changes nothing."""
        assert self._buffers is not None
        logits = self.decoder(self._buffers.tokens, cache=self._buffers.cache, last_only=True)
        assert isinstance(logits, Tensor)
        return logits[:, -1]


class _Buffers:
    """What the graphs of one batch size read and write, and these graphs."""

    def __init__(self, decoder: GenerativeModel, shape: _Shape, max_tokens: int) -> None:
        self.shape = shape
        batch_size, dtype, strategy, device = shape
        self.cache = decoder.new_cache(
            batch_size=batch_size, max_tokens=max_tokens, strategy=strategy
        )
        self.window = Window(batch_size, max_tokens, dtype=dtype, device=device)
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.steps: dict[int, Step] = {}
        """By the size of the window, the least recently used first."""


_kept: weakref.WeakKeyDictionary[GenerativeModel, StaticSteps] = weakref.WeakKeyDictionary()


def kept_steps(decoder: GenerativeModel) -> StaticSteps:
    """Return the steps that the decoder's last generation left; new ones while another has them."""
    return _kept.pop(decoder, None) or StaticSteps(decoder)


def keep_steps(
    decoder: GenerativeModel, steps: StaticSteps, tokens: Iterator[Tensor]
) -> Iterator[Tensor]:
    """Yield the tokens of a generation; at its end, keep its steps for the decoder's next."""
    try:
        yield from tokens
    finally:
        _kept[decoder] = steps


def _addresses(decoder: GenerativeModel) -> list[int]:
    return [parameter.data_ptr() for parameter in decoder.parameters()]


def _can_capture(decoder: GenerativeModel) -> bool:
    """Return whether a step is kernels only, and reads weights that stay where they are."""
    return (
        may_read_weights()
        and not torch.is_autocast_enabled(decoder.device.type)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())
    )


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def capture_graph(step: Step, device: torch.device) -> Step:
    """Record the kernels of a step in a CUDA graph; return a function that launches them all.

    Raises:
        RuntimeError: a kernel cannot be captured, or memory is short.
    """
    with torch.cuda.device(device):
        side = _capture_stream(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # First calls choose kernels, which no graph may do.
        torch.cuda.current_stream().wait_stream(side)
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may use the device meanwhile, for instance to copy a batch.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                logits = step()
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
