"""`jaxfp4 bench kernels`: figures that agree with each other, wrong results that are found, one line for bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quantize_last_axis
from rich.console import Console

from jaxfp4.cli import main
from jaxfp4.commands.bench_kernels import naive, reference
from jaxfp4.commands.bench_kernels.command import Choice, bench_kernels, chosen_cases
from jaxfp4.commands.bench_kernels.libraries import Rival, versions
from jaxfp4.commands.bench_kernels.operations import OPERATIONS
from jaxfp4.commands.bench_kernels.parts import equal_share, parts_of
from jaxfp4.commands.bench_kernels.sizes import SIZES, weight
from jaxfp4.commands.bench_kernels.timing import Clock, Timing, in_sequence

QUICK = Choice(operations="global_amax", sizes="tiny", quick=True)


def test_quick_run_end_to_end(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    names = "global_amax,quantize_experts"
    assert main(["bench", "kernels", "--quick", "--operations", names, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert set(written) == {"environment", "bytes_per_second", "cases", "skipped", "seconds"}
    assert written["environment"]["platform"] == jax.default_backend() and written["environment"]["jax"]
    assert all(rate > 0 for rate in written["bytes_per_second"].values())
    cases = [(case["operation"], case["size"]) for case in written["cases"]]
    experts = "tiny_experts"
    assert cases == [("global_amax", "tiny"), ("global_amax", experts), ("quantize_experts", experts)]
    for case in written["cases"]:
        values = np.prod(case["shape"])
        assert case["correct"] and case["as_expected"] == 1 and case["error"] is None
        ours, copy, naive_ = case["ours"], case["copy"], case["naive"]
        assert 0 < ours["low"] <= ours["median"] <= ours["high"] and ours["samples"] >= 3
        assert case["share_of_copy"] == copy["median"] / ours["median"]
        assert case["naive_over_ours"] == naive_["median"] / ours["median"] and case["naive_equal"] > 0.98
        once = case["operation"] == "global_amax"
        wanted = (2 * values, 4) if once else (4 * values, values * 9 // 16 + 4 * 4)
        assert (case["bytes_read"], case["bytes_written"]) == wanted
        assert f"| {case['operation']} " in printed


def broken(operation, change):
    """An operation whose result is changed."""

    def ours(*arguments):
        return jax.tree.map(
            lambda part: part.at[-1].add(change) if part.ndim else part + change, operation.ours(*arguments)
        )

    return dataclasses.replace(operation, ours=ours)


@pytest.mark.parametrize(("name", "change"), [("block_and_global_amax", 1), ("global_amax", -1)])
def test_a_wrong_result_is_found_and_not_timed(name, change, tmp_path):
    both = {name: OPERATIONS[name] for name in ("global_amax", "block_and_global_amax")}
    operations = {**both, name: broken(OPERATIONS[name], change)}
    console, file = Console(width=200, record=True), tmp_path / "a.json"
    assert bench_kernels(console, Choice(sizes="tiny", quick=True), file, operations, libraries=[]) == 1
    text = console.export_text()
    assert "WRONG: " in text and f"wrong or failed: {name} tiny" in text
    wrong, right = sorted(json.loads(file.read_text())["cases"], key=lambda case: case["correct"])
    assert wrong["as_expected"] < 1 and wrong["ours"] is None and wrong["share_of_copy"] is None
    assert right["as_expected"] == 1 and right["ours"]["median"] > 0


def test_matmuls_read_the_packed_weight_and_are_checked(tmp_path):
    operations = {"matmul_1": OPERATIONS["matmul_1"], "matmul_16": broken(OPERATIONS["matmul_16"], 1)}
    file = tmp_path / "a.json"
    assert bench_kernels(Console(), Choice(sizes="tiny", quick=True), file, operations, libraries=[]) == 1
    right, wrong = sorted(json.loads(file.read_text())["cases"], key=lambda case: case["operation"])
    assert (right["as_expected"], wrong["ours"]) == (1, None) and wrong["as_expected"] < 1
    k, n = SIZES["tiny"].shape
    assert (right["bytes_read"], right["bytes_written"]) == (k * n * 9 // 16 + 4 + 2 * k, 4 * n)


def test_an_operation_that_fails_is_shown():
    def fails(x):
        raise ValueError("no such shape\nfor it")

    operations = {"global_amax": dataclasses.replace(OPERATIONS["global_amax"], ours=fails)}
    console = Console(width=200, record=True)
    assert bench_kernels(console, QUICK, None, operations, libraries=[]) == 1
    text = console.export_text()
    assert "ValueError: no such shape" in text and "for it" not in text


class Other:
    """A library with one function right, one wrong and one that fails."""

    name = "other"

    @property
    def versions(self):
        return {"other": "1.5"}

    def begin(self, operations):
        assert operations == {"global_amax"}

    def rivals(self, operation):
        def alone(x):
            return (np.asarray(x.astype(jnp.float32)),)

        def parts(result):
            return {"amax": jnp.float32(result)}

        return [
            Rival("right", alone, lambda x: np.abs(x).max(), parts),
            Rival("wrong", alone, lambda x: np.abs(x).mean(), parts, "another thing", once=True),
            Rival("failing", alone, lambda x: x.no_such_method(), parts),
        ]

    def time(self, call, arguments, clock):
        return clock.repeat(lambda given: call(*given), arguments)

    def wait(self, result):
        return result


def test_other_libraries_are_compared_and_differences_shown(tmp_path):
    console, file = Console(width=200, record=True), tmp_path / "a.json"
    assert bench_kernels(console, QUICK, file, libraries=[Other()]) == 0
    written = json.loads(file.read_text())
    assert written["environment"]["other"] == "1.5"
    (case,) = written["cases"]
    right, wrong, failing = case["rivals"]
    assert right["same"] and right["equal"] == 1 and not wrong["same"] and wrong["equal"] == 0
    assert right["over_ours"] == right["timing"]["median"] / case["ours"]["median"]
    assert wrong["timing"]["samples"] == 1 and failing["timing"] is None and "no_such_method" in failing["error"]
    text = console.export_text()
    assert "0 % DIFFERS" in text and "other wrong: another thing" in text and "failed" in text


def test_cases_past_the_time_limit_are_skipped(capsys):
    choice = dataclasses.replace(QUICK, time_limit=0)
    console = Console(width=200, record=True)
    assert bench_kernels(console, choice, None, libraries=[]) == 0
    assert "skipped global_amax tiny: past the limit of 0 s" in console.export_text()


def test_what_is_chosen_by_default():
    on_cpu = [(o.name, s.name) for o, s in chosen_cases(Choice(), OPERATIONS, on_accelerator=False)]
    assert {o for o, s in on_cpu if s == "small"} == {n for n, o in OPERATIONS.items() if not o.stacks}
    assert ("quantize_experts", "small_experts") in on_cpu and ("mse", "small_experts") not in on_cpu
    on_gpu = [(o.name, s.name) for o, s in chosen_cases(Choice(), OPERATIONS, on_accelerator=True)]
    assert {s for _, s in on_gpu} == {"1b", "8b", "70b", "experts"} and ("mse", "8b") in on_gpu
    quick = [(o.name, s.name) for o, s in chosen_cases(Choice(quick=True), OPERATIONS, on_accelerator=True)]
    assert ("quantize_experts", "tiny_experts") in quick and ("quantize", "tiny_experts") not in quick
    assert quick[0] == ("global_amax", "tiny") and not OPERATIONS[quick[-1][0]].everywhere


@pytest.mark.parametrize("axis", [-1, -2])
def test_both_references_are_the_formats_definition(axis):
    """Against the tests' own quantizer, on all rows."""
    x = weight(SIZES["tiny"], 3)
    rows = np.asarray(x if axis == -1 else x.T).astype(np.float32)
    packed, scales, scale = quantize_last_axis(rows)
    expected = reference.quantized(rows, np.abs(rows).max())
    assert np.array_equal(expected["packed"], packed) and np.array_equal(expected["scales"], scales)
    simple = jax.jit(lambda x: naive.quantize(x, axis, naive.global_amax(x)))(x)
    given = {"packed": packed, "scales": scales.view(simple["scales"].dtype)}
    turned = {name: jnp.asarray(part if axis == -1 else part.T) for name, part in given.items()}
    assert equal_share(turned, simple) > 0.99 and simple["global_scale"] == scale


def test_shares_of_equal_entries():
    codes = {"packed": jnp.array([0x12, 0x34], jnp.uint8), "scales": jnp.array([1.0, 2.0], jnp.float8_e4m3fn)}
    other = {"packed": jnp.array([0x12, 0x35], jnp.uint8), "scales": jnp.array([0x38, 0x40], jnp.uint8)}
    assert equal_share(codes, codes) == 1 and equal_share(codes, other) == 0.75
    assert equal_share({"values": jnp.ones(4)}, {"values": jnp.array([1, 1.0000001, 1.1, jnp.nan])}) == 0.5
    assert equal_share(codes, parts_of(jnp.ones(2))) == 0 == equal_share({"values": jnp.ones(4)}, parts_of(jnp.ones(2)))


def test_sums_may_be_off_by_a_share_of_the_largest():
    ours, wanted = {"values": np.array([10.0, 1.5, -1.0])}, {"values": np.array([10.0, 1.0, -1.0])}
    assert reference.equal_share(ours, wanted) == pytest.approx(2 / 3)
    assert reference.equal_share(ours, wanted, tolerance=0.05) == 1
    assert reference.equal_share({"values": np.full(3, np.nan)}, wanted, tolerance=0.05) == 0


def test_several_runs_in_one_launch_are_all_there():
    results = jax.jit(in_sequence(lambda x: x + 1))((jnp.float32(1),), (jnp.float32(2),))
    assert [float(r) for r in results] == [2, 3]


def test_queued_calls_share_a_wait():
    clock = Clock(asynchronous=True, seconds=0.001)
    timing = clock.time(jax.jit(lambda x: x * 2), [(jnp.ones(8),), (jnp.zeros(8),)], runs=2)
    assert timing.calls >= 4 and timing.calls % 2 == 0 and 0 < timing.low <= timing.median <= timing.high
    assert clock.in_batches(lambda calls: 3.0 * calls) == Timing(3.0, 3.0, 3.0, 3, 2)


def test_versions_of_what_is_there():
    assert list(versions(["jax", "no-such-distribution"])) == ["jax"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "quantize,sort"], "--operations quantize,sort: found 'sort'; wanted some of global_amax,"),
        (["--sizes", "huge"], "--sizes huge: found 'huge'; wanted some of tiny, tiny_experts"),
        (["--sizes", ""], "found ''; wanted some of tiny"),
        (["--sizes", "tiny", "--operations", "quantize_experts"], "none of them is defined for any of the sizes"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: wanted a file in a directory that exists"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, message):
    assert main(["bench", "kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxfp4: error: ") and error.count("\n") == 1 and message in error
