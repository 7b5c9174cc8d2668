"""`jaxfp4 quantize`: a checkpoint directory in, an NVFP4 checkpoint directory out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import jaxfp4
from jaxfp4.checkpoints import export_checkpoint
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.meshes import MeshShape, make_mesh
from jaxfp4.models import checkpoint_names, from_flax, load_decoder
from jaxfp4.recipes import Plan
from jaxfp4.reports import quality_table, weight_quality

BYTE_VOCABULARY = 256


def quantize_directory(
    model_dir: Path,
    out_dir: Path,
    *,
    recipe: str,
    mesh: MeshShape | None,
    calibration: Path | None,
    file_format: str,
    expert_scale: str,
    batch_size: int,
    sequence_length: int,
    console: Console,
) -> None:
    """Loads, plans, calibrates, quantizes and exports, and prints the plan, the cost and the digest.

    Raises CommandError, ValueError or OSError for bad input; `out_dir` is then not there.
    """
    if out_dir.exists():
        raise CommandError(f"{out_dir}: it exists already; wanted a new directory; remove it or name another")
    model = load_decoder(model_dir, mesh=make_mesh(mesh) if mesh else None)
    config = model.config
    apply_fn, params = from_flax(model)
    tokens = None if calibration is None else read_tokens(calibration, config.vocab_size, sequence_length)
    example = jax.ShapeDtypeStruct((1, 8), np.int32)
    plan = jaxfp4.plan(apply_fn, params, example, recipe=recipe, expert_scale=expert_scale)
    console.print(plan)
    stats = None
    if plan.observed:
        if tokens is None:
            raise CommandError(
                f"--recipe {recipe} quantizes activations and needs --calib FILE (.npy tokens, or text for a "
                "byte-level model); without data use --recipe nvfp4_weight_only"
            )
        stats = jaxfp4.calibrate(apply_fn, params, list(batches_of(tokens, batch_size)), plan)
    qparams = jaxfp4.quantize_params(params, plan, stats)
    console.print(quality_table(weight_quality(params, qparams)))
    source = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    export_checkpoint(qparams, out_dir, format=file_format, names=checkpoint_names(config), config=source)
    console.print(_summary(plan, jaxfp4.digest(qparams), mesh, out_dir))


def _summary(plan: Plan, digest: str, mesh: MeshShape | None, out_dir: Path) -> str:
    where = str(mesh) if mesh else "one device"
    return f"{len(plan.quantized)} weights quantized on {where}, digest {digest}\nwritten to {out_dir}"


def read_tokens(path: Path, vocabulary: int, sequence_length: int) -> np.ndarray:
    """Calibration tokens, int32 `[rows, time]`: an `.npy` file of integers, or any text file for a byte-level model.

    CommandError names the file, what was found and what was wanted.
    """
    if not path.is_file():
        raise CommandError(f"--calib {path}: no such file")
    if path.suffix == ".npy":
        tokens = _read_npy(path)
    elif vocabulary == BYTE_VOCABULARY:
        tokens = _read_text(path, sequence_length)
    else:
        raise CommandError(
            f"--calib {path}: text is for byte-level models (vocabulary {BYTE_VOCABULARY}), this one has {vocabulary}; "
            "wanted an .npy file of int32 tokens [batch, time]"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise CommandError(
            f"--calib {path}: tokens from {tokens.min()} to {tokens.max()}; wanted 0 to {vocabulary - 1}, the model's "
            "vocabulary; tokenize with the model's own tokenizer"
        )
    return tokens.astype(np.int32)


def _read_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CommandError(f"--calib {path}: no readable .npy array ({error})") from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or 0 in tokens.shape:
        raise CommandError(
            f"--calib {path}: an array of {tokens.dtype} with shape {tokens.shape}; wanted int32 tokens [batch, time]"
        )
    return tokens


def _read_text(path: Path, sequence_length: int) -> np.ndarray:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    rows = len(data) // sequence_length
    if not rows:
        raise CommandError(
            f"--calib {path}: {len(data)} bytes; wanted at least {sequence_length}; pass more text or a shorter "
            "--sequence-length"
        )
    return data[: rows * sequence_length].reshape(rows, sequence_length)


def batches_of(tokens: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Rows in batches; the last one may be smaller."""
    for start in range(0, len(tokens), batch_size):
        yield tokens[start : start + batch_size]
