"""The edge: flags and gin bindings in, one closing line and an exit code out.

Every job is `def run(*, ...)` in its own module, free of flags and gin. `main` reads the flags
before anything heavy is imported (so --help is instant), binds gin, calls `run`, and prints what
it returned as one line. Exit codes: 0 success, 2 bad input (one line on stderr that names it),
130 interrupted (starting the job again continues it). Anything else is a defect: a traceback.

gin's dynamic registration imports modules from inside gin files. Bindings on the command line may
name whatever any of the given files import (`--gin.optimizers.AdamW.peak_lr=1e-4`) and any macro
they mention (`--gin.RUN_DIR=runs/demo`; strings need no quotes). gin is unmaintained, so only its
public surface is used.
"""

import argparse
import ast
import difflib
import errno
import importlib
import importlib.util  # gin uses it without importing it. # noqa: F401
import inspect
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t5x_audio.errors import Abandoned, UserError
from t5x_audio.training import host_memory

_PROJECT = Path(__file__).resolve().parent.parent
_OWN_FLAGS = ("gin_file", "json", "distributed")
_GIN_ERRORS = (
    *(ValueError, SyntaxError, AttributeError, ImportError, TypeError, NameError),
    tokenize.TokenError,
)
_EXAMPLE = """\
bindings:
  --gin.NAME=value             any macro or parameter that the gin files mention, for example
                               --gin.RUN_DIR=runs/demo or --gin.train.run.seed=1
exit codes: 0 done, 2 bad input, 130 interrupted (start it again to continue)"""


def main(
    module: str,
    description: str,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    settings_of: str | None = None,
) -> None:
    """Runs the job `module` with the flags of this process, then exits.

    Args:
      module: import path of the module that holds `run`, as gin files name it.
      description: its docstring; the first paragraph is shown by --help.
      add_flags: adds the job's own flags; those that are given become arguments of `run`.
      settings_of: another job, whose gin bindings hold for this one's arguments of the same names;
        an argument `batch_shapes` gets that of its dataset, which is not opened.
    """
    host_memory.keep_freed_memory()
    sys.unraisablehook = _show_unraisable
    sys.exit(launch(module, description, sys.argv[1:], add_flags, settings_of))


def launch(
    module: str,
    description: str,
    arguments: Sequence[str],
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    settings_of: str | None = None,
) -> int:
    """`main` with explicit arguments; returns the exit code."""
    flags, bindings = _parse_flags(module, description, arguments, add_flags)
    prepare_environment()
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        if flags.distributed is not None:
            _join_hosts(flags.distributed)
        run = _configured_run(module, flags.gin_file, bindings, settings_of)
        given = {k: v for k, v in vars(flags).items() if k not in _OWN_FLAGS and v is not None}
        _refuse_unknown(module, given)
        result = _call(run, given, flags.gin_file)
    except UserError as error:
        return _fail(str(error).split("\n")[0])
    except KeyboardInterrupt as interrupt:
        abandoned = isinstance(interrupt, Abandoned)
        if abandoned:
            threading.excepthook = lambda _: None  # they complain of what they are losing
        where = str(interrupt).split("\n")[0]
        print(f"interrupted{': ' * bool(where)}{where}; start again to continue", file=sys.stderr)
        if abandoned:
            sys.stderr.flush()
            os._exit(130)
        return 130
    except Exception as error:
        full = _full_disk(error, getattr(flags, "model_dir", None) or os.getcwd())
        if full is None:
            raise
        return _fail(f"no space left on the disk of {full}; free some and start again")
    print(closing_line(result or {}, flags.json), flush=True)
    return 0


def _join_hosts(where: str) -> None:
    """Connects this process to the others of its job. `where` is empty on TPUs."""
    import jax

    if not where:
        jax.distributed.initialize()
        return
    try:
        address, processes, index = where.split(",")
        numbers = int(processes), int(index)
    except ValueError:
        raise UserError(
            f"--distributed={where}: give ADDRESS,PROCESSES,INDEX, e.g. localhost:9876,4,0"
        ) from None
    if not 0 <= numbers[1] < numbers[0]:
        raise UserError(f"--distributed={where}: INDEX goes from 0 to {numbers[0] - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, *numbers)


def prepare_environment() -> None:
    """Silences what XLA, TensorFlow, Orbax and absl log, and lets JAX keep what it compiles.

    Only defaults: an environment variable that is set already stays. Compiled programs go to
    ~/.cache/t5x_audio/xla (JAX_COMPILATION_CACHE_DIR), so a job that is started again starts fast.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "GRPC_VERBOSITY": "ERROR",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "t5x_audio", "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in ("jax._src.xla_bridge", "jax._src.compilation_cache"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Orbax and Beam log the traceback of whatever is then raised here.
    for name in ("absl", "orbax", "asyncio", "apache_beam"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def closing_line(result: dict[str, Any], as_json: bool = False) -> str:
    """`done: key=value ...`, or the flat dict as one line of JSON."""
    if as_json:
        return json.dumps(result, default=_plain)
    pairs = []
    for key, value in result.items():
        value = _plain(value) if hasattr(value, "item") else value
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        text = shlex.quote(text) if re.search(r"\s", text) else text
        pairs.append(f"{key}={text}")
    return " ".join(["done:", *pairs])


def save_operative_config(directory: str | os.PathLike) -> None:
    """Writes <directory>/config.gin: every binding in force so far. Nothing if gin isn't in use."""
    if "gin" not in sys.modules:
        return
    text = sys.modules["gin"].operative_config_str()
    if text.strip():
        path = Path(directory) / "config.gin"
        temporary = path.with_suffix(".gin.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


# ---- flags -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise SystemExit(_fail(f"{message} (see --help)"))


def _parse_flags(module, description, arguments, add_flags):
    """-> (flags, [(name, value text)] of the --gin.name=value flags)."""
    parser = _Parser(
        prog=f"python -m {module}",
        description=(description or "").strip().split("\n\n")[0],
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gin_file", action="append", default=[], help="repeatable; later wins")
    parser.add_argument("--model_dir", help="where the job reads or writes its model")
    parser.add_argument("--json", action="store_true", help="print the closing line as JSON")
    parser.add_argument(
        "--distributed", nargs="?", const="", metavar="ADDRESS,PROCESSES,INDEX",
        help="one of several hosts, which TPUs find by themselves; elsewhere say where the first "
        "listens, how many there are and which one this is, e.g. localhost:9876,4,0",
    )  # fmt: skip
    if add_flags is not None:
        add_flags(parser)
    bindings, rest = [], []
    for argument in arguments:
        if argument.startswith("--gin."):
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals or not name:
                parser.error(f"{argument}: write --gin.NAME=value")
            bindings.append((name, value))
        else:
            rest.append(argument)
    return parser.parse_args(rest), bindings


# ---- gin -------------------------------------------------------------------------------------


def _configured_run(
    module: str, files: Sequence[str], bindings, settings_of: str | None
) -> Callable[..., Any]:
    """The job's `run` with its gin bindings. UserError names the file or binding at fault."""
    import gin

    job = importlib.import_module(module)
    paths = [_existing(path) for path in files]
    text = "\n".join(_with_includes(path) for path in paths)
    imports = "from __gin__ import dynamic_registration\n" + "\n".join(
        dict.fromkeys(re.findall(r"^(?:from (?!__gin__)\S+ )?import .+$", text, re.MULTILINE))
    )
    gin.clear_config()
    gin.add_config_file_search_path(str(_PROJECT))  # What gin files include.
    for path in paths:
        _reporting(gin.parse_config_file, str(path), at=str(path), known=text)
    for name, value in bindings:
        if "." not in name and not re.search(rf"\b{re.escape(name)}\b", text):
            hint = _suggestion(name, text)
            raise UserError(f"--gin.{name}: no gin file given here mentions {name}{hint}")
        line = f"{name} = {_literal(value)}"
        flag = f"--gin.{name}={value}"
        _reporting(gin.parse_config, f"{imports}\n{line}", at=flag, known=text)
    if settings_of is not None:
        _borrow_settings(gin, module, settings_of)
    _check_complete(gin, text)
    try:
        return gin.get_configurable(f"{module}.run")
    except ValueError:  # Nothing is bound on it.
        with gin.unlock_config():
            return gin.external_configurable(job.run, name="run", module=module)


def _borrow_settings(gin, module: str, other: str) -> None:
    """Binds on `module`'s run what is bound on the run of `other`, see `main`."""
    job = importlib.import_module(module)
    try:
        bound = gin.get_bindings(f"{other}.run", resolve_references=False)
    except ValueError:  # nobody has named it
        bound = {}
    if not bound:
        raise UserError(f"no gin file given here configures {other}; add --gin_file=...")
    gin.external_configurable(job.run, name="run", module=module)
    parameters = inspect.signature(job.run).parameters
    for name in bound.keys() & parameters.keys():
        gin.bind_parameter(f"{module}.run.{name}", bound[name])
    if "batch_shapes" in parameters and "dataset" in bound:
        dataset = bound["dataset"].configurable.wrapped
        if not hasattr(dataset, "batch_shapes"):
            raise UserError(f"{other}: shapes of {dataset.__name__} are not known without its data")
        shapes = gin.external_configurable(
            dataset.batch_shapes, name="batch_shapes", module=dataset.__qualname__
        )
        known = inspect.signature(dataset.batch_shapes).parameters
        given = gin.get_bindings(bound["dataset"].selector, resolve_references=False)
        for name in given.keys() & known.keys():
            gin.bind_parameter(f"{dataset.__qualname__}.batch_shapes.{name}", given[name])
        gin.bind_parameter(f"{module}.run.batch_shapes", shapes)


def _existing(path: str) -> Path:
    for candidate in (Path(path), _PROJECT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"--gin_file={path}: no such file")


def _with_includes(path: Path) -> str:
    """The text of a gin file and of what it includes."""
    text = path.read_text()
    for included in re.findall(r"^include ['\"](.+)['\"]", text, re.MULTILINE):
        try:
            text += "\n" + _with_includes(_existing(included))
        except UserError:
            raise UserError(f"{path}: includes {included}, which does not exist") from None
    return text


def _literal(value: str) -> str:
    """`value` as gin reads it: itself, or quoted if it's a bare word such as a path."""
    plain = {"true": "True", "false": "False", "none": "None"}.get(value.lower())
    if plain:
        return plain
    if value.startswith(("@", "%", "'", '"', "[", "(", "{")):
        return value
    try:
        ast.literal_eval(value)
        return value
    except (SyntaxError, ValueError):
        return repr(value)


def _reporting(parse, argument, at: str, known: str) -> None:
    """parse(argument), with whatever gin finds wrong as one line."""
    try:
        parse(argument)
    except _GIN_ERRORS as error:
        message = "" if isinstance(error, tokenize.TokenError) else str(error)
        if place := re.search(r'In file "(.+?)", line (\d+)', message):
            at = f"{place[1]} line {place[2]}"
        message = message or "not gin syntax"
        first = message.strip().split("\n")[0].rstrip(".")
        first = re.sub(r"; <module .*?> has no attribute (\w+)", "", first)
        culprit = re.findall(r"'?([\w.]+)'?$", first)
        raise UserError(
            f"{at}: {first}{_suggestion(culprit[0], known) if culprit else ''}"
        ) from error


def _suggestion(name: str, text: str) -> str:
    names = set(re.findall(r"[A-Za-z_]\w*", text))
    close = difflib.get_close_matches(name.split(".")[-1], names - {name}, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _check_complete(gin, text: str) -> None:
    """Refuses macros without a value and values that are still gin.REQUIRED."""
    config = gin.config_str(max_line_length=1000)
    for name in re.findall(r"^(\S+) = %gin\.REQUIRED$", config, re.MULTILINE):
        if "." in name or re.search(rf"%{re.escape(name)}\b", config):
            raise UserError(f"{name} is required; add --gin.{name}=...")
    try:
        gin.finalize()
    except ValueError as error:
        message = str(error).strip().split("\n")[0]
        if unset := re.search(r"No bindings specified for '(\w+)/gin\.macro'", message):
            hint = _suggestion(unset[1], text)
            raise UserError(f"{unset[1]} has no value{hint}; add --gin.{unset[1]}=...") from error
        raise UserError(f"gin: {message}") from error


def _refuse_unknown(module: str, given: dict[str, Any]) -> None:
    """Refuses a flag, --model_dir, that this job has no use for."""
    parameters = inspect.signature(importlib.import_module(module).run).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name not in parameters and (name == "model_dir" or not takes_more):
            raise UserError(f"--{name}: {module} has no such setting")


def _call(run, given: dict[str, Any], files: Sequence[str]):
    """run(**given), where a parameter without a value is the user's error, not a defect."""
    try:
        return run(**given)
    except TypeError as error:
        message = str(error)
        missing = re.match(r"(?:(\w+)\.)?(\w+)\(\) missing \d+ required .*?: (.*)", message)
        called = re.search(r"In call to configurable '(\w+)'", message)
        if not missing or not called or called[1] not in missing.groups()[:2]:
            raise
        where = f"in {', '.join(files)} or " if files else "with --gin_file=... or "
        how = f"{where}by --gin.<module>.{called[1]}.<name>=..."
        raise UserError(f"{called[1]} needs {missing[3]}; bind it {how}") from error


# ---- endings ---------------------------------------------------------------------------------


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def _show_unraisable(what) -> None:
    """All but what Orbax's reads and writes that another's error left behind say."""
    left_behind = ("Event loop is closed", "Encountered error while reading array index")
    if not str(what.exc_value).startswith(left_behind):
        sys.__unraisablehook__(what)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _full_disk(error: BaseException | None, place: str) -> str | None:
    """A path on the disk that ran out of space, `place` for want of one; None: another error."""
    while error is not None:
        # By text too: TensorStore knows no errno, and gin wraps what passes through it.
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
            paths = re.findall(r"""['"]([^'"\s]*/[^'"]+)['"]""", text)
            return getattr(error, "filename", None) or (paths or [place])[-1]
        error = error.__cause__ or error.__context__
    return None


def _plain(value):
    """numpy and jax scalars as Python's, everything else as text."""
    return value.item() if hasattr(value, "item") else str(value)
