"""Train one model: the job that describes it, the loop, checkpoints, and the teacher's outputs.

`job.py` describes a training, `run.py` executes it in one process, `loop.py` is the loop.
Nothing here imports Ray.
"""
