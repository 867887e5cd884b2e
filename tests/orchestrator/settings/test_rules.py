"""Rules between settings: each broken one is named with its settings, all of them at once."""

import pytest
from refusals import refused

from orchestrator.settings import resolve_settings
from orchestrator.settings.schema import broken_rules
from orchestrator.workspace.errors import UserError

ELASTIC = "distillation.training.elastic"


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        ("data.shares={python: 1.0}", "data.source='python', data.shares={'python': 1.0}: "),
        ("data.source=mixture", "data.source='mixture', data.shares={}: a mixture, and only"),
        ("data.files=[a.txt]", "data.source='python', data.files=('a.txt',): "),
        ("data={source: mixture, shares: {python: 1.0}, files: [a]}", "data.files=('a',): "),
        ("data.depth.tasks=[phop_6]", "data.source='python', data.depth.tasks=('phop_6',): "),
        ("data={source: mixture, shares: {phop_6: 1.0}, depth: {tasks: [s5_4]}}", "depth.tasks="),
        ("cluster={min_gpus: 16, num_gpus: 8}", "cluster.min_gpus=16, cluster.num_gpus=8: "),
        ("cluster={min_gpus: 4, num_gpus: 8, parallel: fsdp}", "cluster.parallel='fsdp': fsdp"),
        (
            "cluster={num_workers: 3, num_gpus: 2}",
            "cluster.num_workers=3, cluster.num_gpus=2: each",
        ),
        ("cluster.num_shards=2", "cluster.parallel='ddp': only fsdp has shards"),
        ("cluster={parallel: fsdp, num_shards: 3, num_workers: 4}", "divide the 4 workers"),
        ("cluster={parallel: fsdp, num_shards: 8, num_gpus: 12}", "divide the 12 workers"),
        ("sweep={thresholds: [0.1], budgets: [3]}", "leave one out"),
        (
            "training={iterate_from_fraction: 0.7, iterate_ramp_fraction: 0.4}",
            "training.iterate_from_fraction=0.7, training.iterate_ramp_fraction=0.4: the ramp",
        ),
        (
            "cluster={parallel: fsdp, num_workers: 2}; training.optimizer=muon",
            "training.optimizer='muon', cluster.parallel='fsdp': Muon needs whole matrices",
        ),
        ("distillation.training.iterate_ramp_fraction=1; ...iterate_from_fraction=0.1", "the ramp"),
        ("distillation={teacher_from_step: 9, teacher_until_step: 9}", "takes part in no step"),
        ("distillation.teacher_from_step=60", "teacher_from_step=60, distillation.training.num_st"),
        (f"{ELASTIC}.kl_weight=2", f"{ELASTIC}.kl_weight=2.0: "),
        (f"{ELASTIC}.temperature=2", f"{ELASTIC}.temperature=2.0: "),
        ("distillation.training.source=plain", "distillation.training.source='plain': "),
        (
            "training.source=plain; source_training.num_steps=9",
            "training.source='plain': training.sour",
        ),
        ("source_training.source_kl_weight=1.0", "source_training.source_kl_weight=1.0: "),
        ("distillation.training.source_kl_weight=1.0", "distillation.training.source_kl_weight"),
    ],
)
def test_a_rule_of_the_tree_names_its_settings(assignments, words):
    changes = assignments.replace("...", "distillation.training.").split("; ")
    with pytest.raises(UserError) as refused:
        resolve_settings({}, changes)
    assert words in str(refused.value)
    assert str(refused.value).startswith("settings: ")


def test_what_breaks_no_rule_is_taken():
    control = ["distillation.control=cross_entropy", f"{ELASTIC}.kl_weight=2"]
    resolve_settings({}, [*control, "distillation.teacher_from_step=60"])
    resolve_settings({}, ["training={iterate_from_fraction: 0.7, iterate_ramp_fraction: 0.3}"])
    for source in ("training.source=plain", "source_training.num_steps=9"):
        assert not broken_rules(resolve_settings({}, [source]), of_sweep=True)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "threshold",
            "gpus_per_trial=0; cluster.num_gpus=8",
            "cluster.num_gpus=8: gpus_per_trial=0 trains",
        ),
        ("threshold", "gpus_per_trial=9; cluster.num_gpus=8", "sweep.gpus_per_trial=9.0, cluster"),
        ("search", "workers_per_trial=16; cluster.num_gpus=8", "sweep.workers_per_trial=16, cl"),
        ("search", "workers_per_trial=3; sweep.gpus_per_trial=2", "each worker has one GPU"),
        ("threshold", "asha=true", "sweep.asha=True, sweep.kind='threshold': "),
        ("iterations", "asha=true; sweep.seeds=[0, 1]", "sweep.asha=True, sweep.seeds=(0, 1): "),
        ("search", "seeds=[0, 1]", "kind threshold or iterations reads seeds"),
        ("search", "elastic=true", "sweep.elastic=True, sweep.kind='search': "),
        (
            "search",
            "teachers=[pcformer]",
            "sweep.kind='search': only a sweep of kind",
        ),
        ("iterations", "baselines=[pcformer]", "sweep.kind='iterations': only"),
        ("iterations", "elastic=true", "sweep.elastic=True, sweep.kind='iterations': "),
        ("threshold", "elastic=true; distillation.control=pruned", "distillation.control='pruned'"),
        ("threshold", f"elastic=true; {ELASTIC}.schedules=[0]", f"{ELASTIC}.schedules=(0,): "),
        ("threshold", f"elastic=true; {ELASTIC}.weight=0", f"{ELASTIC}.weight=0.0: "),
        (
            "threshold",
            f"elastic=false; {ELASTIC}={{}}",
            "set it, or leave the other out",
        ),
        ("iterations", "seeds=[]; training.source=plain", "leave training.source out"),
        ("iterations", "seeds=[]; source_training.num_steps=9", "leave source_training out"),
        ("threshold", "teachers=[r = 1]; training.source=plain", "('r = 1',): training.source"),
        ("threshold", "teachers=[r = 1]; source_training.num_steps=9", "('r = 1',): source_train"),
    ],
)
def test_a_rule_of_sweeps_is_checked_where_a_sweep_is_planned(kind, changes, words):
    settings = resolve_settings({}, [f"sweep.kind={kind}", *f"sweep.{changes}".split("; ")])
    (broken,) = broken_rules(settings, of_sweep=True)
    assert words in broken


def test_all_broken_rules_are_reported_at_once_after_all_fields_are_right():
    rules = ["cluster.num_shards=2", "sweep={thresholds: [0.1], budgets: [3]}"]
    with refused(UserError, "2 problems", "cluster.num_shards", "sweep.thresholds"):
        resolve_settings({}, rules)
    with refused(UserError, "training.num_steps", "got 0"):
        resolve_settings({}, [*rules, "training.num_steps=0"])


def test_a_part_of_several_gpus_is_refused():
    for gpus in (1.5, 0.001):
        with refused(UserError, gpus):
            resolve_settings({}, [f"sweep.gpus_per_trial={gpus}"])
