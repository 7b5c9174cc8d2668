"""Reading a Hugging Face config.json: what is understood, and what is refused by name and value."""

import dataclasses
import re

import pytest
from decoder_cases import FAMILIES, FULL, SLIDING, hf_config, small_config

from jaxfp4.models import DecoderConfig
from jaxfp4.models.rotary import Dynamic, Linear, Llama3, LongRope, Yarn


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
    ("model_type", "settings", "qkv", "output", "mlp"),
    [
        ("llama", {}, False, False, False),
        ("llama", {"attention_bias": True, "mlp_bias": True}, True, True, True),
        ("mistral", {}, False, False, False),
        ("qwen2", {}, True, False, False),
        ("qwen2", {"attention_bias": True}, True, False, False),
        ("qwen3", {"attention_bias": True}, True, True, False),
        ("mixtral", {"attention_bias": False}, False, False, False),
        ("qwen3_moe", {"attention_bias": True}, True, True, False),
    ],
)
def test_biases(model_type, settings, qkv, output, mlp):
    config = small_config(model_type, **settings)
    assert (config.qkv_bias, config.attention_bias, config.mlp_bias) == (qkv, output, mlp)


ON = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("model_type", "settings", "windows"),
    [
        ("llama", {"sliding_window": None, "layer_types": [FULL] * 3}, [None, None, None]),
        ("mistral", {}, [4096, 4096, 4096]),
        ("mistral", {"sliding_window": 5, "layer_types": [SLIDING] * 3}, [5, 5, 5]),
        ("mistral", {"sliding_window": 5, "use_sliding_window": True}, [5, 5, 5]),
        ("mixtral", {}, [None, None, None]),
        ("mixtral", {"sliding_window": 5}, [5, 5, 5]),
        ("qwen2", {"sliding_window": 5, "max_window_layers": 1}, [None, None, None]),
        ("qwen2", ON, [None, None, None]),
        ("qwen2", ON | {"max_window_layers": 1}, [None, 5, 5]),
        ("qwen3", ON | {"max_window_layers": 0}, [5, 5, 5]),
        ("qwen3", ON | {"max_window_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]}, [5, None, 5]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, [4096] * 3),
        ("qwen3_moe", {"max_window_layers": 48, "sliding_window": None}, [None, None, None]),
        ("qwen3_moe", ON, [5, 5, 5]),
        ("qwen3_moe", ON | {"max_window_layers": 0, "layer_types": [SLIDING] * 3}, [5, 5, 5]),
    ],
)
def test_windows(model_type, settings, windows):
    kept = {key: value for key, value in settings.items() if value is not None}
    changes = {key: value for key, value in settings.items() if value is None}
    config = DecoderConfig.from_hf(hf_config(model_type, num_hidden_layers=3, **kept) | changes)
    assert [config.window(layer) for layer in range(3)] == windows
    assert DecoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("model_type", "theta", "eps", "kv_heads", "head_dim"),
    [
        ("llama", 1e4, 1e-6, 64, 2),
        ("mistral", 1e4, 1e-6, 8, 2),
        ("qwen2", 1e4, 1e-6, 32, 2),
        ("qwen3", 1e4, 1e-6, 32, 128),
        ("mixtral", 1e6, 1e-5, 8, 2),
        ("qwen3_moe", 1e4, 1e-6, 4, 2),
    ],
)
def test_missing_keys_stand_for_what_they_do_in_transformers(model_type, theta, eps, kv_heads, head_dim):
    missing = dict.fromkeys(["rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim"])
    config = small_config(model_type, num_attention_heads=64, hidden_size=128, **missing)
    assert (config.rope_theta, config.rms_norm_eps) == (theta, eps)
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, head_dim)


LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: Settings of published models, beside their sizes.
PUBLISHED = {
    "Llama 2": ("llama", {"pretraining_tp": 1, "rope_scaling": None, "attention_bias": False}, 1e4, None, None),
    "Llama 3.1": (
        "llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", **LLAMA31},
            "eos_token_id": [1, 2],
            "mlp_bias": False,
        },
        5e5,
        Llama3(8.0, 1.0, 4.0, 8192),
        None,
    ),
    "Vicuna 16k": ("llama", {"rope_scaling": {"factor": 4.0, "type": "linear"}}, 1e4, Linear(4.0), None),
    "SmolLM2": ("llama", {"rope_theta": 1e5, "rope_interleaved": False, "is_llama_config": True}, 1e5, None, None),
    "Mistral 0.1": ("mistral", {"rope_theta": 1e4, "sliding_window": 4096}, 1e4, None, 4096),
    "Mistral 0.3": ("mistral", {"rope_theta": 1e6, "sliding_window": None}, 1e6, None, None),
    "Mixtral": ("mixtral", {"rope_theta": 1e6, "sliding_window": None, "router_aux_loss_coef": 0.02}, 1e6, None, None),
    "Qwen2.5": (
        "qwen2",
        {
            "rope_theta": 1e6,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "use_mrope": False,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        1e6,
        Yarn(4.0, 32768),
        None,
    ),
    "Qwen3 30B": (
        "qwen3_moe",
        {"rope_theta": 1e6, "rope_scaling": None, "use_sliding_window": False, "max_window_layers": 48},
        1e6,
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs_are_understood(name):
    model_type, settings, theta, scaling, window = PUBLISHED[name]
    plain = hf_config(model_type, rope_parameters=None, torch_dtype="bfloat16", hidden_act="silu", use_cache=True)
    config = DecoderConfig.from_hf(plain | settings)
    assert (config.rope_theta, config.rope_scaling, config.window(0)) == (theta, scaling, window)


REFUSED = [
    (
        {"model_type": "gpt2"},
        "model_type is 'gpt2', which is not supported; supported: llama or mistral or",
    ),
    ({"model_type": ["llama"]}, "model_type is ['llama'], which is not supported; supported: llama or"),
    (
        {"architectures": ["Qwen3MoeModel"]},
        "architectures is ['Qwen3MoeModel'], which is not supported; supported: ['Q",
    ),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported; supported: 'silu'"),
    ({"attention_bias": 1}, "attention_bias is 1, wanted true or false"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', wanted true or false"),
    ({"mlp_bias": True}, "mlp_bias is True, which is not supported; supported: False for model_type 'qwen3_moe'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported; supported: 1.0"),
    ({"use_qk_norm": False}, "use_qk_norm is False, which is not supported; supported: true"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which is not supported; supported: null"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5, which is not supported; supported: 1"),
    ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', which is not supported; supported: 'softmax'"),
    ({"is_causal": False}, "is_causal is False, which is not supported; supported: true"),
    (
        {"quantization_config": {"quant_method": "x" * 99}},
        "quantization_config is {'quant_method': '" + "x" * 59 + "..., which is not supported; supported: null",
    ),
    ({"vocab_size": None}, "vocab_size is missing; a config.json of model_type 'qwen3_moe' needs it"),
    ({"hidden_size": 0}, "hidden_size is 0, wanted a positive integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, wanted a positive integer"),
    ({"num_attention_heads": "4", "head_dim": None}, "num_attention_heads is '4', wanted a positive integer"),
    ({"hidden_size": 2.5, "head_dim": None}, "hidden_size is 2.5, wanted a positive integer"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4, wanted a multiple of num_key_value_heads, which is 3"),
    ({"head_dim": 7}, "head_dim is 7, wanted an even number"),
    ({"num_experts": None}, "there is neither num_experts nor num_local_experts; wanted one of them"),
    ({"num_local_experts": 8}, "num_experts is 4, but num_local_experts is 8; wanted one of them"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, wanted at most num_experts, which is 4"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, wanted a positive integer"),
    ({"mlp_only_layers": 3}, "mlp_only_layers is 3, wanted a list of layer numbers"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', wanted true or false"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', wanted a positive number"),
    # Numbers that JSON can state and nothing can have.
    ({"rms_norm_eps": 10**400}, f"rms_norm_eps is 1{'0' * 76}..., wanted a positive number"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647, wanted a positive integer, at most 65536"),
    ({"vocab_size": 2**31}, "vocab_size is 2147483648, wanted a positive integer, at most 2147483647"),
    (
        {"rope_parameters": {"rope_type": float("nan")}},
        "rope_parameters.rope_type is nan, which is not supported; supported: default, ",
    ),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0, wanted a positive integer"),
    (
        {"use_sliding_window": True, "max_window_layers": 1},
        "max_window_layers is 1, which is not supported; supported: 0 for model_type 'qwen3_moe': all layers have one",
    ),
    (
        {"use_sliding_window": True, "layer_types": [FULL, SLIDING]},
        "layer_types is ['full_attention', 'sliding_attention'], which is not supported; supported: a list of 2 times "
        "'sliding_attention' (as many as num_hidden_layers) with this sliding window",
    ),
]
OTHERS_REFUSED = [
    ("llama", {"sliding_window": 8}, "sliding_window is 8, which is not supported; supported: null for model_type 'll"),
    ("llama", {"use_sliding_window": True}, "use_sliding_window is True, which is not supported; supported: null"),
    (
        "llama",
        {"layer_types": [SLIDING] * 2},
        "layer_types is ['sliding_attention', 'sliding_attention'], which is not",
    ),
    ("llama", {"use_qk_norm": True}, "use_qk_norm is True, which is not supported; supported: false"),
    ("mistral", {"attention_bias": True}, "attention_bias is True, which is not supported; supported: False for"),
    ("mistral", {"use_sliding_window": False}, "use_sliding_window is False, but sliding_window is 4096, which a mis"),
    ("mistral", {"layer_types": [FULL, FULL]}, "layer_types is ['full_attention', 'full_attention'], which is not"),
    ("mistral", {"num_local_experts": 8}, "num_experts is 8, which is not supported; supported: 0 for model_type"),
    ("qwen2", {"attention_bias": False}, "attention_bias is False, which is not supported; supported: true, or leave"),
    ("qwen2", {"layer_types": [FULL, SLIDING]}, "layer_types is ['full_attention', 'sliding_attention'], which is not"),
    ("qwen2", ON | {"layer_types": [SLIDING]}, "layer_types is ['sliding_attention'], which is not supported"),
    ("qwen2", ON | {"layer_types": ["chunked_attention"] * 2}, "layer_types is ['chunked_attention', 'chunked_"),
    ("qwen2", ON | {"max_window_layers": -1}, "max_window_layers is -1, wanted an integer from 0"),
    ("qwen3", {"head_dim": "wide"}, "head_dim is 'wide', wanted a positive integer"),
    ("mixtral", {"moe_intermediate_size": 16}, "moe_intermediate_size is 16, which is not supported; supported: 48"),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False, which is not supported; supported: True"),
]


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        *(("qwen3_moe", *case) for case in REFUSED),
        *OTHERS_REFUSED,
    ],
)
def test_refused(model_type, change, message):
    with pytest.raises(ValueError, match="^model config: " + re.escape(message)):
        DecoderConfig.from_hf(hf_config(**{"model_type": model_type} | change))


def test_a_config_without_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type is None, which is not supported"):
        DecoderConfig.from_hf({})


def test_a_config_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="model_type is 'gpt2', which is not supported"):
        dataclasses.replace(small_config(), model_type="gpt2")


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        (
            "llama",
            {"qk_norm": True},
            "qk_norm is True, which is not supported; supported: False for",
        ),
        ("qwen2", {"attention_bias": True}, "attention_bias is True, which is not supported; supported: False for"),
        ("llama", {"sliding_window": 4}, "sliding_window is 4, which is not supported; supported: None for"),
        ("mixtral", {"num_experts": 0}, "num_experts is 0, wanted a positive integer"),
        ("mixtral", {"mlp_only_layers": (1,)}, "mlp_only_layers is (1,), which is not supported; supported: ()"),
        (
            "qwen2",
            {"layer_types": (FULL, SLIDING)},
            "layer_types is ('full_attention', 'sliding_attention') with",
        ),
        (
            "qwen2",
            {"layer_types": (FULL, FULL), "sliding_window": 4},
            "layer_types is ('full_attention', 'full_",
        ),
        (
            "qwen2",
            {"rope_scaling": Dynamic(2.0), "head_dim": 2},
            "head_dim is 2, wanted at least 4 with rope",
        ),
        (
            "qwen2",
            {"rope_scaling": LongRope((1.0,) * 4, (1.0,) * 3, 2.0, 8)},
            "long_factor has 3 numbers, wanted head_dim / 2, which is 4",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_hand_too(model_type, change, message):
    with pytest.raises(ValueError, match="^model config: " + re.escape(message)):
        dataclasses.replace(small_config(model_type), **change)


def test_settings_switched_off_are_accepted():
    off = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_scaling": {}, "use_qk_norm": False}
    assert small_config("llama", **off) == small_config("llama")
    off = {"sliding_window": 4096, "use_sliding_window": False, "mlp_only_layers": [], "use_mrope": False}
    assert small_config(**off, architectures=["Qwen3MoeForCausalLM"]) == small_config()


def test_settings_without_a_part_in_the_numbers_are_passed_over():
    harmless = {"bos_token_id": 1, "attention_dropout": 0.1, "pretraining_tp": 2, "torch_dtype": "bfloat16"}
    assert small_config("llama", **harmless) == small_config("llama")


def test_mixtral_fields():
    config = small_config("mixtral")
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 48)
    assert config.norm_topk_prob and config.is_moe_layer(0) and not config.qk_norm
    assert small_config("mixtral", num_local_experts=None, num_experts=4) == config
    assert "moe_intermediate_size" not in config.to_hf() and config.to_hf()["num_local_experts"] == 4


def test_a_mixture_without_experts_is_dense():
    config = small_config(num_experts=0)
    assert not config.is_moe_layer(0)
    assert DecoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("model_type", FAMILIES)
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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hf_config_of_the_tests_names_no_extra_key(model_type):
    assert set(hf_config(model_type)) <= set(small_config(model_type).to_hf())
