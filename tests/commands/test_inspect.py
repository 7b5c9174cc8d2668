"""`jaxfp4 inspect`: what is printed, the JSON file and the picture."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from checkpoint_files import CONFIG, plain_files, small_model
from rich.console import Console

import jaxfp4
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.inspect_checkpoint import run_inspect


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    params, qparams = small_model(input_scale=None)
    directory = tmp_path_factory.mktemp("model")
    plain_files(params).write(directory / "original")
    jaxfp4.export_checkpoint(qparams, directory / "checkpoint", config=CONFIG)
    return directory


def run(directory, **options):
    console = Console(width=160, record=True, file=io.StringIO())
    assert run_inspect(directory / "checkpoint", console=console, **options) == 0
    return console.export_text()


def test_the_table_and_the_totals(model):
    text = run(model)
    assert "W4A16" in text and "bf16" in text and "SNR" not in text
    assert "parameters in NVFP4" in text and text.count("self_attn.q_proj") == 1
    assert run(model, every=True).count("self_attn.q_proj") == 2
    assert "SNR (dB)" in run(model, original=model / "original")


def test_json(model, tmp_path):
    run(model, json_file=tmp_path / "out.json", original=model / "original")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["format"] == "modelopt" and len(content["weights"]) == 36
    assert content["weights"][0]["signal_to_noise_db"] > 20


def test_the_picture(model, tmp_path):
    pytest.importorskip("matplotlib")
    text = run(model, picture=tmp_path / "scales.png")
    data = (tmp_path / "scales.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    assert [path.name for path in tmp_path.iterdir()] == ["scales.png"]
    assert "picture written to" in text


def test_a_picture_that_cannot_be_written_leaves_nothing(model, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")

    def fail(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        run(model, picture=tmp_path / "scales.png")
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_refused_before_anything_is_read(model, tmp_path, monkeypatch):
    with pytest.raises(CommandError, match=r"--picture \S+x.jpg: wanted a name that ends in .png; rename it"):
        run(model, picture=tmp_path / "x.jpg")
    for option in ("picture", "json_file"):
        with pytest.raises(CommandError, match=r"--\w+ \S+: wanted a file in a directory that exists; create it"):
            run(model, **{option: tmp_path / "no" / "x.png"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"matplotlib is not installed; .*pip install 'jaxfp4\[notebooks\]'"):
        run(model, picture=tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(model / "nowhere")
