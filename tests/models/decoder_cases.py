"""Golden checkpoints, small configurations and meshes for the tests of the decoder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from jaxfp4.models import Decoder, DecoderConfig, parameter_shapes
from jaxfp4.models.hf_layout import assemble

GOLDEN_PLACES = (Path(__file__).parents[3] / "shared" / "golden", Path(__file__).parents[1] / "golden")
GOLDEN_MODELS = ("tiny_llama", "tiny_qwen3_moe")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
FULL, SLIDING = "full_attention", "sliding_attention"


def golden(model: str, part: str) -> Path:
    """A part of a golden model, from ../shared/golden or the copy in tests/golden; skips the test if in neither."""
    for place in GOLDEN_PLACES:
        if (place / model / part).exists():
            return place / model / part
    pytest.skip(f"the golden {model}/{part} is neither in {GOLDEN_PLACES[0]} nor in {GOLDEN_PLACES[1]}")


def auto_mesh(**sizes: int) -> Mesh:
    """A mesh of Auto axes over the first CPU devices."""
    count = 1
    for size in sizes.values():
        count *= size
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:count])


def hf_config(model_type: str = "qwen3_moe", **changes: object) -> dict:
    """A small config.json, with `changes`; a value of None removes the key."""
    config = {
        "model_type": model_type,
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    if model_type == "qwen3_moe":
        config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    if model_type == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {key: value for key, value in (config | changes).items() if value is not None}


def small_config(model_type: str = "qwen3_moe", **changes: object) -> DecoderConfig:
    """The configuration in `hf_config`."""
    return DecoderConfig.from_hf(hf_config(model_type, **changes))


def small_decoder(config: DecoderConfig | None = None, dtype: object = jnp.float32) -> Decoder:
    """A one-layer decoder, or one of `config`, with random parameters."""
    config = small_config(num_hidden_layers=1) if config is None else config
    values = {
        path: jnp.asarray(np.random.default_rng(i).standard_normal(shape) * 0.3 + path.endswith("scale"), dtype)
        for i, (path, shape) in enumerate(parameter_shapes(config).items())
    }
    return assemble(config, values)


def abstract_decoder(config: DecoderConfig | None = None, dtype: object = jnp.float32) -> Decoder:
    """As `small_decoder` with two layers, its parameters without values."""
    config = small_config() if config is None else config
    return nnx.eval_shape(lambda: Decoder(config, param_dtype=dtype, rngs=nnx.Rngs(0)))


def write_config(directory: Path, config: object) -> None:
    """Replaces config.json; a string is written as it is."""
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text, encoding="utf-8")
