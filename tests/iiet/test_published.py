"""Published weights: kinds that their names show, untied heads, and broken weights."""

import torch
from refusals import refused

from iiet import Decoder, decoder_from_published
from iiet.hf.published import config_from_published

CONFIG = {
    "kind": "vanilla",
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 20,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "corrections": None,
    "predictor_order": None,
    "evaluations": {"0": 1, "1": 1},
}


def weights_of(config):
    shapes = Decoder(config_from_published(config, {})).state_dict()
    return {name: torch.randn_like(value) for name, value in shapes.items()}


def test_the_names_of_weights_show_the_kind_if_the_config_does_not():
    plain = {key: value for key, value in CONFIG.items() if key != "kind"}
    assert config_from_published(plain, {}).method == "vanilla"
    mix = {"model.history.weight": None}
    assert config_from_published({**plain, "corrections": 2}, mix).schedule.corrections == (2, 2)
    assert config_from_published(plain, {**mix, "model.alpha": None}).method == "pcformer"


def test_a_weight_of_another_shape():
    weights = weights_of(CONFIG)
    name = "model.layers.0.self_attn.{}_proj.weight"
    weights[name.format("q")] = torch.zeros(20, 16)
    weights[name.format("k")] = torch.zeros(12, 16)
    with refused(ValueError, "q_proj.weight", "(20, 16)", "(16, 16)"):
        decoder_from_published(CONFIG, weights)


def test_a_tied_head_of_its_own_is_refused_and_not_dropped():
    weights = weights_of(CONFIG)
    for head in (2 * weights["model.embed_tokens.weight"], torch.ones(3, 16)):
        with refused(ValueError, "lm_head.weight"):
            decoder_from_published(CONFIG, weights | {"lm_head.weight": head})
    untied = {**CONFIG, "tie_word_embeddings": False}
    decoder_from_published(untied, weights | {"lm_head.weight": torch.ones(20, 16)})
