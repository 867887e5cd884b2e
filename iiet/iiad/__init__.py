"""Influence-aware distillation (IIAD): cheaper models from a trained one, step by step.

- `influence`: how much each correction, and each layer, of the trained model matters.
- `pruning`: which iteration schedules follow from that; does not load torch.
- `left_out`: the model of the layers that a schedule keeps.
- `distillation`: the loss by which a student under such a schedule learns from its teacher.
- `tables`: what influence and schedules look like in a terminal or notebook.

What a schedule costs is in `iiet.cost`.
"""
