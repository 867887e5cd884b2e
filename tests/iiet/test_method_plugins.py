"""A method of another package: found by its entry point, tested by the shared suite, exported with
the transformers code that it brings.

The package is in a temporary folder, with the metadata that an installer would write.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import Started
from exported_folder import json_printed_by
from refusals import refused
from safetensors.torch import save_file

from iiet import METHODS, Decoder, preset
from iiet.exporting import export, modeling_file
from iiet.model.config import ModelConfig

CODE = modeling_file("vanilla").read_text(encoding="utf-8")
PACKAGE = {
    "relaxed_methods/__init__.py": '''\
from dataclasses import dataclass

import torch
from torch import nn

from iiet.model.facts import MethodFacts
from iiet.methods import Advance, Layer


@dataclass(frozen=True, kw_only=True)
class RelaxedOptions:
    step: float = 0.5

    def __post_init__(self):
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be in (0, 1], got {self.step}")


class RelaxedEuler(Layer):
    """h_l = h + gain * step * (F(h) - h), twice."""

    facts = MethodFacts(
        Options=RelaxedOptions, modeling_file="modeling_relaxed.py", num_evaluations=2
    )

    def build(self, config):
        self.gain = nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        nn.init.ones_(self.gain)

    def advance(self, evaluate, hidden, state, *, num_corrections, shared):
        for _ in range(2):
            hidden = hidden + self.gain * self.options.step * (evaluate(hidden) - hidden)
        return Advance(hidden, state)
''',
    "relaxed_methods/modeling_relaxed.py": f"""\
{CODE.replace("if self.method_options:", "if self.method not in LAYERS:")}

class RelaxedEuler(IIETDecoderLayer):
    num_evaluations = 2

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gain = nn.Parameter(torch.ones(1))
        self.step = (config.method_options or {{}}).get("step", 0.5)

    def forward(self, hidden_states, slots, **kwargs):
        for slot in slots:
            change = self.field(hidden_states, slot, **kwargs) - hidden_states
            hidden_states = hidden_states + self.gain * self.step * change
        return hidden_states


LAYERS["relaxed"] = RelaxedEuler
""",
    "relaxed_methods-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: relaxed-methods\n"
    "Version: 1.0\n",
    "relaxed_methods-1.0.dist-info/entry_points.txt": "[iiet.methods]\n"
    "relaxed = relaxed_methods:RelaxedEuler\n",
}

IN_A_PROCESS_WITHOUT_BOTH = """
import json, sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

expected = load_file(sys.argv[1] + "/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
difference = (model(expected["ids"]).logits - expected["logits"]).abs().max().item()
print(json.dumps([type(model.model.layers[0]).__name__, difference]))
"""


SUITE = """
import sys

sys.path.insert(0, sys.argv[1])
import pytest

ignored = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Of plugins imported before.
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *ignored, "-k", "relaxed", sys.argv[2]]))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path where a package with a method is installed."""
    folder = tmp_path / "site"
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("relaxed_methods", None)


def decoder_of(**options):
    torch.manual_seed(0)
    config = preset(
        "tiny", method="relaxed", dim=16, num_layers=2, num_heads=2, ffn_dim=24, vocab_size=20,
        initializer_std=0.4, method_options=options,
    )  # fmt: skip
    return Decoder(config).eval()


def test_an_entry_point_is_a_method_with_its_options(site):
    assert "relaxed" in list(METHODS)
    decoder = decoder_of(step=0.25)
    assert ModelConfig.from_dict(json.loads(json.dumps(decoder.config.to_dict()))) == decoder.config
    ids = torch.arange(8)[None]
    assert not torch.allclose(decoder(ids), decoder_of()(ids))
    with refused(ValueError, "step", "(0, 1]", "got 2"):
        decoder_of(step=2)


@pytest.mark.slow
def test_the_shared_suite_tests_it(site):
    run = Started(str(site), str(Path(__file__).with_name("test_laws.py")), code=SUITE)
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert int(printed.split(" passed")[0].split()[-1]) > 12


@pytest.mark.slow
def test_its_export_works_where_neither_package_is_installed(site, tmp_path):
    decoder = decoder_of(step=0.25)
    folder = export(decoder, tmp_path / "model")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        save_file({"ids": ids, "logits": decoder(ids)}, folder / "expected.safetensors")
    name, difference = json_printed_by(
        IN_A_PROCESS_WITHOUT_BOTH, folder, tmp_path, packages=("iiet", "relaxed_methods")
    )
    assert (name, difference) == ("RelaxedEuler", pytest.approx(0.0, abs=1e-5))
