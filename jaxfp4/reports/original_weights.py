"""Where a checkpoint before quantization holds a weight: by its own name, or in a stack of experts."""

from __future__ import annotations

import re
from typing import Any

from numpy.typing import NDArray

from jaxfp4.checkpoints.safetensors_file import Checkpoint
from jaxfp4.checkpoints.verification.quantized_modules import PlainModule, StoredTensor
from jaxfp4.reports.weights import differ

_EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d{1,9})\.(?P<last>gate_proj|up_proj|down_proj|w1|w2|w3)")
_STACKS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
_SECOND_HALF = ("up_proj", "w3")


def original_weight(source: Checkpoint, module: str, shape: tuple[int, ...] | None) -> NDArray[Any] | None:
    """The weight `[N, K]` of a module in the original, a view; None if there is none in an ordinary float format.

    `MODULE.weight`, or for an expert its part of `experts.gate_up_proj` `[E, 2 N, K]` or `[E, K, 2 N]`, gate first, and
    of `experts.down_proj` `[E, N, K]` or `[E, K, N]`. None where the sizes fit both, so that they do not tell which;
    and where `gate_up_proj_bias` shows that gate and up alternate.

    Raises ValueError if `MODULE.weight` has another shape than `shape`.
    """
    name = f"{module}.weight"
    weight = _floats(source, name)
    if weight is None:
        return _of_stack(source, module, shape)
    if weight.shape != shape:
        raise ValueError(
            f"{source.directory}: tensor {name!r} has shape {weight.shape}: wanted {shape}, that of the quantized "
            "weight; name the checkpoint that was quantized"
        )
    return weight


def _of_stack(source: Checkpoint, module: str, shape: tuple[int, ...] | None) -> NDArray[Any] | None:
    found = _EXPERT.fullmatch(module)
    if found is None or shape is None:
        return None
    last, number = found["last"], int(found["number"])
    name = f"{found['experts']}.{_STACKS.get(last, 'down_proj')}"
    stack = _floats(source, name)
    if stack is None or stack.ndim != 3 or number >= len(stack) or f"{name}_bias" in source.names():
        return None
    rows, length = shape
    wanted = (2 * rows, length) if last in _STACKS else (rows, length)
    matrix = stack[number]
    if wanted[0] == wanted[1] or wanted not in (matrix.shape, matrix.shape[::-1]):
        return None
    matrix = matrix if matrix.shape == wanted else matrix.T
    return matrix[rows:] if last in _SECOND_HALF else matrix[:rows]


def changed_vectors(checkpoint: Checkpoint, source: Checkpoint) -> tuple[str, ...]:
    """The one-dimensional tensors, such as norms, whose values are not the original's rounded to their type."""
    names = sorted(set(checkpoint.names()) & set(source.names()))
    return tuple(name for name in names if len(checkpoint.info(name)[1]) == 1 and _is_changed(checkpoint, source, name))


def _is_changed(checkpoint: Checkpoint, source: Checkpoint, name: str) -> bool:
    before, after = _floats(source, name), _floats(checkpoint, name)
    return before is not None and after is not None and before.shape == after.shape and differ(before, after)


def _floats(source: Checkpoint, name: str) -> NDArray[Any] | None:
    try:
        dtype, shape = source.info(name)
    except KeyError:
        return None
    plain = PlainModule(name, StoredTensor(name, dtype, shape), "", 0)
    return source.tensor(name) if plain.is_unquantized else None
