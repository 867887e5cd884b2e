"""An export's code computes what the decoder computes, also in a process without the package."""

import json

import pytest
import torch
from exported_folder import json_printed_by
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given, settings
from laws import examples
from model_cases import VOCAB, cheaper, make_model, models, paddings, tokens
from refusals import refused
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import iiet
from iiet.decoder import Decoder, decoder_from_published
from iiet.exporting import export, fast_tokenizer, transformers_model
from iiet.methods import METHODS
from iiet.model.schedule import IterationSchedule

END = "<|endoftext|>"
SENTENCE = "the cat dog sat ran on under a mat tree and then saw it"
WORDS = [END, *SENTENCE.split()]


@pytest.fixture(autouse=True, scope="module")
def in_float64():
    """Let what transformers computes in float32 keep float64, so that formulas are compared and not
    roundings."""

    def norm(self, hidden_states):
        shape = hidden_states.shape[-1:]
        return torch.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon)

    def rotary(self, x, position_ids):
        theta = self.config.rope_parameters["rope_theta"]
        time = position_ids[..., None].double()
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64)
        angles = (time / theta ** (channels / self.config.head_dim)).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", norm)
        patch.setattr(LlamaRotaryEmbedding, "forward", rotary)
        yield


def generated(model, ids, mask, **options):
    torch.manual_seed(7)
    model.generation_config = GenerationConfig(pad_token_id=0, max_new_tokens=6, **options)
    return model.generate(ids, attention_mask=mask.long())


@settings(max_examples=examples(6))
@given(models(), paddings())
def test_equals_the_core_in_logits_loss_gradients_and_cached_decoding(decoder, mask):
    model = transformers_model(decoder)
    ids = tokens(2, 9)
    tied = {"lm_head.weight"} if decoder.config.tie_embeddings else set()
    assert set(model.state_dict()) - tied == set(decoder.state_dict())
    near = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask],
        decoder(ids, attention_mask=mask)[mask],
        **near,
    )
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]).expand(2, 9)
    output = model(ids, position_ids=packed, output_hidden_states=True, use_cache=False)
    logits, hidden = decoder(ids, position_ids=packed, return_hidden=True)
    torch.testing.assert_close(output.logits, logits, **near)
    expected = (decoder.model.embed_tokens(ids), *hidden[:-1], decoder.model.norm(hidden[-1]))
    torch.testing.assert_close(output.hidden_states, expected, **near)

    gradients = []
    loss = iiet.next_token_loss(decoder(ids), ids)
    for trained, computed in (
        (decoder, lambda: loss),
        (model, lambda: model(ids, labels=ids).loss),
        (model, lambda: model(ids, labels=ids).loss),
    ):
        assert computed().item() == pytest.approx(loss.item(), rel=1e-6)
        trained.zero_grad()
        computed().backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters()})
        model.activation_checkpointing_enable()
        model.train()
    core_gradients, *model_gradients = gradients
    scale = max(g.abs().max().item() for g in core_gradients.values() if g is not None)
    for gradient_of in model_gradients:
        assert gradient_of.keys() == core_gradients.keys()
        for name, gradient in gradient_of.items():
            core_gradient = core_gradients[name]
            if core_gradient is None or gradient is None:
                # What is read by constants alone has no gradient, or zeros where a row that is
                # summed with it has one.
                assert all(g is None or not g.any() for g in (core_gradient, gradient))
            else:  # transformers computes the loss in float32.
                torch.testing.assert_close(core_gradient, gradient, rtol=1e-5, atol=1e-6 * scale)

    model.eval()
    cached = generated(model, ids, mask, use_cache=True)
    with torch.no_grad():
        assert torch.equal(cached, decoder.generate(ids, attention_mask=mask, max_new_tokens=6))
    if cheaper(decoder):
        draft = model.with_schedule(0)
        draft.generation_config.assistant_confidence_threshold = 0.0  # Else it imports sklearn.
        pairs = zip(draft.parameters(), model.parameters(), strict=True)
        assert all(drafted is parameter for drafted, parameter in pairs)
        assert draft.config is draft.model.config is not model.config
        plain = model.generate(ids[:1])
        assert torch.equal(model.generate(ids[:1], assistant_model=draft), plain)
        torch.testing.assert_close(
            draft(ids).logits, decoder(ids, schedule=cheaper(decoder)), **near
        )


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.3},
        {"damping": 0.3, "learn_damping": "scalar"},
        {"learn_damping": "vector"},
        {"reinject_prediction": True},
        {"start": "identity"},
    ],
    ids=str,
)
@torch.no_grad()
def test_each_option_of_the_method_is_computed_as_by_the_core(options):
    """The law above draws options too, but which ones a few examples reach is chance."""
    # An eps that counts, and is not the default of any norm.
    sizes = {"rms_norm_eps": 0.01, "layer_norm_eps": 0.02}
    decoder = make_model(method_options=options, **sizes)
    ids = tokens(2, 7)
    logits = transformers_model(decoder)(ids).logits
    torch.testing.assert_close(logits, decoder(ids), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, make_model(**sizes)(ids)), "the option changes nothing"


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(m, [torch.bfloat16, torch.float16][number % 2]) for number, m in enumerate(METHODS)],
)
def test_half_precision_keeps_what_the_core_keeps(method, dtype, tmp_path):
    decoder = make_model(method, dtype=torch.float32)
    ids = tokens(1, 4)
    decoder.save_pretrained(tmp_path)
    moved = transformers_model(decoder).to(dtype)
    loaded = type(moved).from_pretrained(tmp_path, dtype=dtype)
    half = decoder.to(dtype)
    kinds = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    with torch.no_grad():
        expected = half(ids).float()
        for model in (loaded, moved):
            assert kinds == {name: model.state_dict()[name].dtype for name in kinds}
            error = (model(ids).logits.float() - expected).norm()
            assert error <= 0.05 * expected.norm()  # Each is as far from float32.


@pytest.mark.parametrize("kind", ["of config", "empty", "static"])
@torch.no_grad()
def test_any_cache_and_any_split_equals_the_full_forward(kind):
    decoder = make_model()
    ids = tokens(2, 11)
    model = transformers_model(decoder)
    cache = {
        "of config": lambda: DynamicCache(config=model.config),
        "empty": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[kind]()
    parts = ids.split([4, 1, 3, 1, 2], dim=1)
    logits = torch.cat([model(part, cache=cache).logits for part in parts], 1)
    torch.testing.assert_close(logits, decoder(ids), rtol=1e-11, atol=1e-11)
    assert len(cache.layers) == 3 + 2 + 0 + 3  # Three predictions, and the corrections.


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_hidden_states_are_those_of_layers_and_attentions_those_of_evaluations(method):
    decoder = make_model(method, dtype=torch.float32)
    ids = tokens(2, 7)
    model = transformers_model(decoder)
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.logits, expected)
    assert len(output.hidden_states) == 1 + decoder.config.num_layers
    evaluations = sum(decoder.config.evaluations_per_layer())
    assert len(output.attentions) == model.config.num_hidden_layers == evaluations
    assert len(output.cache.layers) == len(model.config.layer_types) == evaluations
    assert model(ids, use_cache=False).cache is None
    model.config.use_cache = False
    assert model(ids).cache is None


@torch.no_grad()
def test_attentions_are_in_the_order_of_slots():
    decoder = make_model(schedule=(1, 0, 2), dtype=torch.float32)
    ids = tokens(1, 7)
    model = transformers_model(decoder)
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True)
    last_queries_see = [weights[0, :, -1] for weights in output.attentions]
    without = model.with_schedule((1, 0, 0))(ids, output_attentions=True).attentions
    assert len(without) == 4
    for slot in range(4):
        torch.testing.assert_close(without[slot][0, :, -1], last_queries_see[slot])
    assert not torch.allclose(last_queries_see[4], last_queries_see[3])


MODES = {
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 9},
    "beam": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 2},
    "eager": {},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generation_equals_uncached(mode):
    model = transformers_model(make_model())
    if mode == "eager":
        model.set_attn_implementation("eager")
    ids = tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    same = {k: v for k, v in MODES[mode].items() if mode not in ("chunks", "static")}
    plain = generated(model, ids, mask, use_cache=False, **same)
    assert torch.equal(generated(model, ids, mask, **MODES[mode]), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_and_its_copies_answer_alike(tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, vocab_size=VOCAB, num_key_value_heads=2, intermediate_size=24, use_cache=False,
        max_position_embeddings=64, initializer_range=0.2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0}, tie_word_embeddings=tied,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).double().eval()
    decoder = decoder_from_published(config.to_dict(), llama.state_dict())
    assert decoder.config.rope_theta == 777.0
    assert decoder.config.context_length == 64
    assert decoder.config.tie_embeddings == tied
    weights = llama.state_dict()
    assert weights.keys() - decoder.state_dict() <= {"lm_head.weight"}, "only a tied head"
    assert all(torch.equal(weights[name], value) for name, value in decoder.state_dict().items())
    copied = transformers_model(decoder)
    embeddings = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).double()
    for arguments in (
        {"position_ids": torch.arange(5, 14)[None]},
        {"input_ids": None, "inputs_embeds": embeddings},
        {"logits_to_keep": 2},
        {"logits_to_keep": torch.tensor([1, 5])},
        {"labels": tokens(2, 9), "num_items_in_batch": 100},
        {"output_hidden_states": True},
    ):
        output, expected = (m(**{"input_ids": tokens(2, 9), **arguments}) for m in (copied, llama))
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
        if expected.loss is not None:
            assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_folders_vocabularies_and_schedules_can_be_changed(tied, tmp_path):
    decoder = make_model(tie_embeddings=tied, dtype=torch.float32)
    ids = tokens(2, 9) % 10
    decoder.save_pretrained(tmp_path / "first")
    exported = transformers_model(decoder)
    model = type(exported).from_pretrained(tmp_path / "first", corrections=[1, 0, 0])
    assert (exported.config.num_hidden_layers, model.config.num_hidden_layers) == (8, 4)
    assert torch.equal(model(ids).logits, model.with_schedule((1, 0, 0))(ids).logits)
    torch.testing.assert_close(
        model(ids).logits, decoder(ids, schedule=IterationSchedule((1, 0, 0)))
    )
    for wrong in ((1, 0), (1, 0, -1), "1,0,0", 0.5):
        with pytest.raises(ValueError, match="corrections must be"):
            model.with_schedule(wrong)
    logits_before = model(ids).logits
    model.resize_token_embeddings(20, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits, logits_before[..., :20])
    model.save_pretrained(tmp_path / "second")
    # The decoder reads what transformers wrote.
    reloaded = Decoder.from_pretrained(tmp_path / "second")
    assert (reloaded.config.vocab_size, str(reloaded.schedule)) == (20, "1,0,0")
    torch.testing.assert_close(reloaded(ids), model(ids).logits)


@pytest.mark.parametrize("method", ["iiet", "pcformer", "looped"])
def test_a_config_takes_another_schedule_by_assignment(method):
    decoder = make_model(method, (2, 1, 2), dtype=torch.float32)
    model = transformers_model(decoder)
    ids = tokens(2, 9)
    for corrections in (1, [0, 0, 0]):
        model.config.corrections = corrections
        assert model.config.num_hidden_layers == sum(decoder.evaluations_per_layer(corrections))
        torch.testing.assert_close(model(ids).logits, decoder(ids, schedule=corrections))
    for wrong in (-1, [1, 1]):
        with refused(ValueError, "corrections", wrong):
            model.config.corrections = wrong
    with pytest.raises(StrictDataclassFieldValidationError, match="corrections"):
        model.config.corrections = "1,0,0"
    assert model.config.corrections == [0, 0, 0]


@pytest.fixture
def tokenizer_file(tmp_path):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


IN_A_CLEAN_PROCESS = """
import json, sys

folder, copy = sys.argv[1:]
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

expected = load_file(folder + "/expected.safetensors")
ids = expected["ids"]
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(ids).logits
    model.save_pretrained(copy)
    reloaded = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    options = dict(max_new_tokens=9, do_sample=False, min_new_tokens=9)
    cached = model.generate(ids[:1], **options)
    drafted = model.generate(ids[:1], assistant_model=model.with_schedule(0), **options)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(json.dumps({
    "module": type(model).__module__.split(".")[0],
    "difference": (logits - expected["logits"]).abs().max().item(),
    "difference_of_copy": (reloaded(ids).logits - logits).abs().max().item(),
    "draft_changes_nothing": torch.equal(cached, drafted),
    "words": tokenizer("the cat").input_ids,
    "end": [tokenizer.eos_token, model.generation_config.eos_token_id],
}))
"""


@pytest.mark.slow
def test_an_exported_folder_works_without_this_package(tokenizer_file, tmp_path):
    decoder = make_model(schedule=(2, 0, 1), vocab_size=len(WORDS), dtype=torch.float32)
    folder = export(decoder, tmp_path / "a model-1.0", tokenizer_file)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_iiet.py", "tokenizer.json"} <= names
    ids = torch.tensor([[1, 2, 3, 4], [5, 7, 3, 4]])
    with torch.no_grad():
        save_file({"ids": ids, "logits": decoder(ids)}, folder / "expected.safetensors")
    results = json_printed_by(IN_A_CLEAN_PROCESS, folder, tmp_path)
    assert results == {
        "module": "transformers_modules",
        "difference": pytest.approx(0.0, abs=1e-5),
        "difference_of_copy": 0.0,
        "draft_changes_nothing": True,
        "words": [1, 2],
        "end": [END, 0],
    }


def test_an_export_needs_a_known_end_of_text_and_code_for_its_method(
    tokenizer_file, tmp_path, monkeypatch
):
    decoder = make_model(vocab_size=len(WORDS))
    with pytest.raises(ValueError, match="no token '</s>'"):
        export(decoder, tmp_path / "new", tokenizer_file, end_of_text="</s>")

    class Local(METHODS["iiet"]):
        pass

    monkeypatch.setitem(METHODS.own_classes, "local", Local)
    with refused(ValueError, "'local'", "modeling_file"):
        export(make_model("local"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tokenizer = fast_tokenizer(tokenizer_file, end_of_text=END, context_length=48)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    folder = export(decoder, tmp_path / "plain")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "modeling_iiet.py",
    }
    assert json.loads((folder / "config.json").read_text())["corrections"] == [2, 0, 3]
