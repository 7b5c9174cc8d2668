"""Calibration with all experts: statistics of experts that no token reaches, with the outputs of the normal routing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import auto_mesh, small_config, small_decoder
from flax import nnx

import jaxfp4
from jaxfp4.models import Decoder, from_flax, load_decoder, save_decoder
from jaxfp4.models.decoder import routed_experts
from jaxfp4.models.expert_coverage import all_experts, with_all_experts

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 8), dtype=np.int32)
EXPERTS = tuple(f"layers/{layer}/mlp/experts/{name}_proj" for layer in range(2) for name in ("gate", "up", "down"))
UNSEEN = [4, 5, 6, 7]


@functools.cache
def model() -> Decoder:
    """Two layers of eight experts whose routers never choose half of them."""
    decoder = small_decoder(small_config(num_experts=8))
    for layer in decoder.layers:
        kernel = layer.mlp.router.kernel
        # Logits a, a/2, -a, -a/2 and zeros: the two largest are of the first four, whatever the sign of a.
        kernel[...] = kernel[:, :1] * jnp.array([1, 0.5, -1, -0.5, 0, 0, 0, 0])
    return decoder


@functools.cache
def calibrated():
    """`(plan, statistics of normal routing, statistics of all experts)`, moments among them."""
    (apply_fn, params), (all_fn, _) = from_flax(model()), all_experts(model())
    plan = jaxfp4.plan(apply_fn, params, TOKENS, recipe="nvfp4_weighted_mse")
    normal = jaxfp4.make_calibrate_fn(apply_fn, plan)(params, plan.init_stats(params), TOKENS)
    every = jaxfp4.make_calibrate_fn(all_fn, plan)(params, plan.init_stats(params), TOKENS)
    return plan, normal, every


def in_order(plan):
    """The entries in the order of their first use, whose numbers count the second use of experts too."""
    entries = sorted(plan.entries, key=lambda entry: entry.weight.first_use)
    return [dataclasses.replace(e, weight=dataclasses.replace(e.weight, first_use=-1)) for e in entries]


def test_the_plan_is_the_same_and_outputs_are_the_same_bits():
    (apply_fn, params), (all_fn, all_params) = from_flax(model()), all_experts(model())
    assert jax.tree.structure(params) == jax.tree.structure(all_params)
    for recipe in ("nvfp4", "nvfp4_smoothquant_gptq", "nvfp4_kv_fp8"):
        plans = [jaxfp4.plan(fn, params, TOKENS, recipe=recipe) for fn in (apply_fn, all_fn)]
        assert in_order(plans[0]) == in_order(plans[1]), recipe
        assert plans[0].folding_digest == plans[1].folding_digest and plans[0].statistics == plans[1].statistics
    outputs = [jax.jit(fn)(params, TOKENS) for fn in (apply_fn, all_fn)]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_experts_without_tokens_get_statistics():
    plan, normal, every = calibrated()
    assert jaxfp4.unseen_experts(plan, normal) == dict.fromkeys(EXPERTS, UNSEEN)
    assert jaxfp4.unseen_experts(plan, every) == {}
    for path in EXPERTS:
        assert np.all(np.asarray(every[path]["amax"]) >= np.asarray(normal[path]["amax"])), path
        assert np.all(np.asarray(every[path]["amax"]) > 0)
    for path in set(plan.by_path) & set(normal) - set(EXPERTS):
        np.testing.assert_array_equal(every[path]["amax"], normal[path]["amax"], err_msg=path)


def test_statistics_are_those_of_all_tokens():
    """Of each expert computed on its own."""
    _, _, every = calibrated()

    @jax.jit
    def inputs(decoder, tokens):
        """What the experts of each layer take."""
        seen = []

        def capture(x, *rest):
            seen.append(x)
            return routed_experts(x, *rest)

        decoder.with_routing(tokens, capture)
        return seen

    x, experts = np.asarray(inputs(model(), TOKENS)[0]), model().layers[0].mlp.experts
    np.testing.assert_array_equal(every[EXPERTS[0]]["amax"], np.full(8, np.abs(x).max()))
    gated, up = (np.asarray(x @ np.asarray(w[...])) for w in (experts.gate_proj, experts.up_proj))
    hidden = gated / (1 + np.exp(-gated)) * up
    np.testing.assert_allclose(every[EXPERTS[2]]["amax"], np.abs(hidden).max((1, 2)), rtol=1e-5)


def test_input_scales_are_no_smaller():
    _, normal, every = calibrated()
    apply_fn, params = from_flax(model())
    plan = jaxfp4.plan(apply_fn, params, TOKENS, recipe="nvfp4")
    weights = [jaxfp4.weights(jaxfp4.quantize_params(params, plan, stats)) for stats in (normal, every)]
    assert {path for path in weights[0] if weights[1][path].input_scale > weights[0][path].input_scale} >= set(
        EXPERTS[2:3]
    )
    assert all(weights[1][path].input_scale >= weights[0][path].input_scale for path in weights[0])


def test_moments_of_all_experts_are_collected():
    """Every expert sees every token once, and those of its own a second time."""
    plan, normal, every = calibrated()
    path = plan.moments_source(plan.by_path[EXPERTS[0]])[0]
    moments = [np.asarray(stats[path]["moments"]) for stats in (normal, every)]
    extra = moments[1] - moments[0]
    np.testing.assert_allclose(extra, np.broadcast_to(extra[UNSEEN[0]], extra.shape), rtol=1e-4)
    assert np.all(moments[0][UNSEEN] == 0) and np.all(extra[UNSEEN] > 0)


def test_on_a_mesh(tmp_path):
    _, _, every = calibrated()
    save_decoder(model(), tmp_path)
    sharded = load_decoder(tmp_path, mesh=auto_mesh(tp=2, ep=4))
    (apply_fn, params), (all_fn, _) = from_flax(sharded), all_experts(sharded)
    plan = jaxfp4.plan(apply_fn, params, TOKENS, recipe="nvfp4")
    stats = jaxfp4.make_calibrate_fn(all_fn, plan)(params, plan.init_stats(params), TOKENS)
    assert jaxfp4.unseen_experts(plan, stats) == {}
    assert stats.keys() == every.keys()
    for path, states in stats.items():
        np.testing.assert_allclose(states["amax"], every[path]["amax"], rtol=1e-4, err_msg=path)
    np.testing.assert_array_equal(jax.jit(all_fn)(params, TOKENS), jax.jit(apply_fn)(params, TOKENS))


def test_any_experts_function_can_be_observed():
    calls = []

    def counting(x, probabilities, experts, *weights):
        calls.append((probabilities.shape, experts.shape))
        return x

    x = jnp.ones((5, 8))
    gate = jnp.ones((4, 8, 2))
    result = with_all_experts(counting)(x, jnp.ones((5, 2)), jnp.zeros((5, 2), int), gate, gate, gate.mT)
    assert result is x and sorted(calls) == [((5, 2), (5, 2)), ((5, 4), (5, 4))]


def test_what_has_no_experts_is_refused():
    dense = small_decoder(small_config("llama", num_hidden_layers=1))
    with pytest.raises(
        ValueError, match="all_experts: the model has no experts: wanted a mixture of experts; use from"
    ):
        all_experts(dense)
    with pytest.raises(TypeError, match=r"all_experts: found a Linear: wanted a jaxfp4\.models\.Decoder"):
        all_experts(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
