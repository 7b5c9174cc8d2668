"""A function evaluated in stages against the function itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.transform import jaxprs
from jaxfp4.transform.staged import Stage, Staged

X = jnp.arange(1.0, 5.0)
BEFORE = [jnp.float32(v) for v in (2, 3, 5)]
AFTER = [jnp.float32(v) for v in (7, 11, 13)]


def staged(function, settles, results, data=1):
    """Parameters first, the data last."""
    args = [*BEFORE, *[X] * data]
    closed = jax.make_jaxpr(function)(*args)
    stages = [Stage(tuple(s), tuple(r)) for s, r in zip(settles, results, strict=True)]
    return Staged(jaxprs.body_of(closed), range(len(BEFORE), len(args)), stages)


def through(job, data=(X,)):
    """The sums of the results of all stages, and how many values each starts from."""
    parameters, values, results, counts = list(BEFORE), dict(zip(job.data, data, strict=True)), [], []

    def run(program):
        known = {**job.consts, **{v: parameters[i] for v, i in job.parameters.items()}, **values}
        return program([known[v] for v in program.inputs])

    for number, stage in enumerate(job.stages):
        values = dict(zip(job.carried[number], run(job.advance(number - 1 if number else None, number)), strict=True))
        counts.append(len(values))
        results += run(job.observe(number))
        for i in stage.settles:
            parameters[i] = AFTER[i]
    return [float(jnp.sum(r)) for r in results], counts


def chain(a, b, c, x):
    """Each of the first results is of what the parameter of its stage meets."""
    y = x * a
    z = y + b
    return jnp.sum(x), jnp.sum(y), jnp.sum(z * z), z - c


def test_each_stage_sees_what_is_settled():
    found, counts = through(staged(chain, [[0], [1], [2]], [[0], [1], [2]]))
    z = np.asarray(X) * 7 + 11
    assert found == [X.sum(), 7 * X.sum(), (z * z).sum()]
    assert counts == [1, 1, 1]


def test_what_is_made_of_parameters_alone_is_made_again():
    def function(a, b, c, x):
        ab = jnp.exp(a) + b
        y = x * a
        return jnp.sum(y), jnp.sum(y * ab), c

    found, counts = through(staged(function, [[0], [1]], [[0], [1]]))
    assert found == pytest.approx([2 * float(X.sum()), 7 * float(X.sum()) * (np.exp(7) + 3)], rel=1e-6)
    assert counts == [1, 1]


def test_a_parameter_that_is_used_early_and_late():
    """The stage begins at its first use, and its results may come after the uses of later stages' parameters."""

    def function(a, b, c, x):
        y = x * a
        z = y * b
        return jnp.sum(z), jnp.sum(z * a), c

    found, counts = through(staged(function, [[0], [1]], [[1], [0]]))
    total = float(X.sum())
    assert found == [total * 2 * 3 * 2, total * 7 * 3]
    assert counts == [1, 1]


def test_data_that_are_used_again_are_carried():
    def function(a, b, c, x):
        y = x * a
        z = (y * b + x) * c
        return jnp.sum(y), jnp.sum(y * b), jnp.sum(z), z

    found, counts = through(staged(function, [[0], [1], [2]], [[0], [1], [2]]))
    total = float(X.sum())
    assert found == [total * 2, total * 7 * 3, total * (7 * 11 + 1) * 5]
    assert counts == [1, 2, 1]


def test_a_statistic_in_front_of_the_cut_is_not_carried():
    """What only the statistic needs is made from what the stage starts from."""

    def function(a, b, c, x):
        y = x * a
        return jnp.sum(y[:, None] * y[None, :]), y * b, c

    job = staged(function, [[0], [1]], [[], [0]])
    found, counts = through(job)
    assert found == [float(49 * X.sum() ** 2)] and counts == [1, 1]
    assert [v.aval.shape for v in job.carried[1]] == [X.shape]


def test_stages_without_uses_or_results():
    found, counts = through(staged(chain, [[], [0, 1], [2]], [[0], [], [1, 2]]))
    z = np.asarray(X) * 7 + 11
    assert found == [X.sum(), 7 * X.sum(), (z * z).sum()]
    assert counts[:2] == [1, 1]


def test_results_that_are_constants_or_inputs():
    def function(a, b, c, x):
        return 1.5, x, a, jnp.sum(x * b)

    found, _ = through(staged(function, [[0], [1]], [[0, 1], [2, 3]]))
    assert found == [1.5, X.sum(), 7, 3 * X.sum()]


def test_several_data_and_unused_ones():
    def function(a, b, c, x, y):
        return jnp.sum(x * a), jnp.sum(x * a * b), c

    found, counts = through(staged(function, [[0], [1]], [[0], [1]], data=2), (X, X + 1))
    assert found == [2 * X.sum(), 7 * 3 * X.sum()] and counts == [1, 1]


def test_without_results_of_its_own_all_starts_from_the_data():
    job = staged(lambda a, b, c, x: (jnp.sum(x * a), jnp.sum(x * a * b)), [[0], [1]], [[0], [1]])
    assert through(job) == ([2 * X.sum(), 7 * 3 * X.sum()], [1, 1])
    assert job.carried == (job.data, job.data)
