"""transformers' `generate` with drafts and schedules per request, in this process and in a clean
one that has only an exported folder."""

import pytest
import torch
from exported_folder import found_by
from safetensors.torch import save_file
from transformers import GenerationConfig

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


@pytest.mark.parametrize("draft", ["0", "3,0,0", "auto", IterationSchedule((2, 0, 0))])
def test_greedy_tokens_are_those_of_transformers(model, draft):
    options = {**prompts(), "max_new_tokens": 20}
    expected = model.generate(**options)
    found = model.generate(**options, draft=draft, draft_tokens=3)
    assert torch.equal(found, expected)
    assert model.draft_record.drafted > 0


@pytest.mark.parametrize("settings", [{}, {"pad_token_id": 0}])
def test_rows_end_and_are_padded_as_by_transformers(model, settings):
    free = model.generate(**prompts(), max_new_tokens=20)
    ends = [int(free[0, 10]), int(free[1, 15])]
    for end in (ends[0], ends, int(free[2, 8])):
        options = {**prompts(), "max_length": 27, "eos_token_id": end, **settings}
        options.setdefault("pad_token_id", ends[0])
        expected = model.generate(**options)
        found = model.generate(**options, draft="0", draft_tokens=3)
        assert torch.equal(found, expected)


def test_the_padding_token_marks_padding(model):
    given = prompts()
    ids = given["input_ids"] * given["attention_mask"]
    options = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 1}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, draft="0"))


def test_the_torch_seed_determines_a_sample(model):
    config = GenerationConfig(do_sample=True, temperature=0.8, top_k=10, top_p=0.9)

    def sampled(seed):
        torch.manual_seed(seed)
        return model.generate(**prompts(), generation_config=config, max_new_tokens=12, draft="0")

    assert torch.equal(sampled(3), sampled(3))
    assert not torch.equal(sampled(3), sampled(4))


def test_a_request_may_have_its_own_schedule(model):
    other = IIETForCausalLM.from_decoder(
        model.decoder.with_schedule(IterationSchedule((0, 1, 0)))
    ).eval()
    options = {**prompts(), "max_new_tokens": 12}
    expected = other.generate(**options)
    assert not torch.equal(expected, model.generate(**options))
    assert torch.equal(model.generate(**options, schedule="0,1,0"), expected)
    found = model.generate(**options, schedule="0,1,0", draft="0", draft_tokens=2)
    assert torch.equal(found, expected)
    expected = other.generate(**options, num_beams=2)
    assert torch.equal(model.generate(**options, schedule="0,1,0", num_beams=2), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "0", "num_beams": 2}, "does not serve num_beams=2"),
        ({"draft": "0", "repetition_penalty": 1.2}, "does not serve repetition_penalty=1.2"),
        ({"draft": "0", "num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"draft": "0", "use_cache": False}, "use_cache=False"),
        ({"draft": "0", "min_new_tokens": 4}, "min_new_tokens=4"),
        ({"draft": "0", "misspelt": 4}, "misspelt=4"),
        ({"draft": "0", "max_new_tokens": None}, "needs max_new_tokens or max_length"),
        ({"draft": "1,0"}, "schedule 1,0 is for 2 layers, the model has 3"),
        ({"schedule": "1,0"}, "schedule 1,0 is for 2 layers, the model has 3"),
        ({"draft_tokens": 3}, "draft_tokens=3 needs draft="),
    ],
)
def test_what_is_not_served_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{**prompts(), "max_new_tokens": 8, **options})


IN_A_CLEAN_PROCESS = """
import json, sys

sys.modules["iiet"] = None  # Any import of the package fails from here on.
folder, copy = sys.argv[1:]
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

given = load_file(folder + "/given.safetensors")
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float64
)
prompts = {"input_ids": given["ids"], "attention_mask": given["mask"], "max_new_tokens": 20}
equal, drafts = {}, {}
for draft in ("auto", "0", "2,0,0"):
    for schedule in (None, "2,1,1"):
        options = {**prompts, "schedule": schedule, "eos_token_id": 5, "pad_token_id": 0}
        tokens = model.generate(**options, draft=draft, draft_tokens=3)
        equal[f"{draft} {schedule}"] = torch.equal(tokens, model.generate(**options))
        drafts[f"{draft} {schedule}"] = list(model.draft_record.rounds_by_draft)
sampled = model.generate(
    **prompts, do_sample=True, temperature=0.9, top_k=9, top_p=0.9, draft="auto"
)
try:
    model.generate(**prompts, draft="auto", num_beams=3)
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "equal": equal, "drafts": drafts, "sampled": list(sampled.shape), "refused": refused,
}))
"""


@pytest.mark.slow
def test_an_exported_folder_drafts_without_this_package(tmp_path):
    folder = tmp_path / "exported"
    family = [IterationSchedule((1, 0, 0))]
    export_pretrained(decoder_of(), folder, elastic_schedules=family)
    given = prompts()
    save_file(
        {"ids": given["input_ids"], "mask": given["attention_mask"]}, folder / "given.safetensors"
    )
    found = found_by(IN_A_CLEAN_PROCESS, folder, tmp_path)
    assert all(found["equal"].values()), found
    assert found["drafts"]["auto None"] == ["1,0,0"]
    assert found["sampled"] == [3, 27]
    assert "num_beams=3" in found["refused"]
