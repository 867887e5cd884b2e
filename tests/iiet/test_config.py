"""Configs: published sizes, conversion to plain values and back, all problems in one error."""

import dataclasses
import json

import pytest
import torch
from refusals import refused

from iiet import (
    INFLUENCE_METRICS,
    METHODS,
    PRESETS,
    Decoder,
    IterationSchedule,
    ModelConfig,
    preset,
)
from iiet.hf.weights import config_from_json, config_to_json
from iiet.model.config import ATTENTION_OPTIONS
from iiet.model.facts import facts_of, metric_facts_of


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_with_every_method(name, method):
    config = preset(name, method=method)
    assert config.method == method
    facts = METHODS[method].facts
    usual_level = facts.full_level or (3 if facts.has_corrections else 0)
    assert config.corrections == IterationSchedule.uniform(config.num_layers, usual_level)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides():
    config = preset("tiny", num_layers=2, num_heads=8, schedule="2,0", rope_theta=5e5)
    assert config.schedule == IterationSchedule((2, 0))
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (8, 16, 5e5)
    assert preset("tiny", num_layers=4).schedule == IterationSchedule((3, 3, 3, 3))
    with refused(ValueError, "'7b'", "tiny, 55m"):
        preset("7b")


def test_all_problems_at_once():
    with pytest.raises(ValueError, match="invalid model config") as caught:
        preset("tiny", num_heads=3, num_kv_heads=2, schedule=[1, 1], num_layers=2, method="iiet")
    for part in ("dim must be a multiple of twice num_heads (6", "num_kv_heads must divide"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="invalid model config") as caught:
        preset("tiny", vocab_size=0, dim="128", rope_theta=float("nan"), tie_embeddings=1)
    for part in (
        "vocab_size must be a positive integer, got 0",
        "dim must be a positive integer, got '128'",
        "rope_theta must be a positive number, got nan",
        "tie_embeddings must be true or false, got 1",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "euler"}, "method must be one of vanilla, iiet.* got 'euler'"),
        ({"schedule": None}, "schedule is required for method 'iiet'"),
        ({"method": "vanilla"}, "method 'vanilla' makes no corrections, got schedule 3,3"),
        (
            {"method": "pcformer"},
            "method 'pcformer' has levels 0 to 2 for each layer, got",
        ),
        (
            {"method": "pcformer_rk4"},
            "method 'pcformer_rk4' makes no corrections, got",
        ),
        ({"num_layers": 5}, "schedule 3,3,3,3,3,3 is for 6 layers, the model has 5"),
        ({"schedule": (3, 3)}, "is for 2 layers, the model has 6"),
        ({"num_layers": True}, "num_layers must be a positive integer, got True"),
        ({"num_layers": "6"}, "num_layers must be a positive integer, got '6'"),
    ],
)
def test_settings_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("tiny"), **changes)


def test_plain_values_that_make_no_config():
    values = preset("tiny").to_dict()
    for changes, message in (
        ({"num_layers": "six"}, "num_layers must be a positive integer, got 'six'"),
        ({"schedule": "1,1"}, "is for 2 layers, the model has 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_dict({**values, **changes})
    del values["dim"]
    with refused(ValueError, "'hidden'", "'dim'"):
        ModelConfig.from_dict({**values, "hidden": 3})


def test_weights_start_as_configured():
    torch.manual_seed(0)
    decoder = Decoder(preset("tiny", method="ode_rk2_gated", tie_embeddings=False))
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 10_000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    assert "lm_head.weight" in dict(decoder.named_parameters())


def test_plain_values_hold_only_options_that_differ_from_the_defaults():
    options = METHODS["iiet"].facts.Options
    damped = preset("tiny", method_options={"damping": 0.5})
    assert damped.method_options == options(damping=0.5)
    assert damped.to_dict()["method_options"] == {"damping": 0.5}
    assert ModelConfig.from_dict(damped.to_dict()) == damped
    # A config says what was chosen.
    for usual in (None, options(), options(damping=1.0)):
        assert "method_options" not in preset("tiny", method_options=usual).to_dict()


def test_classes_and_tables_state_the_same_facts():
    for method in METHODS.own_classes:
        assert METHODS[method].facts == facts_of(method)
    for metric in INFLUENCE_METRICS.own_classes:
        assert INFLUENCE_METRICS[metric].facts == metric_facts_of(metric)


def test_there_are_as_many_key_and_value_heads_as_query_heads_unless_told():
    sizes = {**PRESETS["tiny"], "method": "vanilla"}
    assert ModelConfig(**sizes).num_kv_heads == 4
    assert ModelConfig(**sizes | {"num_heads": 8}).num_kv_heads == 8
    values = config_to_json(ModelConfig(**sizes, num_kv_heads=2))
    assert config_from_json(values).num_kv_heads == 2
    del values["num_key_value_heads"]
    assert config_from_json(values).num_kv_heads == 4


ATTENTION = {
    "head_dim": 48,
    "qkv_bias": True,
    "attention_out_bias": True,
    "head_norms": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "rotary_layers": [True, True, True, False, True, True],
    "sliding_windows": [16, None, 16, None, 16, None],
}


def test_options_of_attention_are_kept_and_left_out_at_their_defaults():
    plain = preset("tiny")
    assert set(ATTENTION) == {"head_dim", *ATTENTION_OPTIONS}
    assert not set(ATTENTION) & (set(plain.to_dict()) | set(config_to_json(plain)))
    defaults = {
        "head_dim": 32, "qkv_bias": False, "attention_out_bias": False, "head_norms": False,
        "rope_scaling": None, "rotary_layers": [True] * 6, "sliding_windows": [None] * 6,
    }  # fmt: skip
    assert preset("tiny", **defaults) == plain
    config = preset("tiny", **ATTENTION)
    assert config.to_dict() == {**plain.to_dict(), **ATTENTION}
    assert len({plain, config}) == 2, "a config can be the key of a dictionary"
    for values in (config.to_dict(), json.loads(json.dumps(config.to_dict()))):
        assert ModelConfig.from_dict(values) == config
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_a_window_as_long_as_the_context_hides_nothing():
    config = preset("tiny", sliding_windows=[127, 128, 500, None, 1, 128])
    assert [config.window_of(layer) for layer in range(6)] == [127, None, None, None, 1, None]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"head_dim": 7}, "head_dim"),
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"rotary_layers": [1] * 6}, "rotary_layers"),
        ({"rotary_layers": [True] * 5}, "rotary_layers"),
        ({"rotary_layers": True}, "rotary_layers"),
        ({"sliding_windows": [0] * 6}, "sliding_windows"),
        ({"sliding_windows": 8}, "sliding_windows"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embed"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor"),
        ({"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 2.0}}, "beta_slow"),
        ({"rope_scaling": {**YARN, "beta_slow": 32.5}}, "beta_slow"),  # beta_fast is 32.
        ({"rope_scaling": {**YARN, "short_factor": [1.0]}}, "short_factor"),
        (
            {"rope_scaling": {**ATTENTION["rope_scaling"], "high_freq_factor": 1.0}},
            "low_freq_factor",
        ),
    ],
)
def test_options_of_attention_are_checked(changes, name):
    with pytest.raises(ValueError, match=name):
        preset("tiny", **changes)
