"""Conversion between the formats: the same bytes under other names, and there and back the same files."""

import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_models import GOLDEN, needs_golden
from safetensors.numpy import save_file
from small_checkpoints import BF16, CONFIG, contents, random_weights, write_model

import jaxfp4
from jaxfp4.checkpoints import TensorName, export_checkpoint, load_checkpoint, open_checkpoint
from jaxfp4.checkpoints.streaming.convert import EXACT_SCALES, convert
from jaxfp4.checkpoints.streaming.file_plan import plan_files
from jaxfp4.checkpoints.streaming.file_quantization import quantize_planned
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.cache import CacheAmax, CacheFormat
from jaxfp4.tensors.fp8_tensor import quantize_fp8

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
OTHER = {MODELOPT: COMPRESSED, COMPRESSED: MODELOPT}


def tensors_in(directory):
    checkpoint = open_checkpoint(directory)
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}


def without_producer(files):
    """The files' contents, config files parsed and without the name of the program that wrote them."""

    def cleaned(value):
        return {k: cleaned(v) for k, v in value.items() if k != "producer"} if isinstance(value, dict) else value

    return {name: cleaned(json.loads(data)) if name.endswith(".json") else data for name, data in files.items()}


@needs_golden
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3_moe"])
def test_golden_checkpoints_there_and_back_are_the_same_files(tmp_path, name):
    golden = GOLDEN / name / "modelopt"
    convert(golden, tmp_path / "ct", file_format=COMPRESSED)
    convert(tmp_path / "ct", tmp_path / "back", file_format=MODELOPT)
    assert without_producer(contents(tmp_path / "back")) == without_producer(contents(golden))
    convert(tmp_path / "back", tmp_path / "ct_again", file_format=COMPRESSED)
    assert contents(tmp_path / "ct_again") == contents(tmp_path / "ct")


@needs_golden
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3_moe"])
def test_golden_checkpoints_hold_the_same_codes_and_reciprocal_scales(tmp_path, name):
    golden = tensors_in(GOLDEN / name / "modelopt")
    convert(GOLDEN / name / "modelopt", tmp_path / "ct", file_format=COMPRESSED)
    found = tensors_in(tmp_path / "ct")
    wanted = {}
    for key, values in golden.items():
        module, _, last = key.rpartition(".")
        if last in ("weight_scale_2", "input_scale"):
            new = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[last]
            wanted[f"{module}.{new}"] = (np.float32(1) / values).reshape(1)
        elif last in ("k_scale", "v_scale"):
            wanted[f"{module.rpartition('.')[0]}.{last}"] = values.reshape(1)
        elif values.dtype == np.uint8:
            wanted[f"{module}.weight_packed"] = values
        else:
            wanted[key] = values
    assert sorted(found) == sorted(wanted)
    for key, values in wanted.items():
        assert (found[key].dtype, found[key].shape) == (values.dtype, values.shape), key
        assert found[key].tobytes() == values.tobytes(), key
    config = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == COMPRESSED
    assert (config["kv_cache_scheme"] or {}).get("num_bits") == (8 if name == "tiny_llama" else None)
    assert not (tmp_path / "ct/hf_quant_config.json").exists()


def small_tree(kind, cache=None):
    """A tree to export, and its names: W4A4, weight-only or both with FP8, perhaps with a key-value cache."""
    rng = np.random.default_rng(3)
    tree, names = {}, {}
    for i, module in enumerate(("k_proj", "v_proj", "o_proj", "down_proj")):
        w = jnp.asarray((rng.standard_normal((32, 48)) * rng.uniform(0.1, 3)).astype(np.float32))
        inputs = jnp.float32(rng.uniform(1e-4, 1e-2)) if kind == "w4a4" or (kind == "mixed" and i % 2) else None
        amax = None
        if cache and module in ("k_proj", "v_proj"):
            one = jnp.float32(rng.uniform(1, 9))
            amax = CacheAmax(one, None, cache) if module == "k_proj" else CacheAmax(None, one, cache)
        tree[module] = QuantizedWeight(jaxfp4.quantize(w, axis=-1), inputs, cache=amax)
        if kind == "mixed" and i == 3:
            tree[module] = QuantizedWeight(quantize_fp8(w, axis=-1), jnp.float32(0.013))
        names[module] = TensorName(f"model.layers.0.self_attn.{module}")
    tree["gate"] = jnp.asarray(rng.standard_normal((4, 48)), jnp.bfloat16)
    names["gate"] = TensorName("model.layers.0.mlp.gate")
    return tree, names


@pytest.mark.parametrize("file_format", [MODELOPT, COMPRESSED])
@pytest.mark.parametrize(
    ("kind", "cache"), [("w4a4", None), ("weight_only", None), ("mixed", None), ("w4a4", CacheFormat.FP8)]
)
def test_exports_of_ours_there_and_back_are_the_same_files(tmp_path, kind, cache, file_format):
    tree, names = small_tree(kind, cache)
    export_checkpoint(tree, tmp_path / "one", format=file_format, names=names, config=CONFIG, max_shard_bytes=2000)
    export_checkpoint(tree, tmp_path / "other", format=OTHER[file_format], names=names, config=CONFIG)
    (tmp_path / "one/tokenizer.json").write_text("{}")
    convert(tmp_path / "one", tmp_path / "converted", file_format=OTHER[file_format])
    found, wanted = contents(tmp_path / "converted"), contents(tmp_path / "other")
    assert found.pop("tokenizer.json") == b"{}"
    if file_format == MODELOPT:
        for name, values in tensors_in(tmp_path / "other").items():
            assert tensors_in(tmp_path / "converted")[name].tobytes() == values.tobytes(), name
        found.pop("model.safetensors"), wanted.pop("model.safetensors")
    if file_format == COMPRESSED:  # of two float32 with one reciprocal another may come back
        found.pop("model.safetensors"), wanted.pop("model.safetensors")
    assert found == wanted
    convert(tmp_path / "converted", tmp_path / "back", file_format=file_format, max_shard_bytes=2000)
    assert contents(tmp_path / "back") == contents(tmp_path / "one")


@pytest.mark.parametrize("recipe", ["nvfp4_weight_only", "nvfp4_weight_only_four_over_six"])
def test_quantized_files_there_and_back_are_the_same_files(tmp_path, recipe):
    plan = plan_files(write_model(tmp_path / "in", random_weights()))
    for file_format in (MODELOPT, COMPRESSED):
        quantize_planned(plan, tmp_path / file_format, recipe=recipe, file_format=file_format)
    convert(tmp_path / MODELOPT, tmp_path / "ct", file_format=COMPRESSED)
    convert(tmp_path / "ct", tmp_path / "back", file_format=MODELOPT)
    assert contents(tmp_path / "back") == contents(tmp_path / MODELOPT)
    ours, wanted = tensors_in(tmp_path / "ct"), tensors_in(tmp_path / COMPRESSED)
    assert sorted(ours) == sorted(wanted)
    assert all(ours[name].tobytes() == values.tobytes() for name, values in wanted.items())
    if recipe == "nvfp4_weight_only":  # a bfloat16 amax over 2688 is found again: nothing is to be remembered
        assert contents(tmp_path / "ct") == contents(tmp_path / COMPRESSED)


def test_any_divisor_of_another_writer_comes_back(tmp_path):
    """Many reciprocals that no float32 has, and many that two have."""
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(200):
        module = f"model.layers.{i}.mlp.down_proj"
        tensors[f"{module}.weight_packed"] = rng.integers(0, 256, (2, 8), np.uint8)
        tensors[f"{module}.weight_scale"] = np.ones((2, 1), ml_dtypes.float8_e4m3fn)
        tensors[f"{module}.weight_global_scale"] = rng.uniform(1, 3000, 1).astype(np.float32)
    config = {"quantization_config": {"quant_method": COMPRESSED}}
    write_model(tmp_path / "in", tensors, config)
    convert(tmp_path / "in", tmp_path / "modelopt", file_format=MODELOPT)
    assert any(
        EXACT_SCALES in text for text in [(tmp_path / "modelopt/model.safetensors").read_bytes().decode("latin1")]
    )
    convert(tmp_path / "modelopt", tmp_path / "back", file_format=COMPRESSED)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


@pytest.mark.parametrize("text", ["{", "[]", '{"model.layers.0.mlp.down_proj.weight_scale_2": 3}', None])
def test_remembered_scales_that_do_not_fit_are_not_used(tmp_path, text):
    module = "model.layers.0.mlp.down_proj"
    tensors = {
        f"{module}.weight": np.zeros((2, 8), np.uint8),
        f"{module}.weight_scale": np.ones((2, 1), ml_dtypes.float8_e4m3fn),
        f"{module}.weight_scale_2": np.array(0.25, np.float32),
    }
    wrong = json.dumps({f"{module}.weight_scale_2": np.float32(9).tobytes()[::-1].hex()}) if text is None else text
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={EXACT_SCALES: wrong})
    convert(tmp_path / "in", tmp_path / "out", file_format=COMPRESSED)
    assert tensors_in(tmp_path / "out")[f"{module}.weight_global_scale"] == 4


def test_the_loaded_trees_are_equal(tmp_path):
    tree, names = small_tree("mixed")
    export_checkpoint(tree, tmp_path / "one", names=names, config=CONFIG)
    convert(tmp_path / "one", tmp_path / "two", file_format=COMPRESSED)
    assert jaxfp4.digest(load_checkpoint(tmp_path / "one")) == jaxfp4.digest(load_checkpoint(tmp_path / "two"))


def test_cache_scales_without_a_projection_of_their_own_keep_their_names(tmp_path):
    module = "model.layers.0.self_attn.qkv_proj"
    tensors = {
        f"{module}.weight": np.zeros((2, 8), np.uint8),
        f"{module}.weight_scale": np.ones((2, 1), ml_dtypes.float8_e4m3fn),
        f"{module}.weight_scale_2": np.array(0.25, np.float32),
        f"{module}.k_scale": np.array(0.5, np.float32),
    }
    write_model(tmp_path / "in", tensors)
    convert(tmp_path / "in", tmp_path / "out", file_format=COMPRESSED)
    assert tensors_in(tmp_path / "out")[f"{module}.k_scale"].tolist() == [0.5]
    convert(tmp_path / "out", tmp_path / "back", file_format=MODELOPT)
    assert tensors_in(tmp_path / "back")[f"{module}.k_scale"].tolist() == 0.5


@pytest.fixture
def exported(tmp_path):
    tree, names = small_tree("w4a4")
    export_checkpoint(tree, tmp_path / "one", names=names, config=CONFIG)
    return tmp_path / "one"


def change(directory, changes):
    tensors = tensors_in(directory) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")


def test_a_pre_quant_scale_is_refused(tmp_path, exported):
    name = "model.layers.0.self_attn.o_proj.pre_quant_scale"
    change(exported, {name: np.ones(48, BF16)})
    with pytest.raises(
        ValueError, match=rf"one: tensor '{re.escape(name)}': wanted none, as compressed-tensors has no pl"
    ):
        convert(exported, tmp_path / "out", file_format=COMPRESSED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


def test_an_nvfp4_cache_is_refused(tmp_path):
    tree, names = small_tree("w4a4", CacheFormat.NVFP4)
    export_checkpoint(tree, tmp_path / "one", names=names, config=CONFIG)
    with pytest.raises(
        ValueError, match=r"one: its key-value cache is NVFP4, which compressed-tensors cannot state: want"
    ):
        convert(tmp_path / "one", tmp_path / "out", file_format=COMPRESSED)


def test_other_quantization_beside_it_is_refused(tmp_path, exported):
    change(exported, {"model.layers.0.x.weight": np.zeros((2, 2), ml_dtypes.float8_e4m3fn)})
    with pytest.raises(
        ValueError, match=r"one: not all of it is NVFP4 \(tensor 'model.layers.0.x.weight' is float8_e4m3"
    ):
        convert(exported, tmp_path / "out", file_format=COMPRESSED)


def test_parts_of_other_methods_are_refused(tmp_path, exported):
    name = "model.layers.0.self_attn.o_proj.svdquant_lora_a"
    change(exported, {name: np.ones((4, 48), BF16)})
    with pytest.raises(ValueError, match=rf"one: tensor '{re.escape(name)}' beside an NVFP4 weight: wanted none"):
        convert(exported, tmp_path / "out", file_format=COMPRESSED)


def test_the_same_format_is_refused(tmp_path, exported):
    with pytest.raises(
        ValueError, match=r"one: its format is modelopt already: wanted compressed-tensors; nothing is to"
    ):
        convert(exported, tmp_path / "out", file_format=MODELOPT)


def test_an_unknown_format_is_refused(tmp_path, exported):
    with pytest.raises(ValueError, match=r"^format='gguf': wanted one of 'modelopt', 'compressed-tensors'$"):
        convert(exported, tmp_path / "out", file_format="gguf")


def test_an_unquantized_checkpoint_is_refused(tmp_path):
    write_model(tmp_path / "in", random_weights(layers=1))
    with pytest.raises(ValueError, match=r"in: no quantization in config.json or among the tensors: wanted an NVFP4"):
        convert(tmp_path / "in", tmp_path / "out", file_format=COMPRESSED)


def test_a_missing_part_is_refused(tmp_path, exported):
    change(exported, {"model.layers.0.self_attn.o_proj.weight_scale": None})
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.o_proj.weight_scale' is missing beside"):
        convert(exported, tmp_path / "out", file_format=COMPRESSED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


def test_an_existing_target_is_left_alone(tmp_path, exported):
    shutil.copytree(exported, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"out exists already: wanted a directory to create"):
        convert(exported, tmp_path / "out", file_format=COMPRESSED)
    assert contents(tmp_path) == before
