"""Spectral radius of each layer's correction, compared with the measured contraction factor.

    python examples/spectral_radius.py                          a small IIET with random weights
    python examples/spectral_radius.py FOLDER --text FILE       a checkpoint, on a text

A layer of an IIET iterates towards a fixed point: it replaces its estimate e by g(e), or by
`e + damping (g(e) - e)`. Close to the fixed point, each step multiplies the error by the Jacobian
of that map. The iteration converges if the Jacobian's spectral radius (the absolute value of its
largest eigenvalue) is below 1; in the long run, the error shrinks by this factor per step. The
factor measured over a few steps (`influence_table(...).contractions`) may be larger or smaller: the
map is not linear, and its Jacobian is far from normal, because tokens attend to all earlier ones.

The Jacobian of T tokens has (T dim)^2 entries and is never built: one product with it costs one
backward pass through the layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from iiet import METHODS, Decoder, influence_table, plain_formulas, preset
from iiet.methods import Evaluation

Step = Callable[[Tensor], Tensor]


def correction_maps(decoder: Decoder, input_ids: Tensor) -> dict[int, tuple[Step, Tensor]]:
    """Return the map that each correcting layer iterates, and the estimate that it ends with.

    Args:
        decoder: an IIET.
        input_ids: (batch, time).

    Returns:
        By layer, the first being 0: the map of (batch, time, dim), and a point of it.
    """
    inputs = {}
    last = {}

    def note_inputs(layer: torch.nn.Module, arguments: tuple) -> None:
        inputs[layer.index] = (layer, *arguments)

    def observe(seen: Evaluation) -> None:
        if seen.residual is not None:
            last[seen.layer] = (
                seen.estimate - seen.residual
            )  # What the last correction starts from.

    hooks = [layer.register_forward_pre_hook(note_inputs) for layer in decoder.model.layers]
    maps = {}
    with torch.no_grad(), plain_formulas():
        decoder(input_ids, observe=observe, last_only=True)
        for number, estimate in last.items():
            step = correction_map(*inputs[number])
            maps[number] = (step, step(estimate))
    for hook in hooks:
        hook.remove()
    return maps


def correction_map(layer, hidden, state, call) -> Step:
    """Return the map that a layer iterates, as `iiet.methods.implicit_euler` writes it.

    Args:
        layer: the layer; the other arguments are those of its call.
        hidden: the hidden state of the layer before, (batch, time, dim).
        state: the earlier estimates.
        call: what all evaluations share.
    """
    point_sum, _ = layer.mix.sums(state.estimates, corrects=True)
    if layer.reinjection is not None:
        prediction = layer.prediction_norm(layer.field(hidden, call.context))
        point_sum = point_sum.with_term(layer.reinjection, prediction)
    damping = layer.options.damping if layer.damping is None else layer.damping

    def step(estimate: Tensor) -> Tensor:
        output = layer.field(point_sum.plus(estimate, hidden.dtype), call.context)
        return estimate + damping * (layer.correction_norm(output) - estimate)

    return step


def spectral_radius(step: Step, point: Tensor, *, num_products: int = 50) -> float:
    """Estimate the spectral radius of a map's Jacobian at a point.

    This is Arnoldi's iteration: power iteration that keeps orthonormal vectors and takes the
    largest eigenvalue of the Jacobian restricted to them. Power iteration alone does not converge
    if the largest eigenvalues are a complex pair, as they usually are here.

    Args:
        step: the map, from tensors of the point's shape to the same shape.
        point: where to take the Jacobian.
        num_products: products with the Jacobian; more are more exact.
    """
    num_products = min(num_products, point.numel())
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(point.numel(), generator=generator).to(point)
    basis = [start / start.norm()]
    matrix = point.new_zeros(num_products + 1, num_products)
    with plain_formulas():
        _, product = torch.func.vjp(step, point)  # The transpose has the same eigenvalues.
        for n in range(num_products):
            vector = product(basis[n].view_as(point))[0].flatten()
            vectors = torch.stack(basis)
            for _ in range(2):  # Once is not exact enough in floating point.
                shares = vectors @ vector
                vector = vector - shares @ vectors
                matrix[: n + 1, n] += shares
            matrix[n + 1, n] = vector.norm()
            if matrix[n + 1, n] < 1e-6 * matrix[:, n].norm():  # No new direction is left.
                num_products = n + 1
                break
            basis.append(vector / matrix[n + 1, n])
    return torch.linalg.eigvals(matrix[:num_products, :num_products]).abs().max().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, one row per layer."""
    parser = argparse.ArgumentParser(description="Spectral radius of each layer's correction.")
    parser.add_argument("folder", nargs="?", type=Path, help="checkpoint folder")
    parser.add_argument("--preset", default="tiny", help="random weights of this size, without one")
    parser.add_argument("--text", type=Path, help="text file; random tokens are used without one")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the sequence")
    parser.add_argument("--products", type=int, default=50, help="products with the Jacobian")
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    if chosen.folder:
        decoder = Decoder.from_pretrained(chosen.folder, dtype=torch.float32)
    else:
        decoder = Decoder(preset(chosen.preset))
    decoder.requires_grad_(False)
    config = decoder.config
    method = METHODS[config.method]
    if method.facts.repeats_stack or not decoder.schedule.num_corrections:
        parser.error(
            f"the model ({config.method}) makes no corrections of single layers; take an IIET with "
            "r >= 1"
        )
    num_tokens = min(chosen.tokens, config.context_length)
    if chosen.text is None:
        input_ids = torch.randint(config.vocab_size, (1, num_tokens))
    else:
        if chosen.folder is None:
            parser.error("--text needs a checkpoint folder, for its tokenizer")
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(chosen.folder / "tokenizer.json"))
        ids = tokenizer.encode(chosen.text.read_text(encoding="utf-8")).ids
        input_ids = torch.tensor([ids[:num_tokens]])

    contractions = influence_table(decoder, input_ids).contractions
    maps = correction_maps(decoder, input_ids)
    print(f"iteration schedule {decoder.schedule}, {input_ids.numel()} tokens")
    print("layer  spectral radius  contraction factor")
    for layer in range(config.num_layers):
        if layer in maps:
            radius = spectral_radius(*maps[layer], num_products=chosen.products)
            print(f"{layer + 1:5}  {radius:15.3f}  {contractions[layer]:18.3f}")
        else:
            print(f"{layer + 1:5}  {'no corrections':>15}")


if __name__ == "__main__":
    main()
