"""Forget what the person who runs the tests has set for the program and its libraries.

`suite.py` imports this file before all others, as some variables are read during an import.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

PERSONAL = (
    *("IIET_*", "MLFLOW_*", "RAY_*", "TUNE_*"),
    *("HF_*", "HUGGING*", "TRANSFORMERS_*", "DATASETS_*", "LMEVAL_*"),
    *("AWS_*", "*_PROXY", "*_proxy"),
    # How wide and how colorful the output is.
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "CLICOLOR*", "TTY_*"),
    "GITHUB_ACTIONS",
)
"""Patterns of names. `TMPDIR`, `CUDA_VISIBLE_DEVICES` and the numbers of threads stay."""
FOR_TESTS = ("IIET_LAW_EXAMPLES", "IIET_FUZZ_SETTINGS")
"""Variables that choose how much is tested."""

for _name in [*os.environ]:
    if _name not in FOR_TESTS and any(fnmatchcase(_name, pattern) for pattern in PERSONAL):
        del os.environ[_name]
