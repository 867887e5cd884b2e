"""The first hour on a GPU machine: does everything work there, and how fast is it?

`python -m benchmarks --gpu` runs these sections. Unlike the others they judge what they find:
correct results must be equal within a stated tolerance, and figures are compared with the plan or a
bound. With `--quick` on a machine without a GPU only the sections themselves are tested.
"""

TOY_MODEL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 400}
ROUNDED_LOSS = 2e-2
"""Largest difference of losses, in nats, of trainings that differ by bf16's rounding."""
MEMORY_TOLERANCE = 0.1
"""Allowed relative difference of a step's peak memory from the plan; compiled fields may keep less,
because the plan does not count on all that a compiler computes again."""
NUM_COMPARED = 10
"""First steps whose losses are compared one by one: later, rounding has been amplified."""
