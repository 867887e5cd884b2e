"""Settings with which every part of a sweep takes a moment, for tests of whole commands."""

SMALL = [
    "data.max_documents=250", "data.vocab_size=400",
    "model.dim=32", "model.num_layers=3", "model.num_heads=2", "model.num_kv_heads=2",
    "model.ffn_dim=64", "model.context_length=64",
    "training.num_steps=12", "training.num_tokens_per_step=256", "training.validate_every_steps=6",
    "training.num_validation_tokens=512", "training.checkpoint_every_steps=6",
    "distillation.training.num_steps=3", "distillation.training.num_tokens_per_step=256",
    "distillation.training.num_validation_tokens=512",
    "influence.num_tokens=512", "evaluation.num_items=20", "sweep.num_schedules=3",
]  # fmt: skip
