"""Model directories: configurations beside Orbax checkpoints, written by tools and by the loop.

One layout for both:
    <dir>/model.json                          {name: {"class": "module:Config", "fields": {...}}}
    <dir>/checkpoints/<step>/<model name>/    parameters and variables of one model
    <dir>/checkpoints/<step>/training/        step, optimiser states, what else a learner carries
    <dir>/checkpoints/<step>/iterator/        the data iterator's state, as JSON
    <dir>/checkpoints/<step>/checksums/       of all of these, as JSON
`save_model` writes no training and iterator, so a trained run and an exported model load alike.

Choices: arrays are stored flat by readable name ('params/layers/kernel'), not by Python structure,
so a checkpoint outlives refactors of optimiser tuples and module classes. Orbax commits a step by
renaming, hence a half-written one is never seen; what changes on the disk later is found by the
checksums (checksums.py). Restoring takes shapes and shardings from the caller's template: any mesh.
A data iterator's state is global, not per host (positions in one global order), so that it is valid
for any number of hosts. `nnx.RngState` is saved for exact continuation but not read back into a
loaded model.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from t5x_audio.errors import UserError
from t5x_audio.training import checksums, iterator_states, partwise_arrays

_CONFIG_FILE = "model.json"
_STEPS = "checkpoints"
_TRAINING, _ITERATOR = "training", "iterator"


# ---- configurations ------------------------------------------------------------------------


def encode_config(config) -> Any:
    """A (nested) dataclass of plain values -> JSON values."""
    if dataclasses.is_dataclass(config):
        fields = {
            f.name: encode_config(getattr(config, f.name)) for f in dataclasses.fields(config)
        }
        kind = type(config)
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    if isinstance(config, (tuple, list)):
        return [encode_config(item) for item in config]
    if isinstance(config, dict):
        return {key: encode_config(value) for key, value in config.items()}
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"configurations hold plain values only, not {type(config).__name__}")


def decode_config(value) -> Any:
    """The inverse of `encode_config`; every sequence comes back as a tuple (hashable)."""
    if isinstance(value, list):
        return tuple(decode_config(item) for item in value)
    if isinstance(value, dict) and value.keys() == {"class", "fields"}:
        module, _, qualname = value["class"].partition(":")
        kind = getattr(importlib.import_module(module), qualname)
        if not dataclasses.is_dataclass(kind):
            raise TypeError(f"{value['class']} isn't a configuration")
        return kind(**{name: decode_config(field) for name, field in value["fields"].items()})
    if isinstance(value, dict):
        return {key: decode_config(item) for key, item in value.items()}
    return value


def write_configs(directory: str | os.PathLike, configs: dict[str, Any]) -> None:
    """Writes <directory>/model.json whole or not at all."""
    path = Path(directory) / _CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    encoded = {name: encode_config(config) for name, config in configs.items()}
    temporary.write_text(json.dumps(encoded, indent=2) + "\n")
    os.replace(temporary, path)


def load_configs(directory: str | os.PathLike) -> dict[str, Any]:
    """All configurations of a model directory. UserError if missing or unreadable."""
    path = Path(directory) / _CONFIG_FILE
    try:
        return decode_config(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a model directory (it has no {_CONFIG_FILE})") from None
    except (OSError, ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
        raise UserError(f"{path}: unreadable ({_first_line(error)}); export it again") from error


def load_config(directory: str | os.PathLike, name: str = "model") -> Any:
    """The configuration of one model. UserError if the directory or the name is missing."""
    configs = load_configs(directory)
    if name not in configs:
        raise UserError(f"{directory}: has no model {name!r}, only {', '.join(sorted(configs))}")
    return configs[name]


def require_same_configs(directory: str | os.PathLike, configs: dict[str, Any]) -> None:
    """UserError naming the first field in which a directory's models differ from `configs`."""

    def fields(configs):
        encoded = {name: encode_config(config) for name, config in configs.items()}
        return jax.tree.leaves_with_path(encoded, is_leaf=lambda value: value is None)

    stored, given = fields(load_configs(directory)), fields(configs)
    for (path, there), (other, here) in itertools.zip_longest(stored, given, fillvalue=((), None)):
        if path != other or there != here:
            name = jax.tree_util.keystr(path or other, simple=True, separator=".")
            name = name.replace(".fields.", ".")
            raise UserError(
                f"{directory}: holds a model with {name}={there}, not {here}; "
                "give the settings it was made with or another --model_dir"
            )


# ---- arrays by name ------------------------------------------------------------------------


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _is_key(array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _names(tree, skip_rng: bool = False) -> list[str | None]:
    """A name per leaf of `tree` ('layers/0/kernel'); None where a leaf isn't to be read."""
    names: list[str | None] = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves = jax.tree.leaves(node)
        if skip_rng and isinstance(node, nnx.RngState):
            names += [None] * len(leaves)
        elif len(leaves) == 1:
            names.append(name)
        else:
            names += [f"{name}/{index}" for index in range(len(leaves))]
    return names


def named_arrays(tree) -> dict[str, jax.Array]:
    """{name: array} of a pytree of arrays or nnx Variables; PRNG keys become their data."""
    arrays = zip(_names(tree), jax.tree.leaves(tree), strict=True)
    return {name: jax.random.key_data(x) if _is_key(x) else x for name, x in arrays}


def _template(leaf) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding to restore `leaf` with; on the default device if it says nothing."""
    sharding = getattr(leaf, "sharding", None)
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        sharding = None if sharding is None or not sharding.is_fully_replicated else sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _rng_stand_in(leaf):
    """A value for random state that isn't restored."""
    if _is_key(leaf):
        return jax.random.split(jax.random.key(0), max(leaf.size, 1)).reshape(leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _restore_named(item: Path, tree, skip_rng: bool = False, part: str = "", fresh=()):
    """`tree` with its leaves read from the item. UserError if they aren't there in that size.

    For `part` and `fresh` see `restore_states`.
    """
    names, wanted = _wanted(item, tree, skip_rng, part, fresh)
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(item, args=arguments)
    except Exception as error:
        raise DamagedCheckpoint(f"{item}: damaged ({_first_line(error)})") from error
    if what := checksums.difference(item, checksums.of_items({item.name: arrays})[item.name]):
        raise DamagedCheckpoint(f"{item}: damaged ({what})")
    restored = []
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        if name is None:
            restored.append(_rng_stand_in(leaf))
        elif not name:
            restored.append(leaf)
        elif _is_key(leaf):
            restored.append(jax.random.wrap_key_data(arrays[name]))
        else:
            restored.append(arrays[name])
    return jax.tree.unflatten(jax.tree.structure(tree), restored)


def _wanted(item: Path, tree, skip_rng: bool, part: str, fresh):
    """-> (the stored name of each leaf of `tree`: '' for one that keeps its value, None for random
    state that is not read; {name: template}). UserError if they aren't stored in that size.
    """
    names = [name and _place(name, part, fresh) for name in _names(tree, skip_rng)]
    wanted = {n: _template(x) for n, x in zip(names, jax.tree.leaves(tree), strict=True) if n}
    sizes = {n: tuple(x.shape) for n, x in _stored_arrays(item).items()}
    _check_sizes(item, sizes, wanted, _place("params/", part))
    return names, wanted


def _place(name: str, part: str, fresh: Sequence[str] = ()) -> str:
    """'params/head/kernel' -> 'params/<part>/head/kernel'; '' if it is one of `fresh`."""
    kind, _, rest = name.partition("/")
    if any(f"{rest}/".startswith(f"{one}/") for one in fresh):
        return ""
    return f"{kind}/{part}/{rest}" if part else name


def _stored_arrays(item: Path) -> dict[str, Any]:
    """{name: metadata with shape and dtype} of an item."""
    try:
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        found = reader.metadata(item).item_metadata
        if found is None:
            raise ValueError("its index is damaged or missing")
        return found.tree
    except Exception as error:  # Orbax and TensorStore have no common error class.
        raise DamagedCheckpoint(f"{item}: unreadable ({_first_line(error)})") from error


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read; an earlier one may still be good."""


def _check_sizes(
    item: Path, stored: dict[str, tuple], wanted: dict[str, Any], complete: str
) -> None:
    """Raises unless `wanted` is stored so, and is all that is stored under `complete`."""
    for name, leaf in wanted.items():
        if name not in stored:
            raise UserError(f"{item}: has no {name} of shape {leaf.shape}; another model's weights")
        if stored[name] != tuple(leaf.shape):
            raise UserError(
                f"{item}: {name} is {stored[name]} there but {tuple(leaf.shape)} in the "
                "configuration; give the sizes it was trained with"
            )
    for name in stored.keys() - wanted.keys():
        if name.startswith(complete):
            raise UserError(f"{item}: has {name} of shape {stored[name]}, the configuration not")


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax's message is TensorStore's whole specification.
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__


# ---- whole models --------------------------------------------------------------------------


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """The committed steps of a model directory, ascending; unfinished ones aren't counted."""
    root = Path(directory) / _STEPS
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())


def _latest_item(directory: str | os.PathLike, name: str) -> Path:
    load_config(directory, name)  # Raises if the directory or the name is at fault.
    steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"{directory}: has no checkpoint yet; train it first")
    return Path(directory).resolve() / _STEPS / str(steps[-1]) / name


def save_model(
    directory: str | os.PathLike, configs: dict[str, Any], modules: dict[str, nnx.Module]
) -> None:
    """Writes live modules and their configurations as a model directory.

    A directory that holds a model already gets a later step, then loses its earlier ones: at any
    moment it can be loaded.
    """
    states = {name: nnx.split(module, nnx.Param, ...)[1:] for name, module in modules.items()}
    save_states(directory, configs, states)


def save_states(
    directory: str | os.PathLike, configs: dict[str, Any], states: dict[str, tuple[Any, Any]]
) -> None:
    """`save_model` for (params, variables) states."""
    arrays = {name: _model_arrays(*pair) for name, pair in states.items()}
    items = {name: ocp.args.PyTreeSave(item) for name, item in arrays.items()}
    items[checksums.FOLDER] = ocp.args.JsonSave(checksums.of_items(arrays))
    _save_items(directory, configs, items, ocp.CompositeCheckpointHandler())


def save_parts(
    directory: str | os.PathLike,
    config: Any,
    params: dict[str, partwise_arrays.PartwiseArray],
    variables: dict[str, partwise_arrays.PartwiseArray] | None = None,
    name: str = "model",
) -> None:
    """`save_model` for one model whose arrays, by name ('layers/query'), are made in parts.

    Errors of the parts are raised here. UserError if the disk cannot hold them.
    """
    arrays = {f"params/{n}": array for n, array in params.items()}
    arrays |= {f"variables/{n}": array for n, array in (variables or {}).items()}
    Path(directory).mkdir(parents=True, exist_ok=True)
    _require_space(Path(directory), sum(array.nbytes for array in arrays.values()))
    handler = ocp.CompositeCheckpointHandler(**{name: partwise_arrays.handler()})
    _save_items(directory, {name: config}, {name: ocp.args.PyTreeSave(arrays)}, handler)


@contextlib.contextmanager
def leaving_nothing_behind(directory: Path) -> Iterator[None]:
    """Removes what an error inside leaves of a new model directory, which has no checkpoint yet."""
    existed = directory.exists()
    try:
        yield
    except BaseException:
        shutil.rmtree(directory / _STEPS if existed else directory, ignore_errors=True)
        raise


def _require_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(
            f"{directory}: needs {size / 2**30:.1f} GiB of disk, but only {free / 2**30:.1f} are "
            "free"
        )


def _save_items(directory, configs: dict[str, Any], items: dict[str, Any], handler) -> None:
    """A new step with these items; the earlier ones go."""
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    earlier = checkpoint_steps(directory)
    step = earlier[-1] + 1 if earlier else 0
    with ocp.Checkpointer(handler) as writer:
        writer.save(directory / _STEPS / str(step), args=ocp.args.Composite(**items))
    write_configs(directory, configs)
    for old in earlier:
        shutil.rmtree(directory / _STEPS / str(old), ignore_errors=True)


def _model_arrays(params, variables) -> dict[str, jax.Array]:
    return named_arrays({"params": params, "variables": variables})


def restore_states(
    directory: str | os.PathLike,
    name: str,
    params,
    variables,
    part: str = "",
    fresh: Sequence[str] = (),
) -> tuple[Any, Any]:
    """(params, variables) of a saved model with the shapes and shardings of the two templates.

    Args:
      directory, name: of the saved model.
      params, variables: the templates.
      part: the submodule of the saved model that is read ('tokenizer'); '' is all of it.
      fresh: submodules of the templates ('head') that keep the templates' own values.

    UserError, naming both shapes, if a parameter is missing or has another size, or if the saved
    part has one that the templates lack.
    """
    tree = {"params": params, "variables": variables}
    restored = _restore_named(_latest_item(directory, name), tree, True, part, fresh)
    return restored["params"], restored["variables"]


def require_same_sizes(
    directory: str | os.PathLike,
    name: str,
    params,
    variables,
    part: str = "",
    fresh: Sequence[str] = (),
) -> None:
    """The error that `restore_states` would raise for sizes, without reading the arrays."""
    tree = {"params": params, "variables": variables}
    _wanted(_latest_item(directory, name), tree, True, part, fresh)


def array_types(directory: str | os.PathLike, name: str = "model") -> dict[str, np.dtype]:
    """{name: type} of the stored arrays of a model ('params/layers/query')."""
    return {n: np.dtype(x.dtype) for n, x in _stored_arrays(_latest_item(directory, name)).items()}


def open_array(
    directory: str | os.PathLike, array: str, name: str = "model"
) -> partwise_arrays.PartwiseArray:
    """One stored array of a model in its own type, to be read part by part.

    UserError if it is not there; what is damaged shows when it is read.
    """
    item = _latest_item(directory, name)
    if array not in _stored_arrays(item):
        raise UserError(f"{item}: has no {array}; another model's weights")
    arguments = ocp.args.PyTreeRestore(
        item={array: 0},
        restore_args={array: ocp.RestoreArgs(restore_type=partwise_arrays.PartwiseArray)},
        partial_restore=True,
    )
    try:
        opened = ocp.Checkpointer(partwise_arrays.handler()).restore(item, args=arguments)[array]
    except Exception as error:  # see _stored_arrays
        raise DamagedCheckpoint(f"{item}: damaged ({_first_line(error)})") from error

    def read(start: int) -> np.ndarray:
        try:
            return opened.read(start)
        except ValueError as error:
            raise DamagedCheckpoint(f"{item}: damaged ({_first_line(error)})") from error

    return dataclasses.replace(opened, read=read)


def load_model(directory: str | os.PathLike, name: str = "model") -> nnx.Module:
    """The model `name` of a directory, at its latest checkpoint, in evaluation mode."""
    config = load_config(directory, name)
    abstract = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    graphdef, params, variables = nnx.split(abstract, nnx.Param, ...)
    model = nnx.merge(graphdef, *restore_states(directory, name, params, variables))
    model.eval()
    return model


# ---- the loop's checkpoints ----------------------------------------------------------------


class RunCheckpoints:
    """Asynchronous checkpoints of a training run: state, data iterator and step.

    Args:
      directory: the run's model directory.
      model_names: the models of the learner.
      keep: how many of the latest checkpoints stay.
      keep_every: checkpoints at multiples of this step stay for ever; None for none.
    """

    def __init__(self, directory, model_names, keep: int = 2, keep_every: int | None = None):
        self.directory = Path(directory).resolve()
        self._model_names = tuple(model_names)
        self._manager = ocp.CheckpointManager(
            self.directory / _STEPS,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
            ),
        )

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, state, iterator_state=None) -> None:
        """Starts to save; returns when `state` may be donated. A step saved already is skipped."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        arrays = {n: _model_arrays(state.params[n], state.variables[n]) for n in self._model_names}
        arrays[_TRAINING] = named_arrays(self._training_part(state))
        items = {name: ocp.args.PyTreeSave(item) for name, item in arrays.items()}
        position = iterator_states.of_all_hosts(iterator_state)
        items[_ITERATOR] = ocp.args.JsonSave({"state": position})
        sums = checksums.of_items(arrays) | {_ITERATOR: checksums.of_json(position)}
        items[checksums.FOLDER] = ocp.args.JsonSave(sums)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, template):
        """-> (state, iterator state) of the newest readable checkpoint, or None if there is none.

        Args:
          template: TrainState of arrays or ShapeDtypeStructs with shardings: any mesh.

        A damaged checkpoint is set aside as <step>.damaged and the one before is used; UserError
        if there is none before.
        """
        while (step := self._manager.latest_step()) is not None:
            try:
                return self._restore_step(step, template)
            except DamagedCheckpoint as error:
                logging.warning("%s; going back to the checkpoint before", error)
                if jax.process_index() == 0:
                    aside = self.directory / f"{step}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(self.directory / _STEPS / str(step), aside)
                multihost_utils.sync_global_devices("set aside")
                self._manager.reload()
        for aside in self.directory.glob("*.damaged"):
            raise UserError(
                f"{aside}: damaged, and no checkpoint is left; put a good one into "
                f"{self.directory / _STEPS} or delete this one to begin anew"
            )
        return None

    def _restore_step(self, step: int, template):
        folder = self.directory / _STEPS / str(step)
        params, variables = dict(template.params), dict(template.variables)
        for name in self._model_names:
            tree = {"params": params[name], "variables": variables[name]}
            tree = _restore_named(folder / name, tree)
            params[name], variables[name] = tree["params"], tree["variables"]
        rest = _restore_named(folder / _TRAINING, self._training_part(template))
        try:
            iterator = json.loads((folder / _ITERATOR / "metadata").read_text())["state"]
        except (OSError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"{folder / _ITERATOR}: {_first_line(error)}") from error
        if what := checksums.difference(folder / _ITERATOR, checksums.of_json(iterator)):
            raise DamagedCheckpoint(f"{folder / _ITERATOR}: damaged ({what})")
        state = template.replace(
            step=rest["step"],
            params=params,
            variables=variables | rest["variables"],
            opt_state=rest["opt_state"],
        )
        return state, iterator_states.decode(iterator)

    def _training_part(self, state) -> dict[str, Any]:
        others = {n: v for n, v in state.variables.items() if n not in self._model_names}
        return {"step": state.step, "opt_state": state.opt_state, "variables": others}

    def wait(self) -> None:
        """Returns when what was started is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.close()
