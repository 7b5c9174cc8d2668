"""The README's example runs, prints the table that the README shows, and its commands exist."""

import re
from pathlib import Path

import jaxfp4

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_the_example_runs_and_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert block("text").strip() in printed
    assert (tmp_path / "mlp-nvfp4" / "model.safetensors").is_file()


def test_the_recipes_are_all_listed():
    assert all(f"`{name}`" in README for name in jaxfp4.recipes.names())


def test_public_functions_of_the_contract_are_listed():
    for name in ("quantize", "fake_quantize", "block_amax", "global_amax", "plan", "calibrate", "make_calibrate_fn"):
        assert f"`{name}`" in README
        assert callable(getattr(jaxfp4, name))
