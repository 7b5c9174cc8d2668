"""Linear layers and fused siblings, told by names, shapes and config.json."""

import re

import ml_dtypes
import numpy as np
import pytest

from jaxfp4.checkpoints.sibling_names import (
    FUSED,
    matches,
    reason_to_leave,
    refuse_unmatched_patterns,
    sibling_groups,
)

BF16 = np.dtype(ml_dtypes.bfloat16)

LINEAR = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.experts.7.gate_proj.weight",
    "model.layers.0.mlp.shared_experts.up_proj.weight",
    "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.3.linear_attn.in_proj_qkvz.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer_blocks.0.attn.to_q.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    "backbone.layers.0.mixer.in_proj.weight",
]

LEFT = {
    "model.embed_tokens.weight": "embedding",
    "transformer.wte.weight": "embedding",
    "bert.embeddings.word_embeddings.weight": "embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
    "time_text_embed.timestep_embedder.linear_1.weight": "embedding",
    "lm_head.weight": "output head",
    "output.weight": "output head",
    "score.weight": "output head",
    "transformer.output_layer.weight": "output head",
    "proj_out.weight": "output head",
    "model.layers.0.mlp.gate.weight": "router",
    "model.layers.0.block_sparse_moe.gate.weight": "router",
    "model.layers.0.mlp.router.weight": "router",
    "model.layers.0.feed_forward.router.weight": "router",
    "model.layers.0.mlp.gate.wg.weight": "router",
    "model.layers.0.mlp.shared_expert_gate.weight": "router",
    "model.layers.0.mlp.shared_expert_gate.bias": "not a matrix of a linear layer",
    "model.layers.0.linear_attn.in_proj_a.weight": "linear attention's small projection",
    "model.layers.0.linear_attn.in_proj_ba.weight": "linear attention's small projection",
    "model.layers.0.mixer.conv1d.weight": "convolution",
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight": "vision or audio part",
    "model.visual.blocks.0.attn.qkv.weight": "vision or audio part",
    "multi_modal_projector.linear_1.weight": "vision or audio part",
    "audio_tower.layers.0.fc1.weight": "vision or audio part",
    "mtp.layers.0.mlp.up_proj.weight": "multi-token prediction",
    "model.layers.0.self_attn.indexer.weights_proj.weight": "indexer's head weights",
    "model.layers.0.self_attn.q_norm.weight": "normalization",
    "model.some_table": "not a matrix of a linear layer",
    "model.layers.0.self_attn.q_proj.bias": "not a matrix of a linear layer",
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
def test_linear_layers_are_quantized(name, dtype):
    assert reason_to_leave(name, dtype, (64, 32), {"model_type": "llama", "vocab_size": 64}) is None


@pytest.mark.parametrize("name", LEFT)
def test_other_matrices_are_left(name):
    assert reason_to_leave(name, BF16, (64, 32), {"model_type": "llama"}) == LEFT[name]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((64, 24), BF16, "contraction no multiple of 16"),
        ((64, 0), BF16, "no values"),
        ((0, 16), BF16, "no values"),
        ((64,), BF16, "not a matrix of a linear layer"),
        ((4, 64, 32), BF16, "not a matrix of a linear layer"),
        ((64, 32), np.dtype(np.float64), "dtype float64"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(shape, dtype, reason):
    assert reason_to_leave("model.layers.0.mlp.up_proj.weight", dtype, shape, {}) == reason


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.feed_forward.experts.down_proj",
        "model.layers.0.mlp.experts.down_proj.weight",
    ],
)
def test_stacks_of_experts_are_left_because_their_axes_are_not_known(name):
    assert reason_to_leave(name, BF16, (4, 64, 32), {}).startswith("stack of experts: its names do not tell which axis")


def test_a_table_of_the_vocabulary_is_told_by_its_rows_outside_of_layers_only():
    config = {"vocab_size": 64}
    assert reason_to_leave("model.words.weight", BF16, (64, 32), config) == "as many rows as the vocabulary"
    assert reason_to_leave("model.words.weight", BF16, (32, 64), config) is None
    assert reason_to_leave("model.layers.0.mlp.up_proj.weight", BF16, (64, 32), config) is None
    nested = {"text_config": {"vocab_size": 64}}
    assert reason_to_leave("model.words.weight", BF16, (64, 32), nested) == "as many rows as the vocabulary"


def test_layers_beyond_the_last_are_for_multi_token_prediction():
    name = "model.layers.61.mlp.up_proj.weight"
    config = {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    assert reason_to_leave(name, BF16, (64, 32), config) == "multi-token prediction"
    assert reason_to_leave(name.replace("61", "60"), BF16, (64, 32), config) is None
    assert reason_to_leave(name, BF16, (64, 32), {"num_hidden_layers": 61}) is None


def test_linear_layers_that_are_stored_transposed():
    name = "transformer.h.0.attn.c_attn.weight"
    assert reason_to_leave(name, BF16, (64, 32), {"model_type": "gpt2"}) == "stored as [K, N]"
    assert reason_to_leave(name, BF16, (64, 32), {}).startswith("perhaps stored as [K, N]")
    assert reason_to_leave(name, BF16, (64, 32), {"model_type": "qwen"}) is None


@pytest.mark.parametrize("family", FUSED, ids=lambda family: family[0])
def test_every_family_is_a_group_in_its_own_parent(family):
    modules = {f"layers.{i}.x.{last}": 64 for i in range(2) for last in (*family, "other")}
    groups = sibling_groups(modules)
    assert groups == [
        group
        for i in range(2)
        for group in (tuple(f"layers.{i}.x.{last}" for last in family), (f"layers.{i}.x.other",))
    ]


def test_members_with_another_contraction_are_not_fused():
    assert sibling_groups({"attn2.to_q": 64, "attn2.to_k": 32, "attn2.to_v": 32}) == [
        ("attn2.to_q",),
        ("attn2.to_k", "attn2.to_v"),
    ]


def test_queries_without_a_low_rank_are_not_fused_with_the_latent_keys():
    assert sibling_groups({"a.q_proj": 64, "a.kv_a_proj_with_mqa": 64}) == [("a.q_proj",), ("a.kv_a_proj_with_mqa",)]


def test_patterns_match_tensors_and_modules():
    assert matches("*.q_proj", "a.b.q_proj.weight") and matches("a.*.weight", "a.b.q_proj.weight")
    assert not matches("q_proj", "a.b.q_proj.weight")


def test_a_pattern_that_matches_nothing():
    wanted = "exclude='*.qproj' matches no tensor: wanted a shell pattern for names such as 'a.q_proj.weight'; correct"
    with pytest.raises(ValueError, match="^" + re.escape(wanted)):
        refuse_unmatched_patterns(["a.*", "*.qproj"], ["b.weight", "a.q_proj.weight"])
