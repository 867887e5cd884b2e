"""Names of the methods and influence metrics, known without importing PyTorch.

Their classes are in `iiet.methods.METHODS` and `iiet.influence_metrics.INFLUENCE_METRICS`.
"""

from __future__ import annotations

from iiet.extensions import ExtensionNames

__all__ = ["INFLUENCE_METRIC_NAMES", "METHOD_NAMES"]

METHOD_NAMES = ExtensionNames(
    "iiet.methods",
    "method",
    (
        *("vanilla", "iiet", "pcformer", "pcformer_rk4"),
        *("ode_rk2", "ode_rk4", "ode_rk2_gated", "looped"),
    ),
)
INFLUENCE_METRIC_NAMES = ExtensionNames(
    "iiet.influence_metrics", "influence metric", ("cosine", "relative", "loss")
)
