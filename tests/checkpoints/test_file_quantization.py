"""Weight-only quantization of files: the bytes of the package's own quantizer, the files of its own export."""

import itertools
import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_models import GOLDEN, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_checkpoints import BF16, CONFIG, contents, random_weights, write_model

import jaxfp4
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.checkpoints import TensorName, export_checkpoint, open_checkpoint
from jaxfp4.checkpoints.configs import Kind
from jaxfp4.checkpoints.sibling_names import module_of
from jaxfp4.checkpoints.streaming import file_quantization
from jaxfp4.checkpoints.streaming.file_plan import data_free_recipes, method_of, plan_files
from jaxfp4.checkpoints.streaming.file_quantization import quantize_planned
from jaxfp4.checkpoints.streaming.slab_quantizer import FLOATS, SlabQuantizer, amax_of
from jaxfp4.checkpoints.streaming.tensor_source import Reader, open_source
from jaxfp4.recipes import Recipe, Rule, Scheme
from jaxfp4.recipes.methods import Gptq, Method, Mse
from jaxfp4.tensors import QuantizedWeight, quantize_unchecked

MAX = SlabQuantizer.of(Method())
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def quantize(directory, out, recipe="nvfp4_weight_only", file_format="modelopt", exclude=(), **options):
    quantize_planned(plan_files(directory, exclude), out, recipe=recipe, file_format=file_format, **options)
    return out


def tensors_in(directory):
    checkpoint = open_checkpoint(directory)
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}


def encoded(quantizer, values, amax):
    """`(packed, scales, global scale)` as arrays of bytes and a float."""
    scaling = quantizer.scaling(amax, values.dtype)
    packed, scales = quantizer.encode(values, scaling)
    return np.asarray(packed)[: values.size // 2], np.asarray(scales)[: values.size // 16], float(scaling.global_scale)


def assert_encodes_as_the_package(values, amax):
    wanted = jaxfp4.quantize(jnp.asarray(values.reshape(-1, 16)), axis=-1, global_amax=amax)
    packed, scales, global_scale = encoded(MAX, values, amax)
    np.testing.assert_array_equal(packed, np.asarray(wanted.packed).reshape(-1))
    np.testing.assert_array_equal(scales, np.asarray(wanted.scales).reshape(-1).view(np.uint8))
    assert global_scale == float(wanted.global_scale)


def finite(values):
    """The array with zeros in the places of NaN and infinities."""
    with np.errstate(invalid="ignore"):  # for signalling NaN
        return np.where(np.isfinite(values), values, values.dtype.type(0))


def all_finite(dtype, rng):
    """Every finite 16-bit float, or as many float32 of every exponent, in random order."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    if dtype.itemsize == 4:
        bits = (bits << 16) | rng.integers(0, 1 << 16, bits.size, np.uint32)
    values = bits.astype(f"uint{8 * dtype.itemsize}").view(dtype)
    return rng.permutation(finite(values))


@dtypes
@pytest.mark.parametrize("amax", [0.0, 1e-37, 1.7e-5, 0.3, 1.0, 65504.0, 3e38])
def test_every_value_gets_the_code_of_the_package(dtype, amax):
    rng = np.random.default_rng(0)
    values = all_finite(dtype, rng)
    assert_encodes_as_the_package(values, amax)
    # Blocks of one magnitude, where many scales are neither clipped nor those of the largest values.
    assert_encodes_as_the_package(np.sort(values), amax)


@dtypes
def test_values_at_the_borders_between_codes(dtype):
    """Under each scale the midpoints of codes, and their neighbours, which a division rounds."""
    amax = 0.731
    scale = MAX.scaling(amax, dtype)
    codes = np.arange(1, 127, dtype=np.uint8)
    steps = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale.global_scale)
    borders = steps[:, None] * np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    near = borders.astype(dtype)
    bits = near.view(f"uint{8 * dtype.itemsize}")[..., None] + np.arange(-2, 3).astype(f"uint{8 * dtype.itemsize}")
    neighbours = bits.reshape(len(codes), -1).view(dtype)
    largest = (steps * 6).astype(dtype)
    blocks = np.zeros((len(codes), 3, 16), dtype)
    blocks[..., :15].reshape(len(codes), -1)[:, :35] = neighbours
    blocks[..., :15] = np.resize(neighbours, (len(codes), 3, 15))
    blocks[..., 15] = largest[:, None]
    assert_encodes_as_the_package(np.concatenate([blocks, -blocks]).reshape(-1), amax)


@dtypes
@settings(deadline=None)  # the first example compiles
@given(st.data())
def test_random_blocks(dtype, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    spread = data.draw(st.floats(0, 8))
    with np.errstate(over="ignore"):
        values = finite((rng.standard_normal(1024) * np.exp(spread * rng.standard_normal(1024))).astype(dtype))
    amax = data.draw(st.sampled_from([amax_of(values), 2 * amax_of(values), 0.5 * amax_of(values)]))
    assert_encodes_as_the_package(values, min(amax, 3e38))


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [*((recipe, BF16) for recipe in data_free_recipes()), ("nvfp4_weight_only_four_over_six", np.dtype(np.float32))],
)
def test_every_recipe_of_files_gives_the_bytes_of_the_package(dtype, recipe):
    method = method_of(recipe)
    w = (np.random.default_rng(1).standard_normal((37, 80)) * 0.1).astype(dtype)
    amax = amax_of(w) * 1.5
    wanted = quantize_unchecked(
        jnp.asarray(w), -1, global_amax=amax, divisor=method.scales.divisor, encoder=encoder_for(method)
    )
    packed, scales, global_scale = encoded(SlabQuantizer.of(method), w.reshape(-1), amax)
    np.testing.assert_array_equal(packed, np.asarray(wanted.packed).reshape(-1))
    np.testing.assert_array_equal(scales, np.asarray(wanted.scales).reshape(-1).view(np.uint8))
    assert global_scale == float(wanted.global_scale)


def test_the_recipes_of_files():
    assert data_free_recipes() == (
        "nvfp4_weight_only",
        "nvfp4_weight_only_mse",
        "nvfp4_weight_only_four_over_six",
    )


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ("nvfp4", "quantizes activations, for which the model must be run"),
        ("nvfp4_kv_fp8", "quantizes activations, for which the model must be run"),
        ("nvfp4_weight_only_gptq", "needs calibration data, for which the model must be run"),
        ("nvfp4_weight_only_weighted_mse", "needs calibration data, for which the model must be run"),
        ("nvfp4_weight_only_hadamard", "needs calibration data, for which the model must be run"),
        ("nvfp4_mlp_weight_only", "chooses weights by their place in the model"),
        (Recipe("mine", (Rule(Scheme.W4A16, exclude=("*/q",)),)), "chooses weights by their place in the model"),
    ],
)
def test_other_recipes_are_refused(recipe, problem):
    name = recipe if isinstance(recipe, str) else recipe.name
    wanted = f"^recipe '{name}' {problem}: wanted for files alone one of nvfp4_weight_only, "
    with pytest.raises(ValueError, match=wanted):
        method_of(recipe)


@pytest.mark.parametrize("method", [Method(Mse(), Gptq())])
def test_a_method_that_needs_data_has_no_slab_quantizer(method):
    with pytest.raises(ValueError, match=r"^method mse, gptq: wanted one that needs no calibration data"):
        SlabQuantizer.of(method)


@pytest.mark.parametrize(("value", "found"), [(np.nan, np.nan), (-np.inf, np.inf)])
@dtypes
def test_amax(dtype, value, found):
    assert amax_of(np.array([1, -3, 2], dtype)) == 3
    assert amax_of(np.zeros(0, dtype)) == 0
    np.testing.assert_equal(amax_of(np.array([1, value, 2], dtype)), found)


def exported(directory, out, recipe="nvfp4_weight_only", **options):
    """The same through `export_checkpoint`, every tensor of the plan made with the package's own quantizer."""
    plan, method = plan_files(directory), method_of(recipe)
    values = {name: jnp.asarray(w) for name, w in tensors_in(directory).items()}
    tree, names = {name: values[name] for name in plan.left}, {}
    for name in plan.left:
        names[name] = TensorName(module_of(name), parameter=name.rpartition(".")[2])
    for group in plan.groups:
        amax = max(float(jaxfp4.global_amax(values[t.name])) for t in group)
        for tensor in group:
            weight = quantize_unchecked(
                values[tensor.name], -1, global_amax=amax, divisor=method.scales.divisor, encoder=encoder_for(method)
            )
            tree[tensor.name] = QuantizedWeight(weight)
            names[tensor.name] = TensorName(module_of(tensor.name))
    config = json.loads((directory / "config.json").read_text())
    export_checkpoint(tree, out, names=names, config=config, **options)
    return out


@pytest.mark.parametrize("max_shard_bytes", [None, 3000])
@pytest.mark.parametrize("file_format", ["modelopt", "compressed-tensors"])
def test_the_files_are_those_of_export_checkpoint(tmp_path, monkeypatch, file_format, max_shard_bytes):
    monkeypatch.setattr(file_quantization, "_COPIED_BYTES", 64)
    directory = write_model(tmp_path / "in", random_weights(), shards=3)
    options = {"max_shard_bytes": max_shard_bytes}
    wanted = contents(exported(directory, tmp_path / "wanted", format=file_format, **options))
    found = contents(quantize(directory, tmp_path / "out", file_format=file_format, **options))
    assert sorted(found) == sorted(wanted)
    assert found == wanted
    assert len(wanted) > (10 if max_shard_bytes else 1)


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("nvfp4_weight_only_mse", BF16), ("nvfp4_weight_only_four_over_six", np.dtype(np.float16))]
)
def test_searched_scales_are_those_of_export_checkpoint(tmp_path, recipe, dtype):
    tensors = {name: w for name, w in random_weights(dtype, layers=1).items() if "self_attn" in name}
    directory = write_model(tmp_path / "in", tensors)
    wanted = contents(exported(directory, tmp_path / "wanted", recipe))
    assert contents(quantize(directory, tmp_path / "out", recipe)) == wanted


@needs_golden
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3_moe"])
def test_the_weights_are_those_of_model_optimizer(tmp_path, name):
    found = tensors_in(quantize(GOLDEN / name / "hf", tmp_path / "out"))
    wanted = tensors_in(GOLDEN / name / "modelopt")
    wanted = {k: v for k, v in wanted.items() if not k.endswith(("input_scale", "k_scale", "v_scale"))}
    assert sorted(found) == sorted(wanted)
    for key, values in wanted.items():
        assert (found[key].dtype, found[key].shape) == (values.dtype, values.shape), key
        assert found[key].tobytes() == values.tobytes(), key
    ours = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    theirs = json.loads((GOLDEN / name / "modelopt/hf_quant_config.json").read_text())["quantization"]
    assert ours["exclude_modules"] == theirs["exclude_modules"]
    assert ours["quant_algo"] == "W4A16_NVFP4"


@pytest.mark.parametrize(("slab", "held"), [(64, 0), (64, 10**9), (1 << 20, 2000)])
def test_slabs_and_what_is_held_in_memory_change_nothing(tmp_path, monkeypatch, slab, held):
    directory = write_model(tmp_path / "in", random_weights())
    wanted = contents(quantize(directory, tmp_path / "wanted"))
    monkeypatch.setattr(file_quantization, "_HELD_BYTES", held)
    monkeypatch.setattr(SlabQuantizer, "of", lambda method: SlabQuantizer(MAX.choose_scales, MAX.divisor, slab))
    assert contents(quantize(directory, tmp_path / "out", max_shard_bytes=None)) == wanted


def test_few_shapes_are_compiled(tmp_path, monkeypatch):
    """Weights of any shape go through slabs of two lengths."""
    shapes, encode = [], SlabQuantizer.encode

    def counting(self, values, scaling):
        result = encode(self, values, scaling)
        shapes.append(result[0].shape)
        return result

    monkeypatch.setattr(SlabQuantizer, "encode", counting)
    quantize(write_model(tmp_path / "in", random_weights()), tmp_path / "out")
    assert len(shapes) > 10 and len(set(shapes)) == 1


def test_all_bytes_are_reported_as_progress(tmp_path):
    tensors = random_weights()
    counts = []
    quantize(write_model(tmp_path / "in", tensors), tmp_path / "out", progress=counts.append)
    assert sum(counts) == sum(values.nbytes for values in tensors.values())


def test_siblings_share_their_scale_across_files(tmp_path):
    tensors = random_weights(layers=1)
    directory = write_model(tmp_path / "in", tensors, shards=3)
    source = open_source(directory).tensors
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    assert len({source[f"{name}.weight"].path for name in names}) > 1
    found = tensors_in(quantize(directory, tmp_path / "out"))
    scales = {float(found[f"{name}.weight_scale_2"]) for name in names}
    amax = max(np.abs(tensors[f"{name}.weight"].astype(np.float32)).max() for name in names)
    assert scales == {float(amax / np.float32(2688))}


def test_excluding_one_sibling_leaves_those_that_engines_fuse_with_it(tmp_path):
    directory = write_model(tmp_path / "in", random_weights(layers=1))
    plan = plan_files(directory, ["*.k_proj"])
    assert plan.left["model.layers.0.self_attn.k_proj.weight"] == "excluded by '*.k_proj'"
    for name in ("q_proj", "v_proj"):
        reason = plan.left[f"model.layers.0.self_attn.{name}.weight"]
        assert reason == "fused by engines with model.layers.0.self_attn.k_proj, which is left"
    assert "model.layers.0.self_attn.q_proj" in plan.modules.excluded
    assert "model.layers.0.self_attn.o_proj" in plan.modules.quantized


def test_excluding_one_expert_leaves_all_of_its_layer(tmp_path):
    directory = write_model(tmp_path / "in", random_weights(layers=1))
    plan = plan_files(directory, ["*experts.1.down_proj"])
    for expert, name in itertools.product((0, 1), ("gate_proj", "up_proj", "down_proj")):
        reason = plan.left[f"model.layers.0.mlp.experts.{expert}.{name}.weight"]
        assert reason == "excluded by '*experts.1.down_proj'" or reason.endswith("experts.1.down_proj, which is left")
    assert [tensor.name.split(".")[-2] for tensor in plan.quantized] == ["k_proj", "q_proj", "v_proj", "o_proj"]


def test_a_misfit_sibling_leaves_its_group(tmp_path):
    tensors = random_weights(layers=1)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((48, 48))
    plan = plan_files(write_model(tmp_path / "in", tensors))
    assert plan.left["model.layers.0.self_attn.k_proj.weight"] == "dtype float64"
    assert plan.left["model.layers.0.self_attn.q_proj.weight"].startswith("fused by engines with model.")


def test_routers_and_other_matrices_are_listed_as_excluded_but_nothing_above_quantized_modules(tmp_path):
    tensors = random_weights(layers=1)
    tensors["model.layers.0.table"] = tensors["lm_head.weight"]
    tensors["model.layers.0.mlp.experts_extra.gate_up_proj"] = np.zeros((2, 16, 16), BF16)
    plan = plan_files(write_model(tmp_path / "in", tensors))
    assert plan.modules.excluded == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.experts_extra",
        "model.layers.0.mlp.gate",
    ]
    assert plan.modules.kinds == [Kind.W4A16] and len(plan.modules.quantized) == 10


def add(tensors, name, values):
    return {**tensors, name: values}


SCALE = np.ones(1, np.float32)
QUANTIZED = {
    "fp8 blocks": (lambda t: add(t, "model.layers.0.mlp.down_proj.weight_scale_inv", SCALE), {}, "weight_scale_inv'"),
    "fp8": (
        lambda t: add(t, "model.layers.0.x.weight", np.zeros((16, 16), ml_dtypes.float8_e4m3fn)),
        {},
        "tensor 'model.layers.0.x.weight' is float8_e4m3fn",
    ),
    "nvfp4": (lambda t: add(t, "m.weight", np.zeros((16, 8), np.uint8)), {}, "tensor 'm.weight' is uint8"),
    "packed": (lambda t: add(t, "m.weight_packed", np.zeros((16, 8), np.uint8)), {}, "tensor 'm.weight_packed'"),
    "gptq": (lambda t: add(t, "m.qweight", np.zeros((2, 16), np.int32)), {}, "there is tensor 'm.qweight'"),
    "mxfp4": (lambda t: add(t, "m.gate_up_proj_blocks", np.zeros((2, 16), np.uint8)), {}, "'m.gate_up_proj_blocks'"),
    "config": (lambda t: t, {"quantization_config": {"quant_method": "fp8"}}, "config.json has quantization_config"),
    "nested": (lambda t: t, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quant_method 'awq'"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_checkpoint_is_refused_with_what_was_found(tmp_path, case):
    change, config, found = QUANTIZED[case]
    directory = write_model(tmp_path / "in", change(random_weights(layers=1)), {**CONFIG, **config})
    wanted = rf"in: it is quantized already \(.*{re.escape(found)}.*\): wanted weights in float32"
    with pytest.raises(ValueError, match=wanted):
        plan_files(directory)


def test_an_export_of_ours_is_refused(tmp_path):
    out = quantize(write_model(tmp_path / "in", random_weights(layers=1)), tmp_path / "out")
    with pytest.raises(ValueError, match="it is quantized already"):
        plan_files(out)
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"quantized already \(there is hf_quant_config.json\)"):
        plan_files(out)


def test_nothing_to_quantize(tmp_path):
    directory = write_model(tmp_path / "in", {"model.norm.weight": np.zeros(16, BF16)})
    with pytest.raises(ValueError, match=r"in: none of 1 tensors is to be quantized: wanted a 2-D floating point"):
        plan_files(directory)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value, word):
    tensors = random_weights(layers=1)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name][-1, -1] = value
    directory = write_model(tmp_path / "in", tensors)
    wanted = rf"model.safetensors: tensor '{name}' holds {word}: wanted finite weights; repair or exclude it"
    with pytest.raises(ValueError, match=wanted):
        quantize(directory, tmp_path / "out", max_shard_bytes=2000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_what_is_left_may_hold_anything_and_keeps_its_bytes(tmp_path):
    tensors = random_weights(layers=1)
    tensors["model.embed_tokens.weight"][0, 0] = np.nan
    tensors["empty"] = np.zeros((0, 3), np.float32)
    tensors["scalar"] = np.array(7, np.int64)
    tensors["model.layers.0.mlp.none.weight"] = np.zeros((0, 16), BF16)
    found = tensors_in(quantize(write_model(tmp_path / "in", tensors), tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "empty", "scalar", "model.layers.0.mlp.none.weight", "lm_head.weight"):
        assert (found[name].dtype, found[name].shape) == (tensors[name].dtype, tensors[name].shape)
        assert found[name].tobytes() == tensors[name].tobytes()


def test_a_zero_weight_has_global_scale_one(tmp_path):
    tensors = {"model.layers.0.mlp.down_proj.weight": np.zeros((16, 32), BF16)}
    found = tensors_in(quantize(write_model(tmp_path / "in", tensors), tmp_path / "out"))
    assert found["model.layers.0.mlp.down_proj.weight_scale_2"] == 1
    assert not found["model.layers.0.mlp.down_proj.weight"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "gguf"}, "format='gguf': wanted one of 'modelopt', 'compressed-tensors'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0: wanted a positive number of bytes, or None for one file"),
        ({"recipe": "none"}, "recipe='none': wanted a Recipe or one of nvfp4"),
    ],
)
def test_bad_options(tmp_path, options, message):
    directory = write_model(tmp_path / "in", random_weights(layers=1))
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        quantize(directory, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_other_files_are_carried_along(tmp_path):
    directory = write_model(tmp_path / "snapshots/abc", random_weights(layers=1))
    carried = ["tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja", "merges.txt"]
    carried += ["README.md", "modeling_mine.py", "1_Pooling/config.json"]
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "optimizer.pt", "data.pkl"]
    left += [".gitattributes", "original/params.json", "original/consolidated.00.pth", "deep/a/b.json", ".git/config"]
    left += ["other.safetensors"]
    for name in (*carried, *left):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    blob = tmp_path / "blobs/123"
    blob.parent.mkdir()
    blob.write_text("vocabulary")
    (directory / "vocab.json").symlink_to("../../blobs/123")
    (tmp_path / "secret").write_text("secret")
    (directory / "notes.txt").symlink_to(tmp_path / "secret")
    (directory / "linked").symlink_to(tmp_path)
    found = contents(quantize(directory, tmp_path / "out"))
    written = ["config.json", "hf_quant_config.json", "model.safetensors"]
    assert sorted(found) == sorted([*carried, "vocab.json", *written])
    assert found["vocab.json"] == b"vocabulary" and found["1_Pooling/config.json"] == b"1_Pooling/config.json"


def test_any_names_of_files_will_do(tmp_path):
    tensors = random_weights(layers=1)
    names = sorted(tensors)
    single = tmp_path / "single"
    single.mkdir()
    save_file(tensors, single / "diffusion_pytorch_model.safetensors")
    found = contents(quantize(single, tmp_path / "out"))
    assert sorted(found) == ["config.json", "diffusion_pytorch_model.safetensors", "hf_quant_config.json"]
    several = tmp_path / "several"
    several.mkdir()
    save_file({n: tensors[n] for n in names[::2]}, several / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, several / "b.safetensors")
    again = contents(quantize(several, tmp_path / "again"))
    assert again["model.safetensors"] == found["diffusion_pytorch_model.safetensors"]
    save_file({"x": tensors[names[0]], names[1]: tensors[names[1]]}, several / "c.safetensors")
    with pytest.raises(ValueError, match=rf"c.safetensors: tensor '{re.escape(names[1])}' is in b.safetensors as well"):
        open_source(several)


def index_of(directory, weight_map, name="model.safetensors.index.json"):
    (directory / name).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_disagrees(tmp_path):
    save_file({"a": SCALE, "b": SCALE}, tmp_path / "one.safetensors")
    save_file({"c": SCALE}, tmp_path / "two.safetensors")
    good = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    index_of(tmp_path, good)
    assert sorted(open_source(tmp_path).tensors) == ["a", "b", "c"]
    for bad, message in [
        ({**good, "d": "one.safetensors"}, "tensor 'd' is said to be in one.safetensors, which does not have it"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "tensor 'b' is in one.safetensors, but the index does not"),
        ({**good, "b": "two.safetensors"}, "tensor 'b' is said to be in two.safetensors, but it is in one.safetensors"),
    ]:
        index_of(tmp_path, bad)
        with pytest.raises(ValueError, match=re.escape(f"model.safetensors.index.json: {message}")):
            open_source(tmp_path)
    index_of(tmp_path, {**good, "d": "three.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"three.safetensors: there is no such file"):
        open_source(tmp_path)


def test_two_indices_of_other_names(tmp_path):
    for name in ("a", "b"):
        index_of(tmp_path, {}, f"{name}.safetensors.index.json")
    with pytest.raises(ValueError, match=r"a.safetensors.index.json and b.safetensors.index.json: wanted one index"):
        open_source(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent: there is no such directory; wanted a checkpoint folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"there is no model.safetensors and no other \*.safetensors"):
        open_source(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    directory = write_model(tmp_path / "in", random_weights(layers=1))
    plan = plan_files(directory)
    os.truncate(directory / "model.safetensors", 4000)
    with pytest.raises(OSError, match=r"tensor '.*' ends \d+ bytes early: wanted \d+; the file was changed"):
        quantize_planned(plan, tmp_path / "out", recipe="nvfp4_weight_only", file_format="modelopt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_file_that_cannot_be_read(tmp_path):
    source = open_source(write_model(tmp_path / "in", random_weights(layers=1)))
    (tmp_path / "in/model.safetensors").unlink()
    with Reader() as reader, pytest.raises(OSError, match=r"tensor 'lm_head.weight' cannot be read: No such file"):
        reader.values(source.tensors["lm_head.weight"], 0, 1)


MEMORY = """
import pathlib, resource, sys
import jax
from jaxfp4.checkpoints.configs import Kind
from jaxfp4.checkpoints.streaming.file_plan import plan_files
from jaxfp4.checkpoints.streaming.file_quantization import quantize_planned
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_planned(plan_files(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), recipe="nvfp4_weight_only",
                 file_format="modelopt")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Two matrices of 300 MB, one of them quantized, in a file that is one hole; a process of its own measures."""
    shape, nbytes = [150_000, 1024], 150_000 * 1024 * 2
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i, name in enumerate(["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"])
    }
    text = json.dumps(header).encode()
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * nbytes)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "in"), str(tmp_path / "out")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(printed) * 1024 < 200e6
    for path in (tmp_path / "out").iterdir():
        path.unlink()


def read_all(directory):
    """What streaming does with a source: every tensor read, every float's amax taken."""
    source = open_source(directory)
    with Reader() as reader:
        for tensor in source.tensors.values():
            values = reader.values(tensor, 0, tensor.size)
            if tensor.dtype in FLOATS:
                amax_of(values)


JSON = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.sampled_from([0.5, "", "F32", [], {}, [[]]])
SIZES = st.lists(st.integers(0, 8) | st.sampled_from([2**31, 2**63, 2**64]), max_size=3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "U8", "F8_E4M3", "I64", "F4"]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": st.lists(st.integers(0, 80), min_size=2, max_size=2) | JSON,
    }
)
NAMES = st.sampled_from(["a.weight", "b.weight", "__metadata__", ""])
HEADER = st.dictionaries(NAMES, ENTRY | JSON, max_size=3).map(lambda header: json.dumps(header).encode())


@settings(deadline=None)  # files
@given(st.binary(max_size=200) | HEADER, st.binary(max_size=80), st.sampled_from([0, 0, 0, -9, 9, 2**62]))
def test_fuzzed_headers_are_read_or_refused(tmp_path_factory, header, data, error):
    directory = tmp_path_factory.mktemp("fuzz")
    length = max(0, len(header) + error)
    (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    try:
        read_all(directory)
    except ValueError as refused:
        assert "\n" not in str(refused) and "model.safetensors" in str(refused)


@settings(deadline=None)  # files
@given(st.data())
def test_any_cut_of_a_good_file_is_refused(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("cut")
    save_file({"a.weight": np.ones((4, 16), BF16), "b": SCALE}, directory / "model.safetensors")
    whole = (directory / "model.safetensors").read_bytes()
    read_all(directory)
    (directory / "model.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_all(directory)
