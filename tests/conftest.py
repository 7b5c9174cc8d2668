"""Eight virtual CPU devices for the whole run, set once, before any backend starts, and a cache of compiled programs.

Most of the tests' time is compilation, and many tests compile the same programs. JAX keeps them by the program and the
flags, so none is taken for another. Each xdist worker has its own cache, because JAX does not write entries atomically.
"""

import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# It needs Model-Optimizer, which no test does.
collect_ignore = ["golden/make_modelopt_algorithms.py"]

_compiled = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config: pytest.Config) -> None:
    """Keeps every program that is compiled, however small, until the end of the run."""
    config.stash[_compiled] = tempfile.TemporaryDirectory(prefix="jaxfp4-compiled-")
    jax.config.update("jax_compilation_cache_dir", config.stash[_compiled].name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_compiled].cleanup()
