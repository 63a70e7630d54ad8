"""The report of a run: one self-contained page to listen to, read and pass on.

Nothing is fetched: style, script, charts (SVG), pictures (PNG) and recordings (FLAC) are all inside
the file, under a content security policy that forbids the network. `render` is a pure function of a
`Report`; where the numbers come from is the entry point's business.
"""

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_audio.evaluation import curves, spectrogram
from t5x_audio.evaluation.report_style import SCRIPT, STYLE

_LOSS_WORDS = {"loss", "ctc", "nll", "commitment", "l1", "mse", "adversarial", "matching", "error"}
SPECTROGRAM_COLOUR = (24, 74, 92)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
_POLICY += "img-src data:; media-src data:"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording to play: what it is, float [T] samples in [-1, 1], rate in Hz."""

    label: str
    samples: np.ndarray
    rate: int


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of an example: who says it, what, and whether it is right (None: not judged)."""

    label: str
    text: str
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with everything to be read and heard about it."""

    title: str
    meta: str
    lines: tuple[Line, ...]
    clips: tuple[Clip, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a heading above it; the first cell of a row may carry a note."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the life: its name, what it does, seconds (None: unknown), curves, config."""

    name: str
    says: str
    seconds: float | None
    metrics: Mapping[str, Sequence[curves.Series]]
    config: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page shows, from top to bottom."""

    title: str
    lead: str
    figures: tuple[tuple[str, str], ...]  # (value, what it is), the few numbers to remember
    examples: tuple[Example, ...]
    tables: tuple[Table, ...]
    stages: tuple[Stage, ...]
    facts: tuple[tuple[str, str], ...]  # versions, seed, machine


def render(report: Report) -> str:
    """The page as one HTML string, without any reference to another file."""
    sections = [
        _head(report),
        _examples(report.examples),
        _tables(report.tables),
        _curves(report.stages),
        _times(report.stages),
        _configs(report.stages),
        _facts(report.facts),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(report.title)}</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _head(report: Report) -> str:
    figures = "".join(
        f"<div><b>{_text(value)}</b><span>{_text(what)}</span></div>"
        for value, what in report.figures
    )
    grid = f'<div class="figures">{figures}</div>' if figures else ""
    return f'<h1>{_text(report.title)}</h1><p class="lead">{_text(report.lead)}</p>{grid}'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = "".join(_example(example) for example in examples)
    return f"<h2>Listen</h2>{cards}"


def _example(example: Example) -> str:
    lines = "".join(
        f"<dt>{_text(line.label)}</dt><dd>{_text(line.text) or '&mdash;'}</dd>{_mark(line.right)}"
        for line in example.lines
    )
    clips = "".join(_clip(clip) for clip in example.clips)
    return (
        f'<article class="example"><header><h3>{_text(example.title)}</h3>'
        f'<span class="meta">{_text(example.meta)}</span></header>'
        f'<dl class="said">{lines}</dl><div class="clips">{clips}</div></article>'
    )


def _mark(right: bool | None) -> str:
    if right is None:
        return "<span></span>"
    name = "right" if right else "wrong"
    return f'<span class="mark {name}">{name}</span>'


def _clip(clip: Clip) -> str:
    """Player, waveform and spectrogram of one recording."""
    seconds = len(clip.samples) / clip.rate
    width, height = 600, 60
    path = spectrogram.envelope_path(clip.samples, width, height)
    wave = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{path}"/></svg>'
    )
    picture = spectrogram.spectrogram_png(clip.samples, clip.rate, SPECTROGRAM_COLOUR)
    label = _text(clip.label)
    return (
        f'<figure class="clip" data-seconds="{seconds:.4f}">'
        f"<figcaption><span>{label}</span><span>{seconds:.1f} s</span></figcaption>"
        f'<audio controls preload="metadata" src="{_data_uri("audio/flac", _flac(clip))}"></audio>'
        f'<div class="player"><button type="button" aria-label="Play or pause: {label}">'
        '<svg class="go" viewBox="0 0 10 10"><path d="M2 0.5L9 5L2 9.5Z"/></svg>'
        '<svg class="stop" viewBox="0 0 10 10"><path d="M1.5 1h2.5v8h-2.5zM6 1h2.5v8H6z"/></svg>'
        '</button><div class="wave" role="slider" tabindex="0" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="0" aria-label="Position in: {label}">{wave}'
        f'<div class="done">{wave}</div></div></div>'
        f'<img class="spectrogram" alt="Spectrogram of {label}, 0 to 8 kHz" '
        f'src="{_data_uri("image/png", picture)}"></figure>'
    )


def _flac(clip: Clip) -> bytes:
    import soundfile

    from t5x_audio.audio.io import to_int16

    out = io.BytesIO()
    soundfile.write(out, to_int16(np.asarray(clip.samples)), clip.rate, "PCM_16", format="FLAC")
    return out.getvalue()


def _tables(tables: Sequence[Table]) -> str:
    return "<h2>Measured</h2>" + "".join(_table(table) for table in tables) if tables else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    body = []
    for row in table.rows:
        note = f"<small>{_text(table.notes[row[0]])}</small>" if row[0] in table.notes else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        body.append(f"<tr><td>{_text(row[0])}{note}</td>{cells}</tr>")
    return (
        f'<h3>{_text(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _curves(stages: Sequence[Stage]) -> str:
    parts = [part for stage in stages if (part := _stage_curves(stage))]
    if not parts:
        return ""
    legend = (
        '<p class="legend"><span><i class="l-mean"></i>training, running mean</span>'
        '<span><i class="l-raw"></i>training, as logged</span>'
        '<span><i class="l-eval"></i>held out</span></p>'
    )
    return f"<h2>How every stage learnt</h2>{legend}{''.join(parts)}"


def _stage_curves(stage: Stage) -> str:
    """Charts of a stage: losses in sight, other metrics folded away."""
    drawn = {name: _chart(stage.name, name, series) for name, series in stage.metrics.items()}
    losses = [svg for name, svg in drawn.items() if is_loss(name)]
    others = [svg for name, svg in drawn.items() if not is_loss(name)]
    if not losses and not others:
        return ""
    more = (
        f'<details class="charts-more"><summary><span>{len(others)} more</span></summary>'
        f'<div class="charts">{"".join(others)}</div></details>'
        if others
        else ""
    )
    return (
        f'<h3>{_text(stage.name)}</h3><p class="note">{_text(stage.says)}</p>'
        f'<div class="charts">{"".join(losses)}</div>{more}'
    )


def is_loss(name: str) -> bool:
    """Whether a metric is something that is minimised, going by its name."""
    return not _LOSS_WORDS.isdisjoint(name.lower().replace("/", "_").split("_"))


def _chart(stage: str, name: str, series: Sequence[curves.Series]) -> str:
    svg = curves.draw(series, label=f"{name} of {stage} over steps")
    return f"<figure><figcaption>{_text(name)}</figcaption>{svg}</figure>"


def _times(stages: Sequence[Stage]) -> str:
    timed = [stage for stage in stages if stage.seconds is not None]
    if not timed:
        return ""
    longest = max(1e-9, *(stage.seconds for stage in timed))
    rows = "".join(
        f"<tr><td>{_text(stage.name)}<small>{_text(stage.says)}</small></td>"
        f'<td class="barcell"><span class="bar" style="width:{100 * stage.seconds / longest:.1f}%">'
        f"</span></td><td>{duration(stage.seconds)}</td></tr>"
        for stage in timed
    )
    total = duration(sum(stage.seconds for stage in timed))
    return (
        '<h2>Where the time went</h2><div class="scroll"><table><tbody>'
        f'{rows}<tr class="strong"><td>together</td><td></td><td>{total}</td></tr>'
        "</tbody></table></div>"
    )


def duration(seconds: float) -> str:
    """Seconds for people: "0.42 s", "17 s", "3 min 05 s", "1 h 02 min"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _configs(stages: Sequence[Stage]) -> str:
    folded = "".join(
        f"<details><summary>{_text(stage.name)} <span>{_text(stage.says)}</span></summary>"
        f"<pre>{_text(stage.config)}</pre></details>"
        for stage in stages
        if stage.config
    )
    return f"<h2>Configuration</h2>{folded}" if folded else ""


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    return f'<h2>Made with</h2><dl class="facts">{rows}</dl>' if rows else ""
