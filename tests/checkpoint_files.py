"""A checkpoint in memory, read from a directory and written back after something in it was changed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxfp4
from jaxfp4.checkpoints import SafetensorsFile
from jaxfp4.checkpoints.safetensors_file import DTYPES
from jaxfp4.tensors import QuantizedWeight

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONFIG = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "num_experts": 4, "dtype": "bfloat16"}
SIZE = 256


@dataclasses.dataclass
class Files:
    """What a checkpoint directory holds; JSON files as Python objects, or as text to be written as it is."""

    tensors: dict[str, np.ndarray]
    jsons: dict[str, Any]

    @classmethod
    def read(cls, directory):
        file = SafetensorsFile(directory / "model.safetensors")
        tensors = {name: np.array(file.tensor(name)) for name in file.names()}
        return cls(tensors, {path.name: json.loads(path.read_text()) for path in directory.glob("*.json")})

    def write(self, directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        (directory / "model.safetensors").write_bytes(safetensors_bytes(self.tensors))
        for name, content in self.jsons.items():
            (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return directory

    @property
    def quantization(self):
        """`quantization_config` of config.json."""
        return self.jsons["config.json"]["quantization_config"]

    @property
    def details(self):
        """`quantization` of hf_quant_config.json."""
        return self.jsons["hf_quant_config.json"]["quantization"]


def safetensors_bytes(tensors):
    entries, offset = {}, 0
    for name, values in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    header = json.dumps(entries).encode()
    parts = [len(header).to_bytes(8, "little"), header]
    return b"".join([*parts, *(np.ascontiguousarray(values).tobytes() for values in tensors.values())])


def small_model(*, input_scale=1e-3):
    """`(parameters, quantized parameters)` of two layers with attention and 4 experts, all weights 256 by 256."""
    rng = np.random.default_rng(0)
    params, qparams = {}, {}

    def add(path, w, q=None):
        for tree, leaf in ((params, w), (qparams, w if q is None else q)):
            *parents, last = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf

    def quantized(path, names):
        ws = [jnp.asarray(rng.normal(size=(SIZE, SIZE)).astype(np.float32)) for _ in names]
        amax = jnp.max(jnp.stack([jnp.max(jnp.abs(w)) for w in ws]))
        for name, w in zip(names, ws, strict=True):
            scale = None if input_scale is None else jnp.float32(input_scale)
            weight = QuantizedWeight(jaxfp4.quantize(w, 1, global_amax=amax), scale)
            add(f"{path}/{name}/weight", w, weight)

    for layer in range(2):
        prefix = f"model/layers/{layer}"
        quantized(f"{prefix}/self_attn", ["q_proj", "k_proj", "v_proj"])
        quantized(f"{prefix}/self_attn", ["o_proj"])
        for expert in range(4):
            quantized(f"{prefix}/mlp/experts/{expert}", ["gate_proj", "up_proj"])
            quantized(f"{prefix}/mlp/experts/{expert}", ["down_proj"])
        add(f"{prefix}/mlp/gate/weight", jnp.ones((4, SIZE), jnp.bfloat16))
        add(f"{prefix}/input_layernorm/weight", jnp.ones(SIZE, jnp.bfloat16))
    add("model/embed_tokens/weight", jnp.ones((32, SIZE), jnp.bfloat16))
    add("lm_head/weight", jnp.ones((32, SIZE), jnp.bfloat16))
    return params, qparams


def plain_files(params):
    """The unquantized checkpoint."""

    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return Files({name: np.asarray(leaf) for name, leaf in names.items()}, {"config.json": CONFIG})
