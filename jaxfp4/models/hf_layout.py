"""The Hugging Face safetensors layout of Llama and Qwen3-MoE: which tensor each parameter is; reading and writing it.

A checkpoint stores a linear weight as ``[out, in]`` and every expert by itself; the decoder keeps kernels as ``[in,
out]`` and a layer's experts as one stack ``[experts, in, out]``. `checkpoint_names` says so as data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
from safetensors.numpy import save_file

from jaxfp4.checkpoints.names import TensorName
from jaxfp4.checkpoints.safetensors_file import Checkpoint, open_checkpoint
from jaxfp4.models.config import DecoderConfig
from jaxfp4.models.decoder import Decoder
from jaxfp4.models.sharding import parameter_shapes, shardings

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_MODULES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "router": "gate",
}
_FLOAT_KINDS = ("float32", "bfloat16", "float16")


def checkpoint_names(config: DecoderConfig) -> dict[str, TensorName]:
    """``{parameter path: TensorName}`` for every parameter of the decoder, as `jaxfp4.export_checkpoint` takes it.

    The tensor is ``module + ".weight"``; a `module` with the literal field ``{expert}`` stands for one tensor per
    expert, stacked along the parameter's first axis; `transpose` says that the stored matrix is the parameter's (last
    two axes) transposed.
    """
    return {path: _tensor_name(path) for path in parameter_shapes(config)}


def _tensor_name(path: str) -> TensorName:
    parts = path.split("/")
    if path == "embed/embedding":
        return TensorName("model.embed_tokens", transpose=False)
    if path == "lm_head/kernel":
        return TensorName("lm_head", transpose=True)
    names = [_MODULES.get(part, part) for part in parts]
    if "experts" in parts:
        at = parts.index("experts")
        return TensorName(".".join(["model", *names[: at + 1], "{expert}", *names[at + 1 :]]), transpose=True)
    return TensorName(".".join(["model", *names[:-1]]), transpose=parts[-1] == "kernel")


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
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file}: a JSON {type(parsed).__name__}, wanted an object")
    try:
        return DecoderConfig.from_hf(parsed)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_decoder(directory: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> Decoder:
    """The decoder stored in a folder: ``config.json`` with ``model.safetensors`` or its indexed shards.

    Every device reads just its own slice of each parameter from the memory-mapped file; no parameter is ever whole in
    host memory unless it is replicated.

    Args:
        directory: the folder. mesh: where the parameters go, split as `shardings` says (the forward pass needs Auto
            axes); by default the default device. dtype: type of the parameters; by default the stored one.

    Raises:
        FileNotFoundError: the folder, its ``config.json`` or its weights are missing. ValueError: a broken file, a
            model that is not supported, a tensor that is missing, unknown or of another shape or kind, or
            a mesh that does not split the parameters evenly.
    """
    config = read_config(directory)
    shapes = parameter_shapes(config)
    placement = None if mesh is None else shardings(config, mesh)
    checkpoint = open_checkpoint(directory)
    names = checkpoint_names(config)
    _check_tensors(checkpoint, shapes, names)
    values: dict[str, Array] = {}
    for path, shape in shapes.items():
        sharding = None if placement is None else placement[path]
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
    if unknown := sorted(found - set(expected)):
        raise ValueError(
            f"{checkpoint.directory}: tensor {unknown[0]!r} belongs to no parameter of this model ({len(unknown)} such)"
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
            return _read_matrix(checkpoint.tensor(tensors[0]), name, index).astype(target)
        parts = [_read_matrix(checkpoint.tensor(tensor), name, index[1:]) for tensor in tensors[index[0]]]
        return np.stack(parts).astype(target)

    if sharding is None:
        return jnp.asarray(read(None))
    return jax.make_array_from_callback(shape, sharding, read)


def _read_matrix(stored: NDArray[Any], name: TensorName, index: tuple[slice, ...]) -> NDArray[Any]:
    """The part at `index` of one matrix (or vector), copied out of the mapped file."""
    part = stored[index[::-1]].T if name.transpose else stored[index]
    return np.array(part, order="C")


def save_decoder(model: Decoder, directory: str | Path) -> None:
    """Writes ``model.safetensors`` and ``config.json``, from which `load_decoder` makes the same model.

    The types of the parameters are kept. Existing files of these names are replaced, each at once. The whole model
    passes through host memory.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    names = checkpoint_names(model.config)
    tensors: dict[str, NDArray[Any]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        tensors.update(_stored_tensors(names["/".join(map(str, path))], np.asarray(variable[...])))
    weights = folder / (WEIGHTS_FILE + ".tmp")
    save_file(tensors, weights, metadata={"format": "pt"})
    os.replace(weights, folder / WEIGHTS_FILE)
    config = folder / (CONFIG_FILE + ".tmp")
    dtype = next(iter(tensors.values())).dtype.name
    config.write_text(json.dumps(model.config.to_hf(dtype), indent=2) + "\n", encoding="utf-8")
    os.replace(config, folder / CONFIG_FILE)


def _stored_tensors(name: TensorName, value: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The checkpoint tensors of one parameter."""
    parts = {tensor: value[index] for tensor, index in _tensors(name, value.shape).items()}
    return {tensor: np.ascontiguousarray(part.T if name.transpose else part) for tensor, part in parts.items()}
