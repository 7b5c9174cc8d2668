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
    """Each by its name, or by what follows `nvfp4_` or `nvfp4_weight_only_`, as the row says that names are formed."""
    row = next(line for line in README.splitlines() if line.startswith("| recipes |"))
    assert "`nvfp4_...`" in row and "`nvfp4_weight_only_...`" in row
    endings = [name.removeprefix("nvfp4_").removeprefix("weight_only_") for name in jaxfp4.recipes.names()]
    listed = set(re.findall(r"`(\w+)`", row))
    missing = [n for n, e in zip(jaxfp4.recipes.names(), endings, strict=True) if n not in listed and e not in listed]
    assert not missing
    known = {*jaxfp4.recipes.names(), *endings, "Recipe", "Rule"}
    assert listed <= known, f"no such recipes: {sorted(listed - known)}"


def test_public_functions_of_the_contract_are_listed():
    for name in (
        "quantize",
        "fake_quantize",
        "block_amax",
        "global_amax",
        "plan",
        "calibrate",
        "make_calibrate_fn",
        "fold_channel_scales",
        "quantize_sequentially",
    ):
        assert f"`{name}`" in README
        assert callable(getattr(jaxfp4, name))
