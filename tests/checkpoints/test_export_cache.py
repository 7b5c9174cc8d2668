"""Scales of a quantized key-value cache in checkpoints, against Model-Optimizer's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import GOLDEN, mesh, needs_golden, read_json, tensors_of

import jaxfp4
from jaxfp4.checkpoints import TensorName, export_checkpoint, load_checkpoint
from jaxfp4.formats import LeafError
from jaxfp4.models import checkpoint_names, from_flax, load_decoder
from jaxfp4.recipes import CacheFormat
from jaxfp4.tensors import QuantizedWeight, quantize
from jaxfp4.tensors.cache import CacheAmax

FP8, NVFP4 = CacheFormat.FP8, CacheFormat.NVFP4


def weight(*shape, keys=None, values=None, format=FP8):
    amaxes = [None if a is None else jnp.asarray(a, jnp.float32) for a in (keys, values)]
    axis = len(shape) - 2
    return QuantizedWeight(quantize(jnp.ones(shape), axis), cache=CacheAmax(*amaxes, format))


@needs_golden
@pytest.mark.parametrize("devices", [None, {"tp": 2, "ep": 2}], ids=["one device", "mesh"])
def test_golden_llama(tmp_path, devices):
    """From the Hugging Face weights and tokens to the files: names, dtypes, shapes, bytes, and scales to 1e-5."""
    folder = GOLDEN / "tiny_llama"
    model = load_decoder(folder / "hf", mesh=mesh(**devices) if devices else None)
    apply, params = from_flax(model)
    tokens = np.load(folder / "calib_tokens.npy")
    plan = jaxfp4.plan(apply, params, tokens, recipe="nvfp4_kv_fp8")
    qparams = jaxfp4.quantize_params(params, plan, jaxfp4.calibrate(apply, params, [tokens], plan, progress=False))
    config = read_json(folder / "hf" / "config.json")
    export_checkpoint(qparams, tmp_path / "out", names=checkpoint_names(model.config), config=config)
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(folder / "modelopt")
    assert sorted(found) == sorted(wanted)
    assert sum(name.endswith(("k_scale", "v_scale")) for name in found) == 4
    for name, values in wanted.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        if name.endswith(("input_scale", "k_scale", "v_scale")):
            np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
        else:
            assert found[name].tobytes() == values.tobytes(), name
    for file_name in ("config.json", "hf_quant_config.json"):
        assert unsigned(read_json(tmp_path / "out" / file_name)) == unsigned(read_json(folder / "modelopt" / file_name))


def unsigned(value):
    """A JSON value without the producer."""
    return {k: unsigned(v) for k, v in value.items() if k != "producer"} if isinstance(value, dict) else value


@needs_golden
def test_scales_from_model_optimizers_own_maxima(tmp_path):
    """The float32 quotient by 448 is the golden scale, bit for bit, for an amax that gives it."""
    wanted = {
        n: v for n, v in tensors_of(GOLDEN / "tiny_llama" / "modelopt").items() if n.endswith(("k_scale", "v_scale"))
    }
    for stored in wanted.values():
        near = np.float32(stored * np.float32(448))
        amaxes = (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(9)))
        amax = next(a for a in amaxes if a / np.float32(448) == stored)
        directory = tmp_path / f"{float(amax)}"
        export_checkpoint({"k_proj": weight(32, 16, keys=amax)}, directory)
        assert tensors_of(directory)["k_proj.k_scale"].tobytes() == stored.tobytes()


@pytest.mark.parametrize(
    "format, scheme, algorithm",
    [(FP8, {"dynamic": False, "num_bits": 8, "type": "float"}, "FP8"), (NVFP4, "NVFP4", "NVFP4")],
)
def test_tensors_and_configuration(tmp_path, format, scheme, algorithm):
    tree = {
        "k_proj": weight(32, 16, keys=3.0, format=format),
        "v_proj": weight(32, 16, values=0.7, format=format),
        "kv_proj": weight(32, 16, keys=1.0, values=2.0, format=format),
        "q_proj": QuantizedWeight(quantize(jnp.ones((32, 16)), 0)),
    }
    source = {"model_type": "x", "quantization_config": {"quant_method": "modelopt", "kv_cache_scheme": "other"}}
    export_checkpoint(tree, tmp_path / "out", config=source)
    found = {n: v for n, v in tensors_of(tmp_path / "out").items() if n.endswith(("k_scale", "v_scale"))}
    expected = {"k_proj.k_scale": 3.0, "v_proj.v_scale": 0.7, "kv_proj.k_scale": 1.0, "kv_proj.v_scale": 2.0}
    assert found.keys() == expected.keys()
    for name, amax in expected.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, ())
        assert found[name] == np.float32(amax) / np.float32(448)
    assert read_json(tmp_path / "out/config.json")["quantization_config"]["kv_cache_scheme"] == scheme
    assert read_json(tmp_path / "out/hf_quant_config.json")["quantization"]["kv_cache_quant_algo"] == algorithm


def test_compressed_tensors_has_them_above_the_projections(tmp_path):
    tree = {"attention": {"k_proj": weight(32, 16, keys=3.0), "v_proj": weight(32, 16, values=0.7)}}
    export_checkpoint(tree, tmp_path / "out", format="compressed-tensors", config={"model_type": "x"})
    found = {n: v for n, v in tensors_of(tmp_path / "out").items() if n.endswith(("k_scale", "v_scale"))}
    assert found == {"attention.k_scale": np.float32(3) / 448, "attention.v_scale": np.float32(0.7) / np.float32(448)}
    assert {(v.dtype.name, v.shape) for v in found.values()} == {("float32", (1,))}
    scheme = read_json(tmp_path / "out/config.json")["quantization_config"]["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def test_layers_of_a_stack(tmp_path):
    tree = {"k_proj": weight(2, 32, 16, keys=[3.0, 5.0])}
    export_checkpoint(tree, tmp_path / "out", names={"k_proj": TensorName("layers.{layer}.k_proj")})
    found = tensors_of(tmp_path / "out")
    for i, amax in enumerate((3.0, 5.0)):
        assert found[f"layers.{i}.k_proj.k_scale"] == np.float32(amax) / np.float32(448)


def test_scales_come_back(tmp_path):
    """As plain arrays beside the weight, and from there into the same files."""
    tree = {"k_proj": weight(32, 16, keys=3.0), "v_proj": weight(32, 16, values=0.7)}
    export_checkpoint(tree, tmp_path / "out", config={"model_type": "x"})
    loaded = load_checkpoint(tmp_path / "out")
    assert isinstance(loaded["k_proj"]["k_scale"], jax.Array)
    assert loaded["k_proj"]["k_scale"] == np.float32(3.0) / np.float32(448)
    assert loaded["v_proj"]["v_scale"] == np.float32(0.7) / np.float32(448)
    export_checkpoint(loaded, tmp_path / "again", config=read_json(tmp_path / "out/config.json"))
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


REFUSED = {
    "two formats": (
        {"a": weight(32, 16, keys=1.0), "b": weight(32, 16, values=1.0, format=NVFP4)},
        {},
        r"^a: its key-value cache is FP8, that of b NVFP4: wanted one format for the whole model",
    ),
    "compressed-tensors": (
        {"a": weight(32, 16, keys=1.0, format=NVFP4)},
        {"format": "compressed-tensors"},
        r"^a: has scales of a key-value cache in NVFP4, .*: wanted format='modelopt', or a recipe with an FP8 cache",
    ),
    "zero": ({"a": weight(32, 16, keys=0.0)}, {}, r"^a: k_scale 0.0: wanted a positive, normal and finite value"),
    "shape": (
        {"a": weight(32, 16, values=[1.0, 2.0])},
        {},
        r"^a: v_scale of shape \(2,\) and dtype float32: wanted one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    tree, options, message = REFUSED[name]
    with pytest.raises(LeafError, match=message):
        export_checkpoint(tree, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_cache_without_maxima_writes_nothing(tmp_path):
    leaf = weight(32, 16, keys=1.0)
    export_checkpoint({"a": dataclasses.replace(leaf, cache=None)}, tmp_path / "out")
    assert not [n for n in tensors_of(tmp_path / "out") if n.endswith(("k_scale", "v_scale"))]
    assert read_json(tmp_path / "out/hf_quant_config.json")["quantization"]["kv_cache_quant_algo"] is None
