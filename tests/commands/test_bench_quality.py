"""`jaxfp4 bench quality`: the figures it prints and writes, what it skips, and one line for bad input."""

import dataclasses
import json
import math

import pytest
from flax import nnx
from rich.console import Console

import jaxfp4
from jaxfp4.cli import main
from jaxfp4.commands import bench_quality
from jaxfp4.commands.bench_quality import Row, as_json, closed, quality_table
from jaxfp4.models import Decoder, load_builtin
from jaxfp4.recipes import Scheme
from jaxfp4.reports import OutputQuality


@pytest.fixture
def short(monkeypatch):
    """Little data, as the numbers are not the point here."""
    for name, value in {"HELD_OUT_ROWS": 2, "LENGTH": 32, "CALIBRATION_BATCHES": 1, "CALIBRATION_ROWS": 2}.items():
        monkeypatch.setattr(bench_quality, name, value)


def row(recipe, scheme, loss, weight_only=0):
    quality = OutputQuality(100, 1.25 + loss, 1.25, 0.01, loss / 8, 0.005, 0.01, 0.5, 0.9)
    return Row(recipe, scheme, 28, weight_only, quality, 1.0, 0.5)


ROWS = [
    row("nvfp4", Scheme.W4A4, 0.5),
    row("nvfp4_mse", Scheme.W4A4, 0.375),
    row("nvfp4_mixed", Scheme.W4A4, 0.75, weight_only=16),
    row("nvfp4_weight_only_mse", Scheme.W4A16, 0.125, weight_only=28),
]


def test_share_of_max_calibrations_loss_that_is_closed():
    assert [closed(r, ROWS) for r in ROWS] == [0, 0.25, -0.5, None]
    harmless = [row("nvfp4", Scheme.W4A4, 0.0), row("nvfp4_mse", Scheme.W4A4, -0.125)]
    assert [closed(r, harmless) for r in harmless] == [None, None]
    unusable = row("nvfp4_mse", Scheme.W4A4, float("nan"))
    assert closed(unusable, [*ROWS, unusable]) is None


def test_the_table_of_one_precision_is_sorted_by_kl():
    console = Console(width=160, record=True)
    console.print(quality_table(Scheme.W4A4, ROWS))
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert [c[0] for c in cells[2:]] == ["nvfp4_mse", "nvfp4", "nvfp4_mixed"]
    assert cells[2][1:] == ["1.6250", "0.3750 ± 0.0100", "25 %", "0.0469 ± 0.0050", "0.50", "90.0 %", "28", "1.5"]
    assert cells[4][-2] == "12 + 16 W4A16"


def first_layer():
    """The built-in model without its other layers."""
    model = load_builtin()
    config = dataclasses.replace(model.config, num_hidden_layers=1)
    graph, wanted = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    values = dict(nnx.to_flat_state(nnx.state(model)))
    return nnx.merge(graph, nnx.from_flat_state([(path, values[path]) for path, _ in nnx.to_flat_state(wanted)]))


def test_two_recipes_end_to_end(short, tmp_path, monkeypatch, capsys):
    """On one layer of the built-in model, as it is compiled three times."""
    monkeypatch.setattr(bench_quality, "load_builtin", first_layer)
    whole_plan = jaxfp4.plan

    def plan(*arguments, recipe):
        if recipe == "nvfp4_kv_fp8":
            raise ValueError("the model marks no keys\nand no values")
        return whole_plan(*arguments, recipe=recipe)

    monkeypatch.setattr(jaxfp4, "plan", plan)
    names = "nvfp4_weight_only, nvfp4_weight_only_mse,nvfp4_kv_fp8,nvfp4_weight_only"
    file = tmp_path / "quality.json"
    assert main(["bench", "quality", "--recipes", names, "--batches", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "skipped nvfp4_kv_fp8: the model marks no keys\n" in printed and "W4A4 recipe" not in printed
    written = json.loads(file.read_text())
    assert written["skipped"] == {"nvfp4_kv_fp8": "the model marks no keys"}
    assert list(written["recipes"]) == ["nvfp4_weight_only", "nvfp4_weight_only_mse"]
    for name, figures in written["recipes"].items():
        assert (
            figures["tokens"] == 2 * 2 * 31
            and figures["weights"] == figures["weight_only"] == 7
            and figures["quantize_seconds"] > 0
        )
        assert figures["bits"] - figures["reference_bits"] == figures["loss"]
        assert 0 < figures["median_kl"] < figures["mean_kl"] < figures["percentile_99_kl"] and figures["same_top"] > 0.5
        cells = [f"{figures['bits']:.4f}", f"{figures['loss']:.4f} ± {figures['loss_standard_error']:.4f}"]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name} "))
        assert all(cell in line for cell in cells)


def test_what_is_not_a_finite_number_is_null():
    lonely = row("nvfp4_mse", Scheme.W4A4, 0.5)
    lonely = dataclasses.replace(
        lonely, quality=dataclasses.replace(lonely.quality, loss_standard_error=math.nan, mean_kl=math.inf)
    )
    figures = as_json([lonely], {})["recipes"]["nvfp4_mse"]
    assert [name for name, value in figures.items() if value is None] == [
        "loss_standard_error",
        "mean_kl",
        "loss_closed",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "nvfp4,int8"], "--recipes nvfp4,int8: found 'int8'; wanted some of nvfp4, nvfp4_weight_only"),
        (["--recipes", ""], "found ''; wanted some of nvfp4"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: wanted a file in a directory that exists"),
        (["--json", "."], "--json .: wanted a file"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, message):
    assert main(["bench", "quality", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxfp4: error: ") and error.count("\n") == 1 and message in error


def test_no_recipe_that_fits_is_an_error(short, monkeypatch, capsys):
    def plan(*arguments, recipe):
        raise ValueError(f"nothing for {recipe}")

    monkeypatch.setattr(jaxfp4, "plan", plan)
    assert main(["bench", "quality", "--recipes", "nvfp4", "--batches", "1"]) == 2
    error = capsys.readouterr().err
    assert "--recipes: none fits the built-in model; nvfp4: nothing for nvfp4; choose others" in error


def test_bench_wants_to_know_which():
    for arguments in (["bench"], ["bench", "speed"], ["bench", "quality", "--batches", "0"]):
        with pytest.raises(SystemExit) as exit_status:
            main(arguments)
        assert exit_status.value.code == 2
