"""Jobs get CPUs or GPUs for all of their workers or none, on nodes that really hold them."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import dataclass

import pytest
from refusals import refused

from orchestrator.cluster.placement import Placement, job_placement
from orchestrator.planning.machine import Node, Resources
from orchestrator.settings import SweepSettings
from orchestrator.workspace.errors import UserError

HEAD = Node(8)
DOCUMENTED = (HEAD, *[Node(64, 8)] * 4)
UNEQUAL = (HEAD, Node(64, 8), Node(16, 4))
FEW_CPUS = (Node(4, 8), Node(16, 8))
CLUSTERS = [
    (Node(2),), (Node(16, 2),), (Node(3), Node(3)), (Node(7), Node(2), Node(5)),
    DOCUMENTED, UNEQUAL, FEW_CPUS, (Node(1, 1), Node(31, 4)), (Node(0, 8), Node(16, 2)),
]  # fmt: skip


def trial_placement(
    sweep: SweepSettings, num_trials: int, nodes: tuple[Node, ...], place: str = "here"
) -> Placement:
    return job_placement(
        num_trials, sweep.workers_per_trial, sweep.gpus_per_trial or 0, Resources(nodes, place),
        most_at_once=sweep.trials_at_once, per_trial=True,
    )  # fmt: skip


@dataclass
class FreeNode:
    """What is free on a node, as Ray counts it: GPUs one by one, in ten-thousandths."""

    cpus: int
    gpus: list[int]

    def take(self, placement: Placement, most: int) -> int:
        """Place at most so many workers, and return how many."""
        share = round(placement.gpus * 10_000)
        for number in range(most):
            free = [n for n, free_share in enumerate(self.gpus) if free_share >= share]
            if self.cpus < placement.cpus or (share and not free):
                return number
            self.cpus -= placement.cpus
            if share:
                self.gpus[free[0]] -= share
        return most


def fits(nodes: tuple[Node, ...], placement: Placement) -> bool:
    """Place the jobs one by one, as Ray does."""
    free = [FreeNode(node.cpus, [10_000] * node.gpus) for node in nodes]
    for _ in range(placement.jobs_at_once):
        if placement.on_one_node:
            workers = placement.workers
            places = [n for n in free if deepcopy(n).take(placement, workers) == workers][:1]
        else:
            places = free
        workers_left = placement.workers
        for node in places:
            workers_left -= node.take(placement, workers_left)
        if workers_left:
            return False
    return True


@pytest.mark.parametrize("nodes", CLUSTERS)
def test_all_jobs_that_run_together_find_places_and_no_other_would(nodes):
    for num_wanted, num_jobs in itertools.product((*range(1, 10), 16, 17, 31, 32), (1, 2, 3, 100)):
        for num_workers, num_gpus in ((num_wanted, 0), (1, num_wanted), (1, 1 / num_wanted)):
            try:
                placement = job_placement(num_jobs, num_workers, num_gpus, Resources(nodes))
            except UserError:
                continue
            assert (placement.workers, placement.gpus > 0) == (
                math.ceil(num_gpus) or num_workers, num_gpus > 0,
            )  # fmt: skip
            assert fits(nodes, placement), (num_wanted, num_jobs, placement)
            one_job_more = Placement(
                **{**vars(placement), "jobs_at_once": placement.jobs_at_once + 1}
            )
            all_at_once = placement.jobs_at_once == num_jobs
            assert all_at_once or not fits(nodes, one_job_more), placement
            one_cpu_more = Placement(**{**vars(placement), "cpus": placement.cpus + 1})
            assert placement.gpus or not fits(nodes, one_cpu_more), "no CPU is idle"


@pytest.mark.parametrize(
    "nodes",
    [
        (Node(2),), (Node(3), Node(3)), (Node(7), Node(2), Node(5)),
        (Node(8, 2),), (Node(3, 2), Node(6, 3)), (Node(2, 4), Node(9, 2)), (Node(5), Node(4, 1)),
    ],
)  # fmt: skip
def test_of_all_choices_that_fit_none_is_better(nodes):
    """More jobs at once are better, and then more CPUs for workers without GPUs.

    A job with GPUs lies on one node where any node holds it.
    """
    most_cpus = max(node.cpus for node in nodes)
    most_gpus = sum(node.gpus for node in nodes)
    sizes = [(number, 0) for number in range(1, 5)]
    sizes += [(1, number) for number in range(1, most_gpus + 1)] + [(1, 1 / 2)] * (most_gpus > 0)
    for (num_workers, num_gpus), num_jobs in itertools.product(sizes, (1, 2, 3, 5)):
        workers = math.ceil(num_gpus) or num_workers
        choices = [
            Placement(
                jobs_at_once=jobs, workers=workers, cpus=cpus, gpus=num_gpus / workers,
                on_one_node=on_one_node,
            )
            for jobs in range(1, num_jobs + 1)
            for cpus in range(1, most_cpus + 1)
            for on_one_node in ((True, False) if num_gpus else (False,))
        ]  # fmt: skip
        fitting = [choice for choice in choices if fits(nodes, choice)]
        if not fitting:
            continue
        best = max(
            fitting, key=lambda choice: (choice.on_one_node, choice.jobs_at_once, choice.cpus)
        )
        placement = job_placement(num_jobs, num_workers, num_gpus, Resources(nodes))
        assert placement in fitting
        assert (placement.jobs_at_once, placement.on_one_node) == (
            best.jobs_at_once, best.on_one_node,
        ), (num_workers, num_gpus, num_jobs)  # fmt: skip
        assert num_gpus or placement.cpus == best.cpus, (num_workers, num_jobs)


@pytest.mark.parametrize(
    ("nodes", "num_gpus", "at_once", "cpus", "on_one_node"),
    [
        (DOCUMENTED, 8, 4, 8, True),
        (DOCUMENTED, 16, 2, 8, False),
        (DOCUMENTED, 32, 1, 8, False),
        (DOCUMENTED, 3, 8, 8, True),  # Not ten, two of which would lie on two nodes each.
        (DOCUMENTED, 0.25, 100, 2, True),
        (UNEQUAL, 8, 1, 4, True),
        (UNEQUAL, 12, 1, 4, False),
        (FEW_CPUS, 12, 1, 1, False),
    ],
)
def test_workers_with_gpus_get_the_fewest_cpus_per_gpu_of_any_node(
    nodes, num_gpus, at_once, cpus, on_one_node
):
    placement = job_placement(100, 1, num_gpus, Resources(nodes))
    values = (placement.jobs_at_once, placement.cpus, placement.on_one_node)
    assert values == (at_once, cpus, on_one_node)


def test_a_job_of_variable_size_starts_with_the_fewest_gpus_on_any_nodes():
    for num_gpus, nodes in ((8, UNEQUAL), (64, DOCUMENTED)):
        placement = job_placement(1, 1, num_gpus, Resources(nodes), min_gpus=4)
        values = (placement.workers, placement.min_workers, placement.strategy)
        assert values == (num_gpus, 4, "PACK")
    with refused(UserError, "cluster.min_gpus=16", "cluster.min_gpus=12"):
        job_placement(1, 1, 64, Resources(UNEQUAL), min_gpus=16)


@pytest.mark.parametrize(
    ("nodes", "sweep", "words"),
    [
        ((Node(2),), {"workers_per_trial": 3}, ["sweep.workers_per_trial=3", "per_trial=2"]),
        ((Node(2),), {"gpus_per_trial": 0.5}, ["gpus_per_trial=0.5: ", "no GPU", "num_gpus=0"]),
        (DOCUMENTED, {"gpus_per_trial": 33}, [
            "has 4 nodes with 64 CPUs and 8 GPUs each, 1 node with 8 CPUs, and",
            "type --set sweep.gpus_per_trial=32", "again when nodes that have them have joined"]),
        (FEW_CPUS, {"gpus_per_trial": 13}, ["needs a CPU and a GPU", "gpus_per_trial=12"]),
        ((Node(0, 4), HEAD), {"gpus_per_trial": 1}, ["needs a CPU and a GPU; run the"]),
    ],
)  # fmt: skip
def test_what_never_fits_says_what_the_nodes_have_and_what_would(nodes, sweep, words):
    chosen = SweepSettings.model_validate(sweep)
    place = "the cluster at x"
    with pytest.raises(UserError) as error:
        trial_placement(chosen, 1, nodes, place)
    assert all(word in str(error.value) for word in words), error.value
