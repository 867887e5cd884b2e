"""`python -m benchmarks.gpu_model PRESET [options]`, from the repository's root.

Estimates a training step, a distillation step (`--distill R`), both eager and compiled, or decoded
tokens (`--decode N`) on a GPU, and prints kernels, time, memory, and the kernels and places that
take longest. Clipping and the optimizer count for the memory and not for the rest. It needs no GPU
but a C++ compiler, takes some seconds, and computes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_model.stub import register_gpu

NUM_LINES = 12
"""Kernels and places that are listed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return the exit code."""
    options = _parse(arguments)
    try:
        register_gpu()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    from benchmarks.gpu_model.estimate import estimate

    try:
        results = estimate(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for result in results:
        _print(result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['what']}: {result['kernels']:,} kernels, {result['milliseconds']:.1f} ms, "
        + (f"MFU {result['mfu']:.1%}, " if "mfu" in result else "")
        + f"{result['gigabytes']:,.1f} GB moved, peak {result['peak_gib']:.1f} GiB"
        + (f" (planned {result['planned_gib']:.1f})" if "planned_gib" in result else "")
        + f", {result['waits']} waits for the GPU"
    )
    for title in ("by_kernel", "by_place"):
        print(f"  {title.replace('_', ' ')}:")
        for line in result[title][:NUM_LINES]:
            print(
                f"    {line['name']:60} n={line['launches']:6,} GB={line['gigabytes']:7.1f} "
                f"ms={line['milliseconds']:7.2f}"
            )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument("preset", help="a preset of the model, such as 340m")
    parser.add_argument("--method", default="iiet")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the preset's number")
    parser.add_argument("--sequences", type=int, default=4, metavar="N", help="of a pass, or a row")
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="passes of a step")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--distill", type=int, metavar="R", help="a student with R corrections")
    kind.add_argument("--decode", type=int, metavar="N", help="decode N tokens, batch 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store all numbers in FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
