"""The project's claims about time and memory: ratios of two programs measured in one run.

Absolute times say more about a machine than about code, so nothing is compared with a number from
elsewhere: both programs run in the same process, in turns, and are checked to compute the same
before anything is timed. `python -m benchmarks` runs them; each benchmark is a module whose
`measure` returns a `report.Report`.
"""
