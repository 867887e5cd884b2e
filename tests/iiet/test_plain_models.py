"""Plain models of transformers: what their `config.json` says, read, refused and written again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_models import CASES, config_of, random_model
from refusals import refused
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from iiet import ModelConfig, decoder_from_published
from iiet.decoder import Decoder
from iiet.exporting import export
from iiet.hf.plain_models import MODEL_TYPES, config_from_plain, plain_config_json
from iiet.hf.weights import write_files

OPTIONS = {
    "llama": {},
    "llama3": {"rope_scaling": "llama3", "head_dim": 16, "tie_embeddings": True},
    "llama biases": {"qkv_bias": True, "attention_out_bias": True},
    "mistral": {},
    "mistral window": {"sliding_windows": (6, 6, 6, 6)},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen2 windows": {"qkv_bias": True, "sliding_windows": (None, None, 6, 6)},
    "qwen3": {"head_norms": True, "head_dim": 16},
    "qwen3 yarn": {"head_norms": True, "rope_scaling": "yarn"},
    "qwen3 layer types": {"head_norms": True, "sliding_windows": (6, None, 6, None)},
    "smollm3": {"rotary_layers": (True, True, True, False), "tie_embeddings": True},
    "smollm3 windows": {
        "rotary_layers": (True, False, True, False), "sliding_windows": (None, 6, None, 6),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_key_becomes_its_option(case):
    config = config_from_plain(config_of(case).to_diff_dict())
    expected: dict[str, Any] = {
        "qkv_bias": False, "attention_out_bias": False, "head_norms": False, "head_dim": 8,
        "rope_scaling": None, "rotary_layers": None, "sliding_windows": None,
        "tie_embeddings": False, "method": "vanilla", "vocab_size": 50, "dim": 32, "num_layers": 4,
        "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 24, "context_length": 64,
    }  # fmt: skip
    options = {name: getattr(config, name) for name in expected}
    if config.rope_scaling is not None:
        options["rope_scaling"] = config.rope_scaling.rope_type
    assert options == expected | OPTIONS[case]


@pytest.mark.parametrize("case", CASES)
def test_what_each_layer_does_follows_from_the_other_keys(case):
    """Folders of earlier transformers have no `layer_types`; newer ones write them always."""
    values = config_of(case).to_diff_dict()
    derived = {"layer_types", "no_rope_layers"} - set(CASES[case])
    fewer = {key: value for key, value in values.items() if key not in derived}
    assert config_from_plain(fewer) == config_from_plain(values)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_key_that_is_left_out_has_the_default_of_transformers(name):
    fields = CONFIG_MAPPING[name].__dataclass_fields__
    for key, value in MODEL_TYPES[name].defaults.items():
        # Llama's and SmolLM3's heads, and Qwen 2's, are as wide as the hidden state allows.
        assert (fields[key].default if key in fields else None) == value, key
    default_config = CONFIG_MAPPING[name](vocab_size=50, pad_token_id=0)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    required = {key: getattr(default_config, key) for key in (*sizes, "intermediate_size")}
    assert config_from_plain({"model_type": name, **required}) == config_from_plain(
        default_config.to_diff_dict()
    )


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"sliding_window": 6}, "of llama: sliding_window 6"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"model_type": "mixtral"}, "got 'mixtral'"),
        ("llama", {"hidden_size": None}, "does not say hidden_size"),
        ("qwen2", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types 'chunked_attention'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "without use_sliding_window"),
    ],
)
def test_what_no_decoder_computes_is_refused_by_its_name(case, changes, words):
    with pytest.raises(ValueError, match=words):
        config_from_plain({**config_of(case).to_diff_dict(), **changes})


def test_the_form_before_transformers_5_is_read():
    values = config_of("llama3").to_diff_dict()
    new = dict(values.pop("rope_parameters"))
    theta = new.pop("rope_theta")
    kind = new.pop("rope_type")
    old = {**values, "rope_theta": theta, "rope_scaling": {"type": kind, **new}}
    assert config_from_plain(old) == config_from_plain(config_of("llama3").to_diff_dict())


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_a_folder_of_its_own_type(case, tmp_path):
    model = random_model(case)
    plain_config = model.config
    decoder = decoder_from_published(plain_config.to_diff_dict(), model.state_dict()).eval()
    folder = export(decoder, tmp_path / "out", model_type=plain_config.model_type)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(reloaded) is type(model)
    assert config_from_plain(reloaded.config.to_diff_dict()) == decoder.config
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(reloaded(tokens).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_loads_a_folder_that_transformers_wrote(case, tmp_path):
    model = random_model(case)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    decoder = Decoder.from_pretrained(tmp_path, torch.float64).eval()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model.double()(tokens).logits
        torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=1e-5)


def test_a_folder_of_another_type_is_refused_with_the_types_that_are_read(tmp_path):
    write_files(tmp_path, {"model_type": "gpt2"}, {})
    with refused(ValueError, tmp_path, "gpt2", "llama", "qwen3"):
        Decoder.from_pretrained(tmp_path)


def test_the_type_follows_from_the_options_where_none_is_named():
    configs = {
        case: plain_config_json(config_from_plain(config_of(case).to_diff_dict())) for case in CASES
    }
    types = {case: values and values["model_type"] for case, values in configs.items()}
    expected = {case: case.split()[0] for case in CASES}
    # A Mistral without a window computes what a Llama does.
    expected |= {"llama3": "llama", "mistral": "llama"}
    assert types == expected


def test_what_no_type_computes_is_exported_with_code(tmp_path):
    sizes = {"vocab_size": 20, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
    config = ModelConfig(
        method="vanilla", **sizes, context_length=16, qkv_bias=True, rotary_layers=(True, False)
    )
    assert plain_config_json(config) is None
    folder = export(Decoder(config), tmp_path)
    assert (folder / "modeling_iiet.py").is_file()


_IN_SUITE = ("llama3", "mistral window")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in _IN_SUITE else pytest.mark.long)
        for case in (*_IN_SUITE, "mistral", "qwen2", "qwen3 yarn", "smollm3")
    ],
)
def test_an_export_gives_the_same_tokens_in_continuous_batching(case, tmp_path):
    source = random_model(case)
    config = source.config
    decoder = decoder_from_published(config.to_diff_dict(), source.state_dict())
    export(decoder, tmp_path, model_type=config.model_type)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 10, 11, 12, 13, 14], [20]]
    options = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    # Without sizes it fills most of the machine's memory with pages.
    pages = ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=64)
    results = model.generate_batch(
        prompts,
        generation_config=options,
        continuous_batching_config=pages,
        progress_bar=False,
    )
    assert [result.generated_tokens for result in results.values()] == expected
    text = torch.tensor([prompts[1]])
    assert decoder.generate(text, max_new_tokens=8)[0, text.size(1) :].tolist() == expected[1]
