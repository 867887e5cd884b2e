"""Precision, compiled layers, and what a sharded model gathers, reduces and holds (with a fake
process group)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from live_tensors import LiveStorages, counted_reads
from read_tokens import noted_tokens
from refusals import refused
from same_run import events, in_folder, recipe, run_job, same_run
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from iiet import METHODS, Decoder, ModelConfig, next_token_loss, preset
from iiet.iiad.distillation import student_loss
from iiet.methods import Layer
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig
from iiet.model.mix import TERMS_AT_ONCE
from iiet.model.schedule import IterationSchedule
from orchestrator.models.load import DTYPES, device_precision, use_tf32
from orchestrator.planning.training_memory import TrainingStep, training_memory
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import (
    Replicas,
    autocast,
    check_precision,
    clear_gradients,
    compile_layers,
    decoder_to_train,
    free_gathered,
    frozen_dtype,
    load_teacher,
    mean_over_workers,
    pass_of_several,
    shard,
)
from orchestrator.training.job import job_key
from orchestrator.training.world import World
from orchestrator.workspace.errors import DeviceError

FP32_AND_BF16 = [pytest.param("fp32", marks=pytest.mark.slow), "bf16"]

# Precision


def test_bf16_is_for_gpus_that_have_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert device_precision("cuda:1") == "bf16"
    check_precision("bf16", "cuda", section="training")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))  # Volta emulates it.
    assert device_precision("cpu") == device_precision("cuda") == "fp32"
    check_precision("bf16", "cpu", section="training")
    check_precision("fp32", "cuda", section="training")
    with refused(DeviceError, "cuda:3", "7.0", "training.precision=fp32"):
        check_precision("bf16", "cuda:3", section="training")


def test_a_teacher_is_half_as_large_on_a_gpu_alone():
    assert frozen_dtype("bf16", "cuda:1") == torch.bfloat16
    assert frozen_dtype("fp32", "cuda:1") == torch.float32
    assert frozen_dtype("bf16", "cpu") == torch.float32, "autocast reads float32 weights there"


def test_tf32_is_for_gpus_only(tiny_job):
    run_job(tiny_job(num_steps=1))
    assert torch.get_float32_matmul_precision() == "highest", "CPUs compute as before"
    try:
        use_tf32("cuda:1")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("world", "num_shards"),
    [
        (World(), 1),
        (World(size=4), 1),
        (World(size=4, parallel="fsdp"), 4),
        (World(size=4, parallel="fsdp", shards=2), 2),
    ],
)
def test_a_copy_of_the_model_is_shared_by_the_workers_that_shard_it(world, num_shards):
    assert world.num_shards == num_shards


# What workers tell each other


def test_numbers_are_the_mean_of_those_of_all_workers(monkeypatch):
    added = {"tokens": 10.0, "loss": 3.0}  # The sums of the two other workers.
    monkeypatch.setattr(
        dist, "all_reduce", lambda numbers: numbers.add_(torch.tensor([*added.values()]))
    )
    numbers_of_worker = {"loss": torch.tensor(1.5), "tokens": 2}
    mean = mean_over_workers(numbers_of_worker, World(rank=1, size=3))
    assert mean == {"loss": 1.5, "tokens": 4.0}
    assert mean_over_workers(numbers_of_worker, World()) == {"loss": 1.5, "tokens": 2.0}


# Compiled layers


@pytest.fixture
def _nothing_compiled() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


pytestmark = pytest.mark.usefixtures("_nothing_compiled")


@pytest.fixture
def job(tiny_job) -> TrainingJob:
    """A job of one step without corrections, and then a ramp to all of them."""
    return tiny_job(num_steps=6, iterate_from_fraction=0.2, iterate_ramp_fraction=0.5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler gives warnings about its own code.
def test_compiled_fields_give_the_losses_of_plain_ones(job):
    # Without vectors, the C++ compiler needs less than half as long.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        compiled = same_run(job, recipe(compile=True), rel=1e-5)
    assert job_key(compiled) == job_key(job)
    # One graph serves all fields, and two the sums of the second layer: with and without
    # corrections. Validation runs as it is.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 2
    assert not torch._dynamo.utils.counters["graph_break"]
    (event,) = events(compiled, "compiled")
    assert event["seconds"] > 0
    # The default compiles nothing on a CPU.
    assert not events(in_folder(job, "run-alone"), "compiled")


def compile_by(backend: str | Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainings use another backend of the compiler."""

    compile_by_default = torch.compile

    def compile_otherwise(plain: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return compile_by_default(plain, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_otherwise)


@pytest.mark.slow
def test_compiled_fields_of_a_retrofit_give_the_losses_of_plain_ones(
    tiny_job, tiny_model, monkeypatch
):
    """Its graphs differ, by what is frozen; the code that Inductor writes is tested above."""
    compile_by("aot_eager_decomp_partition", monkeypatch)
    identity = {"method_options": {"start": "identity"}, "schedule": [0, 2]}
    job = tiny_job(num_steps=4, iterate_from_fraction=0.0, trained_layers="corrected")
    job = job.model_copy(update={"model": ModelConfig.from_dict({**tiny_model, **identity})})
    compiled = same_run(job, recipe(compile=True), rel=1e-5)
    assert events(compiled, "compiled")
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def _broken_compiler(monkeypatch) -> None:
    """Let each compilation fail, as on a full disk."""

    def fail(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise OSError("no space\nleft for the compiler")

    compile_by(fail, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("_broken_compiler")
def test_a_broken_compiler_is_one_warning_and_changes_nothing(job):
    (event,) = events(same_run(job, recipe(compile=True)), "not compiled")
    assert "OSError" in event["text"]


@pytest.fixture
def _no_compiler(monkeypatch) -> None:
    """Let each compiled function fail at once, before Dynamo has traced anything."""

    def fail(*_: Any, **__: Any) -> Any:
        raise TorchDynamoException("no space")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_a_pass_has_the_sequences_that_fit(tiny_job):
    compiled = tiny_job(num_steps=1, compile=True, num_sequences_per_pass=4)
    with noted_tokens() as read:
        assert run_job(compiled, sequences_if_uncompiled=1).finished
    assert set(map(len, read.trained)) == {1}
    (event,) = events(compiled, "smaller passes")
    assert "1 sequences" in event["text"]


@pytest.mark.slow
def test_every_training_of_a_process_compiles():
    """Tune reuses a process for its trials; Dynamo keeps graphs for 8 backends, here for 2."""
    event_names: list[str] = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            decoder = tiny_decoder(1)
            graphs = CompileCounter()
            compile_layers(decoder, lambda name, **_: event_names.append(name), backend=graphs)
            decoder(torch.zeros(2, 8, dtype=torch.long))
            assert graphs.frame_count
    assert event_names == ["compiled"] * 3


@pytest.mark.slow
def test_a_few_graphs_serve_the_sums_of_any_number_of_layers():
    """The sums are of 1 to 12 estimates, under three schedules.

    None of them runs uncompiled: Dynamo would then have refused a graph, which the setting
    `fail_on_recompile_limit_hit` makes an error.
    """
    decoder = tiny_decoder(12)
    backend = CompileCounterWithBackend("aot_eager")
    tokens = torch.randint(13, (2, 8))
    expected = decoder.loss(tokens)
    compile_layers(decoder, lambda *_, **__: None, backend=backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for schedule in ("3", "0", "2*6,0*6"):
            decoder.loss(tokens, schedule=schedule).backward()
    assert backend.frame_count == 1 + 2 * TERMS_AT_ONCE
    torch.testing.assert_close(decoder.loss(tokens), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def ddp_world() -> Iterator[World]:
    """Be a worker that has a whole model, and sends its gradients to itself."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield World(size=2)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_replicas_compile_whole_fields(ddp_world):
    """Dynamo cuts a graph where the buckets of gradients end, 1 MiB for the first one."""
    decoder = Decoder(preset("tiny", num_layers=1, dim=256, num_heads=4, context_length=8))
    assert sum(p.nbytes for p in decoder.model.layers[0].field_parameters()) > 2 * 2**20
    none = decoder.schedule.none(1)
    model = Replicas(decoder, ddp_world).model_for([none])
    graphs = CompileCounter()
    compile_layers(decoder, lambda *_, **__: None, backend=graphs)
    model(torch.zeros(2, 8, dtype=torch.long), schedule=none)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("method", "schedules"),
    [
        ("vanilla", ["0", "0"]),
        ("iiet", ["0", "0"]),  # No layer corrects, so their norms are left out.
        ("iiet", ["2,0", "2,0"]),
        ("iiet", ["1", "0"]),  # An elastic step: the last pass leaves out what the first one uses.
        ("pcformer", ["1", "1"]),
    ],
)
def test_replicas_add_gradients_up_where_they_send_them_and_have_none_of_what_a_step_leaves_out(
    method, schedules, ddp_world
):
    decoder = make_decoder(method)
    alone = decoder.copy()
    passes = [IterationSchedule.parse(text, num_layers=LAYERS) for text in schedules]
    replicas = Replicas(decoder, ddp_world)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.0)
    tokens = torch.randint(decoder.config.vocab_size, (1, 8))
    loss_fn = partial(next_token_loss, input_ids=tokens)
    for _ in range(2):
        model = replicas.model_for(passes)
        buckets = places_of_gradients(decoder)
        alone.zero_grad()
        for number, schedule in enumerate(passes):
            with pass_of_several(model, ddp_world, is_last=number == len(passes) - 1):
                model(tokens, schedule=schedule, loss_fn=loss_fn).backward()
            assert places_of_gradients(decoder) == buckets, "also in the first pass of all"
            alone(tokens, schedule=schedule, loss_fn=loss_fn).backward()
        expected = dict(alone.named_parameters())
        for name, parameter in decoder.named_parameters():
            gradient = expected[name].grad
            assert (parameter.grad is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient)
        clear_gradients(model, optimizer)


def places_of_gradients(decoder: Decoder) -> set[int]:
    """Return where gradients are; buckets of one process are a few blocks of memory."""
    return {p.grad.untyped_storage().data_ptr() for p in decoder.parameters() if p.grad is not None}


def test_replicas_follow_the_schedule_and_train_what_was_frozen_as_little_as_before(ddp_world):
    decoder = make_decoder("iiet")
    frozen = decoder.model.layers[0].input_layernorm.weight.requires_grad_(False)
    norm = decoder.model.layers[0].correction_norm.weight
    replicas = Replicas(decoder, ddp_world)
    none, all_layers = (decoder.schedule.parse(text, num_layers=LAYERS) for text in ("0", "1"))
    model = replicas.model_for([none])
    assert replicas.model_for([none]) is model
    assert not norm.requires_grad
    assert replicas.model_for([all_layers]) is not model
    assert norm.requires_grad
    assert norm.grad is not None
    replicas.model_for([none])
    assert norm.grad is None, "the optimizer would move it"
    assert not frozen.requires_grad


def tiny_decoder(num_layers: int) -> Decoder:
    sizes = {"dim": 8, "num_heads": 2, "ffn_dim": 12, "vocab_size": 13, "context_length": 8}
    return Decoder(preset("tiny", num_layers=num_layers, **sizes))


@pytest.fixture
def teacher_job(tmp_path) -> TrainingJob:
    """The job of a student whose teacher has most of its weights in its layers."""
    teacher = make_decoder(num_layers=6, dim=64, ffn_dim=192, vocab_size=64)
    teacher.save_pretrained(tmp_path / "teacher")
    return TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder="",
        model=teacher.config,
        recipe=TrainingSettings(),
        objective="distill",
        teacher_folder=str(tmp_path / "teacher"),
    )


@contextmanager
def fake_workers(num_workers: int, *, rank: int = 0, shards: int | None = None) -> Iterator[World]:
    """Be one of several workers that share a model; nothing is sent."""
    dist.init_process_group("fake", rank=rank, world_size=num_workers, store=FakeStore())
    try:
        yield World(rank=rank, size=num_workers, parallel="fsdp", shards=shards)
    finally:
        dist.destroy_process_group()


# Shards

LAYERS = 2


@pytest.fixture
def world() -> Iterator[World]:
    with fake_workers(2) as world:
        yield world


class Collectives(TorchDispatchMode):
    """Counts the collectives of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            kinds = ("allgather", "reduce_scatter", "allreduce")
            self.counts[next(kind for kind in kinds if kind in name)] += 1
        return function(*args, **(kwargs or {}))


def make_decoder(method: str = "iiet", *, corrections: int = 1, **sizes: Any) -> Decoder:
    """Return a small model; of a method with corrections, each layer makes as many."""
    sizes = {"num_layers": LAYERS, "dim": 16, "ffn_dim": 24, "context_length": 16, **sizes}
    if METHODS[method].facts.has_corrections:
        sizes["schedule"] = corrections
    return Decoder(preset("tiny", method=method, **sizes))


def step(decoder: Decoder, world: World, precision: str, num_passes: int = 1) -> Counter[str]:
    tokens = torch.zeros(1, decoder.config.context_length, dtype=torch.long)
    with Collectives() as collectives:
        for number in range(num_passes):
            several = pass_of_several(decoder, world, is_last=number == num_passes - 1)
            with several if num_passes > 1 else nullcontext():
                with autocast(precision, world):
                    loss = decoder(tokens, loss_fn=partial(next_token_loss, input_ids=tokens))
                loss.backward()  # type: ignore[no-untyped-call]
    return collectives.counts


@pytest.mark.parametrize(
    ("method", "precision", "checkpointing"),
    [("iiet", "bf16", False), *((method, "fp32", True) for method in METHODS)],
)
def test_a_layer_is_gathered_once_for_all_its_evaluations(world, method, precision, checkpointing):
    decoder = make_decoder(method)
    decoder.activation_checkpointing = checkpointing
    shard(decoder, world, precision=precision)
    num_runs = decoder.method.facts.num_runs(decoder.schedule)
    for _ in range(2):
        # Each layer forward and backward, in each run of the stack, and once what belongs to none.
        counts = step(decoder, world, precision)
        assert counts == {"allgather": 2 * num_runs * LAYERS + 1, "reduce_scatter": LAYERS + 1}


@pytest.mark.parametrize("precision", FP32_AND_BF16)
def test_the_passes_of_a_step_gather_once_together(world, precision):
    decoder = make_decoder()
    shard(decoder, world, precision=precision)
    for _ in range(2):
        counts = step(decoder, world, precision, num_passes=3)
        # Weights are kept between the passes, gradients are not.
        assert counts == {"allgather": LAYERS + 1, "reduce_scatter": 3 * (LAYERS + 1)}
        assert all(isinstance(p, DTensor) for p in decoder.parameters())
    # Validation and a step of one pass gather as if there had been no passes.
    with torch.no_grad(), autocast(precision, world), Collectives() as collectives:
        decoder(torch.zeros(1, 8, dtype=torch.long))
    assert collectives.counts == {"allgather": LAYERS + 1}
    assert step(decoder, world, precision)["allgather"] == 2 * LAYERS


def test_replicas_of_shards_average_gradients_in_the_last_pass_only():
    with fake_workers(4, shards=2) as world:
        decoder = make_decoder()
        shard(decoder, world, precision="fp32")
        expected = {"allgather": LAYERS + 1, "reduce_scatter": 3 * (LAYERS + 1)}
        for _ in range(2):
            counts = step(decoder, world, "fp32", num_passes=3)
            assert counts == {**expected, "allreduce": LAYERS + 1}
        weight = decoder.model.embed_tokens.weight
        assert isinstance(weight, DTensor)
        assert len(weight.to_local()) == len(weight) // 2


@pytest.mark.parametrize("method", METHODS)
def test_with_bf16_only_matrices_of_fields_are_sent_as_bf16(world, method):
    # The layers of `pcformer` share a norm for each correction, and two are different modules.
    decoder = make_decoder(method, corrections=2)
    shard(decoder, world, precision="bf16")
    dtypes: dict[str, torch.dtype] = {}

    def note(module: nn.Module, prefix: str) -> None:
        # A layer reads its mix without calling it as a module.
        for name, parameter in module.named_parameters(prefix, recurse=isinstance(module, Layer)):
            dtypes[name] = parameter.dtype

    for prefix, module in decoder.named_modules():
        module.register_forward_pre_hook(lambda module, _, prefix=prefix: note(module, prefix))
    step(decoder, world, "bf16")
    assert dtypes.keys() == dict(decoder.named_parameters()).keys()
    for name, dtype in dtypes.items():
        is_matrix = "_proj." in name
        assert dtype == (torch.bfloat16 if is_matrix else torch.float32), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "num_passes", "checkpointing"), [("fp32", 2, True), ("bf16", 1, False)]
)
def test_the_planned_memory_is_that_of_a_step(precision, num_passes, checkpointing):
    with fake_workers(8) as world:
        decoder = make_decoder(num_layers=6, dim=256, ffn_dim=700, vocab_size=2048,
                               context_length=64)  # fmt: skip
        decoder.activation_checkpointing = checkpointing
        shard(decoder, world, precision=precision)
        with LiveStorages() as live:
            step(decoder, world, precision, num_passes)
    plan = training_memory(
        decoder.config,
        TrainingStep(
            num_sequences=1,
            precision=precision,
            activation_checkpointing=checkpointing,
            num_shards=8,
            num_passes=num_passes,
        ),
    )
    # The plan counts gradients from the first pass on, and here they grow while activations go.
    assert live.peak < sum(plan.values()) - plan["AdamW"] < 1.5 * live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_holds_its_rows_of_a_sharded_teacher(teacher_job, dtype, monkeypatch):
    # Half precision is for GPUs, where the norms of its methods stay float32.
    monkeypatch.setattr("orchestrator.training.devices.frozen_dtype", lambda *_: dtype)
    whole_teacher = load_teacher(teacher_job, World())
    assert whole_teacher is not None
    assert not any(parameter.requires_grad for parameter in whole_teacher.parameters())
    num_shards = 4
    for rank in (0, num_shards - 1):
        with fake_workers(num_shards, rank=rank) as world:
            teacher = load_teacher(teacher_job, world)
            assert teacher is not None
            expected = dict(whole_teacher.named_parameters())
            held_bytes = 0
            for name, parameter in teacher.named_parameters():
                assert isinstance(parameter, DTensor)
                assert not parameter.requires_grad
                local = parameter.to_local()
                rows = expected[name].chunk(num_shards)
                assert torch.equal(local, rows[rank] if rank < len(rows) else rows[0][:0]), name
                held_bytes += local.nbytes
        # The rows of the mix, of one to five numbers, do not divide by four.
        whole_bytes = sum(parameter.nbytes for parameter in whole_teacher.parameters())
        assert held_bytes == pytest.approx(whole_bytes / num_shards, rel=2e-3)


@pytest.mark.parametrize("precision", FP32_AND_BF16)
def test_a_sharded_teacher_takes_its_share_and_what_it_gathers(teacher_job, precision, monkeypatch):
    dtype = DTYPES[precision]
    monkeypatch.setattr("orchestrator.training.devices.frozen_dtype", lambda *_: dtype)
    batch = Batch.of_text(torch.zeros(1, 16, dtype=torch.long))
    num_gathers = list[int]()
    with fake_workers(8) as world:
        teacher = load_teacher(teacher_job, world)
        assert teacher is not None
        of_student = torch.zeros(1, 16, teacher.config.vocab_size)
        with LiveStorages() as live, autocast(precision, world):
            for _ in range(2):
                for _ in range(2):  # Passes of a step.
                    with Collectives() as collectives:
                        student_loss(teacher, batch, config=DistillationConfig())(of_student)
                    num_gathers.append(collectives.counts["allgather"])
                free_gathered(teacher)
    # What belongs to no layer is gathered once in a step.
    num_layers = len(teacher.model.layers)
    assert num_gathers == [num_layers + 1, num_layers] * 2
    planned: dict[int, int] = {}
    for num_shards in (1, 8):
        step = TrainingStep(
            num_sequences=1, precision=precision, on_gpus=True, num_shards=num_shards
        )
        taught = replace(step, frozen=teacher.config)
        weights = training_memory(teacher.config, step)["weights"]
        planned[num_shards] = training_memory(teacher.config, taught)["weights"] - weights
    assert planned[8] < live.peak < 1.2 * planned[8]  # The forward pass has tensors of its own.
    assert planned[8] < 0.75 * planned[1]


def test_a_shard_is_drawn_and_loaded_as_its_rows_of_the_whole_model(tmp_path):
    num_shards = 3
    config = preset("tiny", vocab_size=7, num_layers=2, dim=20, num_heads=2, ffn_dim=24)
    new = TrainingJob(
        run_folder=str(tmp_path / "run"), tokens_folder="", model=config, recipe=TrainingSettings()
    )
    loaded = new.model_copy(update={"initial_folder": str(tmp_path / "initial")})
    Decoder(config).save_pretrained(tmp_path / "initial")
    for job in (new, loaded):
        whole_weights = decoder_to_train(job, World(), None).state_dict()
        random_state = torch.get_rng_state()
        for rank in range(num_shards):
            with fake_workers(num_shards, rank=rank) as world, counted_reads() as reads:
                decoder = decoder_to_train(job, world, None)
                own_bytes = [p.to_local().nbytes for p in decoder.parameters()]
                is_loaded = job.initial_folder is not None
                assert reads.total == sum(own_bytes) * is_loaded, "no row of another worker"
                assert reads.peak <= max(own_bytes)
                assert torch.equal(torch.get_rng_state(), random_state)
                for name, parameter in decoder.named_parameters():
                    assert isinstance(parameter, DTensor)
                    expected = list(whole_weights[name].chunk(num_shards))
                    expected += [whole_weights[name][:0]] * (num_shards - len(expected))
                    assert torch.equal(parameter.to_local(), expected[rank]), name
