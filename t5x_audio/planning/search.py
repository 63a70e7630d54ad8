"""Plans every combination of some gin macros and ranks what comes out.

Each plan is a process of its own: XLA's flags are read once, and a plan that fails is one line in
the ranking instead of the end. Training is ranked by modelled time for a token, decoding by time
for a token of all streams; what does not fit comes last.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_audio.errors import UserError


def run(module: str, arguments: Sequence[str], space: Sequence[str]) -> dict[str, Any]:
    """Plans all combinations, prints the ranking, returns the best plan's report.

    Args:
      module: of the planner, as `python -m` takes it.
      arguments: its command line, --search among them.
      space: NAME=VALUE,VALUE,... of gin macros.

    Raises:
      UserError: a space that cannot be read, or nothing fits.
    """
    names, combinations = parse(space)
    fixed = [*_without_search(arguments), "--json"]
    done = []
    for number, values in enumerate(combinations, 1):
        setting = dict(zip(names, values, strict=True))
        said = ", ".join(f"{name}={value}" for name, value in setting.items())
        print(f"[{number}/{len(combinations)}] {said}", file=sys.stderr, flush=True)
        bindings = [f"--gin.{name}={value}" for name, value in setting.items()]
        done.append((setting, _planned([sys.executable, "-m", module, *fixed, *bindings])))
    ranked = sorted(done, key=lambda one: _cost(one[1]))
    print("\n".join(_table(names, ranked)), flush=True)
    setting, best = ranked[0]
    if "error" in best or not best["fits"]:
        raise UserError("--search: none of the combinations fits; the reasons are in the table")
    return setting | best


def parse(space: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """['A=1,2', 'B=x,y'] -> (names, all combinations of values). Tuples keep their commas."""
    choices = {}
    for entry in space:
        name, equals, values = entry.partition("=")
        found = list(_split(values))
        if not equals or not name or not all(found):
            raise UserError(f"--search {entry}: write NAME=VALUE,VALUE,...")
        choices[name.removeprefix("--gin.")] = found
    return list(choices), list(itertools.product(*choices.values()))


def _split(text: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _without_search(arguments: Sequence[str]) -> list[str]:
    kept, inside = [], False
    for argument in arguments:
        inside = argument == "--search" or (inside and not argument.startswith("--"))
        if not inside and not argument.startswith("--search=") and argument != "--json":
            kept.append(argument)
    return kept


def _planned(command: list[str]) -> dict[str, Any]:
    """The report of one plan, or {'error': what it said}."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == 2:
        return {"error": done.stderr.splitlines()[-1].removeprefix("error: ")}
    sys.stderr.write(done.stderr)
    raise UserError(f"--search: a plan ended with exit code {done.returncode}, see above")


def _cost(report: dict[str, Any]) -> tuple:
    """Smaller is better."""
    if "error" in report:
        return (2, 0.0)
    return (0 if report["fits"] else 1, 1 / report["tokens_per_second"])


def _table(names: Sequence[str], ranked) -> list[str]:
    lines = [
        "| " + " | ".join(names) + " | GiB of HBM | fits | ms a step | tokens/s | MFU |",
        "|---" * (len(names) + 5) + "|",
    ]
    for setting, report in ranked:
        cells = list(setting.values())
        if "error" in report:
            lines.append("| " + " | ".join([*cells, report["error"], "no", "", "", ""]) + " |")
            continue
        seconds = report.get("step_seconds_hybrid", report.get("token_seconds_roofline"))
        mfu = f"{report['mfu_hybrid']:.3f}" if "mfu_hybrid" in report else ""
        cells += [
            f"{report['total_bytes'] / 2**30:.2f}", "yes" if report["fits"] else "no",
            f"{1e3 * seconds:.1f}", f"{report['tokens_per_second']:,.0f}", mfu,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines
