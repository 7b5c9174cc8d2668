"""The model in the package: its size, its layout, what it predicts, and the measure of that."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import auto_mesh
from flax import nnx

from jaxfp4.models import (
    BUILTIN_DIRECTORY,
    bits_per_byte,
    builtin_config,
    heldout_batches,
    heldout_bytes,
    load_builtin,
    training_bytes,
)
from jaxfp4.models.train import CONFIG


def apply(params, tokens):
    return params(tokens)


def test_it_is_the_configuration_that_the_script_trains():
    assert builtin_config() == CONFIG


def test_it_is_small_and_complete():
    assert sorted(file.name for file in BUILTIN_DIRECTORY.iterdir()) == ["config.json", "model.safetensors"]
    assert sum(file.stat().st_size for file in BUILTIN_DIRECTORY.iterdir()) <= 4_000_000
    leaves = jax.tree.leaves(nnx.state(load_builtin(), nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves)


def test_it_predicts_text_that_it_was_not_trained_on():
    """Far below the entropy of single bytes; the text is other text under each Python version, hence the margin."""
    counts = np.bincount(np.frombuffer(training_bytes(), np.uint8), minlength=256) + 1
    unigram = -np.log2(counts / counts.sum())[np.frombuffer(heldout_bytes(), np.uint8)].mean()
    bits = bits_per_byte(apply, load_builtin(), heldout_batches(2, 32, 256))
    assert unigram > 4
    assert bits < 1.8


def test_all_experts_are_used():
    tokens = heldout_batches(1, 4, 256)[0]
    _, routing = jax.jit(lambda model, tokens: model.with_routing(tokens))(load_builtin(), tokens)
    assert len(routing) == 4
    for probabilities in routing:
        _, chosen = jax.lax.top_k(probabilities, 2)
        share = np.bincount(np.asarray(chosen).ravel(), minlength=8) / chosen.size
        assert share.min() > 0.02


def test_a_mesh_hardly_changes_the_figure():
    batches = heldout_batches(1, 2, 64)
    one, eight = (bits_per_byte(apply, load_builtin(mesh), batches) for mesh in (None, auto_mesh(tp=4, ep=2)))
    assert abs(one - eight) < 0.02


def uniform(params, tokens):
    return jnp.zeros((*tokens.shape, 256))


def knowing(params, tokens):
    return 100.0 * jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), 256)


def halves(params, tokens):
    return jnp.where(jnp.arange(256) < 2, 0.0, -jnp.inf) + jnp.zeros((*tokens.shape, 1))


@pytest.mark.parametrize(("model", "bits"), [(uniform, 8), (knowing, 0), (halves, 1)])
def test_bits_per_byte_of_known_models(model, bits):
    tokens = np.random.default_rng(0).integers(0, 2, (3, 10)).astype(np.int32)
    assert bits_per_byte(model, None, [tokens, tokens[:1]]) == pytest.approx(bits, abs=1e-5)


def test_bits_per_byte_compiles_once():
    traces = []

    def counting(params, tokens):
        traces.append(tokens.shape)
        return jnp.zeros((*tokens.shape, 256)) + params

    for params in (0.0, 1.0):
        bits_per_byte(counting, jnp.float32(params), [np.zeros((2, 5), np.int32)] * 3)
    assert traces == [(2, 5)]


def test_bits_per_byte_shows_a_broken_model():
    assert math.isnan(
        bits_per_byte(lambda p, t: jnp.full((*t.shape, 256), jnp.nan), None, [np.zeros((1, 2), np.int32)])
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty, wanted at least one array of tokens"),
        ([np.zeros((2, 1), np.int32)], r"a batch has shape \(2, 1\), wanted \[batch, time\] with time at least 2"),
        ([np.zeros(5, np.int32)], r"a batch has shape \(5,\), wanted \[batch, time\] with time at least 2"),
    ],
)
def test_bits_per_byte_refuses(batches, message):
    with pytest.raises(ValueError, match=f"^bits_per_byte: {message}$"):
        bits_per_byte(uniform, None, batches)
