"""Hold a back end to a model's conformance file: do its decode steps give the model's logits?

    python check_conformance.py conformance.safetensors -- ./engine {ids} {schedule} {logits}
    python check_conformance.py conformance.safetensors --callable my_module:logits

Needs numpy and safetensors only, so it also runs where the model's own code does not. The file
holds tokens and, for each of a few iteration schedules, the logits after each decode step:

    ids                  (prompt + steps,) int64
    logits/SCHEDULE      (steps, vocabulary) float32, such as logits/2,0,1; computed in float64
    metadata             num_prompt

A back end reads the first `num_prompt` ids at once, and then each other one by one through its
cache, under the schedule. It returns the logits after each of the latter, (steps, vocabulary).

- As a command, it is started once for each schedule. `{ids}` is a safetensors file with `ids`,
  int64, and `num_prompt`, int64 of one number; `{schedule}` is the text of the schedule, `-` for a
  method without corrections; it writes float32 `logits` to the safetensors file `{logits}`.
- As a callable, it gets ids (numpy), num_prompt and the schedule, and returns an array.

It passes if no logit differs by more than the tolerance times the standard deviation of the model's
logits. The exit code is 0 if all schedules pass, 1 if one fails, and 2 after a mistake.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

BackEnd = Callable[[np.ndarray, int, str], np.ndarray]
"""Maps ids, the number of prompt ids and a schedule to logits, (steps, vocabulary)."""

TOLERANCE = 1e-3
"""For float32; a back end in bfloat16 needs about 0.05."""


@dataclass(frozen=True)
class Finding:
    """How a back end did under one schedule."""

    schedule: str
    largest_error: float
    """Largest difference of a logit, in standard deviations of the model's."""
    same_choice: float
    """Share of the steps whose likeliest token is the model's."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest_error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"schedule {self.schedule}: {'pass' if self.passed else 'FAIL'}, largest error "
            f"{self.largest_error:.2g} standard deviations (at most {self.tolerance:g}), "
            f"{self.same_choice:.1%} of the likeliest tokens agree"
        )


def check(file: Path | str, back_end: BackEnd, tolerance: float = TOLERANCE) -> list[Finding]:
    """Compare a back end with a conformance file, schedule by schedule.

    Raises:
        ValueError: the file is no conformance file, or the back end's result has another shape.
    """
    ids, num_prompt, expected = _read(Path(file))
    findings = []
    for schedule, logits in expected.items():
        found = np.asarray(back_end(ids, num_prompt, schedule), dtype=np.float64)
        if found.shape != logits.shape:
            raise ValueError(
                f"the back end's logits under schedule {schedule} must be {logits.shape}, got "
                f"{found.shape}"
            )
        difference = np.abs(found - logits).max() / logits.std()
        error = float(difference) if np.isfinite(found).all() else float("inf")
        same = float((found.argmax(-1) == logits.argmax(-1)).mean())
        findings.append(Finding(schedule, error, same, tolerance))
    return findings


def command_back_end(command: Sequence[str]) -> BackEnd:
    """Return a back end that runs a command with `{ids}`, `{schedule}` and `{logits}` filled in."""

    def run(ids: np.ndarray, num_prompt: int, schedule: str) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            given, result = Path(folder) / "ids.safetensors", Path(folder) / "logits.safetensors"
            save_file({"ids": ids, "num_prompt": np.array([num_prompt])}, given)
            places = {"{ids}": str(given), "{schedule}": schedule, "{logits}": str(result)}
            filled = [_filled(part, places) for part in command]
            code = subprocess.run(filled, check=False).returncode
            if code or not result.is_file():
                wrote = "wrote no logits" if not result.is_file() else "failed"
                raise ValueError(f"the back end {wrote} (exit code {code}): {' '.join(filled)}")
            return load_file(result)["logits"]

    return run


def _filled(part: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        part = part.replace(name, value)
    return part


def _read(file: Path) -> tuple[np.ndarray, int, dict[str, np.ndarray]]:
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            num_prompt = int((opened.metadata() or {})["num_prompt"])
        ids = tensors.pop("ids")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no conformance file: {error!r}") from None
    expected = {name.removeprefix("logits/"): values for name, values in tensors.items()}
    return ids, num_prompt, expected


def _imported(name: str) -> BackEnd:
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"--callable takes MODULE:FUNCTION, got {name!r}")
    sys.path.insert(0, "")
    try:
        back_end: BackEnd = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--callable {name}: {error}") from None
    return back_end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the model's conformance file")
    parser.add_argument("--callable", metavar="MODULE:FUNCTION", help="a back end in Python")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    options = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    if bool(command) == bool(options.callable):
        parser.error("give either -- COMMAND or --callable MODULE:FUNCTION")
    try:
        back_end = _imported(options.callable) if options.callable else command_back_end(command)
        findings = check(options.file, back_end, options.tolerance)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    return 0 if all(finding.passed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
