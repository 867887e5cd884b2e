"""Tiny looped models of other projects, as folders of transformers: three whose code stands here,
like Ouro, nanbeige and Huginn, and random ones of transformers' own kinds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CODE = """
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinyLoopConfig(PreTrainedConfig):
    model_type = "KIND"


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x, slot, cache, mask):
        rows, time, width = x.shape
        q, k, v = (
            part.view(rows, time, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        if cache is not None:
            k, v = cache.update(k, v, slot)
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(read.transpose(1, 2).reshape(rows, time, width))
        return x + self.mlp(x)


class TinyLoopModel(PreTrainedModel, GenerationMixin):
    config_class = TinyLoopConfig

    def __init__(self, config):
        super().__init__(config)
        self.build(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.3)

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None, **_):
        x = self.embed(input_ids)
        if use_cache and (cache is None or not cache.get_seq_length()):
            cache = DynamicCache()  # `generate` makes one that has a slot per layer.
        past = cache.get_seq_length() if cache is not None else 0
        time = x.shape[1]
        mask = torch.ones(time, past + time, dtype=torch.bool).tril(past)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]
            mask = mask | torch.eye(time, past + time, dtype=torch.bool).roll(past, 1)
        x = self.loop(x, cache, mask)
        return CausalLMOutputWithPast(logits=self.head(x), cache=cache)
"""
OURO = """

class Stack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class TinyOuro(TinyLoopModel):
    def build(self, config):
        self.model = Stack(config)
        self.steps = config.total_ut_steps

    def loop(self, x, cache, mask):
        count = len(self.model.layers)
        for step in range(self.steps):
            for number, layer in enumerate(self.model.layers):
                x = layer(x, step * count + number, cache, mask)
        return x
"""
HUGINN = """

class TinyHuginn(TinyLoopModel):
    def build(self, config):
        parts = ("prelude", "core_block", "coda")
        self.transformer = nn.ModuleDict(
            {part: nn.ModuleList(Layer(config) for _ in range(count))
             for part, count in zip(parts, config.part_sizes)}
        )
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def initialize_state(self, x, scale=1.0):
        return torch.zeros_like(x) if self.config.state_init == "zero" else torch.randn_like(x)

    def loop(self, x, cache, mask):
        slots = iter(range(10_000))
        for layer in self.transformer.prelude:
            x = layer(x, next(slots), cache, mask)
        state = self.initialize_state(x)
        for _ in range(self.config.mean_recurrence):
            state = self.adapter(torch.cat([state, x], -1))
            for layer in self.transformer.core_block:
                state = layer(state, next(slots), cache, mask)
        for layer in self.transformer.coda:
            state = layer(state, next(slots), cache, mask)
        return state
"""
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300}
MODELS: dict[str, dict[str, Any]] = {
    "ouro": {"num_hidden_layers": 3, "total_ut_steps": 4, **SIZES},
    "nanbeige": {"num_hidden_layers": 3, "num_loops": 2, **SIZES},
    "huginn_raven": {
        "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1,
        "part_sizes": [1, 2, 1], "num_hidden_layers": 4, "mean_recurrence": 4, "state_init": "zero",
        **SIZES,
    },
    "hrm_text": {
        "num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 3, "intermediate_size": 48,
        "head_dim": 8, "initializer_range": 0.3, **SIZES,
    },
    "inkling2_loop_text": {
        "num_hidden_layers": 6, "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2,
        "loop_layer_index_end": 4, "loop_num_passes": 3, "head_dim": 8, "swa_head_dim": 16,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "unpadded_vocab_size": 300,
        "loop_gate_rank": 4, "d_rel": 4, "initializer_range": 0.3, "eos_token_id": 0, **SIZES,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
}  # fmt: skip
"""By `model_type`: the configuration of a tiny model."""
REMOTE = {
    "ouro": (OURO, "TinyOuro"),
    "nanbeige": (OURO.replace("total_ut_steps", "num_loops"), "TinyOuro"),
    "huginn_raven": (HUGINN, "TinyHuginn"),
}


def write_looped(folder: Path, kind: str, tokenizer: Path, **changes: Any) -> Path:
    """Write a random model of a kind with a trained tokenizer, and return its folder."""
    values = {"max_position_embeddings": 64, **MODELS[kind], **changes}
    torch.manual_seed(0)
    folder.mkdir()
    if kind in REMOTE:
        code, name = REMOTE[kind]
        (folder / "modeling_tiny.py").write_text((CODE + code).replace("KIND", kind))
        auto_map = {
            "AutoConfig": "modeling_tiny.TinyLoopConfig",
            "AutoModelForCausalLM": f"modeling_tiny.{name}",
        }
        config = {"model_type": kind, "auto_map": auto_map, "architectures": [name], **values}
        (folder / "config.json").write_text(json.dumps(config))
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)
        (folder / "kept.json").write_text(json.dumps(config))
        model.save_pretrained(folder)
        (folder / "kept.json").replace(folder / "config.json")
    else:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(
            folder
        )
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    special["pad_token"] = special["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder
