"""A function whose loops over stacked layers are unrolled, so that each layer is a parameter of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jaxfp4.tensors.memory import Layer, abstract, stack_layers
from jaxfp4.transform import jaxprs
from jaxfp4.transform.trace import ApplyFn, Leaves, trace

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A stacked array as the arrays of its layers, by their places along `axes` of it."""

    layers: Mapping[Index, Any]
    axes: tuple[int, ...]
    leaf: int

    def dimension(self, d: int) -> int:
        """The dimension of a layer that is dimension `d` of the stacked array."""
        return d - sum(a < d for a in self.axes)

    def mapped(self, function: Callable[[Any], Any]) -> Parts:
        """The same of a function of each layer."""
        return dataclasses.replace(self, layers={index: function(x) for index, x in self.layers.items()})

    def transposed(self, permutation: Sequence[int]) -> Parts:
        """What `transpose` makes of the stacked array."""
        own = [self.dimension(d) for d in permutation if d not in self.axes]
        moved = self if own == sorted(own) else self.mapped(lambda x: lax.transpose(x, own))
        return dataclasses.replace(moved, axes=tuple(list(permutation).index(a) for a in self.axes))

    def sliced(self, starts: Sequence[int], limits: Sequence[int]) -> Parts:
        """What `slice` makes of the stacked array."""
        bounds = [(starts[a], limits[a]) for a in self.axes]
        kept = {
            tuple(i - low for i, (low, _) in zip(index, bounds, strict=True)): x
            for index, x in self.layers.items()
            if all(low <= i < high for i, (low, high) in zip(index, bounds, strict=True))
        }
        own = [d for d in range(len(starts)) if d not in self.axes]
        cut = [starts[d] for d in own], [limits[d] for d in own]
        return dataclasses.replace(self, layers=kept).mapped(lambda x: lax.slice(x, *cut))

    def without(self, dimensions: Sequence[int]) -> Any:
        """What `squeeze` makes of the stacked array: dimensions of size 1 are dropped."""
        own = [self.dimension(d) for d in dimensions if d not in self.axes]
        kept = [i for i, a in enumerate(self.axes) if a not in dimensions]
        axes = tuple(self.axes[i] - sum(d < self.axes[i] for d in dimensions) for i in kept)
        layers = {tuple(index[i] for i in kept): lax.squeeze(x, own) for index, x in self.layers.items()}
        return dataclasses.replace(self, layers=layers, axes=axes) if axes else layers[()]

    def entry(self, i: int) -> Any:
        """One entry along dimension 0, along which layers lie."""
        place = self.axes.index(0)
        layers = {(*n[:place], *n[place + 1 :]): x for n, x in self.layers.items() if n[place] == i}
        axes = tuple(a - 1 for a in self.axes if a)
        return dataclasses.replace(self, layers=layers, axes=axes) if axes else layers[()]

    def joined(self) -> Array:
        """The stacked array."""
        sizes = tuple(n + 1 for n in max(self.layers))
        return stack_layers([self.layers[index] for index in sorted(self.layers)], sizes, self.axes)


@dataclasses.dataclass(frozen=True)
class Split:
    """Parameters of which some are taken apart into layers."""

    leaves: Leaves
    """All as they are."""

    axes: Mapping[int, tuple[int, ...]]
    """Of those that are taken apart, by number, the axes along which their layers lie."""

    loops: Mapping[int, int]
    """Of some of them, the number of the loop that goes over their layers."""

    steps: int = 0
    """How often the longest of these loops goes round."""

    def indices(self, leaf: int) -> list[Index]:
        """The layers of a parameter; one without place for a parameter that is not taken apart."""
        axes = self.axes.get(leaf, ())
        return list(np.ndindex(*(self.leaves.values[leaf].shape[a] for a in axes)))

    def apart(self) -> list[Any]:
        """All parameters, `Layer`s of those that are taken apart, and the numbers of the steps of the longest loop.

        As the numbers are parameters, what a loop scans over besides does not make its steps differ in form.
        """
        result = []
        for leaf, value in enumerate(self.leaves.values):
            axes = self.axes.get(leaf)
            if axes is None:
                result.append(value)
            else:
                result += [Layer(value, dict(zip(axes, index, strict=True))) for index in self.indices(leaf)]
        return [*result, *(np.asarray(i, np.int32) for i in range(self.steps))]

    def joined(self, values: Sequence[Any]) -> list[Any]:
        """One value for each parameter: of those that are taken apart, `Parts`."""
        rest = iter(values)
        result = []
        for leaf in range(len(self.leaves.values)):
            layers = {index: next(rest) for index in self.indices(leaf)}
            axes = self.axes.get(leaf)
            result.append(layers[()] if axes is None else Parts(layers, axes, leaf))
        return result


def find_split(
    apply_fn: ApplyFn,
    leaves: Leaves,
    args: tuple[Any, ...],
    layered: Mapping[int, tuple[int, ...]],
    kept: Collection[int] = (),
) -> Split | None:
    """How to take parameters apart so that each layer of `layered` ones, given by their axes, is one of its own.

    What is scanned beside them is taken apart too, but for `kept` ones. None if one of `layered` goes elsewhere than
    into scans over its layers or slices: into a loop that picks layers by itself, say.
    """
    split = Split(leaves, layered, {})
    unroller = _Unroller()
    body = trace(apply_fn, leaves, args).body

    def walk(values: list[Any], args: tuple[Any, ...]) -> None:
        inputs = [*split.joined(values), *jax.tree.leaves(args)]
        unroller.known = {id(x): leaf for leaf, x in enumerate(inputs[: len(leaves.values)])}
        unroller.run(body, inputs)

    jax.eval_shape(walk, [abstract(x) for x in split.apart()], args)
    if unroller.whole & layered.keys():
        return None
    axes = {**layered, **dict.fromkeys(unroller.beside.difference(layered, kept), (0,))}
    return Split(leaves, axes, unroller.loops, unroller.steps)


def unrolled(apply_fn: ApplyFn, split: Split) -> ApplyFn:
    """`apply_fn` as a function of a list of parameters, `split.apart()`."""

    def function(values: Sequence[Any], *args: Any) -> Any:
        traced = trace(apply_fn, split.leaves, args)
        numbers = values[len(values) - split.steps :]
        results = _Unroller(numbers).run(traced.body, [*split.joined(values), *jax.tree.leaves(args)])
        return jax.tree.unflatten(traced.out_tree, [x.joined() if isinstance(x, Parts) else x for x in results])

    return function


class _Unroller:
    """Evaluates a jaxpr some of whose values are `Parts`."""

    def __init__(self, numbers: Sequence[Any] = ()) -> None:
        """With the numbers of a loop's steps as arrays, or numbers as they are."""
        self._numbers = numbers
        self.known: Mapping[int, int] = {}
        """Parameters that are no `Parts` yet: their numbers by the identity of the value."""
        self.whole: set[int] = set()
        """Parameters whose layers had to be put together."""
        self.beside: set[int] = set()
        """Those of `known` over which a loop goes that is unrolled."""
        self.loops: dict[int, int] = {}
        """By parameter, the first loop that goes over its layers."""
        self.steps = 0
        """Of the longest loop that was unrolled."""
        self._count = 0

    def run(self, body: jaxprs.Body, inputs: Sequence[Any]) -> list[Any]:
        """The results, arrays or `Parts`."""
        return jaxprs.run_body(body, inputs, self._results)

    def _results(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        if not any(isinstance(x, Parts) for x in operands):
            return jaxprs.bind(eqn, operands)
        name, first = eqn.primitive.name, operands[0]
        if name in jaxprs.CALLS:
            return self.run(jaxprs.body_of(eqn.params[jaxprs.CALLS[name]]), operands)
        if name == "scan":
            return self._scan(eqn, operands)
        if name in ("convert_element_type", "copy", "copy_p"):
            return [first.mapped(lambda x: jaxprs.bind(eqn, [x])[0])]
        if name == "sharding_constraint":
            # It is one of the whole stack, and changes no value.
            return [first]
        if name == "transpose":
            return [first.transposed(eqn.params["permutation"])]
        if name == "slice" and not eqn.params["strides"]:
            return [first.sliced(eqn.params["start_indices"], eqn.params["limit_indices"])]
        if name == "squeeze":
            return [first.without(eqn.params["dimensions"])]
        return jaxprs.bind(eqn, [self._whole(x) for x in operands])

    def _whole(self, x: Any) -> Any:
        if not isinstance(x, Parts):
            return x
        self.whole.add(x.leaf)
        return x.joined()

    def _scan(self, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        parts = jaxprs.scan_parts(eqn)
        outer, xs = operands[: -parts.xs or None], operands[len(operands) - parts.xs :]
        outer = [self._whole(x) for x in outer]
        xs = [x if isinstance(x, Parts) and 0 in x.axes else self._whole(x) for x in xs]
        if not any(isinstance(x, Parts) for x in xs):
            return jaxprs.bind(eqn, [*outer, *xs])
        self._count += 1
        for x in xs:
            if isinstance(x, Parts):
                self.loops.setdefault(x.leaf, self._count)
            elif id(x) in self.known:
                self.beside.add(self.known[id(x)])
        consts, carry = outer[: parts.consts], outer[parts.consts :]
        body = jaxprs.body_of(eqn.params["jaxpr"])
        steps = range(eqn.params["length"])
        self.steps = max(self.steps, len(steps))
        ys: dict[int, list[Any]] = {}
        for i in reversed(steps) if eqn.params["reverse"] else steps:
            number = self._numbers[i] if self._numbers else i
            entries = [
                x.entry(i) if isinstance(x, Parts) else lax.dynamic_index_in_dim(x, number, keepdims=False) for x in xs
            ]
            results = [self._whole(x) for x in self.run(body, [*consts, *carry, *entries])]
            carry, ys[i] = results[: parts.carry], results[parts.carry :]
        return [*carry, *(jnp.stack(column) for column in zip(*(ys[i] for i in steps), strict=True))]
