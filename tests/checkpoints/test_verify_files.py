"""Directories with broken, missing and superfluous files: each is a finding, and nothing is followed out of them."""

import json
import os
import re

import numpy as np
import pytest
from checkpoint_files import CONFIG, Files, safetensors_bytes, small_model

import jaxfp4
from jaxfp4.checkpoints.verification.findings import has_errors
from jaxfp4.checkpoints.verification.verify import verify_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "checkpoint"
    jaxfp4.export_checkpoint(small_model()[1], directory, config=CONFIG)
    files = Files.read(directory)
    # One layer is enough here.
    files.jsons["config.json"]["num_hidden_layers"] = 1
    files.tensors = {name: values for name, values in files.tensors.items() if "layers.1." not in name}
    return files


@pytest.fixture
def sharded(good, tmp_path):
    """Two shards and an index."""
    Files({}, good.jsons).write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    names = list(good.tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file_name = f"model-0000{number}-of-00002.safetensors"
        (tmp_path / file_name).write_bytes(safetensors_bytes({name: good.tensors[name] for name in part}))
        weight_map.update(dict.fromkeys(part, file_name))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def edit_index(directory, change):
    content = json.loads((directory / INDEX).read_text())
    change(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


def findings_of(directory, check):
    findings = verify_checkpoint(directory)
    return [finding for finding in findings if finding.check == check], findings


def test_shards_are_read_through_their_index(sharded):
    assert verify_checkpoint(sharded) == []


def test_a_missing_shard_is_named_and_the_rest_is_checked(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    found, findings = findings_of(sharded, "missing-file")
    assert [(finding.subject, finding.found) for finding in found] == [
        ("model-00002-of-00002.safetensors", f"{INDEX} names it, and there is no such file")
    ]
    assert "incomplete-weight" in {finding.check for finding in findings}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "the file is truncated"),
        (lambda data: data[:5], "the file has 5 bytes, wanted at least the 8"),
        (lambda data: (10**15).to_bytes(8, "little") + data[8:], "the header's length is 1000000000000000 bytes"),
        (lambda data: data[:8] + b"?" + data[9:], "the header is no valid JSON"),
        (lambda data: data[:8].replace(data[:1], bytes([data[0] ^ 1])) + data[8:], ""),
    ],
)
def test_a_broken_file_is_an_error(sharded, damage, message):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    found, findings = findings_of(sharded, "broken-file")
    assert [finding.subject for finding in found] == [path.name]
    assert re.search(re.escape(message), found[0].found) and str(sharded) not in found[0].found
    assert has_errors(findings)


def test_only_one_broken_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors file")
    checks = [finding.check for finding in verify_checkpoint(tmp_path)]
    assert checks == ["broken-file", "no-config", "no-tokenizer", "no-nvfp4-weight"]


def test_an_index_that_disagrees_with_the_files(sharded):
    def change(weight_map):
        weight_map["nowhere.weight"] = "model-00001-of-00002.safetensors"
        del weight_map["lm_head.weight"]

    edit_index(sharded, change)
    found, _ = findings_of(sharded, "index")
    assert sorted((finding.subject, finding.found.split(",")[-1]) for finding in found) == [
        ("lm_head.weight", f" but {INDEX} does not place it there"),
        ("nowhere.weight", " which does not have it"),
    ]


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "notes.txt", 7, None])
def test_an_index_leads_nowhere_else(sharded, place):
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": place}))
    found, _ = findings_of(sharded, "index")
    assert f"is placed in {place!r}: wanted a .safetensors file beside the index" in [
        finding.found for finding in found
    ]


@pytest.mark.parametrize(
    ("text", "check", "message"),
    [
        ("{", "broken-json", "no valid JSON"),
        ("[" * 100_000, "broken-json", "no valid JSON"),
        ("[]", "broken-json", "holds a JSON list: wanted an object"),
        ("{}", "index", "weight_map is None: wanted an object"),
    ],
)
def test_a_broken_index(sharded, text, check, message):
    (sharded / INDEX).write_text(text)
    found, _ = findings_of(sharded, check)
    assert found[0].subject == INDEX and message in found[0].found


def test_an_index_with_a_repeated_key(sharded):
    text = (sharded / INDEX).read_text().replace('{"weight_map": {', '{"weight_map": {"lm_head.weight": "x", ', 1)
    (sharded / INDEX).write_text(text)
    found, _ = findings_of(sharded, "broken-file")
    assert "the key 'lm_head.weight' is there twice" in found[0].found


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("text", ["", "{'a': 1}", "3", b"\xff\xfe"])
def test_broken_configuration(good, tmp_path, name, text):
    good.write(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found, _ = findings_of(tmp_path, "broken-json")
    assert [finding.subject for finding in found] == [name]


def test_a_missing_config_json(good, tmp_path):
    good.write(tmp_path)
    (tmp_path / "config.json").unlink()
    checks = [finding.check for finding in verify_checkpoint(tmp_path)]
    assert sorted(checks) == ["no-config", "no-tokenizer", "one-quantization-config"]


def test_what_is_left_over(sharded):
    (sharded / "consolidated.safetensors").write_bytes(b"")
    (sharded / ".model.safetensors.1234.partial").write_bytes(b"")
    checks = [(finding.check, finding.subject) for finding in verify_checkpoint(sharded)]
    assert checks == [
        ("file-not-in-index", "consolidated.safetensors"),
        ("unfinished", ".model.safetensors.1234.partial"),
    ]


def test_an_unfinished_directory(good, tmp_path):
    found, _ = findings_of(good.write(tmp_path / ".out.12345678.partial"), "unfinished")
    assert [finding.subject for finding in found] == [".out.12345678.partial"]


def test_another_file_name(good, tmp_path):
    good.write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    found, findings = findings_of(tmp_path, "file-names")
    assert found[0].found.startswith("1 files, but no model.safetensors and no model.safetensors.index.json")
    assert not has_errors(findings)


def test_there_must_be_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such directory; wanted a checkpoint folder"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no \*.safetensors file and no model.safetensors.index.json"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_random_configuration_never_raises(good, tmp_path, seed):
    """Values of the configuration are replaced by values of other types."""
    rng = np.random.default_rng(seed)
    odd = [None, True, -1, 2.5, "re:[", "*", [], [[]], {}, {"a": None}, ["Linear", 3], {"group_0": {"weights": 3}}]

    def shaken(node):
        if rng.random() < 0.15:
            return odd[rng.integers(len(odd))]
        if isinstance(node, dict):
            return {key: shaken(value) for key, value in node.items()}
        return [shaken(value) for value in node] if isinstance(node, list) else node

    method = ["modelopt", "compressed-tensors"][seed % 2]
    config = {**good.jsons["config.json"], "quantization_config": {**good.quantization, "quant_method": method}}
    jsons = {"config.json": config, "hf_quant_config.json": good.jsons["hf_quant_config.json"]}
    files = Files(good.tensors, {name: shaken(content) for name, content in jsons.items()})
    assert all("\n" not in finding.found for finding in verify_checkpoint(files.write(tmp_path)))


@pytest.mark.parametrize("seed", range(40))
def test_random_dtypes_and_shapes_never_raise(good, tmp_path, seed):
    rng = np.random.default_rng(seed)
    tensors = dict(good.tensors)
    for name in rng.choice(list(tensors), 12, replace=False):
        choices = [
            lambda v: v.reshape(-1).view(np.uint8),
            lambda v: v[:0] if v.ndim else v,
            lambda v: v.reshape(1, *v.shape, 1),
            lambda v: np.zeros((3, 5, 7), np.uint8),
            lambda v: np.zeros((), bool),
            lambda v: np.zeros((2, 0), np.float64),
            lambda v: v.T,
        ]
        tensors[name] = np.asarray(choices[rng.integers(len(choices))](tensors[name]))
    for name in rng.choice(list(tensors), 6, replace=False):
        del tensors[name]
    assert has_errors(verify_checkpoint(Files(tensors, good.jsons).write(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(good, tmp_path):
    good.write(tmp_path)
    (tmp_path / "model.safetensors").chmod(0)
    assert findings_of(tmp_path, "broken-file")[0]
