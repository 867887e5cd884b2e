"""Trains, decodes, measures and distills with `iiet`, and prints what happened as JSON.

Tests run this file in processes where PyTorch is the only library.
"""

import json
import warnings
from tempfile import mkdtemp

import iiet

warnings.filterwarnings("ignore", "Failed to initialize NumPy")


def message_of(call, *arguments):
    """Return the text of the ImportError that a call raises; empty if it raises none."""
    try:
        call(*arguments)
    except ImportError as error:
        return str(error)
    return ""


def main():
    import torch

    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "vocab_size": 20}
    teacher = iiet.Decoder(iiet.preset("tiny", schedule="2,1", **sizes))
    tokens = torch.randint(20, (4, 16))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = iiet.next_token_loss(teacher(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    table = iiet.influence_table(teacher, tokens)
    student = teacher.with_schedule(iiet.IterationSchedule((1, 0)))
    distilled, _ = iiet.distillation_loss(
        student, iiet.frozen_teacher(teacher), tokens, config=iiet.DistillationConfig()
    )
    folder = mkdtemp()
    teacher.save_pretrained(folder)
    results = {
        "version": iiet.__version__,
        "missing": [name for name in iiet.__all__ if not hasattr(iiet, name)],
        "losses": losses,
        "influences": [len(row) for row in table.value_rows],
        "distillation": distilled.item(),
        "generated": list(teacher.generate(tokens[:1, :4], max_new_tokens=3).shape),
        "load": message_of(iiet.Decoder.from_pretrained, folder),
        "file": iiet.__file__,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
