"""Which axis splits which parameter, and what happens where a mesh does not fit."""

import re

import pytest
from decoder_cases import auto_mesh, hf_config, small_config, write_config
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.models import load_decoder, parameter_shapes, partition_specs, shardings
from jaxfp4.models.train import CONFIG

SPECS = {
    "embed/embedding": P("tp", None),
    "lm_head/kernel": P(None, "tp"),
    "norm/scale": P(),
    "layers/0/input_norm/scale": P(),
    "layers/0/post_attention_norm/scale": P(),
    "layers/0/attention/q_norm/scale": P(),
    "layers/0/attention/k_norm/scale": P(),
    "layers/0/attention/q_proj/kernel": P(None, "tp"),
    "layers/0/attention/k_proj/kernel": P(None, "tp"),
    "layers/0/attention/v_proj/kernel": P(None, "tp"),
    "layers/0/attention/o_proj/kernel": P("tp", None),
    "layers/0/mlp/gate_proj/kernel": P(None, "tp"),
    "layers/0/mlp/up_proj/kernel": P(None, "tp"),
    "layers/0/mlp/down_proj/kernel": P("tp", None),
    "layers/1/mlp/router/kernel": P(),
    "layers/1/mlp/experts/gate_proj": P("ep", None, "tp"),
    "layers/1/mlp/experts/up_proj": P("ep", None, "tp"),
    "layers/1/mlp/experts/down_proj": P("ep", "tp", None),
}


def test_every_parameter_has_its_spec():
    specs = partition_specs(small_config(mlp_only_layers=[0]))
    assert {path: spec for path, spec in specs.items() if path in SPECS} == SPECS
    assert set(specs) == set(SPECS) | {
        path.replace("layers/0", "layers/1") for path in SPECS if "attention" in path
    } | {"layers/1/input_norm/scale"}


@pytest.mark.parametrize(
    ("model_type", "settings", "split", "whole"),
    [
        ("qwen2", {}, "qkv", ""),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "qkv gate up", "o down"),
        ("qwen3_moe", {"attention_bias": True}, "qkv", "o"),
        ("mixtral", {}, "", ""),
    ],
)
def test_a_bias_is_split_with_the_outputs_of_its_kernel(model_type, settings, split, whole):
    config = small_config(model_type, num_hidden_layers=1, **settings)
    specs = {path: spec for path, spec in partition_specs(config).items() if path.endswith("bias")}

    def paths(names):
        names = names.replace("qkv", "q k v").split()
        return [f"layers/0/{'mlp' if len(name) > 1 else 'attention'}/{name}_proj/bias" for name in names]

    assert specs == dict.fromkeys(paths(split), P("tp")) | dict.fromkeys(paths(whole), P())
    shapes = parameter_shapes(config)
    assert all(shapes[path] == shapes[path.replace("bias", "kernel")][-1:] for path in specs)


def test_shapes():
    shapes = parameter_shapes(small_config(mlp_only_layers=[0]))
    assert shapes["embed/embedding"] == (32, 16)
    assert shapes["lm_head/kernel"] == (16, 32)
    assert shapes["layers/1/attention/k_proj/kernel"] == (16, 16)
    assert shapes["layers/0/mlp/down_proj/kernel"] == (48, 16)
    assert shapes["layers/1/mlp/router/kernel"] == (16, 4)
    assert shapes["layers/1/mlp/experts/up_proj"] == (4, 16, 32)
    assert shapes["layers/1/mlp/experts/down_proj"] == (4, 32, 16)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tp": 8}, P(None, None, "tp")),
        ({"ep": 2}, P("ep", None, None)),
        ({"dp": 2, "fsdp": 2}, P(None, None, None)),
        ({"dp": 2, "tp": 2, "ep": 2}, P("ep", None, "tp")),
    ],
    ids=str,
)
def test_an_axis_that_the_mesh_lacks_is_left_out(sizes, expected):
    mesh = auto_mesh(**sizes)
    placed = shardings(small_config(), mesh)
    assert placed["layers/0/mlp/experts/up_proj"] == NamedSharding(mesh, expected)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (
            {"ep": 8},
            {},
            "mesh: axis 'ep' has size 8, which does not divide dimension 0 (size 4) of layers/0/mlp/experts/",
        ),
        (
            {"tp": 4},
            {"vocab_size": 30},
            "mesh: axis 'tp' has size 4, which does not divide dimension 0 (size 30) of embed/embedding; use a size of "
            "'tp' that divides 30",
        ),
    ],
    ids=["ep", "tp"],
)
def test_an_axis_that_does_not_divide_is_refused(sizes, changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        shardings(small_config(**changes), auto_mesh(**sizes))


def test_the_built_in_widths_split_over_eight_in_whole_blocks():
    mesh = auto_mesh(tp=8)
    placed, shapes = shardings(CONFIG, mesh), parameter_shapes(CONFIG)
    down = "layers/0/mlp/experts/down_proj"
    assert placed[down].shard_shape(shapes[down]) == (8, 16, 128)
    out = "layers/0/attention/o_proj/kernel"
    assert placed[out].shard_shape(shapes[out]) == (16, 128)


def test_load_checks_the_mesh_before_it_reads(tmp_path):
    write_config(tmp_path, hf_config())
    with pytest.raises(ValueError, match=r"^mesh: axis 'ep' has size 8"):
        load_decoder(tmp_path, mesh=auto_mesh(ep=8))
