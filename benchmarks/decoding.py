"""Cached greedy decoding against `transformers`' Llama on the same weights: random ones of several
widths, or those of a GGUF file, which both programs read.

transformers runs as well as its users can run it: `generate`, fused attention, the default cache,
no gradients, no stop token. Each run gives two times: the whole run divided by the new tokens, and
the time per token after the prefill. The end of the prefill is taken from a logits processor in
transformers (one call per token), and from the first token of our stream.

The bound: a step cannot be faster than reading each weight once. The time for this is measured in
the same turns, by plain matrix-vector products over as many distinct matrices of the same shapes as
the model has, so that processor caches help both alike. The share of the bound is the bound's time
over ours. It has a goal only where reading is the limit, for one row of a wide model: with eight
rows, arithmetic takes time as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
)

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, take_turns
from iiet import Decoder, ModelConfig, generate, published_from_decoder, stream
from orchestrator.training.gguf_file import GgufFile

__all__ = ["measure"]

_TOLERANCE = 1e-3
_GOAL_RATIO = {(256, 1): Goal("at least", 1.5), (256, 8): Goal("at least", 1.4)}
_GOAL_SHARE = {(512, 1): Goal("at least", 0.75)}


@dataclass(frozen=True, kw_only=True)
class _Size:
    dims: tuple[int, ...] = (256, 512)
    num_layers: int = 12
    vocab_size: int = 8192
    prompt_tokens: int = 128
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (1, 8)
    repetitions: int = 5


_FULL = _Size()
_QUICK = _Size(
    dims=(64,),
    num_layers=2,
    vocab_size=256,
    prompt_tokens=8,
    new_tokens=6,
    batch_sizes=(1, 2),
    repetitions=2,
)


@dataclass(frozen=True)
class _Seconds:
    """Seconds per new token of one generation."""

    whole: float
    after_prefill: float


def measure(*, quick: bool, say: Callable[[str], None], gguf: Path | None = None) -> Report:
    """Measure milliseconds per token of both programs, and the bound.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress. `gguf`: a file with
    the only model to measure, at its own size.
    """
    size = _QUICK if quick else _FULL
    rows: list[Row] = []
    checks: list[str] = []
    drawn = [partial(_models, size, dim) for dim in size.dims]
    for models in drawn if gguf is None else [partial(_read_models, gguf)]:
        decoder, llama = models()
        config = decoder.config
        for batch_size in size.batch_sizes:
            say(f"decoding: d {config.dim}, batch {batch_size}")
            generator = torch.Generator().manual_seed(0)
            shape = (batch_size, size.prompt_tokens)
            prompt = torch.randint(config.vocab_size, shape, generator=generator)
            checks.append(_check(decoder, llama, prompt, size.new_tokens))
            rows += _rows(decoder, llama, prompt, size)
    model = (
        f"heads of 64, ffn 2.75 d, vocabulary {size.vocab_size}, tied head"
        if gguf is None
        else f"weights of {gguf.name}"
    )
    setting = (
        f"vanilla, {config.num_layers} layers, {model}, float32; prompt {size.prompt_tokens}, "
        f"{size.new_tokens} new tokens, greedy; a step decodes one token in each row; "
        f"{size.repetitions} repetitions in turns"
    )
    return Report(title="decoding", setting=setting, rows=tuple(rows), checks=tuple(checks))


def _models(size: _Size, dim: int) -> tuple[Decoder, Any]:
    config = shaped_config(
        dim,
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        context_length=size.prompt_tokens + size.new_tokens,
        method="vanilla",
    )
    decoder = fresh_decoder(config).eval()
    return decoder, llama_of(config, published_from_decoder(decoder))


def _read_models(gguf: Path) -> tuple[Decoder, Any]:
    llama: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    llama.generation_config.eos_token_id = None  # Both programs generate all tokens.
    return GgufFile(gguf).decoder().eval(), llama.eval()


def llama_of(config: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """Return transformers' Llama of a shape, with weights by their published names."""
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.ffn_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    llama.set_attn_implementation("sdpa")
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    llama.tie_weights()
    return llama.eval()


def _check(decoder: Decoder, llama: Any, prompt: Tensor, new_tokens: int) -> str:
    """Compare logits over our own continuation, and check that each of its tokens is the
    likeliest."""
    continued = generate(decoder, prompt, max_new_tokens=new_tokens)
    with torch.inference_mode():
        ours, theirs = decoder(continued), llama(continued).logits
    before = prompt.size(1) - 1
    chosen = theirs[:, before:-1].gather(-1, continued[:, before + 1 :, None])
    regret = theirs[:, before:-1].amax(-1, keepdim=True) - chosen
    difference = max((ours - theirs).abs().max().item(), regret.max().item()) / theirs.std().item()
    what = f"logits of ours and transformers', d {decoder.config.dim}, batch {len(prompt)},"
    return checked(what, difference, _TOLERANCE)


def _rows(decoder: Decoder, llama: Any, prompt: Tensor, size: _Size) -> list[Row]:
    matrices = [p.detach().clone() for p in decoder.parameters() if p.dim() == 2]
    all_bytes = sum(parameter.nbytes for parameter in decoder.parameters())
    scale = all_bytes / sum(matrix.nbytes for matrix in matrices)
    seconds = take_turns(
        {
            "ours": lambda: _time_ours(decoder, prompt, size.new_tokens),
            "transformers": lambda: _time_llama(llama, prompt, size.new_tokens),
            "bound": lambda: _time_bound(matrices, size.new_tokens, scale),
        },
        repetitions=size.repetitions,
    )
    dim = decoder.config.dim
    place = f"d {dim}, batch {len(prompt)}"
    whole = {name: [s.whole for s in values] for name, values in seconds.items()}
    after = {name: [s.after_prefill for s in values] for name, values in seconds.items()}
    return [
        Row(
            what=f"per step after the prefill, transformers / ours, {place}",
            quantities=(_milliseconds("transformers", after), _milliseconds("ours", after)),
            ratio=paired_ratio(after["transformers"], after["ours"]),
            goal=_GOAL_RATIO.get((dim, len(prompt))),
        ),
        Row(
            what=f"per step, prefill included, transformers / ours, {place}",
            quantities=(_milliseconds("transformers", whole), _milliseconds("ours", whole)),
            ratio=paired_ratio(whole["transformers"], whole["ours"]),
            goal=_GOAL_RATIO.get((dim, len(prompt))),
        ),
        Row(
            what=f"share of the bound ({all_bytes / 1e6:.1f} MB of weights), {place}",
            quantities=(_milliseconds("bound", after), _milliseconds("ours", after)),
            ratio=paired_ratio(after["bound"], after["ours"]),
            goal=_GOAL_SHARE.get((dim, len(prompt))),
        ),
    ]


def _time_ours(decoder: Decoder, prompt: Tensor, new_tokens: int) -> _Seconds:
    started = time.perf_counter()
    steps = stream(decoder, prompt, max_new_tokens=new_tokens)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return _seconds(started, first, time.perf_counter(), new_tokens)


def _time_llama(llama: Any, prompt: Tensor, new_tokens: int) -> _Seconds:
    moments: list[float] = []

    def note(_: Tensor, scores: Tensor) -> Tensor:
        moments.append(time.perf_counter())
        return scores

    started = time.perf_counter()
    with torch.inference_mode():
        llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([note]),
        )
    ended = time.perf_counter()
    assert len(moments) == new_tokens, (len(moments), new_tokens)
    return _seconds(started, moments[0], ended, new_tokens)


def _time_bound(matrices: list[Tensor], new_tokens: int, scale: float) -> _Seconds:
    """Walk over all matrices, once per new token."""
    vectors = {matrix.size(1): torch.randn(matrix.size(1)) for matrix in matrices}
    with torch.inference_mode():
        started = time.perf_counter()
        for _ in range(new_tokens):
            for matrix in matrices:
                torch.mv(matrix, vectors[matrix.size(1)])
        per_token = scale * (time.perf_counter() - started) / new_tokens
    return _Seconds(per_token, per_token)


def _seconds(started: float, first: float, ended: float, new_tokens: int) -> _Seconds:
    return _Seconds((ended - started) / new_tokens, (ended - first) / (new_tokens - 1))


def _milliseconds(label: str, seconds: dict[str, list[float]]) -> Quantity:
    return Quantity(label, Spread.of([1e3 * value for value in seconds[label]]), "ms")
