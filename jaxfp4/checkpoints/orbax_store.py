"""Quantized parameters, statistics and plans as Orbax checkpoints, on any mesh when they come back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxfp4.checkpoints.orbax_tree import SavedNode, abstract, described, logical_sharding, saved_shardings, sharding_of
from jaxfp4.checkpoints.placement import Placement, Shardings
from jaxfp4.formats import LeafError
from jaxfp4.recipes.plain_data import from_data, to_data
from jaxfp4.recipes.plan import Plan
from jaxfp4.recipes.plan_data import plan_from_data, plan_to_data
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.transform.trace import leaves_of

VERSION = 1
_ITEM = "jaxfp4"
"""The item that says what the others are."""
_COMMITTED = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What `restore` found; None for what was not saved."""

    qparams: Any = None
    stats: Any = None
    plan: Plan | None = None
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save(
    directory: str | os.PathLike[str],
    *,
    qparams: Any = None,
    stats: Any = None,
    plan: Plan | None = None,
    custom_metadata: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Writes an Orbax checkpoint: quantized parameters, statistics of a calibration, a plan, or several of them.

    Each process writes the shards that it holds; call it on all of them. The directory appears whole or not at all.
    Its items `qparams` and `stats` are what `StandardCheckpointer` writes and reads; `plan` and `jaxfp4` are JSON.

    Args:
        directory: a local directory that does not exist, or a URL that Orbax takes, such as `gs://bucket/name`.
        qparams: the result of `quantize_params`, or any tree of arrays and quantized weights.
        stats: what `calibrate` or `make_calibrate_fn` gives, also in the middle of a calibration.
        plan: the result of `jaxfp4.plan`.
        custom_metadata: a dict that JSON can hold, such as how many batches the statistics have seen.
        force: whether a checkpoint that is there already is replaced; Orbax deletes it before it writes.

    Raises:
        ValueError: there is nothing to save; a leaf is no array of numbers (`LeafError`); `custom_metadata` does not
            fit into JSON; with `force`, the directory is no Orbax checkpoint.
        FileExistsError: the directory is there already.
        OSError: it cannot be written.
    """
    path = _absolute(directory)
    if qparams is None and stats is None and plan is None:
        raise ValueError("save: found no qparams, stats or plan: wanted at least one of them; pass what to save")
    import orbax.checkpoint as ocp  # here, as it takes a while and work on other files needs none of it

    items: dict[str, Any] = {}
    data: dict[str, Any] = {"format": _ITEM, "version": VERSION, "custom_metadata": _as_json(custom_metadata or {})}
    for name, tree in (("qparams", qparams), ("stats", stats)):
        if tree is not None:
            plain, node = described(name, tree)
            items[name] = ocp.args.StandardSave(plain)
            data[name] = to_data(node)
    if plan is not None:
        items["plan"] = ocp.args.JsonSave(plan_to_data(plan))
    _refuse_existing(path, force)
    with _one_line(path, "write", "it"), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            checkpointer.save(path, ocp.args.Composite(**items, jaxfp4=ocp.args.JsonSave(data)), force=force)
        except BaseException:
            if jax.process_index() == 0:
                _remove(path.parent / f"{path.name}{_UNFINISHED}")
            raise


def restore(
    directory: str | os.PathLike[str],
    *,
    target: Any = None,
    shardings: Shardings = None,
    mesh: Mesh | None = None,
) -> Saved:
    """Reads what `save` wrote, onto any mesh; each device reads only its part.

    Codes, scales and everything beside them are the same bits whatever the mesh. Without `target`, containers other
    than lists and tuples come back as dicts, such as the `nnx.State` that `from_flax` gives, whose function takes them.
    Statistics follow the parameters onto their mesh, whole on each device, or with `mesh` split as they were.

    Args:
        directory: where `save` wrote to.
        target: parameters, or abstract ones, in whose containers `qparams` come back, as with Orbax. Where its leaves
            have shardings, quantized weights go there as with `shardings`; dtypes do not count.
        shardings: None for the default device; a sharding for everything, where arrays that it does not fit are
            replicated over its mesh; or a mapping from a leaf's path, components joined by '/', to the sharding of that
            array, for a quantized weight of the logical weight. Codes and block scales follow it, without a cut block
            of 16; what else belongs to the weight is replicated.
        mesh: the mesh for everything that `shardings` does not name, split as when it was saved: of each dimension by
            the mesh axes that this mesh has too, if they divide it.

    Raises:
        FileNotFoundError: the directory is not there, or was not written to its end.
        ValueError: it is no checkpoint that `save` wrote, of an unknown version, or broken; `target` has other leaves
            or shapes; a mapping in `shardings` names a path that is not there, or does not fit.
        TypeError: `shardings` holds something else.
    """
    path = _absolute(directory)
    data = _read_description(path)
    if mesh is not None and isinstance(shardings, Sharding):
        raise ValueError("restore: found mesh and one sharding for everything: wanted one of them; leave mesh out")
    nodes: dict[str, SavedNode] = {}
    with _one_line(path, "understand", _ITEM):
        for name in ("qparams", "stats"):
            if data.get(name) is not None:
                nodes[name] = from_data(data[name], SavedNode, name)
    given = {} if target is None else _shardings_of(target)
    placements = {name: _placement(name, node, shardings, mesh, given) for name, node in nodes.items()}
    with _one_line(path, "understand", _ITEM, passing=(ValueError,)):
        wanted = {name: abstract(node, placements[name]) for name, node in nodes.items()}
    if "qparams" in placements:
        placements["qparams"].refuse_unused()
        if target is not None:
            _refuse_other_target(wanted["qparams"], target)
    found = _restored(path, wanted)
    if target is not None and "qparams" in found:
        found["qparams"] = _as_target(found["qparams"], target)
    if "stats" in found and mesh is None and _mesh_of(shardings, given) is None and not isinstance(shardings, Sharding):
        # Not committed to a device, so that they go where the parameters are in the next batch.
        found["stats"] = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), found["stats"])
    plan = None
    if (path / "plan").exists():
        stored = _restored(path, {"plan": None})["plan"]
        try:
            plan = plan_from_data(stored)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Saved(found.get("qparams"), found.get("stats"), plan, data.get("custom_metadata", {}))


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(directory)
    return path if "://" in os.fspath(directory) else epath.Path(os.path.abspath(path))


def _as_json(metadata: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"custom_metadata: {error}: wanted a dict of strings, numbers, lists and dicts; convert it"
        ) from error


def _refuse_existing(path: epath.Path, force: bool) -> None:
    if not path.parent.exists():
        raise FileNotFoundError(f"{path.parent}: no such directory: wanted one to save in; create it")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: it exists already: wanted a new directory; name another, or pass force=True")
    if path.exists() and not (path / _COMMITTED).exists():
        raise ValueError(f"{path}: it is no Orbax checkpoint: wanted one to replace with force=True; name another")


def _remove(path: epath.Path) -> None:
    with contextlib.suppress(OSError):
        path.rmtree()


def _read_description(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        if (path.parent / f"{path.name}{_UNFINISHED}").exists():
            raise FileNotFoundError(f"{path}: its writing was not finished: wanted a checkpoint; save it again")
        raise FileNotFoundError(f"{path}: no such directory: wanted one that jaxfp4.save wrote; correct the name")
    if path.name.endswith(_UNFINISHED):
        raise FileNotFoundError(f"{path}: its writing was not finished: wanted a checkpoint; save it again")
    if not (path / _ITEM).exists():
        raise ValueError(
            f"{path}: it has no item {_ITEM!r}: wanted a directory that jaxfp4.save wrote; read other checkpoints with "
            "orbax.checkpoint"
        )
    data = _restored(path, {_ITEM: None})[_ITEM]
    if not isinstance(data, dict) or data.get("format") != _ITEM or data.get("version") != VERSION:
        found = data.get("version") if isinstance(data, dict) else data
        raise ValueError(
            f"{path}: version {found!r}: wanted {VERSION}, which this jaxfp4 reads; install the jaxfp4 that wrote it"
        )
    return data


def _restored(path: epath.Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """The items, read by Orbax as the abstract trees given, or as JSON for None.

    What it does not find or cannot read is one line.
    """
    import orbax.checkpoint as ocp  # as in `save`

    if not items:
        return {}
    missing = [name for name in items if not (path / name).exists()]
    if missing:
        raise ValueError(f"{path}: its item {missing[0]!r} is missing: wanted {', '.join(items)}; save it again")
    with _one_line(path, "read", " and ".join(items)), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        wanted = {
            name: ocp.args.JsonRestore() if tree is None else ocp.args.StandardRestore(tree)
            for name, tree in items.items()
        }
        found = reader.restore(path, ocp.args.Composite(**wanted))
    return {name: found[name] for name in items}


@contextlib.contextmanager
def _one_line(path: epath.Path, verb: str, what: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors as one line that names the directory: OSError where it is one, otherwise ValueError."""
    try:
        yield
    except passing:
        raise
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = OSError if isinstance(error, OSError) else ValueError
        fix = "free space, or name another directory" if verb == "write" else "save it again, or restore a copy"
        raise kind(f"{path}: cannot {verb} {what}: {text[:300]}; {fix}") from error


def _shardings_of(target: Any) -> dict[str, Sharding]:
    """By path, the shardings that a tree of arrays or abstract arrays has."""
    leaves = leaves_of(target)
    found = {
        path: logical_sharding(leaf.weight) if isinstance(leaf, QuantizedWeight) else sharding_of(leaf)
        for path, leaf in zip(leaves.paths, leaves.values, strict=True)
    }
    return {path: sharding for path, sharding in found.items() if sharding is not None}


def _placement(
    name: str, node: SavedNode, shardings: Shardings, mesh: Mesh | None, given: Mapping[str, Sharding]
) -> Placement:
    """Where the parameters go, or the statistics, whose paths are not those of `shardings`."""
    saved = {} if mesh is None else saved_shardings(node, mesh)
    if name == "qparams":
        return Placement(shardings, {**given, **saved})
    if isinstance(shardings, Sharding) or mesh is not None:
        return Placement(None if mesh is not None else shardings, saved)
    beside = _mesh_of(shardings, given)
    return Placement(None if beside is None else NamedSharding(beside, PartitionSpec()))


def _mesh_of(shardings: Shardings, given: Mapping[str, Sharding]) -> Any:
    """The mesh of the first sharding that has one."""
    named = [*(shardings.values() if isinstance(shardings, Mapping) else ()), *given.values()]
    return next((sharding.mesh for sharding in named if isinstance(sharding, NamedSharding)), None)


def _refuse_other_target(saved: Any, target: Any) -> None:
    found, wanted = (_shapes(tree) for tree in (saved, target))
    for path in [*wanted, *found]:
        if path not in found or path not in wanted:
            lacking = "the checkpoint has no" if path not in found else "it has no"
            raise ValueError(f"target: {lacking} leaf {path!r}: wanted the tree that was saved; correct target")
        if found[path] != wanted[path]:
            raise LeafError(f"{path}: shape {wanted[path]} in target: wanted {found[path]}, as saved; correct target")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = leaves_of(tree)
    values = [leaf.weight if isinstance(leaf, QuantizedWeight) else leaf for leaf in leaves.values]
    return {path: tuple(value.shape) for path, value in zip(leaves.paths, values, strict=True)}


def _as_target(tree: Any, target: Any) -> Any:
    """The leaves of a tree in the containers of another."""
    leaves = leaves_of(tree)
    by_path = dict(zip(leaves.paths, leaves.values, strict=True))
    other = leaves_of(target)
    return other.rebuilt([by_path[path] for path in other.paths])
