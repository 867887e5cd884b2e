"""The first hour on a GPU machine: does everything work there, and how fast is it?

`python -m benchmarks.gpu` runs its sections, each in a process of its own, and writes one report.
Unlike the other benchmarks, sections judge what they find: correct results must be equal within a
stated tolerance, and figures are compared with the plan or a bound. On a CPU at toy size
(`--device cpu --size toy`) only the program itself is tested.
"""
