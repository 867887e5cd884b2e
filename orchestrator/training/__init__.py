"""Train one model: `job.py` describes a training, `trainer.py` executes it in one process.

Nothing here imports Ray.
"""
