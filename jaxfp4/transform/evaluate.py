"""A model's function evaluated with hooks: as it is, observed, or with other activations."""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array

from jaxfp4.transform import jaxprs
from jaxfp4.transform.rebuild import REBUILDERS
from jaxfp4.transform.scope import Hooks, Observations, Scope, Value


def evaluate(body: jaxprs.Body, inputs: Sequence[Value], hooks: Hooks) -> tuple[list[Array], Observations]:
    """A jaxpr's results and, by leaf, the statistic of the activations that each planned weight met.

    Planned weights are the `Tracked` ones among `inputs`. A jaxpr inside an equation is entered only if it contracts
    one of them, so custom derivatives elsewhere survive; those of calls that are entered become the derivatives of
    their bodies.
    """
    return Scope(hooks, REBUILDERS).inner(body, inputs)
