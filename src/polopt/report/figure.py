"""Learning curves as a figure: a panel for each method, all with the same axes and with the baseline behind."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polopt.errors import MissingExtraError

OWN, BASELINE = "#0072B2", "#D55E00"
"""Blue and vermilion of Okabe and Ito, which colour-blind people tell apart; the baseline is also dashed."""
_COLUMNS = 7
_PANEL = (1.75, 1.35)
"""Inches."""


def require_matplotlib() -> None:
    """Refuse early what will need figures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            'figures: need matplotlib, which is not installed: pip install "polopt[report]"'
        )


def draw_curves(
    bands: Mapping[str, NDArray[np.float64]],
    methods: Sequence[str],
    baseline: str,
    budget: float,
    unit: str,
    title: str,
    path: Path,
) -> None:
    """Write the figure.

    Args:
        bands: by method, [3, points]: interquartile mean, low and high of the score, at equal distances from nothing to
            the whole budget.
        methods: in the order of the panels; those without a band are left out.
        baseline: method whose curve is repeated in every panel.
        budget: length of the horizontal axis, in units.
        unit: of the budget.
        title: of the figure.
        path: file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [method for method in methods if method in bands]
    columns = min(_COLUMNS, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    size = (max(5.0, columns * _PANEL[0]), rows * _PANEL[1] + 0.8)
    figure = Figure(figsize=size, dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, method in zip(panels.flat, shown, strict=False):
        _draw_panel(panel, bands, method, baseline, budget)
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    caption = f"held-out score: interquartile mean and 95 % interval; dashed: {baseline}"
    figure.suptitle(f"{title}\n{caption}", fontsize=9)
    top = max((band.max() for band in bands.values()), default=1.0) or 1.0
    bottom = min([0.0, *(band.min() for band in bands.values())])
    panels[0, 0].set_ylim(bottom, top + 0.02 * (top - bottom))
    figure.supxlabel(unit, fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def _draw_panel(
    panel: Any, bands: Mapping[str, NDArray[np.float64]], method: str, baseline: str, budget: float
) -> None:
    if baseline in bands and method != baseline:
        mean = bands[baseline][0]
        panel.plot(np.linspace(0, budget, len(mean)), mean, color=BASELINE, linewidth=1, linestyle="--")
    mean, low, high = bands[method]
    used = np.linspace(0, budget, len(mean))
    panel.fill_between(used, low, high, color=OWN, alpha=0.25, linewidth=0)
    panel.plot(used, mean, color=OWN, linewidth=1.4)
    panel.set_title(method, fontsize=8)
    panel.set_xlim(0, budget)
    panel.tick_params(labelsize=6)
    panel.grid(alpha=0.2)
