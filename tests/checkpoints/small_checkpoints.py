"""Small random checkpoints as files, for what works on files alone."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "dtype": "bfloat16"}


def random_weights(dtype=BF16, layers=2, seed=0):
    """Tensors of a small Llama with a mixture of experts in its last layer; siblings have unequal amaxes."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return (rng.standard_normal(shape) * rng.uniform(0.01, 1)).astype(dtype)

    tensors = {"model.embed_tokens.weight": weight(40, 48), "lm_head.weight": weight(40, 48)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = weight(33 if name == "v_proj" else 48, 48)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = weight(48, 48)
        tensors[f"{prefix}.self_attn.o_proj.bias"] = weight(48)
        tensors[f"{prefix}.input_layernorm.weight"] = weight(48)
        experts = [f"experts.{e}." for e in range(2)] if i == layers - 1 else [""]
        for expert in experts:
            tensors[f"{prefix}.mlp.{expert}gate_proj.weight"] = weight(64, 48)
            tensors[f"{prefix}.mlp.{expert}up_proj.weight"] = weight(64, 48)
            tensors[f"{prefix}.mlp.{expert}down_proj.weight"] = weight(48, 64)
    tensors[f"model.layers.{layers - 1}.mlp.gate.weight"] = weight(2, 48)
    return tensors


def write_model(directory, tensors, config=CONFIG, shards=1):
    """A checkpoint directory; with several shards, neighbours in the order of names lie in different ones."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
        for file_name in set(weight_map.values()):
            save_file({n: v for n, v in tensors.items() if weight_map[n] == file_name}, directory / file_name)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def contents(directory):
    """Relative path -> bytes of every file."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
