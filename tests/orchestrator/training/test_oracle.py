"""A plain PyTorch loop, which imports nothing of `training/`, ends with the weights of `run_job`.

Tests that compare two runs of the same loop cannot see a fault that both have. This one can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from iiet.decoder import Decoder
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.data.mixture import open_data
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.trainer import run_job

SEED = 7
STEPS = 5
WARMUP = 2
PEAK = 3e-2
FINAL = 0.2
SEQUENCES = 4
LENGTH = 16
FULL = IterationSchedule((2, 1))
NONE = IterationSchedule((0, 0))
CLIP = 0.3
DECAY = 0.4
BETAS = (0.8, 0.9)
KL_WEIGHT = 0.7
TEMPERATURE = 2.0
MUON = {"optimizer": "muon", "muon_rate_factor": 3.0, "muon_momentum": 0.8}
RECIPE: dict[str, Any] = {
    "num_steps": STEPS, "num_tokens_per_step": SEQUENCES * LENGTH, "num_validation_tokens": 64,
    "learning_rate": PEAK, "warmup_steps": WARMUP, "final_learning_rate_fraction": FINAL,
    "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1], "clip_norm": CLIP, "seed": SEED,
}  # fmt: skip


def plain_loop(
    model: Decoder,
    tokens: Path,
    schedules: list[IterationSchedule],
    teacher: Decoder | None,
    *,
    by_muon: bool = False,
) -> Iterator[float]:
    """Train in place; yield the norm of the gradient of each step, before it is clipped."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if "_proj." in name]
    other_parameters = [p for name, p in parameters.items() if "_proj." not in name]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": other_parameters, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups[1:] if by_muon else groups, lr=PEAK, betas=BETAS)
    muon = torch.optim.Muon(
        matrices, weight_decay=DECAY, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    order = {"context_length": LENGTH, "seed": SEED, "global_batch": SEQUENCES}
    for step, schedule in enumerate(schedules):
        ids: Tensor = open_data(tokens).batch(step, rank=0, world_size=1, **order).input_ids
        logits = model(ids, schedule=schedule)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if teacher is not None:
            # The gradient of T^2 KL(teacher || student) is T (q - p), divided by the positions.
            with torch.no_grad():
                p, q = (
                    F.log_softmax(x / TEMPERATURE, dim=-1).exp() for x in (teacher(ids), logits)
                )
                slope = (q - p) * (TEMPERATURE / ids.numel()) * KL_WEIGHT
            loss = loss + (logits * slope).sum()
        model.zero_grad()
        loss.backward()
        yield float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        progress = (step - WARMUP) / (STEPS - 1 - WARMUP)
        cosine = FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress))
        rate = PEAK * (step + 1) / WARMUP if step < WARMUP else PEAK * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if by_muon:
            muon.param_groups[0]["lr"] = 3.0 * rate
            muon.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("objective", ["pretrain", "distill"])
def test_a_plain_loop_ends_with_the_same_weights(
    tmp_path, tiny_tokens, tiny_model, save_tiny, objective, optimizer
):
    torch.manual_seed(SEED)
    model = Decoder(ModelConfig.from_dict(tiny_model))
    teacher = None
    folders = {}
    schedules = [NONE] * 2 + [FULL] * 3
    if objective == "distill":
        folder = save_tiny(tmp_path / "teacher")
        teacher = Decoder.from_pretrained(folder).requires_grad_(False)
        model = Decoder.from_pretrained(folder, torch.float32)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        schedules = [IterationSchedule((1, 0))] * STEPS
        tiny_model = {**tiny_model, "schedule": [1, 0]}
        folders = {"teacher_folder": str(folder), "initial_folder": str(folder)}
    recipe = {**RECIPE, "iterate_from_fraction": 0.4 if objective == "pretrain" else 0.0}
    recipe |= MUON if optimizer == "muon" else {}
    job = TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder=str(tiny_tokens),
        model=tiny_model,  # type: ignore[arg-type]
        recipe=TrainingSettings(**recipe),
        objective=objective,
        distillation=DistillationConfig(kl_weight=KL_WEIGHT, temperature=TEMPERATURE),
        **folders,
    )
    by_muon = optimizer == "muon"
    norms = list(plain_loop(model, tiny_tokens, schedules, teacher, by_muon=by_muon))
    assert max(norms) > CLIP
    weights = load_file(Path(str(run_job(job).checkpoint)) / "model.safetensors")
    expected = {name: p.detach() for name, p in model.named_parameters()}
    print({n: float((weights[n] - expected[n]).abs().max()) for n in expected})
    assert weights.keys() == expected.keys()
    assert not [name for name in weights if not torch.equal(weights[name], expected[name])]
