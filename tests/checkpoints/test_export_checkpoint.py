"""What `export_checkpoint` writes for trees of any kind, and what it refuses."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from flax import nnx
from golden_models import mesh, read_json, tensors_of
from jax.sharding import NamedSharding, PartitionSpec

from jaxfp4.checkpoints import TensorName, export_checkpoint, open_checkpoint
from jaxfp4.formats import LeafError
from jaxfp4.tensors import NVFP4Tensor, QuantizedWeight, global_amax, quantize
from jaxfp4.tensors.blocks import Blocking


def weight(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def quantized(*shape, axis=0, input_scale=None, global_scale=1.0):
    """A weight of `shape` with random codes: nothing to compile."""
    blocking = Blocking(shape, (axis,) if isinstance(axis, int) else axis)
    rng = np.random.default_rng(0)

    def with_length(n):
        sizes = list(blocking.merged_shape)
        sizes[blocking.axis] = n
        return rng.integers(0, 120, sizes).astype(np.uint8)

    packed = jnp.asarray(with_length(blocking.blocks * 8))
    scales = jnp.asarray(with_length(blocking.blocks).view(ml_dtypes.float8_e4m3fn))
    axes = tuple(a - len(shape) for a in blocking.axes)
    sizes = tuple(shape[a] for a in blocking.axes)
    tensor = NVFP4Tensor(packed, scales, jnp.float32(global_scale), axes, sizes, np.dtype(np.float32))
    return QuantizedWeight(tensor, input_scale)


def assert_is(tensors, module, matrix, global_amax=None):
    """The module holds the reference quantization of `matrix` `[N, K]`."""
    packed, scales, global_scale = reference.quantize_last_axis(matrix, global_amax)
    np.testing.assert_array_equal(tensors[f"{module}.weight"], packed)
    np.testing.assert_array_equal(tensors[f"{module}.weight_scale"].view(np.uint8), scales)
    assert tensors[f"{module}.weight_scale_2"] == global_scale
    assert tensors[f"{module}.weight_scale_2"].shape == ()


@pytest.mark.parametrize(
    ("shape", "axis", "order"),
    [
        ((24, 32), 1, (0, 1)),
        ((64,), 0, (0,)),
        ((32, 3, 8), 0, (1, 2, 0)),  # queries [model, heads, head_dim]
        ((2, 16, 24), (0, 1), (2, 0, 1)),  # output [heads, head_dim, model], blocks within one head
        ((4, 5, 8, 6), (0, 2), (1, 3, 0, 2)),  # blocks over several heads
    ],
)
def test_any_axis_order_is_written_as_outputs_by_contraction(tmp_path, shape, axis, order):
    w = weight(*shape)
    export_checkpoint({"m": {"kernel": QuantizedWeight(quantize(w, axis))}}, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    contracted = np.prod([shape[a] for a in np.atleast_1d(axis)])
    assert_is(tensors, "m", np.asarray(w).transpose(order).reshape(-1, contracted))
    assert sorted(tensors) == ["m.weight", "m.weight_scale", "m.weight_scale_2"]


@pytest.mark.parametrize("scope", ["stack", "expert"])
def test_every_entry_of_a_stack_has_its_own_tensors_and_scalars(tmp_path, scope):
    w = weight(2, 3, 32, 8)
    amax = global_amax(w) if scope == "stack" else global_amax(w, keep_axes=(0, 1))
    leaf = QuantizedWeight(quantize(w, 2, global_amax=amax), jnp.arange(1.0, 3))
    name = TensorName("layers.{layer}.experts.{expert}.up")
    export_checkpoint({"w": leaf}, tmp_path / "out", names={"w": name})
    tensors = tensors_of(tmp_path / "out")
    for layer in range(2):
        for expert in range(3):
            module = f"layers.{layer}.experts.{expert}.up"
            entry = np.asarray(w[layer, expert].T)
            assert_is(tensors, module, entry, np.asarray(amax) if scope == "stack" else None)
            assert tensors[f"{module}.input_scale"] == layer + 1


SCALARS = [(), (1,), (2,), (1, 1), (2, 1), (1, 3), (2, 3), (2, 3, 1, 1), (1, 1, 1, 1), (1, 3, 1, 1)]


@pytest.mark.parametrize("shape", SCALARS)
def test_input_scales_of_every_shape(tmp_path, shape):
    scales = jnp.arange(1.0, 1 + np.prod(shape, dtype=int)).reshape(shape)
    leaf = quantized(2, 3, 16, 8, axis=2, input_scale=scales)
    export_checkpoint({"w": leaf}, tmp_path / "out", names={"w": "l.{layer}.e.{expert}"})
    tensors = tensors_of(tmp_path / "out")
    padded = np.asarray(scales).reshape(shape[:2] + (1,) * (2 - len(shape)) + shape[2:])
    wanted = np.broadcast_to(padded.reshape(padded.shape[:2]), (2, 3))
    for index in np.ndindex(2, 3):
        assert tensors["l.{}.e.{}.input_scale".format(*index)] == wanted[index]


def test_unquantized_arrays_keep_dtype_and_may_be_stacked_and_transposed(tmp_path):
    tree = {
        "w": quantized(16, 16),
        "gate": {"kernel": np.arange(24.0, dtype=ml_dtypes.bfloat16).reshape(2, 3, 4)},
        "norms": jnp.arange(6.0).reshape(2, 3),
        "steps": jnp.int32(7),
        "nothing": None,
    }
    names = {
        "gate/kernel": TensorName("gates.{expert}", transpose=True),
        "norms": "layers.{layer}.norm",
        "steps": TensorName("", parameter="steps"),
    }
    export_checkpoint(tree, tmp_path / "out", names=names)
    tensors = tensors_of(tmp_path / "out")
    for i in range(2):
        np.testing.assert_array_equal(tensors[f"gates.{i}.weight"], tree["gate"]["kernel"][i].T)
        np.testing.assert_array_equal(tensors[f"layers.{i}.norm.weight"], tree["norms"][i])
    assert tensors["gates.0.weight"].dtype == ml_dtypes.bfloat16
    assert (tensors["steps"].dtype, tensors["steps"].shape, int(tensors["steps"])) == (np.int32, (), 7)
    quantization = read_json(tmp_path / "out/config.json")["quantization_config"]
    assert quantization["ignore"] == ["gates.0", "gates.1"]


def test_flax_trees_are_written_under_their_paths(tmp_path):
    def quantize_kernels(tree):
        def one(path, leaf):
            return quantized(32, 16) if "kernel" in jax.tree_util.keystr(path) else leaf

        return jax.tree_util.tree_map_with_path(one, tree)

    state = nnx.state(nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    linen = {"kernel": jnp.zeros((32, 16)), "bias": jnp.zeros(16)}
    boxed = {"kernel": nn.Partitioned(linen["kernel"], ("tp", None)), "bias": linen["bias"]}
    for i, tree in enumerate([state, linen, boxed]):
        export_checkpoint({"up": quantize_kernels(tree)}, tmp_path / str(i))
        tensors = tensors_of(tmp_path / str(i))
        assert sorted(tensors) == ["up.bias", "up.weight", "up.weight_scale", "up.weight_scale_2"]
        assert tensors["up.weight"].shape == (16, 16)


def test_shards_equal_the_single_file(tmp_path):
    tree = {"a": quantized(32, 8, input_scale=jnp.float32(2)), "b": quantized(64, 8), "norm": {"scale": jnp.ones(8)}}
    export_checkpoint(tree, tmp_path / "one")
    export_checkpoint(tree, tmp_path / "many", max_shard_bytes=200)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert sorted(one.names()) == sorted(many.names())
    for name in one.names():
        assert one.tensor(name).tobytes() == many.tensor(name).tobytes()


def test_a_sharded_tree_gives_the_same_files_as_one_device(tmp_path):
    w = weight(4, 64, 32)
    kinds = [None, PartitionSpec("ep", "tp"), PartitionSpec(None, ("ep", "tp"))]
    files = []
    for i, spec in enumerate(kinds):
        placed = w if spec is None else jax.device_put(w, NamedSharding(mesh(tp=4, ep=2), spec))
        leaf = QuantizedWeight(quantize(placed, 1, global_amax=global_amax(placed, keep_axes=(0,))))
        export_checkpoint({"w": leaf}, tmp_path / str(i), names={"w": "e.{expert}"})
        files.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(set(files)) == 1


def configs_of(tmp_path, file_format):
    tree = {
        "a": quantized(32, 8, input_scale=jnp.float32(2)),
        "b": quantized(16, 8),
        "c": quantized(16, 8, input_scale=jnp.float32(1)),
        "router": {"kernel": jnp.ones((4, 2))},
        "q": {"kernel": quantized(16, 8), "bias": jnp.ones((4, 2))},
    }
    trees = {
        "mixed": tree,
        "w4a4": {key: tree[key] for key in ("a", "c", "router")},
        "w4a16": {key: tree[key] for key in ("b", "q", "router")},
    }
    source = {"architectures": ["X"], "dtype": "bfloat16"}
    for name, part in trees.items():
        export_checkpoint(part, tmp_path / name, format=file_format, config=source)
        yield read_json(tmp_path / name / "config.json"), tmp_path / name


def test_modelopt_config_for_each_kind_of_precision(tmp_path):
    values = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    (mixed, directory), (w4a4, _), (w4a16, weight_only) = configs_of(tmp_path, "modelopt")
    assert list(mixed) == ["architectures", "dtype", "quantization_config"]
    quantization = mixed["quantization_config"]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in "ac"}
    layers |= {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in "bq"}
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    assert quantization["quantized_layers"] == layers
    assert quantization["config_groups"] == {
        "group_0": {"input_activations": values, "weights": values, "targets": ["a", "c"]},
        "group_1": {"weights": values, "targets": ["b", "q"]},
    }
    assert quantization["ignore"] == ["router"]  # not q, whose bias has two dimensions
    details = read_json(directory / "hf_quant_config.json")["quantization"]
    assert details["quantized_layers"] == layers
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= set(details)
    assert w4a4["quantization_config"]["quant_algo"] == "NVFP4"
    assert w4a16["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
    assert w4a16["quantization_config"]["config_groups"] == {"group_0": {"weights": values, "targets": ["Linear"]}}
    details = read_json(weight_only / "hf_quant_config.json")["quantization"]
    assert details == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["router"],
    }


def test_compressed_tensors_config_for_each_kind_of_precision(tmp_path):
    (mixed, _), (w4a4, _), (w4a16, _) = configs_of(tmp_path, "compressed-tensors")
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "group_size": 16,
        "strategy": "tensor_group",
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    inputs = weights | {"dynamic": "local", "observer": "static_minmax"}
    group = {"weights": weights, "output_activations": None, "format": "nvfp4-pack-quantized"}
    assert w4a4["quantization_config"] == {
        "config_groups": {"group_0": {**group, "input_activations": inputs, "targets": ["Linear"]}},
        "format": "nvfp4-pack-quantized",
        "ignore": ["router"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    assert w4a16["quantization_config"]["config_groups"] == {
        "group_0": {**group, "input_activations": None, "targets": ["Linear"]}
    }
    assert mixed["quantization_config"]["config_groups"] == {
        "group_0": {**group, "input_activations": inputs, "targets": ["a", "c"]},
        "group_1": {**group, "input_activations": None, "targets": ["b", "q"]},
    }


@pytest.mark.parametrize(("scheme", "algorithm"), [("NVFP4", "NVFP4"), (None, None)])
def test_a_key_value_cache_scheme_of_the_source_is_kept(tmp_path, scheme, algorithm):
    source = {"quantization_config": {"quant_method": "modelopt", "kv_cache_scheme": scheme}, "dtype": "float32"}
    export_checkpoint({"w": quantized(16, 8)}, tmp_path / "out", config=source)
    assert read_json(tmp_path / "out/config.json")["quantization_config"].get("kv_cache_scheme") == scheme
    assert read_json(tmp_path / "out/hf_quant_config.json")["quantization"]["kv_cache_quant_algo"] == algorithm


def test_another_methods_quantization_config_is_replaced(tmp_path):
    source = {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": "x"}}
    export_checkpoint({"w": quantized(16, 8)}, tmp_path / "out", config=source)
    assert "kv_cache_scheme" not in read_json(tmp_path / "out/config.json")["quantization_config"]


def refused(tmp_path, error, message, tree=None, **options):
    with pytest.raises(error, match=message) as caught:
        export_checkpoint({"w": quantized(16, 8)} if tree is None else tree, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_refused(tmp_path):
    refused(tmp_path, ValueError, "format='gguf': wanted one of 'modelopt', 'compressed-tensors'", format="gguf")
    refused(tmp_path, ValueError, "max_shard_bytes=0: wanted a positive number of bytes, or None", max_shard_bytes=0)
    refused(tmp_path, ValueError, "names has 'x', which match no leaf", names={"x": "y"})
    refused(
        tmp_path, ValueError, r"config cannot be written as JSON \(.*\): wanted the content", config={"a": object()}
    )
    refused(
        tmp_path, ValueError, "qparams holds no QuantizedWeight: wanted at least one; quantize", tree={"a": jnp.ones(3)}
    )
    refused(tmp_path, ValueError, "qparams holds no QuantizedWeight", tree={})


def test_weights_that_no_engine_serves_are_refused(tmp_path):
    message = "a/w: contraction of 24 values: wanted a positive multiple of 16, as serving engines require; leave"
    refused(tmp_path, LeafError, message, tree={"a": {"w": quantized(24, 8)}})
    refused(tmp_path, LeafError, "w: contraction of 12 values", tree={"w": quantized(3, 4, 8, axis=(0, 1))})
    refused(tmp_path, LeafError, "w: contraction of 0 values", tree={"w": quantized(0, 8)})
    scaled = dataclasses.replace(quantized(16, 8), pre_scale=jnp.ones(16))
    message = "a/w: has a pre_scale, which serving engines refuse: wanted None; fold it into the layer in front first"
    refused(tmp_path, LeafError, message, tree={"a": {"w": scaled}})
    rotated = dataclasses.replace(quantized(16, 8), rotation=16)
    message = "a/w: is rotated in groups of 16, but no serving engine rotates the activation: wanted a weight without"
    refused(tmp_path, LeafError, message, tree={"a": {"w": rotated}})


def test_two_leaves_for_one_tensor_are_refused(tmp_path):
    tree = {"a": quantized(16, 8), "b": {"scale": jnp.ones(3)}}
    message = "b/scale: would be written as 'x.weight', as a is: wanted one leaf for each tensor; give one of them"
    refused(tmp_path, LeafError, message, tree=tree, names={"a": "x", "b/scale": "x"})


def test_scalars_that_do_not_fit_the_tensors_are_refused(tmp_path):
    per_expert = quantized(4, 16, 8, axis=1, global_scale=np.ones((4, 1, 1)))
    message = r"w: global scale of shape \(4, 1, 1\) and dtype float32: wanted one float32 .*, shape \(\); a name with"
    refused(tmp_path, LeafError, message, tree={"w": per_expert})
    for shape in [(3,), (4, 2), (2, 4)]:
        leaf = dataclasses.replace(per_expert, input_scale=jnp.ones(shape))
        refused(tmp_path, LeafError, "w: input scale of shape", tree={"w": leaf}, names={"w": "e.{expert}"})
    leaf = dataclasses.replace(per_expert, input_scale=jnp.ones((), jnp.bfloat16))
    refused(tmp_path, LeafError, "input scale of shape .* dtype bfloat16", tree={"w": leaf}, names={"w": "e.{expert}"})


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-39])
def test_scales_that_would_break_a_layer_are_refused(tmp_path, scale):
    leaf = quantized(4, 16, 8, axis=1, input_scale=jnp.asarray(np.array([1, 2, scale, 3], np.float32)))
    message = r"w: input scale \S+: wanted a positive, normal and finite value; calibrate again, or leave it out"
    refused(tmp_path, LeafError, message, tree={"w": leaf}, names={"w": "e.{expert}"})


def test_a_stack_axis_that_is_contracted_is_refused(tmp_path):
    message = (
        r"w: shape \(16, 8\) contracted over \(-2,\) for module name 'e.\{expert\}': wanted leading axes that are not"
    )
    refused(tmp_path, LeafError, message, names={"w": "e.{expert}"})


def test_leaves_that_are_no_arrays_are_refused(tmp_path):
    message = "b: a leaf of type {}: wanted a JAX or numpy array, or a QuantizedWeight, outside of jit"
    for leaf in (1.0, "text", np.float32(1), jax.ShapeDtypeStruct((2,), jnp.float32)):
        refused(tmp_path, LeafError, message.format(type(leaf).__name__), tree={"a": quantized(16, 8), "b": leaf})

    @jax.jit
    def under_jit(w):
        export_checkpoint({"b": w}, tmp_path / "out")

    with pytest.raises(LeafError, match=message.format("DynamicJaxprTracer")):
        under_jit(weight(3))
    for leaf in (jax.random.key(0), jnp.ones(4, jnp.int4), np.array(["text"]), np.ones(2, np.complex64)):
        message = "b: dtype .*: wanted one that safetensors has, such as bfloat16; cast it first"
        refused(tmp_path, LeafError, message, tree={"a": quantized(16, 8), "b": leaf})


def test_an_existing_target_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already: wanted a directory to create"):
        export_checkpoint({"w": quantized(16, 8)}, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_leaf_that_cannot_be_fetched_leaves_nothing(tmp_path):
    tree = {"a": quantized(16, 8), "b": jnp.ones(3)}
    tree["b"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        export_checkpoint(tree, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_other_files_of_the_original_are_carried_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "x"}))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "model.safetensors", "hf_quant_config.json"):
        (source / name).write_text("old")
    export_checkpoint({"w": quantized(16, 8)}, tmp_path / "out", source=source)
    found = {path.name: path for path in (tmp_path / "out").iterdir()}
    written = {"config.json", "hf_quant_config.json", "model.safetensors"}
    assert set(found) == written | {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert found["tokenizer.json"].read_text() == "tokenizer.json"
    assert read_json(found["config.json"])["model_type"] == "x"
    assert read_json(found["hf_quant_config.json"])["quantization"]["quant_algo"] == "W4A16_NVFP4"


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such directory; wanted the original checkpoint"):
        export_checkpoint({"w": quantized(16, 8)}, tmp_path / "out", source=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
