"""Pictures of runs: curves, bars with intervals, shares of a whole. Used by report.py and scripts/compare.py.

Each is drawn once by matplotlib and saved as PNG and as SVG, which takes colours (light or dark) and font from the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.metrics import thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours as drawn; in a page, CSS variables replace them (templates/page.css has their light and dark values).
COLORS = ("#2b6cb0", "#c2560c", "#2f855a", "#8b46c1", "#c53030", "#0f7c86", "#a16207", "#b83280")
TEXT, SOFT, LINE = "#1d2430", "#667085", "#dfe3ea"
VARIABLES = {TEXT: "text", SOFT: "soft", LINE: "line"} | {color: f"c{i}" for i, color in enumerate(COLORS)}
DASHES = ("-", "--", ":", "-.")
PANEL, WIDE = 4.6, 9.4  # inches: one of two columns of a page, and both
MAX_POINTS = 800  # in a curve: more than a page shows


@dataclass
class Curve:
    """A line of a panel. raw: the unsmoothed values, drawn faint behind; dots: for the few points of an evaluation."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    raw: Sequence[float] | None = None
    dots: bool = False
    color: int | None = None  # index of the colour; None: by position in the panel
    dashes: int = 0  # index of DASHES, to tell curves of one colour apart


@dataclass
class Panel:
    """One set of axes. from_zero: the axis shows 0; share: (values per 100%, label) of a second axis on the right."""

    title: str
    curves: list[Curve]
    x_label: str = "step"
    from_zero: bool = False
    share: tuple[float, str] | None = None


@dataclass
class Bar:
    """A value with its 95% interval, and what guessing gives."""

    label: str
    value: float
    low: float
    high: float
    baseline: float | None = None
    color: int = 0


def draw_panel(panel: Panel) -> Figure:
    from matplotlib.ticker import EngFormatter

    figure = _figure(PANEL, 2.9)
    axis = figure.subplots()
    lines: list[Any] = []
    for place, curve in enumerate(panel.curves):
        color = _color(place if curve.color is None else curve.color)
        kept = thinned(len(curve.x), MAX_POINTS)
        x = [curve.x[i] for i in kept]
        if curve.raw is not None:
            axis.plot(x, [curve.raw[i] for i in kept], color=color, linewidth=0.7, alpha=0.3)
        style: dict[str, Any] = {"marker": "o", "markersize": 3.5} if curve.dots or len(x) == 1 else {}
        style["linestyle"] = DASHES[curve.dashes % len(DASHES)]
        lines += axis.plot(x, [curve.y[i] for i in kept], color=color, linewidth=1.6, **style)
    _set_title(axis, panel.title)
    axis.set_xlabel(panel.x_label)
    axis.grid(color=LINE, linewidth=0.8)
    values = sorted(y for curve in panel.curves for y in curve.y)
    if max(x for curve in panel.curves for x in curve.x) >= 1e5:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2.5M
    if values[-1] >= 1e4:
        axis.yaxis.set_major_formatter("{x:,.0f}")
    if panel.from_zero:
        low, high = min(0.0, values[0]), max(0.0, values[-1])  # rewards may be negative
        axis.set_ylim((1.12 * low, 1.12 * high) if high > low else (0, 1))
    elif len(values) > 50 and not panel.curves[0].dots:  # the steep fall of the first steps would hide the rest
        low, high = values[0], values[int(0.97 * (len(values) - 1))]
        margin = 0.08 * (high - low) or 0.1
        axis.set_ylim(low - 2 * margin, high + 2 * margin)
    if panel.share is not None:
        whole, label = panel.share
        to_and_from_share: Any = (lambda v: 100 * v / whole, lambda v: v * whole / 100)  # arrays
        right = axis.secondary_yaxis("right", functions=to_and_from_share)
        right.set_ylabel(label)
        right.spines["right"].set_visible(False)
    _finish(axis)
    if len(panel.curves) > 1:
        _add_legend(axis, lines, [curve.label for curve in panel.curves], fontsize=8)
    return figure


def draw_bars(title: str, bars: Sequence[Bar], percent: bool = True, names: Sequence[str] = ()) -> Figure:
    """Bars from top to bottom in their order, each with its interval; a tick marks what guessing gives.

    names: the legend, by index of the colour.
    """
    figure = _figure(WIDE, 0.75 + 0.27 * len(bars) + 0.25 * bool(names))
    axis = figure.subplots()
    places = range(len(bars) - 1, -1, -1)
    scale = 100 if percent else 1
    errors = [[scale * max(0.0, b.value - b.low) for b in bars], [scale * max(0.0, b.high - b.value) for b in bars]]
    axis.barh(
        places, [scale * b.value for b in bars], height=0.62, color=[_color(b.color) for b in bars], alpha=0.55,
        xerr=errors, error_kw={"ecolor": TEXT, "elinewidth": 1, "capsize": 2.5},
    )  # fmt: skip
    guessed = [(place, scale * b.baseline) for place, b in zip(places, bars, strict=True) if b.baseline]
    if guessed:
        axis.scatter([v for _, v in guessed], [p for p, _ in guessed], marker="|", s=110, color=COLORS[1], zorder=3)
    axis.axvline(0, color=SOFT, linewidth=0.8)
    axis.set_yticks(list(places), [b.label for b in bars])
    _set_title(axis, title + (" (across a bar: what guessing gives)" if guessed else ""))
    axis.set_ylim(-0.7, len(bars) - 0.3)
    if percent:
        axis.set_xlim(0, 100 if max(b.high for b in bars) > 0.5 else None)
        axis.xaxis.set_major_formatter("{x:g}%")
    axis.grid(axis="x", color=LINE, linewidth=0.8)
    _finish(axis)
    axis.tick_params(axis="y", length=0, labelcolor=TEXT)
    if names:
        from matplotlib.patches import Patch

        _legend_below(figure, [Patch(color=_color(number), alpha=0.55) for number in range(len(names))], names)
    return figure


def draw_shares(title: str, wholes: Mapping[str, Mapping[str, float]]) -> Figure:
    """One bar across the picture for each whole, {part: size} by its label; a part has the same colour in all bars."""
    figure = _figure(WIDE, 1.15 + 0.42 * len(wholes))
    axis = figure.subplots()
    bars: list[Any] = []
    names = list(dict.fromkeys(name for parts in wholes.values() for name, value in parts.items() if value))
    places = range(len(wholes) - 1, -1, -1)
    starts = [0.0] * len(wholes)
    for number, name in enumerate(names):
        color = _color(number)
        widths = [100 * parts.get(name, 0) / sum(parts.values()) for parts in wholes.values()]
        bars.append(axis.barh(places, widths, left=starts, height=0.62, color=color, alpha=0.75))
        for place, start, width in zip(places, starts, widths, strict=True):
            if width >= 5:
                axis.text(start + width / 2, place, f"{width:.0f}%", ha="center", va="center", fontsize=8, color=TEXT)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.set_yticks(list(places), list(wholes))
    axis.set_xlim(0, 100)
    _set_title(axis, title)
    _finish(axis)
    axis.spines[:].set_visible(False)
    axis.tick_params(axis="y", length=0, labelcolor=TEXT)
    axis.set_xticks([])
    _legend_below(figure, bars, names)
    return figure


def to_svg(figure: Figure, description: str) -> str:
    """An <svg> for a page that defines the variables of page.css; on its own, it has light colours.

    Pictures on one page need different descriptions, because the ids of their parts are derived from them.
    """
    import matplotlib

    text = io.StringIO()
    # Keep text as text, so that it has the page's font and can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        _save(figure, text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # these ids repeat between pictures
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for color, name in VARIABLES.items():
        svg = svg.replace(f": {color}", f": var(--{name}, {color})")
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save_png(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path, dpi=150)


def _figure(width: float, height: float) -> Figure:
    """A figure made without pyplot, which keeps every figure and chooses a window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend_below(figure: Figure, handles: list[Any], names: Sequence[str]) -> None:
    _add_legend(figure, handles, names, loc="outside lower center", ncols=4, fontsize=8.5)


def _add_legend(owner: Axes | Figure, handles: list[Any], names: Sequence[str], **layout: Any) -> None:
    """A legend of any names: those that begin with _ would be left out if matplotlib saw them as labels."""
    legend = owner.legend(handles, [""] * len(handles), frameon=False, labelcolor=TEXT, **layout)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _save(figure: Figure, target: Any, **how: Any) -> None:
    """Draw it with each text as it stands: $ is a character, not the beginning of a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(target, **how)
    figure.set_layout_engine("none")  # its parts have their places now: finding these takes a third of the time


def _set_title(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9.5, color=TEXT, fontweight="bold")


def _finish(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[:].set_color(LINE)
    axis.tick_params(labelsize=8.5, labelcolor=SOFT, color=LINE)
    axis.xaxis.label.set(fontsize=8.5, color=SOFT)
    for child in axis.child_axes:  # the second axis
        child.tick_params(labelsize=8.5, labelcolor=SOFT, color=LINE)
        child.yaxis.label.set(fontsize=8.5, color=SOFT)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]
