"""Accuracy by lm-eval; the only package that imports it.

lm-eval builds the prompts and computes the metrics; the log-likelihoods come from
`evaluation.scoring`, generated answers from `evaluation.answers`. Three habits of lm-eval are
avoided: the scan of all task files (8 seconds), retries without network (23 seconds per task), and
its output.
"""

from orchestrator.evaluation.harness.answer_settings import check_answer_settings
from orchestrator.evaluation.harness.run import run_model, run_suite
from orchestrator.evaluation.harness.suite import Suite, load_suite

__all__ = [
    "Suite",
    "check_answer_settings",
    "load_suite",
    "run_model",
    "run_suite",
]
