"""The options of attention that other models than a plain Llama have.

Tiny models of transformers' own classes, with random weights, say what is right: their weights are
copied by name, and logits, cached decoding and greedy tokens must be theirs. What transformers does
not have (iterative methods, drafts, steps of fixed shapes, costs) is held against the full forward.
"""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from live_tensors import LiveTensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iiet.cost import inference_cost, num_parameters, training_flops_per_token
from iiet.decoder import Decoder
from iiet.decoding.static_steps import StaticSteps
from iiet.exporting import transformers_model
from iiet.model.config import ModelConfig
from iiet.model.fast import plain_formulas
from iiet.model.losses import next_token_loss

SIZES = {
    "vocab_size": 61, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48,
    "context_length": 64, "tie_embeddings": False,
}  # fmt: skip
THEIR_SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARNS = {
    "yarn": YARN,
    "yarn with its own factor": {**YARN, "attention_factor": 1.3, "truncate": False},
    "yarn with mscale": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn of a long context": {**YARN, "original_max_position_embeddings": 1024},
    "yarn with other bounds": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
}
THETA = 500.0
# Name -> transformers' class without its ending, its own values, and those of a ModelConfig.
CASES = {
    **{
        name: (
            "Llama",
            {"rope_parameters": {"rope_theta": THETA, **scaling}},
            {"rope_theta": THETA, "rope_scaling": scaling},
        )
        for name, scaling in {"linear": LINEAR, "llama3": LLAMA3, **YARNS}.items()
    },
    "llama with wide heads": ("Llama", {"head_dim": 16}, {"head_dim": 16}),
    "tied llama with wide heads and biases": (
        "Llama",
        {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True},
        {"qkv_bias": True, "attention_out_bias": True, "head_dim": 16, "tie_embeddings": True},
    ),
    "mistral without a window": ("Mistral", {"sliding_window": None}, {}),
    "mistral": (
        "Mistral",
        {"sliding_window": 8, "head_dim": 4},
        {"sliding_windows": (8, 8, 8), "head_dim": 4},
    ),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"qkv_bias": True, "sliding_windows": (None, 8, 8)},
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 16, "num_key_value_heads": 1},
        {"head_norms": True, "head_dim": 16, "num_kv_heads": 1},
    ),
    "smollm3": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "rope_parameters": {"rope_theta": THETA, **YARN}},
        {"rotary_layers": (True, False, True), "rope_theta": THETA, "rope_scaling": YARN},
    ),
}
EVERY_OPTION = {
    "head_dim": 16, "qkv_bias": True, "attention_out_bias": True, "head_norms": True,
    "rope_scaling": YARN, "rotary_layers": (True, False, True), "sliding_windows": (8, None, 5),
}  # fmt: skip
LENGTH = 24


def draw_weights(model):
    """Draw weights so large that each option moves the logits by much more than the tolerance."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def both_models(name, seed=0):
    family, their_values, values = CASES[name]
    torch.manual_seed(seed)
    reference = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**THEIR_SIZES, **their_values})
    )
    draw_weights(reference)
    decoder = Decoder(ModelConfig(**{"method": "vanilla", **SIZES, **values}))
    weights = reference.state_dict()
    if decoder.config.tie_embeddings:
        del weights["lm_head.weight"]
    decoder.load_state_dict(weights)
    return reference, decoder.eval()


def padded_text():
    ids = torch.randint(3, 61, (3, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    mask[1, :3] = 0
    return ids, mask


def one_by_one(decoder, ids, mask, *, num_prompt):
    """Return logits by a cache: the prompt at once, then single tokens; the others together."""
    cache = decoder.new_cache(batch_size=len(ids), max_tokens=ids.size(1))
    ends = [*range(num_prompt, num_prompt + 5), ids.size(1)]
    logits = []
    start = 0
    for end in ends:
        mask_so_far = None if mask is None else mask[:, :end]
        logits.append(decoder(ids[:, start:end], cache=cache, attention_mask=mask_so_far))
        start = end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_transformers(name):
    reference, decoder = both_models(name)
    ids, mask = padded_text()
    for attention_mask, num_prompt in ((None, 6), (mask, 13)):
        expected = reference(ids, attention_mask=attention_mask).logits
        is_text = torch.ones_like(ids) if attention_mask is None else mask
        for logits in (
            decoder(ids, attention_mask=attention_mask),
            one_by_one(decoder, ids, attention_mask, num_prompt=num_prompt),
        ):
            difference = ((logits - expected) * is_text[..., None]).abs().max()
            assert difference < 1e-5
    prompt = ids[:, :14]
    prompt_mask = mask[:, :14]
    tokens = decoder.generate(prompt, prompt_mask, max_new_tokens=8)
    whole_mask = F.pad(prompt_mask, (0, 8), value=1)
    choices = reference(tokens, attention_mask=whole_mask).logits.argmax(-1)
    assert torch.equal(tokens[:, 14:], choices[:, 13:-1])
    fixed = StaticSteps(decoder)
    assert torch.equal(decoder.generate(prompt, prompt_mask, max_new_tokens=8, steps=fixed), tokens)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_random_weights_give_the_logits_of_transformers(name):
    seed = random.randrange(2**31)
    reference, decoder = both_models(name, seed)
    ids, mask = padded_text()
    expected = reference(ids, attention_mask=mask).logits
    for logits in (
        decoder(ids, attention_mask=mask),
        one_by_one(decoder, ids, mask, num_prompt=13),
    ):
        assert ((logits - expected) * mask[..., None]).abs().max() < 1e-5, seed


@torch.no_grad()
def test_angles_are_computed_for_the_positions_of_a_pass_alone():
    """Those of a million positions would take 32 MB."""
    config = ModelConfig(method="vanilla", **{**SIZES, "context_length": 2**20})
    decoder = Decoder(config)
    ids, _ = padded_text()
    with LiveTensors(decoder) as live:
        decoder(ids)
    assert live.peak < 200_000
    last = torch.tensor([[2**20 - 2, 2**20 - 1]])
    cos, sin = decoder.rope.at(last, ids.device, torch.float64)
    angles = last[0, :, None] * config.rope_theta ** -(torch.arange(0, 8, 2).double() / 8)
    expected = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    torch.testing.assert_close((cos[0, :, 0], sin[0, :, 0]), expected, rtol=0, atol=1e-8)


def every_option(method="iiet", **changes):
    torch.manual_seed(1)
    schedule = {"iiet": (2, 0, 1), "looped": (1, 1, 1), "vanilla": None}[method]
    config = ModelConfig(method=method, schedule=schedule, **{**SIZES, **EVERY_OPTION, **changes})
    return draw_weights(Decoder(config))


@pytest.mark.parametrize("method", ["vanilla", "iiet", "looped"])
@torch.no_grad()
def test_iterative_methods_have_every_option_and_so_has_their_export(method):
    decoder = every_option(method)
    ids, mask = padded_text()
    expected = decoder(ids, attention_mask=mask)
    cached = one_by_one(decoder, ids, mask, num_prompt=13)
    assert ((cached - expected) * mask[..., None]).abs().max() < 1e-5
    exported = transformers_model(decoder).eval()
    logits = exported(ids, attention_mask=mask).logits
    assert ((logits - expected) * mask[..., None]).abs().max() < 1e-5
    tokens = exported.generate(
        ids[:, :14], attention_mask=mask[:, :14], max_new_tokens=6, do_sample=False
    )
    assert torch.equal(tokens, decoder.generate(ids[:, :14], mask[:, :14], max_new_tokens=6))


def test_a_draft_changes_no_token():
    decoder = every_option()
    ids, _ = padded_text()
    plain = decoder.generate(ids[:1, :20], max_new_tokens=12)
    drafted = decoder.generate(ids[:1, :20], max_new_tokens=12, draft=0)
    assert torch.equal(drafted, plain)


def test_recomputed_layers_have_the_same_gradients():
    decoder = every_option().train()
    ids, _ = padded_text()
    gradients = []
    for recompute in (False, True):
        decoder.zero_grad()
        decoder.activation_checkpointing = recompute
        next_token_loss(decoder(ids), ids).backward()
        gradients.append([p.grad for p in decoder.parameters()])
    assert sum(gradient is not None for gradient in gradients[0]) > 50
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_window_holds_within_each_sequence_of_a_packed_row_and_under_a_mask_of_pairs():
    decoder = every_option("vanilla")
    ids = torch.randint(3, 61, (1, 40))
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    apart = torch.cat([decoder(ids[:, :25]), decoder(ids[:, 25:])], 1)
    torch.testing.assert_close(decoder(ids, position_ids=positions), apart, rtol=0, atol=1e-5)
    is_first = torch.arange(40) < 25
    in_same_sequence = is_first[:, None] == is_first[None]
    visible = in_same_sequence & torch.ones(40, 40).tril().bool()
    logits = decoder(ids, position_ids=positions, attention_mask=visible[None])
    torch.testing.assert_close(logits, apart, rtol=0, atol=1e-5)


def test_the_fast_decoding_step_serves_a_scaled_llama_and_steps_aside_for_other_attention():
    plain = Decoder(ModelConfig(method="vanilla", **SIZES))
    scaled = {"rope_scaling": YARN, "head_dim": 16, "sliding_windows": (64, None, 99)}
    for config in (plain.config, dataclasses.replace(plain.config, **scaled)):
        assert all(layer.step_weights() is not None for layer in Decoder(config).model.layers)
    for name in ("qkv_bias", "attention_out_bias", "head_norms", "rotary_layers"):
        decoder = Decoder(dataclasses.replace(plain.config, **{name: EVERY_OPTION[name]}))
        assert not all(layer.step_weights() is not None for layer in decoder.model.layers), name
    windows = Decoder(dataclasses.replace(plain.config, sliding_windows=(8, None, 8)))
    is_served = [layer.step_weights() is not None for layer in windows.model.layers]
    assert is_served == [False, True, False]


def test_costs_of_heads_and_windows():
    config = every_option("vanilla", qkv_bias=False, attention_out_bias=False).config
    decoder = Decoder(config)
    time = 12
    q_dim = 64
    kv_dim = 32
    cost = inference_cost(config, context_length=time)
    assert num_parameters(config) == sum(p.numel() for p in decoder.parameters())
    cache = decoder.new_cache(batch_size=1, max_tokens=time)
    counter = FlopCounterMode(display=False)
    ids = torch.zeros(1, time, dtype=torch.long)
    with torch.no_grad(), plain_formulas(), sdpa_kernel(SDPBackend.MATH):
        decoder(ids[:, :-1], cache=cache)
        with counter:
            decoder(ids[:, -1:], cache=cache)
    assert counter.get_total_flops() == cost.decode_flops_per_token
    tokens_read_by_layer = [
        [min(token, window) for token in range(1, time + 1)] for window in (8, time, 5)
    ]
    matrices = 2 * (2 * 32 * (q_dim + kv_dim) + 3 * 32 * 48)
    layers = sum(matrices + 4 * q_dim * sum(tokens) / time for tokens in tokens_read_by_layer)
    head = 2 * 32 * 61
    expected = layers + head
    assert cost.forward_flops_per_token == pytest.approx(expected, rel=1e-12)
    assert training_flops_per_token(config, context_length=time) == pytest.approx(3 * expected)
    assert cost.kv_bytes_read_per_token == 4 * 2 * kv_dim * (8 + time + 5)
    # Two tokens of one pass read the window of the first, and one token more.
    cache = decoder.new_cache(batch_size=1, max_tokens=time)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), plain_formulas(), sdpa_kernel(SDPBackend.MATH):
        decoder(ids[:, :-2], cache=cache)
        with counter:
            decoder(ids[:, -2:], cache=cache)
    of_each_token = 3 * matrices + head + 4 * q_dim * ((8 + 1) + time + (5 + 1))
    assert counter.get_total_flops() == 2 * of_each_token
    assert cost.kv_bytes_per_token == 4 * 2 * kv_dim * 3
