"""A chart of figures over pairs of bits, with bars of one standard deviation, as SVG."""

import statistics
from collections.abc import Mapping, Sequence

COLOURS = ("#2159b8", "#d5691b", "#7a8b2a")
_WIDTH, _HEIGHT, _LEFT, _TOP = 520, 260, 40, 24

Spread = tuple[float, float]
"""(mean, standard deviation), in percent."""


def spread(values: Sequence[float]) -> Spread:
    """Of shares over seeds."""
    percent = [100.0 * value for value in values]
    return statistics.mean(percent), statistics.stdev(percent) if len(percent) > 1 else 0.0


def draw(found: Mapping[str, Mapping[str, Spread]], title: str) -> str:
    """`found`: {name of a line: {bits: (mean, standard deviation)}}, the same bits in all."""
    bits = list(next(iter(found.values())))
    shown = [(m + s, m - s) for rows in found.values() for m, s in rows.values()]
    high, low = max(one[0] for one in shown) + 1.0, min(one[1] for one in shown) - 1.0

    def place(index, value):
        x = _LEFT + 20 + index * (_WIDTH - _LEFT - 40) / (len(bits) - 1)
        return x, _TOP + (high - value) * (_HEIGHT - _TOP - 30) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'style="background:#fff;font:11px system-ui,sans-serif">',
        f'<text x="{_LEFT}" y="14">{title}</text>',
    ]
    for step in range(5):
        value = low + (high - low) * step / 4
        y = place(0, value)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="4" y="{y + 4:.1f}">{value:.1f}</text>')
    for index, name in enumerate(bits):
        x = place(index, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{name}</text>')
    for number, (name, rows) in enumerate(found.items()):
        colour = COLOURS[number]
        points = [(*place(i, rows[one][0]), rows[one]) for i, one in enumerate(bits)]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for index, (x, _, (mean, deviation)) in enumerate(points):
            ends = (place(index, mean + sign * deviation)[1] for sign in (1, -1))
            first, last = (f"{y:.1f}" for y in ends)
            parts.append(f'<path d="M{x:.1f} {first}V{last}" stroke="{colour}"/>')
        y = _TOP + 14 * number
        parts.append(f'<text x="{_WIDTH - 150}" y="{y}" fill="{colour}">{name}</text>')
    return "\n".join((*parts, "</svg>")) + "\n"
