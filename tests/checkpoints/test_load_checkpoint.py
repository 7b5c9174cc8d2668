"""Checkpoints of either format come back onto any mesh, and broken ones are refused."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from golden_models import GOLDEN, mesh, needs_golden, read_json, tensors_of
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxfp4.checkpoints.placement
from jaxfp4.checkpoints import export_checkpoint, load_checkpoint
from jaxfp4.checkpoints.stored import inverse_of_reciprocal
from jaxfp4.checkpoints.writer import PendingTensor, write_tensors
from jaxfp4.tensors import QuantizedWeight

FORMATS = ["modelopt", "compressed-tensors"]


def module_tensors(name="m", n=8, k=32, file_format="modelopt", input_scale=2.0):
    """The tensors of one quantized module."""
    rng = np.random.default_rng(0)
    packed, scales, scale = reference.quantize_last_axis(rng.normal(size=(n, k)).astype(ml_dtypes.bfloat16))
    scales = scales.view(ml_dtypes.float8_e4m3fn)
    if file_format == "modelopt":
        parts = {"weight": packed, "weight_scale": scales, "weight_scale_2": scale}
        parts |= {} if input_scale is None else {"input_scale": np.float32(input_scale)}
    else:
        parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": np.float32([1]) / scale}
        parts |= {} if input_scale is None else {"input_global_scale": np.float32([1 / input_scale])}
    return {f"{name}.{part}": np.asarray(values) for part, values in parts.items()}


def save(directory, tensors, config=None):
    directory.mkdir(exist_ok=True)
    write_tensors(directory, [PendingTensor(n, v.dtype, v.shape, lambda v=v: v) for n, v in tensors.items()])
    if config is not None:
        (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return directory


def leaves_of(tree):
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


@needs_golden
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3_moe"])
def test_golden_exports_load_to_their_exact_values(name):
    tensors = tensors_of(GOLDEN / name / "modelopt")
    leaves = leaves_of(load_checkpoint(GOLDEN / name / "modelopt"))
    quantized = {path for path, leaf in leaves.items() if isinstance(leaf, QuantizedWeight)}
    assert quantized == {n.replace(".", "/").removesuffix("_scale_2") for n in tensors if n.endswith("weight_scale_2")}
    for path, leaf in leaves.items():
        key = path.replace("/", ".")
        if path not in quantized:
            assert (leaf.dtype, leaf.shape) == (tensors[key].dtype, tensors[key].shape)
            np.testing.assert_array_equal(leaf, tensors[key])
            continue
        module = key.removesuffix(".weight")
        assert leaf.weight.axes == (-1,)
        assert leaf.weight.shape == (tensors[key].shape[0], 2 * tensors[key].shape[1])
        assert leaf.weight.dtype == np.float32
        assert leaf.input_scale == tensors[f"{module}.input_scale"]
        assert leaf.input_scale.shape == leaf.weight.global_scale.shape == ()
        scales = tensors[f"{module}.weight_scale"].view(np.uint8)
        wanted = reference.dequantize_last_axis(tensors[key], scales, tensors[f"{module}.weight_scale_2"])
        np.testing.assert_array_equal(leaf.weight.dequantize(), wanted)
    if name == "tiny_llama":
        assert leaves["model/layers/1/self_attn/k_proj/k_scale"] == tensors["model.layers.1.self_attn.k_proj.k_scale"]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("input_scale", [None, 2.0])
@pytest.mark.parametrize("with_config", [True, False])
def test_export_of_what_was_loaded_is_the_same(tmp_path, file_format, input_scale, with_config):
    tensors = module_tensors("model.a", file_format=file_format, input_scale=input_scale)
    tensors |= {
        "model.a.bias": np.ones(8, ml_dtypes.bfloat16),
        "model.a.k_scale": np.float32(3),
        "model.norm.weight": np.ones(4, np.float32),
        "position_ids": np.arange(5),
    }
    tensors = {name: np.asarray(values) for name, values in tensors.items()}
    config = {"quantization_config": {"quant_method": file_format}} if with_config else None
    tree = load_checkpoint(save(tmp_path / "in", tensors, config))
    assert tree["position_ids"].dtype == np.int64
    assert tree["model"]["a"]["bias"].dtype == ml_dtypes.bfloat16
    export_checkpoint(tree, tmp_path / "out", format=file_format)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


def test_formats_convert_into_each_other_without_loss(tmp_path):
    save(tmp_path / "0", module_tensors())
    export_checkpoint(load_checkpoint(tmp_path / "0"), tmp_path / "1", format="compressed-tensors")
    export_checkpoint(load_checkpoint(tmp_path / "1"), tmp_path / "2")
    assert (tmp_path / "2/model.safetensors").read_bytes() == (tmp_path / "0/model.safetensors").read_bytes()
    wanted = module_tensors(file_format="compressed-tensors")
    assert tensors_of(tmp_path / "1")["m.weight_global_scale"] == wanted["m.weight_global_scale"]


def test_scales_of_bfloat16_and_float16_amax_survive_their_reciprocals():
    amax = np.arange(0x3C00, 0x4000, dtype=np.uint16).view(np.float16).astype(np.float32)
    amax = np.concatenate([amax, *(amax * np.float32(2.0**e) for e in (-60, 7, 60))])
    scales = amax / np.float32(2688)
    assert all(inverse_of_reciprocal(np.float32(1) / scale) == scale for scale in scales)


def test_reciprocals_are_kept_wherever_a_float_has_them():
    stored = np.random.default_rng(0).uniform(0.5, 1, 2000).astype(np.float32)
    read = np.array([inverse_of_reciprocal(x) for x in stored])
    again = np.float32(1) / read
    np.testing.assert_array_max_ulp(again, stored, 1)
    assert np.mean(again == stored) > 0.8  # between 1/sqrt(2) and 1 not every float is a reciprocal
    assert np.isinf(inverse_of_reciprocal(np.float32(0)))
    assert np.isnan(inverse_of_reciprocal(np.float32(np.nan)))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": "float8"}, "float32"),
        ({"dtype": 3}, "float32"),
    ],
)
def test_the_weight_has_the_dtype_of_the_config(tmp_path, config, wanted):
    assert load_checkpoint(save(tmp_path, module_tensors(), config))["m"]["weight"].weight.dtype.name == wanted


def test_other_tensors_of_a_module_stay_beside_the_weight(tmp_path):
    tensors = module_tensors() | {
        "m.pre_quant_scale": np.ones(32, ml_dtypes.bfloat16),
        "m.bias": np.zeros(8, np.float32),
    }
    module = load_checkpoint(save(tmp_path, tensors))["m"]
    assert sorted(module) == ["bias", "weight"]
    assert (module["weight"].pre_scale.shape, module["weight"].pre_scale.dtype) == ((32,), ml_dtypes.bfloat16)
    tensors["m.pre_quant_scale"] = np.ones(31, np.float32)
    with pytest.raises(ValueError, match=r"'m.pre_quant_scale' is float32 \(31,\): wanted float32 \(32,\)"):
        load_checkpoint(save(tmp_path, tensors))


def test_weights_of_other_precisions_are_plain_arrays(tmp_path):
    tensors = module_tensors() | {
        "fp8.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn),
        "fp8.weight_scale": np.full(4, 2, np.float32),
    }
    tree = load_checkpoint(save(tmp_path, tensors))
    assert tree["fp8"]["weight"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(tree["fp8"]["weight_scale"], 2)


@pytest.mark.parametrize("file_format", FORMATS)
def test_scalars_may_have_either_shape(tmp_path, file_format):
    tensors = module_tensors(file_format=file_format)
    swapped = {
        n: v.reshape(()) if v.shape == (1,) else v.reshape(1) if v.shape == () else v for n, v in tensors.items()
    }
    found, wanted = (load_checkpoint(save(tmp_path, t))["m"]["weight"] for t in (swapped, tensors))
    assert found.weight.global_scale == wanted.weight.global_scale
    assert found.weight.global_scale.shape == found.input_scale.shape == ()


def spec_of(array):
    return tuple(array.sharding.spec) + (None,) * (array.ndim - len(array.sharding.spec))


def sharded_tensors():
    return module_tensors("a", 8, 64) | module_tensors("b", 6, 64) | {"norm.weight": np.ones(4, np.float32)}


@pytest.mark.parametrize("spec", [("tp", "ep"), ("ep", None), (None, "tp")])
def test_a_mapping_places_each_weight_and_its_block_scales(tmp_path, spec):
    devices = mesh(tp=4, ep=2)
    sharding = NamedSharding(devices, PartitionSpec(*spec))
    tree = load_checkpoint(save(tmp_path, sharded_tensors()), shardings={"a/weight": sharding})
    leaf = tree["a"]["weight"]
    assert spec_of(leaf.weight.packed) == spec_of(leaf.weight.scales) == spec
    assert leaf.weight.global_scale.sharding.is_fully_replicated
    assert leaf.input_scale.sharding.device_set == sharding.device_set
    assert len(tree["b"]["weight"].weight.packed.devices()) == 1
    plain = load_checkpoint(tmp_path)["a"]["weight"]
    for found, wanted in zip(jax.tree.leaves(leaf), jax.tree.leaves(plain), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_one_sharding_for_everything_replicates_what_it_does_not_fit(tmp_path):
    sharding = NamedSharding(mesh(tp=4, ep=2), PartitionSpec("tp", "ep"))
    tree = load_checkpoint(save(tmp_path, sharded_tensors()), shardings=sharding)
    assert spec_of(tree["a"]["weight"].weight.packed) == ("tp", "ep")
    for array in (tree["b"]["weight"].weight.packed, tree["b"]["weight"].weight.scales, tree["norm"]["weight"]):
        assert array.sharding.is_fully_replicated
        assert len(array.devices()) == 8
    cut = NamedSharding(mesh(tp=8), PartitionSpec(None, "tp"))  # 64 / 8 is half a block
    weight = load_checkpoint(tmp_path, shardings=cut)["a"]["weight"].weight
    assert weight.packed.sharding.is_fully_replicated
    assert weight.scales.sharding.is_fully_replicated
    device = jax.devices()[3]
    tree = load_checkpoint(tmp_path, shardings=SingleDeviceSharding(device))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(tree))


def test_each_device_reads_only_its_slice(tmp_path, monkeypatch):
    read = []
    original = jax.make_array_from_callback

    def recording(shape, sharding, callback):
        def counted(index):
            values = callback(index)
            read.append((shape, values.shape))
            return values

        return original(shape, sharding, counted)

    monkeypatch.setattr(jaxfp4.checkpoints.placement.jax, "make_array_from_callback", recording)
    sharding = NamedSharding(mesh(tp=8), PartitionSpec("tp"))
    load_checkpoint(save(tmp_path, sharded_tensors()), shardings={"a/weight": sharding})
    assert {part for shape, part in read if shape == (8, 32)} == {(1, 32)}
    assert {part for shape, part in read if shape == (8, 4)} == {(1, 4)}


def test_arrays_do_not_depend_on_the_file_any_more(tmp_path):
    tensors = sharded_tensors()
    save(tmp_path, tensors)
    trees = [load_checkpoint(tmp_path), load_checkpoint(tmp_path, shardings=SingleDeviceSharding(jax.devices()[0]))]
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\0" * size)
        os.fsync(file.fileno())
    for tree in trees:
        np.testing.assert_array_equal(tree["a"]["weight"].weight.packed, tensors["a.weight"])
        np.testing.assert_array_equal(tree["norm"]["weight"], tensors["norm.weight"])


def test_shardings_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path, sharded_tensors())
    devices = mesh(tp=8)
    cases = [
        ("b/weight", ("tp", None), r"does not divide the array of shape \(6, 64\): wanted equal whole parts; split"),
        ("a/weight", (None, "tp"), r"does not divide the block scales of shape \(8, 4\)"),
        ("norm/weight", ("tp",), r"does not divide the array of shape \(4,\)"),
        ("norm/weight", (None, "tp"), r"does not divide the array of shape \(4,\)"),
    ]
    for path, spec, message in cases:
        with pytest.raises(ValueError, match=rf"shardings\['{path}'\] is NamedSharding.*, which {message}") as caught:
            load_checkpoint(tmp_path, shardings={path: NamedSharding(devices, PartitionSpec(*spec))})
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match="shardings has 'c/weight', which is no leaf: wanted paths such as 'model/norm/"
    ):
        load_checkpoint(tmp_path, shardings={"c/weight": NamedSharding(devices, PartitionSpec())})
    with pytest.raises(TypeError, match=r"shardings\['a'\] is \S+: wanted a jax.sharding.NamedSharding or"):
        load_checkpoint(tmp_path, shardings={"a": PartitionSpec()})
    with pytest.raises(
        TypeError, match=r"shardings is 'tp': wanted a jax.sharding.NamedSharding or SingleDeviceSharding"
    ):
        load_checkpoint(tmp_path, shardings="tp")


def refused(directory, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_missing_tensor_is_named(tmp_path, file_format, with_config):
    tensors = module_tensors(file_format=file_format, input_scale=None)
    config = {"quantization_config": {"quant_method": file_format}} if with_config else None
    for name in tensors:
        partial = {n: v for n, v in tensors.items() if n != name}
        message = rf"tensor '{name}' is missing beside 'm\.\*': wanted it for an NVFP4 weight; export the checkpoint"
        refused(save(tmp_path, partial, config), message)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("m.weight_scale", np.ones((8, 2), np.float32), r"is float32 \(8, 2\): wanted float8_e4m3fn \(8, 2\); export"),
        (
            "m.weight_scale",
            np.ones((2, 8), ml_dtypes.float8_e4m3fn),
            r"is float8_e4m3fn \(2, 8\): wanted float8_e4m3fn \(8, 2\)",
        ),
        ("m.weight_scale_2", np.ones(2, np.float32), r"is float32 \(2,\): wanted float32 \(\)"),
        ("m.weight_scale_2", np.ones((), ml_dtypes.bfloat16), r"is bfloat16 \(\): wanted float32 \(\)"),
        ("m.input_scale", np.ones((1, 1), np.float32), r"is float32 \(1, 1\): wanted float32 \(\)"),
        ("m.weight", np.ones((8, 16), np.int8), r"is int8 \(8, 16\): wanted uint8; export"),
        (
            "m.weight",
            np.ones((2, 4, 16), np.uint8),
            r"has shape \(2, 4, 16\): wanted \[N, K/2\] with K a positive multiple",
        ),
        (
            "m.weight",
            np.ones((8, 12), np.uint8),
            r"has shape \(8, 12\): wanted \[N, K/2\] with K a positive multiple of 16",
        ),
        ("m.weight", np.ones((8, 0), np.uint8), r"has shape \(8, 0\): wanted"),
    ],
)
def test_a_wrong_dtype_or_shape_is_named(tmp_path, name, values, message):
    refused(save(tmp_path, module_tensors() | {name: values}), f"tensor '{name}' {message}")


def test_directories_in_neither_format_are_refused(tmp_path):
    plain = {"m.weight": np.ones((8, 16), np.float32)}
    end = "wanted an NVFP4 checkpoint, of modelopt or compressed-tensors; quantize the model first"
    refused(save(tmp_path, plain), f"no quantization in config.json or among the tensors: {end}")
    refused(save(tmp_path, plain, {"quantization_config": None}), "no quantization in config.json")
    refused(save(tmp_path, plain, {"quantization_config": {"quant_method": 4}}), "no quantization in config.json")
    refused(save(tmp_path, plain, {"quantization_config": {"quant_method": "gptq"}}), f"quant_method 'gptq': {end}")
    config = {"quantization_config": {"quant_method": "modelopt"}}
    message = r"no tensor \*.weight of dtype uint8 and no \*.weight_scale_2: wanted an NVFP4 checkpoint; quantize"
    refused(save(tmp_path, plain, config), message)
    refused(save(tmp_path, module_tensors(file_format="compressed-tensors"), config), message)
    refused(tmp_path / "none", "no such directory", FileNotFoundError)


def test_a_broken_config_is_refused(tmp_path):
    for text, found in [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[1]", "holds a JSON list: wanted an"),
    ]:
        refused(save(tmp_path, module_tensors(), text), f"config.json: {found}.*; restore the file")
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    refused(tmp_path, r"config.json: no valid JSON \('utf-8'")


def test_names_that_form_no_tree_are_refused(tmp_path):
    tensors = module_tensors() | {"m.weight.more": np.ones(1, np.float32)}
    refused(save(tmp_path, tensors), "tensor 'm.weight.more' lies below another tensor: wanted names that form a tree")
    tensors = module_tensors("m.deep") | {"m": np.ones(1, np.float32)}
    refused(
        save(tmp_path, tensors), "tensor 'm' is there twice, or above others: wanted names that form a tree; rename"
    )
    tensors = module_tensors(file_format="compressed-tensors") | {"m.weight": np.ones(1, np.float32)}
    refused(save(tmp_path, tensors), "tensor 'm.weight' is there twice")


@pytest.mark.parametrize("file_format", FORMATS)
def test_our_exports_load_in_both_formats_with_their_config(tmp_path, file_format):
    save(tmp_path / "in", module_tensors("model.a") | {"head.weight": np.ones((4, 4), np.float32)})
    tree = load_checkpoint(tmp_path / "in")
    export_checkpoint(tree, tmp_path / "out", format=file_format, config={"dtype": "bfloat16"}, max_shard_bytes=64)
    assert read_json(tmp_path / "out/config.json")["quantization_config"]["quant_method"] == file_format
    again = load_checkpoint(tmp_path / "out")
    assert again["model"]["a"]["weight"].weight.dtype == jnp.bfloat16
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
