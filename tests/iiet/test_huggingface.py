"""The adapter changes nothing: same logits, same tokens with every cache, same scores.

Generation is compared with generation by the same model without a cache, which needs no slots.
"""

import copy
import dataclasses
import inspect
import math
import re

import pytest
import torch
from method_schedules import schedule_for
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.utils.generic import TransformersKwargs

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.huggingface import IIETConfig, IIETForCausalLM, fast_tokenizer
from iiet.losses import next_token_loss
from iiet.methods import METHODS
from iiet.published import decoder_from_published
from iiet.schedule import IterationSchedule

END = "<|endoftext|>"
WORDS = [
    END,
    *[
        "the",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "under",
        "a",
        "mat",
        "tree",
        "and",
        "then",
        "saw",
        "it",
    ],
]


def make_decoder(method="iiet", schedule=(2, 0, 3), tied=True, seed=0):
    config = ModelConfig(
        method=method,
        vocab_size=len(WORDS),
        dim=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=24,
        context_length=48,
        schedule=schedule_for(method, schedule),
        tie_embeddings=tied,
        rope_theta=500.0,
        initializer_std=0.4,
    )
    torch.manual_seed(seed)
    decoder = Decoder(config).eval()
    with torch.no_grad():  # Off its starting values, so that nothing passes by coincidence.
        for parameter in decoder.method_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def tokens(*shape, seed=1):
    return torch.randint(1, len(WORDS), shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokenizer_file(tmp_path):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_wrapping_copies_nothing_and_costs_no_memory():
    decoder = make_decoder()
    model = IIETForCausalLM.from_decoder(decoder)
    assert model.to_decoder() is decoder
    assert {id(p) for p in model.parameters()} == {id(p) for p in decoder.parameters()}
    assert not model.training
    assert IIETForCausalLM.from_decoder(decoder.train()).training


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_config_and_weights_survive_a_folder(method, tied, tmp_path):
    decoder = make_decoder(method, tied=tied)
    model = IIETForCausalLM.from_decoder(decoder, end_of_text_id=0)
    assert model.config.to_model_config() == decoder.config
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, IIETForCausalLM)
    assert again.to_decoder().config == decoder.config
    assert again.config.eos_token_id == 0
    ids = tokens(2, 9)
    torch.testing.assert_close(again(ids).logits, decoder(ids))


def test_another_schedule_on_loading_is_the_same_weights(tmp_path):
    decoder = make_decoder()
    IIETForCausalLM.from_decoder(decoder).save_pretrained(tmp_path)
    cheaper = IIETForCausalLM.from_pretrained(tmp_path, corrections=[1, 0, 0])
    ids = tokens(2, 9)
    expected = decoder(ids, schedule=IterationSchedule((1, 0, 0)))
    assert torch.equal(cheaper(ids).logits, expected)
    with pytest.raises(ValueError, match="is for 1 layers, the model has 3"):
        IIETForCausalLM.from_pretrained(tmp_path, corrections=[1])
    with pytest.raises(ValueError, match="-1"):
        IIETForCausalLM.from_pretrained(tmp_path, corrections=[1, 0, -1])


def test_a_model_made_from_a_config_starts_like_a_decoder():
    config = IIETConfig.from_model_config(make_decoder().config)
    model = AutoModelForCausalLM.from_config(config)
    fresh = Decoder(config.to_model_config())
    mine, theirs = model.decoder.method_parameters(), fresh.method_parameters()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    weights = model.decoder.embedding.weight
    assert weights.std().item() == pytest.approx(config.initializer_range, rel=0.2)
    assert AutoConfig.for_model("iiet", vocab_size=7).vocab_size == 7


@pytest.mark.parametrize("method", METHODS)
def test_weights_missing_from_a_folder_get_their_starting_values(method, tmp_path):
    decoder = make_decoder(method)
    IIETForCausalLM.from_decoder(decoder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    own = {f"decoder.{name}" for name in decoder.method_parameters()}
    kept = {name: value for name, value in weights.items() if name not in own}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = IIETForCausalLM.from_pretrained(tmp_path)
    mine = model.decoder.method_parameters()
    fresh, other = (Decoder(decoder.config).method_parameters() for _ in range(2))
    for name, value in fresh.items():
        if torch.equal(value, other[name]):
            assert torch.equal(mine[name], value)
        else:  # Random at the start.
            assert 0 < mine[name].std() < 2 * decoder.config.initializer_std
    assert torch.equal(model.decoder.embedding.weight, decoder.embedding.weight)


def test_loss_logits_and_hidden_states_are_the_decoders():
    decoder, ids = make_decoder(), tokens(2, 9)
    model = IIETForCausalLM.from_decoder(decoder)
    output = model(ids, labels=ids, output_hidden_states=True)
    logits, hidden = decoder(ids, return_hidden=True)
    assert torch.equal(output.logits, logits)
    assert output.loss.item() == pytest.approx(next_token_loss(logits, ids).item(), rel=1e-6)
    *before, last = output.hidden_states
    assert torch.equal(torch.stack(before), torch.stack([decoder.embedding(ids), *hidden[:-1]]))
    assert torch.equal(last, decoder.norm(hidden[-1]))
    assert output.cache is None
    for keep in (1, 3):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, logits[:, -keep:])
    assert isinstance(model(ids, return_dict=False), tuple)


@pytest.fixture(scope="module")
def llama_and_its_copy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=48,
        initializer_range=0.4,
        use_cache=False,  # Without a cache it takes positions that begin again for packed texts.
    )
    llama = LlamaForCausalLM(config).double().eval()
    decoder = decoder_from_published(config.to_dict(), llama.state_dict()).double()
    return llama, IIETForCausalLM.from_decoder(decoder)


EMBEDDINGS = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).double()
LEFT_PADDED = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])

ARGUMENTS = {
    "positions": {"position_ids": torch.arange(5, 14)[None]},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])},
    "packed by rows": {"position_ids": torch.tensor([[*range(9)], [*range(4), *range(5)]])},
    "padded": {
        "attention_mask": LEFT_PADDED,
        "position_ids": (LEFT_PADDED.cumsum(1) - 1).clamp_min(0),
    },
    "embeddings": {"input_ids": None, "inputs_embeds": EMBEDDINGS},
    "last tokens": {"logits_to_keep": 2},
    "some tokens": {"logits_to_keep": torch.tensor([1, 5])},
    "one type of token": {"token_type_ids": torch.zeros(2, 9, dtype=torch.long)},
    "loss": {"labels": tokens(2, 9), "num_items_in_batch": 100},
    "hidden states": {"output_hidden_states": True},
    "older name of the cache": {"past_key_values": None},
    "tuple": {"return_dict": False},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_forward_takes_what_a_llama_takes_and_answers_the_same(llama_and_its_copy, arguments):
    expected, found = (m(**{"input_ids": tokens(2, 9), **arguments}) for m in llama_and_its_copy)
    if not arguments.get("return_dict", True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return
    mask = arguments.get("attention_mask", torch.ones(expected.logits.shape[:2])).bool()
    torch.testing.assert_close(found.logits[mask], expected.logits[mask], rtol=0, atol=1e-5)
    if expected.loss is not None:
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    if expected.hidden_states is not None:
        assert len(found.hidden_states) == 3
        torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)


def test_forward_takes_none_for_every_argument_of_a_llama():
    model = IIETForCausalLM.from_decoder(make_decoder())
    names = list(inspect.signature(LlamaForCausalLM.forward).parameters)
    older = ["past_key_values", "cache_position", "output_attentions", "return_dict"]
    nothing = dict.fromkeys([*names[1:-1], *TransformersKwargs.__annotations__, *older])
    assert {"position_ids", "inputs_embeds", "output_attentions"} <= set(nothing)
    output = model(**{**nothing, "input_ids": tokens(2, 9)})
    assert torch.equal(output.logits, model(tokens(2, 9)).logits)
    model(tokens(2, 9), output_attentions=False, cache_position=torch.arange(9), is_causal=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True cannot be served"),
        ({"is_causal": False}, "is_causal=False cannot be served"),
        ({"cache_position": torch.arange(1, 10)}, "must count on from the 0 tokens"),
        ({"position_ids": torch.arange(40, 49)[None]}, r"between 0 and 47 .* got 40 to 48"),
        ({"position_ids": torch.arange(-1, 8)[None]}, "got -1 to 7"),
        ({"position_ids": torch.arange(8)[None]}, r"here \(2, 9\), got \(1, 8\)"),
        ({"token_type_ids": torch.tensor([[0, 1]])}, "token_type_ids of several types"),
        ({"attention_masks": torch.ones(2, 9)}, "the model takes no attention_masks"),
        ({"inputs_embeds": torch.zeros(2, 9, 16)}, "either input_ids or inputs_embeds"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "two names of one argument"),
        ({"past_key_values": ()}, "must be a Cache of transformers"),
    ],
)
def test_what_forward_cannot_do_is_refused(arguments, message):
    model = IIETForCausalLM.from_decoder(make_decoder())
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(2, 9), **arguments})


def test_the_config_asks_for_hidden_states_too():
    model = IIETForCausalLM.from_decoder(make_decoder())
    model.config.output_hidden_states = True
    assert len(model(tokens(1, 3)).hidden_states) == 4


@pytest.mark.parametrize(
    "name", ["eager", "paged|eager", "flash_attention_2", "flex_attention", "some/kernel", "other"]
)
def test_another_attention_than_sdpa_is_refused_however_it_is_asked_for(name, tmp_path):
    model = IIETForCausalLM.from_decoder(make_decoder())
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    for ask in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_config(config, attn_implementation=name),
        lambda: model.set_attn_implementation(name),
        lambda: model.set_attn_implementation({"": name}),
    ):
        with pytest.raises(ValueError, match=rf"'{re.escape(name)}' cannot be served: the decoder"):
            ask()
    assert model.config._attn_implementation == "sdpa"


def test_sdpa_is_served_and_attention_weights_are_refused_on_loading(tmp_path):
    model = IIETForCausalLM.from_decoder(make_decoder())
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    for name in ("sdpa", None):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert again.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="leave out output_attentions"):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)


@torch.no_grad()
def test_the_older_name_of_the_cache_works_in_forward_and_generation():
    model, ids = IIETForCausalLM.from_decoder(make_decoder().double()), tokens(2, 6)
    cache = model(ids[:, :4], past_key_values=DynamicCache(), use_cache=True).cache
    rest = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 4:])
    mask = torch.ones_like(ids)
    plain = generated(model, ids, mask)
    with pytest.warns(FutureWarning, match="Use `cache` instead"):
        assert torch.equal(generated(model, ids, mask, past_key_values=DynamicCache()), plain)


@torch.no_grad()
def test_generation_from_embeddings_and_with_positions():
    model, ids = IIETForCausalLM.from_decoder(make_decoder().double()), tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    plain = generated(model, ids, mask)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(generated(model, None, mask, inputs_embeds=embeddings), plain[:, 6:])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    assert torch.equal(generated(model, ids, mask, position_ids=positions), plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [20, 10])
def test_the_number_of_tokens_can_be_changed(tied, size, tmp_path):
    model = IIETForCausalLM.from_decoder(make_decoder(tied=tied))
    ids = tokens(2, 9) % 10
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.decoder.config.vocab_size == size
    logits = model(ids, labels=ids).logits
    assert logits.shape == (2, 9, size)
    kept = min(size, len(WORDS))
    torch.testing.assert_close(logits[..., :kept], before[..., :kept])
    assert (model.get_output_embeddings() is None) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, logits)
    assert generated(again, ids[:, :4], torch.ones(2, 4)).shape == (2, 16)
    wrapped_again = IIETForCausalLM.from_decoder(model.to_decoder())
    assert wrapped_again.config.vocab_size == size


@pytest.mark.parametrize("text", ["1,0,0", (1, 0, 0), "1,0*2"])
def test_a_schedule_may_be_written_as_text(text, tmp_path):
    IIETForCausalLM.from_decoder(make_decoder()).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", corrections=text)
    assert model.decoder.schedule == IterationSchedule((1, 0, 0))
    model.save_pretrained(tmp_path / "cheap")
    assert AutoConfig.from_pretrained(tmp_path / "cheap").corrections == [1, 0, 0]
    with pytest.raises(ValueError, match="is for 2 layers, the model has 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", corrections="1,0")


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 9},
    "beam": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


def generated(model, ids, mask, **options):
    torch.manual_seed(7)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_equals_uncached_with_left_padding(method, cache):
    model = IIETForCausalLM.from_decoder(make_decoder(method).double())
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, :7] = 0
    ids = ids * mask
    plain = generated(model, ids, mask, use_cache=False)
    assert torch.equal(generated(model, ids, mask, cache_implementation=cache), plain)
    alone = generated(model, ids[1:2, 3:], mask[1:2, 3:])
    assert torch.equal(alone[0, 5:], plain[1, 8:])
    assert len({tuple(row.tolist()) for row in plain[:, 8:]}) > 1


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generation_equals_uncached(mode):
    model = IIETForCausalLM.from_decoder(make_decoder().double())
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    plain = generated(model, ids, mask, use_cache=False, **MODES[mode])
    assert torch.equal(generated(model, ids, mask, **MODES[mode]), plain)
    assert torch.equal(generated(model, ids, mask, prefill_chunk_size=2, **MODES[mode]), plain)


@pytest.mark.parametrize("kind", ["of config", "empty", "static"])
def test_any_split_into_calls_equals_the_full_forward(kind):
    decoder, ids = make_decoder().double(), tokens(2, 11)
    model = IIETForCausalLM.from_decoder(decoder)
    cache = fresh_cache(kind, model)
    parts = [
        model(part, cache=cache, use_cache=True).logits
        for part in ids.split([4, 1, 3, 1, 2], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), decoder(ids), rtol=1e-11, atol=1e-11)
    assert len(cache.layers) == 3 + 2 + 0 + 3


def fresh_cache(kind, model):
    return {
        "of config": lambda: DynamicCache(config=model.config),
        "empty": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[kind]()


@pytest.mark.parametrize("kind", ["of config", "empty", "static"])
@pytest.mark.parametrize("other", [(1, 0, 0), (0, 5, 0), (2, 3, 0)])
@torch.no_grad()
def test_a_cache_of_another_schedule_is_refused_until_it_is_emptied(kind, other):
    decoder, ids = make_decoder(), tokens(2, 5)  # Its schedule is 2,0,3: some others cost the same.
    full = IIETForCausalLM.from_decoder(decoder)
    student = IIETForCausalLM.from_decoder(decoder.with_schedule(IterationSchedule(other)))
    cache = fresh_cache(kind, full)
    student(ids, cache=cache)
    for copied in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match=r"the cache is for .* this pass makes 3,1,4; decode"):
            full(ids[:, :1], cache=copied)
    cache.reset()
    first, second = (full(part, cache=cache).logits for part in ids.split([4, 1], 1))
    torch.testing.assert_close(torch.cat([first, second], 1), full(ids).logits)


@torch.no_grad()
def test_a_filled_cache_of_unknown_origin_is_refused_unless_there_is_one_slot_per_layer():
    held = tokens(1, 4)

    def nameless(model):
        filled = model(held, use_cache=True).cache
        return DynamicCache([(layer.keys, layer.values) for layer in filled.layers])

    iterative = IIETForCausalLM.from_decoder(make_decoder())
    with pytest.raises(ValueError, match=r"holds tokens in 8 slots .* begin with an empty cache"):
        iterative(tokens(1, 1), cache=nameless(iterative))
    vanilla = IIETForCausalLM.from_decoder(make_decoder("vanilla"))
    last = vanilla(tokens(1, 1), cache=nameless(vanilla)).logits
    whole = vanilla(torch.cat([held, tokens(1, 1)], 1)).logits
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("kind", ["of config", "static"])
@torch.no_grad()
def test_a_cache_remembers_its_padding(kind):
    model, ids = IIETForCausalLM.from_decoder(make_decoder().double()), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    expected = model(ids, attention_mask=mask).logits[:, -3:]
    cache = fresh_cache(kind, model)
    model(ids[:, :6], attention_mask=mask[:, :6], cache=cache)
    steps = [model(ids[:, time : time + 1], cache=cache).logits for time in range(6, 9)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    cache.crop(-2)  # Seven tokens are left.
    torch.testing.assert_close(model(ids[:, 7:], cache=cache).logits, expected[:, 1:])
    cache.crop(-2)
    with pytest.raises(ValueError, match="marks other cached tokens as padding"):
        model(ids[:, 7:], attention_mask=torch.ones_like(mask), cache=cache)


def test_activation_checkpointing_reaches_the_decoder_and_keeps_gradients():
    ids, gradients = tokens(2, 9), []
    for enabled in (False, True):
        model = IIETForCausalLM.from_decoder(make_decoder().train())
        if enabled:
            model.activation_checkpointing_enable()
        assert model.decoder.activation_checkpointing is enabled
        assert model.is_activation_checkpointing is enabled
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_loads_with_the_methods_own_weights_in_float32(method, tmp_path):
    decoder = make_decoder(method)
    own = [f"decoder.{name}" for name in decoder.method_parameters() if ".gate." not in name]
    assert bool(own) == (decoder.method.num_left > 0), "the mix alone is kept so"
    IIETForCausalLM.from_decoder(decoder).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for loaded in (model, again, IIETForCausalLM.from_decoder(make_decoder(method)).bfloat16()):
        kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
        assert {kinds.pop(name) for name in own} <= {torch.float32}
        assert set(kinds.values()) == {torch.bfloat16}
    ids = tokens(1, 4)
    torch.testing.assert_close(again(ids).logits, decoder.bfloat16()(ids))
    assert generated(model, ids, torch.ones(1, 4)).shape == (1, 16)


def test_tokenizer_has_its_end_token_and_refuses_an_unknown_one(tokenizer_file):
    tokenizer = fast_tokenizer(tokenizer_file, end_of_text=END, context_length=48)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("the cat").input_ids == [1, 2]
    assert len(tokenizer) == len(WORDS)
    with pytest.raises(ValueError, match="no token '</s>'"):
        fast_tokenizer(tokenizer_file, end_of_text="</s>", context_length=48)


def test_lm_eval_scores_a_model_object_as_by_hand(tokenizer_file):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    decoder = make_decoder()
    tokenizer = fast_tokenizer(tokenizer_file, end_of_text=END, context_length=48)
    model = IIETForCausalLM.from_decoder(decoder, end_of_text_id=0)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, logits_cache=False)
    assert lm.max_length == 48
    pairs = [("the cat", " sat on the mat"), ("a", " dog ran"), ("it saw a dog and", " then")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    scored = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, scored, strict=True):
        start = len(tokenizer(context).input_ids)
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        log_p = decoder(ids).log_softmax(-1)[0, start - 1 : -1]
        chosen = log_p.gather(1, ids[0, start:, None])
        assert score == pytest.approx(chosen.sum().item(), rel=1e-5)
        assert greedy == torch.equal(log_p.argmax(-1), ids[0, start:])
    request = Instance(
        request_type="loglikelihood_rolling", doc={}, arguments=("the cat sat",), idx=0
    )
    (rolling,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    ids = torch.tensor([[0, *tokenizer("the cat sat").input_ids]])
    assert rolling == pytest.approx(-3 * next_token_loss(decoder(ids), ids).item(), rel=1e-5)
    assert math.isfinite(rolling)


def test_the_config_checks_its_types():
    with pytest.raises(Exception, match="vocab_size"):
        IIETConfig(vocab_size="many")
    with pytest.raises(ValueError, match="method must be one of"):
        IIETConfig(method="magic", corrections=[0] * 12).to_model_config()
    config = IIETConfig.from_model_config(make_decoder("vanilla").config)
    assert config.corrections is None
    assert dataclasses.is_dataclass(config)
