"""The rotation and its rules: read from a config, computed, refused. tests/interop compares them with transformers."""

import re

import numpy as np
import pytest
from decoder_cases import small_config

from jaxfp4.models import DecoderConfig
from jaxfp4.models.rotary import Dynamic, Linear, Llama3, LongRope, Yarn, plain_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1, 1, 1, 2], "long_factor": [2, 3, 4, 5], "original_max_position_embeddings": 32}


def config_with(table, key="rope_parameters", **beside):
    return small_config("llama", **{"rope_parameters": None, key: table} | beside)


TABLES = [
    ({"rope_type": "linear", "factor": 2}, Linear(2.0)),
    ({"rope_type": "dynamic", "factor": 2}, Dynamic(2.0)),
    ({"rope_type": "llama3", **LLAMA3}, Llama3(8.0, 1.0, 4.0, 32)),
    ({"rope_type": "yarn", "factor": 4.0}, Yarn(4.0, 64)),
    ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}, Yarn(4.0, 16)),
    (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": None, "mscale": 0, "truncate": False},
        Yarn(4.0, 64, beta_fast=16.0, mscale=0.0, truncate=False),
    ),
    ({"rope_type": "longrope", **LONG}, LongRope((1.0, 1.0, 1.0, 2.0), (2.0, 3.0, 4.0, 5.0), 2.0, 32)),
    ({"rope_type": "default"}, None),
]


@pytest.mark.parametrize(("table", "scaling"), TABLES)
def test_both_spellings_mean_the_same(table, scaling):
    new = config_with(table | {"rope_theta": 5e5, "partial_rotary_factor": 1.0})
    assert (new.rope_theta, new.rope_scaling) == (5e5, scaling)
    assert config_with(table, "rope_scaling", rope_theta=5e5) == new
    old = {("type" if key == "rope_type" else key): value for key, value in table.items()}
    assert config_with(old, "rope_scaling", rope_theta=5e5) == new
    assert small_config("llama", rope_parameters=table | {"rope_theta": 5e5}, rope_scaling=old, rope_theta=5e5) == new


@pytest.mark.parametrize(("table", "scaling"), TABLES)
def test_round_trip_in_either_spelling(table, scaling):
    config = config_with(table)
    written = config.to_hf()
    assert DecoderConfig.from_hf(written) == config
    for left_out in (["rope_parameters"], ["rope_scaling", "rope_theta"]):
        assert DecoderConfig.from_hf({key: value for key, value in written.items() if key not in left_out}) == config


def test_the_trained_length_may_stand_beside_the_table():
    config = config_with({"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=16)
    assert config.rope_scaling == Yarn(4.0, 16)


REFUSED = [
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', which is not supported; supported: a table with rope_type"),
    (
        {"rope_scaling": {"rope_type": "mrope"}},
        "rope_scaling.rope_type is 'mrope', which is not supported; supported: default, linear, dynamic, llama3, ",
    ),
    ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.rope_type is ['yarn'], which is not supported; supported: "),
    (
        {"rope_scaling": {"rope_type": "yarn", "type": "linear"}},
        "rope_scaling has rope_type 'yarn' but type 'linear'; wanted one of them",
    ),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1, wanted a positive number"),
    (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6},
        "rope_parameters.rope_theta is 10000.0, but rope_theta beside it is 1000000.0; wanted one value",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": {"rope_type": "linear", "factor": 3}},
        "rope_scaling is {'rope_type': 'linear', 'factor': 3}, but rope_parameters is {'rope_type': 'linear', ",
    ),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is 0.5, which is not supported; supported: 1.0",
    ),
    (
        {"rope_parameters": {"full_attention": {}}},
        "rope_parameters.full_attention is {}, which is not supported; supported: with rope_type 'default', only rope_",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "mrope_section": [1]}},
        "rope_parameters.mrope_section is [1], which is not supported; supported: with rope_type 'linear', factor",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing; rope_type 'linear' needs it"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing; rope_type 'yarn' needs it"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
        "rope_parameters.factor is '2', wanted a positive number",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": None}},
        "rope_parameters.truncate is None, wanted true or false",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": -1}},
        "rope_parameters.mscale is -1, wanted a positive number",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2}, "rope_theta": 1},
        "rope_type 'yarn' with rope_theta 1.0 and original_max_position_embeddings 64, wanted both above 1",
    ),
    (
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 16},
        "original_max_position_embeddings is 16, but in the rotary table 32; wanted one value",
    ),
    (
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}},
        "high_freq_factor is 1.0, wanted more than low_freq_factor, which is 1.0",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", **LONG, "long_factor": 2}},
        "rope_parameters.long_factor is 2, wanted a list of positive numbers",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", **LONG, "long_factor": [2, 3]}},
        "long_factor has 2 numbers, wanted head_dim / 2, which is 4",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused(change, message):
    with pytest.raises(ValueError, match="^model config: " + re.escape(message)):
        small_config("llama", **{"rope_parameters": None} | change)


def test_llama3_keeps_the_high_frequencies_and_divides_the_low_ones():
    rule = Llama3(8.0, 1.0, 4.0, 8192)
    plain, found = plain_frequencies(5e5, 128), rule.rotation(5e5, 128, 1, 131072).frequencies
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(found[turns > 4.001], plain[turns > 4.001])
    np.testing.assert_array_equal(found[turns < 0.999], plain[turns < 0.999] / 8)
    between = (turns > 1) & (turns < 4)
    assert np.all((found[between] < plain[between]) & (found[between] > plain[between] / 8)) and between.sum() > 3


def test_yarn_keeps_the_first_pairs_and_divides_the_last_ones():
    rotation = Yarn(4.0, 32768).rotation(1e6, 128, 1, 131072)
    ratio = rotation.frequencies / plain_frequencies(1e6, 128)
    # 32 turns fit into the trained length up to pair 23.6, one turn up to pair 39.7.
    np.testing.assert_allclose(ratio[:24], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[40:], 0.25, rtol=1e-6)
    assert np.all(np.diff(ratio[23:41]) < 0)
    assert rotation.magnitude == pytest.approx(0.1 * np.log(4) + 1)


def test_what_depends_on_the_length_of_the_sequence():
    dynamic = Dynamic(2.0)
    plain = plain_frequencies(1e4, 8)
    np.testing.assert_array_equal(dynamic.rotation(1e4, 8, 64, 64).frequencies, plain)
    np.testing.assert_allclose(
        dynamic.rotation(1e4, 8, 128, 64).frequencies, plain_frequencies(1e4 * 3 ** (8 / 6), 8), rtol=1e-6
    )
    long_rope = config_with({"rope_type": "longrope", **LONG})
    np.testing.assert_array_equal(long_rope.rotation(32).frequencies, plain / np.float32([1, 1, 1, 2]))
    np.testing.assert_allclose(long_rope.rotation(33).frequencies, plain / [2, 3, 4, 5], rtol=1e-6)
    assert long_rope.rotation(33).magnitude == pytest.approx(np.sqrt(1 + np.log(2) / np.log(32)))
