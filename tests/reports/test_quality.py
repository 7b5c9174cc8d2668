"""Bits, KL divergence and top tokens against NumPy in float64, on small logits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.reports import output_quality, reference_logits

ROWS, TIME, VOCABULARY = 3, 5, 7


def give(params, tokens):
    """A model whose logits are its parameters."""
    return params[: tokens.shape[0]]


def doubled(params, tokens):
    return 2 * params[: tokens.shape[0]]


def batches_of_tokens(count=2, seed=0):
    return list(np.random.default_rng(seed).integers(0, VOCABULARY, (count, ROWS, TIME), dtype=np.int32))


def random_logits(seed):
    return np.random.default_rng(seed).normal(size=(ROWS, TIME, VOCABULARY)).astype(np.float32) * 3


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def bits_of(log_probabilities, tokens):
    return -np.take_along_axis(log_probabilities[:, :-1], tokens[:, 1:, None], -1)[..., 0] / np.log(2)


def test_all_figures_against_numpy():
    full, other, batches = random_logits(1), random_logits(2), batches_of_tokens(3)
    found = output_quality(give, jnp.asarray(other), reference_logits(give, jnp.asarray(full), batches))
    p, q = log_softmax(full), log_softmax(other)
    bits, reference_bits = (np.stack([bits_of(side, tokens) for tokens in batches]) for side in (q, p))
    kl = np.tile((np.exp(p) * (p - q)).sum(-1)[:, :-1].ravel(), 3)
    losses = (bits - reference_bits).mean((1, 2))
    expected = {
        "tokens": 3 * ROWS * (TIME - 1),
        "bits": bits.mean(),
        "reference_bits": reference_bits.mean(),
        "loss_standard_error": losses.std(ddof=1) / np.sqrt(3),
        "mean_kl": kl.mean(),
        "kl_standard_error": 0,  # all batches have the same logits
        "median_kl": np.sort(kl)[kl.size // 2 - 1],
        "percentile_99_kl": kl.max(),
        "same_top": (full.argmax(-1) == other.argmax(-1))[:, :-1].mean(),
    }
    assert 0 < expected["same_top"] < 1 and expected["loss_standard_error"] > 0
    assert dataclasses.asdict(found) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)


def test_the_standard_error_of_the_kl_is_over_batches():
    def give_by_token(params, tokens):
        return params * tokens[..., None]

    slope = jnp.arange(2.0)
    batches = [np.full((2, 3), i, np.int32) for i in (0, 1, 1)]
    found = output_quality(give_by_token, slope, reference_logits(give_by_token, 0 * slope, batches))
    one = -np.log(2) - log_softmax(np.arange(2.0)).mean()
    assert found.mean_kl == pytest.approx(2 / 3 * one, rel=1e-5)
    assert found.kl_standard_error == pytest.approx(one / 3, rel=1e-5)  # std of (0, 1, 1) / sqrt(3)


def test_percentile_leaves_one_token_in_a_hundred_above():
    tokens = np.zeros((1, 201), np.int32)
    full = np.zeros((1, 201, 2), np.float32)
    other = full.copy()
    other[0, :3, 0] = [4, 8, 2]  # the last column of 201 predicts nothing
    found = output_quality(give, jnp.asarray(other), reference_logits(give, jnp.asarray(full), [tokens]))
    third = -np.log(2) - log_softmax(other)[0, 2].mean()
    assert (found.median_kl, found.percentile_99_kl) == (0, pytest.approx(third, rel=1e-5))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    uniform = jnp.zeros((ROWS, TIME, 8))
    found = output_quality(give, uniform, reference_logits(give, uniform, batches_of_tokens()))
    assert found.bits == found.reference_bits == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_models_have_no_divergence(dtype):
    logits = jnp.asarray(random_logits(0), dtype)
    found = output_quality(give, logits, reference_logits(give, logits, batches_of_tokens()))
    assert (found.mean_kl, found.median_kl, found.percentile_99_kl, found.same_top) == (0, 0, 0, 1)
    assert found.loss == found.loss_standard_error == 0


def test_a_sharper_model_has_the_same_top_tokens_and_another_kl():
    logits = jnp.asarray(random_logits(0))
    found = output_quality(doubled, logits, reference_logits(give, logits, batches_of_tokens()))
    assert found.same_top == 1 and found.mean_kl > found.median_kl > 0


@pytest.mark.parametrize("side", ["full", "quantized"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_not_hidden(side, value):
    sound, broken = random_logits(0), random_logits(0)
    broken[1, 2, 3] = value
    full, other = (broken, sound) if side == "full" else (sound, broken)
    found = output_quality(give, jnp.asarray(other), reference_logits(give, jnp.asarray(full), batches_of_tokens()))
    values = dataclasses.asdict(found)
    finite = {"tokens", "reference_bits"} if side == "quantized" else {"tokens", "bits"}
    assert {name for name, v in values.items() if np.isfinite(v)} == finite


def test_excluded_tokens():
    """A token that only the full model excludes adds nothing; one that only the other excludes costs infinity."""
    sound, broken = np.zeros((ROWS, TIME, VOCABULARY), np.float32), np.zeros((ROWS, TIME, VOCABULARY), np.float32)
    broken[..., 6] = -np.inf
    batches = [np.zeros((ROWS, TIME), np.int32)] * 2
    found = output_quality(give, jnp.asarray(sound), reference_logits(give, jnp.asarray(broken), batches))
    assert found.mean_kl == pytest.approx(np.log(7 / 6), rel=1e-5)
    found = output_quality(give, jnp.asarray(broken), reference_logits(give, jnp.asarray(sound), batches))
    assert found.mean_kl == found.percentile_99_kl == np.inf and found.bits < 3
    batches = [np.full((ROWS, TIME), 6, np.int32)] * 2
    found = output_quality(give, jnp.asarray(broken), reference_logits(give, jnp.asarray(sound), batches))
    assert found.bits == np.inf and np.isnan(found.loss_standard_error)


def test_one_batch_has_no_standard_error():
    logits = jnp.asarray(random_logits(0))
    found = output_quality(doubled, logits, reference_logits(give, logits, batches_of_tokens(1)))
    assert np.isnan(found.loss_standard_error) and np.isfinite(found.loss)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty: wanted at least one"),
        ([np.zeros((ROWS, 1), np.int32)], r"shape \(3, 1\): wanted \[batch, time\] with time at least 2"),
        ([np.zeros(TIME, np.int32)], r"shape \(5,\): wanted"),
        ([np.zeros((0, TIME), np.int32)], r"shape \(0, 5\): wanted"),
        ([np.zeros((ROWS, 4), np.int32)], r"apply_fn gives \(3, 5, 7\) for tokens \(3, 4\): wanted logits"),
    ],
)
def test_unusable_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        reference_logits(give, jnp.asarray(random_logits(0)), batches)
