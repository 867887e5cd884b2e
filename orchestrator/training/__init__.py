"""One training: its description, loop, checkpoints, teacher, and the journal that others follow.

`job.py` describes a training, `run.py` executes it in one process; `loop.py` is the loop itself.
Nothing here imports Ray.
"""
