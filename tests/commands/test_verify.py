"""`jaxfp4 verify`: what is printed, the JSON file and the exit status."""

import contextlib
import io
import json

import numpy as np
import pytest
from checkpoint_files import CONFIG, Files, small_model
from rich.console import Console

import jaxfp4
from jaxfp4.cli import main
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.verify import run_verify


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good") / "checkpoint"
    jaxfp4.export_checkpoint(small_model()[1], directory, config=CONFIG)
    return directory


def run(directory, **options):
    """`(exit status, what was printed)`."""
    console = Console(width=160, record=True, file=io.StringIO())
    return run_verify(directory, console=console, **options), console.export_text()


def test_a_good_checkpoint(good):
    status, text = run(good)
    assert status == 0
    assert text.splitlines()[-1].endswith("checkpoint: 0 errors, 0 warnings, 1 note")
    assert "no-tokenizer" in text


def test_errors_are_folded_and_set_the_status(good, tmp_path):
    files = Files.read(good)
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}.gate_proj.weight_scale_2"
        files.tensors[name] = files.tensors[name] * np.float32(2 + expert)
    status, text = run(files.write(tmp_path), json_file=tmp_path / "out.json")
    assert status == 1
    assert text.index("errors") < text.index("notes")
    assert "and 3 more" in text and "experts.3." in text and "experts.0." not in text
    assert text.splitlines()[-1].endswith("4 errors, 0 warnings, 1 note")
    content = json.loads((tmp_path / "out.json").read_text())
    assert [finding["severity"] for finding in content["findings"]].count("error") == 4
    assert content["findings"][-1].keys() == {"severity", "check", "subject", "found", "engines", "fix"}
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_names_that_no_terminal_shows_are_escaped(good, tmp_path):
    """Standard output in UTF-8 cannot take half a character, which JSON can write."""
    files = Files.read(good)
    files.jsons["hf_quant_config.json"]["producer"] = {"name": "a\ud800", "version": 1}
    files.quantization["producer"] = {"name": "a\ud800", "version": 1}
    files.write(tmp_path / "files")
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(output):
        assert main(["inspect", str(tmp_path / "files")]) == 0
    assert b"a\\ud800 1" in output.buffer.getvalue()


def test_numbers_of_thousands_of_digits_are_no_numbers(good, tmp_path):
    """Python reads no such integer; it is a name as any other."""
    files = Files.read(good)
    files.tensors[f"model.layers.{'9' * 5000}.mlp.gate.weight"] = np.zeros((4, 32), np.float32)
    files.tensors[f"model.layers.0.mlp.experts.{'9' * 5000}.up.weight"] = np.zeros((4, 32), np.float32)
    files.tensors = {name: files.tensors[name] for name in sorted(files.tensors)}
    status, text = run(files.write(tmp_path / "files"))
    assert status == 1 and "unlisted-module" in text


def test_ranks(good):
    assert run(good, tensor_parallel="2, 16")[0] == 0
    status, text = run(good, tensor_parallel="32")
    assert status == 1 and "tensor-parallel-split" in text
    for bad in ("0", "", "2,,4", "x", "-1", "²"):
        with pytest.raises(CommandError, match=r"--tp .*: found '.*'; wanted positive numbers such as 2,8; correct"):
            run(good, tensor_parallel=bad)


def test_markup_in_names_is_printed_as_it_is(tmp_path):
    files = Files({"[bold].weight_scale_2": np.asarray(np.float32(1))}, {"config.json": {}})
    status, text = run(files.write(tmp_path))
    assert status == 1 and "[bold]" in text


def test_a_broken_file_is_an_error_and_no_traceback(good, tmp_path):
    files = Files.read(good)
    path = files.write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    status, text = run(tmp_path)
    assert status == 1 and "broken-file" in text


def test_bad_input_raises_before_anything_is_read(good, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        run(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "no" / "out.json"):
        with pytest.raises(CommandError, match=r"--json \S+: wanted a file in a directory that exists; create it or"):
            run(good, json_file=path)
