"""A teacher's logits on disk: computed once, read by all students of a sweep.

`teachers/KEY/answers.bin` holds the logits of all sequences in the order of the steps, (sequence,
time, vocab), as float32 or bfloat16; `manifest.json` has its checksum, and a hash of each
sequence's tokens. The key stands for all that determines them. A student that reads them gets the
same losses to the last bit, on the same machine with the same number of threads, and runs no
teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iiet.config import DistillationConfig, ModelConfig
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import load_config, weights_key
from orchestrator.models.open import DTYPES, load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.training.devices import autocast, frozen_dtype
from orchestrator.training.job import sequences_per_step
from orchestrator.training.world import OnDevice, World
from orchestrator.workspace import files
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.locks import lock_file
from orchestrator.workspace.provenance import content_key

ANSWERS, MANIFEST = "answers.bin", "manifest.json"
FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Content of a cache, known before it is written."""

    origin: dict[str, Any]
    """JSON-able: everything else that determines the logits."""
    num_steps: int
    """Steps whose loss needs the teacher."""
    num_sequences: int
    """Sequences per step, of all workers together."""
    context_length: int
    vocab_size: int
    precision: str = "fp32"

    @property
    def key(self) -> str:
        """Hash of everything that determines the content; the name of the folder."""
        return content_key("teacher cache", FORMAT_VERSION, asdict(self))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_steps * self.num_sequences * self.context_length

    @property
    def num_bytes(self) -> int:
        """Size of the logits."""
        return self.num_tokens * self.vocab_size * int(DTYPES[self.precision].itemsize)


def cache_plan(job: TrainingJob) -> CachePlan | None:
    """Return the `answers_plan` of a job, whose tokens and teacher must exist."""
    if job.objective != "distill" or not job.teacher_folder:
        return None
    folder, loss = Path(job.teacher_folder), job.distillation or DistillationConfig()
    origin = {"teacher": weights_key(folder), "tokens": open_data(job.tokens_folder).fingerprint}
    return answers_plan(load_config(folder), job.recipe, loss, **origin)


def answers_plan(
    model: ModelConfig, recipe: TrainingSettings, loss: DistillationConfig, **origin: str
) -> CachePlan | None:
    """Return the logits that a recipe and a loss need; None if none, or hidden states are, too.

    Args:
        model: The teacher's configuration.
        origin: Keys of its weights and of the tokens; not needed if only the size matters.
    """
    steps = list(filter(loss.uses_teacher, range(recipe.num_steps)))
    if loss.hidden_weight or not steps:
        return None
    return CachePlan(
        origin={
            **origin,
            "model": model.to_dict(),
            "seed": recipe.seed,
            "first_step": steps[0],
            # The last bits of a row can depend on how many rows are computed together.
            "sequences_per_pass": recipe.num_sequences_per_pass,
        },
        num_steps=len(steps),
        num_sequences=sequences_per_step(recipe, model),
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        precision=recipe.precision,
    )


class CachedTeacher:
    """A teacher that reads its logits from a cache; called like a decoder.

    It finds a sequence by the hash of its tokens: an unknown one is an error, never a wrong answer.
    The file is memory-mapped, so the workers and trials of one machine share it.
    """

    def __init__(self, path: Path, plan: CachePlan, sequences: Sequence[str]) -> None:
        size = plan.num_tokens * plan.vocab_size
        logits = torch.from_file(str(path), size=size, dtype=DTYPES[plan.precision])
        self._path, self._logits = path, logits.view(-1, plan.context_length, plan.vocab_size)
        self._numbers = {found: number for number, found in enumerate(sequences)}

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the teacher's logits for sequences (batch, time) of the plan, in any order.

        Raises:
            KeyError: If a sequence is not part of the plan.
        """
        try:
            numbers = [self._numbers[found] for found in _hashes(input_ids)]
        except KeyError:
            raise KeyError(f"{self._path} has no answer for a requested sequence") from None
        return self._logits[numbers].to(input_ids.device)


def _hashes(sequences: Tensor) -> list[str]:
    rows = sequences.to("cpu", torch.int32).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]


def open_cache(parent: Path, plan: CachePlan) -> CachedTeacher | None:
    """Open the cache of a plan in the folder of all caches; None if it is missing or damaged."""
    folder = parent / plan.key
    # Another process may delete it at any time.
    with suppress(UserError, FileNotFoundError), files.damage_as_user_error(folder / MANIFEST):
        manifest = files.read_json(folder / MANIFEST)
        if manifest and not files.damaged_file(folder, manifest["checksums"]):
            return CachedTeacher(folder / ANSWERS, plan, manifest["sequences"])
    return None


def missing_caches(plans: Iterable[CachePlan | None], parent: Path) -> list[CachePlan]:
    """Return those of the plans, each once, that have no intact cache in a folder."""
    planned = {plan.key: plan for plan in plans if plan}
    return [plan for plan in planned.values() if not open_cache(parent, plan)]


def load_teacher(job: TrainingJob, world: World) -> Decoder | CachedTeacher | None:
    """Return the frozen teacher on this worker's device, or its stored answers if they are intact;
    None if the job has none.
    """
    if job.objective != "distill" or job.teacher_folder is None:
        return None
    plan = cache_plan(job) if job.teacher_cache else None
    if plan and (cached := open_cache(Path(str(job.teacher_cache)), plan)):
        return cached
    dtype = frozen_dtype(job.recipe.precision, world.device)
    folder = Path(job.teacher_folder)
    return load_model(folder, device=world.device, dtype=dtype, check=False, frozen=True)


def store_answers(
    jobs: Sequence[TrainingJob], parent: Path, *, on_device: OnDevice, progress: Progress
) -> tuple[int, float]:
    """Store what the teachers of jobs answer, in a folder of all caches.

    `on_device` runs the teachers. Returns the tokens that they have read, and the FLOPs of that.

    Raises:
        RunFailed: If the disk fills up.
    """
    plans = [cache_plan(job) for job in jobs]
    missing = missing_caches(plans, parent)
    flops = 0.0
    for plan in missing:  # An intact cache needs no teacher and no device.
        job = jobs[plans.index(plan)]
        teacher = inference_cost(load_config(Path(str(job.teacher_folder))))
        flops += plan.num_tokens * teacher.forward_flops_per_token
        progress.start("teacher", plan.num_steps)
        try:
            on_device(partial(write_cache, plan, parent, partial(answers_of, job)), progress)
        except OSError as error:
            raise RunFailed(
                f"cannot store the teacher's answers in {parent} ({error.strerror or error}); "
                "free disk space, or set distillation.teacher_cache=false"
            ) from None
        progress.finish(f"answers for {plan.num_tokens:,} tokens, {format_bytes(plan.num_bytes)}")
    return sum(plan.num_tokens for plan in missing), flops


def answers_of(job: TrainingJob, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the sequences and logits of each step, computed as the job itself would."""
    data, recipe, world = open_data(job.tokens_folder), job.recipe, World(device=device)
    teacher: Any = load_teacher(job.model_copy(update={"teacher_cache": None}), world)
    loss = job.distillation or DistillationConfig()
    for step in filter(loss.uses_teacher, range(recipe.num_steps)):
        sequences = data.batch(
            step,
            context_length=job.model.context_length,
            seed=recipe.seed,
            global_batch=sequences_per_step(recipe, job.model),
        ).input_ids
        with torch.no_grad(), autocast(recipe.precision, world):
            # The device keeps the logits of one pass only, as in the job itself.
            parts = torch.split(sequences, recipe.num_sequences_per_pass or len(sequences))
            logits = torch.cat([teacher(part.to(device)).cpu() for part in parts])
        yield sequences, logits


def write_cache(
    plan: CachePlan,
    parent: Path,
    answers: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
    device: str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write the cache of a plan, unless an intact one exists.

    Args:
        answers: Device -> for each step, its sequences (batch, time) and the logits.

    Raises:
        OSError: If the disk is full.
    """
    with lock_file(parent / f".{plan.key}.lock"):
        if open_cache(parent, plan):  # Another process has written it.
            return
        with files.new_folder(parent / plan.key) as folder:
            found: list[str] = []
            with (folder / ANSWERS).open("wb") as file:
                for number, (sequences, logits) in enumerate(answers(device), start=1):
                    found += _hashes(sequences)
                    file.write(logits.contiguous().view(torch.uint8).numpy().data)
                    (progress or Progress()).advance(number)
            manifest = {"checksums": files.checksums_of(folder), "sequences": found}
            files.write_json(folder / MANIFEST, manifest)
