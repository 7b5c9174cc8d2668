"""The figures of a checkpoint against those of the arrays that it was made from."""

import io
import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import CONFIG, SIZE, Files, plain_files, small_model
from rich.console import Console

import jaxfp4
from jaxfp4.checkpoints import TensorName
from jaxfp4.reports import weight_quality
from jaxfp4.reports.checkpoint_report import decibels, energies, inspect_checkpoint
from jaxfp4.reports.checkpoint_table import as_json, checkpoint_table, ranges, totals
from jaxfp4.reports.scale_picture import EXPONENTS, layer_shares, scale_picture
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.fp8_tensor import quantize_fp8

FORMATS = ["modelopt", "compressed-tensors"]
OUT = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """`(directory with the original and both formats, the error of each weight by its name)`."""
    params, qparams = small_model()
    directory = tmp_path_factory.mktemp("model")
    plain_files(params).write(directory / "original")
    for file_format in FORMATS:
        jaxfp4.export_checkpoint(qparams, directory / file_format, format=file_format, config=CONFIG)
    quality = {row.path.replace("/", ".").removesuffix(".weight"): row for row in weight_quality(params, qparams)}
    return directory, quality


def printed(*what):
    console = Console(width=160, record=True, file=io.StringIO())
    for one in what:
        console.print(one)
    return console.export_text()


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_error_is_that_of_weight_quality(model, file_format):
    directory, quality = model
    report = inspect_checkpoint(directory / file_format, original=directory / "original")
    found = {weight.name: weight for weight in report.weights if weight.scheme == "W4A4"}
    assert found.keys() == quality.keys()
    for name, weight in found.items():
        assert weight.signal_to_noise == pytest.approx(quality[name].signal_to_noise, abs=1e-3)
        assert weight.shape == (SIZE, SIZE)
        assert weight.nbytes == SIZE * SIZE // 2 + SIZE * SIZE // 16 + 8
        assert weight.amax == pytest.approx(2688 * weight.global_scale)
        assert 3 < weight.amax < 7  # of 65,536 normal values or of twice as many
        assert weight.input_scale == pytest.approx(1e-3)
    assert (report.file_format, report.not_compared) == (file_format, 0)


def test_totals(model):
    directory, _ = model
    report = inspect_checkpoint(directory / "modelopt")
    quantized = 32 * SIZE * SIZE
    plain = 2 * (4 + 1) * SIZE + 2 * 32 * SIZE  # routers and norms, embedding and head
    assert (report.quantized_values, report.values) == (quantized, quantized + plain)
    assert report.nbytes == 32 * (SIZE * SIZE * 9 // 16 + 8) + 2 * plain
    assert report.bits == pytest.approx(8 * report.nbytes / report.values)
    assert report.compression == pytest.approx(2 * report.values / report.nbytes)
    version = jaxfp4.__version__
    assert totals(report) == [
        f"format modelopt, producer jaxfp4 {version}, key-value cache not quantized",
        f"{report.nbytes:,} bytes for {report.values:,} parameters: {report.bits:.2f} bits each, "
        f"{report.compression:.2f} times smaller than in 16 bits",
        f"{quantized:,} parameters in NVFP4, {plain:,} not",
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_norms_that_are_not_the_originals_are_named(model, tmp_path, dtype):
    directory, _ = model
    params, _ = small_model()
    layers = params["model"]["layers"]
    for layer, value in (("0", 1.001), ("1", 2.0)):  # the first is 1 in the checkpoint's bfloat16
        layers[layer]["input_layernorm"]["weight"] = jnp.full(SIZE, value, dtype)
    plain_files(params).write(tmp_path / "original")
    report = inspect_checkpoint(directory / "modelopt", original=tmp_path / "original")
    name = "model.layers.1.input_layernorm.weight"
    assert report.changed == (name,) and as_json(report)["changed"] == [name]
    assert f"1 norms or biases differ from the original's, such as '{name}': where AWQ" in totals(report)[-1]
    same = inspect_checkpoint(directory / "modelopt", original=directory / "original")
    assert same.changed == () and "differ" not in "".join(totals(same))
    assert inspect_checkpoint(directory / "modelopt").changed == ()


def test_like_layers_and_experts_are_one_row(model):
    directory, _ = model
    report = inspect_checkpoint(directory / "modelopt", original=directory / "original")
    table = checkpoint_table(report)
    names = list(table.columns[0].cells)
    assert names == [
        *(f"model.layers.0-1.mlp.experts.0-3.{name}_proj" for name in ("down", "gate", "up")),
        *(f"model.layers.0-1.self_attn.{name}_proj" for name in "koqv"),
        "lm_head",
        "model.embed_tokens",
        "model.layers.0-1.mlp.gate",
    ]
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[4][1:4] == ("256x256", "W4A4", "4.50")
    assert [column.header for column in table.columns][-2:] == ["SNR (dB)", "least"]
    assert float(rows[4][-2]) >= float(rows[4][-1]) > 20
    assert rows[7][1:] == ("32x256", "bf16", "16.00", *[""] * 8)
    every = checkpoint_table(report, every=True)
    assert len(every.rows) == 32 + 4 and OUT in every.columns[0].cells
    assert max(map(len, printed(table).splitlines())) <= 160


def test_energies_in_plain_numpy():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 32)).astype(ml_dtypes.bfloat16)
    codes = rng.integers(0, 256, (3, 16), dtype=np.uint8)
    scales = rng.integers(0, 126, (3, 2), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    q = np.empty((3, 32), np.float32)
    for i in range(3):
        for j in range(32):
            code = codes[i, j // 2] >> 4 if j % 2 else codes[i, j // 2] & 15
            q[i, j] = values[code] * np.float32(scales[i, j // 16]) * np.float32(0.25)
    wide = w.astype(np.float64)
    found = energies(w, codes, scales, np.float32(0.25))
    np.testing.assert_allclose(found, [(wide**2).sum(), ((wide - q) ** 2).sum()], rtol=1e-6)


def test_pieces_of_rows_add_up(monkeypatch):
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (9, 16), np.uint8), rng.integers(1, 126, (9, 2), np.uint8)
    w = rng.normal(size=(9, 32)).astype(np.float32)
    whole = energies(w, codes, scales, np.float32(1))
    monkeypatch.setattr("jaxfp4.reports.checkpoint_report._PIECE_VALUES", 64)
    np.testing.assert_allclose(energies(w, codes, scales, np.float32(1)), whole, rtol=1e-6)


def test_decibels_at_the_edges():
    assert decibels(1.0, 0.0) == math.inf
    assert math.isnan(decibels(0.0, 1.0))
    assert ranges(set()) == "" and ranges({3}) == "3"


def test_json_is_complete_and_has_no_nan(model, tmp_path):
    directory, _ = model
    files = Files.read(directory / "modelopt")
    files.tensors[f"{OUT}.weight_scale_2"] = np.asarray(np.float32(np.nan))
    report = inspect_checkpoint(files.write(tmp_path), original=directory / "original")
    content = json.loads(json.dumps(as_json(report), allow_nan=False))
    weights = {weight["name"]: weight for weight in content["weights"]}
    assert weights[OUT]["global_scale"] is None and weights[OUT]["signal_to_noise_db"] is None
    other = weights["model.layers.1.self_attn.o_proj"]
    assert other["signal_to_noise_db"] > 20 and sum(other["code_counts"]) == SIZE * SIZE
    assert sum(other["scale_counts"]) == other["blocks"] == SIZE * SIZE // 16
    assert content["quantized_parameters"] == 32 * SIZE * SIZE


def test_an_original_that_does_not_fit(model, tmp_path):
    directory, _ = model
    original = Files.read(directory / "original")
    fewer = {name: values for name, values in original.tensors.items() if OUT not in name}
    Files(fewer, {}).write(tmp_path / "fewer")
    report = inspect_checkpoint(directory / "modelopt", original=tmp_path / "fewer")
    assert report.not_compared == 1
    assert totals(report)[-1] == "1 NVFP4 weights have no counterpart in the original and were not compared"
    Files({"x.weight": np.ones((2, 2), np.float32)}, {}).write(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"other: has none of the 32 quantized weights, such as 'model\S+weight'; want"
    ):
        inspect_checkpoint(directory / "modelopt", original=tmp_path / "other")
    Files(original.tensors | {f"{OUT}.weight": np.ones((2, 2), np.float32)}, {}).write(tmp_path / "shape")
    with pytest.raises(ValueError, match=rf"tensor '{OUT}.weight' has shape \(2, 2\): wanted \(256, 256\), that of"):
        inspect_checkpoint(directory / "modelopt", original=tmp_path / "shape")
    with pytest.raises(ValueError, match=r"original: no NVFP4 weight among 38 tensors; wanted a quantized model"):
        inspect_checkpoint(directory / "original")


def test_pictured_shares(model):
    pytest.importorskip("matplotlib")
    report = inspect_checkpoint(model[0] / "modelopt")
    shares = layer_shares(report)
    assert len(shares) == 7 and list(shares["model.layers.{layer}.mlp.experts.{expert}.up_proj"]) == [0, 1]
    for of_layer in shares.values():
        for share in of_layer.values():
            assert share.sum() == pytest.approx(1) and share.shape == (len(EXPONENTS),)
            # Block amax of normal values lies between a fifth of the global amax and all of it.
            assert share[EXPONENTS.index(7) :].sum() + share[EXPONENTS.index(6)] > 0.9
    figure = scale_picture(report)
    assert sum(axes.get_visible() and bool(axes.images) for axes in figure.axes) == 7


@pytest.fixture(scope="module")
def rectangular(tmp_path_factory):
    """`(checkpoint, original)`: a layer's experts, in two spellings, and FP8 weights; the original one by one."""
    rng = np.random.default_rng(0)
    tree, original = {}, {}
    for e in range(3):
        for i, (last, shape) in enumerate({"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}.items()):
            w = rng.normal(size=shape).astype(np.float32) * (1 + e + i)
            original[f"mlp.experts.{e}.{last}.weight"] = w
            tree[f"mlp/experts/{e}/{last}"] = QuantizedWeight(jaxfp4.quantize(jnp.asarray(w), -1))
    original["mlp.wide.weight"] = rng.normal(size=(32, 64)).astype(np.float32)
    tree["mlp/wide"] = QuantizedWeight(quantize_fp8(jnp.asarray(original["mlp.wide.weight"]), -1), jnp.float32(1))
    directory = tmp_path_factory.mktemp("rectangular")
    names = {path: TensorName(path.replace("/", ".")) for path in tree}
    jaxfp4.export_checkpoint(tree, directory / "checkpoint", names=names, config=CONFIG)
    return directory / "checkpoint", original


def signals(checkpoint, directory, original):
    """`{module: (signal, noise)}` of what was compared."""
    report = inspect_checkpoint(checkpoint, original=Files(original, {}).write(directory))
    return {w.name: (w.signal, w.noise) for w in report.weights if w.signal is not None}


def stacked(original, order):
    """The experts in two stacks, `[E, out, in]` transposed by `order`, gate in front of up."""
    one = [[original[f"mlp.experts.{e}.{last}_proj.weight"] for e in range(3)] for last in ("gate", "up", "down")]
    gate_up = np.concatenate([np.stack(one[0]), np.stack(one[1])], 1)
    others = {name: values for name, values in original.items() if "experts" not in name}
    return others | {
        "mlp.experts.gate_up_proj": np.ascontiguousarray(gate_up.transpose(order)),
        "mlp.experts.down_proj": np.ascontiguousarray(np.stack(one[2]).transpose(order)),
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["out first", "in first"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_an_original_with_stacks_of_experts_in_any_float_format(rectangular, tmp_path, dtype, order):
    checkpoint, original = rectangular
    original = {name: values.astype(dtype) for name, values in original.items()}
    wanted = signals(checkpoint, tmp_path / "one", original)
    assert len(wanted) == 10 and all(0 < noise < signal / 50 for signal, noise in wanted.values())
    found = signals(checkpoint, tmp_path / "stacks", stacked(original, order))
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        np.testing.assert_allclose(found[name], pair, rtol=1e-6, err_msg=name)


def test_the_error_of_fp8_weights(rectangular, tmp_path):
    checkpoint, original = rectangular
    signal, noise = signals(checkpoint, tmp_path / "one", original)["mlp.wide"]
    w = original["mlp.wide.weight"]
    q = np.asarray(quantize_fp8(jnp.asarray(w), -1).dequantize(jnp.float32))
    np.testing.assert_allclose((signal, noise), (np.sum(w**2), np.sum((w - q) ** 2)), rtol=1e-6)


def test_stacks_that_do_not_tell_where_a_weight_is_are_not_compared(rectangular, tmp_path):
    checkpoint, original = rectangular
    stacks = stacked(original, (0, 1, 2))
    gate_up, down = stacks["mlp.experts.gate_up_proj"], stacks["mlp.experts.down_proj"]
    doubtful = {
        "alternating": {"mlp.experts.gate_up_proj_bias": np.ones((3, 96), np.float32)},
        "shape": {"mlp.experts.gate_up_proj": gate_up[:, 1:]},
        "experts": {"mlp.experts.gate_up_proj": gate_up[:0]},
        "integers": {"mlp.experts.gate_up_proj": gate_up.astype(np.int32)},
        "matrix": {"mlp.experts.gate_up_proj": gate_up[0]},
    }
    for name, changes in doubtful.items():
        found = signals(checkpoint, tmp_path / name, stacks | changes)
        assert sorted(found) == [*(f"mlp.experts.{e}.down_proj" for e in range(3)), "mlp.wide"], name
    files = Files.read(checkpoint)
    for e in range(3):  # a square weight
        module = f"mlp.experts.{e}.down_proj"
        files.tensors[f"{module}.weight"] = files.tensors[f"{module}.weight"][:48]
        files.tensors[f"{module}.weight_scale"] = files.tensors[f"{module}.weight_scale"][:48]
    found = signals(files.write(tmp_path / "square"), tmp_path / "o", stacks | {"mlp.experts.down_proj": down[:, :48]})
    assert sum("experts" in name for name in found) == 6 and not any("down_proj" in name for name in found)
