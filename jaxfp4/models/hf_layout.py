"""The Hugging Face safetensors layout of the decoder's families: which tensor each parameter is; reading and writing.

A checkpoint stores a linear weight as ``[out, in]`` and every expert by itself; the decoder keeps kernels as ``[in,
out]`` and a layer's experts as one stack ``[experts, in, out]``. `checkpoint_names` says so as data.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxfp4.checkpoints.configs import read_object
from jaxfp4.checkpoints.names import TensorName
from jaxfp4.checkpoints.pending import PendingTensor, copy_values, entry_of, is_storable, row_major
from jaxfp4.checkpoints.safetensors_file import Checkpoint, open_checkpoint
from jaxfp4.checkpoints.writer import INDEX_FILE, SINGLE_FILE, write_tensors
from jaxfp4.models.config import DecoderConfig
from jaxfp4.models.decoder import Decoder
from jaxfp4.models.families import Family
from jaxfp4.models.sharding import parameter_shapes, shardings
from jaxfp4.tensors.memory import in_memory

CONFIG_FILE = "config.json"

_MODULES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "router": "gate",
}
_FLOAT_KINDS = ("float32", "bfloat16", "float16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Frequencies that old checkpoints carry; like transformers, the decoder computes them from the config.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_ROWS = 1024  # of the embedding table, compared at a time


def checkpoint_names(config: DecoderConfig) -> dict[str, TensorName]:
    """``{parameter path: TensorName}`` for every parameter of the decoder, as `jaxfp4.export_checkpoint` takes it.

    The tensor is the module, a dot, and ``weight`` or ``bias``; a `module` with the literal field ``{expert}`` stands
    for one tensor per expert, stacked along the parameter's first axis; `transpose` says that the stored matrix is the
    parameter's (last two axes) transposed.
    """
    return {path: _tensor_name(path, config.family) for path in parameter_shapes(config)}


def _tensor_name(path: str, family: Family) -> TensorName:
    parts = path.split("/")
    if path == "embed/embedding":
        return TensorName("model.embed_tokens", transpose=False)
    if path == "lm_head/kernel":
        return TensorName("lm_head", transpose=True)
    modules = _MODULES | {"mlp": family.mlp_module}
    names = [modules.get(part, part) for part in parts]
    if "experts" in parts:
        at = parts.index("experts")
        matrix = dict(family.expert_matrices).get(parts[-1], parts[-1])
        return TensorName(".".join(["model", *names[: at + 1], "{expert}", matrix]), transpose=True)
    parameter = "bias" if parts[-1] == "bias" else "weight"
    return TensorName(".".join(["model", *names[:-1]]), transpose=parts[-1] == "kernel", parameter=parameter)


def read_config(directory: str | Path) -> DecoderConfig:
    """The configuration in a checkpoint folder.

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: broken JSON, or a model that is not supported.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such directory; wanted a checkpoint folder")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: there is no {CONFIG_FILE}; wanted a Hugging Face checkpoint folder")
    parsed = read_object(file)
    try:
        return DecoderConfig.from_hf(parsed)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_decoder(
    directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None, memory_kind: str | None = None
) -> Decoder:
    """The decoder stored in a folder: ``config.json`` with ``model.safetensors`` or its indexed shards.

    Every device reads just its own slice of each parameter from the memory-mapped file; no parameter is ever whole in
    host memory unless it is replicated. Stored rotary frequencies are passed over, as the config gives them; so is a
    head of tied embeddings, if it equals them.

    Args:
        directory: the folder. mesh: where the parameters go, split as `shardings` says (the forward pass needs Auto
            axes); by default the default device. dtype: type of the parameters; by default the stored one. memory_kind:
            "pinned_host" for parameters that wait in host memory until `calibrate` and `quantize_params` bring them to
            these devices; by default the devices' own.

    Raises:
        FileNotFoundError: the folder, its ``config.json`` or its weights are missing. ValueError: a broken file, a
            model that is not supported, a tensor that is missing, unknown or of another shape or kind, a head that
            differs from the embeddings it is tied to, or a mesh that does not split the parameters evenly.
    """
    config = read_config(directory)
    shapes = parameter_shapes(config)
    placement = None if mesh is None else shardings(config, mesh)
    checkpoint = open_checkpoint(directory)
    names = checkpoint_names(config)
    _check_tensors(checkpoint, shapes, names)
    if config.tie_word_embeddings:
        _check_tied_head(checkpoint)
    values: dict[str, Array] = {}
    for path, shape in shapes.items():
        sharding: Sharding | None = None if placement is None else placement[path]
        if memory_kind is not None:
            sharding = in_memory(sharding, memory_kind)
        values[path] = _load_parameter(checkpoint, names[path], shape, sharding, dtype)
    return assemble(config, values)


def assemble(config: DecoderConfig, values: Mapping[str, Any]) -> Decoder:
    """A decoder whose parameters are `values` ``{path: array}``, taken as they are (type, sharding).

    Raises:
        ValueError: a path is missing or unknown.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    wanted = set(parameter_shapes(config))
    if wanted != set(values):
        path = sorted(wanted ^ set(values))[0]
        raise ValueError(f"{path}: {'missing from the values' if path in wanted else 'no parameter of this decoder'}")
    filled = [(path, variable.replace(values["/".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)]
    model: Decoder = nnx.merge(graph, nnx.from_flat_state(filled))
    return model


def _tensors(name: TensorName, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """``{tensor name: index into the parameter's stack}`` of one parameter; () if it is no stack."""
    return {f"{module}.{name.parameter}": index for index, module in name.modules(shape)}


def _expected_tensors(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, TensorName]
) -> dict[str, tuple[int, ...]]:
    """``{tensor name: stored shape}`` of a whole checkpoint."""
    expected = {}
    for path, shape in shapes.items():
        name = names[path]
        matrix = shape[len(name.stack_fields) :]
        expected.update(dict.fromkeys(_tensors(name, shape), matrix[::-1] if name.transpose else matrix))
    return expected


def _check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, TensorName]
) -> None:
    """The checkpoint holds exactly the decoder's tensors, in floating point and in their shapes."""
    expected = _expected_tensors(shapes, names)
    found = set(checkpoint.names())
    if missing := sorted(set(expected) - found):
        raise ValueError(f"{checkpoint.directory}: tensor {missing[0]!r} is missing ({len(missing)} are)")
    for tensor, shape in expected.items():
        dtype, found_shape = checkpoint.info(tensor)
        if found_shape != shape:
            raise ValueError(
                f"{checkpoint.directory}: tensor {tensor!r} has shape {found_shape}, wanted {shape} by {CONFIG_FILE}"
            )
        if dtype.name not in _FLOAT_KINDS:
            raise ValueError(
                f"{checkpoint.directory}: tensor {tensor!r} has dtype {dtype.name}, wanted {', '.join(_FLOAT_KINDS)}; "
                "an already quantized checkpoint is no input"
            )
    tied = set() if "lm_head/kernel" in shapes else {_HEAD}
    if unknown := sorted(name for name in found - set(expected) - tied if not _DERIVED.search(name)):
        raise ValueError(
            f"{checkpoint.directory}: tensor {unknown[0]!r} belongs to no parameter of this model ({len(unknown)} such)"
        )


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """A head that is stored although it is tied equals the embeddings (transformers would not tie it otherwise)."""
    if _HEAD not in checkpoint.names():
        return
    head, table = checkpoint.tensor(_HEAD), checkpoint.tensor(_EMBEDDING)
    starts = range(0, table.shape[0], _ROWS)
    if head.shape != table.shape or any(
        not np.array_equal(head[start : start + _ROWS], table[start : start + _ROWS]) for start in starts
    ):
        raise ValueError(
            f"{checkpoint.directory}: tensor {_HEAD!r} differs from {_EMBEDDING!r}, but tie_word_embeddings is true in "
            f"{CONFIG_FILE}; wanted equal ones, or none; set tie_word_embeddings to false to use it"
        )


def _load_parameter(
    checkpoint: Checkpoint, name: TensorName, shape: tuple[int, ...], sharding: Sharding | None, dtype: DTypeLike | None
) -> Array:
    """One parameter on its devices. Experts stored in different types take the first one's."""
    tensors = list(_tensors(name, shape))
    target = checkpoint.info(tensors[0])[0] if dtype is None else np.dtype(dtype)

    def read(index: tuple[slice, ...] | None) -> NDArray[Any]:
        index = tuple(slice(None) for _ in shape) if index is None else index
        if not name.stack_fields:
            return row_major(_part(checkpoint.tensor(tensors[0]), name, index)).astype(target, copy=False)
        parts = [_part(checkpoint.tensor(tensor), name, index[1:]) for tensor in tensors[index[0]]]
        result = np.empty((len(parts), *parts[0].shape), target)
        for entry, part in zip(result, parts, strict=True):
            copy_values(entry, part)
        return result

    if sharding is None:
        return jnp.asarray(read(None))
    return jax.make_array_from_callback(shape, sharding, read)


def _part(stored: NDArray[Any], name: TensorName, index: tuple[slice, ...]) -> NDArray[Any]:
    """The part at `index` of one matrix (or vector), a view of the mapped file."""
    return stored[index[::-1]].T if name.transpose else stored[index]


def save_decoder(model: Decoder, directory: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Writes ``model.safetensors`` and ``config.json``, from which `load_decoder` makes the same model.

    The types of the parameters are kept, and one tensor at a time passes through host memory. The files of an earlier
    checkpoint in the folder are replaced once all new ones are written; if that fails, they stay as they were.

    Args:
        model: the decoder. directory: made if it is not there. max_shard_bytes: how many bytes of tensors one file may
            hold (a larger tensor has one of its own); what needs several files gets an index. By default one file.

    Raises:
        ValueError: `max_shard_bytes` is not a positive integer, or a parameter has a type that safetensors lacks.
    """
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise ValueError(f"max_shard_bytes is {max_shard_bytes!r}, wanted a positive integer, or None for one file")
    names = checkpoint_names(model.config)
    tensors: list[PendingTensor] = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        joined = "/".join(map(str, path))
        tensors += _pending(joined, names[joined], variable[...])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".save_decoder.", dir=folder) as temporary:
        fresh = Path(temporary)
        write_tensors(fresh, tensors, max_shard_bytes)
        written = model.config.to_hf(tensors[0].dtype.name)
        (fresh / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        _replace_files(fresh, folder)


def _pending(path: str, name: TensorName, value: Array) -> Iterator[PendingTensor]:
    """The checkpoint tensors of one parameter."""
    if not is_storable(value.dtype):
        raise ValueError(f"{path}: dtype {value.dtype} cannot be stored in safetensors; wanted a floating point type")
    for tensor, index in _tensors(name, value.shape).items():
        axes = range(value.ndim - len(index))
        order = tuple(reversed(axes)) if name.transpose else tuple(axes)
        shape = tuple(value.shape[len(index) + axis] for axis in order)
        yield entry_of(value, tensor, index, order, shape)


def _replace_files(fresh: Path, folder: Path) -> None:
    """Moves the files in, the config last, and removes those of another layout, which readers might take instead."""
    new = {file.name for file in fresh.iterdir()}
    for name in sorted(new, key=lambda name: (name == CONFIG_FILE, name == INDEX_FILE, name)):
        os.replace(fresh / name, folder / name)
    for file in folder.iterdir():
        if file.name not in new and (file.name in (SINGLE_FILE, INDEX_FILE) or _SHARD.fullmatch(file.name)):
            file.unlink()
