"""Checkpoints come back into the parameter tree of a function, which then runs on the packed weights."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms import models as small_models
from golden_models import mesh, tensors_of
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jaxfp4
from jaxfp4.checkpoints import TensorName, export_checkpoint, load_checkpoint
from jaxfp4.checkpoints.load_params import amax_of_cache_scale
from jaxfp4.checkpoints.pending import PendingTensor
from jaxfp4.checkpoints.writer import write_tensors
from jaxfp4.formats import LeafError
from jaxfp4.models import DecoderConfig, checkpoint_names, from_flax, shardings
from jaxfp4.recipes import ExpertScale

FORMATS = ["modelopt", "compressed-tensors"]
STACKED = {f"layers/{name}": f"model.layers.{{layer}}.{name}_proj" for name in ("q", "k", "v", "o")} | {
    **{f"layers/{name}": f"model.layers.{{layer}}.experts.{{expert}}.{name}" for name in ("gate", "up", "down")},
    "layers/router": TensorName("model.layers.{layer}.router", transpose=True),
    "head": TensorName("lm_head", transpose=True),
}


def shapes_of(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_same_trees(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, value), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert (value.dtype, value.shape) == (other.dtype, other.shape), path
        assert np.asarray(value).tobytes() == np.asarray(other).tobytes(), path


@functools.cache
def stats_of_stacked():
    """They are the same whether experts share a scale or not."""
    params, batches = small_models.draw(), small_models.batches(1)
    plan = jaxfp4.plan(small_models.scanned, params, batches[0])
    return jaxfp4.calibrate(small_models.scanned, params, batches, plan, progress=False)


@pytest.fixture(scope="module", params=["stack", "expert"])
def stacked(request):
    """A model whose layers are stacked for a scan, with experts and contractions over two axes."""
    params = jax.tree.map(jnp.asarray, small_models.draw())
    batches = small_models.batches(1)
    plan = jaxfp4.plan(small_models.scanned, params, batches[0], expert_scale=request.param)
    return params, plan, jaxfp4.quantize_params(params, plan, stats_of_stacked()), batches[0]


@pytest.mark.parametrize("file_format", FORMATS)
def test_stacks_and_axis_orders_come_back(tmp_path, stacked, file_format):
    params, plan, qparams, tokens = stacked
    export_checkpoint(qparams, tmp_path / "out", names=STACKED, format=file_format)
    assert "model.layers.1.experts.7.gate.weight_scale" in tensors_of(tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out", params=shapes_of(params), plan=plan, names=STACKED)
    assert jaxfp4.digest(loaded) == jaxfp4.digest(qparams)
    if file_format == "modelopt":  # the reciprocals of compressed-tensors may move an input scale by its last bit
        assert_same_trees(loaded, qparams)
        run = jaxfp4.quantized(small_models.scanned, plan)
        np.testing.assert_array_equal(run(loaded, tokens), run(qparams, tokens))


def test_onto_a_mesh_by_the_shardings_of_the_parameters(tmp_path, stacked):
    params, plan, qparams, _ = stacked
    export_checkpoint(qparams, tmp_path / "out", names=STACKED)
    grid = mesh(ep=2, tp=4)
    specs = {f"layers/{name}": PartitionSpec(None, *spec) for name, spec in small_models.SPECS.items()}
    placed = {path: NamedSharding(grid, spec) for path, spec in specs.items()}

    def abstract(keys, x):
        path = "/".join(str(key.key) for key in keys)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed.get(path, NamedSharding(grid, PartitionSpec())))

    target = jax.tree_util.tree_map_with_path(abstract, params)
    by_target = load_checkpoint(tmp_path / "out", params=target, plan=plan, names=STACKED)
    by_path = load_checkpoint(tmp_path / "out", params=shapes_of(params), plan=plan, names=STACKED, shardings=placed)
    for loaded in (by_target, by_path):
        assert jaxfp4.digest(loaded, inputs=True) == jaxfp4.digest(qparams, inputs=True)
        gate = loaded["layers"]["gate"].weight
        assert gate.packed.sharding.spec == gate.scales.sharding.spec == PartitionSpec(None, "ep", None, "tp")
        assert {shard.data.shape for shard in gate.packed.addressable_shards} == {(2, 4, 32, 8)}
    # Heads of 16 split over tp keep their blocks whole, as when they were quantized on that mesh.
    moved = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), params, target)
    again = jaxfp4.quantize_params(moved, plan)
    for name in ("o", "down", "q"):
        found, wanted = by_target["layers"][name].weight, again["layers"][name].weight
        assert found.packed.sharding.is_equivalent_to(wanted.packed.sharding, found.packed.ndim), name


@pytest.fixture(scope="module")
def decoder():
    """A decoder's `(configuration, parameters, plan, quantized parameters, quantized function, tokens)`."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32,
    )
    # Global scales of bfloat16 weights survive the reciprocals of compressed-tensors; those of float32 may not.
    model = small_models.drawn_decoder(config, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    apply_fn, params = from_flax(model)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    plan = jaxfp4.plan(apply_fn, params, tokens, recipe="nvfp4_kv_fp8")
    qparams = jaxfp4.quantize_params(params, plan, jaxfp4.calibrate(apply_fn, params, [tokens], plan, progress=False))
    return config, params, plan, qparams, jaxfp4.quantized(apply_fn, plan), tokens


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_decoder_runs_from_packed_weights(tmp_path, decoder, file_format):
    config, params, plan, qparams, run, tokens = decoder
    names = checkpoint_names(config)
    export_checkpoint(qparams, tmp_path / "out", names=names, config=config.to_hf(), format=file_format)
    placed = shardings(config, mesh(tp=2))
    loaded = load_checkpoint(tmp_path / "out", params=params, plan=plan, names=names, shardings=placed)
    assert jaxfp4.digest(loaded) == jaxfp4.digest(qparams)
    weights = jaxfp4.weights(loaded)
    for path, original in jaxfp4.weights(qparams).items():
        weight = weights[path]
        assert 8 * (weight.weight.packed.nbytes + weight.weight.scales.nbytes) == 4.5 * np.prod(weight.weight.shape)
        if original.cache is not None:
            assert weight.cache.format is original.cache.format
            parts = zip(jax.tree.leaves(weight.cache), jax.tree.leaves(original.cache), strict=True)
            for found, wanted in parts:
                assert np.float32(found) / np.float32(448) == np.float32(wanted) / np.float32(448)
    assert sum(weight.cache is not None for weight in weights.values()) == 2
    one_device = load_checkpoint(tmp_path / "out", params=params, plan=plan, names=names)
    if file_format == "modelopt":
        np.testing.assert_array_equal(run(one_device, tokens), run(qparams, tokens))
    np.testing.assert_allclose(run(loaded, tokens), run(qparams, tokens), rtol=0, atol=1e-5)


def test_amaxes_of_cache_scales():
    amaxes = np.random.default_rng(0).uniform(0.01, 500, 3000).astype(np.float32)
    scales = amaxes / np.float32(448)
    found = np.array([amax_of_cache_scale(scale) for scale in scales])
    np.testing.assert_array_equal(found / np.float32(448), scales)
    np.testing.assert_array_max_ulp(found, amaxes, 1)


def two_weights():
    params = {"a": jnp.ones((32, 16)), "b": jnp.ones((16, 32)), "bias": jnp.zeros(16)}

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["a"] + params["bias"]) @ params["b"]

    x = jnp.ones((2, 32))
    plan = jaxfp4.plan(apply_fn, params, x)
    stats = jaxfp4.calibrate(apply_fn, params, [x], plan, progress=False)
    return params, plan, jaxfp4.quantize_params(params, plan, stats)


def changed(directory, changes, config=None):
    """The checkpoint in `directory` with other tensors; None takes one away."""
    tensors = {name: v for name, v in (tensors_of(directory) | changes).items() if v is not None}
    for name in ("model.safetensors", "config.json"):
        (directory / name).unlink()
    write_tensors(directory, [PendingTensor(n, v.dtype, v.shape, lambda v=v: v) for n, v in tensors.items()])
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))


BROKEN = {
    "weight missing": (
        {"a.weight": None, "a.weight_scale": None, "a.weight_scale_2": None, "a.input_scale": None},
        r"^a: .*out has no NVFP4 weight 'a': wanted one by the plan; correct names, or make the plan with the",
    ),
    "array missing": ({"bias": None}, r"^bias: .*out has no tensor 'bias': wanted one for it; correct names"),
    "array of another shape": (
        {"bias": np.zeros(4, np.float32)},
        r"^bias: tensor 'bias' of .*out has shape \(4,\): wanted \(16,\); correct names",
    ),
    "one too many": (
        {"c": np.zeros(4, np.float32)},
        r"out: tensor 'c' belongs to no parameter \(1 such\): wanted the checkpoint of these params; correct names",
    ),
    "weight of another shape": (
        {"a.weight": np.zeros((8, 16), np.uint8), "a.weight_scale": None},
        r"^a: weight 'a' of .*out is \[N, K\] = \(8, 32\): wanted \(16, 32\); correct names",
    ),
    "pre-scale": (
        {"a.pre_quant_scale": np.ones(32, np.float32)},
        r"^a: weight 'a' of .*out has a pre_quant_scale: wanted none, as the plan has no place for it; load",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, case):
    params, plan, qparams = two_weights()
    export_checkpoint(qparams, tmp_path / "out")
    changes, message = BROKEN[case]
    if "a.weight" in changes and changes["a.weight"] is not None:
        scales = tensors_of(tmp_path / "out")["a.weight_scale"]
        changes = changes | {"a.weight_scale": scales[:8]}
    changed(tmp_path / "out", changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "out", params=params, plan=plan)


def test_what_the_plan_keeps_must_not_be_quantized(tmp_path):
    params, plan, qparams = two_weights()
    export_checkpoint(qparams, tmp_path / "out")
    entries = tuple(dataclasses.replace(e, scheme=jaxfp4.Scheme.NONE) if e.path == "b" else e for e in plan.entries)
    other = dataclasses.replace(plan, entries=entries)
    message = r"^b: 'b.weight' of .*out is quantized, but the plan keeps the parameter as it is; make the plan with"
    with pytest.raises(LeafError, match=message):
        load_checkpoint(tmp_path / "out", params=params, plan=other, names={"b": TensorName("b")})


def test_plan_of_other_parameters(tmp_path):
    params, plan, qparams = two_weights()
    export_checkpoint(qparams, tmp_path / "out")
    with pytest.raises(LeafError, match=r"^a: params has shape \(32, 8\) there: wanted \(32, 16\), as in the plan"):
        load_checkpoint(tmp_path / "out", params=params | {"a": jnp.ones((32, 8))}, plan=plan)
    with pytest.raises(LeafError, match=r"^a: params has nothing there: wanted \(32, 16\), as in the plan"):
        load_checkpoint(tmp_path / "out", params={"b": params["b"]}, plan=plan)
    with pytest.raises(ValueError, match="was given params only: wanted params and plan together, and names only with"):
        load_checkpoint(tmp_path / "out", params=params)
    with pytest.raises(ValueError, match="was given names only: wanted params and plan together"):
        load_checkpoint(tmp_path / "out", names={"a": "a"})


def test_stacks_that_cannot_be_one_weight(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 32)), jnp.float32)
    x = jnp.ones((2, 4, 16))

    def apply_fn(params, x):
        return jnp.einsum("ebd,edf->ebf", x, params["w"])

    plan = jaxfp4.plan(apply_fn, {"w": w}, x)
    stats = jaxfp4.calibrate(apply_fn, {"w": w}, [x], plan, progress=False)
    qparams = jaxfp4.quantize_params({"w": w}, plan, stats)
    names = {"w": TensorName("m.{expert}")}
    export_checkpoint(qparams, tmp_path / "out", names=names)
    changed(tmp_path / "out", {"m.1.input_scale": None})
    with pytest.raises(LeafError, match=r"^w: weight 'm.1' of .*out has no input scale, but others of the stack have"):
        load_checkpoint(tmp_path / "out", params={"w": w}, plan=plan, names=names)
    tensors = tensors_of(tmp_path / "out")
    slices = [f"m.{i}.{k}" for i in range(2) for k in range(16)]
    copies = {name.replace("m.0", module): tensors[name] for name in tensors if "m.0" in name for module in slices}
    (tmp_path / "out/config.json").write_text("{}")
    changed(tmp_path / "out", dict.fromkeys(tensors) | copies)
    with pytest.raises(LeafError, match=r"^w: contracted over axes \(1,\) and stored as a stack over the first 2"):
        load_checkpoint(tmp_path / "out", params={"w": w}, plan=plan, names={"w": TensorName("m.{layer}.{expert}")})


def test_key_value_caches_must_agree(tmp_path):
    params, plan, qparams = two_weights()
    export_checkpoint(qparams, tmp_path / "out")
    kv = jaxfp4.recipes.get("nvfp4_kv_fp8")
    entries = tuple(dataclasses.replace(e, cached=("keys",)) if e.path == "a" else e for e in plan.entries)
    other = dataclasses.replace(plan, recipe=kv, entries=entries)
    message = r"^a: config.json of .*out says that the key-value cache is not quantized: wanted FP8, as in the plan"
    with pytest.raises(LeafError, match=message):
        load_checkpoint(tmp_path / "out", params=params, plan=other)
    changed(
        tmp_path / "out",
        {},
        {"quantization_config": {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
    )
    with pytest.raises(LeafError, match=r"^a: .*out has no scale of the keys that 'a' makes: wanted one by the plan"):
        load_checkpoint(tmp_path / "out", params=params, plan=other)


@pytest.mark.parametrize(
    "file_format, place, recipe",
    [
        ("modelopt", "attn.k_proj.k_scale", "nvfp4_kv_fp8"),
        ("modelopt", "attn.k_proj.k_scale", "nvfp4_kv_nvfp4"),
        ("compressed-tensors", "attn.k_scale", "nvfp4_kv_fp8"),
    ],
)
def test_scales_of_a_cache_that_the_plan_does_not_quantize(tmp_path, caplog, file_format, place, recipe):
    """As in most of NVIDIA's checkpoints: they are left out, and the log says so; with them in the plan they return."""
    params = {"attn": {n: jnp.ones((32, 16)) for n in ("k_proj", "q_proj", "v_proj")}}

    def attend(p, x):
        q, k, v = (x @ p["attn"][f"{n}_proj"] for n in "qkv")
        return q + checkpoint_name(k, "keys") + checkpoint_name(v, "values")

    x = jnp.ones((4, 32))
    cached, plain = (jaxfp4.plan(attend, params, x, recipe=r) for r in (recipe, "nvfp4"))
    stats = jaxfp4.calibrate(attend, params, [x], cached, progress=False)
    qparams = jaxfp4.quantize_params(params, cached, stats)
    export_checkpoint(qparams, tmp_path / "out", format=file_format, config={"model_type": "x"})
    caplog.clear()
    found = load_checkpoint(tmp_path / "out", params=params, plan=cached)["attn"]["k_proj"].cache
    assert (found.format, found.keys) == (cached.recipe.kv_cache.format, qparams["attn"]["k_proj"].cache.keys)
    assert not caplog.messages
    loaded = load_checkpoint(tmp_path / "out", params=params, plan=plain)
    assert jaxfp4.digest(loaded, inputs=True) == jaxfp4.digest(qparams, inputs=True)
    assert all(leaf.cache is None for leaf in loaded["attn"].values())
    (message,) = caplog.messages
    assert message.startswith(f"attn/k_proj: '{place}' and 1 more scales of the key-value cache are left out, as the")


def test_one_scale_for_a_stack_whose_entries_differ_stays_one_for_each(tmp_path, stacked):
    """Somebody else's checkpoint with a scale for each expert, under a plan that would share it."""
    params, plan, qparams, _ = stacked
    if plan.recipe.expert_scale is ExpertScale.STACK:
        pytest.skip("all experts have one scale")
    export_checkpoint(qparams, tmp_path / "out", names=STACKED)
    shared = dataclasses.replace(plan, recipe=plan.recipe.with_expert_scale("stack"))
    loaded = load_checkpoint(tmp_path / "out", params=params, plan=shared, names=STACKED)
    assert loaded["layers"]["gate"].weight.global_scale.shape == (2, 8, 1, 1)
    assert jaxfp4.digest(loaded) == jaxfp4.digest(qparams)
