"""The memory estimate of a training step, compared with the live tensors of real steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors

from iiet.cost import num_parameters, num_trained_parameters
from iiet.decoder import Decoder
from iiet.freezing import TrainedLayers, freeze, trained_part
from iiet.iiad.distillation import AnswerKeeper, distillation_loss, elastic_loss, frozen_teacher
from iiet.methods import METHODS
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig, ModelConfig, preset
from iiet.model.context import make_context
from iiet.model.layers import PassContext
from iiet.model.losses import batch_cross_entropy, next_token_loss
from iiet.model.schedule import IterationSchedule
from orchestrator.planning.estimate import checkpoint_bytes
from orchestrator.planning.training_memory import Forms, TrainingStep, training_memory
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import compile_layers
from orchestrator.training.objective import make_optimizer

FACTOR = 1.2
"""How far estimate and measurement may lie apart, either way."""


def peak_of(module: torch.nn.Module, *steps: Callable[[], torch.Tensor]) -> int:
    """Return the peak of all tensors that losses and their backward passes make, without weights
    and gradients."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with LiveTensors(module) as live:
        for step in steps:
            torch.autograd.backward(step())
    return live.peak


def measured_bytes(
    config: ModelConfig,
    num_sequences: int,
    precision: str,
    checkpoint: bool,
    trained: TrainedLayers = "all",
) -> int:
    """Return the peak of a pretraining step."""
    decoder = Decoder(config)
    freeze(decoder.model, trained_part(config.corrections, trained), decoder.lm_head)
    decoder.activation_checkpointing = checkpoint
    input_ids = torch.randint(config.vocab_size, (num_sequences, config.context_length))

    def step() -> torch.Tensor:
        is_half = precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16) if is_half else nullcontext():
            return decoder(input_ids, loss_fn=partial(next_token_loss, input_ids=input_ids))

    return peak_of(decoder, step)


@pytest.mark.parametrize(
    ("schedule", "trained", "checkpoint"),
    [
        ("0,2,2,0", "corrected", False),
        ("0,2,2,0", "added", True),
        ("1*4", "corrected", True),
        ("1*4", "added", False),
    ],
)
def test_frozen_layers_take_no_gradients_moments_or_activations(schedule, trained, checkpoint):
    config = preset(
        "tiny", vocab_size=250, dim=64, ffn_dim=176, num_layers=4, context_length=64,
        schedule=schedule, method_options={"start": "identity"},
    )  # fmt: skip
    options: dict[str, Any] = {"num_sequences": 4, "activation_checkpointing": checkpoint}
    all_trained = training_memory(config, TrainingStep(**options))
    memory = training_memory(config, TrainingStep(**options, trained=trained))
    share = num_trained_parameters(config, trained) / num_parameters(config)
    assert memory["weights"] == all_trained["weights"]
    assert memory["AdamW"] == pytest.approx(all_trained["AdamW"] * share, abs=1)
    assert memory["gradients"] == pytest.approx(all_trained["gradients"] * share, abs=1)
    measured = measured_bytes(config, 4, "fp32", checkpoint, trained)
    assert measured / FACTOR < memory["activations"] < measured * FACTOR


def test_a_divergence_over_a_large_vocabulary_does_not_double_the_peak():
    # Steps of 256 tokens whose logits dominate the memory.
    config = preset("tiny", vocab_size=6_000, num_layers=2, context_length=64, schedule=1)
    decoder = Decoder(config)
    teacher = frozen_teacher(decoder)
    batch = Batch.of_text(torch.randint(6_000, (4, 64)))

    def distilled(**loss: Any) -> int:
        options = {"config": DistillationConfig(**loss)}
        return peak_of(
            torch.nn.ModuleList([decoder, teacher]),
            lambda: distillation_loss(decoder, teacher, batch.input_ids, **options)[0],
        )

    alone = distilled(kl_weight=0.0)
    for divergence in ("forward", "reverse"):
        assert distilled(divergence=divergence) < 1.4 * alone
    # Members learn from what the full schedule predicted, which is kept in little memory.
    full = AnswerKeeper(decoder)
    none = config.corrections.none(2)

    def member() -> torch.Tensor:
        assert full.answer is not None
        loss_fn = elastic_loss(full.answer, batch, DistillationConfig())
        return decoder(batch.input_ids, schedule=none, loss_fn=loss_fn)[0]

    first = partial(full, batch.input_ids, loss_fn=partial(batch_cross_entropy, batch=batch))
    assert peak_of(decoder, first, member) < 1.4 * alone


SHAPES: dict[str, dict[str, Any]] = {
    "shared heads": {"vocab_size": 64, "dim": 64, "ffn_dim": 176, "num_layers": 4,
                     "num_kv_heads": 1},
    "wide": {"vocab_size": 256, "dim": 128, "ffn_dim": 350, "num_layers": 2, "context_length": 32},
    "wide vocabulary": {"vocab_size": 4096, "dim": 64, "ffn_dim": 176, "num_layers": 3},
}  # fmt: skip


def combinations() -> Iterator[Any]:
    """Each method with both precisions, once with activations computed again and once without.

    The shapes take turns; each method with each of them is marked long. Keep the order of the
    shapes: `looped` must meet the wide one, where the gradients that it keeps of each run of the
    stack count most.
    """
    for number, method in enumerate(METHODS):
        for is_half in (False, True):
            checkpoint = is_half != (number % 2 == 1)
            turn = (number + is_half) % len(SHAPES)
            for place, shape in enumerate(SHAPES):
                marks = () if place == turn else pytest.mark.long
                precision = "bf16" if is_half else "fp32"
                yield pytest.param(method, precision, checkpoint, shape, marks=marks)


@pytest.mark.parametrize(("method", "precision", "checkpoint", "shape"), [*combinations()])
def test_the_estimate_matches_a_real_step(method, precision, checkpoint, shape):
    schedule = {"schedule": 2} if METHODS[method].facts.has_corrections else {}
    sizes = {"num_heads": 4, "context_length": 64, **SHAPES[shape]}
    config = preset("tiny", method=method, **sizes, **schedule)
    memory = training_memory(
        config,
        TrainingStep(num_sequences=4, precision=precision, activation_checkpointing=checkpoint),
    )
    # The weights' copies in bfloat16 are made by the step, so they are measured too.
    copies = memory["weights"] - memory["gradients"]
    estimate = memory["activations"] + copies
    measured = measured_bytes(config, 4, precision, checkpoint)
    assert measured / FACTOR < estimate < measured * FACTOR


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_truncated_backward_pass_takes_less(precision):
    sizes = {"num_heads": 4, "context_length": 64, **SHAPES["wide"], "schedule": 3}

    def estimate(**options: Any) -> tuple[ModelConfig, int]:
        config = preset("tiny", **sizes, method_options=options)
        memory = training_memory(config, TrainingStep(num_sequences=4, precision=precision))
        return config, memory["activations"] + memory["weights"] - memory["gradients"]

    _, full = estimate()
    config, truncated = estimate(differentiated_corrections=1)
    measured = measured_bytes(config, 4, precision, checkpoint=False)
    assert measured / FACTOR < truncated < measured * FACTOR
    assert truncated < 0.6 * full


class NormOfGpus(torch.autograd.Function):
    """A GPU's kernel for `F.rms_norm`, which keeps its input and a number for each token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse * weight


class KeptBytes:
    """Counts the memory of a field's evaluation that its backward pass waits for."""

    def __init__(self, layer: torch.nn.Module, x: torch.Tensor) -> None:
        self._sizes = {x.untyped_storage()._cdata: x.nbytes}  # The point is kept, too.
        self._parameters = {p.untyped_storage()._cdata for p in layer.parameters()}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_rope = tensor.dim() == 3 and tensor.size(1) == 1  # One for all evaluations.
        is_copy = tensor.dim() == 2 and tensor.t().is_contiguous()  # A weight's, in bfloat16.
        if storage._cdata not in self._parameters and not is_rope and not is_copy:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


def kept_by_plain_formulas(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the bytes per token that an evaluation keeps on a GPU without a compiler."""
    layer: Any = decoder.model.layers[0]
    x = torch.randn(2, decoder.config.context_length, decoder.config.dim, requires_grad=True)
    kept_bytes = KeptBytes(layer, x)
    monkeypatch.setattr("iiet.model.fast.ENABLED", False)
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda x, _, weight, __: NormOfGpus.apply(x, weight)
    )
    hooks = torch.autograd.graph.saved_tensors_hooks(kept_bytes.add, lambda tensor: tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        layer.field(x, context_of(decoder, x))
    return kept_bytes.total // (x.size(0) * x.size(1))


def kept_by_a_compiled_field(decoder: Decoder) -> int:
    """Return the bytes per token that an evaluation keeps as Inductor cuts its graph in two."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    layer: Any = decoder.model.layers[0]
    x = torch.randn(2, decoder.config.context_length, decoder.config.dim, requires_grad=True)
    kept_bytes = KeptBytes(layer, x)
    num_results = list[int]()

    def partition(joint: Any, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        num_results.append(num_fwd_outputs)
        options["num_fwd_outputs"] = num_fwd_outputs
        return min_cut_rematerialization_partition(joint, inputs, **options)

    def compile_forward(graph: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            results = graph(*inputs)
            for tensor in results[num_results[0] :]:
                kept_bytes.add(tensor)
            return results

        return make_boxed_func(run)

    backend = aot_autograd(
        fw_compiler=compile_forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    compile_layers(decoder, lambda *_, **__: None, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.field(x, context_of(decoder, x))
    return kept_bytes.total // (x.size(0) * x.size(1))


def context_of(decoder: Decoder, x: torch.Tensor) -> PassContext:
    return make_context(
        x,
        decoder.rope,
        step_weights=None,
        windows=(),
        cache=None,
        attention_mask=None,
        position_ids=None,
    )


def planned_evaluation(config: ModelConfig, forms: Forms) -> float:
    """Return the planned bytes per token of one evaluation on a GPU: what a correction more takes,
    without the estimate that it starts from and its field's output, which the mix and the norm
    keep."""
    one_correction, two_corrections = (
        training_memory(
            config,
            TrainingStep(
                schedule=schedule, num_sequences=1, precision="bf16", on_gpus=True, forms=forms
            ),
        )
        for schedule in (IterationSchedule((1,)), IterationSchedule((2,)))
    )
    added = (two_corrections["activations"] - one_correction["activations"]) / config.context_length
    return added - 2 * config.dim * 4


@pytest.fixture(params=[8, 2])
def model_for_gpus(request) -> ModelConfig:
    """A model of one layer, with as many key heads as query heads, and with fewer."""
    return preset(
        "tiny", dim=256, ffn_dim=704, num_layers=1, num_heads=8, num_kv_heads=request.param,
        context_length=64, schedule=1,
    )  # fmt: skip


def test_the_plan_for_gpus_counts_what_plain_evaluations_keep(model_for_gpus, monkeypatch):
    plain = kept_by_plain_formulas(Decoder(model_for_gpus), monkeypatch)
    assert plain == pytest.approx(planned_evaluation(model_for_gpus, "plain"), rel=0.02)


@pytest.mark.slow  # It imports Inductor.
def test_the_plan_for_gpus_counts_what_compiled_evaluations_keep(model_for_gpus):
    # A compiler may compute the inputs of the matrices again: the plan does not count on that.
    compiled = kept_by_a_compiled_field(Decoder(model_for_gpus))
    assert compiled < planned_evaluation(model_for_gpus, "compiled") < 1.2 * compiled


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_hidden_states_of_a_teacher_count(checkpoint):
    sizes = {"num_layers": 5, "num_heads": 4, "context_length": 64, "dim": 64, "ffn_dim": 176}
    config = preset("tiny", vocab_size=64, schedule=1, **sizes)
    decoder = Decoder(config)
    decoder.activation_checkpointing = checkpoint
    teacher = frozen_teacher(decoder)
    batch = Batch.of_text(torch.randint(64, (4, 64)))

    def measured(hidden_weight: float) -> int:
        loss = DistillationConfig(hidden_weight=hidden_weight)
        models = torch.nn.ModuleList([decoder, teacher])
        return peak_of(
            models, lambda: distillation_loss(decoder, teacher, batch.input_ids, config=loss)[0]
        )

    def estimate(*, compares_hidden: bool) -> int:
        return training_memory(
            config,
            TrainingStep(
                num_sequences=4,
                activation_checkpointing=checkpoint,
                frozen=config,
                compares_hidden=compares_hidden,
            ),
        )["activations"]

    added = estimate(compares_hidden=True) - estimate(compares_hidden=False)
    assert added == 4 * 64 * 64 * 4 * 5  # Bytes of float32 states of 5 layers.
    with_hidden = measured(1.0)
    assert 0.5 * added < with_hidden - measured(0.0) < 1.01 * added
    assert with_hidden / FACTOR < estimate(compares_hidden=True) < with_hidden * FACTOR


def test_parameter_memory_is_exact():
    config = preset("55m")
    with torch.device("meta"):  # Without their values.
        parameters = sum(p.numel() for p in Decoder(config).parameters())
    memory = training_memory(config, TrainingStep(num_sequences=1))
    assert memory["weights"] == memory["gradients"] == 4 * parameters
    assert memory["AdamW"] == 8 * parameters


@pytest.mark.parametrize("trained", ["all", "corrected", "added"])
def test_the_state_of_muon_and_adamw_is_what_they_keep(trained):
    config = preset(
        "tiny", vocab_size=250, dim=64, ffn_dim=176, num_layers=4, context_length=64,
        schedule="0,2,1,0", method_options={"start": "identity"},
    )  # fmt: skip
    decoder = Decoder(config)
    freeze(decoder.model, trained_part(config.corrections, trained), decoder.lm_head)
    recipe = TrainingSettings(optimizer="muon", trained_layers=trained)
    optimizer = make_optimizer(decoder, recipe)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    measured = {"AdamW": 0, "Muon": 0}
    for parameter, state in optimizer.state.items():
        name = "Muon" if "momentum_buffer" in state else "AdamW"
        measured[name] += sum(v.nbytes for v in state.values() if v.shape == parameter.shape)
    step = TrainingStep(num_sequences=1, trained=trained, optimizer="muon")
    memory = training_memory(config, step)
    assert memory["AdamW"] == pytest.approx(measured["AdamW"], abs=1)
    assert memory["Muon"] == measured["Muon"]
    weights = 4 * num_parameters(config)
    assert checkpoint_bytes(config, recipe) == weights + sum(measured.values())


def test_memory_saving_settings_save_memory():
    config = preset("340m")

    def total(**options: Any) -> int:
        return sum(
            training_memory(config, TrainingStep(**{"num_sequences": 4, **options})).values()
        )

    assert total(num_sequences=2) < total()
    half = config.context_length // 2
    assert total(sequence_length=half) == total(num_sequences=2) < total()
    assert total(activation_checkpointing=True) < 0.5 * total()
    assert total(precision="bf16") < total()
    assert total(num_shards=8) < total()
    with_teacher = total(frozen=config)
    assert with_teacher > total(has_cheaper=True) > total()
    # An eighth of the sharded parts stays, and what a layer gathers.
    alone = training_memory(config, TrainingStep(num_sequences=1))
    shared = training_memory(config, TrainingStep(num_sequences=1, num_shards=8))
    assert shared["AdamW"] == pytest.approx(alone["AdamW"] / 8, rel=1e-6)
    assert shared["weights"] < 0.4 * alone["weights"]
    # Between the passes of a step, a sharded model stays gathered; its gradients do not.
    in_passes = training_memory(config, TrainingStep(num_sequences=1, num_shards=8, num_passes=2))
    assert alone["weights"] < in_passes["weights"] < 1.2 * alone["weights"]
    assert in_passes["gradients"] == shared["gradients"] < 0.4 * alone["gradients"]
