"""transformers' `generate` with a cheaper schedule as its assistant, and schedules per request, in
this process and in a clean one that has only an exported folder."""

import pytest
import torch
from exported_folder import found_by
from safetensors.torch import save_file

from iiet import Decoder, IterationSchedule, preset
from iiet.export import export_pretrained
from iiet.huggingface import IIETForCausalLM

VOCAB = 29


def decoder_of(schedule="2,0,1", **overrides):
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 3, "num_heads": 2, "ffn_dim": 24, "vocab_size": VOCAB}
    return Decoder(preset("tiny", schedule=schedule, initializer_std=0.3, **sizes, **overrides))


@pytest.fixture
def model():
    return IIETForCausalLM.from_decoder(decoder_of().double()).eval()


def prompts():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2], mask[2, :4] = 0, 0
    return {
        "input_ids": torch.randint(3, VOCAB, (3, 7), generator=generator),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("draft", ["0", 0, "3,0,0", IterationSchedule((2, 0, 0))])
def test_a_cheaper_schedule_assists(model, draft):
    """The tokens are the model's own; both share the weights, and the twin its settings."""
    model.generation_config.max_new_tokens = 20
    prompt = prompts()["input_ids"][:1]
    twin = model.with_schedule(draft)
    assert twin.decoder.embedding.weight is model.decoder.embedding.weight
    assert twin.generation_config.max_new_tokens == 20
    assert twin.config.corrections != model.config.corrections
    assert torch.equal(model.generate(prompt, assistant_model=twin), model.generate(prompt))


def test_a_request_may_have_its_own_schedule(model):
    other = IIETForCausalLM.from_decoder(
        model.decoder.with_schedule(IterationSchedule((0, 1, 0)))
    ).eval()
    options = {**prompts(), "max_new_tokens": 12}
    expected = other.generate(**options)
    assert not torch.equal(expected, model.generate(**options))
    assert torch.equal(model.generate(**options, schedule="0,1,0"), expected)
    expected = other.generate(**options, num_beams=2)
    assert torch.equal(model.generate(**options, schedule="0,1,0", num_beams=2), expected)


def test_a_schedule_that_does_not_fit_is_refused(model):
    for use in (
        lambda: model.generate(**prompts(), schedule="1,0"),
        lambda: model.with_schedule("1,0"),
    ):
        with pytest.raises(ValueError, match="schedule 1,0 is for 2 layers, the model has 3"):
            use()


IN_A_CLEAN_PROCESS = """
import json, sys

sys.modules["iiet"] = None  # Any import of the package fails from here on.
folder = sys.argv[1]
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

given = load_file(folder + "/given.safetensors")
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float64
)
options = {"max_new_tokens": 20, "eos_token_id": 5, "pad_token_id": 0}
equal = []
for prompt in given["ids"].split(1):
    expected = model.generate(prompt, **options)
    for draft in ("0", "2,0,0"):
        found = model.generate(prompt, **options, assistant_model=model.with_schedule(draft))
        equal.append(torch.equal(found, expected))
    model.generate(prompt, **options, schedule="2,1,1")
print(json.dumps(equal))
"""


@pytest.mark.slow
def test_an_exported_folder_drafts_without_this_package(tmp_path):
    folder = tmp_path / "exported"
    export_pretrained(decoder_of(), folder)
    save_file({"ids": prompts()["input_ids"]}, folder / "given.safetensors")
    assert found_by(IN_A_CLEAN_PROCESS, folder, tmp_path) == [True] * 6
