"""A decoder in a folder: loading returns what was saved, and errors name what does not fit."""

import subprocess
import sys

import pytest
import torch
from model_cases import make_model, tokens
from safetensors.torch import load_file

from iiet import Decoder, next_token_loss

IDS = tokens(2, 8)


def decoder_of():
    return make_model(dtype=torch.float32)


def dtypes_of(decoder):
    return {name: tensor.dtype for name, tensor in decoder.state_dict().items()}


def test_a_dtype_casts_all_but_the_methods_own_weights_and_that_of_the_file_is_kept(tmp_path):
    decoder = decoder_of()
    decoder.save_pretrained(tmp_path)
    assert set(dtypes_of(Decoder.from_pretrained(tmp_path, torch.float64)).values()) == {
        torch.float64
    }
    kinds = dtypes_of(decoder.bfloat16())
    own = set(decoder.method_parameters())
    assert dtypes_of(Decoder.from_pretrained(tmp_path, torch.bfloat16)) == kinds
    assert {kinds[name] for name in own} == {torch.float32}
    assert {kind for name, kind in kinds.items() if name not in own} == {torch.bfloat16}
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert dtypes_of(again) == kinds
    assert torch.equal(again(IDS), decoder(IDS))


def test_a_loaded_decoder_can_be_trained_and_saved_over_itself(tmp_path):
    decoder_of().save_pretrained(tmp_path)
    decoder = Decoder.from_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    next_token_loss(decoder(IDS), IDS).backward()
    optimizer.step()
    on_disk = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(on_disk[name], value) for name, value in before.items())
    decoder.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert torch.equal(again(IDS), decoder(IDS))
    assert not torch.equal(again.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@pytest.mark.slow
def test_loading_and_generating_import_few_libraries(tmp_path):
    """PyTorch's compiler alone, `torch._dynamo`, would take a second."""
    decoder_of().save_pretrained(tmp_path)
    script = (
        "import sys, torch, iiet; assert 'safetensors' not in sys.modules; "
        "decoder = iiet.Decoder.from_pretrained(sys.argv[1]); "
        "decoder.save_pretrained(sys.argv[1]); "
        "decoder.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2); "
        "print({'transformers', 'orchestrator', 'torch._dynamo'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"
