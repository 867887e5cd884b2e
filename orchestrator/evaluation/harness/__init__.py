"""Accuracy by lm-eval: the only package that imports it.

In go a decoder, its tokenizer and the names of tasks (or a folder of task files); out come metrics
with standard errors and the per-item values behind them. lm-eval makes the prompts and computes the
metrics; the log-likelihoods come from `evaluation.scoring`, through a small model class
of lm-eval's own kind. Models that are no decoder run through lm-eval's class for transformers.

Three habits of lm-eval are kept out: its scan of all task files (8 seconds), its retries without
network (23 seconds a task), its noise. Tasks that the hub does not give are named, with the reason,
and left out; what else cannot be run is an error.
"""

from orchestrator.evaluation.harness.run import evaluate_decoder, run_model, run_suite
from orchestrator.evaluation.harness.scoring_tokenizer import (
    FolderTokenizer,
    ScoringTokenizer,
    checkpoint_tokenizer,
)
from orchestrator.evaluation.harness.suite import Suite, load_suite

__all__ = [
    "FolderTokenizer",
    "Suite",
    "ScoringTokenizer",
    "checkpoint_tokenizer",
    "evaluate_decoder",
    "load_suite",
    "run_model",
    "run_suite",
]
