"""Kernels, types and waits of a training step on a GPU, counted on a machine without one.

Fake tensors know their device and have no values. A library of a few lines tells PyTorch's CPU
build that a GPU exists, so the training loop runs as it would there; each operation that reaches
the GPU counts as one kernel. The library changes its whole process: this file runs itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from bare_trainer import BareTrainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iiet import Decoder, ModelConfig, preset
from iiet.model.batch import Batch
from orchestrator.planning.training_memory import TrainingStep, training_memory
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import HostBuffers
from orchestrator.training.objective import make_objective, make_optimizer
from orchestrator.training.world import World

COMPILER = os.environ.get("CXX") or "g++"
GPU = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

constexpr auto CUDA = c10::DeviceType::CUDA;

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return {CUDA, 0}; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream({CUDA, 0}); }
};

struct Driver : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

template <typename... Anything>
int64_t flash(Anything...) { return int64_t(at::SDPBackend::flash_attention); }

namespace at {
struct CUDAHooks : Driver { explicit CUDAHooks(CUDAHooksArgs) {} };
REGISTER_CUDA_HOOKS(CUDAHooks);
}

extern "C" void add_gpu() {
  static OneDevice device;
  static c10::impl::DeviceGuardImplRegistrar registrar(CUDA, &device);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&flash);
}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no C++ compiler ({COMPILER})"),
    pytest.mark.skipif(bool(torch.version.cuda), reason="this PyTorch looks for a real GPU"),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Run `main` in a process of its own and return what it counted, by case."""
    folder = tmp_path_factory.mktemp("gpu")
    source = folder / "gpu.cpp"
    library = folder / "gpu.so"
    source.write_text(GPU)
    files = Path(torch.__file__).parent
    flags = ["-O0", "-w", "-std=c++20", "-shared", "-fPIC", f"-I{files}/include"]
    link = [f"-L{files}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{files}/lib"]
    subprocess.run([COMPILER, *flags, source, "-o", library, *link], check=True)
    # PyTorch asks for devices while it is imported.
    start = f"import ctypes, runpy; ctypes.CDLL({str(library)!r}); "
    start += f"runpy.run_path({__file__!r}, run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", start, str(library)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    counted: dict[str, dict[str, Any]] = json.loads(process.stdout)
    return counted


@pytest.mark.parametrize(
    ("case", "num_attentions", "num_norms", "most_kernels"),
    [
        # Two passes over two layers with four evaluations, forward and backward.
        ("training", 2 * 2 * 8, 2 * 2 * (2 * 8 + 1), 2040),
        # A pass of the teacher's eight evaluations, forward; the student's four, both ways.
        ("distillation", 8 + 2 * 4, 2 * 8 + 1 + 2 * (2 * 4 + 1), 1175),
    ],
)
def test_a_step_waits_once_and_computes_in_bfloat16(
    case, num_attentions, num_norms, most_kernels, steps
):
    """`most_kernels` is 3 % above what was counted when the test was written."""
    step = steps[case]

    def launches(word: str) -> int:
        return sum(number for name, number in step["names"].items() if word in name)

    assert step["num_waits"] == 1
    assert launches("flash_attention") == num_attentions
    assert launches("_fused_rms_norm") == num_norms
    assert launches("adam") >= 1
    assert step["products"].keys() == {"torch.bfloat16"}
    assert sum(step["names"].values()) <= most_kernels


def test_the_host_waits_for_no_copy_of_a_checkpoint_and_uses_its_pinned_memory_again(steps):
    assert steps["checkpoints"] == {
        "num_waits": 0,
        "copies_per_tensor": 2,
        "pinned_per_tensor": 1,
        "is_same_memory": True,
    }


def test_the_plan_of_a_step_without_a_compiler_is_its_peak(steps):
    config = preset("340m", num_layers=2)
    plan = training_memory(
        config, TrainingStep(num_sequences=4, precision="bf16", on_gpus=True, forms="plain")
    )
    assert steps["training"]["peak"] == pytest.approx(sum(plan.values()), rel=0.05)


VIEWS = {"_unsafe_view", "detach", "alias", "lift_fresh", "_reshape_alias"}
"""Views that PyTorch does not mark as such."""
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Kernels(TorchDispatchMode):
    """Counts operations on the GPU, multiplications by type, waits for values of the GPU, and the
    memory of its tensors."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.num_waits = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, storage._cdata)
            self.peak = max(self.peak, sum(self._sizes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        kwargs = kwargs or {}
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        is_fake = any(isinstance(value, FakeTensor) for value in inputs)
        if not is_fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():  # The host's own numbers are real.
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.num_waits += inputs[0].is_cuda
            return 1.0  # No value exists.
        result = func(*args, **kwargs)
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if not any(value.is_cuda for value in inputs + outputs):
            return result
        for value in outputs:
            if value.is_cuda:
                self._note(value)
        if name in ("_to_copy", "copy_") and not any(value.is_cuda for value in outputs):
            self.num_waits += not (kwargs.get("non_blocking", False) or args[2:] == (True,))
        if not (func.is_view or name in VIEWS or "empty" in name or name.startswith("prim::")):
            self.names[name] += 1
            if name in PRODUCTS:
                # With "add", the first matrix is the one to which the product is added.
                left, right = inputs[1:3] if "add" in name else inputs[:2]
                self.products[str(right.dtype)] += outputs[0].numel() * left.size(-1)
        return result


def read_at_once(tensor: Tensor) -> Any:
    """Read a tensor by one copy, as a real one does; a fake tensor waits for each value."""
    tensor = tensor.cpu()
    return [read_at_once(part) for part in tensor.unbind()] if tensor.dim() else tensor.item()


def decoder_on_gpu(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a decoder whose parameters are fake tensors on the GPU."""
    with unset_fake_temporarily(), torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    for module in decoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cuda"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return decoder


def main(library: str) -> None:
    """Print by case what the second step of a training has: two passes, or a distillation's one."""
    ctypes.CDLL(library).add_gpu()
    fused = torch.library.Library("aten", "IMPL")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):  # A CPU has no such kernels.
        fused.impl(name, lambda *_: None, "CUDA")
    counts = {case: counted(case) for case in ("training", "distillation")}
    print(json.dumps({**counts, "checkpoints": counted_checkpoints()}))


def counted_checkpoints() -> dict[str, Any]:
    """Count what two copies of a decoder's weights to the host's memory have together."""
    num_pinned = 0
    empty = torch.empty

    def pretend_pinned(*sizes: Any, pin_memory: bool, **options: Any) -> Tensor:
        nonlocal num_pinned
        num_pinned += pin_memory
        return empty(*sizes, **options)

    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = decoder_on_gpu(preset("tiny"))
        buffers = HostBuffers(is_pinned=True)
        with Kernels() as kernels, patch.object(torch, "empty", pretend_pinned):
            first, second = (buffers.copy(decoder.state_dict()) for _ in range(2))
    num_tensors = len(list(decoder.parameters()))
    return {
        "num_waits": kernels.num_waits,
        "copies_per_tensor": kernels.names["copy_"] / num_tensors,
        "pinned_per_tensor": num_pinned / num_tensors,
        "is_same_memory": all(first[name] is second[name] for name in first),
    }


def counted(case: str) -> dict[str, Any]:
    """Count the second step of a case."""
    config = preset("340m", num_layers=2)
    num_passes = 2
    teacher = None
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (FakeTensor, "tolist", read_at_once),
            # Lists of tensors are updated by one kernel if their class is known.
            (_foreach_utils, "_foreach_supported_types", [nn.Parameter, Tensor, FakeTensor]),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if case == "distillation":
            teacher = decoder_on_gpu(config, torch.bfloat16).requires_grad_(False).eval()
            config = preset("340m", num_layers=2, schedule=1)
            num_passes = 1
        recipe = TrainingSettings(
            num_steps=2,
            num_sequences_per_pass=4,
            num_tokens_per_step=num_passes * 4 * config.context_length,
            iterate_from_fraction=0.0,
            precision="bf16",
        )
        decoder = decoder_on_gpu(config)
        optimizer = make_optimizer(decoder, recipe)
        for parameter in decoder.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # Makes the moments.
        optimizer.zero_grad(set_to_none=True)
        shape = (num_passes * 4, config.context_length)
        trainer = BareTrainer(
            decoder,
            make_objective(lambda _: config.corrections, teacher),
            recipe,
            optimizer=optimizer,
            batch=lambda _: Batch.of_text(torch.zeros(shape, dtype=torch.int64)),
            world=World(device="cuda:0"),
            step=1,
        )
        moments = [value for state in optimizer.state.values() for value in state.values()]
        with Kernels(*decoder.parameters(), *moments) as kernels:
            trainer.train()
    return {name: getattr(kernels, name) for name in ("names", "products", "num_waits", "peak")}


if __name__ == "__main__":
    main(*sys.argv[1:])
