"""`jaxfp4 quantize`: a checkpoint directory in, an NVFP4 checkpoint directory out."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import jaxfp4
from jaxfp4.algorithms import after_folding
from jaxfp4.checkpoints import export_checkpoint, refuse_unservable
from jaxfp4.checkpoints.writer import refuse_existing
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.meshes import MeshShape, make_mesh
from jaxfp4.models import DecoderConfig, checkpoint_names, from_flax, load_decoder
from jaxfp4.models.calibration_data import (
    BATCH_SIZE,
    SAMPLES,
    SEQUENCE_LENGTH,
    CalibrationData,
    read_calibration_data,
)
from jaxfp4.models.expert_coverage import all_experts
from jaxfp4.models.text_tokenizer import BYTE_VOCABULARY, TOKENIZER_FILE, byte_tokenizer, load_tokenizer
from jaxfp4.recipes import Plan
from jaxfp4.reports import quality_table, weight_quality


def quantize_directory(
    model_dir: Path,
    out_dir: Path,
    *,
    recipe: str,
    mesh: MeshShape | None,
    calibration: Path | None,
    file_format: str,
    expert_scale: str,
    batch_size: int = BATCH_SIZE,
    sequence_length: int | None = None,
    samples: int = SAMPLES,
    field: str | None = None,
    every_expert: bool = False,
    host_memory: bool = False,
    max_shard_bytes: int | None = None,
    console: Console,
) -> None:
    """Loads, plans, calibrates, quantizes and exports, and prints the plan, the data, the cost and the digest.

    `calibration`, `samples`, `batch_size`, `sequence_length` and `field` are those of `read_calibration_data`; with
    `every_expert` all experts are calibrated on all tokens. With `host_memory` the parameters are brought to the
    devices block of layers by block.

    Raises CommandError, ValueError or OSError for bad input; `out_dir` is then not there.
    """
    refuse_existing(out_dir)
    memory_kind = "pinned_host" if host_memory else None
    model = load_decoder(model_dir, mesh=make_mesh(mesh) if mesh else None, memory_kind=memory_kind)
    config = model.config
    apply_fn, params = from_flax(model)
    calibration_fn = all_experts(model)[0] if every_expert else apply_fn
    data = None
    if calibration is not None:
        data = _calibration_data(
            calibration,
            model_dir,
            config,
            samples=samples,
            batch_size=batch_size,
            sequence_length=sequence_length,
            field=field,
        )
    example = jax.ShapeDtypeStruct((1, 8), np.int32)
    plan = jaxfp4.plan(apply_fn, params, example, recipe=recipe, expert_scale=expert_scale)
    console.print(plan)
    refuse_unservable(plan, format=file_format)
    stats = None
    if plan.observed:
        if data is None:
            raise CommandError(
                f"--recipe {recipe} quantizes activations and needs --calib FILE (.npy tokens, .jsonl or text); "
                "without data use --recipe nvfp4_weight_only"
            )
        console.print(f"calibrating on {data}{' with all experts' if every_expert else ''}", soft_wrap=True)
        stats = jaxfp4.calibrate(calibration_fn, params, data, plan)
    rest = after_folding(params, plan, stats)
    qparams = jaxfp4.quantize_params(*rest)
    console.print(quality_table(weight_quality(rest[0], qparams)))
    export_checkpoint(
        qparams,
        out_dir,
        format=file_format,
        names=checkpoint_names(config),
        max_shard_bytes=max_shard_bytes,
        source=model_dir,
    )
    console.print(_summary(plan, jaxfp4.digest(qparams), mesh, out_dir))


def _summary(plan: Plan, digest: str, mesh: MeshShape | None, out_dir: Path) -> str:
    where = str(mesh) if mesh else "one device"
    return f"{len(plan.quantized)} weights quantized on {where}, digest {digest}\nwritten to {out_dir}"


def _calibration_data(
    file: Path,
    model_dir: Path,
    config: DecoderConfig,
    *,
    samples: int,
    batch_size: int,
    sequence_length: int | None,
    field: str | None,
) -> CalibrationData:
    """Rows of a file, text with the checkpoint's tokenizer; a byte-level model without one takes bytes."""
    tokenizer = None
    if file.suffix != ".npy" and file.is_file():
        is_byte_level = config.vocab_size == BYTE_VOCABULARY and not (model_dir / TOKENIZER_FILE).exists()
        tokenizer = byte_tokenizer() if is_byte_level else load_tokenizer(model_dir)
    return read_calibration_data(
        file,
        vocabulary=config.vocab_size,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        default_length=min(SEQUENCE_LENGTH, config.max_position_embeddings),
        samples=samples,
        batch_size=batch_size,
        field=field,
    )
