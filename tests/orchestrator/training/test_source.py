"""A training from the weights of another model: what is copied, what follows, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from commands import run_here
from fake_runs import end_trials, finished
from fake_tracking import FakeTracking
from kept_progress import KeptProgress
from lm_eval_tasks import write_choices
from plain_models import random_model
from pretended_ray import train_here
from same_run import curve
from sample_texts import lines_of, save_word_tokenizer

from iiet import Decoder, next_token_loss
from iiet.model.facts import facts_of
from orchestrator.cli import main
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import load_config, load_provenance, newest_checkpoint
from orchestrator.models.load import load_model
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.models import import_model
from orchestrator.pipelines.training import plan_pretrain, prepare, pretrain, run_pretrain
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob, job_parameters
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED
from orchestrator.settings import Settings, resolve_settings
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.sweep import run_sweep
from orchestrator.tracking.tracker import Tracking
from orchestrator.training.devices import decoder_to_train
from orchestrator.training.job import check_job, job_key
from orchestrator.training.source import IMPORTED_LEARNING_RATE
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

TEXTS = [f"Document {i} tells that {i * 7} birds flew over the sea of words." for i in range(150)]
SIZES = {"num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 32, "context_length": 32}
RECIPE = {
    "num_steps": 2, "num_tokens_per_step": 64, "warmup_steps": 1, "num_validation_tokens": 64,
}  # fmt: skip


@pytest.fixture
def context(workspace) -> Context:
    return Context(workspace, KeptProgress(), tracking=cast("Tracking", FakeTracking()))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text(lines_of(TEXTS))
    return path


@pytest.fixture(scope="module")
def settings(text) -> Callable[..., Settings]:
    """A function that makes settings: their assignments, as `name=value`."""

    def make(*assignments: str) -> Settings:
        tree = {
            "data": {"source": "files", "files": [str(text)], "vocab_size": 300},
            "training": RECIPE,
        }
        return resolve_settings(tree, assignments)

    return make


@pytest.fixture(scope="module")
def trained_workspace(settings, tmp_path_factory) -> Workspace:
    """A workspace, to be copied, in which the plain model of `plain_run` was pretrained."""
    workspace = Workspace(tmp_path_factory.mktemp("trained") / "ws")
    sizes = [f"model.{name}={value}" for name, value in SIZES.items()]
    plan = plan_pretrain(
        settings("model.method=vanilla", "training.learning_rate=3e-3", *sizes),
        workspace=workspace, name="plain", local=True,
    )  # fmt: skip
    run_pretrain(plan, Context(workspace, tracking=cast("Tracking", FakeTracking())))
    return workspace


@pytest.fixture
def plain_run(trained_workspace, workspace) -> Path:
    """The last checkpoint of a plain model that was pretrained in the workspace, as `plain`."""
    shutil.copytree(trained_workspace.root, workspace.root, dirs_exist_ok=True)
    return newest_checkpoint(workspace.runs / "plain")


@pytest.fixture
def model_folder(tmp_path, plain_run) -> Path:
    """The folder of a plain model of transformers, with the tokenizer of the run `plain`."""
    folder = tmp_path / "from elsewhere"
    random_model("llama3", vocab_size=300, head_dim=8).save_pretrained(folder)
    shutil.copyfile(plain_run / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def job_from(plan: Any) -> TrainingJob:
    (job,) = plan.jobs.values()
    return job


def test_a_plain_models_weights_are_copied_and_the_methods_are_as_ever(
    plain_run, settings, workspace
):
    for options in ({}, {"start": "identity"}):
        chosen = settings(f"model.method_options={json.dumps(options)}", "model.corrections=3,0")
        job = job_from(plan_pretrain(chosen, workspace=workspace, source="plain", local=True))
        decoder = decoder_to_train(job, World(), None)
        source = load_model(plain_run)
        added_weights = decoder.method_parameters()
        fresh = Decoder(decoder.config).method_parameters()
        for name, weight in decoder.state_dict().items():
            expected = fresh[name] if name in added_weights else source.state_dict()[name]
            assert torch.equal(weight, expected), name
        assert added_weights
        assert job.model.corrections == (3, 0)


def test_a_source_of_the_same_method_gives_all_its_weights(save_tiny, workspace, settings):
    source = save_tiny(workspace.runs / "iterated", seed=3)
    job = job_from(
        plan_pretrain(
            settings("model.corrections=1"), workspace=workspace, source="iterated", local=True
        )
    )
    trained = decoder_to_train(job, World(), None)
    assert trained.config.corrections == (1, 1)
    for name, weight in load_model(source).state_dict().items():
        assert torch.equal(trained.state_dict()[name], weight), name


def test_options_of_the_source_are_those_of_its_method_alone(save_tiny, workspace, settings):
    save_tiny(workspace.runs / "identity", method_options={"start": "identity"})
    of_method = {}
    for method in ("iiet", "pcformer"):
        plan = plan_pretrain(
            settings(f"model.method={method}"), workspace=workspace, source="identity", local=True
        )
        of_method[method] = job_from(plan).model.method_options
    assert of_method["iiet"].start == "identity"
    assert of_method["pcformer"] is None, "the defaults"


def test_norms_and_mix_of_another_method_are_not_copied(save_tiny, workspace, settings):
    source = save_tiny(workspace.runs / "pcformer", method="pcformer", schedule=None, seed=3)
    decoder = load_model(source)
    job = job_from(plan_pretrain(settings(), workspace=workspace, source="pcformer", local=True))
    job = job.model_copy(update={"initial_folder": str(moved_norms(source))})
    trained = decoder_to_train(job, World(), None)
    for name, weight in trained.state_dict().items():
        if "norm.weight" in name and name in trained.method_parameters():
            assert (weight == 1).all(), name
    assert torch.equal(trained.model.embed_tokens.weight, decoder.model.embed_tokens.weight)


def moved_norms(checkpoint: Path) -> Path:
    """Change the weights that the method adds in a checkpoint, as training would."""
    decoder = load_model(checkpoint)
    with torch.no_grad():
        for parameter in decoder.method_parameters().values():
            parameter.add_(0.5)
    decoder.save_pretrained(checkpoint)
    return checkpoint


def test_sizes_tokenizer_and_defaults_follow_the_source(plain_run, settings, workspace):
    plan = plan_pretrain(settings(), workspace=workspace, source="plain", local=True)
    job = job_from(plan)
    source = load_config(plain_run)
    for name in ("dim", "num_layers", "ffn_dim", "context_length", "vocab_size", "rope_theta"):
        assert getattr(job.model, name) == getattr(source, name)
    assert job.model.method == "iiet"
    assert job.recipe.learning_rate == 3e-3
    assert job.recipe.iterate_from_fraction == 0.0
    assert plan.source == plain_run
    assert plan.source_defaults == {
        "training.learning_rate": 3e-3, "training.iterate_from_fraction": 0.0,
    }  # fmt: skip
    assert job.tokens_folder, "the source's tokens are found again"
    with_own_recipe = settings("training.learning_rate=1e-3", "training.iterate_from_fraction=0.5")
    plan = plan_pretrain(with_own_recipe, workspace=workspace, source="plain", local=True)
    assert job_from(plan).recipe.learning_rate == 1e-3
    assert job_from(plan).recipe.iterate_from_fraction == 0.5
    assert plan.source_defaults == {}


def test_a_step_of_fewer_tokens_than_the_context_of_the_source_has_one_sequence(
    plain_run, settings, workspace
):
    context = load_config(plain_run).context_length
    small = settings(f"training.num_tokens_per_step={context // 2}")
    plan = plan_pretrain(small, workspace=workspace, source="plain", local=True)
    assert plan.source_defaults["training.sequence_length"] == context // 2
    assert job_from(plan).sequence_length == context // 2
    of_one_context = settings(f"training.num_tokens_per_step={context}")
    plan = plan_pretrain(of_one_context, workspace=workspace, source="plain", local=True)
    assert "training.sequence_length" not in plan.source_defaults


def test_a_model_from_elsewhere_is_imported_and_trained(model_folder, settings, workspace, context):
    plan = plan_pretrain(settings(), workspace=workspace, source=model_folder, local=True)
    assert "imported" in plan.state("iiet")
    assert plan.source_defaults["training.learning_rate"] == IMPORTED_LEARNING_RATE
    assert plan.price.flops > 0
    assert not (workspace.runs / model_folder.name).exists(), "a plan writes nothing"
    assert job_from(plan).recipe.learning_rate == IMPORTED_LEARNING_RATE
    checkpoint = import_model(model_folder, workspace=workspace)
    plan = plan_pretrain(settings(), workspace=workspace, source=checkpoint, local=True)
    result = run_pretrain(plan, context)
    config = load_config(result.checkpoint)
    assert (config.method, config.head_dim, config.rope_theta) == ("iiet", 8, 10000.0)
    assert config.rope_scaling is not None
    assert (result.checkpoint / "tokenizer_config.json").is_file(), "its chat files stay with it"
    job = job_from(plan)
    assert job_parameters(job)["source"] == str(checkpoint)
    planned_again = plan_pretrain(settings(), workspace=workspace, source=checkpoint, local=True)
    assert list(planned_again.finished.values()) == [result.checkpoint]


def test_a_config_alone_has_a_plan_and_no_run(model_folder, settings, workspace):
    plan = plan_pretrain(settings(), workspace=workspace, source=model_folder, local=True)
    for weights in model_folder.glob("*.safetensors"):
        weights.unlink()
    alone = plan_pretrain(settings(), workspace=workspace, source=model_folder, local=True)
    assert (alone.price.flops, alone.price.memory) == (plan.price.flops, plan.price.memory)
    with pytest.raises(UserError, match="weights"):
        pretrain(settings(), workspace=workspace, source=model_folder, local=True)


@pytest.fixture
def train_plain(settings, workspace, context) -> Callable[..., None]:
    """A function that trains a plain model of the usual sizes: its name, and settings of its
    data."""

    def train(name: str, *data: str) -> None:
        sizes = [f"model.{size}={value}" for size, value in SIZES.items()]
        chosen = settings("model.method=vanilla", *sizes, *data)
        run_pretrain(plan_pretrain(chosen, workspace=workspace, name=name, local=True), context)

    return train


def test_a_mixture_with_symbols_keeps_the_tokenizer_of_its_kind(
    settings, workspace, context, train_plain
):
    mixed = (
        "data.source=mixture", "data.shares={files: 0.5, phop_2: 0.5}", "data.depth.length=16",
    )  # fmt: skip
    train_plain("mixed", *mixed)
    plan = plan_pretrain(settings(*mixed), workspace=workspace, source="mixed", local=True)
    assert job_from(plan).tokens_folder
    run_pretrain(plan, context)


def test_a_task_in_words_has_the_tokenizer_of_the_source(
    settings, workspace, context, train_plain, tmp_path
):
    tokenizer_file = save_word_tokenizer(tmp_path)
    task = (
        "data.source=depth", "data.depth.tasks=[lookup_2]", "data.depth.symbols=words",
        "data.files=[]", f"data.tokenizer={tokenizer_file}",
    )  # fmt: skip
    train_plain("words", *task)
    plan = plan_pretrain(settings(*task[:-1]), workspace=workspace, source="words", local=True)
    (tokenizer,) = {model_settings.data.tokenizer for model_settings in plan.models.values()}
    assert load_tokenizer(tokenizer).to_str() == load_tokenizer(tokenizer_file).to_str()
    run_pretrain(plan, context)
    with pytest.raises(UserError, match=r"set data\.tokenizer"):
        plan_pretrain(settings(*task[:-1]), workspace=workspace, local=True)


@pytest.mark.parametrize(
    ("assignment", "name"),
    [
        ("model.dim=32", "model.dim"),
        ("model.context_length=16", "model.context_length"),
        ("model.preset=55m", "model.preset"),
        ("model.corrections=1,1,1", "model"),
        ("data.tokenizer=TOKENIZER", "data.tokenizer"),
    ],
)
def test_another_shape_or_tokenizer_is_refused(
    assignment, name, plain_run, settings, workspace, tmp_path
):
    other_tokenizer = tmp_path / "other.json"
    values = json.loads((plain_run / "tokenizer.json").read_text())
    values["added_tokens"][0]["lstrip"] = True
    other_tokenizer.write_text(json.dumps(values))
    with pytest.raises(UserError, match=name):
        plan_pretrain(
            settings(assignment.replace("TOKENIZER", str(other_tokenizer))), workspace=workspace,
            source="plain", local=True,
        )  # fmt: skip


def test_options_for_which_the_sources_weights_have_no_place_are_refused(
    save_tiny, settings, workspace
):
    save_tiny(workspace.runs / "damped", method_options={"learn_damping": "scalar"})
    plan = plan_pretrain(settings(), workspace=workspace, source="damped", local=True)
    assert job_from(plan).model.options.learn_damping == "scalar"
    for options in ("{damping: 0.5}", "{learn_damping: vector}"):
        with pytest.raises(UserError, match=r"model\.method_options"):
            plan_pretrain(
                settings(f"model.method_options={options}"), workspace=workspace, source="damped",
                local=True,
            )  # fmt: skip


def test_the_sources_weights_are_part_of_the_key_and_a_changed_source_is_named(
    plain_run, settings, workspace, context, save_tiny
):
    plan = plan_pretrain(settings(), workspace=workspace, source="plain", name="mine", local=True)
    run_pretrain(plan, context)
    job = job_from(plan)
    other_source = save_tiny(workspace.runs / "other", method="vanilla", schedule=None)
    assert job_key(job.model_copy(update={"initial_folder": str(other_source)})) != job_key(job)
    assert job_key(job.model_copy(update={"initial_folder": None})) != job_key(job)
    shutil.rmtree(plain_run)
    shutil.copytree(other_source, plain_run)
    with pytest.raises(UserError, match=r"training\.source="):
        check_job(job)
    shutil.rmtree(plain_run)
    with pytest.raises(UserError, match=str(plain_run)):
        check_job(job)


def test_a_retrofit_is_continued_with_its_source(plain_run, settings, workspace, context):
    constant = settings("training.decay=constant")
    plan = plan_pretrain(constant, workspace=workspace, source="plain", name="mine", local=True)
    run_pretrain(plan, context)
    longer = plan.models["iiet"].model_copy(
        update={"training": plan.models["iiet"].training.model_copy(update={"num_steps": 4})}
    )
    continued = plan_pretrain(longer, workspace=workspace, continued="mine", local=True)
    result = run_pretrain(continued, context)
    assert result.checkpoint.name == "step_00000004"
    assert load_provenance(result.checkpoint)["step"] == 4
    with pytest.raises(UserError, match=r"training\.source"):
        plan_pretrain(longer, workspace=workspace, continued="mine", source="plain", local=True)


def test_from_is_an_option_of_pretrain_and_goes_with_no_continuation(
    plain_run, text, workspace, context
):
    options = [
        "pretrain", "--from", "plain", "--set", "data.source=files", "--set", "data.vocab_size=300",
        "--set", f"data.files=[{text}]", "--dry-run", "--json",
    ]  # fmt: skip
    recipe = [
        part for name, value in RECIPE.items() for part in ("--set", f"training.{name}={value}")
    ]
    plan = json.loads(run_here(*options, *recipe, workspace=workspace.root))
    assert plan["source"] == str(plain_run)
    assert plan["source_defaults"]["training.iterate_from_fraction"] == 0.0
    assert plan["state"] == "not begun"
    with redirect_stderr(StringIO()) as printed:
        words = ["pretrain", "--from", "plain", "--continue", "plain"]
        assert main([*words, "--workspace", str(workspace.root)]) == 2
    assert "training.source" in printed.getvalue()


def test_a_source_is_trained_first_only_in_a_sweep_without_a_teacher(settings, workspace):
    trains_source = settings("source_training.num_steps=9")
    with pytest.raises(UserError, match="source_training"):
        plan_pretrain(trains_source, workspace=workspace, local=True)
    with pytest.raises(UserError, match="source_training"):
        plan_sweep(trains_source, workspace=workspace, teacher="a run")


@pytest.mark.slow
def test_a_sweep_imports_its_source_first(
    model_folder, settings, workspace, context, tmp_path, monkeypatch
):
    train_here(monkeypatch, run_job)
    end_trials(monkeypatch, finished)
    tasks = write_choices(tmp_path / "tasks", "choices", ["a b", "c d"])
    steps = [f"distillation.training.{name}={value}" for name, value in RECIPE.items()]
    chosen = settings(
        f"training.source={model_folder}", "model.corrections=1", "sweep.num_schedules=2",
        "influence.num_tokens=64", "evaluation.suite=choices",
        f"evaluation.include_path={tasks}", *steps,
    )  # fmt: skip
    plan = plan_sweep(chosen, workspace=workspace)
    assert not plan.source.is_checkpoint
    assert plan.control_prices[SOURCE_CONTINUED].flops > 0
    assert not (workspace.runs / model_folder.name).exists(), "a plan writes nothing"
    result = run_sweep(plan, context)
    checkpoints = {trial.role: Path(str(trial.checkpoint)) for trial in result.trials}
    assert "imported" in load_provenance(checkpoints[SOURCE])
    assert load_config(checkpoints["teacher"]).head_dim == 8, "sizes are the source's"
    job = TrainingJob.of_folder(checkpoints[SOURCE_CONTINUED].parent)
    assert job is not None
    assert job.initial_folder == str(checkpoints[SOURCE])
    assert job.recipe.learning_rate in (IMPORTED_LEARNING_RATE, 2 * IMPORTED_LEARNING_RATE)


@pytest.mark.slow
def test_pretrain_imports_its_source_first(model_folder, settings, workspace):
    prepare(settings(f"data.tokenizer={model_folder}"), workspace=workspace)
    result = pretrain(settings(), workspace=workspace, source=model_folder, local=True)
    assert facts_of(load_config(result.checkpoint).method).has_corrections


def test_the_divergence_from_the_source_is_added_to_the_loss(plain_run, settings, workspace):
    chosen = settings(
        "training.source_kl_weight=0.5", "training.learning_rate=0.02", "training.warmup_steps=0",
        "training.checkpoint_every_steps=1", "model.method_options={start: identity}",
    )  # fmt: skip
    plan = plan_pretrain(chosen, workspace=workspace, source="plain", local=True)
    job = job_from(plan)
    assert Estimate.of(job).teacher_flops > 0
    outcome = run_job(job)
    assert outcome.training_flops == pytest.approx(plan.price.flops)
    (first_step, kl), (second_step, moved_kl) = curve(job, "train/kl").items()
    assert (first_step, second_step) == (1, 2)
    assert kl == 0.0, "an identity start is its source"
    # The second step by hand.
    batch = open_data(job.tokens_folder).batch(
        1, context_length=job.sequence_length, seed=0, global_batch=2
    )
    with torch.no_grad():
        ours = load_model(job.folder / "step_00000001")(batch.input_ids).log_softmax(-1)
        theirs = load_model(plain_run)(batch.input_ids).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert moved_kl == pytest.approx(divergence.item(), rel=1e-4)
    entropy = next_token_loss(ours, batch.input_ids)
    loss = curve(job, "train/loss")[2]
    assert loss == pytest.approx((entropy + 0.5 * divergence).item(), rel=1e-4)


def test_a_divergence_needs_a_source(settings, workspace):
    with pytest.raises(UserError, match=r"training\.source_kl_weight"):
        plan_pretrain(settings("training.source_kl_weight=1.0"), workspace=workspace, local=True)
