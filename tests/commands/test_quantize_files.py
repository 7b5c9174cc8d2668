"""What quantizing and converting files prints, and that errors are the package's own kinds."""

import io
import json
import re

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from jaxfp4.checkpoints import open_checkpoint
from jaxfp4.checkpoints.streaming.shard_files import NewFile
from jaxfp4.commands.convert import convert_directory
from jaxfp4.commands.quantize_files import quantize_files

BF16 = ml_dtypes.bfloat16


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"model.layers.0.{name}.weight": rng.standard_normal((32, 64)).astype(BF16)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.gate")
    }
    for name in ("gate_up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.experts.{name}"] = np.ones((2, 32, 64), BF16)
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path / "in"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def printed(console):
    return console.file.getvalue()


def test_the_table_says_what_is_quantized_and_why_the_rest_is_not(model, console, tmp_path):
    quantize_files(model, tmp_path / "out", console=console)
    text = printed(console)
    assert "3 of 6 tensors are quantized" in text and "left: router" in text
    assert "stack of experts: its names do not tell which axis is contracted" in text
    for name in ("gate_up_proj", "down_proj"):
        assert f"model.layers.1.mlp.experts.{name}" in text
    assert re.search(r"3 weights quantized, [\d.]+ kB to [\d.]+ kB; [\d.]+ kB in", text)
    assert f"written to {tmp_path / 'out'}" in text
    assert open_checkpoint(tmp_path / "out").info("model.layers.0.mlp.down_proj.weight") == (np.uint8, (32, 32))


def test_exclude_and_format(model, console, tmp_path):
    quantize_files(model, tmp_path / "out", file_format="compressed-tensors", exclude=["*.mlp.*"], console=console)
    assert "left: excluded by '*.mlp.*'" in printed(console)
    names = open_checkpoint(tmp_path / "out").names()
    assert "model.layers.0.self_attn.k_proj.weight_packed" in names and "model.layers.0.mlp.down_proj.weight" in names
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in config["ignore"] and "model.layers.0.mlp.gate" in config["ignore"]


def test_a_recipe_that_needs_data_is_refused_before_anything_is_opened(console, tmp_path):
    with pytest.raises(ValueError, match=r"recipe 'nvfp4_weight_only_gptq' needs calibration data, for which"):
        quantize_files(tmp_path / "absent", tmp_path / "out", recipe="nvfp4_weight_only_gptq", console=console)


def test_an_interruption_says_where_to_go_on(model, console, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(NewFile, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_files(model, tmp_path / "out", console=console)
    assert f"what is finished is in {tmp_path / '.out.partial'}: the same command goes on there" in printed(console)
    monkeypatch.undo()
    quantize_files(model, tmp_path / "out", console=console)
    assert ".out.partial: going on behind 0 finished files" in printed(console)
    with pytest.raises(FileExistsError, match="out exists already"):
        quantize_files(model, tmp_path / "out", console=console)


def test_convert(model, console, tmp_path, monkeypatch):
    quantize_files(model, tmp_path / "modelopt", console=console)
    convert_directory(tmp_path / "modelopt", tmp_path / "ct", file_format="compressed-tensors", console=console)
    assert "converted to compressed-tensors in" in printed(console)
    assert "model.layers.0.mlp.down_proj.weight_packed" in open_checkpoint(tmp_path / "ct").names()
    monkeypatch.setattr(NewFile, "write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_directory(tmp_path / "ct", tmp_path / "back", file_format="modelopt", console=console)
    assert f"what is finished is in {tmp_path / '.back.partial'}" in printed(console)
