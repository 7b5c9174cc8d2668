"""Reading a Hugging Face config.json: what is understood, and what is refused by name and value."""

import dataclasses
import re

import pytest
from decoder_cases import hf_config, small_config

from jaxfp4.models import DecoderConfig


def test_llama_fields():
    config = small_config("llama", rms_norm_eps=1e-5, tie_word_embeddings=True)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (16, 48, 8)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-5, 10000.0, True)
    assert (config.qk_norm, config.num_experts) == (False, 0)
    assert not config.is_moe_layer(0)


def test_head_size_and_key_value_heads_default_as_in_transformers():
    config = small_config("llama", head_dim=None, num_key_value_heads=None)
    assert (config.head_dim, config.num_key_value_heads) == (4, 4)


def test_qwen3_moe_fields():
    config = small_config()
    assert config.qk_norm
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 32)
    assert config.norm_topk_prob
    assert config.is_moe_layer(0)
    assert small_config(num_experts=None, num_local_experts=4) == config


def test_dense_layers_mixed_in():
    config = small_config(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [config.is_moe_layer(i) for i in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": None, "rope_theta": 500000},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_both_spellings_of_the_rotary_base(change):
    assert small_config("llama", **change).rope_theta == 5e5


def test_the_rotary_base_defaults_as_in_transformers():
    assert small_config("llama", rope_parameters=None).rope_theta == 10000.0


REFUSED = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', which is not supported; supported: llama or qwen3_moe"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported; supported: 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, which is not supported; supported: false"),
    ({"mlp_bias": True}, "mlp_bias is True, which is not supported; supported: false"),
    ({"use_sliding_window": True}, "use_sliding_window is True, which is not supported; supported: false"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.rope_type is 'llama3', which is not supported; supported: 'default'",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        "rope_parameters.rope_type is 'yarn', which is not supported; supported: 'default'",
    ),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', which is not supported; supported: a table with rope_type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported; supported: 1.0"),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1, wanted a positive number"),
    ({"vocab_size": None}, "vocab_size is missing; a config.json of model_type 'qwen3_moe' needs it"),
    ({"hidden_size": 0}, "hidden_size is 0, wanted a positive integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, wanted a positive integer"),
    ({"num_attention_heads": "4", "head_dim": None}, "num_attention_heads is '4', wanted a positive integer"),
    ({"hidden_size": 2.5, "head_dim": None}, "hidden_size is 2.5, wanted a positive integer"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4, wanted a multiple of num_key_value_heads, which is 3"),
    ({"head_dim": 7}, "head_dim is 7, wanted an even number"),
    ({"num_experts": None}, "there is neither num_experts nor num_local_experts; wanted one of them"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, wanted at most num_experts, which is 4"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, wanted a positive integer"),
    ({"mlp_only_layers": 3}, "mlp_only_layers is 3, wanted a list of layer numbers"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', wanted a positive number"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[next(iter(change)) for change, _ in REFUSED])
def test_refused(change, message):
    with pytest.raises(ValueError, match="^model config: " + re.escape(message)):
        small_config(**change)


def test_a_config_without_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type is None, which is not supported"):
        DecoderConfig.from_hf({})


def test_a_config_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="model_type is 'gpt2', which is not supported"):
        dataclasses.replace(small_config(), model_type="gpt2")


def test_settings_switched_off_are_accepted():
    small_config("llama", attention_bias=False, mlp_bias=False, hidden_act="silu", rope_scaling={})
    small_config(sliding_window=4096, use_sliding_window=False, mlp_only_layers=[])


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_round_trip(model_type):
    config = small_config(model_type, tie_word_embeddings=True, rope_parameters={"rope_theta": 3.0})
    written = config.to_hf("float32")
    assert DecoderConfig.from_hf(written) == config
    assert written["dtype"] == "float32"
    assert written["model_type"] == model_type
    assert "qk_norm" not in written


def test_round_trip_of_mixed_layers():
    config = small_config(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_hf_config_of_the_tests_names_no_extra_key():
    assert set(hf_config("llama")) <= set(small_config("llama").to_hf())
