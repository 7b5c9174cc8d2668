"""Errors that name the leaf, and how leaves are named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxfp4.formats import LeafError, path_string
from jaxfp4.formats.errors import leaf


def test_leaf_prefixes_a_value_error_and_keeps_its_cause():
    with pytest.raises(LeafError, match=r"^layers/0/kernel: holds NaN$") as caught, leaf("layers/0/kernel"):
        raise ValueError("holds NaN")
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_innermost_leaf_wins():
    with pytest.raises(LeafError, match=r"^inner: broken$"), leaf("outer"), leaf("inner"):
        raise ValueError("broken")


def test_other_errors_pass_unchanged():
    with pytest.raises(TypeError, match=r"^an int$"), leaf("kernel"):
        raise TypeError("an int")


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"a": [1.0, {"b": 2.0}]}, ["a/0", "a/1/b"]),
        ({"value": 1.0}, ["value"]),
        ({"layer": {"kernel": nn.Partitioned(jnp.ones(2), ("tp",))}}, ["layer/kernel"]),
        (nnx.State({"layer": {"kernel": nnx.Param(jnp.ones(2))}}), ["layer/kernel"]),
        (3.0, [""]),
    ],
    ids=["lists and dicts", "a key named value", "linen box", "nnx box", "bare leaf"],
)
def test_path_string(tree, paths):
    assert [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] == paths
