"""What figures share: colours, panels, legend, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: distinct for every common colour vision, and told apart in grey by marker and line style too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
DOTTED = {"color": "0.4", "lw": 1, "linestyle": (0, (1, 1))}  # of what is not a method
PathLike = str | Path | None


def save_figure(figure: Figure, path: str | Path) -> None:
    """PNG or SVG by the suffix; the same figure gives the same bytes."""
    import matplotlib

    suffix = Path(path).suffix
    if suffix not in (".png", ".svg"):
        raise ValueError(f"Expected a path that ends in .png or .svg, but got {str(path)!r}.")
    with matplotlib.rc_context({"svg.hashsalt": "jeidnn_hf"}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if suffix == ".svg" else None)


def finish(figure: Figure, path: PathLike) -> Figure:
    """One legend below all panels, where it covers nothing; then the file, if it is asked for."""
    from matplotlib.textpath import TextPath

    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    # in points: the text, hinted, and the handle before it
    widths = [1.03 * TextPath((0, 0), text, size=10).get_extents().width + 50 for text in handles]
    for columns in range(len(handles), 0, -1):
        needed = sum(max(part) for part in np.array_split(widths, columns)) / 72
        if needed <= figure.get_figwidth():
            break
    height = figure.get_figheight() + 0.22 * -(-len(handles) // columns)
    figure.set_size_inches(max(needed, figure.get_figwidth()), height)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    if path is not None:
        save_figure(figure, path)
    return figure


def new_panels(count: int, title: str, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, at most three in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "Expected matplotlib for figures, but it is not installed; run `pip install jeidnn-hf[plots]`."
        raise ImportError(message) from error
    columns = min(count, 3)
    rows = -(-count // columns)
    size = (6.4, 4.2) if count == 1 else (4.4 * columns, 3.5 * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title) if title else None
    return figure, grid[:count]


def style_of(i: int) -> tuple[str, str, Any]:
    """Colour, marker and line of the i-th method; colour and marker together repeat after 49."""
    return COLOURS[i % 7], MARKERS[(i + i // 7) % 7], LINES[i % 4]


def nested(i: int, count: int) -> dict[str, float]:
    """The width of the i-th of ``count`` lines that may coincide: the earlier, the wider, so that all are seen."""
    size = 1 + (count - 1 - i) / count
    return {"lw": 1.4 * size, "markersize": 4.5 * size}


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], i: int, label: str | None, **options: Any) -> None:
    colour, marker, line = style_of(i)
    every = max(1, len(x) // 12)
    style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5, "lw": 1.4, **options}
    axes.plot(x, y, label=label, markevery=every, **style)
