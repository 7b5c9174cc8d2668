"""Models that we did not write go through plan, calibrate, quantize and simulate unchanged."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp4
from interop.models import MODELS
from jaxfp4.algorithms import observed
from jaxfp4.recipes import Role

pytestmark = [
    # What the packages themselves do: tunix still uses names that Flax and JAX have deprecated.
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated, use 'out_sharding':DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.experimental.shard_map is deprecated:DeprecationWarning"),
]


def models():
    for name, (package, _) in MODELS.items():
        missing = package is not None and importlib.util.find_spec(package) is None
        reason = f"{package} is not installed; it comes with the extra 'interop' (gemma: by hand)"
        yield pytest.param(name, id=name, marks=pytest.mark.skipif(missing, reason=reason))


each_model = pytest.mark.parametrize("name", list(models()))


@functools.cache
def job(name):
    """The function, its parameters and arguments, and its plan."""
    model = MODELS[name][1]()
    apply_fn, params = jaxfp4.from_flax(model.module, model.variables)
    return apply_fn, params, model.args, jaxfp4.plan(apply_fn, params, *model.args)


@each_model
def test_outputs_are_unchanged_and_the_quantized_model_is_near(name):
    apply_fn, params, args, plan = job(name)
    expected = jax.jit(apply_fn)(params, *args)
    outputs, stats = jax.jit(observed(apply_fn, plan))(params, *args)
    assert jax.tree.structure(outputs) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)
    qparams = jaxfp4.quantize_params(params, plan, stats)
    assert jax.tree.structure(jax.tree.map(lambda _: 0, params)) == jax.tree.structure(
        jax.tree.map(lambda _: 0, qparams, is_leaf=lambda x: isinstance(x, jaxfp4.QuantizedWeight))
    )
    quantized = jaxfp4.quantized(apply_fn, plan)(qparams, *args)
    before, after = (jax.tree.leaves(tree)[0].astype(jnp.float32) for tree in (expected, quantized))
    error = float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))
    # Random weights of width 64 lose up to about a half; a wrong contraction axis or scale would lose all.
    assert 0 < error < 0.7


def roles(name):
    """The path endings of each role."""
    found = {}
    for entry in job(name)[3].entries:
        found.setdefault(entry.weight.role, set()).add(entry.path)
    return found


@each_model
def test_what_is_left_alone_is_no_ordinary_linear_weight(name):
    """Everything that the default recipe leaves is an embedding, a head, a router, or meets no activation plainly."""
    for entry in job(name)[3].entries:
        if not entry.quantized:
            assert entry.weight.role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER) or entry.weight.obstacle, entry


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="needs tunix"))
        for n in ("tunix_llama3", "tunix_qwen3", "tunix_qwen3_bf16")
    ],
)
def test_siblings_of_a_decoder_are_found(name):
    plan = job(name)[3]
    groups = {frozenset(s.path.split("/")[-2] for s in plan.siblings(e)) for e in plan.quantized}
    assert {"q_proj", "k_proj", "v_proj"} in groups and {"gate_proj", "up_proj"} in groups
    assert {len(group) for group in groups} == {1, 2, 3}


@pytest.mark.skipif(importlib.util.find_spec("tunix") is None, reason="needs tunix")
def test_experts_sliced_out_of_a_stack_are_experts():
    found = roles("tunix_qwen3_moe")
    assert {path.split("/")[-1] for path in found[Role.EXPERT]} == {"gate_proj", "up_proj", "down_proj"}
    assert all("router" in path for path in found[Role.ROUTER])
    entry = next(e for e in job("tunix_qwen3_moe")[3].entries if e.path.endswith("mlp/gate_proj"))
    assert entry.weight.expert_axes == (0,) and len(entry.weight.siblings) == 2


def test_scanned_layers_keep_their_axis():
    plan = job("linen_scan")[3]
    assert all(e.weight.layer_axes == (0,) for e in plan.quantized)
    assert len({len(e.weight.siblings) for e in plan.quantized}) > 1
