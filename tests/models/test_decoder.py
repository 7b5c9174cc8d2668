"""What the decoder computes: the golden logits, the experts against a plain loop, and on which values it depends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import FAMILIES, GOLDEN_MODELS, abstract_decoder, auto_mesh, golden, small_config, small_decoder
from flax import nnx
from jax.sharding import AxisType

import jaxfp4
from jaxfp4.models import load_decoder, parameter_shapes
from jaxfp4.models.decoder import routed_experts
from jaxfp4.models.hf_layout import assemble
from jaxfp4.models.rotary import Rotation, plain_frequencies, rotate
from jaxfp4.models.sharding import shardings
from jaxfp4.models.train import dense_experts
from jaxfp4.recipes import Role

forward = jax.jit(lambda model, tokens: model(tokens))
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) % 32


@pytest.mark.parametrize("mesh", [None, {"tp": 4, "ep": 2}, {"tp": 8}, {"ep": 4, "tp": 2}], ids=str)
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_logits(name, mesh):
    model = load_decoder(golden(name, "hf"), mesh=None if mesh is None else auto_mesh(**mesh))
    tokens = np.load(golden(name, "calib_tokens.npy"))[:2]
    logits = forward(model, tokens)
    expected = np.load(golden(name, "logits_float32.npy"))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-5)


def _experts_one_by_one(x, probabilities, experts, gate, up, down):
    """Row by row and expert by expert, in float64."""
    x, probabilities, gate, up, down = (np.asarray(a, np.float64) for a in (x, probabilities, gate, up, down))
    output = np.zeros_like(x)
    for row, chosen in enumerate(np.asarray(experts)):
        for slot, expert in enumerate(chosen):
            hidden = x[row] @ gate[expert]
            hidden = hidden / (1 + np.exp(-hidden)) * (x[row] @ up[expert])
            output[row] += probabilities[row, slot] * (hidden @ down[expert])
    return output


@pytest.mark.parametrize("experts_fn", [routed_experts, dense_experts])
@pytest.mark.parametrize("routing", ["mixed", "all to one", "one unused"])
def test_experts_against_a_loop(experts_fn, routing):
    rng = np.random.default_rng(0)
    rows, count, hidden, width = 10, 4, 8, 6
    draws = {
        "mixed": [rng.choice(count, 2, replace=False) for _ in range(rows)],
        "all to one": [[3, 0]] * rows,
        "one unused": [rng.choice([0, 2, 3], 2, replace=False) for _ in range(rows)],
    }
    experts = np.asarray(draws[routing], np.int32)
    shapes = [(rows, hidden), (rows, 2), (count, hidden, width), (count, hidden, width), (count, width, hidden)]
    x, probabilities, gate, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    expected = _experts_one_by_one(x, probabilities, experts, gate, up, down)
    actual = jax.jit(experts_fn)(x, probabilities, experts, gate, up, down)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=2e-5)


def test_rotary_turns_pairs_by_position():
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 8))
    turned = np.asarray(rotate(x, Rotation(plain_frequencies(100.0, 8))))[0, :, 0]
    plain = np.asarray(x)[0, :, 0]
    for position in range(5):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            expected = (plain[position, pair] + 1j * plain[position, pair + 4]) * np.exp(1j * angle)
            found = turned[position, pair] + 1j * turned[position, pair + 4]
            assert abs(found - expected) < 1e-5


def test_a_token_does_not_change_what_comes_before_it():
    model = small_decoder()
    changed = TOKENS.copy()
    changed[:, 7] += 1
    before, after = forward(model, TOKENS), forward(model, changed)
    np.testing.assert_array_equal(np.asarray(before)[:, :7], np.asarray(after)[:, :7])
    assert np.all(np.any(np.asarray(before)[:, 7:] != np.asarray(after)[:, 7:], axis=-1))


@pytest.mark.parametrize(("window", "last"), [(1, 7), (3, 9), (12, 11), (None, 11)])
def test_a_sliding_window_ends_what_a_token_is_seen_by(window, last):
    model = small_decoder(small_config("mixtral", num_hidden_layers=1, sliding_window=window))
    changed = TOKENS.copy()
    changed[:, 7] += 1
    differs = np.any(np.asarray(forward(model, TOKENS)) != np.asarray(forward(model, changed)), axis=(0, 2))
    assert np.flatnonzero(differs).tolist() == list(range(7, last + 1))


def test_layers_have_windows_of_their_own():
    window = {"use_sliding_window": True, "sliding_window": 3, "num_hidden_layers": 2}
    model = small_decoder(small_config("qwen3", max_window_layers=1, **window))
    assert [layer.attention.window for layer in model.layers] == [None, 3]


def test_a_zero_bias_is_none():
    plain = small_decoder(small_config("llama", num_hidden_layers=1))
    config = small_config("llama", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    values = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(plain, nnx.Param))}
    biases = {path: jnp.zeros(shape) for path, shape in parameter_shapes(config).items() if path.endswith("bias")}
    assert len(biases) == 7
    found = np.asarray(forward(assemble(config, values | biases), TOKENS))
    np.testing.assert_array_equal(found, np.asarray(forward(plain, TOKENS)))
    for path, zeros in biases.items():
        moved = np.asarray(forward(assemble(config, values | biases | {path: zeros + 0.5}), TOKENS))
        # A constant added to all keys along a dimension moves the scores only because the keys turn; still it does.
        assert np.abs(moved - found).max() > 1e-4, path


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_plan_finds_weights_siblings_and_roles(model_type):
    apply_fn, params = jaxfp4.from_flax(abstract_decoder(small_config(model_type, num_hidden_layers=1)))
    plan = jaxfp4.plan(apply_fn, params, jax.ShapeDtypeStruct((1, 8), np.int32))
    weights = {entry.path: entry.weight for entry in plan.entries}
    shapes = parameter_shapes(small_config(model_type, num_hidden_layers=1))
    assert set(weights) == {path for path, shape in shapes.items() if len(shape) > 1}
    groups = [
        {path.split("/")[3] for path in weight.siblings} for weight in weights.values() if "attention" in weight.path
    ]
    assert groups.count({"q_proj", "k_proj", "v_proj"}) == 3 and groups.count({"o_proj"}) == 1
    roles = {path: weight.role for path, weight in weights.items()}
    assert roles.pop("embed/embedding") is Role.EMBEDDING and roles.pop("lm_head/kernel") is Role.HEAD
    if model_type in ("mixtral", "qwen3_moe"):
        assert roles.pop("layers/0/mlp/router/kernel") is Role.ROUTER
        assert {role for path, role in roles.items() if "experts" in path} == {Role.EXPERT}
        assert len(weights["layers/0/mlp/experts/up_proj"].siblings) == 2
    else:
        assert len(weights["layers/0/mlp/up_proj/kernel"].siblings) == 2
    assert {role for path, role in roles.items() if "attention" in path} == {Role.ATTENTION}


def test_tied_embeddings_are_the_head():
    config = small_config("llama", tie_word_embeddings=True, num_hidden_layers=1)
    assert "lm_head/kernel" not in parameter_shapes(config)
    tied = small_decoder(config)
    values = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(tied, nnx.Param))}
    untied_config = dataclasses.replace(config, tie_word_embeddings=False)
    untied = assemble(untied_config, values | {"lm_head/kernel": values["embed/embedding"].T})
    np.testing.assert_allclose(np.asarray(forward(tied, TOKENS)), np.asarray(forward(untied, TOKENS)), atol=1e-5)


def test_renormalised_routing_changes_the_result():
    outputs = [
        forward(small_decoder(small_config(norm_topk_prob=norm, num_hidden_layers=1)), TOKENS) for norm in (True, False)
    ]
    assert np.abs(np.asarray(outputs[0]) - np.asarray(outputs[1])).max() > 1e-3


def test_routing_probabilities_come_with_the_logits():
    model = small_decoder(small_config(mlp_only_layers=[0]))
    logits, routing = jax.jit(lambda model, tokens: model.with_routing(tokens))(model, TOKENS)
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(forward(model, TOKENS)))
    (probabilities,) = routing
    assert (probabilities.shape, probabilities.dtype) == ((24, 4), jnp.float32)
    np.testing.assert_allclose(np.asarray(probabilities).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_the_computation_type(dtype):
    config = small_config()
    model = abstract_decoder(config, jnp.bfloat16)
    model.dtype = dtype
    graph, params = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, TOKENS)
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "ragged_dot_general"]
    wanted = jnp.bfloat16 if dtype is None else dtype
    assert len(products) == 3 * config.num_hidden_layers
    assert all(eqn.outvars[0].aval.dtype == wanted for eqn in products)
    assert jaxpr.out_avals[0].dtype == jnp.float32


def _inputs_of_products(model, paths):
    """For each parameter path the jaxpr variable that it is multiplied with."""
    graph, params = nnx.split(model, nnx.Param)
    leaves = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    jaxpr = jax.make_jaxpr(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, TOKENS).jaxpr
    inputs = dict(zip(leaves, jaxpr.invars, strict=False))
    found = {}
    for path in paths:
        (eqn,) = [eqn for eqn in jaxpr.eqns if inputs[path] in eqn.invars]
        found[path] = eqn.invars[0]
    return found


@pytest.mark.parametrize(
    ("model_type", "siblings"),
    [
        ("llama", ["attention/q_proj/kernel", "attention/k_proj/kernel", "attention/v_proj/kernel"]),
        ("llama", ["mlp/gate_proj/kernel", "mlp/up_proj/kernel"]),
        ("qwen3_moe", ["mlp/experts/gate_proj", "mlp/experts/up_proj"]),
    ],
)
def test_siblings_read_the_very_same_value(model_type, siblings):
    inputs = _inputs_of_products(
        abstract_decoder(small_config(model_type)), [f"layers/1/{sibling}" for sibling in siblings]
    )
    assert len({id(variable) for variable in inputs.values()}) == 1


def test_it_is_strict_about_types():
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.float32, jnp.bfloat16):
            graph, params = nnx.split(abstract_decoder(dtype=dtype))
            logits = jax.eval_shape(lambda params, graph=graph: nnx.merge(graph, params)(jnp.asarray(TOKENS)), params)
            assert (logits.shape, logits.dtype) == ((2, 12, 32), jnp.float32)


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((4, 2), ("tp", "ep"), axis_types=(AxisType.Explicit,) * 2)
    config = small_config()
    placement = shardings(config, mesh)
    shapes = parameter_shapes(config)
    model = assemble(config, {path: jax.device_put(jnp.ones(shapes[path]), placement[path]) for path in shapes})
    with pytest.raises(
        ValueError, match=r"^decoder: the parameters are on a mesh with Explicit axes \(tp, ep\), wanted"
    ):
        model(TOKENS)


def test_a_decoder_is_assembled_from_all_its_parameters():
    config = small_config()
    values = {path: jnp.ones(shape) for path, shape in parameter_shapes(config).items()}
    with pytest.raises(ValueError, match=r"^extra/kernel: no parameter of this decoder"):
        assemble(config, values | {"extra/kernel": jnp.ones(1)})
    del values["norm/scale"]
    with pytest.raises(ValueError, match=r"^norm/scale: missing from the values"):
        assemble(config, values)


@pytest.mark.parametrize(
    ("model_type", "mesh"),
    [("llama", {"dp": 2, "tp": 4}), ("qwen2", {"tp": 4}), ("mixtral", {"tp": 2, "ep": 4})],
    ids=["llama", "qwen2", "mixtral"],
)
def test_mesh_does_not_change_the_logits(model_type, mesh):
    config = small_config(model_type, num_hidden_layers=1)
    model = small_decoder(config)
    values = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    placement = shardings(config, auto_mesh(**mesh))
    sharded = assemble(config, {path: jax.device_put(value, placement[path]) for path, value in values.items()})
    np.testing.assert_allclose(np.asarray(forward(sharded, TOKENS)), np.asarray(forward(model, TOKENS)), atol=1e-5)
