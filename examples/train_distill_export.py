"""Train a model, find out which corrections matter, distill it under a cheaper schedule, export it.

Torch alone runs all of this but the export, which needs safetensors:

    python examples/train_distill_export.py my-folder
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import iiet

TEXT = "to be, or not to be, that is the question: whether 'tis nobler in the mind to suffer " * 40


def batches(num_steps: int, *, rows: int = 8, length: int = 32) -> list[Tensor]:
    """Return random windows of the text as bytes, each (rows, length)."""
    ids = torch.tensor(list(TEXT.encode()))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - length, (num_steps, rows), generator=generator)
    return [torch.stack([ids[start : start + length] for start in step]) for step in starts]


def main(folder: str, *, num_steps: int = 200) -> dict[str, float]:
    """Do all steps; return the losses at the end of each."""
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "dim": 64, "ffn_dim": 176, "vocab_size": 256}
    model = iiet.Decoder(iiet.preset("tiny", schedule="2", **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for ids in batches(num_steps):
        loss = model.loss(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    table = iiet.influence_table(model, ids)
    print(table)
    schedule = iiet.schedule_family(table).within(nfe=6)  # Of nine evaluations per token.
    print(f"distilled under the schedule {schedule}")
    student = model.copy(schedule=schedule)
    pruned = student.loss(ids).item()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    for ids in batches(num_steps):
        distilled, parts = iiet.distillation_loss(student, model, ids)
        optimizer.zero_grad()
        distilled.backward()
        optimizer.step()

    # The cheapest schedule drafts, which changes no token.
    tokens = student.generate(ids[:1, :8], max_new_tokens=24, draft="0")
    print(bytes(tokens[0].tolist()).decode())
    iiet.export(student, folder)
    return {"trained": loss.item(), "pruned": pruned, **{k: v.item() for k, v in parts.items()}}


if __name__ == "__main__":
    print(main(sys.argv[1]))
