"""Numbers as a reader wants them: counts, FLOPs, percentages and intervals in one short form each."""

from __future__ import annotations

import math

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no exponent: 13.44 -> '13.4', 0.00335 -> '0.00335'."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    places = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{round(value, places):.{max(places, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scaled(value: float, giga: str, digits: int) -> tuple[str, str]:
    for step, suffix in _STEPS:
        if round(abs(value) / step, 9) >= 1:
            return significant(value / step, digits), giga if suffix == "G" else suffix
    return significant(value, digits), ""


def count(value: float) -> str:
    """A parameter count: 4200 -> '4.2k', 5e8 -> '500M', 1.8e9 -> '1.8B'."""
    number, suffix = _scaled(value, "B", 3)
    return number + suffix


def flops(value: float) -> str:
    """FLOPs: 2e11 -> '200 GFLOP', 8.764e12 -> '8.76 TFLOP'."""
    number, suffix = _scaled(value, "G", 3)
    return f"{number} {suffix}FLOP"


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage: 0.4646 -> '46.5%'."""
    return f"{100 * value:.{digits}f}%"


def tokens(value: float) -> str:
    """A token count: whole numbers without a point, others with three significant digits."""
    return str(round(value)) if value >= 100 or abs(value - round(value)) < 1e-9 else significant(value)


def interval(pair: tuple[float, float] | list[float] | None, digits: int = 3) -> str:
    """A 95% interval as '[4.35, 5.15]', or '' where there is none."""
    if pair is None:
        return ""
    return f"[{significant(pair[0], digits)}, {significant(pair[1], digits)}]"


def fixed(pair: tuple[float, float] | None, decimals: int = 2) -> str:
    """A 95% interval with so many decimals, '[0.64, 0.81]', or '' where there is none."""
    return "" if pair is None else f"[{pair[0]:.{decimals}f}, {pair[1]:.{decimals}f}]"


def level(value: float, target: str, digits: int = 1) -> str:
    """An error as a percentage ('46.5%'), a loss as a number ('2.31')."""
    return percent(value, digits) if target == "error" else significant(value, 3 if digits < 2 else 4)


def points(value: float, target: str, digits: int = 2) -> str:
    """A difference of errors in percentage points ('0.33 pt'), of losses as a number ('0.021')."""
    return f"{100 * value:.{digits}f} pt" if target == "error" else significant(value, 3)


def cost(value: float, unit: str) -> str:
    """A cost in its unit: '8.76 TFLOP' or '12.3 ms'."""
    return flops(value) if unit == "FLOP" else f"{significant(value)} {unit}"
