"""Which checkpoint module a parameter of the tree is written to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from jaxfp4.formats import LeafError

LAYER, EXPERT = "{layer}", "{expert}"
_WEIGHT_FIELDS = ("kernel", "embedding", "scale", "weight")


@dataclasses.dataclass(frozen=True)
class TensorName:
    """The checkpoint module that holds a parameter.

    `module` may hold the literal fields `{layer}` and `{expert}`: the parameter's first axis then stacks layers, or
    experts, and each entry is written as a tensor of its own. With both, layers are the first axis, experts the second.
    """

    module: str

    transpose: bool = False
    """Whether the trailing two axes of an unquantized array are swapped on writing. A `QuantizedWeight` knows its
    contraction and is written as `[outputs, contraction]` in any case."""

    parameter: str = "weight"
    """Last part of an unquantized tensor's name; a `QuantizedWeight` is always its module's `weight`."""

    @property
    def stack_fields(self) -> tuple[str, ...]:
        """The fields that `module` holds, in the order of the parameter's leading axes."""
        return tuple(field for field in (LAYER, EXPERT) if field in self.module)

    def modules(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        """`(index into the leading axes, module name)` of every tensor that a parameter of `shape` is written as.

        >>> list(TensorName("experts.{expert}.up_proj").modules((2, 64, 32)))
        [((0,), 'experts.0.up_proj'), ((1,), 'experts.1.up_proj')]
        """
        fields = self.stack_fields
        for index in itertools.product(*(range(n) for n in shape[: len(fields)])):
            module = self.module
            for field, number in zip(fields, index, strict=True):
                module = module.replace(field, str(number))
            yield index, module


def default_name(path: str, ndim: int, *, quantized: bool) -> TensorName:
    """The name for a parameter that `names` does not mention: its path with '.' for '/'.

    A last component `kernel`, `embedding`, `scale` or `weight` becomes `weight`; an unquantized two-dimensional
    `kernel` (Flax: `[inputs, outputs]`) is transposed as well. Any other last component is the module of a
    `QuantizedWeight`, and the parameter of another array.

    >>> default_name("layers/0/mlp/up_proj/kernel", 2, quantized=True).module
    'layers.0.mlp.up_proj'
    >>> default_name("layers/0/attn/k_proj/bias", 1, quantized=False)
    TensorName(module='layers.0.attn.k_proj', transpose=False, parameter='bias')
    """
    *parents, last = path.split("/")
    if last in _WEIGHT_FIELDS:
        return TensorName(".".join(parents), transpose=last == "kernel" and ndim == 2 and not quantized)
    if quantized:
        return TensorName(path.replace("/", "."))
    return TensorName(".".join(parents), parameter=last)


def resolve_name(path: str, shape: tuple[int, ...], given: str | TensorName | None, *, quantized: bool) -> TensorName:
    """The name for one parameter: `given` (a string is the module, the rest as by default), or the default.

    Raises LeafError if the name does not fit the parameter, TypeError if it is neither a string nor a TensorName.
    """
    if given is None:
        return default_name(path, len(shape), quantized=quantized)
    if isinstance(given, str):
        stacked = len(TensorName(given).stack_fields)
        default = default_name(path, len(shape) - stacked, quantized=quantized)
        name = TensorName(given, default.transpose, "bias" if default.parameter == "bias" else "weight")
    elif isinstance(given, TensorName):
        name = given
    else:
        raise TypeError(f"names[{path!r}] is {given!r}: wanted the module's name as a string, or a TensorName")
    rest = name.module.replace(LAYER, "").replace(EXPERT, "")
    if "{" in rest or "}" in rest:
        raise LeafError(f"{path}: module name {name.module!r}: wanted no braces but {LAYER} and {EXPERT}")
    fields = name.stack_fields
    if len(shape) < len(fields) + (2 if name.transpose and not quantized else 0):
        raise LeafError(
            f"{path}: shape {shape} for {name}: wanted one leading axis for each of {list(fields)}, and two more to "
            "transpose; correct the name"
        )
    if quantized and name.parameter != "weight":
        raise LeafError(f"{path}: parameter={name.parameter!r} for a QuantizedWeight: wanted 'weight'; leave it out")
    return name


def refuse_unmatched(names: Mapping[str, str | TensorName], paths: list[str]) -> None:
    """ValueError if `names` mentions a path that the tree does not have."""
    unmatched = sorted(set(names) - set(paths))
    if unmatched:
        more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
        example = f", such as {paths[0]!r}" if paths else ""
        raise ValueError(
            f"names has {unmatched[0]!r}{more}, which match no leaf: wanted paths of the tree{example}; correct or "
            "remove them"
        )
