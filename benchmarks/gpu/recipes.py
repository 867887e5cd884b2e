"""Sections that train as users would: a shipped recipe on all GPUs, and a retrofit.

Speed and memory do not depend on what the tokens are, so recipes train on random ones: no data set
is downloaded or tokenized.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import MEMORY_TOLERANCE, TOY_MODEL
from benchmarks.gpu.commands import Commands, Run
from benchmarks.report import Figure, Row
from benchmarks.runner import Setup
from orchestrator.cluster.train import run_train_jobs
from orchestrator.data.store import (
    TEXTS_NAME,
    TOKENIZER_NAME,
    TRAIN_NAME,
    VALIDATION_NAME,
    SplitCounts,
    finish_folder,
    token_dtype,
)
from orchestrator.models.tokenizer import END_OF_TEXT_NAMES
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, read_settings
from orchestrator.workspace.layout import PROFILE_NAME

GIB = 2**30
FULL_VOCABULARY = 32_000
PROFILE_STEPS = 3


def random_tokens(folder: Path, vocab_size: int, num_tokens: int) -> Path:
    """Write a folder of prepared tokens that are random numbers, and return it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    dtype = token_dtype(vocab_size)
    for name in (TRAIN_NAME, VALIDATION_NAME):
        ids = generator.integers(1, vocab_size, num_tokens, dtype=np.uint32).astype(dtype)
        (folder / name).write_bytes(ids.tobytes())
    (folder / TEXTS_NAME).touch()
    words = {END_OF_TEXT_NAMES[0]: 0, **{f"t{number}": number for number in range(1, vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token=END_OF_TEXT_NAMES[0]))
    counts = SplitCounts(documents=1, tokens=num_tokens, bytes=num_tokens)
    finish_folder(folder, "random", {}, tokenizer, train=counts, validation=counts)
    return folder


def recipes(setup: Setup) -> Iterator[Row]:
    """Train `paper-340m` as it is shipped on all GPUs, with a profile, and 1.3b in shards.

    On a CPU two workers train a toy in the same way.
    """
    number = max(1, setup.num_gpus) if setup.device == "cuda" else 2
    vocab_size = TOY_MODEL["vocab_size"] if setup.is_toy else FULL_VOCABULARY
    tokens = random_tokens(
        setup.folder / "random-tokens", vocab_size, 10_000 if setup.is_toy else 50_000_000
    )
    # With one GPU a step takes a quarter of a minute, so fewer are made.
    steps = 6 if setup.is_toy else min(30, 4 * number + 6)
    recipe: dict[str, Any] = {
        "num_steps": steps,
        "warmup_steps": 2,
        "validate_every_steps": steps,
        "checkpoint_every_steps": steps // 2,
        "profile_steps": 1 if setup.is_toy else PROFILE_STEPS,
        "num_validation_tokens": 64 if setup.is_toy else 2**16,
    }
    run, row = _trained(setup, "paper-340m", tokens, recipe, {}, number, "ddp")
    yield row
    profile = run.folder / PROFILE_NAME
    if profile.is_dir():
        kept = setup.report_folder / "gpu-profile"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(profile, kept)
        files = ", ".join(sorted(file.name for file in kept.iterdir()))
        yield Row(what=f"profile of the first GPU: {kept.name} ({files}), for ui.perfetto.dev")
    shutil.rmtree(run.folder)

    if number < 2:
        yield Row(what="1.3b, fsdp", skipped="needs 2 GPUs, and this machine has 1")
        return
    per_pass, num_passes = (1, 2) if setup.is_toy else (2, 4)
    sharded: dict[str, Any] = {
        **recipe,
        "num_steps": 8,
        "validate_every_steps": 8,
        "checkpoint_every_steps": 4,
        "profile_steps": 0,
        "num_sequences_per_pass": per_pass,
        "num_tokens_per_step": number * per_pass * num_passes * (32 if setup.is_toy else 2048),
    }
    run, row = _trained(setup, "1.3b", tokens, sharded, {"model.preset": "1.3b"}, number, "fsdp")
    yield row
    shutil.rmtree(run.folder)


def _trained(
    setup: Setup,
    name: str,
    tokens: Path,
    recipe: Mapping[str, Any],
    model: Mapping[str, Any],
    number: int,
    parallel: str,
) -> tuple[Run, Row]:
    """Train with the settings of `paper-340m`, changed as given, on so many workers."""
    settings = read_settings("paper-340m", options=model)
    config = settings.model.build(vocab_size=FULL_VOCABULARY)
    if setup.is_toy:
        settings = read_settings(
            "paper-340m",
            options={
                "model.preset": "tiny",
                "model.context_length": 32,
                **{f"model.{key}": size for key, size in TOY_MODEL.items() if key != "vocab_size"},
                "training.precision": "fp32",
                "training.num_tokens_per_step": 4 * 32,
                "training.num_sequences_per_pass": 1,
            },
        )
        config = settings.model.build(vocab_size=TOY_MODEL["vocab_size"])
    job = TrainingJob(
        run_folder=str(setup.folder / "trainings" / name),
        tokens_folder=str(tokens),
        model=config,
        recipe=settings.training.model_copy(update=recipe),
    )
    on_gpus = setup.device == "cuda"
    places = {"num_gpus": number} if on_gpus else {"num_workers": number}
    run_train_jobs([job], ClusterSettings(**places, parallel=parallel))  # type: ignore[arg-type]
    run = Run(job.folder)

    devices = Devices(on_gpus=on_gpus, num_workers=number, parallel=parallel)  # type: ignore[arg-type]
    estimate = Estimate(config=config, recipe=job.recipe, devices=devices)
    plan = sum(size for part, size in estimate.worker_memory.items() if part != "PyTorch") / GIB
    settled = statistics.median(_second_half(run, "train/tokens_per_second"))
    peak = max(run.values("train/memory_gb").values()) * 1e9 / GIB
    checkpoints = run.events("checkpoint")
    figures: dict[str, Figure] = {
        "workers": number,
        "passes of a step": estimate.num_passes,
        "tokens/s": settled,
        "peak (GiB)": peak,
        "plan (GiB)": plan,
        "checkpoint: the loop waited (s)": max(event["waited_seconds"] for event in checkpoints),
        "checkpoint: written in (s)": max(event["seconds"] for event in checkpoints),
    }
    problem = None
    if on_gpus:
        figures["MFU (%)"] = 100 * statistics.median(_second_half(run, "train/mfu") or [0.0])
        figures["compiled in (s)"] = sum(event["seconds"] for event in run.events("compiled"))
        if peak > plan * (1 + MEMORY_TOLERANCE):
            problem = f"the peak is {peak / plan:.2f} of the plan's {plan:.1f} GiB"
    for event in run.events("not compiled"):
        problem = event["text"]
    what = f"{name}, {parallel}, {job.recipe.num_steps} steps"
    return run, Row(what=what, figures=figures, problem=problem)


def _second_half(run: Run, metric: str) -> list[float]:
    values = list(run.values(metric).values())
    return values[len(values) // 2 :]


RETROFIT_STEPS = 10


def retrofit(setup: Setup) -> Iterator[Row]:
    """Make a random Llama of about 1B parameters iterative by `pretrain --from`, on all GPUs."""
    context_length = 64 if setup.is_toy else 2048
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    if setup.is_toy:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
    tokenizer_file = setup.tokens() / TOKENIZER_NAME
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    source = setup.folder / "random-llama"
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=context_length,
            tie_word_embeddings=False,
            **sizes,
        )
    )
    num_parameters = llama.num_parameters()
    llama.to(torch.bfloat16).save_pretrained(source)
    del llama
    shutil.copyfile(tokenizer_file, source / TOKENIZER_NAME)

    on_gpus = setup.device == "cuda"
    number = setup.num_gpus if on_gpus else 1
    steps = RETROFIT_STEPS
    commands = Commands(
        setup,
        "retrofit",
        settings={
            "data.max_documents": setup.data.max_documents or "null",
            "training.num_steps": steps,
            "training.iterate_from_fraction": 0.0,
            "training.num_tokens_per_step": 2 * number * context_length,
            "training.num_sequences_per_pass": 1,
            "training.num_validation_tokens": context_length,
            "training.validate_every_steps": steps,
            "training.checkpoint_every_steps": steps,
        },
    )
    place = ["--gpus", str(number)] if on_gpus else ["--local"]
    seconds = commands.run("pretrain", "--from", str(source), "--name", "iterative", *place)
    run = commands.run_record("iterative")
    losses = run.values("train/loss")
    first = losses[min(losses)]
    last = losses[max(losses)]
    yield Row(
        what=f"Llama of {num_parameters / 1e9:.2g}B parameters, {steps} steps",
        figures={
            "workers": number,
            "tokens/s": statistics.median(_second_half(run, "train/tokens_per_second")),
            "peak (GiB)": max(run.values("train/memory_gb").values()) * 1e9 / GIB,
            "first loss": first,
            "last loss": last,
            "whole command (s)": seconds,
        },
        problem=None if math.isfinite(last) else f"the last loss is {last}",
    )
