"""`jaxfp4 bench model`: figures that agree, digests that are equal, and what is said when they are not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxfp4.cli import main
from jaxfp4.commands.bench_kernels.timing import Timing
from jaxfp4.commands.bench_model import command, decoders, layers, memory, report
from jaxfp4.commands.bench_model.calibration import BOTH, CALIBRATE, FORWARD, measure_calibration
from jaxfp4.commands.bench_model.command import ModelChoice, bench_model
from jaxfp4.commands.bench_model.scaling import DigestResult, MeshTiming, ScalingResult, mesh_of

ONE_LAYER = dataclasses.replace(layers.TINY, layers=1)


def run(parts, tmp_path, capsys):
    """What is printed and what is written."""
    file = tmp_path / "model.json"
    assert main(["bench", "model", "--parts", parts, "--size", "tiny", "--devices", "2", "--json", str(file)]) == 0
    return capsys.readouterr().out, json.loads(file.read_text())


def test_scaling_end_to_end(tmp_path, capsys):
    printed, written = run("scaling,memory", tmp_path, capsys)
    assert "efficiencies of scaling nothing" in printed and "skipped: this platform does not say" in printed
    assert list(written) == ["environment", "memory", "seconds", "scaling"]
    assert written["environment"]["devices"] == "8" and written["memory"] is None
    assert [f"scaling on tp={tp} ep={ep}: " in printed for tp, ep in [(1, 1), (2, 1), (1, 2), (2, 2)]] == [1, 1, 1, 0]
    scaling = written["scaling"]
    assert [(mesh["tp"], mesh["ep"]) for mesh in scaling["meshes"]] == [(1, 1), (2, 1), (1, 2)]
    first = scaling["meshes"][0]["timing"]["median"]
    for mesh in scaling["meshes"]:
        assert mesh["efficiency"] == first / mesh["timing"]["median"] and mesh["timing"]["samples"] == 3
        assert mesh["host"]["median"] > 0 and f"| tp={mesh['tp']} ep={mesh['ep']} " in printed
    assert scaling["sizes"]["weights"] == 20


def test_digests_end_to_end(tmp_path, capsys):
    printed, written = run("digest", tmp_path, capsys)
    places = written["digest"]["by_place"]
    assert list(places) == [f"cpu, {where}" for where in ("one device", "tp=1 ep=1", "tp=2 ep=1", "tp=1 ep=2")]
    assert len(set(places.values())) == 1 and written["digest"]["equal"] and places["cpu, one device"] in printed


def test_other_digests_are_said_and_the_status_is_1(monkeypatch):
    wrong = DigestResult({"gpu, one device": "aa", "gpu, tp=2 ep=1": "ab"})
    monkeypatch.setattr(command, "measure_digests", lambda devices, layers: wrong)
    console = Console(width=200, record=True)
    assert bench_model(console, ModelChoice(parts="digest"), None) == 1
    text = console.export_text()
    assert "DIFFERENT" in text and "digests DIFFER" in text


def test_a_part_that_fails_does_not_take_the_others_along(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("out of memory\nfor good")

    monkeypatch.setattr(command, "measure_scaling", fails)
    monkeypatch.setattr(command, "measure_digests", lambda *_: DigestResult({"gpu, one device": "aa"}))
    console, file = Console(width=200, record=True), tmp_path / "a.json"
    assert bench_model(console, ModelChoice(parts="scaling,digest"), file) == 1
    assert "scaling FAILED: RuntimeError: out of memory" in console.export_text()
    written = json.loads(file.read_text())
    assert written["scaling"] == {"error": "RuntimeError: out of memory"} and written["digest"]["equal"]


def test_without_a_cpu_beside_the_accelerator(monkeypatch, capsys):
    def devices(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return [dataclasses.make_dataclass("Device", ["platform", "device_kind"])("gpu", "gpu")]

    monkeypatch.setattr(jax, "devices", devices)
    assert main(["bench", "model", "--parts", "digest"]) == 2
    assert "wanted the CPU beside the accelerator" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4), (2, 2)], ids=str)
def test_each_device_holds_as_much_on_every_mesh(sizes):
    mesh = mesh_of(*sizes, jax.devices())
    shapes = ONE_LAYER.shapes(*sizes)
    local = {name: place.shard_shape(shape) for name, shape, place in ONE_LAYER.places(mesh)}
    assert local == ONE_LAYER.shapes(1, 1) and list(local) == list(shapes)
    assert sum(map(np.prod, local.values())) * 2 == ONE_LAYER.bytes_per_device


def test_drawn_parameters_are_placed_and_differ():
    (drawn,) = ONE_LAYER.drawn(mesh_of(1, 2, jax.devices()))
    assert drawn["expert_up"].sharding.spec == jax.P("ep", None, "tp") and drawn["q"].dtype == jnp.bfloat16
    assert not bool(jnp.all(drawn["gate"] == drawn["up"]))
    assert 0.015 < float(jnp.std(drawn["q"].astype(jnp.float32))) < 0.025


def test_sizes():
    assert 1.05e9 < decoders.FULL.parameters < 1.2e9
    assert 8e9 < layers.FULL.bytes_per_device < 9e9 and layers.FULL.weights == 80


class Device:
    """One that says how much memory is in use."""

    def __init__(self, stats):
        self.stats = list(stats)

    def memory_stats(self):
        return self.stats.pop(0)


def test_memory_figures(monkeypatch):
    """The first is asked whether it tells, then twice before and twice after."""
    figures = [(0, 5), (90, 0), (0, 95), (0, 97), (40, 0)]
    full = Device({"bytes_in_use": use, "peak_bytes_in_use": peak} for use, peak in figures)
    less = Device([{"bytes_in_use": 1, "peak_bytes_in_use": 1}] * len(figures))
    monkeypatch.setattr(memory, "_devices", lambda count: [full, less][:count])
    result = memory.measure_memory(decoders.TINY, 2)
    assert (result.before, result.peak_before, result.peak, result.after, result.added) == (90, 95, 97, 40, 7)
    config = decoders.TINY.config
    assert result.largest_group == 2 * config.hidden_size * config.intermediate_size * 2 // 2 and result.holds
    assert 0.5 < result.parameters / decoders.TINY.parameters / 2 < 0.6
    console = Console(width=200, record=True)
    console.print(report.memory_table(result))
    assert "peak above what was in use before" in console.export_text()
    assert not dataclasses.replace(result, peak=90 + result.largest_group + 1).holds
    assert report.memory_as_json(result)["added"] == 7


def test_efficiency_is_the_time_on_one_device_over_that_on_more():
    def mesh(tp, seconds):
        return MeshTiming(tp, 1, Timing.of([seconds]), 1.0, Timing.of([0.001]))

    result = ScalingResult(layers.TINY, (mesh(1, 0.9), mesh(2, 1.0)))
    assert [result.efficiency(one) for one in result.meshes] == [1, 0.9]


def test_calibration_beside_the_forward_pass():
    small = dataclasses.replace(decoders.TINY, config=dataclasses.replace(decoders.TINY.config, num_hidden_layers=1))
    result = measure_calibration(small, samples=2, builds=1)
    assert result.observed == 7 and set(result.programs) == {FORWARD, CALIBRATE, BOTH}
    for name, program in result.programs.items():
        assert program.run.samples == 2 and program.build_seconds > program.compile.median > 0
        assert result.time_ratio(name) == program.run.median / result.programs[FORWARD].run.median
    written = report.calibration_as_json(result)
    assert written["programs"][FORWARD]["time_over_forward"] == 1 and written["parameters"] == small.parameters
    assert written["programs"][CALIBRATE]["build_over_forward"] == result.build_ratio(CALIBRATE)
    console = Console(width=200, record=True)
    console.print(report.calibration_table(result))
    assert "at most 1.1 x" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "memory,speed"], "--parts memory,speed: found 'speed'; wanted some of memory, digest"),
        (["--devices", "64"], "--devices 64: found 8 cpu device(s); wanted at most that"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: wanted a file in a directory that exists"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, message):
    assert main(["bench", "model", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxfp4: error: ") and error.count("\n") == 1 and message in error
