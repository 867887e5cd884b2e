"""The project's claims about time and memory, each a ratio measured side by side in one run.

Absolute times say more about a machine than about code, so nothing here is compared with a number
from elsewhere: an opponent runs in the same process, in turns with ours, and is checked to compute
the same before anything is timed. `python -m benchmarks` is the one entry point; a benchmark is a
module with `measure(size)` in and a `report.Report` out.
"""
