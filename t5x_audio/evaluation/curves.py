"""Training curves as inline SVG: read from `metrics.jsonl`, drawn without any library.

A chart shows one metric of one stage: every logged training value faintly, their running mean
clearly, and the validation values as dots. The numbers behind it ride along in `data-series`, where
the page's script finds what to show under the pointer.
"""

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Sequence

from t5x_audio.training.metrics import read_metrics

MAX_POINTS = 200  # more do not show in a chart 256 units wide, and would make the page heavy


@dataclasses.dataclass(frozen=True)
class Series:
    """Values of one metric over steps.

    Attributes:
      name: what it is called in the legend, e.g. "train".
      steps: increasing step numbers.
      values: as many finite values.
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_curves(directory: pathlib.Path, tasks: bool = False) -> dict[str, list[Series]]:
    """The curves of a stage's directory from its `metrics.jsonl`; none where there is no such file.

    With `tasks`, the splits of single tasks too ('validation/asr'), which are many. Values that are
    not finite numbers are left out. A step logged twice (before and after an interruption) counts
    as logged the last time.

    Returns:
      {metric: one Series a split}, metrics in the order in which they first appear.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in read_metrics(directory):
        step, split = int(row.pop("step")), str(row.pop("split", "train"))
        if "/" in split and not tasks:
            continue
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {}).setdefault(split, {})[step] = float(value)
    return {
        name: [
            Series(split, tuple(sorted(points)), tuple(points[step] for step in sorted(points)))
            for split, points in splits.items()
        ]
        for name, splits in found.items()
    }


def running_mean(values: Sequence[float], span: int) -> list[float]:
    """Mean of each value and up to `span - 1` before it; as long as `values`."""
    return [
        math.fsum(values[max(0, i + 1 - span) : i + 1]) / min(i + 1, span)
        for i in range(len(values))
    ]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    first = math.ceil(low / step - 1e-9)
    return [
        tick for i in range(2 * count + 3) if (tick := (first + i) * step) <= high + 1e-9 * step
    ]


def draw(series: Sequence[Series], *, label: str, width: int = 256, height: int = 160) -> str:
    """One chart as an `<svg>` element.

    Args:
      series: what to draw; a Series named "train" as a line with its running mean, others as dots.
      label: said to those who cannot see it.
      width: units of the view box; the page scales it.
      height: as `width`.

    Raises:
      ValueError: there is nothing to draw.
    """
    series = [_thin(one) for one in series if one.steps]
    if not series:
        raise ValueError(f"no values to draw for {label!r}")
    frame = _Frame.around(series, width, height)
    shapes = [_grid(frame), *(_shape(one, frame) for one in series)]
    data = [{"name": one.name, "x": one.steps, "y": _rounded(one.values)} for one in series]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(label)}" '
        f'data-frame="{html.escape(json.dumps(frame.as_data()))}" '
        f'data-series="{html.escape(json.dumps(data))}">{"".join(shapes)}</svg>'
    )


@dataclasses.dataclass(frozen=True)
class _Frame:
    """From steps and values to units of the picture."""

    x0: float
    x1: float
    y0: float
    y1: float
    left: float
    right: float
    top: float
    bottom: float

    @classmethod
    def around(cls, series: Sequence[Series], width: int, height: int) -> "_Frame":
        steps = [step for one in series for step in one.steps]
        # The scale follows what is drawn clearly: a lone spike must not flatten the curve.
        clear = [v for one in series for v in (_smooth(one) if one.name == "train" else one.values)]
        low, high = min(clear), max(clear)
        margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        x0, x1 = min(0, *steps), max(1, *steps)
        return cls(x0, x1, low - margin, high + margin, 36, width - 6, 8, height - 22)

    def x(self, step: float) -> float:
        return self.left + (step - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return self.bottom - min(1.0, max(0.0, share)) * (self.bottom - self.top)

    def path(self, steps: Sequence[int], values: Sequence[float]) -> str:
        points = zip(steps, values, strict=True)
        return "M" + "L".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in points)

    def as_data(self) -> dict:
        return {key: float(f"{value:.6g}") for key, value in dataclasses.asdict(self).items()}


def _shape(one: Series, frame: _Frame) -> str:
    if one.name != "train":
        points = list(zip(one.steps, one.values, strict=True))
        dots = "".join(
            f'<circle cx="{frame.x(s):.1f}" cy="{frame.y(v):.1f}" r="2.6"/>' for s, v in points
        )
        line = f'<path d="{frame.path(one.steps, one.values)}"/>' if len(points) > 1 else ""
        return f'<g class="held-out">{line}{dots}</g>'
    if len(one.steps) == 1:
        x, y = frame.x(one.steps[0]), frame.y(one.values[0])
        return f'<circle class="single" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
    return (
        f'<path class="raw" d="{frame.path(one.steps, one.values)}"/>'
        f'<path class="mean" d="{frame.path(one.steps, _smooth(one))}"/>'
    )


def _smooth(one: Series) -> list[float]:
    return running_mean(one.values, max(1, len(one.values) // 20))


def _thin(one: Series) -> Series:
    """At most MAX_POINTS of the points, the last one among them."""
    stride = math.ceil(len(one.steps) / MAX_POINTS)
    keep = range((len(one.steps) - 1) % stride, len(one.steps), stride)
    return Series(one.name, tuple(one.steps[i] for i in keep), tuple(one.values[i] for i in keep))


def _grid(frame: _Frame) -> str:
    rows = [
        f'<path class="grid" d="M{frame.left},{frame.y(tick):.1f}H{frame.right}"/>'
        f'<text x="{frame.left - 6}" y="{frame.y(tick) + 3.5:.1f}" text-anchor="end">'
        f"{_short(tick)}</text>"
        for tick in nice_ticks(frame.y0, frame.y1)
    ]
    columns = [
        f'<text x="{frame.x(tick):.1f}" y="{frame.bottom + 16}" text-anchor="middle">'
        f"{_short(tick)}</text>"
        for tick in nice_ticks(frame.x0, frame.x1, 5)
        if tick == round(tick)
    ]
    return "".join(rows + columns)


def _short(value: float) -> str:
    """A tick's label: "0.25", "12", "4k"."""
    if abs(value) >= 1000:
        return f"{value / 1000:.4g}k"
    return f"{round(value, 6):.4g}"


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
