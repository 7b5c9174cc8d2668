"""Reading and writing checkpoints: names, slices, placement, and every way in which a folder can be wrong."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import FAMILIES, auto_mesh, golden, hf_config, small_config, small_decoder, write_config
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from jaxfp4.checkpoints import TensorName, open_checkpoint
from jaxfp4.models import checkpoint_names, hf_layout, load_decoder, parameter_shapes, read_config, save_decoder
from jaxfp4.models.hf_layout import assemble


def flat(model):
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.fixture
def folder(tmp_path):
    save_decoder(small_decoder(small_config()), tmp_path)
    return tmp_path


def test_names():
    names = checkpoint_names(small_config(mlp_only_layers=[0]))
    assert set(names) == set(parameter_shapes(small_config(mlp_only_layers=[0])))
    assert names["embed/embedding"] == TensorName("model.embed_tokens", transpose=False)
    assert names["lm_head/kernel"] == TensorName("lm_head", transpose=True)
    assert names["norm/scale"] == TensorName("model.norm", transpose=False)
    assert names["layers/0/input_norm/scale"] == TensorName("model.layers.0.input_layernorm", transpose=False)
    assert names["layers/0/attention/q_proj/kernel"] == TensorName("model.layers.0.self_attn.q_proj", transpose=True)
    assert names["layers/0/mlp/up_proj/kernel"] == TensorName("model.layers.0.mlp.up_proj", transpose=True)
    assert names["layers/1/mlp/router/kernel"] == TensorName("model.layers.1.mlp.gate", transpose=True)
    assert names["layers/1/mlp/experts/down_proj"] == TensorName(
        "model.layers.1.mlp.experts.{expert}.down_proj", transpose=True
    )


@pytest.mark.parametrize(
    ("model_type", "settings", "path", "module", "more"),
    [
        ("qwen2", {}, "attention/q_proj/bias", "self_attn.q_proj", {"parameter": "bias"}),
        ("llama", {"attention_bias": True}, "attention/o_proj/bias", "self_attn.o_proj", {"parameter": "bias"}),
        ("llama", {"mlp_bias": True}, "mlp/down_proj/bias", "mlp.down_proj", {"parameter": "bias"}),
        ("qwen3", {}, "attention/k_norm/scale", "self_attn.k_norm", {}),
        ("mistral", {}, "mlp/up_proj/kernel", "mlp.up_proj", {"transpose": True}),
        ("mixtral", {}, "mlp/router/kernel", "block_sparse_moe.gate", {"transpose": True}),
        ("mixtral", {}, "mlp/experts/gate_proj", "block_sparse_moe.experts.{expert}.w1", {"transpose": True}),
        ("mixtral", {}, "mlp/experts/up_proj", "block_sparse_moe.experts.{expert}.w3", {"transpose": True}),
        ("mixtral", {}, "mlp/experts/down_proj", "block_sparse_moe.experts.{expert}.w2", {"transpose": True}),
    ],
)
def test_names_of_the_families(model_type, settings, path, module, more):
    names = checkpoint_names(small_config(model_type, **settings))
    assert names[f"layers/0/{path}"] == TensorName(f"model.layers.0.{module}", **more)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_survives_the_round_trip_in_shards_onto_a_mesh(model_type, tmp_path):
    """From files of bfloat16 with an index, each device reading its own part: the same bits."""
    model = small_decoder(small_config(model_type), jnp.bfloat16)
    save_decoder(model, tmp_path, max_shard_bytes=4000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "model.safetensors").exists()
    assert all(file.stat().st_size < 4000 + 2000 for file in files)
    again = load_decoder(tmp_path, mesh=auto_mesh(tp=2, ep=2), dtype=jnp.float32)
    assert again.config == model.config
    after = flat(again)
    for path, value in flat(model).items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(after[path]))
    for path in after:
        if path.endswith(("q_proj/kernel", "q_proj/bias")):
            assert {shard.data.shape[-1] for shard in after[path].addressable_shards} == {16}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3_moe"])
def test_a_golden_checkpoint_survives_the_round_trip(name, tmp_path):
    save_decoder(load_decoder(golden(name, "hf"), mesh=auto_mesh(tp=4, ep=2)), tmp_path)
    before, after = open_checkpoint(golden(name, "hf")), open_checkpoint(tmp_path)
    assert set(before.names()) == set(after.names())
    for tensor in before.names():
        assert before.info(tensor) == after.info(tensor)
        np.testing.assert_array_equal(before.tensor(tensor), after.tensor(tensor))
    assert read_config(tmp_path) == read_config(golden(name, "hf"))


def test_each_device_holds_its_slice_of_the_transposed_stack(folder):
    mesh = auto_mesh(tp=4, ep=2)
    loaded = flat(load_decoder(folder, mesh=mesh))
    stack = loaded["layers/1/mlp/experts/down_proj"]
    assert stack.sharding == NamedSharding(mesh, P("ep", "tp", None))
    checkpoint = open_checkpoint(folder)
    for shard in stack.addressable_shards:
        experts = range(4)[shard.index[0]]
        for row, expert in enumerate(experts):
            stored = checkpoint.tensor(f"model.layers.1.mlp.experts.{expert}.down_proj.weight")
            np.testing.assert_array_equal(np.asarray(shard.data)[row], stored.T[shard.index[1]])


def test_placed_and_unplaced_parameters_are_equal(folder):
    plain, placed = flat(load_decoder(folder)), flat(load_decoder(folder, mesh=auto_mesh(tp=2, ep=4)))
    for path, value in plain.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(placed[path]))


@pytest.mark.parametrize("axes", [{}, {"tp": 2, "ep": 2}])
def test_parameters_that_wait_in_host_memory(folder, axes):
    mesh = auto_mesh(**axes) if axes else None
    near, far = flat(load_decoder(folder, mesh=mesh)), flat(load_decoder(folder, mesh=mesh, memory_kind="pinned_host"))
    for path, value in near.items():
        assert far[path].sharding == value.sharding.with_memory_kind("pinned_host")
        np.testing.assert_array_equal(np.asarray(value), np.asarray(far[path]))


def test_types(folder, tmp_path_factory):
    assert {leaf.dtype for leaf in flat(load_decoder(folder)).values()} == {jnp.dtype(jnp.float32)}
    half = load_decoder(folder, dtype=jnp.bfloat16, mesh=auto_mesh(tp=2))
    assert {leaf.dtype for leaf in flat(half).values()} == {jnp.dtype(jnp.bfloat16)}
    again = tmp_path_factory.mktemp("half")
    save_decoder(half, again)
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    for path, leaf in flat(load_decoder(again)).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flat(half)[path]))


def test_parameters_do_not_alias_the_file(folder):
    before = flat(load_decoder(folder))
    kept = {path: np.array(leaf) for path, leaf in before.items()}
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4096:] = bytes(4096)
    (folder / "model.safetensors").write_bytes(bytes(data))
    for path, leaf in before.items():
        np.testing.assert_array_equal(np.asarray(leaf), kept[path])


def test_shards_listed_by_an_index(folder):
    before = flat(load_decoder(folder))
    checkpoint = open_checkpoint(folder)
    tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}
    weight_map = {}
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path, leaf in flat(load_decoder(folder)).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(before[path]))


def test_saving_replaces_and_leaves_nothing_else(folder):
    save_decoder(small_decoder(small_config("llama", num_hidden_layers=1)), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert load_decoder(folder).config.model_type == "llama"


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_saving_in_another_layout_removes_the_files_of_the_earlier_one(tmp_path):
    config = small_config("llama", num_hidden_layers=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = flat(small_decoder(config))
    names = {}
    for limit in (2000, None, 4000):
        save_decoder(small_decoder(config), tmp_path, max_shard_bytes=limit)
        names[limit] = sorted(file.name for file in tmp_path.iterdir())
        for path, leaf in flat(load_decoder(tmp_path)).items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(before[path]))
    assert names[None] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert len(names[2000]) > len(names[4000]) > 4
    assert {"model.safetensors.index.json", "tokenizer.json"} <= set(names[2000]) & set(names[4000])


def test_a_failure_leaves_the_earlier_checkpoint(folder, monkeypatch):
    before = contents(folder)

    def full(directory, tensors, max_shard_bytes):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_layout, "write_tensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_decoder(small_decoder(), folder)
    assert contents(folder) == before and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("limit", [0, 1.5, True, "5GB"])
def test_max_shard_bytes_is_checked(limit, tmp_path):
    with pytest.raises(ValueError, match=f"^max_shard_bytes is {limit!r}, wanted a positive integer, or None"):
        save_decoder(small_decoder(), tmp_path / "new", max_shard_bytes=limit)
    assert not (tmp_path / "new").exists()


def test_a_type_that_cannot_be_stored(tmp_path):
    config = small_config("llama", num_hidden_layers=1)
    values = {path: jnp.zeros(shape, jnp.int4) for path, shape in parameter_shapes(config).items()}
    with pytest.raises(ValueError, match=r"^embed/embedding: dtype int4 cannot be stored in safetensors; wanted a"):
        save_decoder(assemble(config, values), tmp_path / "new")


def _rewrite(folder, change):
    """Replaces model.safetensors by `change` of its tensors."""
    checkpoint = open_checkpoint(folder)
    tensors = change({name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()})
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {name: a for name, a in t.items() if ".0.down_proj" not in name},
            "tensor 'model.layers.0.mlp.experts.0.down_proj.weight' is missing (2 are)",
        ),
        (
            lambda t: t | {"model.norm.weight": np.ones(15, np.float32)},
            "tensor 'model.norm.weight' has shape (15,), wanted (16,) by config.json",
        ),
        (
            lambda t: t | {"lm_head.weight": t["lm_head.weight"].astype(np.int8)},
            "tensor 'lm_head.weight' has dtype int8, wanted float32, bfloat16, float16; an already quantized",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)},
            "tensor 'model.layers.0.self_attn.q_proj.bias' belongs to no parameter of this model (1 such)",
        ),
    ],
    ids=["missing", "shape", "dtype", "unknown"],
)
def test_tensors_that_do_not_fit(folder, change, message):
    _rewrite(folder, change)
    with pytest.raises(ValueError, match="^" + re.escape(f"{folder}: {message}")):
        load_decoder(folder)


def test_stored_rotary_frequencies_are_passed_over(folder):
    before = flat(load_decoder(folder))
    names = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    _rewrite(folder, lambda t: t | {name: np.ones(4, np.float32) for name in names})
    for path, leaf in flat(load_decoder(folder)).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(before[path]))


def test_a_tied_head_that_is_stored_must_equal_the_embeddings(tmp_path):
    config = small_config("llama", tie_word_embeddings=True, vocab_size=2500, num_hidden_layers=1)
    save_decoder(small_decoder(config), tmp_path)
    assert "lm_head.weight" not in open_checkpoint(tmp_path).names()
    _rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert "lm_head/kernel" not in flat(load_decoder(tmp_path))
    message = re.escape(f"{tmp_path}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', but tie_word_")
    for head in (lambda table: np.vstack([table[:-1], table[:1]]), lambda table: table[:-1]):
        _rewrite(tmp_path, lambda t, head=head: t | {"lm_head.weight": head(t["model.embed_tokens.weight"])})
        with pytest.raises(ValueError, match="^" + message):
            load_decoder(tmp_path)


def test_a_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{file}: tensor ") + ".* the file is truncated$"):
        load_decoder(folder)


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: there is no such directory; wanted a checkpoint folder"):
        load_decoder(tmp_path / "absent")


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config.json; wanted a Hugging Face checkpoint folder"):
        load_decoder(tmp_path)


def test_no_weights(tmp_path):
    write_config(tmp_path, hf_config())
    with pytest.raises(FileNotFoundError, match=r"there is neither model.safetensors nor model.safetensors.index.json"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: no valid JSON (Expecting property name"),
        ("[" * 100_000, "config.json: no valid JSON (maximum recursion"),
        ("[1]", "config.json: holds a JSON list: wanted an object"),
        ('{"model_type": "gpt2"}', "config.json: model config: model_type is 'gpt2', which is not supported"),
    ],
    ids=["broken", "deep", "list", "unknown"],
)
def test_bad_config(tmp_path, text, message):
    write_config(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_decoder(tmp_path)


def test_config_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config.json: no valid JSON \('utf-8' codec"):
        load_decoder(tmp_path)


def test_no_parameter_is_read_whole(folder, monkeypatch):
    """Each callback asks for its shard alone: the bytes copied out of the file are one copy of each split parameter."""
    sizes = []
    original = hf_layout._part

    def counting(stored, name, index):
        part = original(stored, name, index)
        sizes.append((name.module, part.size))
        return part

    monkeypatch.setattr(hf_layout, "_part", counting)
    load_decoder(folder, mesh=auto_mesh(tp=8))
    assert max(size for module, size in sizes if module == "lm_head") == 16 * 32 // 8


def test_assembled_parameters_are_taken_as_they_are():
    config = small_config("llama", num_hidden_layers=1)
    values = {path: jnp.zeros(shape, jnp.float16) for path, shape in parameter_shapes(config).items()}
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(nnx.state(assemble(config, values), nnx.Param)))
