"""The command line: what it writes, what it prints, and one clear line for bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from algorithms.models import drawn_decoder
from tokenizers import Tokenizer, models, pre_tokenizers

import jaxfp4
from jaxfp4.checkpoints import SafetensorsFile
from jaxfp4.cli import main
from jaxfp4.models import DecoderConfig, save_decoder

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_decoder(drawn_decoder(DecoderConfig.from_hf(CONFIG)), directory)
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (4, 16), dtype=np.int32))
    return path


def tensors(directory):
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: file.tensor(name).tobytes() for name in file.names()}


def test_work_on_files_starts_without_what_only_models_need():
    """Flax and Orbax would double the time in which `jaxfp4 quantize --weight-only` or `verify` starts."""
    program = """
import sys
import jaxfp4.cli, jaxfp4.commands.quantize_files, jaxfp4.commands.convert, jaxfp4.commands.verify
assert not {"flax", "orbax", "optax", "torch"} & sys.modules.keys(), sorted(sys.modules)
assert {"from_flax", "models", "plan"} <= set(dir(jaxfp4))
assert jaxfp4.from_flax is jaxfp4.models.from_flax
assert "flax" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match=r"^module 'jaxfp4' has no attribute 'form_flax'$"):
        jaxfp4.form_flax  # noqa: B018


def test_quantize_writes_the_same_weights_on_every_mesh(model_dir, tokens, tmp_path, capsys):
    arguments = ["quantize", str(model_dir), "", "--calib", str(tokens), "--batch-size", "2"]
    for name, mesh in {"one": [], "tp4ep2": ["--mesh", "tp=4,ep=2"], "ep4": ["--mesh", "ep=4"]}.items():
        arguments[2] = str(tmp_path / name)
        assert main([*arguments, *mesh]) == 0
    printed = capsys.readouterr().out
    assert "layers/0/mlp/experts/down_proj" in printed and "SNR (dB)" in printed
    one, others = tensors(tmp_path / "one"), [tensors(tmp_path / "tp4ep2"), tensors(tmp_path / "ep4")]
    weights = {name for name in one if not name.endswith("input_scale")}
    assert any(name.endswith("input_scale") for name in one)
    for other in others:
        assert other.keys() == one.keys()
        assert all(other[name] == one[name] for name in weights)
    quantization = json.loads((tmp_path / "one" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "NVFP4" and "lm_head" in quantization["exclude_modules"]


def test_weight_only_needs_no_data_and_text_calibrates_a_byte_level_model(model_dir, tmp_path):
    assert main(["quantize", str(model_dir), str(tmp_path / "w"), "--recipe", "nvfp4_weight_only"]) == 0
    assert not any(name.endswith("input_scale") for name in tensors(tmp_path / "w"))
    text = tmp_path / "text.py"
    text.write_text("import this\n" * 20)
    arguments = ["--calib", str(text), "--sequence-length", "32", "--expert-scale", "expert"]
    assert main(["quantize", str(model_dir), str(tmp_path / "t"), *arguments]) == 0
    scales = [
        np.frombuffer(v, np.float32)[0] for n, v in tensors(tmp_path / "t").items() if "up_proj.weight_scale_2" in n
    ]
    assert len(scales) == 4 and len(set(scales)) == 4


def damaged(tmp_path, name):
    path = tmp_path / name
    if name == "broken.npy":
        path.write_bytes(b"\x93NUMPY")
    elif name == "float.npy":
        np.save(path, np.ones((2, 3)))
    elif name == "flat.npy":
        np.save(path, np.ones(3, np.int32))
    elif name == "cube.npy":
        np.save(path, np.ones((1, 2, 3), np.int32))
    elif name == "broken.jsonl":
        path.write_text('{"text": "hello"}\n\n{"text": ')
    elif name == "odd.jsonl":
        path.write_text('{"body": "hello"}')
    elif name == "data.parquet":
        path.write_text("x")
    elif name == "large.npy":
        np.save(path, np.full((2, 3), 999, np.int32))
    elif name == "short.txt":
        path.write_text("x")
    return str(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "missing.npy: no such file"),
        ("missing.txt", "missing.txt: no such file"),
        ("broken.npy", "broken.npy: no readable .npy array"),
        ("float.npy", r"float.npy: an array of float64 with shape \(2, 3\); wanted int32 tokens \[rows, time\]"),
        ("cube.npy", r"with shape \(1, 2, 3\); wanted int32"),
        ("flat.npy", "flat.npy: not one row of 64 tokens: wanted more text or tokens, or a shorter"),
        ("large.npy", "large.npy, row 1: tokens from 999 to 999; wanted 0 to 255"),
        ("short.txt", "short.txt: not one row of 64 tokens: wanted more text"),
        ("broken.jsonl", "broken.jsonl, line 3: found '{\"text\":', which is no JSON"),
        ("odd.jsonl", "odd.jsonl, line 1: found the fields 'body': wanted 'text' or 'messages' or 'input_ids'"),
        ("data.parquet", "data.parquet: a .parquet file: wanted .npy, .jsonl"),
    ],
)
def test_bad_calibration_data_is_one_line(model_dir, tmp_path, capsys, name, message):
    out = tmp_path / "out"
    assert main(["quantize", str(model_dir), str(out), "--calib", damaged(tmp_path, name)]) == 2
    check_error(capsys, message, out)


def check_error(capsys, message, out):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("jaxfp4: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --calib FILE"),
        (["--recipe", "int8"], "recipe='int8': wanted a Recipe or one of nvfp4"),
        (["--mesh", "tp"], "--mesh tp: found 'tp'; wanted axis=size pairs"),
        (["--mesh", "tp=2,tp=4"], "an axis is named twice"),
        (["--mesh", "tp=3"], "axis 'tp' has size 3, which does not divide"),
        (["--mesh", "tp=64"], "needs 64 devices, found 8 cpu device"),
    ],
)
def test_bad_options_are_one_line(model_dir, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["quantize", str(model_dir), str(out), *arguments]) == 2
    check_error(capsys, message, out)


def test_bad_model_directories_are_one_line(model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(tmp_path / "nowhere"), str(out)]) == 2
    check_error(capsys, "nowhere", out)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**CONFIG, "model_type": "bert"}))
    assert main(["quantize", str(tmp_path / "odd"), str(out)]) == 2
    check_error(capsys, "'bert'", out)
    (tmp_path / "cut").mkdir()
    for name in ("config.json", "model.safetensors"):
        data = (model_dir / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(data if name == "config.json" else data[:-10])
    assert main(["quantize", str(tmp_path / "cut"), str(out), "--recipe", "nvfp4_weight_only"]) == 2
    check_error(capsys, "model.safetensors", out)


@pytest.mark.parametrize(
    ("recipe", "parts", "message"),
    [
        ("nvfp4_hadamard", ("out",), "is rotated in groups of 16, but no serving engine rotates"),
        ("nvfp4_kv_nvfp4", ("out",), "key-value cache in NVFP4, which compressed-tensors cannot state"),
        ("nvfp4", ("nowhere", "out"), "nowhere is no directory: wanted an existing one"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(model_dir, tokens, tmp_path, capsys, recipe, parts, message):
    out = tmp_path.joinpath(*parts)
    arguments = ["--recipe", recipe, "--calib", str(tokens), "--format", "compressed-tensors"]
    assert main(["quantize", str(model_dir), str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert "calibrating" not in captured.out
    assert message in captured.err and not out.exists()


def test_folded_channels_are_compared_with_folded_weights(model_dir, tokens, tmp_path, capsys):
    arguments = ["--recipe", "nvfp4_smoothquant", "--calib", str(tokens), "--batch-size", "2"]
    assert main(["quantize", str(model_dir), str(tmp_path / "out"), *arguments]) == 0
    rows = re.findall(r"4\.5\d [│ ]+ (-?\d+\.\d\d) ", capsys.readouterr().out)
    assert len(rows) > 3 and min(map(float, rows)) > 15


def test_host_memory_gives_the_same_checkpoint(model_dir, tokens, tmp_path, capsys):
    arguments, digests = ["--mesh", "tp=2,ep=2", "--all-experts"], set()
    for name, more in {"near": [], "far": ["--host-memory"]}.items():
        where = [str(model_dir), str(tmp_path / name), "--calib", str(tokens), "--batch-size", "2"]
        assert main(["quantize", *where, *arguments, *more]) == 0
        digests.add(re.search(r"digest (\w+)", capsys.readouterr().out)[1])
    assert len(digests) == 1


def test_an_existing_target_is_left_alone(model_dir, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["quantize", str(model_dir), str(tmp_path), "--recipe", "nvfp4_weight_only"]) == 2
    assert "exists already: wanted a directory to create" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def word_tokenizer(directory, words):
    """A tokenizer.json that splits at spaces, and its end of a sequence."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def test_text_wants_the_tokenizer_of_the_checkpoint(tmp_path, capsys):
    model, out = tmp_path / "m", tmp_path / "out"
    save_decoder(drawn_decoder(DecoderConfig.from_hf({**CONFIG, "vocab_size": 300})), model)
    (tmp_path / "data.jsonl").write_text('{"body": "a b c d e"}\n{"body": "e d c b a"}\n' * 8)
    arguments = ["quantize", str(model), str(out), "--calib", str(tmp_path / "data.jsonl"), "--calib-field", "body"]
    arguments += ["--samples", "4", "--sequence-length", "16", "--batch-size", "3", "--all-experts"]
    assert main(arguments) == 2
    check_error(capsys, "found no tokenizer in .*: wanted tokenizer.json; write it with transformers", out)
    word_tokenizer(model, "abcde")
    assert main(arguments) == 0
    assert "calibrating on 4 rows of 16 tokens with all experts" in capsys.readouterr().out


def test_all_experts_wants_experts(tmp_path, tokens, capsys):
    config = {k: v for k, v in CONFIG.items() if "expert" not in k and k != "architectures"} | {"model_type": "llama"}
    save_decoder(drawn_decoder(DecoderConfig.from_hf(config)), tmp_path / "m")
    out = tmp_path / "out"
    assert main(["quantize", str(tmp_path / "m"), str(out), "--calib", str(tokens), "--all-experts"]) == 2
    check_error(capsys, "all_experts: the model has no experts", out)


def test_numbers_and_version():
    for arguments in (["quantize", "a", "b", "--batch-size", "0"], ["nonsense"], []):
        with pytest.raises(SystemExit) as exit_status:
            main(arguments)
        assert exit_status.value.code == 2
    with pytest.raises(SystemExit) as exit_status:
        main(["--version"])
    assert exit_status.value.code == 0


SHORT_DEMO = """
import runpy, sys
from jaxfp4.commands import demo
demo.LENGTH = 64
sys.argv[0] = "jaxfp4"
runpy.run_module("jaxfp4", run_name="__main__")
"""


def test_demo_end_to_end_in_a_process_of_its_own(tmp_path):
    """Takes its time because it is the newcomer's first command: the whole job, on devices that it sets up itself.

    As `python -m jaxfp4 demo` does it, with rows of 64 bytes in place of 256.
    """
    out = tmp_path / "checkpoint"
    command = [sys.executable, "-W", "error", "-c", SHORT_DEMO, "demo", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count(" equal") == 4 and "DIFFERENT" not in result.stdout
    assert "bits per byte" in result.stdout and "SNR (dB)" in result.stdout
    assert len(tensors(out)) > 100
