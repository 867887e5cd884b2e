"""A method of another package: found by its entry point, tested by the shared suite, exported with
its source.

The package is in a temporary folder, with the metadata that an installer would write.
"""

import json
import sys

import pytest
import torch
from exported_folder import found_by
from method_suite import assert_passes_suite
from safetensors.torch import save_file

from iiet import METHODS, Decoder, preset
from iiet.config import ModelConfig
from iiet.export import export_pretrained, flat_sources

PACKAGE = {
    "relaxed_methods/__init__.py": '"""Methods that step part of the way."""\n',
    "relaxed_methods/sizes.py": "def num_steps(options):\n    return options.num_steps\n",
    "relaxed_methods/options.py": """\
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RelaxedOptions:
    step: float = 0.5
    num_steps: int = 2

    def __post_init__(self):
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be in (0, 1], got {self.step}")
""",
    "relaxed_methods/layers.py": '''\
"""from iiet.nowhere import this_is_text"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from iiet import IterationSchedule, preset as sizes_by_name
from iiet.methods.base import (  # what every method builds on
    Advance,
    Layer,
)
from relaxed_methods.options import RelaxedOptions

from . import sizes as how_many
from .sizes import num_steps

if TYPE_CHECKING:
    from iiet.methods import Evaluate


class RelaxedEuler(Layer):
    """h_l = h + gain * step * (F(h) - h), several times."""

    Options = RelaxedOptions

    def build(self, dim, layer_norm_eps):
        self.gain = nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        nn.init.ones_(self.gain)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer):
        return RelaxedOptions().num_steps

    def advance(self, evaluate: "Evaluate", hidden, state, *, num_corrections, shared):
        assert how_many.num_steps is num_steps and sizes_by_name("tiny").dim
        for _ in range(num_steps(self.options)):
            moved = evaluate(hidden) - hidden
            hidden = hidden + self.gain * self.options.step * moved
        return Advance(hidden, state)
''',
    "relaxed_methods-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: relaxed-methods\n"
    "Version: 1.0\n",
    "relaxed_methods-1.0.dist-info/entry_points.txt": "[iiet.methods]\n"
    "relaxed = relaxed_methods.layers:RelaxedEuler\n",
}

IN_A_PROCESS_WITHOUT_BOTH = """
import json, sys
from importlib.util import find_spec

sys.modules["iiet"] = None  # Any import of the package fails from here on.
folder, copy = sys.argv[1:]
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

expected = load_file(folder + "/expected.safetensors")
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(expected["ids"]).logits
    model.save_pretrained(copy)
    again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    options = dict(max_new_tokens=9, do_sample=False, min_new_tokens=9)
    cached = model.generate(expected["ids"], **options)
    uncached = model.generate(expected["ids"], use_cache=False, **options)
print(json.dumps({
    "installed": find_spec("relaxed_methods") is not None,
    "method": type(model.decoder.layers[0]).__name__,
    "step": model.decoder.layers[0].options.step,
    "difference": (logits - expected["logits"]).abs().max().item(),
    "difference_of_copy": (again(expected["ids"]).logits - logits).abs().max().item(),
    "cached_equals_uncached": torch.equal(cached, uncached),
}))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path where a package with a method is installed."""
    folder = tmp_path / "site"
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    monkeypatch.setattr(METHODS, "_checked", set())
    yield folder
    for name in [name for name in sys.modules if name.startswith("relaxed_methods")]:
        del sys.modules[name]


def decoder_of(**options):
    torch.manual_seed(0)
    config = preset(
        "tiny", method="relaxed", dim=16, num_layers=2, num_heads=2, ffn_dim=24, vocab_size=20,
        initializer_std=0.4, method_options=options,
    )  # fmt: skip
    return Decoder(config).eval()


def test_an_entry_point_is_a_method_with_its_options(site):
    assert "relaxed" in METHODS
    assert "relaxed" in list(METHODS)
    decoder = decoder_of(step=0.25)
    assert decoder.config.options.step == 0.25
    assert ModelConfig.from_dict(json.loads(json.dumps(decoder.config.to_dict()))) == decoder.config
    ids = torch.arange(8)[None]
    assert not torch.allclose(decoder(ids), decoder_of()(ids))
    with pytest.raises(ValueError, match=r"step must be in \(0, 1\], got 2"):
        decoder_of(step=2)


@pytest.mark.slow
def test_the_shared_suite_tests_it(site):
    assert_passes_suite("relaxed", site)


@pytest.mark.slow
def test_its_export_works_where_neither_package_is_installed(site, tmp_path):
    decoder = decoder_of(step=0.25)
    folder = export_pretrained(decoder, tmp_path / "model")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        save_file({"ids": ids, "logits": decoder(ids)}, folder / "expected.safetensors")
    assert found_by(IN_A_PROCESS_WITHOUT_BOTH, folder, tmp_path) == {
        "installed": False,
        "method": "RelaxedEuler",
        "step": 0.25,
        "difference": pytest.approx(0.0, abs=1e-6),
        "difference_of_copy": 0.0,
        "cached_equals_uncached": True,
    }


def test_only_what_the_method_needs_is_exported(site):
    sources = flat_sources("relaxed")
    own = {name for name in sources if name.startswith("method_")}
    assert own == {f"method_relaxed_methods_{name}" for name in ("layers", "options", "sizes")}
    assert '"""from iiet.nowhere import this_is_text"""' in sources["method_relaxed_methods_layers"]
    assert not own & set(flat_sources("iiet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import iiet", "line 1 reads 'import iiet'"),
        ("import relaxed_methods.sizes as sizes", "line 1 reads 'import relaxed_methods.sizes"),
        ("from iiet import *", r"line 1 reads 'from iiet import \*'"),
        ("x = 1; from iiet import METHODS", "line 1 reads 'from iiet import METHODS'"),
    ],
)
def test_an_import_that_cannot_be_rewritten_is_refused_with_its_line(site, line, message):
    file = site / "relaxed_methods" / "layers.py"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(ValueError, match=f"relaxed_methods.layers cannot be exported: {message}"):
        flat_sources("relaxed")


def test_a_method_that_cannot_be_imported_by_its_name_is_refused(site, tmp_path):
    class Local(METHODS["vanilla"]):
        pass

    METHODS.register("local", Local)
    config = preset("tiny", method="local")
    with pytest.raises(ValueError, match="define it at the top of a module of its own"):
        export_pretrained(Decoder(config), tmp_path / "model")
    assert not (tmp_path / "model").exists()
