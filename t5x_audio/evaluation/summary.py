"""The Markdown edition of a report: tables, where time and arithmetic went, and one SVG of losses.

It is what a repository keeps of a run, where the page of `report.py` is what one looks at and
listens to. Both are made from the same `Report`.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

from t5x_audio.evaluation import curves
from t5x_audio.evaluation.report import Report, Stage, Table, duration

_CELL, _COLUMNS = (256, 184), 4  # a chart with its title; charts in a row
_STYLE = (
    "svg{background:#fff;font:9px system-ui,sans-serif}text{fill:#555}.title{font-weight:600;"
    "fill:#222;font-size:10px}.grid{stroke:#e5e5e5}path{fill:none}.raw{stroke:#b9cbe8}"
    ".mean{stroke:#2159b8;stroke-width:1.6}.single{fill:#2159b8}"
    ".held-out path{stroke:#d5691b}.held-out circle{fill:#d5691b}"
)


def render(report: Report, command: str | None, picture: str | None) -> str:
    """The page as Markdown.

    Args:
      report: what to tell.
      command: what makes the run again, told under the title; None = unknown.
      picture: relative path of the SVG of `draw_losses`; None = there is none.
    """
    parts = [f"# {report.title}", report.lead]
    parts += [f"Made by `{command}`."] if command else []
    parts += [table_section(table) for table in report.tables]
    timed = [stage for stage in report.stages if stage.seconds is not None]
    if timed:
        parts += ["## Where time and arithmetic went", _times(timed)]
    if picture:
        parts += ["## Losses", f"![losses of every stage over its steps]({picture})"]
        parts.append("Blue: training and its running mean; orange: held out.")
    parts += ["## Made with", _list(report.facts)]
    return "\n\n".join(parts) + "\n"


def draw_losses(stages: Sequence[Stage]) -> str | None:
    """One SVG with the chart of every stage's total loss; None without any."""
    charts = [(s.name, s.metrics["loss"]) for s in stages if s.metrics.get("loss")]
    return draw_charts(charts) if charts else None


def draw_charts(charts: Sequence[tuple[str, Sequence[curves.Series]]]) -> str:
    """One SVG with several charts, (title, series), in rows."""
    width, height = _CELL
    cells = []
    for title, series in charts:
        x = len(cells) % _COLUMNS * width
        y = len(cells) // _COLUMNS * height
        chart = curves.draw(series, label=title, height=height - 20)
        chart = chart.replace("<svg ", f'<svg y="20" width="{width}" height="{height - 20}" ')
        head = f'<text class="title" x="36" y="15">{title}</text>'
        cells.append(f'<svg x="{x}" y="{y}" width="{width}">{head}{chart}</svg>')
    total = min(len(cells), _COLUMNS) * width, math.ceil(len(cells) / _COLUMNS) * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" '
        f'width="{total[0]}" height="{total[1]}"><style>{_STYLE}</style>{"".join(cells)}</svg>\n'
    )


def time_in_steps(stage: Stage) -> float | None:
    """Seconds that training steps took, evaluation, saving and first compilation left out."""
    (rates, *_) = stage.metrics.get("steps_per_second", [None])
    if rates is None:
        return None
    spans = [last - first for first, last in itertools.pairwise((0, *rates.steps))]
    return sum(span / rate for span, rate in zip(spans, rates.values, strict=True))


def gflop_per_second(stage: Stage) -> float | None:
    """Median over the logged windows: matrix products and convolutions, see training/flops.py."""
    (rates, *_) = stage.metrics.get("gflop_per_second", [None])
    return statistics.median(rates.values) if rates else None


def _times(stages: Sequence[Stage]) -> str:
    rows = []
    for stage in stages:
        inside, rate = time_in_steps(stage), gflop_per_second(stage)
        rows.append(
            (
                stage.name,
                duration(stage.seconds),
                "" if inside is None else duration(inside),
                "" if rate is None else f"{rate:.0f}",
            )
        )
    total = duration(sum(stage.seconds for stage in stages))
    head = ("stage", "wall clock", "in training steps", "GFLOP/s in steps")
    return table_markdown(Table("", head, (*rows, ("together", total, "", ""))))


def table_section(table: Table) -> str:
    """A table with its heading and its notes."""
    names = [row[0] for row in table.rows if row[0] in table.notes]
    notes = [_list((name, table.notes[name]) for name in names)] if names else []
    return "\n\n".join([f"## {table.title}", table_markdown(table), *notes])


def table_markdown(table: Table) -> str:
    """A table without its heading."""
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in items)
