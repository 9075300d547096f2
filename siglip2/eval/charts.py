"""Line charts as inline SVG, coloured by the page's own variables so that they follow its theme."""

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 26
_MAX_POINTS = 400


def number(value: float) -> str:
    """Two or three significant digits for a person: 1,234 / 0.123 / 1.2e-5."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g} M"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1e-2:
        return f"{value:.3g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most _MAX_POINTS points: means of equal runs."""
    size = math.ceil(len(points) / _MAX_POINTS)
    runs = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential mean over about a twentieth of the curve, with the start corrected for."""
    keep, mean, weight, out = 1 - min(1.0, 20 / len(points)), 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, mean / weight))
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(tick: float, every: Sequence[float]) -> str:
    """As many decimals as tell neighbours apart."""
    step = abs(every[1] - every[0]) if len(every) > 1 else abs(tick) or 1.0
    if step < 1e-3 or max(map(abs, every)) >= 1e4:
        return number(tick)
    decimals = max(0, -math.floor(math.log10(step)))
    if round(step, decimals) != round(step, decimals + 1):  # 0.25
        decimals += 1
    return f"{tick:.{decimals}f}"


def _range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero and low > 0:
        low = 0.0
    # a curve that hardly moves is drawn flat, not as a magnified tremble
    pad = max(0.05 * (high - low), 0.01 * abs(high)) or 1.0
    return (low if from_zero and low == 0 else low - pad), high + pad


def line_chart(
    series: dict[str, Sequence[Point]],
    *,
    title: str,
    from_zero: bool = False,
    smooth: bool = False,
) -> str:
    """A figure with one curve a series; empty when no series has two finite points.

    `smooth` draws a running mean over a fainter curve.
    """
    finite = {
        name: _thin([p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])])
        for name, points in series.items()
        if points
    }
    finite = {name: points for name, points in finite.items() if len(points) > 1}
    if not finite:
        return ""
    xs = [x for points in finite.values() for x, _ in points]
    low, high = _range([y for points in finite.values() for _, y in points], from_zero=from_zero)
    x_low, x_high = min(xs), max(xs)

    def place(point: Point) -> str:
        x = _LEFT + (point[0] - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = []
    at = ticks(low, high)
    for tick in at:
        y = float(place((x_low, tick)).split(",")[1])
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick_label(tick, at)}</text>'
        )
    for tick in ticks(x_low, x_high, 4) if x_high > x_low else []:
        x = float(place((tick, low)).split(",")[0])
        anchor = "end" if x > _WIDTH - 30 else "middle"
        parts.append(
            f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{number(tick)}</text>'
        )
    for number_, points in enumerate(finite.values()):
        curves = [(points, "curve faint"), (_smooth(points), "curve")] if smooth else []
        for curve, kind in curves or [(points, "curve")]:
            path = " ".join(map(place, curve))
            parts.append(f'<polyline class="{kind} s{number_ % 4}" points="{path}"/>')
    last = "; ".join(
        f"{name + ': ' if len(finite) > 1 else ''}{number(p[0][1])} to {number(p[-1][1])}"
        for name, p in finite.items()
    )
    keys = (f'<span class="key s{i % 4}">{escape(name)}</span>' for i, name in enumerate(finite))
    legend = f'<div class="keys">{"".join(keys)}</div>' if len(finite) > 1 else ""
    described = escape(f"{title} against step, from {last}", quote=True)
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span>{escape(last)}</span>'
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{described}">{"".join(parts)}</svg>'
        f"{legend}</figure>"
    )
