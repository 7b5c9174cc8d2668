"""The command line: parse, call, print. Bad input gives one line on standard error and exit status 2.

`verify` exits with 1 if it finds errors.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import jaxfp4
from jaxfp4 import recipes
from jaxfp4.checkpoints.streaming.file_quantization import DEFAULT_SHARD_BYTES
from jaxfp4.commands.errors import CommandError

# Each command imports what it needs when it runs: loading Flax or the benchmarks would double the time that work on
# files takes to start.

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jaxfp4 ARGUMENTS` and returns the exit status."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in files may hold what no terminal can show
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        status: int | None = options.run(options, console)
    except KeyboardInterrupt:
        print("jaxfp4: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (CommandError, ValueError, OSError) as error:
        print("jaxfp4: error:", " ".join(str(error).split("\n")[0].split()), file=sys.stderr)
        return BAD_INPUT
    return status or 0


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
    command.add_argument("--recipe", help=f"one of {', '.join(recipes.names())}; by default nvfp4")
    command.add_argument(
        "--weight-only",
        action="store_true",
        help="any directory of safetensors, no model code, tensor by tensor; goes on after an interruption; "
        "by default nvfp4_weight_only",
    )
    command.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="with --weight-only: modules to leave"
    )
    command.add_argument("--max-shard-bytes", type=_positive, default=DEFAULT_SHARD_BYTES, help="of each file")
    command.add_argument("--mesh", help="axes and sizes such as tp=2,ep=4; by default one device")
    command.add_argument("--calib", type=Path, metavar="FILE", help=".npy tokens, .jsonl, or text")
    command.add_argument("--calib-field", metavar="NAME", help="what of a .jsonl object: text, messages or tokens")
    command.add_argument("--samples", type=_positive, help="rows of calibration data, the first; by default 512")
    command.add_argument("--all-experts", action="store_true", help="calibrate all experts on all tokens")
    command.add_argument(
        "--host-memory",
        action="store_true",
        help="for a model larger than the devices' memory: block of layers by block",
    )
    command.add_argument("--format", default="modelopt", choices=("modelopt", "compressed-tensors"))
    command.add_argument("--expert-scale", default="stack", choices=("stack", "expert"))
    command.add_argument("--batch-size", type=_positive, help="rows of calibration data at a time; by default 8")
    command.add_argument("--sequence-length", type=_positive, help="tokens a row; by default 512, .npy rows whole")
    command.set_defaults(run=_quantize)

    command = commands.add_parser(
        "convert", help="an NVFP4 checkpoint in the other format, or in bfloat16 again, without its model"
    )
    command.add_argument("in_dir", type=Path, metavar="IN_DIR")
    command.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a directory that does not exist yet")
    command.add_argument(
        "--format",
        required=True,
        choices=("modelopt", "compressed-tensors", "bfloat16"),
        help="bfloat16: the dequantized weights, for readers that know no NVFP4",
    )
    command.add_argument("--max-shard-bytes", type=_positive, default=DEFAULT_SHARD_BYTES, help="of each file")
    command.set_defaults(run=_convert)

    command = commands.add_parser("verify", help="check an NVFP4 checkpoint as serving engines would")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--tp", metavar="N,N", help="tensor-parallel sizes it must serve; by default 2, 4, 8 warn")
    command.add_argument("--json", type=Path, metavar="FILE", help="every finding, none folded")
    command.set_defaults(run=_verify)

    command = commands.add_parser("inspect", help="a table of the weights of an NVFP4 checkpoint")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--original", type=Path, metavar="DIR", help="the unquantized checkpoint, for signal-to-noise")
    command.add_argument("--all", action="store_true", help="a row for every weight; by default like layers in one")
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="distribution of the block scales")
    command.add_argument("--json", type=Path, metavar="FILE", help="all figures, unrounded")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("bench", help="measurements")
    benchmarks = command.add_subparsers(required=True, metavar="BENCHMARK")
    command = benchmarks.add_parser(
        "quality", help="held-out loss and KL divergence of each recipe on the built-in model"
    )
    command.add_argument("--recipes", metavar="NAME,NAME", help="by default all; nvfp4 among them to compare with")
    command.add_argument("--batches", type=_positive, help="of held-out text; by default all that the figures use")
    command.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, unrounded")
    command.set_defaults(run=_bench_quality)
    command = benchmarks.add_parser("kernels", help="time of each array function, beside other libraries if installed")
    command.add_argument("--operations", metavar="NAME,NAME", help="by default all")
    command.add_argument("--sizes", metavar="NAME,NAME", help="by default layers of some models, small ones on a CPU")
    command.add_argument("--quick", action="store_true", help="tiny arrays, to see that everything works")
    command.add_argument("--time-limit", type=_positive, metavar="SECONDS", help="begin no case after this")
    command.add_argument("--json", type=Path, metavar="FILE", help="all figures, unrounded")
    command.set_defaults(run=_bench_kernels)
    command = benchmarks.add_parser(
        "model", help="calibration beside the forward pass, peak memory, scaling over devices, digests on every mesh"
    )
    command.add_argument("--parts", metavar="NAME,NAME", help="memory, digest, calibration, scaling; by default all")
    command.add_argument("--size", choices=("full", "tiny"), help="by default full, tiny on a CPU")
    command.add_argument("--devices", type=_positive, metavar="N", help="at most so many; by default all")
    command.add_argument("--json", type=Path, metavar="FILE", help="all figures, unrounded")
    command.set_defaults(run=_bench_model)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _demo(options: argparse.Namespace, console: Console) -> None:
    from jaxfp4.commands.demo import DEVICES, demo
    from jaxfp4.commands.meshes import use_virtual_cpu_devices

    use_virtual_cpu_devices(DEVICES, cpu_only=True)
    demo(console, options.out)


def _quantize(options: argparse.Namespace, console: Console) -> None:
    if options.weight_only:
        _quantize_files(options, console)
        return
    if options.exclude:
        raise CommandError(
            f"--exclude {options.exclude[0]}: wanted with --weight-only, where no model says what a tensor is; leave "
            "it out, or use a recipe that excludes"
        )
    from jaxfp4.commands.meshes import MeshShape, use_virtual_cpu_devices
    from jaxfp4.commands.quantize import quantize_directory

    mesh = MeshShape.parse(options.mesh) if options.mesh else None
    if mesh:
        use_virtual_cpu_devices(mesh.devices)
    quantize_directory(
        options.model_dir,
        options.out_dir,
        recipe=options.recipe or "nvfp4",
        mesh=mesh,
        calibration=options.calib,
        file_format=options.format,
        expert_scale=options.expert_scale,
        sequence_length=options.sequence_length,
        field=options.calib_field,
        every_expert=options.all_experts,
        host_memory=options.host_memory,
        max_shard_bytes=options.max_shard_bytes,
        console=console,
        **_given(samples=options.samples, batch_size=options.batch_size),
    )


def _given(**options: int | None) -> dict[str, int]:
    """Those that were given; the others have their defaults where they are used."""
    return {name: value for name, value in options.items() if value is not None}


def _quantize_files(options: argparse.Namespace, console: Console) -> None:
    for option, value in (("--mesh", options.mesh), ("--calib", options.calib)):
        if value is not None:
            raise CommandError(f"{option} {value}: wanted none with --weight-only, which runs no model; leave it out")
    from jaxfp4.commands.quantize_files import quantize_files

    quantize_files(
        options.model_dir,
        options.out_dir,
        recipe=options.recipe or "nvfp4_weight_only",
        file_format=options.format,
        max_shard_bytes=options.max_shard_bytes,
        exclude=options.exclude,
        console=console,
    )


def _convert(options: argparse.Namespace, console: Console) -> None:
    from jaxfp4.commands.convert import convert_directory

    convert_directory(
        options.in_dir,
        options.out_dir,
        file_format=options.format,
        max_shard_bytes=options.max_shard_bytes,
        console=console,
    )


def _verify(options: argparse.Namespace, console: Console) -> int:
    from jaxfp4.commands.verify import run_verify

    return run_verify(options.directory, tensor_parallel=options.tp, json_file=options.json, console=console)


def _inspect(options: argparse.Namespace, console: Console) -> int:
    from jaxfp4.commands.inspect_checkpoint import run_inspect

    return run_inspect(
        options.directory,
        original=options.original,
        picture=options.picture,
        json_file=options.json,
        every=options.all,
        console=console,
    )


def _bench_quality(options: argparse.Namespace, console: Console) -> None:
    from jaxfp4.commands.bench_quality import HELD_OUT_BATCHES, bench_quality

    bench_quality(console, options.recipes, options.batches or HELD_OUT_BATCHES, options.json)


def _bench_kernels(options: argparse.Namespace, console: Console) -> int:
    from jaxfp4.commands.bench_kernels.command import Choice, bench_kernels

    choice = Choice(options.operations, options.sizes, options.quick, options.time_limit)
    return bench_kernels(console, choice, options.json)


def _bench_model(options: argparse.Namespace, console: Console) -> int:
    from jaxfp4.commands.bench_model.command import VIRTUAL_DEVICES, ModelChoice, bench_model
    from jaxfp4.commands.meshes import use_virtual_cpu_devices

    use_virtual_cpu_devices(VIRTUAL_DEVICES)
    return bench_model(console, ModelChoice(options.parts, options.size, options.devices), options.json)
