"""`jaxfp4 quantize` on the golden Hugging Face checkpoints writes what Model-Optimizer wrote from them."""

import json

import numpy as np
import pytest
from golden_data import SHARED

from jaxfp4.checkpoints import SafetensorsFile
from jaxfp4.cli import main

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the golden checkpoints are not at {SHARED}")

# The Llama golden also has an FP8 KV cache, which max calibration of weights and activations does not make.
KV_TENSORS = ("k_scale", "v_scale")


def tensors(directory):
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: file.tensor(name) for name in file.names() if not name.endswith(KV_TENSORS)}


def without_producer(directory):
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    separate = json.loads((directory / "hf_quant_config.json").read_text())
    for part in (config, separate):
        assert part.pop("producer").keys() == {"name", "version"}
    config.pop("kv_cache_scheme", None)
    separate["quantization"].pop("kv_cache_quant_algo")
    return config, separate


@pytest.mark.parametrize(
    ("model", "mesh"), [("tiny_llama", None), ("tiny_qwen3_moe", None), ("tiny_qwen3_moe", "tp=2,ep=4")]
)
def test_same_names_types_shapes_and_bytes(model, mesh, tmp_path):
    golden, out = SHARED / model, tmp_path / "out"
    arguments = ["quantize", str(golden / "hf"), str(out), "--calib", str(golden / "calib_tokens.npy")]
    assert main([*arguments, "--expert-scale", "expert", *(["--mesh", mesh] if mesh else [])]) == 0
    found, wanted = tensors(out), tensors(golden / "modelopt")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if name.endswith("input_scale"):
            np.testing.assert_allclose(found[name], tensor, rtol=1e-5, err_msg=name)
        else:
            assert found[name].tobytes() == tensor.tobytes(), name
    assert without_producer(out) == without_producer(golden / "modelopt")
