"""The figures of the page: a roofline, memory over a step, bars.  Plain SVG, coloured by the page's CSS."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from . import words
from .memory import PARTS
from .report import Diagnosis, Row
from .units import duration, percent, scaled, size

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40
COLUMNS = 240  # of the memory timeline
NAMED = 5  # ops that get their name beside their dot


def _attributes(values: dict[str, object]) -> str:
    return "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(str(v))}"' for k, v in values.items())


def tag(name: str, inside: str = "", **attributes: object) -> str:
    """One element; an attribute's `_` is a `-`."""
    return f"<{name}{_attributes(attributes)}>{inside}</{name}>"


def text(x: float, y: float, words: str, **attributes: object) -> str:
    """Words at a place."""
    return tag("text", escape(words), x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    """A straight line of a class."""
    places = {k: f"{v:.1f}" for k, v in {"x1": x1, "y1": y1, "x2": x2, "y2": y2}.items()}
    return tag("line", **places, class_=cls)


def picture(label: str, inside: str, height: int = HEIGHT) -> str:
    """The whole figure, as wide as its place."""
    return tag("svg", inside, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


class LogAxes:
    """Logarithmic axes of a figure, with a grid line for each power of ten."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = ([math.log10(v) for v in ends] for ends in (x, y))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where (x, y) is drawn."""
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        """Grid, ticks and what the axes are."""
        parts = []
        for power in range(math.ceil(self.x[0]), math.floor(self.x[1]) + 1):
            x, _ = self.place(10.0**power, 10.0 ** self.y[0])
            parts.append(line(x, TOP, x, HEIGHT - BOTTOM, "grid"))
            parts.append(
                text(x, HEIGHT - BOTTOM + 15, f"{10.0**power:g}", class_="tick", text_anchor="middle")
            )
        for power in range(math.ceil(self.y[0]), math.floor(self.y[1]) + 1):
            _, y = self.place(10.0 ** self.x[0], 10.0**power)
            parts.append(line(LEFT, y, WIDTH - RIGHT, y, "grid"))
            parts.append(text(LEFT - 6, y + 4, scaled(10.0**power, ""), class_="tick", text_anchor="end"))
        parts.append(text(WIDTH - RIGHT, HEIGHT - 6, "FLOP a byte", class_="axis", text_anchor="end"))
        parts.append(text(LEFT, TOP - 3, "FLOP/s", class_="axis", text_anchor="middle"))
        return "".join(parts)


def roofline(found: Diagnosis) -> str:
    """Every op that computes, by its intensity and its rate, under the ceilings (Williams et al. 2009)."""
    rows = [row for row in found.rows if row.flops and row.bytes and row.seconds > 1e-4 * found.seconds]
    ceilings, peak = found.profile.ceilings, found.peak_rate
    slow = ceilings.rate(max(ceilings.bandwidth))
    rates = [row.rate for row in rows] or [peak / 100]
    least = 10.0 ** math.floor(math.log10(min(min(rates), peak / 100)))
    low = 10.0 ** math.floor(math.log10(min([row.intensity for row in rows] or [0.1])))
    high = 10.0 ** math.ceil(math.log10(max([row.intensity for row in rows] + [2 * peak / slow])))
    axes = LogAxes((low, high), (least, 2 * peak))
    roofs = [_roof(axes, slow, peak, f"memory {scaled(slow, 'B/s')}", "roof", low, high, least)]
    fast = ceilings.rate(0)
    if not ceilings.cold and fast > 1.5 * slow:
        roofs.insert(
            0, _roof(axes, fast, peak, f"cache {scaled(fast, 'B/s')}", "roof faint", low, high, least)
        )
    _, y = axes.place(high, peak)
    roofs.append(
        text(
            WIDTH - RIGHT, y - 6, f"{found.dtype} {scaled(peak, 'FLOP/s')}", class_="label", text_anchor="end"
        )
    )
    dots = "".join(_dot(axes, row, found) for row in rows)
    return picture("roofline of the ops", axes.grid() + "".join(roofs) + dots + _names(axes, rows))


def _roof(
    axes: LogAxes, bandwidth: float, peak: float, name: str, cls: str, low: float, high: float, least: float
) -> str:
    """The ceiling min(peak, intensity x bandwidth), with the name along its slope."""
    start = max(low, least / bandwidth)
    corners = [(start, start * bandwidth), (peak / bandwidth, peak), (high, peak)]
    places = [axes.place(*corner) for corner in corners]
    path = tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=cls)
    (x1, y1), (x2, y2) = places[:2]
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    x, y = x1 + 0.56 * (x2 - x1), y1 + 0.56 * (y2 - y1)
    turn = f"rotate({angle:.1f} {x:.1f} {y:.1f}) translate(0 -5)"
    return path + text(x, y, name, class_="label", text_anchor="middle", transform=turn)


def _dot(axes: LogAxes, row: Row, found: Diagnosis) -> str:
    x, y = axes.place(row.intensity, row.rate)
    radius = 3 + 22 * math.sqrt(row.seconds / sum(found.walls.values()))
    about = (
        f"{row.op} in {row.module or 'the model'}, {row.phase}: {duration(row.seconds)}, "
        f"{percent(row.ceiling)} of its ceiling, {row.wall}"
    )
    title = tag("title", escape(about))
    return tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", class_=f"dot {row.wall}")


def _names(axes: LogAxes, rows: Sequence[Row]) -> str:
    """Names of the longest ops, in a column at the left of their dots, none over another."""
    longest: dict[str, Row] = {}
    for row in rows:
        longest.setdefault(words.op(row), row)
    places = sorted(
        ((*axes.place(row.intensity, row.rate), name) for name, row in list(longest.items())[:NAMED]),
        key=lambda place: place[1],
    )
    parts, last = [], 0.0
    for x, y, name in places:
        at = max(y + 4, last + 14)
        last = at
        anchor, shift = ("end", -14) if x > WIDTH / 2 else ("start", 14)
        parts.append(text(x + shift, at, name, class_="name", text_anchor=anchor))
    return "".join(parts)


def memory(found: Diagnosis) -> str:
    """Bytes by part over the calls of the step, stacked."""
    columns = _thin(found.timeline)
    top = 1.08 * max(sum(column.values()) for column in columns)
    wide = (WIDTH - LEFT - RIGHT) / max(1, len(columns) - 1)

    def place(i: int, value: float) -> str:
        y = HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)
        return f"{LEFT + i * wide:.1f},{y:.1f}"

    base, layers = [0] * len(columns), []
    for part in PARTS:
        above = [b + column[part] for b, column in zip(base, columns)]
        if above != base:
            there = [place(i, v) for i, v in enumerate(above)]
            back = [place(i, v) for i, v in reversed(list(enumerate(base)))]
            layers.append(tag("polygon", points=" ".join(there + back), class_=f"part {css_class(part)}"))
        base = above
    return picture("memory over the step", _levels(top) + "".join(layers) + _phases(found))


def _thin(timeline: list[dict[str, int]]) -> list[dict[str, int]]:
    """At most COLUMNS columns, each the fullest moment of its calls."""
    if len(timeline) <= COLUMNS:
        return timeline if len(timeline) > 1 else timeline * 2
    edges = [round(i * len(timeline) / COLUMNS) for i in range(COLUMNS + 1)]
    return [max(timeline[a:b], key=lambda column: sum(column.values())) for a, b in pairwise(edges)]


def _levels(top: float) -> str:
    """Grid lines at round sizes."""
    step = 2.0 ** math.floor(math.log2(top / 3))
    parts = []
    for i in range(int(top / step) + 1):
        y = HEIGHT - BOTTOM - i * step / top * (HEIGHT - TOP - BOTTOM)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(text(LEFT - 6, y + 4, size(i * step) if i else "0", class_="tick", text_anchor="end"))
    return "".join(parts)


def _phases(found: Diagnosis) -> str:
    """Where each phase begins."""
    parts, count = [], max(1, len(found.timeline) - 1)
    for phase in ("forward", "backward", "optimizer"):
        if phase in found.phases:
            share = found.phases[phase] / count
            x = LEFT + share * (WIDTH - LEFT - RIGHT)
            parts.append(line(x, TOP, x, HEIGHT - BOTTOM, "phase"))
            late = share > 0.8
            anchor = {"text_anchor": "end"} if late else {}
            parts.append(text(x - 2 if late else x + 2, HEIGHT - BOTTOM + 15, phase, class_="tick", **anchor))
    parts.append(
        text(WIDTH - RIGHT, HEIGHT - 6, "ops of one step, in order", class_="axis", text_anchor="end")
    )
    return "".join(parts)


def css_class(part: str) -> str:
    """ "KV cache" as a CSS class."""
    return part.lower().replace(" ", "-")


def stack(parts: Iterable[tuple[str, float]]) -> str:
    """One bar of parts, each with its CSS class."""
    shares = list(parts)
    total = sum(value for _, value in shares) or 1.0
    bars = (
        tag("span", "", class_=css_class(name), style=f"width:{100 * value / total:.2f}%", title=f"{name}")
        for name, value in shares
        if value
    )
    return tag("div", "".join(bars), class_="stack")
