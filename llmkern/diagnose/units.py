"""Figures as people read them."""

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def scaled(value: float, unit: str) -> str:
    """Three digits and a prefix: 2.35e11, "FLOP/s" is "235 GFLOP/s"."""
    for prefix in PREFIXES:
        if abs(value) < 999.5 or prefix == PREFIXES[-1]:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    raise AssertionError


def size(value: float) -> str:
    """Bytes in powers of 1024: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 999.5 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """ "1.2 s", "35 ms", "7.1 µs"."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(seconds) * factor >= 0.9995 or unit == "µs":
            value = seconds * factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    raise AssertionError


def percent(part: float) -> str:
    """ "43 %", and "0.4 %" where that says more."""
    return f"{100 * part:.0f} %" if part >= 0.0095 or part == 0 else f"{100 * part:.1f} %"
