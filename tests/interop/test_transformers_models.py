"""The decoder against transformers: the same checkpoint, the same logits, in both directions, for all six families."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.models import DecoderConfig, checkpoint_names, load_decoder, save_decoder
from jaxfp4.models.hf_layout import read_config

torch = pytest.importorskip("torch", reason="torch is not installed; see the extra 'interop'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; see the extra 'interop'")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

LENGTH = 24
TOKENS = np.random.default_rng(0).integers(0, 64, (2, LENGTH)).astype(np.int32)
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
#: Settings of each family on top of `BASE`.
FAMILY = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
}


def rope(rope_type, **keys):
    """A rotary rule, whose trained length is 8 where it has one: the tokens are 3 times as long."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **keys}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
SPARSE = {"num_hidden_layers": 3, "decoder_sparse_step": 2}

# family, the settings under test, the same settings without what is under test (None: there is nothing to leave out).
CASES = {
    "llama": ("llama", {}, None),
    "llama, other head size": ("llama", {"head_dim": 12}, None),
    "llama, one key-value head for each": ("llama", {"num_key_value_heads": None}, None),
    "llama, eps": ("llama", {"rms_norm_eps": 0.1}, {}),
    "llama, theta": ("llama", rope("default") | {"rope_parameters": {"rope_theta": 5.0}}, {}),
    "llama, attention_bias": ("llama", {"attention_bias": True}, {}),
    "llama, mlp_bias": ("llama", {"mlp_bias": True}, {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, None),
    "llama, linear": ("llama", rope("linear", factor=3.0), {}),
    "llama, dynamic": ("llama", rope("dynamic", factor=3.0) | {"max_position_embeddings": 8}, {}),
    "llama, dynamic within its length": ("llama", rope("dynamic", factor=3.0), None),
    "llama, llama3": ("llama", rope("llama3", **LLAMA3), {}),
    "llama, yarn": ("llama", rope("yarn", **YARN), {}),
    "llama, yarn attention_factor": ("llama", rope("yarn", attention_factor=1.5, **YARN), rope("yarn", **YARN)),
    "llama, yarn mscale": ("llama", rope("yarn", mscale=2.0, mscale_all_dim=0.5, **YARN), rope("yarn", **YARN)),
    "llama, yarn betas": ("llama", rope("yarn", beta_fast=4.0, beta_slow=0.1, **YARN), rope("yarn", **YARN)),
    "llama, yarn not truncated": (
        "llama",
        rope("yarn", beta_fast=3.0, beta_slow=0.1, truncate=False, **YARN),
        rope("yarn", beta_fast=3.0, beta_slow=0.1, **YARN),
    ),
    "llama, longrope long": ("llama", rope("longrope", original_max_position_embeddings=8, **LONG), {}),
    "llama, longrope short": ("llama", rope("longrope", original_max_position_embeddings=32, factor=2.0, **LONG), {}),
    "mistral": ("mistral", {}, None),
    "mistral, window": ("mistral", {"sliding_window": 5}, {}),
    "mistral, other head size and yarn": ("mistral", {"head_dim": 16} | rope("yarn", **YARN), {"head_dim": 16}),
    "qwen2": ("qwen2", {}, None),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, None),
    "qwen2, window in the last layer": ("qwen2", WINDOW | {"max_window_layers": 1}, {}),
    "qwen2, window in no layer": ("qwen2", WINDOW, None),
    "qwen2, window by layer_types": ("qwen2", WINDOW | {"layer_types": [SLIDING, FULL]}, {}),
    "qwen2, yarn": ("qwen2", rope("yarn", **YARN) | {"head_dim": 8}, {"head_dim": 8}),
    "qwen3": ("qwen3", {}, None),
    "qwen3, attention_bias": ("qwen3", {"attention_bias": True}, {}),
    "qwen3, window in all layers": ("qwen3", WINDOW | {"max_window_layers": 0}, {}),
    "qwen3, tied, window by layer_types": (
        "qwen3",
        WINDOW | {"layer_types": [SLIDING, FULL], "tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", {}, None),
    "mixtral, window": ("mixtral", {"sliding_window": 5}, {}),
    "mixtral, three of four experts": ("mixtral", {"num_experts_per_tok": 3, "head_dim": 16}, {"head_dim": 16}),
    "mixtral, llama3, tied": (
        "mixtral",
        rope("llama3", **LLAMA3) | {"tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", {}, None),
    "qwen3_moe, not renormalised": ("qwen3_moe", {"norm_topk_prob": False}, {}),
    "qwen3_moe, attention_bias": ("qwen3_moe", {"attention_bias": True}, {}),
    "qwen3_moe, window": ("qwen3_moe", WINDOW, {}),
    "qwen3_moe, dense layers": ("qwen3_moe", SPARSE, None),
    "qwen3_moe, one dense layer, tied": ("qwen3_moe", {"mlp_only_layers": [1], "tie_word_embeddings": True}, None),
    "qwen3_moe, linear": ("qwen3_moe", rope("linear", factor=2.0), {}),
}
#: How the checkpoint is stored where not in one file of float32.
STORED = {
    "llama, tied": {"dtype": torch.bfloat16},
    "llama, yarn": {"shard": 8_000},
    "mistral, window": {"dtype": torch.bfloat16, "shard": 8_000},
    "qwen2": {"dtype": torch.bfloat16, "shard": 8_000},
    "qwen2, tied": {"shard": 8_000},
    "qwen3": {"dtype": torch.bfloat16, "shard": 8_000},
    "mixtral": {"dtype": torch.bfloat16, "shard": 8_000},
    "mixtral, window": {"shard": 8_000},
    "qwen3_moe": {"dtype": torch.bfloat16, "shard": 8_000},
    "qwen3_moe, dense layers": {"dtype": torch.float16},
}

every_case = pytest.mark.parametrize("name", list(CASES))
forward = jax.jit(lambda model, tokens: model(tokens))


def torch_model(family, settings):
    """A model of transformers with random weights such that logits and attention scores are about 1."""
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    config = AutoConfig.for_model(family, **BASE | FAMILY[family] | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (1 if "norm" in name else 0))
            else:
                value.copy_(noise * (1.5 if "_proj" in name else 1.0) / value.shape[-1] ** 0.5)
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long(), use_cache=False).logits.float().numpy()


def from_folder(folder):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture
def stored(tmp_path):
    """Writes a case's checkpoint as transformers does and gives its folder."""

    def write(name):
        family, settings, _ = CASES[name]
        options = STORED.get(name, {})
        folder = tmp_path / "hf"
        model = torch_model(family, settings).to(options.get("dtype", torch.float32))
        model.save_pretrained(folder, max_shard_size=options.get("shard", 10**9))
        assert (folder / "model.safetensors.index.json").exists() == ("shard" in options)
        return folder

    return write


@every_case
def test_same_logits(name, stored):
    """float32 in both; measured at most 1.6e-5 (with scores scaled up by YaRN), 1.2e-5 otherwise; logits go up to 5."""
    folder = stored(name)
    expected = logits_of(from_folder(folder))
    found = np.asarray(forward(load_decoder(folder, dtype=jnp.float32), TOKENS))
    assert 0.5 < np.std(expected) < 4
    difference = np.abs(found - expected).max()
    print(f"{name}: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert difference < 5e-5


@pytest.mark.parametrize("name", [name for name, (_, _, without) in CASES.items() if without is not None])
def test_what_a_case_is_about_changes_the_logits(name):
    family, settings, without = CASES[name]
    model, plain = torch_model(family, settings), torch_model(family, without)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert np.abs(logits_of(model) - logits_of(plain)).max() > 1e-2


@every_case
def test_transformers_loads_what_save_decoder_writes(name, stored, tmp_path):
    """The same tensors under the same names, and a config.json that means the same: so the same logits exactly."""
    folder = stored(name)
    decoder = load_decoder(folder)
    save_decoder(decoder, tmp_path / "again", max_shard_bytes=STORED.get(name, {}).get("shard"))
    np.testing.assert_array_equal(logits_of(from_folder(tmp_path / "again")), logits_of(from_folder(folder)))
    assert read_config(tmp_path / "again") == decoder.config
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert [before[key] for key in ("architectures", "model_type", "dtype")] == [
        after[key] for key in ("architectures", "model_type", "dtype")
    ]


@pytest.mark.parametrize("family", list(FAMILY))
def test_names_are_those_that_transformers_writes(family, stored, tmp_path):
    name = next(n for n, case in CASES.items() if case[0] == family and "shard" in STORED.get(n, {}))
    index = json.loads((stored(name) / "model.safetensors.index.json").read_text())
    config = read_config(tmp_path / "hf")
    patterns = [
        re.escape(f"{n.module}.{n.parameter}").replace(r"\{expert\}", r"\d+") for n in checkpoint_names(config).values()
    ]
    unmatched = [t for t in index["weight_map"] if not any(re.fullmatch(pattern, t) for pattern in patterns)]
    assert unmatched == []
    assert all(any(re.fullmatch(pattern, t) for t in index["weight_map"]) for pattern in patterns)


#: Tables of published models.
TABLES = {
    "Llama 3.1": (128, 131072, {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3, "factor": 8.0}, 8192),
    "Qwen3 yarn": (128, 131072, {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}, 32768),
    "yarn, no factor": (64, 65536, {"rope_theta": 1e4, "rope_type": "yarn", "factor": None}, 4096),
    "yarn, mscale": (
        64,
        163840,
        {"rope_theta": 1e4, "rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7},
        4096,
    ),
    "linear": (128, 16384, {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}, None),
    "dynamic": (128, 4096, {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}, None),
    "longrope": (
        96,
        131072,
        {
            "rope_theta": 1e4,
            "rope_type": "longrope",
            "short_factor": [1 + 0.01 * i for i in range(48)],
            "long_factor": [1 + i for i in range(48)],
        },
        4096,
    ),
}


@pytest.mark.parametrize("time", [2048, 10000])
@pytest.mark.parametrize("name", list(TABLES))
def test_frequencies_of_published_models(name, time):
    head_dim, longest, table, trained = TABLES[name]
    table = table | ({} if trained is None else {"original_max_position_embeddings": trained})
    shape = BASE | {"head_dim": head_dim, "max_position_embeddings": longest}
    theirs = AutoConfig.for_model("llama", **shape, rope_parameters=dict(table))
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[table["rope_type"]](theirs, seq_len=time)
    mine = DecoderConfig.from_hf(shape | {"model_type": "llama", "rope_parameters": table}).rotation(time)
    np.testing.assert_array_max_ulp(mine.frequencies, frequencies.numpy(), maxulp=4)
    assert mine.magnitude == pytest.approx(magnitude, rel=1e-12)
