"""What does not go together, or does not exist, is refused before anything is trained on."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from iiet.config import ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.pipelines import sweeps
from orchestrator.pipelines.result import show
from orchestrator.pipelines.sweeps import plan_sweep, sweep
from orchestrator.planning.machine import Node, Resources
from orchestrator.settings import EvaluationSettings, Settings, resolve_settings
from orchestrator.sweeping.models import check_devices, check_models, check_sweep, schedule_cost
from orchestrator.sweeping.plan import load_tasks, plan_suite
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "space")


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("threshold", ["sweep.asha=true"], "it compares learning rates"),
        ("iterations", ["sweep.asha=true"], "no model has more than one"),
        ("threshold", ["model.method=vanilla"], "model.method=vanilla .* has none"),
        ("threshold", ["model.method=looped"], "model.method=looped repeats the whole stack"),
        (
            "iterations",
            ["sweep.methods=[looped]", "sweep.iterations=[1, 3..0]"],
            "'looped' repeats the whole stack, .* got schedule 3,2,2,1,1,0",
        ),
        ("search", ["model.corrections=0"], "a search sweep prunes its teacher's corrections"),
        ("threshold", ["model.num_heads=7"], "multiple of twice num_heads"),
        ("iterations", ["sweep.iterations=[0, -1, x]"], "from 0 to 1000, got -1.*; model: 'x' is"),
        (
            "iterations",
            ["sweep.iterations=[0, 1]", "sweep.learning_rates={r = 7: 0.001}"],
            "a rate of r = 7, which is not swept; swept are vanilla, r = 0, r = 1",
        ),
        (
            "iterations",
            ["sweep.learning_rates={'vanilla, 8 layers': 0.001}"],
            "a rate of vanilla, 8 layers, which is not swept; swept are vanilla, r = 0",
        ),
        (
            "threshold",
            ["sweep.learning_rates={'vanilla, 8 layers': 0.001}"],
            "a rate of vanilla, 8 layers, which is no baseline of this sweep",
        ),
        (
            "iterations",
            ["sweep.num_layers={pcformer: 2, r = 9: 3}"],
            "layers of pcformer, r = 9, which is not swept; swept are vanilla, r = 0",
        ),
        (
            "search",
            ["sweep.num_layers={r = 2: 3}"],
            "layers of r = 2, which is no baseline of this sweep; baselines are vanilla, r = 0",
        ),
        (
            "iterations",
            ["model.num_layers=2", "sweep.iterations=['2,1']", "sweep.num_layers={iiet: [2, 4]}"],
            "the iteration schedule 2,1 is for 2 layers, the model has 4",
        ),
        ("threshold", ["sweep.gpus_per_trial=64"], "sweep.gpus_per_trial=64"),
        ("threshold", ["sweep.gpus_per_trial=0", "cluster.num_gpus=8"], "second names GPUs"),
        ("iterations", ["sweep.gpus_per_trial=9", "cluster.num_gpus=8"], "asks for more GPUs"),
        ("threshold", ["evaluation.suite=no_such_task"], "no_such_task"),
        ("iterations", ["evaluation.suite=heldout,no_such_task"], "no_such_task"),
        ("iterations", ["evaluation.include_path=/no/such/folder", "evaluation.suite=x"], "folder"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(
    kind: str,
    settings: list[str],
    words: str,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(sweeps, "prepare_tokens", never)
    with pytest.raises(UserError, match=words):
        sweep(resolve_settings({}, [f"sweep.kind={kind}", *settings]), workspace=workspace)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("iterations", {"teacher": "newest"}, "from scratch, and a teacher was given"),
        ("threshold", {"models": []}, "students of one teacher, and models were given"),
    ],
)
def test_arguments_of_another_kind_of_sweep_are_refused(
    kind: str, options: dict[str, Any], words: str, workspace: Workspace
) -> None:
    settings = resolve_settings({}, [f"sweep.kind={kind}"])
    for function in (sweep, plan_sweep):
        with pytest.raises(UserError, match=words):
            function(settings, workspace=workspace, **options)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sweep.seeds=[0, 1, 0]", "sweep.seeds: a value is given twice"),
        ("sweep.learning_rates={iiet: []}", r"sweep\.learning_rates: .* at least 1 item"),
        ("sweep.learning_rates={iiet: [0.1, 0]}", "greater than 0; got 0"),
        ("sweep.methods=[vanila, iiet]", "sweep.methods: input should be 'vanilla', .*; got 'vani"),
        ("sweep.num_layers={vanilla: 0}", "greater than or equal to 1; got 0"),
        ("sweep.num_layers={vanilla: []}", "at least 1 item"),
        ("sweep.num_layers={vanilla: [2, 1001]}", "less than or equal to 1000; got 1001"),
        ("sweep.num_layers={vanilla: [2, 2]}", "a value is given twice"),
        ("sweep.num_layers={vanila: 2}", "'vanila' is not a model"),
        ("sweep.num_layers={'vanilla, 8 layers': 2}", "'vanilla, 8 layers' is not a model"),
        ("sweep.methods=[]", r"sweep\.methods: .* at least 1 item"),
        ("sweep.iterations=[]", r"sweep\.iterations: .* at least 1 item"),
    ],
)
def test_what_no_sweep_can_have_is_refused_where_it_is_read(setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_settings({}, [setting])


def test_other_items_under_the_same_name_and_another_precision_are_other_trials(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, object]
) -> None:
    config = ModelConfig.from_dict(tiny_model)

    def suite_of(folder: str, words: str, **options: Any) -> dict[str, object]:
        file = tmp_path / folder / "first.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'{{"context": "a", "target": " {words}"}}\n')
        (file.parent / "first.yaml").write_text(TASK.format(name="first", file=file))
        settings = EvaluationSettings(suite="first", include_path=str(file.parent), **options)
        suite = plan_suite(
            settings, tiny_tokens, config, load_tasks(settings, tiny_tokens, config, Progress())
        )
        values = suite.model_dump(mode="json").items()
        return {name: value for name, value in values if not name.endswith("_folder")}

    first = suite_of("one", "b")
    assert suite_of("one", "b") == first
    assert suite_of("two", "b") == first, "where the files stand does not matter"
    assert suite_of("two", "c") != first
    assert suite_of("one", "b", precision="fp32") == first
    assert suite_of("one", "b", precision="bf16") == {**first, "precision": "bf16"}
    told = suite_of("one", "b", system_instruction="Answer.")
    assert told["fingerprints"] != first["fingerprints"]


def test_answers_that_the_models_cannot_generate_are_refused_when_a_sweep_is_planned(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, object]
) -> None:
    config = ModelConfig.from_dict(tiny_model)
    (tmp_path / "first.jsonl").write_text('{"context": "a", "target": "b"}\n')
    text = TASK.format(name="first", file=tmp_path / "first.jsonl")
    text = text.replace("output_type: loglikelihood", "output_type: generate_until")
    text = text.replace("metric: acc", "metric: exact_match")
    (tmp_path / "first.yaml").write_text(text + "generation_kwargs: {max_gen_toks: 999}\n")
    settings = EvaluationSettings(suite="first", include_path=str(tmp_path))
    with pytest.raises(UserError, match=r"first: its answers have up to 999 tokens"):
        plan_suite(
            settings, tiny_tokens, config, load_tasks(settings, tiny_tokens, config, Progress())
        )


def test_counted_units_follow_from_the_shape(tiny_model: dict[str, object]) -> None:
    full = ModelConfig.from_dict(tiny_model)
    most, none = IterationSchedule((2, 1)), IterationSchedule((0, 0))
    assert schedule_cost("evaluations", full)(most) == 5
    bytes_of = schedule_cost("kv", full)
    # A key and a value of 16 numbers of 4 bytes in each of 5 slots.
    assert bytes_of(most) == 5 * 2 * 16 * 4
    assert bytes_of(none) == 2 * 2 * 16 * 4
    flops = schedule_cost("flops", full)
    assert flops(most) > 1.5 * flops(none) > 0


@pytest.mark.parametrize("kind", ["threshold", "search"])
def test_the_plan_of_a_file_whose_teacher_is_not_trained_is_that_of_its_training(
    workspace: Workspace, kind: str
) -> None:
    assignments = [f"sweep.kind={kind}", "sweep.thresholds=[0.1, 0.2]", "search.num_trials=5"]
    found = plan_sweep(resolve_settings({}, assignments), workspace=workspace)
    assert found.to_pandas()["name"].tolist() == ["teacher", "vanilla", "r = 0"]
    console = Console(file=StringIO())
    show(found, console)
    told = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert all(f"{name} " in told for name in ("teacher", "vanilla", "r = 0"))
    assert "3 models asked for, 3 distinct 0 of 3 trials are finished" in told
    assert "the tokens are not prepared" in told
    assert f"at most {2 if kind == 'threshold' else 7} students" in told
    assert not list(workspace.runs.glob("*"))


def test_the_plan_shows_the_depths_that_are_asked_for(workspace: Workspace) -> None:
    depths = ["model.num_layers=2", "sweep.num_layers={vanilla: [2, 8]}", "sweep.iterations=[3]"]
    iterations = plan_sweep(
        resolve_settings({}, ["sweep.kind=iterations", *depths]), workspace=workspace
    )
    table = iterations.to_pandas()
    assert table["name"].tolist() == ["vanilla", "vanilla, 8 layers", "r = 3"]
    assert table["evaluations"].tolist() == [2, 8, 8]
    console = Console(file=StringIO(), width=120)
    show(iterations, console)
    assert "vanilla, 8 layers 0.004 8 8" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    threshold = plan_sweep(resolve_settings({}, depths), workspace=workspace)
    names = ["teacher", "vanilla", "vanilla, 8 layers", "r = 0"]
    assert threshold.to_pandas()["name"].tolist() == names


@pytest.mark.parametrize("kind", ["threshold", "search", "iterations"])
def test_a_suite_without_an_accuracy_is_refused_before_anything_is_trained(
    tmp_path: Path, kind: Literal["threshold", "iterations", "search"]
) -> None:
    file = tmp_path / "items.json"
    file.write_text('{"context": "a", "target": "b"}\n')
    plain = TASK.format(name="plain", file=file)
    rolling = plain.replace("output_type: loglikelihood", "output_type: loglikelihood_rolling")
    rolling = rolling.replace("task: plain", "task: bits").replace(
        "metric: acc", "metric: bits_per_byte"
    )
    (tmp_path / "bits.yaml").write_text(rolling)
    (tmp_path / "right.yaml").write_text(TASK.format(name="right", file=file))

    def check(suite: str) -> None:
        chosen = [f"evaluation.suite={suite}", f"evaluation.include_path={tmp_path}"]
        check_sweep(resolve_settings({}, [f"sweep.kind={kind}", *chosen]), Progress())

    with pytest.raises(
        UserError, match=r"no task of evaluation\.suite=bits reports one; .*heldout"
    ):
        check("bits")
    check("bits,right")
    check("bits,heldout")


@pytest.mark.parametrize("check", [check_sweep, check_models])
def test_models_from_scratch_have_no_chat_template(check: Callable[[Settings], None]) -> None:
    settings = resolve_settings({"sweep": {"kind": "iterations"}})
    check(settings)
    with pytest.raises(UserError, match="trained from scratch have no chat template"):
        check(
            resolve_settings({}, ["evaluation.apply_chat_template=true", "sweep.kind=iterations"])
        )


def test_a_cluster_has_the_gpus_of_a_trial_and_of_the_teacher() -> None:
    settings = resolve_settings({}, ["cluster.num_gpus=8"])
    one = Resources((Node(16, 1),), "the cluster at x")
    check_devices(settings, Resources((Node(16, 8),)), pretrains=True)
    check_devices(settings, one, pretrains=False)
    with pytest.raises(UserError, match=r"cluster\.num_gpus=8: the cluster at x has 1"):
        check_devices(settings, one, pretrains=True)
    with pytest.raises(UserError, match=r"gpus_per_trial=1: the cluster at x has .* and no GPU"):
        check_devices(settings, Resources((Node(16),), "the cluster at x"), pretrains=False)
