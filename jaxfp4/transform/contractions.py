"""The equations in which a parameter can meet an activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jaxfp4.transform.views import View

CONTRACTIONS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A contraction of a weight, operand number `weight`, with an activation, operand number `activation`.

    Dimensions are those of the operands. `contracted` and `batched` pair a dimension of the weight with one of the
    activation. With groups, the activation's rows along `ragged_dimension` belong to consecutive entries of the
    weight's `group_dimension`, as many to each as operand number 2 says.
    """

    weight: int
    activation: int
    contracted: tuple[tuple[int, int], ...]
    batched: tuple[tuple[int, int], ...]
    group_dimension: int | None = None
    ragged_dimension: int | None = None

    @property
    def weight_contracted(self) -> tuple[int, ...]:
        """The weight's contracted dimensions."""
        return tuple(w for w, _ in self.contracted)

    @property
    def weight_stacked(self) -> tuple[int, ...]:
        """The weight's dimensions along which separate weights are stacked."""
        groups = () if self.group_dimension is None else (self.group_dimension,)
        return tuple(w for w, _ in self.batched) + groups


def contraction_with(eqn: JaxprEqn, weight: int) -> Contraction | str:
    """`eqn` as a contraction whose operand number `weight` is the weight, or why it cannot be quantized."""
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return "it is contracted by a convolution, which NVFP4 engines do not run"
    if name == "dot_general":
        (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
        return _oriented(weight, (left, right), (left_batch, right_batch))
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    if weight != 1 or len(groups) != 1 or len(ragged) != 1 or ragged[0] in (*left, *left_batch):
        return "it meets a ragged contraction in a way other than one weight for each group of rows"
    oriented = _oriented(weight, (left, right), (left_batch, right_batch))
    return dataclasses.replace(oriented, group_dimension=groups[0], ragged_dimension=ragged[0])


def _oriented(
    weight: int, contracted: tuple[Sequence[int], Sequence[int]], batched: tuple[Sequence[int], Sequence[int]]
) -> Contraction:
    activation = 1 - weight
    return Contraction(
        weight,
        activation,
        tuple(zip(contracted[weight], contracted[activation], strict=True)),
        tuple(zip(batched[weight], batched[activation], strict=True)),
    )


def weight_operand(eqn: JaxprEqn, views: Sequence[View | None]) -> int | None:
    """Which operand of a contraction is a parameter, if exactly one of them is.

    Of two, one whose entries were picked by an index array is the activation: rows of an embedding table.
    """
    if eqn.primitive.name not in CONTRACTIONS:
        return None
    places = [i for i, view in enumerate(views[:2]) if view is not None]
    if len(places) == 2:
        places = [i for i, view in enumerate(views[:2]) if view is not None and not view.gathered]
    return places[0] if len(places) == 1 else None
