"""The command line: parse, call, print. Bad input gives one line on standard error and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import jaxfp4
from jaxfp4 import recipes
from jaxfp4.commands.bench_quality import HELD_OUT_BATCHES, bench_quality
from jaxfp4.commands.demo import DEVICES, demo
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.meshes import MeshShape, use_virtual_cpu_devices
from jaxfp4.commands.quantize import quantize_directory

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jaxfp4 ARGUMENTS` and returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        options.run(options, console)
    except (CommandError, ValueError, OSError) as error:
        print("jaxfp4: error:", " ".join(str(error).split("\n")[0].split()), file=sys.stderr)
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxfp4", description=jaxfp4.__doc__)
    parser.add_argument("--version", action="version", version=f"jaxfp4 {jaxfp4.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="the whole job on the built-in model, on 8 virtual CPU devices")
    command.add_argument("--out", type=Path, help="where to write the checkpoint; by default a new temporary directory")
    command.set_defaults(run=_demo)

    command = commands.add_parser("quantize", help="quantize a checkpoint directory")
    command.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="config.json and safetensors files")
    command.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a directory that does not exist yet")
    command.add_argument("--recipe", default="nvfp4", help=f"one of {', '.join(recipes.names())}")
    command.add_argument("--mesh", help="axes and sizes such as tp=2,ep=4; by default one device")
    command.add_argument("--calib", type=Path, metavar="FILE", help=".npy tokens [batch, time], or text")
    command.add_argument("--format", default="modelopt", choices=("modelopt", "compressed-tensors"))
    command.add_argument("--expert-scale", default="stack", choices=("stack", "expert"))
    command.add_argument("--batch-size", type=_positive, default=8, help="rows of calibration data at a time")
    command.add_argument("--sequence-length", type=_positive, default=256, help="bytes a row, for text")
    command.set_defaults(run=_quantize)

    command = commands.add_parser("bench", help="measurements on the built-in model")
    benchmarks = command.add_subparsers(required=True, metavar="BENCHMARK")
    command = benchmarks.add_parser("quality", help="held-out loss and KL divergence of each recipe")
    command.add_argument("--recipes", metavar="NAME,NAME", help="by default all; nvfp4 among them to compare with")
    command.add_argument("--batches", type=_positive, default=HELD_OUT_BATCHES, help="of held-out text")
    command.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, unrounded")
    command.set_defaults(run=_bench_quality)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _demo(options: argparse.Namespace, console: Console) -> None:
    use_virtual_cpu_devices(DEVICES, cpu_only=True)
    demo(console, options.out)


def _quantize(options: argparse.Namespace, console: Console) -> None:
    mesh = MeshShape.parse(options.mesh) if options.mesh else None
    if mesh:
        use_virtual_cpu_devices(mesh.devices)
    quantize_directory(
        options.model_dir,
        options.out_dir,
        recipe=options.recipe,
        mesh=mesh,
        calibration=options.calib,
        file_format=options.format,
        expert_scale=options.expert_scale,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        console=console,
    )


def _bench_quality(options: argparse.Namespace, console: Console) -> None:
    bench_quality(console, options.recipes, options.batches, options.json)
