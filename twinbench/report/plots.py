"""Tables -> figures. Drawn on ``Figure`` itself, without pyplot: no window, no global state, the same bytes each time.

Laid out by hand in inches, which draws twice as fast as a layout engine. Colours are Okabe and Ito's, which the
colour-blind tell apart, and every mark is named beside it.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from twinbench.records.record import LOWER, UPPER

DPI = 144
INK, MUTED, LINE, MISSING = "#1f2328", "#6a737d", "#d8dee4", "#eef0f2"
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4b9a", "#8c6d31")
MARKERS = "os^Dv"
REFERENCE = "#d55e00"
BLUES = LinearSegmentedColormap.from_list("blues", ["#f3f7fb", "#a9cbe8", "#3d85c0", "#0b3c6f"])
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: small files, and it can be searched and read out
}
NARROWEST = 5.0  # inches: below it a title would not fit
CHARACTER, LINE_HEIGHT = 0.072, 0.145  # inches: a wide letter and a line of text at the font size above
WIDE = 3  # ratio of storage sizes from which on their axis is logarithmic
CROWD = 12  # points whose labels still find room beside each other
Styles = Mapping[str, tuple[str, str]]  # method -> (colour, marker)


def styles(roles: Mapping[str, str | None], reference: str) -> dict[str, tuple[str, str]]:
    """A colour and a marker per method name, to be given to every figure that shows them.

    Args:
        roles: method name -> its role.
    """
    bounds = {name: (MUTED, "s" if role == UPPER else "o") for name, role in roles.items() if role in (UPPER, LOWER)}
    names = sorted(roles.keys() - bounds.keys() - {reference})
    found = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    return bounds | found | {reference: (REFERENCE, "o")}


def render(figure: Figure, name: str) -> dict[str, bytes]:
    """The figure's ``svg`` and ``png`` files; ``name`` seeds the ids inside the SVG."""
    svg, png = BytesIO(), BytesIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    return {"svg": svg.getvalue(), "png": png.getvalue()}


@mpl.rc_context(STYLE)
def heat(
    values: pd.DataFrame,
    share: np.ndarray,
    title: str,
    subtitle: str,
    *,
    apart: int = 0,
    axes: tuple[str, str] = ("", ""),
) -> Figure:
    """A table of numbers, one decimal each, shaded by ``share`` in [0, 1] (same shape; NaN = grey).

    Args:
        apart: how many last columns stand apart (averages beside tasks).
        axes: names of the rows' and the columns' axis; where a row and a column share a name the cell is framed.
    """
    rows, heads = [_wrapped(name, 44) for name in values.index], [_wrapped(name, 11, " _") for name in values.columns]
    cell = max(0.62, 0.12 + CHARACTER * max(map(_width, heads)))
    heights = 0.14 + LINE_HEIGHT * np.array([row.count("\n") + 1 for row in rows])
    edges = np.concatenate([[0], np.cumsum(heights)])
    lefts = cell * np.arange(len(heads)) + 0.1 * (np.arange(len(heads)) >= len(heads) - apart)
    top = 0.68 + LINE_HEIGHT * (max(head.count("\n") for head in heads) + 1 + bool(axes[1]))
    left = 0.3 + CHARACTER * max(map(_width, rows)) + 0.2 * bool(axes[0])
    figure, ax = _axes((lefts[-1] + cell, edges[-1]), (left, 0.15, 0.15, top), title, subtitle)
    ax.set(xlim=(0, lefts[-1] + cell), ylim=(edges[-1], 0))
    ax.spines[:].set_visible(False)
    for i, j in np.ndindex(values.shape):
        value, shade = values.iat[i, j], share[i, j]
        colour = MISSING if np.isnan(value) or np.isnan(shade) else BLUES(float(np.clip(shade, 0, 1)))
        framed = bool(axes[0]) and values.index[i] == values.columns[j]
        corner, size = (lefts[j] + 0.02, edges[i] + 0.02), (cell - 0.04, heights[i] - 0.04)
        ax.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor=REFERENCE if framed else "none", lw=1.6))
        ink = "white" if shade > 0.64 and not np.isnan(value) else INK
        text = "–" if np.isnan(value) else f"{value:.1f}"
        ax.text(lefts[j] + cell / 2, edges[i] + heights[i] / 2, text, color=ink, ha="center", va="center_baseline")
    ax.set_xticks(lefts + cell / 2, heads)
    ax.set_yticks(edges[:-1] + heights / 2, rows)
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    _name_axes(figure, ax, axes)
    return figure


@mpl.rc_context(STYLE)
def averages(table: pd.DataFrame, methods: Mapping[str, str], marks: Styles, title: str, subtitle: str) -> Figure:
    """Average normalized score with its 95 % interval, one line per row of the normalized table that has an average.

    Args:
        methods: the method of each label.
    """
    table = table[table["average"].notna()]
    rows = [_wrapped(name, 44) for name in table["method"]]
    heights = 0.12 + LINE_HEIGHT * np.array([row.count("\n") + 1 for row in rows])
    middles = np.cumsum(heights) - heights / 2
    left = 0.3 + CHARACTER * max(map(_width, rows))
    figure, ax = _axes((5.2, heights.sum()), (left, 0.75, 0.5, 0.72), title, subtitle)
    low, high = table["average_low"].fillna(table["average"]), table["average_high"].fillna(table["average"])
    pad = 0.04 * max(high.max() - low.min(), 5)
    ax.set(xlim=(low.min() - pad, high.max() + pad), ylim=(heights.sum(), 0), xlabel="average normalized score (%)")
    for role in table.loc[table["role"] != "", "average"]:
        ax.axvline(role, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    for y, (_, row), start, end in zip(middles, table.iterrows(), low, high, strict=True):
        colour, marker = marks[methods[row["method"]]]
        ax.hlines(y, start, end, color=colour, lw=2.2, alpha=0.45)
        ax.plot(row["average"], y, marker, color=colour, markersize=6.5, markeredgecolor="white", markeredgewidth=0.7)
        ax.text(1.02, y, f"{row['average']:.1f}", transform=ax.get_yaxis_transform(), va="center_baseline")
    ax.set_yticks(middles, rows)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def curves(
    table: pd.DataFrame,
    setting: str,
    bounds: Iterable[float],
    methods: Mapping[str, str],
    marks: Styles,
    title: str,
    subtitle: str,
) -> Figure:
    """Average normalized score against a setting, a line per curve, with its interval.

    Args:
        table: columns curve, value, average, average_low, average_high.
        bounds: averages drawn as dashed lines.
        methods: the method of each curve.
    """
    figure, ax = _axes((5.6, 3.8), (0.75, 0.3, 0.6, 0.72), title, subtitle)
    for bound in bounds:
        ax.axhline(bound, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    shades = list(dict.fromkeys(methods[name] for name in table["curve"]))
    for number, (name, curve) in enumerate(table.groupby("curve", sort=False)):
        colour, marker = marks[methods[name]]
        if len(shades) < table["curve"].nunique():  # several curves of one method
            colour = COLOURS[number % len(COLOURS)]
        ax.fill_between(curve["value"], curve["average_low"], curve["average_high"], color=colour, alpha=0.15, lw=0)
        ax.plot(curve["value"], curve["average"], color=colour, marker=marker, markersize=5, label=name)
    values = np.unique(table["value"])
    if values[0] > 0 and values[-1] / values[0] >= 20:
        ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)
    ax.set(xlabel=setting, ylabel="average normalized score (%)")
    ax.grid(color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=7.5)
    return figure


@mpl.rc_context(STYLE)
def storage(points: pd.DataFrame, methods: Mapping[str, str], marks: Styles, title: str, subtitle: str) -> Figure:
    """Average normalized score over total storage.

    Of many points, those that no other beats have a name. The others have one where it fits.

    Args:
        points: columns rank (None for the bounds), method, average (%) and total (bytes), without NaN.
        methods: the method of each label.
    """
    figure, ax = _axes((7.4, 5.0), (0.75, 0.3, 0.55, 0.72), title, subtitle)
    sizes, scores = points["total"].to_numpy() / 1e6, points["average"].to_numpy()
    pad = 0.07 * max(np.ptp(scores), 5)
    span, scale = sizes.max() / sizes.min(), ""
    if span > WIDE:
        scale = ", log scale"
        ax.set_xscale("log")
        ax.set_xlim(sizes.min() / span**0.06, sizes.max() * span**0.22)
        steps = np.outer(10.0 ** np.arange(-3, 8), [1, 1.5, 2, 3, 5, 7]).ravel()
        ticks = [step for step in steps if ax.get_xlim()[0] < step < ax.get_xlim()[1]]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    else:
        room = max(np.ptp(sizes), 0.1 * sizes.max())
        ax.set_xlim(sizes.min() - 0.06 * room, sizes.max() + 0.3 * room)
    ax.set_ylim(scores.min() - pad, scores.max() + 1.6 * pad)
    ax.set(xlabel=f"storage, all parts (MB{scale})", ylabel="average normalized score (%)")
    ax.grid(color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    for label, x, y in zip(points["method"], sizes, scores, strict=True):
        colour, marker = marks[methods[label]]
        ax.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white", markeredgewidth=0.7, zorder=3)
    told = best(sizes, scores) | points["rank"].isna().to_numpy() | (len(points) <= CROWD)
    _label_points(ax, [_wrapped(name, 46) for name in points["method"]], sizes, scores, told)
    return figure


def best(sizes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which points no other is as small and as good as, and better in one of the two; (n,) of truth values."""
    small, good = sizes[:, None] >= sizes, scores[:, None] <= scores
    return ~(small & good & ((sizes[:, None] > sizes) | (scores[:, None] < scores))).any(1)


def _label_points(ax, names: list[str], xs: np.ndarray, ys: np.ndarray, told: np.ndarray) -> None:
    """Write names beside their points, those of ``told`` first, moved up or down until they cover nothing else.

    A thin line leads to a name that was moved. A name that is not of ``told`` is left out where it would have to move.
    """
    size = 7.5
    letter, line = CHARACTER * DPI * size / 8.5, LINE_HEIGHT * DPI * size / 8.5
    centres = ax.transData.transform(np.column_stack([xs, ys]))
    taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in centres]
    frame, back = ax.get_window_extent(), ax.transData.inverted()
    for index in np.lexsort([-ys, ~told]):
        x, y = centres[index]
        width, height = letter * _width(names[index]), line * (names[index].count("\n") + 1)
        shifts = sorted(np.arange(-40, 41) * line / 2, key=lambda shift: (abs(shift), shift))
        boxes = [
            (start, y + shift - height / 2, start + width, y + shift + height / 2)
            for shift in shifts
            for start in ([x + 16, x - 16 - width] if abs(shift) < 2 * line else [x + 30, x - 30 - width])
        ]
        inside = [box for box in boxes if _inside(box, (frame.x0, frame.y0, ax.figure.bbox.x1, frame.y1))]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        box = free[0] if free else boxes[0]
        middle, anchor = (box[1] + box[3]) / 2, box[0] if box[0] > x else box[2]
        if not told[index] and (not free or abs(middle - y) > line / 3):
            continue
        taken.append(box)
        place = back.transform((anchor, middle))
        ax.text(*place, names[index], size=size, ha="left" if box[0] > x else "right", va="center", linespacing=1.0)
        if abs(middle - y) > line / 3:
            start, end = back.transform((x, y)), back.transform((anchor - 3 * np.sign(anchor - x), middle))
            ax.plot([start[0], end[0]], [start[1], end[1]], color=MUTED, lw=0.5, zorder=1)


def _inside(a: tuple, b: tuple) -> bool:
    return b[0] < a[0] and b[1] < a[1] and a[2] < b[2] and a[3] < b[3]


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def titled(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure under its two lines of title, in inches; every further line of the subtitle makes it higher."""
    width = max(width, NARROWEST)
    subtitle = textwrap.fill(subtitle, int((width - 0.3) / CHARACTER))
    height += LINE_HEIGHT * subtitle.count("\n")
    figure = Figure((width, height), dpi=DPI)
    figure.text(0.15 / width, 1 - 0.13 / height, title, size=11, weight="bold", va="top")
    figure.text(0.15 / width, 1 - 0.36 / height, subtitle, color=MUTED, va="top")
    return figure


def _axes(size: tuple[float, float], margins: tuple[float, float, float, float], title: str, subtitle: str) -> tuple:
    """A figure with its two lines of title and one set of axes.

    Args:
        size: width and height of the axes, in inches.
        margins: room to their left, to their right, under and above them, in inches.
    """
    (width, height), (left, right, bottom, top) = size, margins
    figure = titled(left + width + right, height + top + bottom, title, subtitle)
    full = figure.get_size_inches()
    return figure, figure.add_axes([left / full[0], bottom / full[1], width / full[0], height / full[1]])


def _name_axes(figure: Figure, ax, names: tuple[str, str]) -> None:
    if names[0]:
        ax.set_ylabel(names[0], color=MUTED)
        ax.set_xlabel(names[1], color=MUTED)
        ax.xaxis.set_label_position("top")


def _wrapped(label: str, width: int, after: str = " ") -> str:
    """``label`` in lines of about ``width`` characters, broken only behind a character of ``after``."""
    lines = [""]
    for piece in re.split(f"(?<=[{after}])", label):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))
