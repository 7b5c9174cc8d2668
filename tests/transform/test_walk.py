"""What the walk finds in each model of `cases`, and what observing it sees and leaves alone."""

import jax
import numpy as np
import pytest

from jaxfp4.algorithms import observed
from jaxfp4.recipes import Plan, plan

from .cases import CASES, EVERYTHING, Case, Found

each_case = pytest.mark.parametrize("name", CASES)


def planned(case: Case) -> Plan:
    return plan(case.apply, case.params(), *case.args(), recipe=EVERYTHING)


def assert_same_outputs(found: object, expected: object) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@each_case
def test_finds_axes_and_siblings(name):
    case = CASES[name]
    result = planned(case)
    found = {
        e.path: Found(e.weight.contracted, e.weight.layer_axes, e.weight.expert_axes, e.weight.siblings)
        for e in result.quantized
    }
    assert found == case.found, str(result)


@each_case
def test_statistics_and_outputs_under_jit(name):
    """Statistics are the amaxes computed by hand, and the model's outputs keep their bits."""
    case = CASES[name]
    observe = jax.jit(observed(case.apply, planned(case)))

    params, args = case.params(whole_numbers=True), case.args(whole_numbers=True)
    _, stats = observe(params, *args)
    expected = case.amaxes({k: np.asarray(v) for k, v in params.items()}, *args)
    assert stats.keys() == case.found.keys() == expected.keys()
    for path, amax in expected.items():
        assert stats[path]["amax"].dtype == np.float32
        assert stats[path]["amax"].shape == np.shape(amax)
        np.testing.assert_array_equal(stats[path]["amax"], amax, err_msg=path)

    params, args = case.params(), case.args()
    assert_same_outputs(observe(params, *args)[0], jax.jit(case.apply)(params, *args))


EAGER = [
    "plain",
    "cast",
    "jit in jit",
    "jit that returns the weight",
    "checkpoint with policy",
    "custom_jvp",
    "custom_vjp",
]
EAGER += ["siblings", "used twice", "take, scalar", "gather, vector", "cond, taken", "scan", "experts in a python loop"]


@pytest.mark.parametrize("name", EAGER)
def test_statistics_and_outputs_eagerly(name):
    case = CASES[name]
    params, args = case.params(), case.args()
    outputs, stats = observed(case.apply, planned(case))(params, *args)
    assert_same_outputs(outputs, case.apply(params, *args))
    for path, amax in case.amaxes({k: np.asarray(v) for k, v in params.items()}, *args).items():
        np.testing.assert_allclose(stats[path]["amax"], amax, rtol=4e-3, err_msg=path)


@pytest.mark.parametrize("name", ["plain", "static slice", "scan", "experts in a scan", "gather, vector"])
def test_plans_of_abstract_arguments(name):
    """`ShapeDtypeStruct`s give the plan that arrays give."""
    case = CASES[name]
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (case.params(), case.args()))
    assert plan(case.apply, abstract[0], *abstract[1], recipe=EVERYTHING) == planned(case)
