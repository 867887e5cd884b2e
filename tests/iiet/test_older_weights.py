"""State dicts from before version 0.2 load and give the same logits as then.

`tests/fixtures/older` holds a small model of each method of version 0.1, written by that version:
its weights under their old names, its config, and logits.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from iiet import Decoder, ModelConfig

FOLDER = Path(__file__).parent.parent / "fixtures" / "older"
METHODS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def older(method):
    """Return the config, the weights, input ids and their logits."""
    with safe_open(FOLDER / f"{method}.safetensors", "pt") as file:
        config = ModelConfig.from_dict(json.loads(file.metadata()["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ids, logits = tensors.pop("expected.input_ids"), tensors.pop("expected.logits")
    return config, tensors, ids, logits


def test_all_methods_of_version_0_1_are_tested():
    assert len(METHODS) == 7


@pytest.mark.parametrize("how", ["copied", "assigned", "onto meta"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_older_weights_load_strictly_and_give_their_logits(method, how):
    config, weights, ids, logits = older(method)
    with torch.device("meta" if how == "onto meta" else "cpu"):
        decoder = Decoder(config)
    given = dict(weights)
    decoder.load_state_dict(weights, assign=how != "copied")
    assert {parameter.device.type for parameter in decoder.parameters()} == {"cpu"}
    torch.testing.assert_close(decoder(ids), logits)
    assert weights.keys() == given.keys()


def test_older_weights_load_inside_another_module():
    config, weights, ids, logits = older("iiet")
    wrapped = torch.nn.ModuleDict({"model": Decoder(config)})
    wrapped.load_state_dict({f"model.{name}": tensor for name, tensor in weights.items()})
    torch.testing.assert_close(wrapped["model"](ids), logits)


def test_missing_and_unexpected_weights_are_named():
    config, weights, _, _ = older("iiet")
    del weights["fields.1.attention.out.weight"], weights["method.mix.outer"]
    weights["method.mix.more"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        Decoder(config).load_state_dict(weights)
    for name in ("layers.1.field.attention.out.weight", "layers.0.mix.outer", "method.mix.more"):
        assert name in str(error.value)


def test_matrices_of_another_number_of_layers_are_refused():
    config, weights, _, _ = older("iiet")
    weights["method.mix.inner"] = weights["method.mix.inner"][:2, :2]
    with pytest.raises(RuntimeError, match=r"(?s)layers.1.mix.inner.*method.mix.inner"):
        Decoder(config).load_state_dict(weights)
