"""Checks of the directory: every file readable, nothing missing, nothing left over. Follows no path out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxfp4.checkpoints.configs import CONFIG_FILE, MODELOPT_FILE
from jaxfp4.checkpoints.safetensors_file import Checkpoint, SafetensorsFile, open_checkpoint
from jaxfp4.checkpoints.verification.findings import Finding, Rule, Severity
from jaxfp4.checkpoints.writer import INDEX_FILE, SINGLE_FILE

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")

BROKEN = Rule("broken-file", Severity.ERROR, "no engine can read the tensors in it", "copy or export the file again")
MISSING_SHARD = Rule(
    "missing-file", Severity.ERROR, "engines fail, or run with unset parameters", "copy the missing files"
)
INDEX = Rule(
    "index", Severity.ERROR, "engines look for tensors in the file that the index names", "write the index again"
)
UNINDEXED = Rule("file-not-in-index", Severity.NOTE, "readers that follow the index do not load it", "remove the file")
UNUSUAL_NAMES = Rule(
    "file-names",
    Severity.WARNING,
    "readers look for model.safetensors or model.safetensors.index.json (transformers and jaxfp4 among them)",
    "rename the file, or write an index",
)
BAD_JSON = Rule("broken-json", Severity.ERROR, "engines read this file first and fail", "restore the file")
NO_CONFIG = Rule(
    "no-config", Severity.ERROR, "vLLM, SGLang and TensorRT-LLM read the architecture from it", "copy the model's own"
)
NO_TOKENIZER = Rule(
    "no-tokenizer", Severity.NOTE, "engines then need a tokenizer from elsewhere, for text", "copy the model's own"
)
PARTIAL = Rule(
    "unfinished", Severity.WARNING, "engines ignore it; writing was broken off", "remove it, or run the export again"
)


def open_leniently(directory: Path) -> tuple[Checkpoint, list[Finding]]:
    """All tensors that can be read, and what is wrong with the files that hold them.

    Raises FileNotFoundError if there is no such directory, or no safetensors file and no index in it.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory; wanted a checkpoint folder")
    there = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
    has_index = (directory / INDEX_FILE).is_file()
    if not there and not has_index:
        raise FileNotFoundError(f"{directory}: there is no *.safetensors file and no {INDEX_FILE}; wanted a checkpoint")
    findings: list[Finding] = []
    placed = _read_index(directory, findings) if has_index else {}
    wanted = sorted(set(placed.values())) or ([SINGLE_FILE] if SINGLE_FILE in there else there)
    if not has_index and SINGLE_FILE not in there:
        findings.append(UNUSUAL_NAMES.at(there[0], f"{len(there)} files, but no {SINGLE_FILE} and no {INDEX_FILE}"))
    files = {}
    for name in wanted:
        try:
            files[name] = SafetensorsFile(directory / name)
        except FileNotFoundError:
            findings.append(MISSING_SHARD.at(name, f"{INDEX_FILE} names it, and there is no such file"))
        except (OSError, ValueError) as error:
            findings.append(BROKEN.at(name, _message(error, directory)))
    findings += _against_index(placed, files)
    findings += [UNINDEXED.at(name, f"{INDEX_FILE} does not name it") for name in there if name not in wanted]
    if not findings:
        try:
            open_checkpoint(directory)
        except (OSError, ValueError) as error:
            findings.append(BROKEN.at(directory.name, _message(error, directory)))
    return Checkpoint(directory, list(files.values())), findings


def _read_index(directory: Path, findings: list[Finding]) -> dict[str, str]:
    """Tensor name -> file name, without entries that name no file of the directory."""
    content = read_object(directory, INDEX_FILE, findings)
    weight_map = (content or {}).get("weight_map")
    if content is not None and not (isinstance(weight_map, dict) and weight_map):
        findings.append(INDEX.at(INDEX_FILE, f"weight_map is {_short(weight_map)}: wanted an object"))
    placed = {}
    for name, place in (weight_map if isinstance(weight_map, dict) else {}).items():
        if isinstance(place, str) and place.endswith(".safetensors") and not set(place) & set("/\\:\0"):
            placed[name] = place
        else:
            findings.append(
                INDEX.at(name, f"is placed in {_short(place)}: wanted a .safetensors file beside the index")
            )
    return placed


def _against_index(placed: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> Iterator[Finding]:
    if not placed:
        return
    for file_name, file in files.items():
        listed = {name for name, place in placed.items() if place == file_name}
        for name in sorted(listed - set(file.names())):
            yield INDEX.at(name, f"{INDEX_FILE} places it in {file_name}, which does not have it")
        for name in sorted(set(file.names()) - listed):
            yield INDEX.at(name, f"is in {file_name}, but {INDEX_FILE} does not place it there")


def read_object(directory: Path, name: str, findings: list[Finding]) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or, with a finding, if it holds something else."""
    path = directory / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        findings.append(BAD_JSON.at(name, f"no valid JSON ({_message(error, directory)})"))
        return None
    if not isinstance(content, dict):
        findings.append(BAD_JSON.at(name, f"holds a JSON {type(content).__name__}: wanted an object"))
        return None
    return content


def check_directory(directory: Path) -> Iterator[Finding]:
    """Findings about other files than those with tensors."""
    if not (directory / CONFIG_FILE).is_file():
        yield NO_CONFIG.at(CONFIG_FILE, "is not there")
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        yield NO_TOKENIZER.at("the directory", f"has none of {', '.join(_TOKENIZERS)}")
    left = sorted(path.name for path in directory.iterdir() if path.name.endswith(".partial"))
    if directory.resolve().name.endswith(".partial"):
        left.append(directory.resolve().name)
    for name in left:
        yield PARTIAL.at(name, "is the work of an export that was broken off")


def read_configs(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[Finding]]:
    """The content of config.json and of hf_quant_config.json, each None without it."""
    findings: list[Finding] = []
    return read_object(directory, CONFIG_FILE, findings), read_object(directory, MODELOPT_FILE, findings), findings


def _message(error: BaseException, directory: Path) -> str:
    """The error in one line, without the path, which the finding has already."""
    return " ".join(str(error).split()).replace(f"{directory}/", "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
