"""Colors of charts, pages and runs in MLflow.

They are Okabe and Ito's, which color-blind readers can distinguish.
"""

from __future__ import annotations

import colorsys
from zlib import crc32

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PINK = "#CC79A7"
SKY = "#56B4E9"
INK = "#1c1c1c"
GRAY = "#757575"
FRAME = "#bbbbbb"
GRID = "#e6e6e6"
BACKGROUND = "#ffffff"
"""What a chart stands on, which shows inside of hollow marks and around names."""
DARK_COLORS = {
    BLUE: "#4aa3df",
    INK: "#e8e6e3",
    GRAY: "#a3a3a3",
    FRAME: "#5c6066",
    GRID: "#33373d",
    BACKGROUND: "#16181c",
}
"""Color -> what a page replaces it by in dark mode, in a chart's JSON."""
SERIES_COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)


def run_color(role: str, name: str, share: float) -> str:
    """Return the color of a model in MLflow, which else gives two models of a sweep the same one.

    The teacher is orange, as its star in charts. Trials go from cyan to violet with their cost, and
    trials of equal cost differ by their names. Baselines lie between purple and red, by name.

    Args:
        role: Of the trial.
        name: Of the model; its seeds have one.
        share: NFE, as a share of the full model's.
    """
    if role == "teacher":
        return ORANGE
    varied = crc32(name.encode()) / 2**32
    if role == "trial":
        hue = 185 + 85 * min(share, 1.0)
        lightness = 0.35 + 0.25 * varied
    else:
        hue = 290 + 85 * varied
        lightness = 0.4 + 0.2 * (varied * 1000 % 1)
    channels = colorsys.hls_to_rgb(hue % 360 / 360, lightness, 0.75)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
