"""A diagnosis as one HTML page that needs nothing else."""

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path

from .. import __version__
from ..errors import UserError
from . import svg, words
from .memory import PARTS
from .report import CONVENTION, WALLS, Diagnosis, Row
from .svg import tag
from .units import duration, percent, scaled, size


def save(found: Diagnosis, path: str | Path) -> None:
    """Write the page."""
    try:
        Path(path).write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be written to ({error.strerror}); choose another file"
        ) from None


def page(found: Diagnosis) -> str:
    """The whole document."""
    css = (files(__package__) / "page.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(found.name)}: llmkern diagnose</title><style>{css}</style>"
    )
    sections = [_top(found), _measured(found)]
    if found.after is not None:
        sections += [tag("h2", "After swap_", class_="part-title"), _measured(found.after)]
        sections.append(tag("details", tag("summary", "What was swapped") + tag("pre", escape(found.swap))))
    sections += [_remedies(found), _outcomes(found), _notes(found)]
    body = tag("main", "".join(sections))
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def _top(found: Diagnosis) -> str:
    what = (
        f"{found.parameters:,} parameters · {found.mode} step of {found.tokens:,} tokens · {found.dtype} · "
        f"{words.machine(found.profile.about)}"
    )
    return tag(
        "header",
        tag("p", "llmkern diagnose", class_="brand")
        + tag("h1", escape(found.name))
        + tag("p", escape(what), class_="quiet")
        + tag("p", escape(words.headline(found)), class_="headline"),
    )


def _measured(found: Diagnosis) -> str:
    """Figures, walls, both pictures and the ops of one step."""
    figures = tag("figure", tag("figcaption", "Roofline") + svg.roofline(found) + _roofline_words(found))
    figures += tag("figure", tag("figcaption", "Memory") + svg.memory(found) + _memory_words(found))
    return _cards(found) + _walls(found) + tag("div", figures, class_="figures") + _ops(found)


def _cards(found: Diagnosis) -> str:
    facts = words.facts(found)
    energy = facts.pop("energy")
    cards = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", escape(value)), class_="card")
        for name, value in facts.items()
    )
    return tag("dl", cards, class_="cards") + tag("p", f"Energy: {escape(energy)}.", class_="quiet")


def _walls(found: Diagnosis) -> str:
    total = sum(found.walls.values())
    shares = [(wall, found.walls[wall]) for wall in WALLS]
    legend = _legend((wall, f"{percent(s / total)}, {duration(s)}") for wall, s in shares if s > 0)
    return tag("section", tag("h2", "Walls") + svg.stack(shares) + legend)


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = (
        tag("li", tag("i", "", class_=svg.css_class(name)) + f"{escape(name)} {tag('b', escape(value))}")
        for name, value in entries
    )
    return tag("ul", "".join(items), class_="legend")


def _roofline_words(found: Diagnosis) -> str:
    return tag(
        "p",
        "A dot is an op, its area its time, its colour its wall; the lines are what this machine was "
        f"measured to do at best. Starting an op costs {duration(found.profile.launch)}.",
        class_="quiet",
    )


def _memory_words(found: Diagnosis) -> str:
    parts = [(part, size(found.parts[part])) for part in PARTS if found.parts[part]]
    return _legend(parts) + tag(
        "p",
        f"{size(found.peak_bytes)} at the peak, of tensors and what threads keep for kernels.",
        class_="quiet",
    )


def _ops(found: Diagnosis) -> str:
    names = ("op", "time", "share", "wall", "of ceiling", "FLOP a byte", "FLOPs", "bytes", "calls")
    head = tag("tr", "".join(tag("th", name) for name in names))
    shown, rest = found.rows[:14], found.rows[14:]
    table = tag("table", tag("thead", head) + tag("tbody", "".join(_op(row, found) for row in shown)))
    more = ""
    if rest:
        seconds = duration(sum(row.seconds for row in rest))
        body = tag("tbody", "".join(_op(row, found) for row in rest))
        summary = tag("summary", f"{len(rest)} more, {seconds} in all")
        more = tag("details", summary + tag("table", tag("thead", head) + body))
    return tag("section", tag("h2", "Ops, longest first") + table + more)


def _op(row: Row, found: Diagnosis) -> str:
    share = found.share(row.seconds)
    where = f"{row.module or 'outside of modules'} · {row.phase}"
    first = tag("b", escape(words.op(row)), title=row.op) + tag("small", escape(where))
    bar = tag("span", "", class_=f"bar {row.wall}", style=f"width:{min(100.0, 100 * share):.1f}%")
    cells = (
        ("time", duration(row.seconds)),
        ("share", tag("span", bar, class_="track") + percent(share)),
        ("wall", tag("span", row.wall, class_=f"chip {row.wall}")),
        ("of ceiling", words.ceiling(row)),
        ("FLOP a byte", words.intensity(row)),
        ("FLOPs", words.work(row)),
        ("bytes", size(row.bytes)),
        ("calls", str(row.calls)),
    )
    data = "".join(tag("td", value, data_label=name, class_=svg.css_class(name)) for name, value in cells)
    return tag("tr", tag("td", first, class_="op") + data)


def _remedies(found: Diagnosis) -> str:
    if not found.remedies:
        return ""
    items = "".join(
        tag(
            "li",
            tag("div", tag("b", escape(r.name)) + tag("code", escape(r.how)), class_="what")
            + tag("div", f"{r.speedup:.2f} ×" + tag("small", "tokens a second"), class_="gain")
            + tag("div", escape(size(r.peak_bytes)) + tag("small", "peak memory"), class_="gain")
            + tag("p", escape(f"{r.reason}. A step takes {duration(r.seconds)}.")),
        )
        for r in found.remedies
    )
    return tag("section", tag("h2", "What would change it, predicted") + tag("ol", items, class_="remedies"))


def _outcomes(found: Diagnosis) -> str:
    head = tag("tr", "".join(tag("th", name) for name in ("", "predicted", "measured", "off by")))
    rows = "".join(
        tag("tr", "".join(tag("td", escape(cell)) for cell in row)) for row in words.outcomes(found)
    )
    table = tag("table", tag("thead", head) + tag("tbody", rows), class_="plain")
    return tag("section", tag("h2", "Predicted before it ran, and measured") + table)


def _notes(found: Diagnosis) -> str:
    notes = [*found.notes, CONVENTION, f"Ceilings, measured: {words.ceilings(found)}"]
    items = "".join(tag("li", escape(note) + ".") for note in notes)
    foot = tag("p", f"llmkern {__version__}, {scaled(found.peak_rate, 'FLOP/s')} at best", class_="quiet")
    return tag("footer", tag("h2", "Notes") + tag("ul", items) + foot)
