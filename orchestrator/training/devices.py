"""Workers and devices of a training, precision, sharding, and compiled layers.

For one worker these functions do nothing. Workers agree on every number that decides what happens
next (stop, divergence, losses) before they act on it: a collective operation that one worker skips
hangs all others.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iiet.decoder import Decoder
from iiet.freezing import freeze, trained_part
from iiet.hf.weights import LazyTensor
from iiet.iiad.distillation import Model
from iiet.iiad.left_out import decoder_of_kept_layers
from iiet.methods.implicit_euler import MixedLayer
from iiet.model.config import ModelConfig
from iiet.model.context import make_context
from iiet.model.layers import initial_weights
from iiet.model.losses import next_token_loss
from iiet.model.schedule import IterationSchedule
from orchestrator.models.load import has_bf16, load_model, open_weights, use_tf32
from orchestrator.records.training import TrainingJob
from orchestrator.training.world import World
from orchestrator.workspace.errors import DeviceError, shortened

T = TypeVar("T")
ResultT = TypeVar("ResultT")
POLL_SECONDS = 0.1
_COMPILED_GRAPHS = {
    # Recompute cheap operations, as the uncompiled forms do: a fifth less memory for 3 % more
    # time (340M, estimated from its kernels). The plan of the memory assumes it.
    "ban_recompute_materialized_backward": False,
    # Compile the backward pass with the forward pass, so that both fail, or take long, together.
    "force_non_lazy_backward_lowering": True,
}


# What workers tell each other


def mean_over_workers(values: Mapping[str, float | Tensor], world: World) -> dict[str, float]:
    """Return the mean of each number over all workers, which pass the same names in the same order.

    Scalar tensors are read from the device together, so that the host waits for a GPU once.
    """
    host_names = [name for name, value in values.items() if not isinstance(value, Tensor)]
    device_names = [name for name in values if name not in host_names]
    numbers = torch.tensor([values[name] for name in host_names], dtype=torch.float64)
    if device_names or world.size > 1:
        numbers = numbers.to(world.device, non_blocking=True)
    if device_names:
        scalars = [torch.as_tensor(values[name], dtype=torch.float64) for name in device_names]
        numbers = torch.cat([numbers, torch.stack(scalars)])
    if world.size > 1:
        dist.all_reduce(numbers)
        numbers = numbers / world.size
    means = dict(zip(host_names + device_names, numbers.tolist(), strict=True))
    return {name: means[name] for name in values}


def gathered(value: T, world: World) -> list[T]:
    """Return the values of all workers, by rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_first(function: Callable[[], T], world: World) -> T:
    """Call a function on the first worker; return its result, or raise its error, on all.

    The others wait without a limit: saving, uploading or downloading may take longer than the limit
    of a collective operation, which is fixed when the group starts.
    """
    if world.size == 1:
        return function()
    store = dist.distributed_c10d._get_default_store()
    key = f"finished {store.add(f'calls of {world.rank}', 1)}"
    answer: list[Any] = [None, None]
    if world.is_first:
        try:
            answer[0] = function()
        except Exception as error:  # Raised below, on every worker.
            answer[1] = error
        store.set(key, "")
    while not store.check([key]):
        time.sleep(POLL_SECONDS)
    dist.broadcast_object_list(answer, src=0)
    result, problem = answer
    if problem is not None:
        raise problem
    return cast("T", result)


# Replicas and shards of a model


class Replicas:
    """The replicas of a decoder on all workers (DDP), whose backward passes average gradients.

    A schedule without corrections in a layer leaves the norm of its corrections unused. DDP can
    look for unused parameters in each pass; but then gradients do not stay in the buckets that it
    sends, and several passes hold them twice. So whenever the schedules of a training change, DDP
    is set up again, and unused parameters are frozen. Only in elastic training do the passes of one
    step use different parameters, and DDP looks for the unused ones.
    """

    def __init__(self, decoder: Decoder, world: World) -> None:
        self._decoder = decoder
        self._world = world
        self._trained = [p for p in decoder.parameters() if p.requires_grad]
        self._model: nn.Module = decoder
        self._schedules: tuple[IterationSchedule, ...] = ()
        """The schedules that the model was made for; empty before the first step."""

    def model_for(self, schedules: Sequence[IterationSchedule]) -> nn.Module:
        """Return the model to call in the passes of a step under these schedules.

        With one worker, or a sharded decoder, that is the decoder itself. All workers call this.
        """
        if self._world.size == 1 or self._world.is_sharded:
            return self._decoder
        if self._schedules != tuple(schedules):
            self._model = self._replicas_for(schedules)
            self._schedules = tuple(schedules)
        return self._model

    def _replicas_for(self, schedules: Sequence[IterationSchedule]) -> nn.Module:
        """Freeze what no pass of a step uses, and return replicas of the rest."""
        used_by_pass = [self._used_by(schedule) for schedule in schedules]
        used = set().union(*used_by_pass)
        for parameter in self._trained:
            parameter.requires_grad_(parameter in used)
            parameter.grad = None
        passes_differ = any(used_by_this != used for used_by_this in used_by_pass)
        replicas = DistributedDataParallel(
            self._decoder, find_unused_parameters=passes_differ, gradient_as_bucket_view=True
        )
        # DDP makes new buckets after the first pass, in the order in which gradients arrive, and
        # from then on keeps gradients in them. Two small passes make these buckets here, before
        # the activations of a step need the memory.
        for _ in range(2):
            torch.autograd.backward(_small_loss(replicas, schedules[0], self._world))
        replicas.zero_grad(set_to_none=False)
        return replicas

    def _used_by(self, schedule: IterationSchedule) -> set[nn.Parameter]:
        """Return the trained parameters that have a gradient in a pass under a schedule."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        loss = _small_loss(self._decoder, schedule, self._world)
        gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        return {
            parameter
            for parameter, gradient in zip(self._trained, gradients, strict=True)
            if gradient is not None
        }


def _small_loss(model: nn.Module, schedule: IterationSchedule, world: World) -> Tensor:
    """Return the loss of a sequence of two tokens. It compiles nothing and uses no random numbers
    of the training."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=world.device)
    gpus = [world.device] if world.is_gpu else []
    with torch.random.fork_rng(devices=gpus), uncompiled():
        loss: Tensor = model(
            tokens, schedule=schedule, loss_fn=partial(next_token_loss, input_ids=tokens)
        )
    return loss


def shard(decoder: Decoder, world: World, *, precision: str) -> None:
    """Shard a decoder in place (FSDP2); it may be on the meta device. Make its optimizer later.

    A frozen decoder has only weights and forward passes.

    Each worker holds a shard of weights, gradients and moments. The matrices of a layer's field are
    one unit, gathered once for all evaluations of the field: in the forward pass, and again in the
    backward pass. The other parameters (embeddings, head, norms, the mix) are the root's unit,
    gathered once per step: 2L + 1 gathers for L layers. A method that repeats the stack gathers the
    layers again in each repetition. With bf16, fields are sent as bf16 and gradients are summed in
    float32; the root's unit stays float32, which the fused norms need.

    Replicas of shards (HSDP) gather within `World.num_shards` workers, and only gradients are
    averaged over all of them. Any number of workers or shards reads the same checkpoints
    (`shards.py`).
    """
    # Importing FSDP takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Consecutive ranks, which are on one node if it has enough GPUs, share a model.
    sizes = {"replicas": world.size // world.num_shards, "shards": world.num_shards}
    if sizes["replicas"] == 1:
        del sizes["replicas"]
    mesh = init_device_mesh(
        torch.device(world.device).type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
    )
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # FSDP warns that views of outputs may be modified in place; ours never are.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    layers: Any = decoder.model.layers
    matrices = {p for layer in layers for p in layer.field_parameters() if p.ndim > 1}
    # A unit has one dtype. The root is visited first: it does not look into layers that are units.
    fully_shard(decoder, mesh=mesh, ignored_params=matrices)
    for layer in layers:
        others = set(layer.parameters()) - matrices
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=others)


def pass_of_several(
    model: nn.Module, world: World, *, is_last: bool
) -> AbstractContextManager[None]:
    """Return the context of one of several passes (forward and backward) of a step.

    Replicas average their gradients in the last pass only, also of weights that this pass does not
    use. Shards are gathered in the first pass and kept until the last one has ended. Gradients are
    sharded in every pass, because unsharded ones would take twice the memory of bf16 weights.
    """
    if world.is_sharded:
        return _sharded_pass(model, is_last=is_last)
    if isinstance(model, DistributedDataParallel) and not is_last:
        return cast("AbstractContextManager[None]", model.no_sync())
    return nullcontext()


@contextmanager
def _sharded_pass(model: Any, *, is_last: bool) -> Iterator[None]:
    def keep_weights(*, forward: bool, backward: bool) -> None:
        model.set_reshard_after_backward(not backward)
        for layer in model.model.layers:  # The root keeps its weights after a forward pass anyway.
            layer.set_reshard_after_forward(not forward, recurse=False)

    keep_weights(forward=True, backward=not is_last)
    model.set_requires_all_reduce(is_last)  # Between replicas.
    try:
        yield
    finally:
        keep_weights(forward=False, backward=False)
        model.set_requires_all_reduce(True)


def with_all_gradients(model: Model) -> Model:
    """Return a model whose every pass gives each parameter of its method a gradient.

    The gradient is zero if the schedule of the pass does not use the parameter. Replicas of shards
    (HSDP) add up the gradients of a step's passes as one block, so all passes need the same ones.
    Any other model adds up each parameter by itself, and is returned unchanged.
    """
    decoder: Any = model
    if not hasattr(decoder, "set_requires_all_reduce"):
        return model

    def call(*inputs: Any, loss_fn: Callable[..., Any], **options: Any) -> Any:
        def loss_with_zero(*answer: Any) -> Any:
            result = loss_fn(*answer)
            parameters = decoder.method_parameters().values()
            zero = 0.0 * torch.cat([parameter.flatten() for parameter in parameters]).sum()
            if isinstance(result, Tensor):
                return result + zero
            loss, *others = result
            return loss + zero, *others

        return model(*inputs, loss_fn=loss_with_zero, **options)

    return call


def clear_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clear the gradients of a step.

    The gradients of replicas become zeros, and stay in the buckets that send them. Otherwise the
    passes of the next step would hold gradients twice, except the last one.
    """
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm`; return the norm before as a scalar."""
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # The norm of a sharded model is gathered from all workers.
    gathered_norm: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return gathered_norm


def copy_rows(whole: Tensor | LazyTensor, target: Any) -> None:
    """Copy a whole tensor into another one; into a sharded one only this worker's rows.

    If the tensor is mapped from a file, only these rows are read.
    """
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        target.copy_(whole[...])
        return
    shards = mesh.ndim - 1  # With replicas (HSDP), theirs is the dimension before.
    num_rows = -(-len(whole) // mesh.size(shards))
    first = num_rows * mesh.get_local_rank(shards)
    target.to_local().copy_(whole[first : first + num_rows])


# The model to train


def decoder_to_train(job: TrainingJob, world: World, checkpoint: Path | None) -> Decoder:
    """Return the decoder in training mode on this worker's device, sharded if the world is.

    Its weights are those of the checkpoint to resume from, else the job's initial ones, or random.
    A source model of another method gives the weights of a plain model; what the job's method adds
    is initialized as in a model with random weights. The decoder is made without memory for weights
    and then filled tensor by tensor, a shard with its own rows only. So no worker needs memory for
    a second model.
    """
    torch.manual_seed(job.recipe.seed)
    use_tf32(world.device)
    config = job.model
    weights: Mapping[str, Tensor | LazyTensor] = {}
    if folder := checkpoint or job.initial_folder:
        if checkpoint is None and job.kept_layers is not None:
            origin = load_model(Path(folder), check=False, frozen=True)
            full = origin.config.corrections
            others = set(range(full.num_layers)) - set(job.kept_layers)
            smaller = decoder_of_kept_layers(origin, full.leaving_out(others))
            origin_config = smaller.config
            weights = smaller.state_dict()
        else:
            origin_config, weights = open_weights(Path(folder), check=False)
        if origin_config.method != config.method:
            with torch.device("meta"):
                added = Decoder(origin_config).method_parameters()
            weights = {name: tensor for name, tensor in weights.items() if name not in added}
    with torch.device("meta"):
        decoder = Decoder(config)
    part = trained_part(config.corrections, job.recipe.trained_layers)
    freeze(decoder.model, part, decoder.lm_head)
    if world.is_sharded:
        shard(decoder, world, precision=job.recipe.precision)
    decoder.to_empty(device=world.device)

    _fill(decoder, chain(weights.items(), _random_weights(config)))
    return decoder.train()


def _random_weights(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the initial weights of a model by name. Nothing is computed before the first request,
    because a resumed run needs none."""
    with torch.device("meta"):
        pattern = Decoder(config)
    yield from initial_weights(pattern, config.initializer_std)


@torch.no_grad()
def _fill(decoder: Decoder, weights: Iterable[tuple[str, Tensor | LazyTensor]]) -> None:
    """Copy whole weights by name into a decoder; into a sharded one only this worker's rows.

    Of two weights with one name the first counts. Weights are read or drawn until none is missing.
    """
    missing = dict(decoder.named_parameters())
    for name, tensor in weights:
        parameter: Any = missing.pop(name, None)
        if parameter is not None:
            copy_rows(tensor, parameter)
        if not missing:  # Do not read or draw further weights.
            break
    assert not missing, f"no weights for {sorted(missing)}"


# Precision


def autocast(precision: str, world: World) -> AbstractContextManager[None]:
    """Return the context of a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(world.device).type, dtype=torch.bfloat16)


def check_precision(precision: str, device: str | torch.device, *, section: str) -> None:
    """Check that a training's device supports the precision that the settings name in `section`.

    A silent change to float32 would train another model than the plan and the key describe.

    Raises:
        DeviceError: If bf16 is set and the GPU would emulate it.
    """
    if precision == "bf16" and torch.device(device).type == "cuda" and not has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise DeviceError(
            f"{section}.precision is bf16, and {device} has compute capability {major}.{minor}, "
            f"which has no bfloat16; type --set {section}.precision=fp32 "
            "--set evaluation.precision=fp32"
        )


def load_teacher(job: TrainingJob, world: World) -> Decoder | None:
    """Return the frozen model that the job learns from, on this worker's device; None without one.

    It is sharded if the trained model is. Its units are gathered in its own dtype, so its
    predictions are those of an unsharded teacher.
    """
    if job.frozen_teacher is None:
        return None
    dtype = frozen_dtype(job.recipe.precision, world.device)
    folder = Path(job.frozen_teacher)
    if not world.is_sharded:
        return load_model(folder, device=world.device, dtype=dtype, check=False, frozen=True)
    config, weights = open_weights(folder, check=False)
    with torch.device("meta"):
        teacher = Decoder(config).to(dtype)
    teacher.requires_grad_(False).eval()
    shard(teacher, world, precision="fp32")
    teacher.to_empty(device=world.device)
    _fill(teacher, weights.items())
    return teacher


def free_gathered(teacher: Decoder | None) -> None:
    """Free the gathered embeddings, head and norms of a sharded teacher at the end of a step.

    FSDP frees layers after each use. The losses still read the head after the teacher's forward
    pass; and without a backward pass FSDP does not know when the teacher's step ends.
    """
    reshard = getattr(teacher, "reshard", None)
    if reshard is not None:
        reshard()


def frozen_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """Return the dtype of a teacher's weights: bf16 on a GPU that computes in bf16."""
    is_half = precision == "bf16" and torch.device(device).type == "cuda"
    return torch.bfloat16 if is_half else torch.float32


# Compiled layers

_is_compiling_allowed = True


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run layers uncompiled in a `with` block, whose shapes are not worth a graph."""
    global _is_compiling_allowed
    _is_compiling_allowed = False
    try:
        yield
    finally:
        _is_compiling_allowed = True


@dataclass
class Compilation:
    """Whether the compiler works in a training."""

    has_succeeded: bool = False
    has_failed: bool = False


def compile_layers(
    decoder: Decoder, event: Callable[..., None], backend: str | Callable[..., Any] = "inductor"
) -> Compilation:
    """Compile fields and sums of the mix in place, at their first calls with gradients; only
    rounding changes.

    One graph serves the fields of all evaluations, layers and iteration schedules, and a few graphs
    the sums of all layers (`iiet.model.mix.TERMS_AT_ONCE`). Passes without gradients run
    uncompiled: their graph would take longer than the few validations of a run. If the compiler
    fails, training continues uncompiled. `event` gets `compiled` with the seconds
    of the first call, or `not compiled` with a text.
    """
    from torch._dynamo import config as dynamo_config  # Importing it takes two seconds.
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch import config

    torch.compiler.reset()  # Each job has its own backend, and Dynamo keeps graphs of only eight.
    # Dynamo would split each field where the buckets of `Replicas` end, so that gradients are sent
    # while the rest of a graph runs. A field is evaluated several times, so its gradients wait for
    # the first evaluation anyway, and each cut keeps tensors that a whole graph recomputes (81 GiB
    # instead of 70 for the 340M recipe, traced).
    dynamo_config.optimize_ddp = False
    # Compiling processes of each worker; by default as many as the node has CPUs.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(torch.get_num_threads()))
    warnings.filterwarnings("ignore", message=r"The \.grad attribute", category=UserWarning)
    for name, value in _COMPILED_GRAPHS.items():
        if hasattr(config, name):  # An older PyTorch lacks some.
            setattr(config, name, value)
    compilation = Compilation()

    def compiled(plain: Callable[..., ResultT]) -> Callable[..., ResultT]:
        fast = torch.compile(plain, backend=backend)

        def run(*args: Any, **options: Any) -> ResultT:
            is_training = torch.is_grad_enabled() and _is_compiling_allowed
            if compilation.has_failed or not is_training:
                return plain(*args, **options)
            started = time.perf_counter()
            try:
                result = fast(*args, **options)
            except TorchDynamoException as error:
                compilation.has_failed = True
                cause = getattr(error, "inner_exception", error)
                reason = shortened(" ".join(f"{type(cause).__name__}: {cause}".split()))
                text = "torch.compile failed, so training runs uncompiled, slower on GPUs"
                event("not compiled", text=f"{text}: {reason}")
                return plain(*args, **options)
            if not compilation.has_succeeded:
                compilation.has_succeeded = True
                event("compiled", seconds=time.perf_counter() - started)
            return result

        return run

    layers: Any = decoder.model.layers
    for layer in layers:
        layer.field = compiled(layer.field)
        if isinstance(layer, MixedLayer):
            layer.mix.add_terms = compiled(layer.mix.add_terms)  # type: ignore[method-assign]
    return compilation


def compile_a_field(
    decoder: Decoder,
    compilation: Compilation,
    world: World,
    *,
    precision: str,
    num_sequences: int,
    num_tokens: int,
) -> None:
    """Compile the graphs of the fields for passes of these sizes, before training.

    All workers agree on whether the compiler failed. The middle of the first pass would be too late
    to find out: uncompiled layers keep more activations, and may need smaller micro-batches.

    Args:
        decoder: Not sharded, after `compile_layers`.
        compilation: What `compile_layers` has returned; gets the result.
    """
    layer: Any = decoder.model.layers[-1]  # The first ones may be frozen.
    sizes = (num_sequences, num_tokens, decoder.config.dim)
    point = torch.zeros(sizes, device=world.device, requires_grad=True)
    context = make_context(point, decoder.rope, windows=decoder.config.windows)
    with autocast(precision, world):
        layer.field(point, context)
    share_failed = mean_over_workers({"failed": float(compilation.has_failed)}, world)["failed"]
    compilation.has_failed = share_failed > 0
