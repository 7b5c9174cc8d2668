"""Several processes write one checkpoint: each files of its own, together the bytes that one process writes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import two_processes

from jaxfp4.checkpoints import export_checkpoint, open_checkpoint
from jaxfp4.checkpoints.pending import PendingTensor
from jaxfp4.checkpoints.processes import assigned

SCRIPT = Path(two_processes.__file__)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The folder that two processes exported into, and what each raised, by folder: three exports of one pair."""
    directory = tmp_path_factory.mktemp("exports")
    for folder in two_processes.FOLDERS:
        (directory / folder).mkdir()
    (directory / "existing" / "out").mkdir()
    port = free_port()
    commands = [[sys.executable, str(SCRIPT), str(port), str(process), str(directory)] for process in range(2)]
    started = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True, cwd=SCRIPT.parents[2]) for c in commands]
    errors = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return directory, [json.loads((directory / f"{process}.json").read_text()) for process in range(2)]


def test_two_processes_write_what_one_writes(exports, tmp_path):
    """After a failure, too: the pair's first two exports are those of the tests below."""
    directory, raised = exports[0] / "good", exports[1]
    assert [of_process["good"] for of_process in raised] == [None, None]
    names = sorted(path.name for path in (directory / "out").iterdir())
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names == ["config.json", "hf_quant_config.json", *files, "model.safetensors.index.json"]
    export_checkpoint(
        two_processes.tree(lambda array, *spec: array),
        tmp_path / "one",
        names=two_processes.NAMES,
        config={"model_type": "x"},
    )
    found, wanted = open_checkpoint(directory / "out"), open_checkpoint(tmp_path / "one")
    assert sorted(found.names()) == sorted(wanted.names())
    for name in wanted.names():
        assert found.info(name) == wanted.info(name), name
        assert found.tensor(name).tobytes() == wanted.tensor(name).tobytes(), name
    for name in ("config.json", "hf_quant_config.json"):
        assert (directory / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    sizes = [(directory / "out" / name).stat().st_size for name in files]
    assert min(sizes) > 0.3 * sum(sizes)  # each holds its share
    assert [path.name for path in directory.iterdir()] == ["out"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_failure_on_one_process_is_one_on_all(exports):
    directory, raised = exports
    (kind, error), (other_kind, other_error) = (of_process["failing"] for of_process in raised)
    assert kind == other_kind == "OSError"
    assert "writing failed on process 1: wanted success on all; nothing was left" in error
    assert "writing failed: No space left on device" in other_error
    assert list((directory / "failing").iterdir()) == []


def test_an_existing_target_is_refused_by_all(exports):
    directory, raised = exports
    for of_process in raised:
        assert "out exists already: wanted a directory to create" in of_process["existing"][1]
    assert [path.name for path in (directory / "existing").iterdir()] == ["out"]
    assert list((directory / "existing" / "out").iterdir()) == []


@pytest.mark.parametrize("holders, wanted", [([(0,), (0,), (1,)], [2, 1]), ([None] * 4, [2, 2]), ([()] * 3, [2, 1])])
def test_tensors_go_to_a_holder_with_little_to_write(holders, wanted):
    tensors = [
        PendingTensor(f"t{i}", np.dtype(np.uint8), (8,), lambda: np.zeros(8, np.uint8), h)
        for i, h in enumerate(holders)
    ]
    parts = assigned(tensors, 2)
    assert [len(part) for part in parts] == wanted
    for process, part in enumerate(parts):
        assert all(not tensor.holders or process in tensor.holders for tensor in part)
