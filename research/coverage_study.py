"""`python research/coverage_study.py`: do intervals hold the truth, and are verdicts rarely false?

Models are made up whose true accuracies are known: each answers an item rightly with a probability
that depends on the item and on the seed of the training. What the program's own functions say of
them is counted. Out: the tables of `coverage.md`, written anew. A test runs the same on fewer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from retrofit_results import with_part

from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.records.evaluation import EvaluationResult, Suite, TaskResult
from orchestrator.records.metrics import CONFIDENCE_ON_FRONT
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Role, Trial
from orchestrator.reporting.claims import PAPER_SHARE_OF_FULL, find_claims
from orchestrator.reporting.findings import tied_with_full
from orchestrator.reporting.front import Front, find_front, with_confidence
from orchestrator.reporting.pick_rules import PickRule, pick_from_front
from orchestrator.reporting.results import model_results
from orchestrator.reporting.sections import markdown_table
from orchestrator.reporting.statistics import Floats, Interval, ItemValues, Scores
from orchestrator.settings import TrainingSettings
from orchestrator.workspace.files import write_text

PAGE = Path(__file__).with_name("coverage.md")
BEGIN = "<!-- made by `python research/coverage_study.py` -->"
NUM_RUNS = 2000
"""Of a coverage; its standard error is half a point."""
NUM_SWEEPS = 500
"""Of a share of false verdicts; its standard error is a point."""
NUM_ITEMS = 2000
"""Of a coverage."""
NUM_SWEEP_ITEMS = 500
"""Of a sweep."""
ACCURACY = 0.6
HARDNESS_SPREAD = 0.4
"""From the hardest item to the easiest one, of the probability of a right answer."""
NUM_LAYERS = 20
"""Students with one or two corrections in all then cost at most 1.1 times vanilla."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What differs between items, seeds and models."""

    num_seeds: int
    seed_spread: float = 0.0
    """Standard deviation of the true accuracy over seeds."""
    share_common: float = 0.5
    """Share of items that all models and seeds of one accuracy answer alike."""
    share_of_model: float = 0.0
    """Share of items that all seeds of a model answer alike, and other models otherwise."""
    num_items: int = NUM_ITEMS

    def answers(self, rng: np.random.Generator, accuracies: Sequence[float]) -> list[Floats]:
        """Return the answers of models of these true accuracies, each (seeds, items)."""
        items = self.num_items
        easiness = HARDNESS_SPREAD * (rng.random(items) - 0.5)
        common_chance = rng.random(items)
        kind = rng.random(items)
        models = []
        for accuracy in accuracies:
            chance_of_model = rng.random(items)
            is_of_model = kind < self.share_common + self.share_of_model
            shifts = self.seed_spread * rng.standard_normal(self.num_seeds)
            seeds = []
            for shift in shifts:
                chance = np.where(is_of_model, chance_of_model, rng.random(items))
                chance = np.where(kind < self.share_common, common_chance, chance)
                seeds.append(chance < accuracy + easiness + shift)
            models.append(np.stack(seeds).astype(float))
        return models


def evaluation(is_right: Floats) -> EvaluationResult:
    """Return the evaluation of one training."""
    task = TaskResult(
        name="hops",
        version="1",
        num_items=len(is_right),
        metrics={"acc": float(is_right.mean())},
        items=[str(number) for number in range(len(is_right))],
        values={"acc": is_right.tolist()},
    )
    return EvaluationResult(results={"hops": task})


def coverage(
    world: World, interval_of: Callable[[Sequence[Floats]], Interval], truth: float, *, runs: int
) -> float:
    """Return the share of runs in which the interval of two equal models holds the truth."""
    rng = np.random.default_rng(0)
    num_held = 0
    for _ in range(runs):
        interval = interval_of(world.answers(rng, [ACCURACY, ACCURACY]))
        num_held += interval.low <= truth <= interval.high
    return num_held / runs


def difference(models: Sequence[Floats]) -> Interval:
    """Return the interval of a difference of two models, which is truly zero."""
    return _scores(models).difference(0, 1).interval()


def mean(models: Sequence[Floats]) -> Interval:
    """Return the interval of a model's accuracy."""
    return _scores(models).score(0).interval()


def _scores(models: Sequence[Floats]) -> Scores:
    values = np.concatenate(models)
    items = ItemValues("acc", values, np.ones(values.shape[1]))
    return items.scores([len(seeds) for seeds in models])


# Sweeps of several students


def sweep_front(
    world: World,
    rng: np.random.Generator,
    *,
    num_students: int,
    share_kept: float = 1.0,
    plain_share: float = 0.8,
) -> Front:
    """Return the front of a teacher, its students, vanilla and r = 0.

    Args:
        share_kept: Share of the teacher's true accuracy that each student keeps.
        plain_share: The same of vanilla and r = 0.
    """
    names = ["teacher", "vanilla", "r = 0", *(f"student {n}" for n in range(num_students))]
    shares = [1.0, plain_share, plain_share, *[share_kept] * num_students]
    answers = world.answers(rng, [ACCURACY * share for share in shares])
    trials = []
    items = {}
    for name, seeds in zip(names, answers, strict=True):
        for seed, is_right in enumerate(seeds):
            trial = _trial(name, seed, float(is_right.mean()), has_seeds=len(seeds) > 1)
            trials.append(trial)
            items[trial.key] = evaluation(is_right)
    front = find_front(model_results(trials))
    return with_confidence(front, items, demanded_share=PAPER_SHARE_OF_FULL)


def _trial(name: str, seed: int, accuracy: float, *, has_seeds: bool) -> Trial:
    kind, _, number = name.partition(" ")
    corrections = [0] * NUM_LAYERS
    role: Role = "baseline"
    if kind == "teacher":
        role = "teacher"
        corrections = [3] * NUM_LAYERS
    elif kind == "student":
        role = "trial"
        corrections[int(number)] = 1
    model = ModelConfig(
        vocab_size=7, dim=16, num_layers=NUM_LAYERS, num_heads=2, num_kv_heads=2, ffn_dim=32,
        context_length=16, method="vanilla" if kind == "vanilla" else "iiet",
        schedule=None if kind == "vanilla" else IterationSchedule(tuple(corrections)),
    )  # fmt: skip
    checkpoint = f"teacher, {seed}" if kind == "student" else f"{name}, {seed}"
    job = TrainingJob(
        run_folder="", tokens_folder="", model=model, recipe=TrainingSettings(),
        objective="distill" if kind == "student" else "pretrain",
        teacher_folder=checkpoint if kind == "student" else None,
    )  # fmt: skip
    numbers = {"cost/evaluations": NUM_LAYERS + sum(corrections), "quality/accuracy": accuracy}
    return Trial(
        key=f"{name}, {seed}", label=name, role=role, model=model, folder="", suite=Suite(),
        checkpoint=checkpoint, job=job, parent=f"teacher, {seed}" if kind == "student" else None,
        seed=seed if has_seeds else None, group=name if has_seeds else None, numbers=numbers,
    )  # fmt: skip


def _claim_holds(front: Front, key: str) -> bool:
    return any(claim.key == key and claim.verdict == "holds" for claim in find_claims(front))


def keeps_by_claim(front: Front) -> bool:
    """Whether claim 3 holds: a student keeps the share."""
    return _claim_holds(front, "saved_overhead_nfe")


def keeps_by_pick(front: Front) -> bool:
    """Whether `pick --keep --confidence 0.95` takes a student."""
    rule = PickRule(name="keep", demanded_share=PAPER_SHARE_OF_FULL, confidence=0.95)
    return pick_from_front(front, rule).role == "trial"


def beats_vanilla(front: Front) -> bool:
    """Whether claim 4 holds: the best student beats vanilla at its cost."""
    return _claim_holds(front, "student_over_vanilla_nfe")


def any_is_surely_on_front(front: Front) -> bool:
    """Whether a student is surely on the front, of those that cost the same."""
    students = [model for model in front.placed if model.role == "trial"]
    return any((student.number(CONFIDENCE_ON_FRONT) or 0.0) >= 0.95 for student in students)


def any_differs(front: Front) -> bool:
    """Whether a student is not tied with the teacher."""
    tied = {model.key for model in tied_with_full(front)}
    return any(model.role == "trial" and model.key not in tied for model in front.placed)


VERDICTS: dict[str, tuple[Callable[[Front], bool], Mapping[str, float]]] = {
    "claim 3: a student keeps 99.4 %": (keeps_by_claim, {"share_kept": PAPER_SHARE_OF_FULL}),
    "`pick --keep --confidence` takes a student": (
        keeps_by_pick,
        {"share_kept": PAPER_SHARE_OF_FULL},
    ),
    "claim 4: the best student beats vanilla": (beats_vanilla, {"plain_share": 1.0}),
    "a student is surely on the front": (any_is_surely_on_front, {}),
    "a student is not tied with the teacher": (any_differs, {}),
}
"""Verdict that is false -> whether it is given, and the sweep in which it is false by a hair, or
all models are equal."""


def false_share(name: str, world: World, *, num_students: int, sweeps: int) -> float:
    """Return the share of sweeps in which a false verdict is given."""
    is_given, truth = VERDICTS[name]
    rng = np.random.default_rng(0)
    fronts = (sweep_front(world, rng, num_students=num_students, **truth) for _ in range(sweeps))
    return sum(map(is_given, fronts)) / sweeps


# The page


def page_markdown() -> str:
    """Return both tables."""
    rows = []
    for num_seeds in (1, 2, 3, 5, 10):
        for seed_spread in (0.0, 0.005, 0.03, 0.12) if num_seeds > 1 else (0.0,):
            cells = [str(num_seeds), f"{100 * seed_spread:g}"]
            for share_of_model in (0.0, 0.25):
                world = World(
                    num_seeds=num_seeds, seed_spread=seed_spread, share_of_model=share_of_model
                )
                for interval_of, truth in ((difference, 0.0), (mean, ACCURACY)):
                    share = coverage(world, interval_of, truth, runs=NUM_RUNS)
                    cells.append(f"{100 * share:.1f}")
            rows.append(cells)
            print(*rows[-1], flush=True)
    heads = [
        "seeds", "spread of the seeds, points", "difference", "accuracy",
        "difference, models differ by item", "accuracy, likewise",
    ]  # fmt: skip
    parts = [markdown_table(heads, rows)]
    rows = []
    for name in VERDICTS:
        cells = [name]
        for num_seeds, num_students in ((1, 1), (1, 6), (1, 12), (3, 1), (3, 6), (3, 12)):
            world = World(
                num_seeds=num_seeds,
                seed_spread=0.01 if num_seeds > 1 else 0.0,
                num_items=NUM_SWEEP_ITEMS,
            )
            if num_students == 1 and name == "a student is surely on the front":
                cells.append("")  # Nothing costs less.
                continue
            share = false_share(name, world, num_students=num_students, sweeps=NUM_SWEEPS)
            cells.append(f"{100 * share:.1f}")
        rows.append(cells)
        print(*cells, flush=True)
    columns = [f"{s} seed{'s' * (s > 1)}, {n}" for s in (1, 3) for n in (1, 6, 12)]
    parts.append(markdown_table(["false verdict", *columns], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    write_text(PAGE, with_part(PAGE.read_text("utf-8"), BEGIN, page_markdown()))
