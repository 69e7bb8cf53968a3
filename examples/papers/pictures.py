"""What the studies' pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

from demo.plot import LAYER_COLORS, STYLE
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#000000", *LAYER_COLORS)


def new_figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    """Make a figure of so many panels side by side."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, panels, figsize=(4.4 * panels, 3.4), layout="constrained", squeeze=False
        )
    return figure, list(axes[0])
