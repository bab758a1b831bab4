"""Draws charts as SVG text: curves, bars, and a heat map of ranks and steps. The page that shows them needs no scripts and no
network access. Pure.

Colours are CSS classes of the page (s0, s1, ...), with one set for light and one for dark screens. Readers with colour vision
deficiency can distinguish the colours, and curves also differ in their dashes. Values are in <title> elements, which browsers
show as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250  # size of a chart in SVG units
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 40  # margins of a chart
MOST_POINTS = 240  # maximum number of points per curve; more points would not be visible
MOST_COLUMNS = 96  # maximum number of columns of a heat map


@dataclass(frozen=True)
class Curve:
    """A curve of a chart. Its points are in ascending order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False  # whether each point is drawn as a dot, for curves with few points


def short(value: float) -> str:
    """Format a number for an axis, for example 12.5 k, 3 M or 0.002. Pure."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a time in seconds, for example as 0.25 ms, 12.3 s, 4 min 10 s or 3 h 05 min. Pure."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600:,} h {int(seconds) // 60 % 60:02d} min"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, for the ticks of an axis. Pure."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Reduce a curve to at most `most` points. A new point replaces several points. Its y is the mean of their y. The first
    and the last x stay the same. Pure."""
    if len(points) <= most:
        return list(points)
    found = []
    for i in range(most):
        part = points[i * len(points) // most : (i + 1) * len(points) // most]
        found.append((part[0][0] if i == 0 else part[-1][0], math.fsum(y for _, y in part) / len(part)))
    return found


def svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    """Return an SVG element with the given size and content. label: text for screen readers. body: the elements inside. Pure."""
    return (f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}" '
            f'style="max-width:{width:g}px">{"".join(body)}</svg>')


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """Return an SVG text element at (x, y). kind: its CSS class. anchor: its text-anchor. Pure."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def curves(
    title: str, lines: Sequence[Curve], x_name: str, y_name: str, x_format: Callable[[float], str] = short,
    y_format: Callable[[float], str] = short, zero: bool = False, x_ticks: Sequence[float] = (),
) -> str:
    """Return HTML with a chart of curves, or "" if no curve has a point. zero: whether the y axis begins at 0. x_ticks: positions
    of the ticks on the x axis. By default, they are round numbers. Pure."""
    lines = [
        Curve(line.name, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)], line.dots) for line in lines
    ]
    everything = [point for line in lines for point in line.points]
    if not everything:
        return ""
    drawn = [(line, thinned(line.points)) for line in lines]
    xs = [x for x, _ in everything]
    ys = [y for _, points in drawn for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), 0.0 if zero else min(ys), max(ys)
    x1 = x1 if x1 > x0 else x0 + 1
    margin = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1.0
    y0, y1 = (0.0 if zero else y0 - margin), y1 + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))

    body = []
    for value in ticks(y0, y1):
        y = place(x0, value)[1]
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(text(LEFT - 6, y + 4, y_format(value), "tick", "end"))
    for value in x_ticks or ticks(x0, x1):
        x = place(value, y0)[0]
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" class="axis"/>')
        body.append(text(x, HEIGHT - BOTTOM + 16, x_format(value), "tick", "middle"))
    body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" class="axis"/>')
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, "name", "middle"))
    body.append(text(4, 14, y_name, "name"))
    for i, (line, points) in enumerate(drawn):
        placed = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        if len(placed) > 1:
            body.append(f'<polyline points="{path}" class="line s{i % 8}"/>')
        few = line.dots or len(placed) == 1
        for (x, y), (real_x, real_y) in zip(placed, points, strict=True):
            shown = y_format(real_y) if y_format is not short else f"{real_y:.5g}"
            tooltip = escape(f"{line.name}: {shown} at {x_format(real_x)}")
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if few else 5}" class="{"dot" if few else "hover"} s{i % 8}">'
                        f"<title>{tooltip}</title></circle>")
    named = [(i, line) for i, (line, points) in enumerate(drawn) if points]
    return figure(title, svg(WIDTH, HEIGHT, f"{title}: {y_name} against {x_name}", body),
                  legend([(f"s{i % 8}", line.name) for i, line in named]) if len(named) > 1 else "")


def legend(entries: Sequence[tuple[str, str]], kind: str = "line") -> str:
    """Return HTML for a legend. entries: (CSS class of the colour, name). kind: "line" or "bar". Pure."""
    marks = {
        "line": '<line x1="1" x2="25" y1="6" y2="6" class="line {0}"/>',
        "bar": '<rect width="12" height="12" class="bar {0}"/>',
    }
    width = 26 if kind == "line" else 12
    return '<ul class="legend">' + "".join(
        f'<li><svg width="{width}" height="12" aria-hidden="true">{marks[kind].format(colour)}</svg>{escape(name)}</li>'
        for colour, name in entries
    ) + "</ul>"


def figure(title: str, picture: str, below: str = "") -> str:
    """Return an HTML figure with a title above `picture`. below: HTML under the picture. Pure."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}{below}</figure>"


def cascade(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """Return a waterfall chart as SVG. rows: (name, start of the bar, end of the bar, label). The start and the end are shares of
    the total time. The first row is the ideal time. Pure."""
    row, left, right, width = 26, 132, 210, 760
    span = width - left - right
    body = []
    for i in range(5):
        x = left + span * i / 4
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{20 + row * len(rows)}" class="grid"/>')
        body.append(text(x, 12, f"{25 * i}%", "tick", "middle"))
    for i, (name, begin, end, label) in enumerate(rows):
        y = 22 + row * i
        body.append(text(left - 8, y + 13, name, "label", "end"))
        kind = "ideal" if i == 0 else "loss"
        body.append(
            f'<rect x="{left + span * begin:.1f}" y="{y}" width="{max(0.8, span * (end - begin)):.1f}" height="{row - 8}" '
            f'class="{kind}"><title>{escape(f"{name}: {label}")}</title></rect>'
        )
        body.append(text(left + span + 10, y + 13, label, "tick"))
    return svg(width, 26 + row * len(rows), "Waterfall: where the time went", body)


def stacks(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], form: Callable[[float], str] = duration) -> str:
    """Return HTML for a chart with one stacked bar per row, and its legend. rows: (name of the bar, sizes of its parts). names:
    the names of the parts. form: formats a size. Pure."""
    row, left, right, width = 22, 120, 90, 760
    longest = max(math.fsum(parts) for _, parts in rows) or 1.0
    span = width - left - right
    body = []
    for i, (name, parts) in enumerate(rows):
        y, x = 4 + row * i, float(left)
        body.append(text(left - 8, y + 12, name, "label", "end"))
        for j, part in enumerate(parts):
            wide = span * part / longest
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, wide):.2f}" height="{row - 6}" class="bar s{j}">'
                        f"<title>{escape(f'{name}, {names[j]}: {form(part)}')}</title></rect>")
            x += wide
        body.append(text(x + 6, y + 12, form(math.fsum(parts)), "tick"))
    return svg(width, 8 + row * len(rows), "Step time by rank", body) + legend(
        [(f"s{j}", name) for j, name in enumerate(names)], "bar"
    )


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[float], form: Callable[[float], str], usual: float
) -> str:
    """Return a heat map as SVG, with one row of cells per rank. The colour of a cell is weakest up to the value `usual`, and
    strongest from twice this value. rows: (name, one value per column). columns: the steps. form: formats a value. Pure."""
    row, left, width = 18, 120, 760
    wide = (width - left - 12) / len(columns)
    body = []
    for i, (name, values) in enumerate(rows):
        y = 4 + row * i
        body.append(text(left - 8, y + 12, name, "label", "end"))
        for j, value in enumerate(values):
            shade = min(1.0, max(0.0, (value / usual - 1.0) if usual else 0.0))
            body.append(
                f'<rect x="{left + wide * j:.2f}" y="{y}" width="{wide + 0.3:.2f}" height="{row - 3}" class="cell" '
                f'style="--shade:{0.08 + 0.92 * shade:.3f}"><title>{escape(f"{name}, step {columns[j]:g}: {form(value)}")}'
                "</title></rect>"
            )
    y = 8 + row * len(rows)
    for value in ticks(columns[0], columns[-1], 8) if len(columns) > 1 else columns:
        at = min(range(len(columns)), key=lambda j: abs(columns[j] - value))
        body.append(text(left + wide * (at + 0.5), y + 10, f"{value:g}", "tick", "middle"))
    body.append(text(left - 8, y + 10, "step", "tick", "end"))
    return svg(width, y + 16, "Compute time by rank and step (a stronger colour means longer than usual)", body)
