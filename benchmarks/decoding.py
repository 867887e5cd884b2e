"""Cached decoding: against `transformers`' Llama, and its time against the number of evaluations.

`decoding`: greedy decoding of the same weights by both programs, random ones of several widths or
those of a GGUF file. transformers runs as well as its users can run it: `generate`, fused
attention, the default cache, no gradients, no stop token. Each run gives two times: the whole run
divided by the new tokens, and the time per token after the prefill, whose end is taken from a
logits processor in transformers (one call per token), and from the first token of our stream.

The bound: a step cannot be faster than reading each weight once. The time for this is measured in
the same turns, by plain matrix-vector products over as many distinct matrices of the same shapes as
the model has, so that processor caches help both alike. The share of the bound has a goal only
where reading is the limit, for one row of a wide model: with eight rows, arithmetic takes time too.

`schedules`: one model decodes under several iteration schedules, in turns, token by token. A line
through the medians, start + slope x evaluations, has as its start the cost of a token without
evaluations (embedding, head); its largest relative residual shows how well the count predicts time.
Further rows show where the count is wrong: consecutive corrections of one layer find its weights in
the processor's cache, so as many evaluations may be cheaper on few layers than on all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, random_tokens, shaped_config
from benchmarks.timing import Line, Spread, paired_ratio, stopwatch, take_turns
from iiet import (
    Decoder,
    IterationSchedule,
    KeyValueCache,
    ModelConfig,
    generate,
    published_from_decoder,
    stream,
)
from orchestrator.models.gguf import read_gguf

_TOLERANCE = 1e-3
_GOAL_RATIO = {(256, 1): Goal("at least", 1.5), (256, 8): Goal("at least", 1.4)}
_GOAL_SHARE = {(512, 1): Goal("at least", 0.75)}
_GOAL_LINE = Goal("at most", 0.1)


@dataclass(frozen=True, kw_only=True)
class _Size:
    dims: tuple[int, ...] = (256, 512)
    num_layers: int = 12
    vocab_size: int = 8192
    prompt_tokens: int = 128
    new_tokens: int = 128
    """Tokens that each program decodes, or steps of each schedule."""
    batch_sizes: tuple[int, ...] = (1, 8)
    repetitions: int = 5


_FULL = _Size()
_QUICK = _Size(
    dims=(64,),
    num_layers=4,
    vocab_size=256,
    prompt_tokens=8,
    new_tokens=6,
    batch_sizes=(1, 2),
    repetitions=2,
)


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
            prompt = random_tokens(config.vocab_size, batch_size, size.prompt_tokens)
            checks.append(_check_against_llama(decoder, llama, prompt, size.new_tokens))
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
    return read_gguf(gguf).eval(), llama.eval()


def llama_of(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
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


def _check_against_llama(decoder: Decoder, llama: Any, prompt: Tensor, new_tokens: int) -> str:
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
    # Seconds per token: of the whole run, and after the prefill.
    whole, after = (
        {name: [pair[number] for pair in pairs] for name, pairs in seconds.items()}
        for number in (0, 1)
    )
    place = decoder.config.dim, len(prompt)

    def row(what: str, name: str, times: dict[str, list[float]], goals: Any) -> Row:
        return Row(
            what=f"{what}, d {place[0]}, batch {place[1]}",
            quantities=tuple(Quantity.milliseconds(n, times[n]) for n in (name, "ours")),
            ratio=paired_ratio(times[name], times["ours"]),
            goal=goals.get(place),
        )

    after_prefill = "per step after the prefill, transformers / ours"
    bound = f"share of the bound ({all_bytes / 1e6:.1f} MB of weights)"
    return [
        row(after_prefill, "transformers", after, _GOAL_RATIO),
        row("per step, prefill included, transformers / ours", "transformers", whole, _GOAL_RATIO),
        row(bound, "bound", after, _GOAL_SHARE),
    ]


def _time_ours(decoder: Decoder, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    started = time.perf_counter()
    steps = stream(decoder, prompt, max_new_tokens=new_tokens)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    ended = time.perf_counter()
    return (ended - started) / new_tokens, (ended - first) / (new_tokens - 1)


def _time_llama(llama: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
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
    return (ended - started) / new_tokens, (ended - moments[0]) / (new_tokens - 1)


def _time_bound(matrices: list[Tensor], new_tokens: int, scale: float) -> tuple[float, float]:
    """Walk over all matrices, once per new token."""
    vectors = {matrix.size(1): torch.randn(matrix.size(1)) for matrix in matrices}
    with torch.inference_mode():
        started = time.perf_counter()
        for _ in range(new_tokens):
            for matrix in matrices:
                torch.mv(matrix, vectors[matrix.size(1)])
        per_token = scale * (time.perf_counter() - started) / new_tokens
    return per_token, per_token


def measure_schedules(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure milliseconds per token under several iteration schedules.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    size = _QUICK if quick else _FULL
    layers = size.num_layers
    few = max(1, layers // 4)
    fitted = {
        "r = 0": IterationSchedule.uniform(layers, 0),
        "r = 0, 1 in turn": IterationSchedule(tuple(islice(cycle((0, 1)), layers))),
        **{f"r = {r}": IterationSchedule.uniform(layers, r) for r in (1, 2, 3)},
    }
    concentrated = {  # As many evaluations as `r = 1`.
        "few": IterationSchedule((0,) * (layers - few) + (layers // few,) * few),
        "one": IterationSchedule((0,) * (layers - 1) + (layers,)),
    }
    schedules = fitted | concentrated
    rows: list[Row] = []
    checks: list[str] = []
    for dim in size.dims:
        say(f"schedules: d {dim}")
        config = shaped_config(
            dim,
            num_layers=layers,
            vocab_size=size.vocab_size,
            # Two more tokens: the warm-up and a spare one.
            context_length=size.prompt_tokens + size.new_tokens + 2,
        )
        decoder = fresh_decoder(config).eval()
        decoders = {name: decoder.with_schedule(each) for name, each in schedules.items()}
        what = f"logits of a cached step and the full forward, {len(schedules)} schedules, d {dim},"
        checks.append(checked(what, max(map(_cached_difference, decoders.values())), _TOLERANCE))
        tasks = {name: _token_step(one, size) for name, one in decoders.items()}
        seconds = take_turns(tasks, repetitions=size.new_tokens)
        for name, schedule in fitted.items():
            each = [value / schedule.num_evaluations for value in seconds[name]]
            rows.append(
                Row(
                    what=f"d {dim}, {name}: {schedule.num_evaluations} evaluations",
                    quantities=(
                        Quantity.milliseconds("token", seconds[name]),
                        Quantity.milliseconds("per evaluation", each),
                    ),
                )
            )
        line = Line.through(
            [schedule.num_evaluations for schedule in fitted.values()],
            [1e3 * statistics.median(seconds[name]) for name in fitted],
        )
        rows.append(
            Row(
                what=f"d {dim}, line through {len(fitted)} schedules: largest relative residual",
                quantities=(
                    Quantity.one("start", line.start, "ms"),
                    Quantity.one("per evaluation", line.slope, "ms"),
                ),
                ratio=Spread.of([line.largest_relative_residual]),
                goal=None if quick else _GOAL_LINE,
            )
        )
        rows += [
            Row(
                what=f"d {dim}, {schedule.num_evaluations} evaluations, corrections on {name} "
                f"({schedule}) / on all",
                quantities=(
                    Quantity.milliseconds(f"on {name}", seconds[name]),
                    Quantity.milliseconds("on all", seconds["r = 1"]),
                ),
                ratio=paired_ratio(seconds[name], seconds["r = 1"]),
            )
            for name, schedule in concentrated.items()
        ]
    setting = (
        f"IIET, {layers} layers, heads of 64, ffn 2.75 d, vocabulary {size.vocab_size}, "
        f"tied head, float32; batch 1 after a prompt of {size.prompt_tokens} tokens, "
        f"{size.new_tokens} tokens each, in turns token by token"
    )
    return Report(title="schedules", setting=setting, rows=tuple(rows), checks=tuple(checks))


@torch.inference_mode()
def _cached_difference(decoder: Decoder) -> float:
    """Compare the logits of a cached step with those of the full forward, in their deviations."""
    tokens = random_tokens(decoder.config.vocab_size, 1, 8)
    cache = KeyValueCache(decoder.config, batch_size=1, max_tokens=8)
    decoder(tokens[:, :-1], cache=cache)
    step, full = decoder(tokens[:, -1:], cache=cache), decoder(tokens)[:, -1:]
    return float((step - full).abs().max() / full.std())


def _token_step(decoder: Decoder, size: _Size) -> Callable[[], float]:
    """Return a task that decodes one more token after a prompt and returns the seconds."""
    config = decoder.config
    cache = KeyValueCache(config, batch_size=1, max_tokens=config.context_length)
    token = torch.ones(1, 1, dtype=torch.long)
    prompt = random_tokens(config.vocab_size, 1, size.prompt_tokens)
    with torch.inference_mode():
        decoder(prompt, cache=cache, last_only=True)

    @torch.inference_mode()
    def step() -> None:
        decoder(token, cache=cache, last_only=True)

    return stopwatch(step)
