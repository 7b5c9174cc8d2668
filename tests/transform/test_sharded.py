"""Models on a mesh: statistics of shard_map bodies are reductions over the logical activation, whatever is split."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

from jaxfp4.algorithms import observed, quantize_params, quantized
from jaxfp4.recipes import plan

from .cases import EVERYTHING, amax

D, F, E, T = 64, 32, 4, 8


def ints(*shape: int, limit: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(1 - limit, limit, shape), jnp.float32)


X, XE = ints(T, D, limit=9), ints(E, T, D, limit=9)
ROWS = np.abs(np.asarray(X)).max(1)


def make_mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(kind, kind))


@dataclasses.dataclass(frozen=True)
class Local:
    """A shard_map of `body(params, x)`, and what its weights meet."""

    body: Callable[..., Any]
    params: dict[str, jax.Array]
    specs: dict[str, P]
    x_spec: P
    out_spec: P
    expected: dict[str, Any]
    x: Any = dataclasses.field(default_factory=lambda: X)
    manual: frozenset[str] = frozenset()

    def apply(self, check_vma: bool) -> Callable[..., Any]:
        mapped = jax.shard_map(
            self.body,
            mesh=make_mesh(),
            in_specs=(self.specs, self.x_spec),
            out_specs=self.out_spec,
            check_vma=check_vma,
            axis_names=set(self.manual) or {"tp", "ep"},
        )
        return lambda p, x: mapped(p, x)


def _loop(p, x):
    return lax.scan(lambda c, w: (jnp.sign(c @ w) + c @ p["u"], None), x, p["w"])[0]


def _loop_expected(w, u):
    c, seen = np.asarray(X), []
    for i in range(2):
        seen.append(amax(c))
        c = np.sign(c @ np.asarray(w)[i]) + c @ np.asarray(u)
    return {"w": np.array(seen), "u": max(seen)}


def _while(p, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.sign(s[1] @ p["w"])), (0, x))[1]


def _ragged(p, x):
    """Every device has two experts and two rows."""
    sizes = lax.dynamic_slice(jnp.array([1, 1, 0, 2, 0, 0, 1, 0], jnp.int32), (2 * lax.axis_index("ep"),), (2,))
    return lax.ragged_dot(x, p["w"], sizes)


def contracted(p, x):
    return lax.psum(x @ p["w"], "tp")


LOCAL = {
    "split contraction": Local(contracted, {"w": ints(D, F)}, {"w": P("tp")}, P(None, "tp"), P(), {"w": amax(X)}),
    "partial manual": Local(
        contracted, {"w": ints(D, F)}, {"w": P("tp")}, P(None, "tp"), P(), {"w": amax(X)}, manual=frozenset({"tp"})
    ),
    "experts": Local(
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]),
        {"w": ints(E, D, F)},
        {"w": P("ep", None, "tp")},
        P("ep"),
        P("ep", None, "tp"),
        {"w": amax(XE, (1, 2))},
        XE,
    ),
    "experts and contraction": Local(
        lambda p, x: lax.psum(jnp.einsum("etd,edf->etf", x, p["w"]), "tp"),
        {"w": ints(E, D, F)},
        {"w": P("ep", "tp")},
        P("ep", None, "tp"),
        P("ep"),
        {"w": amax(XE, (1, 2))},
        XE,
    ),
    "experts that meet all tokens": Local(
        lambda p, x: lax.psum(jnp.einsum("td,edf->tef", x, p["w"]).sum(1), "ep"),
        {"w": ints(E, D, F)},
        {"w": P("ep", None, "tp")},
        P(),
        P(None, "tp"),
        {"w": amax(X)},
    ),
    "experts in a python loop": Local(
        lambda p, x: lax.psum(x @ p["w"][0] + 2 * x @ p["w"][1], "ep"),
        {"w": ints(8, D, F)},
        {"w": P("ep")},
        P(),
        P(),
        {"w": np.array([1, 2] * 4) * amax(X)},
    ),
    "ragged_dot": Local(
        _ragged,
        {"w": ints(8, D, F)},
        {"w": P("ep")},
        P("ep"),
        P("ep"),
        {"w": np.array([ROWS[0], ROWS[1], 0, max(ROWS[2:4]), 0, 0, ROWS[6], 0])},
    ),
    "scan": Local(
        _loop,
        {"w": ints(2, D, D), "u": ints(D, D)},
        {"w": P(), "u": P()},
        P("tp"),
        P("tp"),
        _loop_expected(ints(2, D, D), ints(D, D)),
    ),
    "while_loop": Local(_while, {"w": ints(D, D)}, {"w": P()}, P("tp"), P("tp"), {"w": amax(X)}),
    "cond": Local(
        lambda p, x: lax.cond(x.sum() < 1e9, lambda: x @ p["w"], lambda: x),
        {"w": ints(D, D)},
        {"w": P()},
        P("tp"),
        P("tp"),
        {"w": amax(X)},
    ),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", LOCAL)
def test_shard_map(name, check_vma):
    local = LOCAL[name]
    apply = local.apply(check_vma)
    result = plan(apply, local.params, local.x, recipe=EVERYTHING)
    outputs, stats = jax.jit(observed(apply, result))(local.params, local.x)
    np.testing.assert_array_equal(outputs, jax.jit(apply)(local.params, local.x))
    assert stats.keys() == local.expected.keys()
    for path, expected in local.expected.items():
        np.testing.assert_array_equal(stats[path]["amax"], expected, err_msg=path)


@pytest.mark.parametrize(
    "name, dynamic", [("split contraction", True), ("split contraction", False), ("experts and contraction", True)]
)
def test_quantized_shard_map(name, dynamic):
    """Local blocks are logical blocks, and a dynamic scale is a maximum over the devices: as on one device."""
    local = LOCAL[name]
    whole = {
        "split contraction": lambda p, x: x @ p["w"],
        "experts and contraction": lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]),
    }[name]
    apply = local.apply(True)
    result, single = (plan(f, local.params, local.x, recipe=EVERYTHING) for f in (apply, whole))
    assert result == single
    stats = None if dynamic else observed(whole, single)(local.params, local.x)[1]
    qparams = quantize_params(local.params, result, stats)
    np.testing.assert_allclose(
        quantized(apply, result)(qparams, local.x), quantized(whole, single)(qparams, local.x), rtol=1e-5, atol=1e-4
    )


def test_shards_that_cut_blocks_are_refused():
    local = Local(contracted, {"w": ints(16, F)}, {"w": P("tp")}, P(None, "tp"), P(), {}, X[:, :16])
    apply = local.apply(True)
    result = plan(apply, local.params, local.x, recipe=EVERYTHING)
    with pytest.raises(ValueError, match="a shard with 8 values along the contraction, inside a shard_map over"):
        quantized(apply, result)(quantize_params(local.params, result), local.x)


def test_shard_map_in_a_scan():
    mesh = make_mesh()
    inner = jax.shard_map(
        lambda w, x: jnp.sign(lax.psum(jnp.einsum("td,edf->tef", x, w).sum(1), "ep")),
        mesh=mesh,
        in_specs=(P("ep"), P()),
        out_specs=P(),
    )
    params = {"w": ints(2, E, D, D)}

    def apply(p, x):
        return lax.scan(lambda c, w: (inner(w, c), None), x, p["w"])[0]

    result = plan(apply, params, X, recipe=EVERYTHING)
    outputs, stats = jax.jit(observed(apply, result))(params, X)
    np.testing.assert_array_equal(outputs, jax.jit(apply)(params, X))
    np.testing.assert_array_equal(stats["w"]["amax"], [amax(X), 1])


GLOBAL = {
    "matrix": (lambda p, x: x @ p["w"], {"w": ints(D, F)}, P(None, "tp"), X, P(), amax(X)),
    "experts": (
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]), {"w": ints(E, D, F)}, P("ep", None, "tp"), XE, P("ep"),
        amax(XE, (1, 2)),
    ),
    "slice": (
        lambda p, x: x @ p["w"][1], {"w": ints(E, D, F)}, P(None, None, "tp"), X, P(), np.array([0, amax(X), 0, 0])
    ),
    "scan": (
        lambda p, x: lax.scan(lambda c, w: (lax.with_sharding_constraint(jnp.sign(c @ w), P()), None), x, p["w"])[0],
        {"w": ints(2, D, D)}, P(None, None, "tp"), X, P(), np.array([amax(X), 1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, kind",
    [("experts", AxisType.Auto), ("scan", AxisType.Auto), *((name, AxisType.Explicit) for name in GLOBAL)],
    ids=str,
)
def test_sharded_parameters(name, kind):
    apply, params, spec, x, x_spec, expected = GLOBAL[name]
    if name == "scan" and kind == AxisType.Explicit:
        # On Explicit axes a constraint only asserts; moving data takes jax.reshard.
        def apply(p, x):
            return lax.scan(lambda c, w: (jnp.sign(jax.reshard(c @ w, P())), None), x, p["w"])[0]

    mesh = make_mesh(kind)
    params = jax.device_put(params, NamedSharding(mesh, spec))
    x = jax.device_put(x, NamedSharding(mesh, x_spec))
    with jax.set_mesh(mesh):
        result = plan(apply, params, x, recipe=EVERYTHING)
        outputs, stats = jax.jit(observed(apply, result))(params, x)
        np.testing.assert_array_equal(outputs, jax.jit(apply)(params, x))
        np.testing.assert_array_equal(stats["w"]["amax"], expected)
        if name == "experts":
            qparams = quantize_params(params, result)
            assert jnp.isfinite(quantized(apply, result)(qparams, x)).all()
