"""What a training minimizes, with which optimizer, and how it is validated.

Pretraining and distillation differ in their objective and nowhere else. Elastic training adds the
losses under cheaper schedules, each in a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iiet.decoder import Decoder
from iiet.iiad.distillation import AnswerKeeper, Model, elastic_loss, student_loss
from iiet.methods import Evaluation, Layer
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig
from iiet.model.losses import (
    batch_cross_entropy,
    cross_entropy_and_accuracy,
    cross_entropy_by_component,
)
from iiet.model.schedule import IterationSchedule
from orchestrator.settings import ElasticSettings, TrainingSettings
from orchestrator.training.devices import autocast, mean_over_workers, with_all_gradients
from orchestrator.training.schedules import ScheduleByStep
from orchestrator.training.world import World
from orchestrator.workspace.journal import (
    ACCURACY_METRIC,
    OUTPUT_RMS_METRIC,
    VALIDATION_METRIC,
)

Loss = tuple[Tensor, Mapping[str, Tensor]]
"""A scalar loss and its named parts: means over the batch's targets or positions, by its
`target_count` or `position_count`."""
Objective = Callable[[Model, Batch, int], Loss]
"""(model, batch, step) -> its loss."""

LOSS = "loss_"
"""Prefix of a part of the loss: the contribution of a component of a mixture."""
SHARE = "share_of_targets_"
"""Prefix of the component's share of the targets."""
_CHEAPER_PARTS = {"cross_entropy": "cheaper_loss", "kl": "cheaper_kl", "hidden": "cheaper_hidden"}
_RATE_FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate is this multiple of the usual one."""
_SUMS = ("loss", "targets", "right", "answers")


def make_objective(
    schedule_at: ScheduleByStep,
    teacher: Model | None = None,
    distillation: DistillationConfig | None = None,
    component_names: Sequence[str] = (),
) -> Objective:
    """Return the loss under the schedule of the step: cross-entropy, or IIAD with a teacher.

    Args:
        teacher: The frozen teacher.
        distillation: What the student learns from it.
        component_names: Components of a mixture. Without a teacher, the parts then hold what
            `mean_by_component` reads.
    """
    config = distillation or DistillationConfig()

    def loss_of(model: Model, batch: Batch, step: int) -> Loss:
        # The loss is computed within the model's forward pass, where replicas and shards expect it.
        student = partial(model, batch.input_ids, schedule=schedule_at(step))
        if teacher is not None:
            distilled: Loss = student(
                return_hidden=config.needs_hidden(step),
                loss_fn=student_loss(teacher, batch, config=config, step=step),
            )
            return distilled
        if not component_names:
            return student(loss_fn=partial(batch_cross_entropy, batch=batch)), {}
        by_component = partial(
            cross_entropy_by_component, batch=batch, num_components=len(component_names)
        )
        loss, losses, shares = student(loss_fn=by_component)
        parts: dict[str, Tensor] = {}
        for name, of_source, share in zip(component_names, losses, shares, strict=True):
            parts |= {LOSS + name: of_source, SHARE + name: share}
        return loss, parts

    return loss_of


def mean_by_component(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step, with the mean loss of each component instead of its parts.

    A component without targets in this step is left out.
    """
    means = dict(numbers)
    for name in [name.removeprefix(SHARE) for name in numbers if name.startswith(SHARE)]:
        loss = means.pop(LOSS + name)
        share = means.pop(SHARE + name)
        if share:
            means[LOSS + name] = loss / share
    return means


def losses_of(
    objective: Objective,
    model: Model,
    batch: Batch,
    step: int,
    *,
    cheaper: Sequence[IterationSchedule] = (),
    elastic: ElasticSettings | None = None,
    teacher: Model | None = None,
    distillation: DistillationConfig | None = None,
) -> Iterator[Loss]:
    """Yield the losses of a micro-batch, whose sum is minimized.

    The first is the objective. In elastic training, one loss for each drawn cheaper schedule
    follows. Each is computed when it is requested: call `backward` before the next one. In elastic
    training the first loss has the parts of the objective and `full_loss`; the others have
    `cheaper_loss` (their mean cross-entropy), `cheaper_kl` and `cheaper_hidden`.

    Args:
        cheaper: The cheaper schedules that are drawn in this step.
        teacher: What they learn from (default: the full schedule of the same step). A teacher that
            computes its predictions should be a `RememberingTeacher`.
        distillation: The loss of what they learn from a teacher.
    """
    if not cheaper or elastic is None:
        yield objective(model, batch, step)
        return
    model = with_all_gradients(model)
    full = AnswerKeeper(model)
    loss, parts = objective(model if teacher else full, batch, step)
    yield loss, {**parts, "full_loss": loss}
    for schedule in cheaper:
        if teacher:
            objective_of_schedule = make_objective(_every_step(schedule), teacher, distillation)
            loss, parts = objective_of_schedule(model, batch, step)
        else:
            assert full.answer is not None
            from_full = DistillationConfig(
                kl_weight=elastic.kl_weight, temperature=elastic.temperature
            )
            loss_fn = elastic_loss(full.answer, batch, from_full)
            loss, parts = model(batch.input_ids, schedule=schedule, loss_fn=loss_fn)
        means = {_CHEAPER_PARTS[name]: part / len(cheaper) for name, part in parts.items()}
        yield elastic.weight * loss, means


def _every_step(schedule: IterationSchedule) -> Callable[[int], IterationSchedule]:
    return lambda _step: schedule


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the other parameters, as one optimizer.

    The groups and the state of both are those of this optimizer. So rates are set, and the state is
    saved and loaded, as with a single optimizer.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._muon = muon
        self._adamw = adamw
        self._num_groups_of_muon = len(muon.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        self._muon.param_groups = self.param_groups[: self._num_groups_of_muon]
        self._adamw.param_groups = self.param_groups[self._num_groups_of_muon :]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._share()  # Loading has made new groups and a new state.

    def step(self) -> None:  # type: ignore[override]
        """Update all parameters."""
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()


def make_optimizer(model: nn.Module, recipe: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer of a decoder's trained parameters, on the decoder's device.

    AdamW, fused on CUDA, decays only the weight matrices of linear layers, its first group. They
    are found by module type, because the learned mix must not decay: its rows sum to one at the
    start, and decay would shrink the hidden state. A head that is tied to the embedding counts as
    the embedding. Gates are the last group, with a learning rate of their own.

    With `muon`, Muon updates the matrices of the layers' fields, with the same decay and a learning
    rate of its own. Its updates are as large as AdamW's (`match_rms_adamw`). The FLOPs of trainings
    and plans are those of the passes, without the optimizer's.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    gates = {id(gate) for layer in layers for gate in layer.gates()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = linear - {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if id(p) in decayed]
    others = [p for p in parameters if id(p) not in decayed | gates]
    gated = [p for p in parameters if id(p) in gates]
    factor = recipe.gate_rate_factor
    by_muon: list[nn.Parameter] = []
    if recipe.optimizer == "muon":
        of_fields = {id(p) for layer in layers for p in layer.field_parameters()}
        by_muon = [p for p in matrices if id(p) in of_fields]
        matrices = [p for p in matrices if id(p) not in of_fields]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": gated, "weight_decay": 0.0, _RATE_FACTOR: factor},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        fused=all(p.is_cuda for p in parameters),
    )
    if not by_muon:  # Or all matrices are frozen.
        return adamw
    muon = torch.optim.Muon(
        [{"params": by_muon, _RATE_FACTOR: recipe.muon_rate_factor}],
        weight_decay=recipe.weight_decay,
        momentum=recipe.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, adamw)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group; the rates of gates and of Muon are multiples of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATE_FACTOR, 1.0)


@torch.no_grad()
def validation_metrics(
    decoder: Decoder,
    batches: Sequence[Batch],
    schedule: IterationSchedule,
    *,
    precision: str,
    world: World,
    component_names: Sequence[str] = (),
    before_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Return loss and accuracy on held-out batches, by name of the metric.

    Batches and result are the same on every worker. Each worker takes every n-th batch. All workers
    must run a sharded model together, so if the last round has too few batches, the others run one
    without counting it. The decoder's mode (training or evaluation) is restored afterwards.

    Args:
        component_names: Components of a mixture; each batch is of one component. Without names
            there are no numbers by component.
        before_batch: Called before each batch, for example to end here when a stop is requested.

    Returns:
        `validation/loss`: the mean per target in nats, NaN without targets. `validation/accuracy`:
        over the targets that are not text, if there are any. Of a mixture also both for each
        component, such as `validation/loss_python` and `validation/accuracy_phop_6`.
    """
    names = [f"_{name}" for name in component_names] or [""]
    sums = {kind + name: 0.0 for name in names for kind in _SUMS}
    was_training = decoder.training
    decoder.eval()
    for first in range(0, len(batches), world.size):
        if before_batch:
            before_batch()
        number = first + world.rank
        batch = batches[min(number, len(batches) - 1)]
        num_targets = batch.num_targets
        name = names[0]
        if component_names and batch.component_numbers is not None:
            name = names[int(batch.component_numbers[0, 0])]  # The whole batch is of one component.
        batch = batch.to(world.device)
        with autocast(precision, world):
            loss_of = batch_cross_entropy if batch.is_text else cross_entropy_and_accuracy
            loss_fn = partial(loss_of, batch=batch)
            means = decoder(batch.input_ids, schedule=schedule, loss_fn=loss_fn)
        if number < len(batches):
            loss, *accuracies = means if isinstance(means, tuple) else (means,)
            sums["loss" + name] += loss.item() * num_targets
            sums["targets" + name] += num_targets
            for accuracy in accuracies:
                sums["right" + name] += accuracy.item() * num_targets
                sums["answers" + name] += num_targets
    decoder.train(was_training)

    # Means over the workers instead of sums: only ratios are used.
    sums = mean_over_workers(sums, world)
    sums |= {kind: sum(sums[kind + name] for name in names) for kind in _SUMS}
    metrics = {VALIDATION_METRIC: math.nan}
    for name in dict.fromkeys(["", *names]):
        if sums["targets" + name]:
            metrics[VALIDATION_METRIC + name] = sums["loss" + name] / sums["targets" + name]
        if sums["answers" + name]:
            metrics[ACCURACY_METRIC + name] = sums["right" + name] / sums["answers" + name]
    return metrics


@torch.no_grad()
def output_sizes(
    decoder: Decoder,
    input_ids: Tensor,
    schedule: IterationSchedule,
    *,
    precision: str,
    world: World,
) -> dict[str, float]:
    """Return how large the outputs of the fields are on a few tokens, by name of the metric.

    Hidden states that grow with each evaluation make a training diverge later, which its loss does
    not show. So each evaluation within a layer has one number (0 is the prediction): the root mean
    square over tokens and channels, in the layer where it is largest. Every worker reads the same
    tokens, because a sharded model needs all workers.

    Args:
        input_ids: (batch, time) of token ids.
    """
    squares: dict[tuple[int, int], Tensor] = {}

    def observe(seen: Evaluation) -> None:
        squares[seen.layer, seen.k] = seen.output.float().square().mean()

    was_training = decoder.training
    decoder.eval()
    with autocast(precision, world):
        # This call makes a sharded model gather its weights; no logits are needed.
        decoder(
            input_ids.to(world.device),
            schedule=schedule,
            observe=observe,
            loss_fn=lambda _logits: None,
        )
    decoder.train(was_training)
    sizes: dict[str, float] = {}
    for (_, k), square in squares.items():
        name = f"{OUTPUT_RMS_METRIC}_{k}"
        sizes[name] = max(sizes.get(name, 0.0), math.sqrt(float(square)))
    return sizes
