"""The training script: it learns, on a model small enough for a test, and its parts compute what they say."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import small_config

from jaxfp4.models import load_decoder, train
from jaxfp4.models.train import Settings, balance_loss, learning_rate, with_dropout

SETTINGS = Settings(batch=4, length=16, chunk=10, warmup=2, peak_rate=3e-2)


def test_it_learns_and_saves(tmp_path, monkeypatch, capsys):
    """The whole script, on a library of forty equal files. Slow because it compiles a training step."""
    monkeypatch.setattr(train, "CONFIG", small_config(vocab_size=256, num_hidden_layers=1))
    library = tmp_path / "library"
    library.mkdir()
    for i in range(40):
        (library / f"m{i}.py").write_text("abcd" * 40)
    options = {"batch": 4, "length": 16, "chunk": 10, "warmup": 2, "peak-rate": 3e-2, "dropout": 0.1, "report-every": 1}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    train.main([*arguments, "--steps=20", f"--out={tmp_path / 'out'}", f"--source={library}"])
    printed = capsys.readouterr().out
    assert re.search(r"^\d+ training bytes, \d+ held out", printed)
    first, last = (float(bits) for bits in re.findall(r"step [12]0/20 .* held-out +(\d+\.\d+) +bits per byte", printed))
    assert last < 4 < first + 4
    assert last < first
    saved = load_decoder(tmp_path / "out")
    assert saved.embed.embedding[...].dtype == jnp.bfloat16


class FakeTrainer:
    """Counts the chunks; the clock moves by one second in each, and by a hundred in the first."""

    settings = SETTINGS

    def __init__(self):
        self.now, self.totals, self.saves = 0.0, [], 0

    def advance(self, total):
        self.now += 1 if self.totals else 100
        self.totals.append(total)
        return 1.0

    def heldout_bits(self):
        return 2.0

    def save(self, directory):
        self.saves += 1


def test_a_time_limit_sets_the_number_of_steps(tmp_path, monkeypatch, capsys):
    trainer = FakeTrainer()
    monkeypatch.setattr(time, "monotonic", lambda: trainer.now)
    train.train(trainer, steps=None, seconds=4.5, out=tmp_path, report_every=3)
    assert trainer.totals[3:] == [70] * 4
    assert trainer.saves == 3
    printed = capsys.readouterr().out
    assert "step 30/70  2 s  training 1.0000  held-out 2.0000 bits per byte" in printed
    assert "step 70/70" in printed


def test_learning_rate_schedule():
    settings = dataclasses.replace(SETTINGS, warmup=10, peak_rate=1.0, final_rate=0.1)
    rates = [float(learning_rate(jnp.float32(step), jnp.float32(110), settings)) for step in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)


def test_balance_loss_is_one_when_balanced_and_more_when_not():
    balanced = jnp.tile(jnp.asarray([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]), (8, 1))
    skewed = jnp.tile(jnp.asarray([[0.7, 0.3, 0, 0]]), (16, 1))
    assert float(balance_loss([balanced], 2)) == pytest.approx(1)
    assert float(balance_loss([skewed], 2)) == pytest.approx(2)
    assert float(balance_loss([balanced, skewed], 2)) == pytest.approx(1.5)


def test_dropout_keeps_the_mean_and_draws_a_mask_per_layer():
    dropping = with_dropout(lambda x: x, 0.25, jax.random.key(0))
    first, second = (np.asarray(dropping(jnp.ones((100, 100)))) for _ in range(2))
    assert set(np.unique(first)) == {0, np.float32(256 / 192)}
    assert abs(first.mean() - 1) < 0.03
    assert (first != second).any()


def test_no_dropout_is_the_function_itself():
    def experts(x):
        return x

    assert with_dropout(experts, 0.0, jax.random.key(0)) is experts
