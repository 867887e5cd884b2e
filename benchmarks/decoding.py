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

Then a plain student that leaves a third of its teacher's layers out: against transformers with the
same weights, and against its teacher, whose time it should undercut by nearly the layers' share.

Then IIET without corrections against vanilla, by width: both do the same large products, and IIET
adds a norm, a sum over the estimates and a copy per layer.

`schedules`: one model decodes under several iteration schedules, in turns, token by token. A line
through the medians, start + slope x evaluations, has as its start the cost of a token without
evaluations (embedding, head); its largest relative residual shows how well the count predicts time.
Further rows show where the count is wrong: consecutive corrections of one layer find its weights in
the processor's cache, so as many evaluations may be cheaper on few layers than on all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from benchmarks.report import RATIO, Figure, Goal, Row, checked, milliseconds
from benchmarks.runner import Setup
from benchmarks.shape import SHAPE, fresh_decoder, random_tokens, shaped_config
from benchmarks.timing import Spread, stopwatch, take_turns
from iiet import (
    Decoder,
    IterationSchedule,
    KeyValueCache,
    ModelConfig,
    decoder_of_kept_layers,
)
from orchestrator.models.gguf import read_gguf

_FULL = (12, 8192, 128, 64)
_QUICK = (4, 256, 8, 6)
"""Layers, vocabulary, tokens of the prompt, new tokens."""
_TOLERANCE = 1e-3
_GOAL_RATIO = {(256, 1): Goal("at least", 1.5), (256, 8): Goal("at least", 1.4)}
_GOAL_SHARE = {(512, 1): Goal("at least", 0.75)}
_GOAL_WITHOUT_CORRECTIONS = {64: 1.2, 128: 1.2, 256: 1.05, 512: 1.05}
_GOAL_LINE = Goal("at most", 0.1)


def decoding(setup: Setup) -> Iterator[Row]:
    """Measure milliseconds per token of both programs, and the bound: of random weights, or of
    those of a GGUF file."""
    layers, vocabulary, prompt_tokens, new_tokens = _QUICK if setup.is_toy else _FULL
    batch_sizes, repetitions = ((1, 2), 2) if setup.is_toy else ((1, 8), 5)
    gguf = setup.gguf
    for dim in (0,) if gguf else (64,) if setup.is_toy else (256, 512):
        if gguf:
            llama: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="sdpa"
            )
            llama.generation_config.eos_token_id = None  # Both programs generate all tokens.
            decoder = read_gguf(gguf).eval()
            llama = llama.eval()
        else:
            length = prompt_tokens + new_tokens
            config = shaped_config(dim, layers, vocabulary, length, method="vanilla")
            decoder = fresh_decoder(config).eval()
            llama = llama_of(config, decoder.state_dict())
        config = decoder.config
        weights = f"weights of {gguf.name}" if gguf else f"{SHAPE}, tied head"
        yield Row(
            what=f"vanilla, d {config.dim}, {config.num_layers} layers, {weights}, vocabulary "
            f"{config.vocab_size}; prompt {prompt_tokens}, {new_tokens} new tokens, greedy; a step "
            f"decodes one token in each row; {repetitions} repetitions in turns"
        )
        for batch_size in batch_sizes:
            prompt = random_tokens(config.vocab_size, batch_size, prompt_tokens)
            yield _check_against_llama(decoder, llama, prompt, new_tokens)
            yield from _rows(decoder, llama, prompt, new_tokens, repetitions)
        if not gguf:
            prompt = random_tokens(config.vocab_size, 1, prompt_tokens)
            yield from _plain_student(decoder, prompt, new_tokens, repetitions)

    if not gguf:
        yield from _without_corrections(setup)


def _plain_student(
    teacher: Decoder, prompt: Tensor, new_tokens: int, repetitions: int
) -> Iterator[Row]:
    """Compare a student without every third layer with transformers, and with its teacher."""
    num_layers = teacher.config.num_layers
    schedule = IterationSchedule.uniform(num_layers, 0).leaving_out(range(1, num_layers, 3))
    student = decoder_of_kept_layers(teacher, schedule).copy().eval()
    llama = llama_of(student.config, student.state_dict())
    yield _check_against_llama(student, llama, prompt, new_tokens)
    pairs = take_turns(
        {
            "ours": lambda: _time_ours(student, prompt, new_tokens),
            "transformers": lambda: _time_llama(llama, prompt, new_tokens),
            "teacher": lambda: _time_ours(teacher, prompt, new_tokens),
        },
        repetitions=repetitions,
    )
    after_prefill = {name: [after for _, after in times] for name, times in pairs.items()}
    what = f"a step after the prefill, plain student of {schedule.label()}, d {teacher.config.dim}"
    yield Row.paired(what, after_prefill, "transformers", "ours")
    yield Row.paired(f"{what}, and its teacher", after_prefill, "teacher", "ours")


def _without_corrections(setup: Setup) -> Iterator[Row]:
    layers, vocabulary, prompt_tokens, new_tokens = (
        (2, 64, 4, 6) if setup.is_toy else (6, 256, 16, 96)
    )
    for dim, limit in _GOAL_WITHOUT_CORRECTIONS.items():
        length = prompt_tokens + new_tokens
        decoders = {
            name: fresh_decoder(
                shaped_config(dim, layers, vocabulary, length, method=method, schedule=schedule)
            ).eval()
            for name, method, schedule in (("r = 0", "iiet", 0), ("vanilla", "vanilla", None))
        }
        prompt = random_tokens(vocabulary, 1, prompt_tokens)

        def task(decoder: Decoder, prompt: Tensor = prompt) -> Callable[[], float]:
            def run() -> float:
                steps = decoder.stream(prompt, max_new_tokens=new_tokens)
                next(steps)
                started = time.process_time()
                for _ in steps:
                    pass
                return (time.process_time() - started) / (new_tokens - 1)

            return run

        tasks = {name: task(decoder) for name, decoder in decoders.items()}
        seconds = take_turns(tasks, repetitions=2 if setup.is_toy else 9)
        what = f"a step, CPU time, IIET without corrections, {layers} layers of width {dim}"
        goal = None if setup.is_toy else Goal("at most", limit)
        yield Row.paired(what, seconds, "r = 0", "vanilla", goal)


def llama_of(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Return transformers' Llama of a shape, with weights by their names."""
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


def _check_against_llama(decoder: Decoder, llama: Any, prompt: Tensor, new_tokens: int) -> Row:
    """Compare logits over our own continuation, and check that each of its tokens is the
    likeliest."""
    continued = decoder.generate(prompt, max_new_tokens=new_tokens)
    with torch.inference_mode():
        ours = decoder(continued)
        theirs = llama(continued).logits
    before = prompt.size(1) - 1
    chosen = theirs[:, before:-1].gather(-1, continued[:, before + 1 :, None])
    regret = theirs[:, before:-1].amax(-1, keepdim=True) - chosen
    difference = max((ours - theirs).abs().max().item(), regret.max().item()) / theirs.std().item()
    what = f"logits of ours and transformers', d {decoder.config.dim}, batch {len(prompt)},"
    return checked(what, difference, _TOLERANCE)


def _rows(
    decoder: Decoder, llama: Any, prompt: Tensor, new_tokens: int, repetitions: int
) -> Iterator[Row]:
    matrices = [p.detach().clone() for p in decoder.parameters() if p.dim() == 2]
    all_bytes = sum(parameter.nbytes for parameter in decoder.parameters())
    scale = all_bytes / sum(matrix.nbytes for matrix in matrices)
    pairs = take_turns(
        {
            "ours": lambda: _time_ours(decoder, prompt, new_tokens),
            "transformers": lambda: _time_llama(llama, prompt, new_tokens),
            "bound": lambda: _time_bound(matrices, new_tokens, scale),
        },
        repetitions=repetitions,
    )
    # Seconds per token: of the whole run, and after the prefill.
    whole, after = ({name: [pair[i] for pair in pairs[name]] for name in pairs} for i in (0, 1))
    place = decoder.config.dim, len(prompt)
    size = f"d {place[0]}, batch {place[1]}"
    both = ("transformers", "ours")
    bound = f"share of the bound ({all_bytes / 1e6:.1f} MB of weights), {size}"
    ratio = _GOAL_RATIO.get(place)
    share = _GOAL_SHARE.get(place)
    yield Row.paired(f"a step after the prefill, {size}", after, *both, ratio)
    yield Row.paired(f"a step, prefill included, {size}", whole, *both, ratio)
    yield Row.paired(bound, after, "bound", "ours", share)


def _time_ours(decoder: Decoder, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    started = time.process_time()
    steps = decoder.stream(prompt, max_new_tokens=new_tokens)
    next(steps)
    first = time.process_time()
    for _ in steps:
        pass
    ended = time.process_time()
    return (ended - started) / new_tokens, (ended - first) / (new_tokens - 1)


def _time_llama(llama: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    moments: list[float] = []

    def note(_: Tensor, scores: Tensor) -> Tensor:
        moments.append(time.process_time())
        return scores

    started = time.process_time()
    with torch.inference_mode():
        llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([note]),
        )
    ended = time.process_time()
    assert len(moments) == new_tokens, (len(moments), new_tokens)
    return (ended - started) / new_tokens, (ended - moments[0]) / (new_tokens - 1)


def _time_bound(matrices: list[Tensor], new_tokens: int, scale: float) -> tuple[float, float]:
    """Walk over all matrices, once per new token."""
    vectors = {matrix.size(1): torch.randn(matrix.size(1)) for matrix in matrices}
    with torch.inference_mode():
        started = time.process_time()
        for _ in range(new_tokens):
            for matrix in matrices:
                torch.mv(matrix, vectors[matrix.size(1)])
        per_token = scale * (time.process_time() - started) / new_tokens
    return per_token, per_token


def schedules(setup: Setup) -> Iterator[Row]:
    """Measure milliseconds per token under several iteration schedules."""
    layers, vocabulary, prompt_tokens, new_tokens = _QUICK if setup.is_toy else _FULL
    few = max(1, layers // 4)
    fitted = {
        "r = 0": IterationSchedule.uniform(layers, 0),
        "r = 0, 1 in turn": IterationSchedule(((0, 1) * layers)[:layers]),
        **{f"r = {r}": IterationSchedule.uniform(layers, r) for r in (1, 2, 3)},
    }
    concentrated = {  # As many evaluations as `r = 1`.
        "few layers": IterationSchedule((0,) * (layers - few) + (layers // few,) * few),
        "one layer": IterationSchedule((0,) * (layers - 1) + (layers,)),
    }
    yield Row(
        what=f"IIET, {layers} layers, {SHAPE}, vocabulary {vocabulary}, tied head; batch 1 after a "
        f"prompt of {prompt_tokens} tokens, {new_tokens} tokens each, in turns token by token"
    )
    counts = [schedule.num_evaluations for schedule in fitted.values()]
    for dim in (64,) if setup.is_toy else (256, 512):
        # Two more tokens: the warm-up and a spare one.
        config = shaped_config(dim, layers, vocabulary, prompt_tokens + new_tokens + 2)
        decoder = fresh_decoder(config).eval()
        named = fitted | concentrated
        decoders = {name: decoder.with_schedule(each) for name, each in named.items()}
        what = f"logits of a cached step and the full forward, {len(named)} schedules, d {dim},"
        yield checked(what, max(map(_cached_difference, decoders.values())), _TOLERANCE)
        tasks = {name: _token_step(one, prompt_tokens) for name, one in decoders.items()}
        seconds = take_turns(tasks, repetitions=new_tokens)
        for name, count in zip(fitted, counts, strict=True):
            each = milliseconds([value / count for value in seconds[name]])
            token = {"token (ms)": milliseconds(seconds[name]), "evaluation (ms)": each}
            yield Row(what=f"d {dim}, {name}: {count} evaluations", figures=token)
        medians = [1e3 * statistics.median(seconds[name]) for name in fitted]
        slope, start = statistics.linear_regression(counts, medians)
        residuals = [abs(start + slope * x - y) / y for x, y in zip(counts, medians, strict=True)]
        line: dict[str, Figure] = {"start (ms)": start, "per evaluation (ms)": slope}
        yield Row(
            what=f"d {dim}, line through {len(fitted)} schedules: largest relative residual",
            figures={**line, RATIO: Spread.of([max(residuals)])},
            goal=None if setup.is_toy else _GOAL_LINE,
        )
        for name, schedule in concentrated.items():
            what = f"d {dim}, {schedule.num_evaluations} evaluations, corrections on {name}"
            times = {"there": seconds[name], "on all": seconds["r = 1"]}
            yield Row.paired(f"{what} ({schedule})", times, "there", "on all")


@torch.inference_mode()
def _cached_difference(decoder: Decoder) -> float:
    """Compare the logits of a cached step with those of the full forward, in their deviations."""
    tokens = random_tokens(decoder.config.vocab_size, 1, 8)
    cache = KeyValueCache(decoder.config, batch_size=1, max_tokens=8)
    decoder(tokens[:, :-1], cache=cache)
    step = decoder(tokens[:, -1:], cache=cache)
    full = decoder(tokens)[:, -1:]
    return float((step - full).abs().max() / full.std())


def _token_step(decoder: Decoder, prompt_tokens: int) -> Callable[[], float]:
    """Return a task that decodes one more token after a prompt and returns the seconds."""
    config = decoder.config
    cache = KeyValueCache(config, batch_size=1, max_tokens=config.context_length)
    token = torch.ones(1, 1, dtype=torch.long)

    @torch.inference_mode()
    def read(tokens: Tensor) -> None:
        decoder(tokens, cache=cache, last_only=True)

    read(random_tokens(config.vocab_size, 1, prompt_tokens))
    return stopwatch(lambda: read(token))
