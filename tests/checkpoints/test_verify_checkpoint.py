"""One defect at a time is planted in a good checkpoint, and exactly its finding appears."""

import copy
import dataclasses
import re
from collections import Counter

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import CONFIG, SIZE, Files, small_model
from golden_models import GOLDEN, needs_golden

import jaxfp4
from jaxfp4.checkpoints.verification.findings import Severity, fold, has_errors
from jaxfp4.checkpoints.verification.verify import verify_checkpoint
from jaxfp4.tensors import QuantizedWeight

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
E4M3 = ml_dtypes.float8_e4m3fn
LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
ROUTER = f"{LAYER}.mlp.gate"


def expert(number, name="gate"):
    return f"{LAYER}.mlp.experts.{number}.{name}_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Our export of one small model in both formats."""
    _, qparams = small_model()
    found = {}
    for file_format in (MODELOPT, COMPRESSED):
        directory = tmp_path_factory.mktemp("good") / file_format
        jaxfp4.export_checkpoint(qparams, directory, format=file_format, config=CONFIG)
        found[file_format] = Files.read(directory)
    return found


def counted(findings):
    return Counter((finding.severity.value, finding.check) for finding in findings)


NO_TOKENIZER = ("note", "no-tokenizer")
NOT_SGLANG = {("warning", "algorithm-not-in-sglang"): 2}
"""Once for each of Model-Optimizer's two files."""


@pytest.mark.parametrize("file_format", [MODELOPT, COMPRESSED])
def test_our_export_is_clean(good, tmp_path, file_format):
    assert counted(verify_checkpoint(good[file_format].write(tmp_path))) == {NO_TOKENIZER: 1}
    (tmp_path / "tokenizer.json").write_text("{}")
    assert verify_checkpoint(tmp_path, tensor_parallel=[2, 4, 8, 16]) == []


@pytest.mark.parametrize("weight_only", ["all", "experts"])
@pytest.mark.parametrize("file_format", [MODELOPT, COMPRESSED])
def test_our_weight_only_and_mixed_exports_are_clean(tmp_path, file_format, weight_only):
    _, qparams = small_model()

    def without_input_scale(path, leaf):
        chosen = isinstance(leaf, QuantizedWeight) and (weight_only == "all" or "experts" in jax.tree_util.keystr(path))
        return dataclasses.replace(leaf, input_scale=None) if chosen else leaf

    is_weight = {"is_leaf": lambda node: isinstance(node, QuantizedWeight)}
    qparams = jax.tree_util.tree_map_with_path(without_input_scale, qparams, **is_weight)
    jaxfp4.export_checkpoint(qparams, tmp_path / "out", format=file_format, config=CONFIG)
    not_sglang = NOT_SGLANG if file_format == MODELOPT else {}
    assert counted(verify_checkpoint(tmp_path / "out")) == {**not_sglang, NO_TOKENIZER: 1}


@needs_golden
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tiny_llama", {("warning", "rows-multiple"): 4}),
        (
            "tiny_qwen3_moe",
            {
                ("warning", "rows-multiple"): 36,
                ("warning", "tensor-parallel-split"): 16,
                ("note", "expert-contraction-multiple"): 48,
            },
        ),
    ],
)
def test_model_optimizers_export_has_no_errors(name, wanted):
    findings = verify_checkpoint(GOLDEN / name / "modelopt")
    assert counted(findings) == {**wanted, NO_TOKENIZER: 1}
    assert not has_errors(findings)


# What follows changes `Files` in place.


def times(name, factor):
    def change(files):
        files.tensors[name] = (files.tensors[name] * np.float32(factor)).astype(np.float32)

    return change


def put(name, value):
    """Another value for every element."""

    def change(files):
        files.tensors[name] = np.full_like(files.tensors[name], value)

    return change


def replace(name, make):
    def change(files):
        files.tensors[name] = np.asarray(make(files.tensors[name]))

    return change


def remove(pattern):
    def change(files):
        matching = [name for name in files.tensors if re.fullmatch(pattern, name)]
        assert matching
        for name in matching:
            del files.tensors[name]

    return change


def add(name, values):
    def change(files):
        assert name not in files.tensors
        files.tensors[name] = np.asarray(values)

    return change


def scale_bytes(name, codes):
    """The first block scales get these E4M3 codes."""

    def change(values):
        changed = values.view(np.uint8).copy()
        changed.reshape(-1)[: len(codes)] = codes
        return changed.view(E4M3)

    return replace(name, change)


def both_files(**entries):
    """Model-Optimizer's entries, in config.json under the names that it uses there."""

    def change(files):
        for key, value in entries.items():
            files.details[key] = value
            other = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}.get(key, key)
            files.quantization[other] = value

    return change


def config(**entries):
    return lambda files: files.jsons["config.json"].update(entries)


def quantization(**entries):
    return lambda files: files.quantization.update(entries)


def group(part, **entries):
    return lambda files: files.quantization["config_groups"]["group_0"][part].update(entries)


def unlisted(name):
    """No longer excluded, in either file."""

    def change(files):
        files.quantization["ignore"].remove(name)
        if "hf_quant_config.json" in files.jsons:
            files.details["exclude_modules"].remove(name)

    return change


def listed(name):
    def change(files):
        files.quantization["ignore"].append(name)
        if "hf_quant_config.json" in files.jsons:
            files.details["exclude_modules"].append(name)

    return change


def unquantized(module):
    def change(files):
        remove(re.escape(module) + r"\..*")(files)
        files.tensors[f"{module}.weight"] = np.ones((SIZE, SIZE), ml_dtypes.bfloat16)

    return change


def mixed(drop=(), extra=()):
    """MIXED_PRECISION in both files, every quantized module listed."""

    def change(files):
        modules = [name.removesuffix(".weight_scale") for name in files.tensors if name.endswith(".weight_scale")]
        layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in [*modules, *extra] if name not in drop}
        both_files(quant_algo="MIXED_PRECISION", quantized_layers=layers)(files)

    return change


def chain(*changes):
    def change(files):
        for one in changes:
            one(files)

    return change


def codes_with(byte):
    return lambda files: put(f"{OUT}.weight", byte)(files)


def without_sixes(values):
    """Codes of magnitude 6 become 4."""
    low, high = values & 15, values >> 4
    low, high = (np.where(part & 7 == 7, part - 1, part) for part in (low, high))
    return (low | high << 4).astype(np.uint8)


def rows(count):
    def change(files):
        for part in ("weight", "weight_scale"):
            files.tensors[f"{OUT}.{part}"] = files.tensors[f"{OUT}.{part}"][:count]

    return change


def columns(count):
    """A contraction of `count` values."""

    def change(files):
        files.tensors[f"{OUT}.weight"] = files.tensors[f"{OUT}.weight"][:, : count // 2]
        files.tensors[f"{OUT}.weight_scale"] = files.tensors[f"{OUT}.weight_scale"][:, : count // 16]

    return change


@dataclasses.dataclass(frozen=True)
class Defect:
    change: object
    wanted: dict[tuple[str, str], int]
    found: str = ""
    """A regular expression for subject, what was found and what engines do, of one finding at least."""
    file_format: str = MODELOPT


DEFECTS = {
    # modules that engines fuse
    "q global scale": Defect(
        times(f"{Q}.weight_scale_2", 2),
        {("error", "fused-global-scale"): 1},
        r"layers.0.self_attn.\[k_proj, q_proj, v_proj\].*factor of 2: .*largest multiplier .*AssertionError",
    ),
    "q global scale, divisor": Defect(
        times(f"{Q}.weight_global_scale", 0.5),
        {("error", "fused-global-scale"): 1},
        "factor of 2: .*largest divisor",
        COMPRESSED,
    ),
    "gate global scale": Defect(
        times(f"{expert(1)}.weight_scale_2", 1.25),
        {("error", "fused-global-scale"): 1},
        r"experts.1.\[gate_proj, up_proj\].*factor of 1.25: .*gate's scale for both halves.*#14199",
    ),
    "gate global scale, divisor": Defect(
        times(f"{expert(1)}.weight_global_scale", 10),
        {("error", "fused-global-scale"): 1},
        "factor of 10: .*gate's scale for both halves",
        COMPRESSED,
    ),
    "q input scale": Defect(
        times(f"{Q}.input_scale", 3), {("error", "fused-input-scale"): 1}, "factor of 3: .*AssertionError"
    ),
    "q input scale, divisor": Defect(
        times(f"{Q}.input_global_scale", 3),
        {("warning", "fused-input-scale"): 1},
        "factor of 3: .*cut off",
        COMPRESSED,
    ),
    "gate input scale": Defect(
        times(f"{expert(1)}.input_scale", 3), {("warning", "fused-input-scale"): 1}, "factor of 3"
    ),
    "v not quantized": Defect(
        chain(unquantized(V), listed(V)),
        {("error", "partly-quantized-group"): 1},
        r"\[k_proj, q_proj, v_proj\] v_proj not quantized",
    ),
    "v without an input scale": Defect(
        remove(f"{V}.input_scale"),
        {("error", "partly-quantized-group"): 1, ("error", "input-scale-missing"): 1},
        "v_proj W4A16: some have an input scale|has no input_scale",
    ),
    # experts
    "an expert without an input scale": Defect(
        remove(re.escape(expert(2, "down")) + ".input_scale"),
        {("error", "input-scale-missing"): 1, ("error", "expert-input-scale-missing"): 1},
        r"mlp.experts.\*.down_proj 1 of 4 experts have no input scale: 2 |has no input_scale",
    ),
    "an expert's input scale": Defect(
        chain(*(times(f"{expert(2, name)}.input_scale", 50) for name in ("gate", "up"))),
        {("warning", "expert-input-scale-outlier"): 2},
        "expert 2 has 0.05, 50 times the median",
    ),
    "no such expert": Defect(
        config(num_experts=6), {("error", "missing-experts"): 2}, "2 of 6 experts have no weight: 4, 5"
    ),
    "experts beyond all reason": Defect(
        config(num_experts=2**64),
        {("error", "missing-experts"): 2},
        f"{2**64 - 4} of {2**64} experts have no weight: 4, 5",
    ),
    # parts
    "no block scales": Defect(
        remove(f"{OUT}.weight_scale"), {("error", "incomplete-weight"): 1}, f"{OUT} no weight_scale beside weight, "
    ),
    "no codes": Defect(
        remove(f"{OUT}.weight"),
        {("error", "incomplete-weight"): 1},
        f"{OUT} no weight beside weight_scale, weight_scale_2",
    ),
    "no global scale": Defect(
        remove(f"{OUT}.weight_scale_2"), {("error", "incomplete-weight"): 1}, f"{OUT} no weight_scale_2 beside"
    ),
    "no global scale, divisor": Defect(
        remove(f"{OUT}.weight_global_scale"),
        {("error", "incomplete-weight"): 1},
        "no weight_global_scale beside weight_packed, weight_scale",
        COMPRESSED,
    ),
    "no input scale anywhere": Defect(
        remove(r".*\.input_scale"), {("error", "input-scale-missing"): 32}, "has no input_scale; config.json says W4A4"
    ),
    "no input divisor anywhere": Defect(
        remove(r".*\.input_global_scale"), {("error", "input-scale-missing"): 32}, "input_global_scale", COMPRESSED
    ),
    "weight-only with input scales": Defect(
        both_files(quant_algo="W4A16_NVFP4"),
        {("note", "input-scale-unused"): 32, **NOT_SGLANG},
        "drops it|SGLang's list",
    ),
    "weight-only with input divisors": Defect(
        lambda files: files.quantization["config_groups"]["group_0"].update(input_activations=None),
        {("warning", "input-scale-unused"): 32},
        "has input_global_scale; config.json says weight-only",
        COMPRESSED,
    ),
    "pre_quant_scale": Defect(
        add(f"{OUT}.pre_quant_scale", np.ones(SIZE, np.float32)),
        {("error", "pre-quant-scale"): 1},
        f"{OUT} has pre_quant_scale",
    ),
    "SVDQuant": Defect(
        chain(
            add(f"{OUT}.svdquant_lora_a", np.ones((4, SIZE), ml_dtypes.bfloat16)),
            add(f"{OUT}.svdquant_lora_b", np.ones((SIZE, 4), ml_dtypes.bfloat16)),
        ),
        {("error", "pre-quant-scale"): 1},
        "has svdquant_lora_a, svdquant_lora_b",
    ),
    # dtypes and shapes
    "block scales in float16": Defect(
        replace(f"{OUT}.weight_scale", lambda v: v.astype(np.float16)),
        {("error", "dtype"): 1},
        rf"{OUT}.weight_scale float16 \[256, 16\]: wanted float8_e4m3fn",
    ),
    "global scale in bfloat16": Defect(
        replace(f"{OUT}.weight_scale_2", lambda v: v.astype(ml_dtypes.bfloat16)),
        {("error", "dtype"): 1},
        r"weight_scale_2 bfloat16 \[\]: wanted float32",
    ),
    "codes as int8": Defect(
        replace(f"{OUT}.weight", lambda v: v.view(np.int8)), {("error", "dtype"): 1}, "int8 .*: wanted uint8"
    ),
    "block scales transposed": Defect(
        replace(f"{OUT}.weight_scale", lambda v: np.ascontiguousarray(v.T)),
        {("error", "shape"): 1},
        r"\[16, 256\] beside codes \[256, 128\]: wanted \[256, 16\]; it is transposed",
    ),
    "blocks of 32": Defect(
        replace(f"{OUT}.weight_scale", lambda v: v[:, ::2]), {("error", "shape"): 1}, "it has blocks of 32"
    ),
    "three dimensions": Defect(
        replace(f"{OUT}.weight", lambda v: v.reshape(2, 128, 128)), {("error", "shape"): 1}, "wanted two dimensions"
    ),
    "a global scale for each row": Defect(
        replace(f"{OUT}.weight_scale_2", lambda v: np.full(SIZE, v)),
        {("error", "shape"): 1},
        r"float32 \[256\]: wanted one value, shape \[\]",
    ),
    "K no multiple of 16": Defect(columns(248), {("error", "contraction-multiple"): 1}, r"\[256, 248\]"),
    "K of 240": Defect(
        columns(240),
        {("warning", "tensor-parallel-split"): 1, ("note", "gemm-multiple"): 1},
        r"K = 240: 120 values a rank at 2 ranks, 60 .* at 4 ranks, 30 .*|weight \[256, 240\]",
    ),
    "N of 200": Defect(
        rows(200),
        {("warning", "rows-multiple"): 1, ("note", "gemm-multiple"): 1},
        r"N = 200, which is 72 over|weight \[200, 256\]",
    ),
    "fused on disk": Defect(
        lambda files: files.tensors.update(
            {
                name.replace("o_proj", "qkv_proj"): files.tensors.pop(name)
                for name in list(files.tensors)
                if name.startswith(f"{OUT}.")
            }
        ),
        {("warning", "fused-on-disk"): 1},
        "qkv_proj one weight_scale_2 for the whole of it",
    ),
    # values
    "NaN block scale": Defect(
        scale_bytes(f"{OUT}.weight_scale", [0x7F, 0xFF, 0x7F]),
        {("error", "nan-block-scale"): 1},
        r"3 of 4096 block scales \(0.000732\) are NaN",
    ),
    "negative block scale": Defect(
        scale_bytes(f"{OUT}.weight_scale", [0xB8]), {("error", "negative-block-scale"): 1}, "1 of 4096 .* are negative"
    ),
    "negative zero block scale": Defect(
        scale_bytes(f"{OUT}.weight_scale", [0x80]),
        {("warning", "negative-zero-block-scale"): 1, ("warning", "zero-block-scale"): 1},
        "1 of 4096 .* are (-0|zero above)",
    ),
    "zero block scale": Defect(
        scale_bytes(f"{OUT}.weight_scale", [0, 0]),
        {("warning", "zero-block-scale"): 1},
        "2 of 4096 .* zero above codes",
    ),
    "all scales saturated": Defect(
        scale_bytes(f"{OUT}.weight_scale", [0x7E] * 4096), {("warning", "all-block-scales-saturated"): 1}, "all 4096"
    ),
    "many scales saturated": Defect(
        scale_bytes(f"{OUT}.weight_scale", [0x7E] * 400), {("warning", "saturated-blocks"): 1}, r"40\d of 4096"
    ),
    "all scales subnormal": Defect(
        scale_bytes(f"{OUT}.weight_scale", [7] * 4096),
        {("warning", "subnormal-block-scales"): 1},
        "all 4096 block scales are below 2.-6, the largest 0.0136719",
    ),
    **{
        f"{kind} scale {value}": Defect(
            put(f"{OUT}.{name}", value), {("error", "unusable-scale"): 1}, f"{name} {value:g}: wanted a positive"
        )
        for kind, name in (("global", "weight_scale_2"), ("input", "input_scale"))
        for value in (0.0, -0.5, float("nan"), float("inf"))
    },
    "divisor with an infinite reciprocal": Defect(
        put(f"{OUT}.weight_global_scale", 1e-40), {("error", "unusable-scale"): 1}, "finite reciprocal", COMPRESSED
    ),
    "dead tensor": Defect(codes_with(0x80), {("warning", "dead-tensor"): 1}, "all 65536 codes are zero"),
    "many dead blocks": Defect(
        replace(f"{OUT}.weight", lambda v: np.where(np.arange(SIZE)[:, None] < 128, 0, v).astype(np.uint8)),
        {("warning", "dead-blocks"): 1},
        r"2048 of 4096 blocks \(0.5\)",
    ),
    "some dead blocks": Defect(
        replace(f"{OUT}.weight", lambda v: np.where(np.arange(SIZE)[:, None] < 8, 0, v).astype(np.uint8)),
        {("note", "dead-blocks"): 1},
        "128 of 4096",
    ),
    "small codes": Defect(
        codes_with(0x5D), {("warning", "wasted-block-scales"): 1}, "largest code is below 4 in 4096 of 4096"
    ),
    "no sixes": Defect(
        replace(f"{OUT}.weight", without_sixes),
        {("note", "blocks-below-six"): 1},
        r"largest code is below 6 in 4096 of 4096 blocks that are not zero \(1\)",
    ),
    "reciprocal global scale": Defect(
        replace(f"{OUT}.weight_scale_2", lambda v: np.float32(1) / v),
        {("error", "reciprocal-global-scale"): 1},
        "weight_scale_2 .* a multiplier, makes weights up to .*e.06; its reciprocal up to 4",
    ),
    "reciprocal global divisor": Defect(
        replace(f"{OUT}.weight_global_scale", lambda v: np.float32(1) / v),
        {("error", "reciprocal-global-scale"): 1},
        "weight_global_scale .* a divisor, makes weights up to",
        COMPRESSED,
    ),
    "reciprocal input scale": Defect(
        replace(f"{OUT}.input_scale", lambda v: np.float32(1) / v),
        {("warning", "reciprocal-input-scale"): 1},
        "1000, a multiplier, stands for activations up to 2.69e.06; its reciprocal for 2.69",
    ),
    # the key-value cache
    "cache scales that nobody announced": Defect(
        chain(add(f"{K}.k_scale", np.float32(1)), add(f"{V}.v_scale", np.float32(1))),
        {("warning", "cache-scale-undeclared"): 1},
        "2 tensors such as",
    ),
    "cache scales, one layer only": Defect(
        chain(
            add(f"{K}.k_scale", np.float32(1)),
            add(f"{V}.v_scale", np.float32(1)),
            both_files(kv_cache_quant_algo="FP8"),
        ),
        {("warning", "cache-scale-missing"): 1},
        "model.layers.1 FP8 by config.json, but no k_scale and v_scale in 1 layers",
    ),
    "cache scale zero, and a pair broken": Defect(
        chain(
            *(add(f"model.layers.{i}.self_attn.k_scale", np.zeros(1, ml_dtypes.bfloat16)) for i in (0, 1)),
            quantization(kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}),
        ),
        {("error", "cache-scale"): 2, ("warning", "cache-scale-pair"): 2},
        "self_attn.k_scale 0: wanted|has k_scale but no v_scale",
        COMPRESSED,
    ),
    "NVFP4 cache": Defect(
        chain(
            *(add(f"model.layers.{i}.self_attn.{x}_proj.{x}_scale", np.float32(1)) for i in (0, 1) for x in "kv"),
            both_files(kv_cache_quant_algo="NVFP4"),
        ),
        {("note", "cache-nvfp4"): 1},
        r"TRTLLM_LOAD_KV_SCALES=1; writers do not agree whether they are amax / 448 .* or amax / 2688",
    ),
    # configuration
    "no quantization_config, no hf_quant_config.json": Defect(
        lambda files: (files.jsons.pop("hf_quant_config.json"), files.jsons["config.json"].pop("quantization_config")),
        {("error", "no-quantization-config"): 1},
        "has no quantization_config, and there is no hf_quant_config.json",
    ),
    "quantization_config is a list": Defect(
        config(quantization_config=[]), {("error", "no-quantization-config"): 1}, r"is \[\], and there", COMPRESSED
    ),
    "only config.json": Defect(
        lambda files: files.jsons.pop("hf_quant_config.json"),
        {("warning", "one-quantization-config"): 1},
        "no hf_quant_config.json",
    ),
    "only hf_quant_config.json": Defect(
        lambda files: files.jsons["config.json"].pop("quantization_config"),
        {("warning", "one-quantization-config"): 1},
        "there is no quantization_config in config.json",
    ),
    "both formats' files": Defect(
        lambda files: files.jsons.update({"hf_quant_config.json": {"quantization": {}}}),
        {
            ("error", "required-key"): 1,
            ("error", "unknown-algorithm"): 1,
            ("warning", "stray-file"): 1,
            ("error", "format-mismatch"): 32,
        },
        "",
        COMPRESSED,
    ),
    **{
        f"no {key}": Defect(
            lambda files, key=key: files.details.pop(key), {("error", "required-key"): 1, **more}, f"has no {key}"
        )
        for key, more in {
            "group_size": {},
            "kv_cache_quant_algo": {},
            "exclude_modules": {("warning", "exclusions-disagree"): 1, ("error", "unlisted-module"): 2}
            | {("warning", "unlisted-module"): 1},
        }.items()
    },
    "AWQ": Defect(both_files(quant_algo="NVFP4_AWQ"), {("error", "refused-algorithm"): 2}, "quant_algo is NVFP4_AWQ"),
    "unknown algorithm": Defect(both_files(quant_algo="INT4"), {("error", "unknown-algorithm"): 2}, "INT4"),
    "algorithms differ": Defect(
        lambda files: files.details.update(quant_algo="W4A16_NVFP4"),
        {
            ("error", "config-files-disagree"): 1,
            ("warning", "algorithm-not-in-sglang"): 1,
            ("note", "input-scale-unused"): 32,
        },
        "quant_algo NVFP4 and W4A16_NVFP4",
    ),
    "caches differ": Defect(
        lambda files: files.details.update(kv_cache_quant_algo="FP8"),
        {("error", "config-files-disagree"): 1},
        "key-value cache None and FP8",
    ),
    "blocks of 32 by the file": Defect(
        lambda files: files.details.update(group_size=32), {("error", "group-size"): 1}, "group_size is 32: wanted 16"
    ),
    "blocks of 32 by the group": Defect(
        group("weights", group_size=32), {("error", "group-size"): 1}, "group_size is 32: wanted 16", COMPRESSED
    ),
    "router not listed": Defect(
        unlisted(ROUTER), {("error", "unlisted-module"): 1}, rf"{ROUTER} bf16 \[4, 256\], not among .*asserts a shape"
    ),
    "router not listed, ignore": Defect(unlisted(ROUTER), {("error", "unlisted-module"): 1}, ROUTER, COMPRESSED),
    "router listed in one file": Defect(
        lambda files: files.details["exclude_modules"].remove(ROUTER),
        {("error", "unlisted-module"): 1, ("warning", "exclusions-disagree"): 1},
        f"1 names are excluded in one of them only, such as {ROUTER}|not among the modules that hf_quant",
    ),
    "head not listed": Defect(unlisted("lm_head"), {("warning", "unlisted-module"): 1}, "lm_head .*vision towers"),
    "head listed under another name": Defect(
        chain(unlisted("lm_head"), listed("language_model.lm_head")),
        {("warning", "exclusion-by-another-name"): 1},
        "lm_head .*close to its name",
    ),
    "routers by wildcard": Defect(
        chain(unlisted(ROUTER), unlisted("model.layers.1.mlp.gate"), listed("*.mlp.gate")), {}
    ),
    "routers by regular expression": Defect(
        chain(unlisted(ROUTER), unlisted("model.layers.1.mlp.gate"), listed(r"re:.*\.mlp\.gate$")), {}, "", COMPRESSED
    ),
    "a wildcard is none in ignore": Defect(
        chain(unlisted(ROUTER), listed("model.layers.0*")),
        {("error", "unlisted-module"): 1},
        "",
        COMPRESSED,
    ),
    "invalid regular expression": Defect(
        listed("re:("), {("error", "invalid-pattern"): 1}, "'re:\\(' is no regular expression", COMPRESSED
    ),
    "quantized but listed": Defect(
        listed(f"{LAYER}.self_attn.o*"), {("error", "excluded-but-quantized"): 1}, f"{OUT} has NVFP4 codes, but config"
    ),
    "empty list": Defect(
        chain(both_files(exclude_modules=[]), remove("lm_head.weight|.*mlp.gate.weight")),
        {("warning", "empty-exclude-modules"): 2},
        "no module is excluded",
    ),
    "mixed precision": Defect(mixed(), NOT_SGLANG, "MIXED_PRECISION"),
    "mixed precision, one forgotten": Defect(
        mixed(drop=[OUT]),
        {**NOT_SGLANG, ("error", "quantized-but-not-declared"): 1},
        f"{OUT} has NVFP4 codes; .* nothing",
    ),
    "mixed precision, one too many": Defect(
        chain(unlisted("lm_head"), mixed(extra=["lm_head"])),
        {**NOT_SGLANG, ("error", "declared-but-not-quantized"): 1},
        "lm_head is bf16; config.json says NVFP4",
    ),
    "mixed precision without layers": Defect(
        both_files(quant_algo="MIXED_PRECISION", quantized_layers=None),
        {**NOT_SGLANG, ("error", "unknown-algorithm"): 2},
        "without an object quantized_layers",
    ),
    "8 bits": Defect(
        group("weights", num_bits=8),
        {("error", "config-group"): 1, ("error", "quantized-but-not-declared"): 32},
        "no group has weights with num_bits 4|says another of it",
        COMPRESSED,
    ),
    "another strategy": Defect(
        group("input_activations", strategy="group"),
        {("error", "config-group"): 1},
        "group_0.input_activations.strategy is 'group': wanted 'tensor_group'",
        COMPRESSED,
    ),
    "dynamic true": Defect(
        group("input_activations", dynamic=True),
        {("error", "config-group"): 1},
        "dynamic is True: wanted 'local'",
        COMPRESSED,
    ),
    "no group size": Defect(
        group("weights", group_size=None), {("error", "config-group"): 1}, "weights.group_size is missing", COMPRESSED
    ),
    "no targets": Defect(
        lambda files: files.quantization["config_groups"]["group_0"].update(targets=[]),
        {("error", "config-group"): 1, ("error", "quantized-but-not-declared"): 32},
        "targets is|says nothing of it",
        COMPRESSED,
    ),
    "no groups": Defect(quantization(config_groups={}), {("error", "config-group"): 1}, "at least one", COMPRESSED),
    "another format": Defect(
        chain(
            quantization(format="pack-quantized"),
            lambda files: files.quantization["config_groups"]["group_0"].update(format=None),
        ),
        {("error", "config-group"): 1},
        "format is 'pack-quantized': wanted 'nvfp4-pack-quantized'",
        COMPRESSED,
    ),
    "frozen": Defect(
        quantization(quantization_status="frozen"), {("warning", "quantization-status"): 1}, "'frozen'", COMPRESSED
    ),
    "null fields of older versions": Defect(
        chain(
            *(
                group(part, actorder=None, block_structure=None, observer_kwargs={}, zp_dtype=None)
                for part in ("weights", "input_activations")
            ),
            quantization(global_compression_ratio=None, sparsity_config={}, transform_config={}, version="0.12.2"),
        ),
        {},
        "",
        COMPRESSED,
    ),
    "another method": Defect(
        quantization(quant_method="gptq"), {("error", "quant-method"): 1}, "'gptq': wanted one of modelopt"
    ),
    "a method of the other format": Defect(
        quantization(quant_method="modelopt", quant_algo="NVFP4"),
        {("error", "format-mismatch"): 32, ("warning", "one-quantization-config"): 1},
        "stored as weight_packed, weight_global_scale; config.json says modelopt|no hf_quant",
        COMPRESSED,
    ),
    "missing layers": Defect(
        config(num_hidden_layers=4), {("error", "missing-layers"): 1}, "model.layers 2 of 4 layers have no weight: 2, 3"
    ),
    "layers beyond all reason": Defect(
        config(num_hidden_layers=2**64),
        {("error", "missing-layers"): 1},
        rf"{2**64 - 2} of {2**64} layers have no weight: 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.;",
    ),
    "a layer too many": Defect(
        config(num_hidden_layers=1), {("warning", "extra-layers"): 1}, "layers 1 are there; config.json says 1"
    ),
    "a layer for multi-token prediction": Defect(config(num_hidden_layers=1, num_nextn_predict_layers=1), {}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_one_defect_is_one_finding(good, tmp_path, name):
    defect = DEFECTS[name]
    files = Files(dict(good[defect.file_format].tensors), copy.deepcopy(good[defect.file_format].jsons))
    defect.change(files)
    findings = verify_checkpoint(files.write(tmp_path))
    assert counted(findings) == {**defect.wanted, NO_TOKENIZER: 1}
    texts = [
        f"{finding.subject} {finding.found} {finding.engines}"
        for finding in findings
        if (finding.severity.value, finding.check) in defect.wanted
    ]
    assert any(re.search(defect.found, text) for text in texts) or not defect.wanted, texts
    assert not any("\n" in text for text in texts)


@needs_golden
def test_defects_of_the_golden_checkpoints(tmp_path):
    files = Files.read(GOLDEN / "tiny_llama" / "modelopt")
    before = counted(verify_checkpoint(files.write(tmp_path)))
    times(f"{LAYER}.mlp.gate_proj.weight_scale_2", 1.5)(files)
    put("model.layers.1.self_attn.v_proj.v_scale", -1)(files)
    remove(f"{K}.k_scale")(files)
    wanted = {("error", "fused-global-scale"): 1, ("error", "cache-scale"): 1, ("warning", "cache-scale-pair"): 1}
    assert counted(verify_checkpoint(files.write(tmp_path))) == before + Counter(wanted)


def test_ranks_that_cut_blocks_are_an_error_when_asked_for(good, tmp_path):
    good[MODELOPT].write(tmp_path)
    findings = verify_checkpoint(tmp_path, tensor_parallel=32)
    assert counted(findings) == {("error", "tensor-parallel-split"): 10, NO_TOKENIZER: 1}
    assert "K = 256: 8 values a rank at 32 ranks; wanted a multiple of 16" in {finding.found for finding in findings}
    assert not has_errors(verify_checkpoint(tmp_path, tensor_parallel=[1, 16]))


@pytest.mark.parametrize("sizes", [0, [2, -1], [2.0], [True]])
def test_ranks_must_be_positive_integers(tmp_path, sizes):
    with pytest.raises(ValueError, match=r"tensor_parallel holds \S+: wanted positive integers such as 8; give"):
        verify_checkpoint(tmp_path, tensor_parallel=sizes)


def test_an_unquantized_model_is_no_nvfp4_checkpoint(tmp_path):
    Files({"lm_head.weight": np.ones((4, 4), np.float32)}, {"config.json": {}}).write(tmp_path)
    assert counted(verify_checkpoint(tmp_path)) == {
        ("error", "no-nvfp4-weight"): 1,
        ("error", "no-quantization-config"): 1,
        NO_TOKENIZER: 1,
    }


def test_stacked_experts_are_not_checked(good, tmp_path):
    files = Files(dict(good[MODELOPT].tensors), good[MODELOPT].jsons)
    add(f"{LAYER}.feed_forward.experts.down_proj", np.zeros((2, 8, 16), np.uint8))(files)
    add(f"{LAYER}.feed_forward.experts.down_proj_weight_scale", np.ones((2, 8, 2), E4M3))(files)
    assert counted(verify_checkpoint(files.write(tmp_path))) == {("note", "stacked-experts"): 1, NO_TOKENIZER: 1}


def test_other_quantizations_are_left_alone(good, tmp_path):
    files = Files(dict(good[MODELOPT].tensors), copy.deepcopy(good[MODELOPT].jsons))
    mixed()(files)
    layers = files.details["quantized_layers"]
    layers["a"] = layers["b"] = {"quant_algo": "FP8"}
    files.tensors |= {
        "a.weight": np.ones((8, 8), E4M3),
        "a.weight_scale": np.ones((), np.float32),
        "b.weight": np.ones((8, 8), np.uint8),
        "b.weight_scale": np.ones((8, 1), np.uint8),
    }
    assert counted(verify_checkpoint(files.write(tmp_path))) == {**NOT_SGLANG, NO_TOKENIZER: 1}


def test_the_same_findings_are_folded_with_the_largest_first(good, tmp_path):
    files = Files(dict(good[MODELOPT].tensors), copy.deepcopy(good[MODELOPT].jsons))
    for number, factor in ((0, 2), (1, 8), (2, 4)):
        times(f"{expert(number)}.weight_scale_2", factor)(files)
    folded = fold(verify_checkpoint(files.write(tmp_path)))
    assert [(entry.shown.severity, entry.others) for entry in folded] == [(Severity.ERROR, 2), (Severity.NOTE, 0)]
    assert "factor of 8" in folded[0].shown.found
