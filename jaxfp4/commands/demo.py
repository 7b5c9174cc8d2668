"""`jaxfp4 demo`: the whole job on the built-in model."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import jaxfp4
from jaxfp4.checkpoints import export_checkpoint
from jaxfp4.commands.meshes import MeshShape, make_mesh
from jaxfp4.models import checkpoint_names, from_flax
from jaxfp4.models.builtin import BUILTIN_DIRECTORY, bits_per_byte, load_builtin
from jaxfp4.models.corpus import calibration_batches, heldout_batches
from jaxfp4.reports import quality_table, weight_quality

DEVICES = 8
MAIN_MESH = MeshShape.parse("tp=4,ep=2")
OTHER_MESHES = tuple(MeshShape.parse(text) for text in ("tp=8,ep=1", "tp=2,ep=4", "tp=1,ep=8"))
LENGTH = 256


def demo(console: Console, out_dir: Path | None = None) -> None:
    """Loads the built-in model sharded, calibrates, quantizes, evaluates, repeats on other meshes and exports.

    Wants the eight CPU devices of `use_virtual_cpu_devices(DEVICES, cpu_only=True)`.
    """
    start = time.perf_counter()
    console.rule(f"built-in model on {jax.device_count()} virtual devices, mesh {MAIN_MESH}")
    model = load_builtin(make_mesh(MAIN_MESH))
    apply_fn, params = from_flax(model)
    calibration = calibration_batches(4, 8, LENGTH)
    plan = jaxfp4.plan(apply_fn, params, calibration[0], recipe="nvfp4")
    console.print(plan)
    stats = jaxfp4.calibrate(apply_fn, params, calibration, plan)
    qparams = jaxfp4.quantize_params(params, plan, stats)
    console.print(quality_table(weight_quality(params, qparams)))
    console.print(_cost_table(apply_fn, params, qparams, plan))
    console.print(_digest_table(plan, qparams, params))
    target = Path(tempfile.mkdtemp(prefix="jaxfp4-demo-")) / "checkpoint" if out_dir is None else out_dir
    config = json.loads((BUILTIN_DIRECTORY / "config.json").read_text(encoding="utf-8"))
    export_checkpoint(qparams, target, names=checkpoint_names(model.config), config=config)
    size = sum(file.stat().st_size for file in target.iterdir())
    console.print(f"checkpoint in Model-Optimizer's format: {target} ({size / 1e6:.2f} MB)")
    console.print(f"{time.perf_counter() - start:.0f} s")


def _cost_table(apply_fn: Any, params: Any, qparams: Any, plan: jaxfp4.Plan) -> Table:
    """Held-out bits per byte before and after."""
    heldout = heldout_batches(3, 16, LENGTH)
    before = bits_per_byte(apply_fn, params, heldout)
    after = bits_per_byte(jaxfp4.quantized(apply_fn, plan), qparams, heldout)
    table = Table(title="held-out text of the standard library", title_justify="left")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    table.add_row("bfloat16", f"{before:.4f}")
    table.add_row(f"{plan.recipe.name} (W4A4)", f"{after:.4f}")
    table.add_row("difference", f"{after - before:+.4f} ({100 * (after / before - 1):+.2f} %)")
    return table


def _digest_table(plan: jaxfp4.Plan, qparams: Any, params: Any) -> Table:
    """The digest of the same weights on other layouts."""
    table = Table(title="SHA-256 of all packed codes, block scales and global scales", title_justify="left")
    table.add_column("layout")
    table.add_column("digest")
    expected = jaxfp4.digest(qparams)
    table.add_row(str(MAIN_MESH), expected)
    for shape in OTHER_MESHES:
        _, moved = from_flax(load_builtin(make_mesh(shape)))
        table.add_row(str(shape), _judged(jaxfp4.digest(jaxfp4.quantize_params(moved, plan)), expected))
    single = jax.device_put(params, jax.devices()[0])
    table.add_row("one device", _judged(jaxfp4.digest(jaxfp4.quantize_params(single, plan)), expected))
    return table


def _judged(digest: str, expected: str) -> str:
    return f"{digest} equal" if digest == expected else f"{digest} DIFFERENT"
