"""The loss is the stated sum, the teacher never changes, and the student learns from it."""

import copy
import math

import pytest
import torch
from model_cases import make_model, tokens

from iiet.iiad.distillation import distillation_loss, frozen_teacher
from iiet.model.batch import NO_TARGET, Batch
from iiet.model.config import DistillationConfig
from iiet.model.losses import cross_entropy, hidden_state_error, kl_divergence, next_token_loss
from iiet.model.schedule import IterationSchedule

TOKENS = tokens(4, 12)


def full_decoder(schedule=(2, 2)):
    return make_model(schedule=schedule, dtype=torch.float32)


def teacher_and_student():
    teacher = frozen_teacher(full_decoder())
    return teacher, full_decoder().with_schedule(IterationSchedule((1, 0)))


class Forbidden(torch.nn.Module):
    """A teacher that must not run."""

    def forward(self, input_ids, **options):
        raise AssertionError("the teacher was run")


def test_without_weight_or_outside_its_window_no_teacher_runs():
    student = full_decoder()
    plain = next_token_loss(student(TOKENS), TOKENS).item()
    window = DistillationConfig(start_step=3, end_step=5)
    for config, step in [(DistillationConfig(kl_weight=0.0), 0), (window, 2), (window, 5)]:
        loss, parts = distillation_loss(student, Forbidden(), TOKENS, config=config, step=step)
        assert loss.item() == plain
        assert list(parts) == ["cross_entropy"]
        distillation_loss(student, None, TOKENS, config=config, step=step)
    assert [step for step in range(8) if window.uses_teacher(step)] == [3, 4]
    for step in (3, 4):
        with pytest.raises(AssertionError, match="was run"):
            distillation_loss(student, Forbidden(), TOKENS, config=window, step=step)
        with pytest.raises(ValueError, match="teacher"):
            distillation_loss(student, None, TOKENS, config=window, step=step)


class Watched(torch.nn.Module):
    """A teacher that records whether it is in training mode where it runs."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        self.was_training = []

    def forward(self, *arguments, **options):
        self.was_training.append(any(module.training for module in self.modules()))
        return self.decoder(*arguments, **options)


def test_a_teacher_is_never_in_training_mode():
    student = full_decoder().train()
    assert not any(module.training for module in frozen_teacher(student).modules())
    assert student.training, "a frozen teacher is a copy"
    teacher = Watched(full_decoder()).train()
    distillation_loss(student, teacher, TOKENS, config=DistillationConfig())
    assert teacher.was_training == [False]
    assert student.training


def test_the_teacher_shares_nothing_that_the_optimizer_touches():
    decoder = full_decoder()
    teacher = frozen_teacher(decoder)
    student = decoder.with_schedule(IterationSchedule((0, 0)))
    weights_before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    loss, _ = distillation_loss(student, teacher, TOKENS, config=DistillationConfig())
    loss.backward()
    optimizer.step()
    assert all(
        torch.equal(weights_before[name], value) for name, value in teacher.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student_addresses = {parameter.data_ptr() for parameter in student.parameters()}
    assert not student_addresses & {parameter.data_ptr() for parameter in teacher.parameters()}


def compiled_fields(decoder):
    for layer in decoder.model.layers:
        layer.field = torch.compile(layer.field, backend="eager")
    return decoder


def wrapped_fields(decoder):
    for layer in decoder.model.layers:
        layer.field = (lambda field: lambda *args: field(*args))(layer.field)
    return decoder


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(compiled_fields, id="compiled fields"),
        pytest.param(wrapped_fields, id="wrapped fields"),
        pytest.param(
            lambda decoder: torch.compile(decoder, backend="eager"),
            id="compiled whole",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@torch.no_grad()
def test_a_teacher_made_of_a_compiled_student_does_not_follow_it(prepare):
    student = full_decoder((1,))
    teacher = frozen_teacher(prepare(student))
    expected = full_decoder((1,))(TOKENS)
    for parameter in student.parameters():
        parameter.mul_(2)
    torch.testing.assert_close(teacher(TOKENS), expected)


@pytest.mark.parametrize("attribute", ["forward", "_compiled_call_impl"])
@torch.no_grad()
def test_a_student_of_a_compiled_decoder_follows_its_own_schedule(attribute):
    schedule = IterationSchedule((0, 0))
    expected = full_decoder()(TOKENS, schedule=schedule)
    decoder = full_decoder()
    compiled = decoder._call_impl if attribute == "_compiled_call_impl" else decoder.forward
    setattr(decoder, attribute, lambda *args, **options: compiled(*args, **options))
    assert torch.equal(decoder.with_schedule(schedule)(TOKENS), expected)


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [("text", "forward"), ("masked text", "reverse"), ("few targets", "forward")],
)
def test_the_loss_is_the_weighted_sum_of_its_parts_over_the_selected_positions(kind, divergence):
    teacher, student = (model.double() for model in teacher_and_student())
    student.requires_grad_(False)
    config = DistillationConfig(
        kl_weight=0.7, temperature=2.0, divergence=divergence, hidden_weight=0.3
    )
    mask = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    batch = {
        "text": Batch.of_text(TOKENS),
        "masked text": Batch.of_text(TOKENS, mask),
        "few targets": Batch(TOKENS, TOKENS.flip(1).masked_fill(~mask, NO_TARGET)),
    }[kind]
    taught = torch.ones_like(mask) if batch.teacher_mask is None else batch.teacher_mask
    assert 0 < batch.num_targets <= int(taught.sum())
    teacher_answers = teacher(TOKENS, return_hidden=True)
    student_answers = student(TOKENS, return_hidden=True)

    def spoiled(values):
        """Return values that ask for a gradient; positions that do not count hold no numbers."""
        return values.masked_fill(~taught.unsqueeze(-1), math.nan).requires_grad_()

    logits = spoiled(student_answers[0])
    hidden = [spoiled(h) for h in student_answers[1]]
    loss, parts = distillation_loss(
        lambda *_, **__: (logits, hidden),
        lambda *_, **__: (spoiled(teacher_answers[0]), [spoiled(h) for h in teacher_answers[1]]),
        batch,
        config=config,
    )
    teacher_logits = teacher_answers[0][taught][None]
    student_logits = student_answers[0][taught][None].requires_grad_()
    kl = kl_divergence(teacher_logits, student_logits, temperature=2.0, kind=divergence)
    error = hidden_state_error(
        [h[taught] for h in teacher_answers[1]], [h[taught] for h in student_answers[1]]
    )
    entropy = cross_entropy(student_logits, batch.targets[taught][None])
    expected = entropy + 0.7 * kl + 0.3 * error
    expected_parts = {"cross_entropy": entropy.item(), "kl": kl.item(), "hidden": error.item()}
    assert {n: part.item() for n, part in parts.items()} == pytest.approx(expected_parts, rel=1e-12)
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad[taught][None], student_logits.grad)
    assert not any(values.grad[~taught].any() for values in (logits, *hidden))


def test_low_and_double_precision():
    teacher, student = teacher_and_student()
    config = DistillationConfig(hidden_weight=1.0)
    exact, _ = distillation_loss(
        copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), TOKENS, config=config
    )
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = distillation_loss(student, teacher, TOKENS, config=config)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    rough.backward()
    half, _ = distillation_loss(student.half(), teacher.half(), TOKENS, config=config)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.005)
