"""Numbers as people read them. The one home of such formatters, and light: it imports nothing heavy."""

from __future__ import annotations

import math

DASH = "-"


def number(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits, tiny and huge ones to one less with an exponent; a dash for None."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{max(0, digits - 2)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Seconds as "42s", "4m21s" or "1h05m"; a dash for None."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def seconds(value: float, decimals: int = 2) -> str:
    """Seconds of a table cell: "120", "12.3", and below one second with `decimals`."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.{decimals}f}"


def times(ratio: float | None) -> str:
    """A ratio as "1.62x"; a dash for None."""
    return DASH if ratio is None else f"{ratio:.2f}x"


def percent(share: float | None, decimals: int = 1, signed: bool = False) -> str:
    """A share as "12.3%", with `signed` as "+12.3%"; a dash for None."""
    return DASH if share is None else f"{share:{'+' if signed else ''}.{decimals}%}"
