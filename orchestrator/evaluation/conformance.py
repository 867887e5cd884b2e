"""Write a model's conformance file, to which any other implementation can be held.

It holds the logits of decode steps under up to three iteration schedules. The script that checks a
back end is written beside it (`check_conformance.py`, which says what the file holds).
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from iiet.cache import KvStrategy
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.evaluation import check_conformance
from orchestrator.evaluation.kv_strategies import logits_of_steps

FILE = "conformance.safetensors"
NUM_STEPS = 64
NUM_PROMPT = 32


def write_conformance(decoder: Decoder, folder: Path) -> None:
    """Write the conformance file of a decoder, and the script that reads it, into a folder."""
    context = decoder.config.context_length
    num_prompt = min(NUM_PROMPT, context // 2)
    length = min(num_prompt + NUM_STEPS, context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (length,), generator=generator)
    exact = copy.deepcopy(decoder).cpu().double().eval()
    tensors = {
        f"logits/{name}": decode_logits(exact, ids, num_prompt, schedule).float()
        for name, schedule in conformance_schedules(decoder).items()
    }
    save_file({"ids": ids, **tensors}, folder / FILE, metadata={"num_prompt": str(num_prompt)})
    shutil.copyfile(check_conformance.__file__, folder / "check_conformance.py")


def conformance_schedules(decoder: Decoder) -> dict[str, IterationSchedule | None]:
    """Return schedules by name: the model's own, its corrections in every other layer, none.

    A method without corrections has one, `-`.
    """
    if not decoder.method.has_corrections:
        return {"-": None}
    own = decoder.schedule
    if decoder.method.repeats_stack:  # All layers make as many.
        half = IterationSchedule.uniform(len(own), own.max_corrections // 2)
    else:  # So layers with and without corrections follow each other.
        half = IterationSchedule(tuple(r if layer % 2 == 0 else 0 for layer, r in enumerate(own)))
    schedules = (own, half, IterationSchedule.none(len(own)))
    return {str(schedule): schedule for schedule in schedules}


@torch.inference_mode()
def decode_logits(
    decoder: Decoder,
    ids: Tensor,
    num_prompt: int,
    schedule: IterationSchedule | None = None,
    *,
    kv_strategy: KvStrategy = "exact",
) -> Tensor:
    """Read the prompt at once and each other id, (time,), by a step of its own.

    Returns:
        The logits after each step, (time - num_prompt, vocab).
    """
    decoder = decoder if schedule is None else decoder.with_schedule(schedule)
    return logits_of_steps(decoder, ids[None], num_prompt, kv_strategy=kv_strategy)[0]
