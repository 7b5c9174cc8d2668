"""Quantized checkpoints in bfloat16 again: exactly the dequantized weights, everything else as it was."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_models import GOLDEN, needs_golden, tensors_of
from safetensors.numpy import save_file
from small_checkpoints import BF16, CONFIG, contents, random_weights, write_model

import jaxfp4
from jaxfp4.checkpoints import TensorName, export_checkpoint, load_checkpoint, open_checkpoint
from jaxfp4.checkpoints.decoding import decoded_blocks
from jaxfp4.checkpoints.streaming.dequantize_files import dequantize_files
from jaxfp4.checkpoints.streaming.file_plan import plan_files
from jaxfp4.checkpoints.streaming.file_quantization import quantize_planned
from jaxfp4.cli import main
from jaxfp4.formats import E4M3
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.cache import CacheAmax, CacheFormat
from jaxfp4.tensors.fp8_tensor import quantize_fp8

FORMATS = ("modelopt", "compressed-tensors")


def tensors_in(directory):
    checkpoint = open_checkpoint(directory)
    return {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}


def export(directory, file_format, **options):
    """NVFP4 with and without an input scale, FP8, scales of a key-value cache, and a tensor that stays."""
    rng = np.random.default_rng(3)

    def weight():
        return jnp.asarray((rng.standard_normal((32, 48)) * rng.uniform(0.1, 3)).astype(np.float32))

    tree = {
        "k_proj": QuantizedWeight(
            jaxfp4.quantize(weight(), axis=-1),
            jnp.float32(0.01),
            cache=CacheAmax(jnp.float32(3), None, CacheFormat.FP8),
        ),
        "o_proj": QuantizedWeight(jaxfp4.quantize(weight(), axis=-1)),
        "up_proj": QuantizedWeight(quantize_fp8(weight(), axis=-1), jnp.float32(0.013)),
        "gate": jnp.asarray(rng.standard_normal((4, 48)), jnp.bfloat16),
    }
    names = {name: TensorName(f"model.layers.0.self_attn.{name}") for name in tree}
    export_checkpoint(tree, directory, format=file_format, names=names, config=CONFIG, **options)
    return {f"model.layers.0.self_attn.{name}.weight": leaf for name, leaf in tree.items()}


@pytest.mark.parametrize("file_format", FORMATS)
def test_it_holds_the_dequantized_weights_and_nothing_of_quantization(tmp_path, file_format):
    tree = export(tmp_path / "in", file_format)
    (tmp_path / "in/tokenizer.json").write_text("{}")
    dequantize_files(tmp_path / "in", tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    assert sorted(found) == sorted(tree)
    for name, leaf in tree.items():
        values = leaf.weight.dequantize(jnp.bfloat16) if isinstance(leaf, QuantizedWeight) else leaf
        assert found[name].dtype == BF16
        np.testing.assert_array_equal(found[name], np.asarray(values), err_msg=name)
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@needs_golden
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3_moe"])
def test_golden_checkpoints(tmp_path, name):
    """Of another writer: what `load_checkpoint` dequantizes; the result is a source to quantize again."""
    golden = GOLDEN / name / "modelopt"
    dequantize_files(golden, tmp_path / "out")
    found, quantized = tensors_in(tmp_path / "out"), jaxfp4.weights(load_checkpoint(golden))
    for path, leaf in quantized.items():
        wanted = np.asarray(leaf.weight.dequantize(jnp.bfloat16))
        np.testing.assert_array_equal(found.pop(path.replace("/", ".")), wanted, err_msg=path)
    original = tensors_of(golden)
    assert all(found[key].tobytes() == original[key].tobytes() for key in found)
    assert plan_files(tmp_path / "out").quantized


def test_shards_and_the_command_line(tmp_path):
    quantize_planned(
        plan_files(write_model(tmp_path / "in", random_weights())),
        tmp_path / "one",
        recipe="nvfp4_weight_only",
        file_format="modelopt",
    )
    assert main(["convert", str(tmp_path / "one"), str(tmp_path / "dense"), "--format", "bfloat16"]) == 0
    dequantize_files(tmp_path / "one", tmp_path / "shards", max_shard_bytes=9000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    dense, shards = tensors_in(tmp_path / "dense"), tensors_in(tmp_path / "shards")
    assert dense.keys() == shards.keys() == random_weights().keys()
    assert all(dense[name].tobytes() == values.tobytes() for name, values in shards.items())


def test_every_code_and_scale():
    """All 256 bytes of codes under all 256 of scales, against the tables of the formats in float64."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(32, 1, 8), (32, 256, 8))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8), (32, 256)).view(ml_dtypes.float8_e4m3fn)
    found = decoded_blocks(codes, scales, np.float32(0.37)).reshape(32, 256, 16)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(32, 256, 16)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7] * np.where(nibbles & 8, -1, 1)
    scaled = (E4M3.values.astype(np.float64)[np.arange(256)] * np.float64(np.float32(0.37))).astype(np.float32)
    np.testing.assert_array_equal(found, (scaled[None, :, None].astype(np.float64) * magnitudes).astype(np.float32))


def change(directory, changes):
    save_file(tensors_in(directory) | changes, directory / "model.safetensors")


def test_what_cannot_be_dequantized_is_refused(tmp_path):
    export(tmp_path / "in", "modelopt")
    name = "model.layers.0.self_attn.o_proj.pre_quant_scale"
    change(tmp_path / "in", {name: np.ones(48, BF16)})
    with pytest.raises(ValueError, match=rf"in: tensor '{re.escape(name)}': wanted none, as bfloat16 has no place"):
        dequantize_files(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_other_quantization_beside_it_is_refused(tmp_path):
    export(tmp_path / "in", "modelopt")
    change(tmp_path / "in", {"model.layers.0.x.weight": np.zeros((2, 2), ml_dtypes.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"in: not all of it is NVFP4 \(tensor 'model.layers.0.x.weight' is float8_e4"):
        dequantize_files(tmp_path / "in", tmp_path / "out")


def test_an_unquantized_checkpoint_and_an_existing_target_are_refused(tmp_path, capsys):
    write_model(tmp_path / "plain", random_weights(layers=1))
    with pytest.raises(ValueError, match=r"plain: no quantization in config.json or among the tensors: wanted an NVF"):
        dequantize_files(tmp_path / "plain", tmp_path / "out")
    export(tmp_path / "in", "modelopt")
    before = contents(tmp_path)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "plain"), "--format", "bfloat16"]) == 2
    assert "plain exists already: wanted a directory to create" in capsys.readouterr().err
    assert contents(tmp_path) == before
