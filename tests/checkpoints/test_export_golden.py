"""Exports of the golden models equal Model-Optimizer's, byte for byte."""

import jax
import numpy as np
import pytest
from golden_models import GoldenModel, assert_same_tensors, mesh, needs_golden, read_json, tensors_of
from jax.sharding import NamedSharding, PartitionSpec

from jaxfp4.checkpoints import export_checkpoint, load_checkpoint

pytestmark = needs_golden

MODELS = ["tiny_llama", "tiny_qwen3_moe"]


def without_producer(value):
    """A JSON value with every producer and key-value cache entry removed."""
    if isinstance(value, dict):
        dropped = ("producer", "kv_cache_scheme", "kv_cache_quant_algo")
        return {key: without_producer(v) for key, v in value.items() if key not in dropped}
    return value


@pytest.mark.parametrize("name", MODELS)
def test_modelopt_files_equal_the_golden_ones(tmp_path, name):
    model = GoldenModel(name)
    export_checkpoint(model.tree, tmp_path / "out", names=model.names, config=model.config)
    golden = model.directory / "modelopt"
    assert_same_tensors(tmp_path / "out", golden)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (golden / "model.safetensors").read_bytes()
    for file_name in ("config.json", "hf_quant_config.json"):
        found, wanted = read_json(tmp_path / "out" / file_name), read_json(golden / file_name)
        assert without_producer(found) == without_producer(wanted)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in golden.iterdir())
    if name == "tiny_qwen3_moe":
        text = (tmp_path / "out/hf_quant_config.json").read_text()
        assert (
            text.replace('"jaxfp4"', '"modelopt"').replace('"0.1.0"', '"0.47.0"')
            == (golden / "hf_quant_config.json").read_text()
        )


@pytest.mark.parametrize("name", MODELS)
def test_layers_stacked_for_a_scan(tmp_path, name):
    model = GoldenModel(name, stack_layers=True)
    export_checkpoint(model.tree, tmp_path / "out", names=model.names)
    assert_same_tensors(tmp_path / "out", model.directory / "modelopt")


@pytest.mark.parametrize("stack_layers", [False, True])
def test_weights_sharded_over_tp_and_ep(tmp_path, stack_layers):
    devices = mesh(tp=4, ep=2)

    def place(w, module):
        experts = ("ep",) if "{expert}" in module else ()
        layers = (None,) if "{layer}" in module else ()
        split = ("tp", None) if "down_proj" in module or "o_proj" in module else (None, "tp")
        return jax.device_put(w, NamedSharding(devices, PartitionSpec(*layers, *experts, *split)))

    model = GoldenModel("tiny_qwen3_moe", stack_layers=stack_layers, place=place)
    export_checkpoint(model.tree, tmp_path / "out", names=model.names)
    assert_same_tensors(tmp_path / "out", model.directory / "modelopt")


@pytest.mark.parametrize("name", MODELS)
def test_compressed_tensors_holds_the_same_codes_and_reciprocal_scales(tmp_path, name):
    model = GoldenModel(name)
    export_checkpoint(model.tree, tmp_path / "out", names=model.names, format="compressed-tensors", config=model.config)
    found = tensors_of(tmp_path / "out")
    wanted = {}
    for key, values in model.wanted.items():
        module, _, last = key.rpartition(".")
        if last == "weight" and values.dtype == np.uint8:
            wanted[f"{module}.weight_packed"] = values
        elif last in ("weight_scale_2", "input_scale"):
            new = "weight_global_scale" if last == "weight_scale_2" else "input_global_scale"
            wanted[f"{module}.{new}"] = (np.float32(1) / values).reshape(1)
        else:
            wanted[key] = values
    assert sorted(found) == sorted(wanted)
    for key, values in wanted.items():
        assert (found[key].dtype, found[key].shape) == (values.dtype, values.shape)
        assert found[key].tobytes() == values.tobytes(), key
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_golden_export_survives_loading_in_both_formats(tmp_path, name):
    golden = GoldenModel(name).directory / "modelopt"
    config = read_json(golden / "config.json")
    tree = load_checkpoint(golden)
    export_checkpoint(tree, tmp_path / "again", config=config)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (golden / "model.safetensors").read_bytes()

    def unsigned(value):
        return {key: unsigned(v) for key, v in value.items() if key != "producer"} if isinstance(value, dict) else value

    for file_name in ("config.json", "hf_quant_config.json"):
        assert unsigned(read_json(tmp_path / "again" / file_name)) == unsigned(read_json(golden / file_name))

    export_checkpoint(tree, tmp_path / "ct", format="compressed-tensors", config=config)
    from_ct = load_checkpoint(tmp_path / "ct")
    export_checkpoint(from_ct, tmp_path / "ct_again", format="compressed-tensors", config=config)
    for file_name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ct_again" / file_name).read_bytes() == (tmp_path / "ct" / file_name).read_bytes()
    export_checkpoint(from_ct, tmp_path / "back", config=config)
    back, wanted = tensors_of(tmp_path / "back"), tensors_of(golden)
    assert sorted(back) == sorted(wanted)
    for key, values in wanted.items():
        if key.endswith("input_scale"):  # a float32 amax: the reciprocal keeps all but the last bit
            np.testing.assert_array_max_ulp(back[key], values, 1)
        else:
            assert back[key].tobytes() == values.tobytes(), key
