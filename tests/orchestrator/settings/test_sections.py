"""Sections: addresses, variables and names, and a precision that follows the devices."""

from __future__ import annotations

import pytest

from orchestrator.settings import (
    ClusterSettings,
    Settings,
    find_field,
    read_settings,
    resolve_settings,
    to_yaml,
)
from orchestrator.workspace.errors import UserError


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [
        (None, "", "local"),
        (None, "head:6379", "head:6379"),
        ("other:6379", "head:6379", "other:6379"),
        ("local", "head:6379", "local"),
        ("auto", "head:6379", "auto"),
        ("[fe80::1]:6379", "", "[fe80::1]:6379"),
        ("a-b.example:1", "", "a-b.example:1"),
    ],
)
def test_the_address_in_the_settings_counts_before_the_variable(
    setting, variable, expected, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ClusterSettings(address=setting).ray_address == expected


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "Ray Client"),
        ("http://head:8265", "HOST:PORT"),
        ("head", "HOST:PORT"),
        ("head:0", "HOST:PORT"),
        ("head:65536", "HOST:PORT"),
        ("head:6379 x", "HOST:PORT"),
    ],
)
def test_an_address_that_ray_cannot_join_is_refused_where_it_was_set(address, words, monkeypatch):
    with pytest.raises(UserError, match=f"cluster.address: .*{words}"):
        resolve_settings({"cluster": {"address": address}})
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS: .*{words}"):
        _ = ClusterSettings().ray_address


def test_workers_that_share_a_model_and_the_fewest_gpus():
    cluster = ClusterSettings(num_gpus=32, parallel="fsdp", num_shards=8)
    # A trial with too few workers is one shard.
    assert {n: cluster.shards_of(n) for n in (4, 8, 12, 16)} == {4: None, 8: 8, 12: None, 16: 8}
    assert ClusterSettings(num_gpus=8).fewest_gpus == 8
    assert ClusterSettings(num_gpus=8, min_gpus=2).fewest_gpus == 2


@pytest.mark.parametrize("entry", ["HF_TOKEN", "AWS_*", "NCCL_DEBUG=INFO", "KEY_FILE=/a b", "A="])
def test_variables_of_workers_are_names_or_have_values_that_are_no_secrets(entry):
    assert resolve_settings({"cluster": {"env": [entry]}}).cluster.env == (entry,)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("*", "the name of a variable"),
        ("1A", "the name of a variable"),
        ("A B=c", "the name of a variable"),
        ("HF_TOKEN=hf_abc", "give only its name"),
        ("MY_SECRET_KEY=abc", "give only its name"),
        ("PROXY=http://me:hf_abc@host", "give only its name"),
    ],
)
def test_secrets_are_not_given_by_value_and_are_not_repeated(entry, words):
    with pytest.raises(UserError, match=f"cluster.env: .*{words}") as caught:
        resolve_settings({}, [f"cluster.env=['{entry}']"])
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ((), ("fp32", "fp32", None)),
        (("cluster.num_gpus=8",), ("bf16", "bf16", "bf16")),
        (("cluster.num_gpus=8", "training.precision=fp32"), ("fp32", "bf16", "bf16")),
        (("cluster.num_gpus=1", "distillation.training.precision=fp32"), ("bf16", "fp32", "bf16")),
        (("cluster.num_gpus=1", "evaluation.precision=fp32"), ("bf16", "bf16", "fp32")),
        # A run on CPUs whose trials have GPUs: only what the trials do is in bf16.
        (("sweep.gpus_per_trial=1",), ("fp32", "bf16", "bf16")),
        (("sweep.gpus_per_trial=1", "sweep.kind=iterations"), ("bf16", "bf16", "bf16")),
    ],
)
def test_a_precision_that_nobody_set_is_that_of_the_devices(assignments, expected):
    settings = resolve_settings({}, assignments)
    recipes = settings.training, settings.distillation.training, settings.evaluation
    assert tuple(recipe.precision for recipe in recipes) == expected


def test_stored_settings_keep_their_precision_on_other_devices(tmp_path):
    assert resolve_settings({}) == Settings()
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(resolve_settings({}, ["cluster.num_gpus=8"])))
    assert read_settings(path, ["cluster.num_gpus=0"]).training.precision == "bf16"
    path.write_text("cluster: {num_gpus: 8}\n")
    assert read_settings(path, ["cluster.num_gpus=0"]).training.precision == "fp32"


def test_every_setting_has_a_description_and_is_found_by_its_key():
    def walk(section: type) -> None:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                walk(field.annotation)

    walk(Settings)
    field = find_field("distillation.training.elastic.num_drawn")
    assert (field.annotation, field.default) == (int, 1)
    for key in ("num_steps", "training.steps", "training.num_steps.x", ""):
        with pytest.raises(KeyError):
            find_field(key)


def test_the_model_has_the_options_of_attention_that_are_set():
    plain = Settings().model.build(vocab_size=100)
    changes = {
        "model.head_dim": "16", "model.qkv_bias": "true", "model.attention_out_bias": "true",
        "model.head_norms": "true", "model.rope_scaling": "{rope_type: linear, factor: 2.0}",
        "model.rotary_layers": "[true, true, true, true, true, false]",
        "model.sliding_windows": "[8, 8, 8, 8, 8, null]",
    }  # fmt: skip
    settings = resolve_settings({}, [f"{name}={value}" for name, value in changes.items()])
    values = settings.model.build(vocab_size=100).to_dict()
    assert {name: values[name] for name in set(values) - set(plain.to_dict())} == {
        "head_dim": 16, "qkv_bias": True, "attention_out_bias": True, "head_norms": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rotary_layers": [True] * 5 + [False], "sliding_windows": [8] * 5 + [None],
    }  # fmt: skip
    for wrong in (
        {"head_dim": 7},
        {"rope_scaling": {"rope_type": "x"}},
        {"rotary_layers": (True,)},
    ):
        shape = settings.model.model_copy(update=wrong)
        with pytest.raises(UserError, match="model: "):
            shape.build(vocab_size=100)
