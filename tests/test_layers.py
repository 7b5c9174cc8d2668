"""The package's structure: layers import only downwards, and a few habits hold everywhere."""

import ast
import functools
from pathlib import Path

import pytest

import jaxfp4

ROOT = Path(jaxfp4.__file__).parent
LAYERS = {
    "formats": 0,
    "kernels": 1,
    "tensors": 2,
    "transform": 3,
    "algorithms": 4,
    "recipes": 4,
    "models": 5,
    "checkpoints": 5,
    "reports": 5,
}
TOP_LAYER = 6
"""`jaxfp4/__init__.py`, the command line and every other module at the top."""

MOST_LINES = 400


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}

each_module = pytest.mark.parametrize("module", MODULES)


@functools.cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@functools.cache
def imports(module: str) -> frozenset[str]:
    """All modules that it imports, anywhere in its text, `from package import module` counted as the module."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(syntax(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {source}
            if not names <= MODULES.keys():
                found.add(source)
    return frozenset(found)


def layer(module: str) -> int:
    parts = module.split(".")
    return LAYERS.get(parts[1], TOP_LAYER) if len(parts) > 1 else TOP_LAYER


def own_imports(module: str) -> list[str]:
    return sorted(name for name in imports(module) if name.split(".")[0] == "jaxfp4")


def test_there_is_something_to_look_at():
    assert {"jaxfp4", "jaxfp4.formats.nvfp4", "jaxfp4.tensors.mesh"} <= MODULES.keys()
    assert "jaxfp4.formats.exact" in imports("jaxfp4.tensors.reductions")
    assert "jax.sharding" in imports("jaxfp4.tensors.mesh")


@each_module
def test_imports_go_downwards(module):
    upwards = [name for name in own_imports(module) if layer(name) > layer(module)]
    assert not upwards, f"{module} of layer {layer(module)} imports {upwards}"


def test_no_import_cycles():
    finished, path = set(), []

    def visit(module):
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in finished:
            return
        path.append(module)
        for name in own_imports(module):
            if name in MODULES and name != module:
                visit(name)
        finished.add(path.pop())

    for module in MODULES:
        visit(module)


@each_module
def test_only_public_jax(module):
    private = [name for name in imports(module) if name.startswith(("jax._src", "jaxlib", "jax.interpreters"))]
    assert not private, f"{module} imports {private}"


@each_module
def test_only_models_import_flax(module):
    flax = [name for name in imports(module) if name.split(".")[0] == "flax"]
    assert not flax or module.startswith("jaxfp4.models"), f"{module} imports {flax}"


@each_module
def test_modules_stay_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MOST_LINES


@each_module
def test_no_guessing_at_attributes_and_no_asserts(module):
    """No `hasattr`, no `getattr` with a default, no `assert` that vanishes under `python -O`."""
    for node in ast.walk(syntax(module)):
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno}: assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"{module}:{node.lineno}: hasattr"
            default = node.func.id == "getattr" and len(node.args) + len(node.keywords) > 2
            assert not default, f"{module}:{node.lineno}: getattr with a default"


def test_jitted_functions_are_paced():
    """Whatever may be called in a loop over weights; the user's own `calibrate_fn` is left to the user."""
    unpaced = set()
    for module in MODULES:
        if module.split(".")[1:2] not in (["tensors"], ["transform"], ["algorithms"]):
            continue
        for node in ast.walk(syntax(module)):
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("jax.jit" in text for text in decorators) and decorators[0] != "paced":
                    unpaced.add(f"{module}.{node.name}")
    assert unpaced == {"jaxfp4.algorithms.calibration.calibrate_fn"}
