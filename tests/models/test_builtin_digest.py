"""One number for all layouts, Python and JAX versions, and backends: the built-in model quantized with max."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxfp4
from jaxfp4.models import load_builtin

DIGEST = "633832baa33f3765971ad923479ea66041fdb01e8162260dd1cfa590b38a17a9"


def digest_on(mesh):
    apply_fn, params = jaxfp4.from_flax(load_builtin(mesh))
    plan = jaxfp4.plan(apply_fn, params, jax.ShapeDtypeStruct((1, 8), np.int32))
    return jaxfp4.digest(jaxfp4.quantize_params(params, plan))


@pytest.mark.parametrize("sizes", [None, (8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_digest(sizes):
    mesh = sizes and jax.make_mesh(sizes, ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
    assert digest_on(mesh) == DIGEST


@pytest.mark.gpu
def test_digest_on_accelerators():
    assert jax.devices()[0].platform == "gpu"
    assert digest_on(None) == DIGEST
    count = jax.device_count()
    for tp in {n for n in (1, 2, 4, 8) if count % n == 0}:
        mesh = jax.make_mesh((tp, count // tp), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
        assert digest_on(mesh) == DIGEST
