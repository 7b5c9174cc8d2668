"""FP8 beside NVFP4: plans, scales, simulation, layouts and files of `nvfp4_mixed_fp8`."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import jaxfp4
from jaxfp4 import Recipe, Role, Rule, Scheme
from jaxfp4.checkpoints import SafetensorsFile, Severity, TensorName, export_checkpoint, load_checkpoint
from jaxfp4.checkpoints.streaming.convert import convert
from jaxfp4.formats import LeafError
from jaxfp4.recipes import Method, Mse
from jaxfp4.tensors import FP8Tensor, NVFP4Tensor

from . import models

PARAMS = jax.tree.map(jnp.asarray, models.draw())
TOKENS = models.batches(1)[0]
FORMATS = ["modelopt", "compressed-tensors"]
NAMES = {
    **{f"layers/{name}": f"model.layers.{{layer}}.{name}_proj" for name in ("q", "k", "v", "o")},
    **{f"layers/{name}": f"model.layers.{{layer}}.experts.{{expert}}.{name}" for name in ("gate", "up", "down")},
    "layers/router": TensorName("model.layers.{layer}.router", transpose=True),
}


@pytest.fixture(scope="module")
def job():
    """Plan, statistics and quantized parameters on one device."""
    plan = jaxfp4.plan(models.scanned, PARAMS, TOKENS, recipe="nvfp4_mixed_fp8")
    stats = jaxfp4.calibrate(models.scanned, PARAMS, [TOKENS], plan, progress=False)
    return plan, stats, jaxfp4.quantize_params(PARAMS, plan, stats)


def test_attention_is_fp8_and_the_rest_nvfp4(job):
    plan, stats, qparams = job
    schemes = {entry.path: entry.scheme for entry in plan.quantized}
    assert {path for path, scheme in schemes.items() if scheme is Scheme.W8A8} == {f"layers/{n}" for n in "qkvo"}
    assert "W8A8" in str(plan)
    for path, weight in jaxfp4.weights(qparams).items():
        assert isinstance(weight.weight, FP8Tensor if schemes[path] is Scheme.W8A8 else NVFP4Tensor)
        divisor = 448 if schemes[path] is Scheme.W8A8 else 2688
        siblings = plan.by_path[path].weight.siblings
        amax = np.max([np.asarray(stats[p]["amax"]).reshape(2, -1).max(1) for p in siblings], 0)
        np.testing.assert_array_equal(weight.input_scale, amax / np.float32(divisor))
    found = [jaxfp4.weights(qparams)[f"layers/{n}"].weight.global_scale.ravel() for n in "qkv"]
    amaxes = np.max([np.abs(PARAMS["layers"][n]).reshape(2, -1).max(1) for n in "qkv"], 0)
    for scale in found:
        np.testing.assert_array_equal(scale, amaxes / np.float32(448))


def test_simulated_product_by_hand():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(32, 16)), jnp.float32)
    plan = jaxfp4.plan(lambda p, x: x @ p["w"], {"w": w}, x, recipe=Recipe("fp8", (Rule(Scheme.W8A8),)))
    stats = jaxfp4.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x * 0.5], plan, progress=False)
    qparams = jaxfp4.quantize_params({"w": w}, plan, stats)

    def rounded(values, amax):
        scale = np.float32(amax) / np.float32(448)
        codes = np.clip(np.asarray(values) / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return scale * codes.astype(np.float32)

    expected = jnp.asarray(rounded(x, np.abs(x * 0.5).max())) @ jnp.asarray(rounded(w, np.abs(w).max()))
    found = jaxfp4.quantized(lambda p, x: x @ p["w"], plan)(qparams, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    without = jaxfp4.quantize_params({"w": w}, plan)
    dynamic = jnp.asarray(rounded(x, np.abs(x).max())) @ jnp.asarray(rounded(w, np.abs(w).max()))
    np.testing.assert_allclose(
        jaxfp4.quantized(lambda p, x: x @ p["w"], plan)(without, x), dynamic, rtol=1e-6, atol=1e-6
    )


def test_it_is_nearer_to_the_model_than_nvfp4_alone(job):
    plan, _, qparams = job
    exact = models.scanned(PARAMS, TOKENS)
    other = jaxfp4.plan(models.scanned, PARAMS, TOKENS)
    stats = jaxfp4.calibrate(models.scanned, PARAMS, [TOKENS], other, progress=False)
    errors = [
        float(jnp.linalg.norm(jaxfp4.quantized(models.scanned, p)(q, TOKENS) - exact))
        for p, q in ((plan, qparams), (other, jaxfp4.quantize_params(PARAMS, other, stats)))
    ]
    assert 0 < errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("sizes", [{"tp": 4, "ep": 2}, {"tp": 2, "ep": 4}], ids=str)
def test_same_digest_on_every_mesh(job, sizes):
    plan, stats, qparams = job
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def placed(name, w):
        names = [axis if axis in sizes else None for axis in models.SPECS[name]]
        return jax.device_put(w, NamedSharding(mesh, jax.sharding.PartitionSpec(None, *names)))

    params = PARAMS | {"layers": {name: placed(name, w) for name, w in PARAMS["layers"].items()}}
    found = jaxfp4.quantize_params(params, plan, stats)
    assert jaxfp4.digest(found, inputs=True) == jaxfp4.digest(qparams, inputs=True)


def test_block_by_block_gives_the_same_weights(job):
    plan, _, qparams = job
    found = jaxfp4.quantize_sequentially(models.scanned, PARAMS, [TOKENS], plan, progress=False)
    assert jaxfp4.digest(found) == jaxfp4.digest(qparams)


@pytest.mark.parametrize("file_format", FORMATS)
def test_files_and_back(tmp_path, job, file_format):
    plan, _, qparams = job
    export_checkpoint(qparams, tmp_path / "out", names=NAMES, format=file_format)
    file = SafetensorsFile(tmp_path / "out/model.safetensors")
    scalar = () if file_format == "modelopt" else (1,)
    assert file.info("model.layers.1.k_proj.weight") == (np.dtype(ml_dtypes.float8_e4m3fn), (64, 64))
    for last in ("weight_scale", "input_scale"):
        assert file.info(f"model.layers.1.k_proj.{last}") == (np.dtype(np.float32), scalar)
    weight = qparams["layers"]["k"]
    np.testing.assert_array_equal(
        file.tensor("model.layers.1.k_proj.weight").view(np.uint8),
        np.asarray(weight.weight.values)[1].reshape(64, 64).T.view(np.uint8),
    )
    assert file.tensor("model.layers.1.k_proj.input_scale").reshape(()) == weight.input_scale[1]
    loaded = load_checkpoint(tmp_path / "out", params=PARAMS, plan=plan, names=NAMES)
    assert jaxfp4.digest(loaded) == jaxfp4.digest(qparams)
    assert np.array_equal(loaded["layers"]["o"].input_scale, qparams["layers"]["o"].input_scale)
    tree = load_checkpoint(tmp_path / "out")
    again = tree["model"]["layers"]["0"]["q_proj"]["weight"]
    assert isinstance(again.weight, FP8Tensor) and again.weight.shape == (64, 64)
    export_checkpoint(tree, tmp_path / "again", format=file_format)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_configurations(tmp_path, job):
    for file_format in FORMATS:
        export_checkpoint(job[2], tmp_path / file_format, names=NAMES, format=file_format)
    read = {f: json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in FORMATS}
    theirs = read["modelopt"]
    assert theirs["quant_algo"] == "MIXED_PRECISION"
    assert theirs["quantized_layers"]["model.layers.0.q_proj"] == {"quant_algo": "FP8"}
    assert theirs["quantized_layers"]["model.layers.0.experts.3.up"] == {"quant_algo": "NVFP4", "group_size": 16}
    values = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert theirs["config_groups"]["group_1"]["weights"] == theirs["config_groups"]["group_1"]["input_activations"]
    assert theirs["config_groups"]["group_1"]["weights"] == values
    groups = read["compressed-tensors"]["config_groups"]
    assert read["compressed-tensors"]["format"] == "mixed-precision"
    assert [group["format"] for group in groups.values()] == ["nvfp4-pack-quantized", "float-quantized"]
    assert "model.layers.1.o_proj" in groups["group_1"]["targets"]


def test_bad_input(tmp_path, job):
    message = "a rule for W8A8 has method=mse: wanted max calibration, the only one for FP8; leave method out"
    with pytest.raises(ValueError, match=message):
        Rule(Scheme.W8A8, roles=frozenset({Role.ATTENTION}), method=Method(Mse()))
    bare = jaxfp4.quantize_params(PARAMS, job[0])
    with pytest.raises(LeafError, match=r"^layers/k: is FP8 without an input scale, which serving engines need"):
        export_checkpoint(bare, tmp_path / "out", names=NAMES)
    broken = jax.tree.map(lambda x: x, PARAMS)
    broken["layers"]["o"] = broken["layers"]["o"].at[1, 0, 0, 0].set(jnp.nan)
    with pytest.raises(LeafError, match=re.escape("layers/o: it holds NaN or Inf: wanted finite weights")):
        jaxfp4.quantize_params(broken, job[0], job[1])
    export_checkpoint(job[2], tmp_path / "out", names=NAMES)
    other = jaxfp4.plan(models.scanned, PARAMS, TOKENS)
    with pytest.raises(LeafError, match=r"^layers/k: .*out has no NVFP4 weight 'model.layers.0.k_proj': wanted one by"):
        load_checkpoint(tmp_path / "out", params=PARAMS, plan=other, names=NAMES)


def test_conversion_and_verification(tmp_path, job):
    for file_format in FORMATS:
        export_checkpoint(job[2], tmp_path / file_format, names=NAMES, format=file_format)
        convert(
            tmp_path / file_format, tmp_path / f"from {file_format}", file_format=FORMATS[file_format == FORMATS[0]]
        )
        assert not [f for f in jaxfp4.verify_checkpoint(tmp_path / file_format) if f.severity is Severity.ERROR]
    for found, wanted in (("from modelopt", FORMATS[1]), ("from compressed-tensors", FORMATS[0])):
        one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in (found, wanted))
        assert one == other
    path = tmp_path / "modelopt/model.safetensors"
    file = SafetensorsFile(path)
    stored = file.tensor("model.layers.0.k_proj.input_scale").tobytes()
    path.write_bytes(path.read_bytes().replace(stored, np.float32(0).tobytes()))
    errors = [f for f in jaxfp4.verify_checkpoint(tmp_path / "modelopt") if f.severity is Severity.ERROR]
    subjects = {f"model.layers.0.{name}_proj.input_scale" for name in "qkv"}  # they share it
    assert {f.subject for f in errors} == subjects
    assert {(f.check, f.found) for f in errors} == {("unusable-scale", "0: wanted a positive, finite number")}
