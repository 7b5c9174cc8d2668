"""How parameters are named in a checkpoint."""

import numpy as np
import pytest

from jaxfp4.checkpoints.names import TensorName, default_name, refuse_unmatched, resolve_name
from jaxfp4.formats import LeafError


@pytest.mark.parametrize(
    ("path", "ndim", "quantized", "wanted"),
    [
        ("layers/0/up/kernel", 2, True, TensorName("layers.0.up")),
        ("layers/0/up/kernel", 2, False, TensorName("layers.0.up", transpose=True)),
        ("layers/0/conv/kernel", 4, False, TensorName("layers.0.conv")),
        ("layers/0/up/weight", 2, False, TensorName("layers.0.up")),
        ("layers/0/wq", 2, True, TensorName("layers.0.wq")),
        ("layers/0/q/bias", 1, False, TensorName("layers.0.q", parameter="bias")),
        ("layers/0/k_proj/k_scale", 0, False, TensorName("layers.0.k_proj", parameter="k_scale")),
        ("embed/embedding", 2, False, TensorName("embed")),
        ("norm/scale", 1, False, TensorName("norm")),
        ("kernel", 2, True, TensorName("")),
    ],
)
def test_default_names_follow_the_path(path, ndim, quantized, wanted):
    assert default_name(path, ndim, quantized=quantized) == wanted
    assert resolve_name(path, (16,) * ndim, None, quantized=quantized) == wanted


@pytest.mark.parametrize(
    ("path", "shape", "module", "wanted"),
    [
        ("a/kernel", (16, 32), "model.a", TensorName("model.a", transpose=True)),
        ("a/kernel", (4, 16, 32), "model.{layer}.a", TensorName("model.{layer}.a", transpose=True)),
        ("a/bias", (4, 16), "model.{layer}.a", TensorName("model.{layer}.a", parameter="bias")),
        ("a/router", (16, 8), "model.gate", TensorName("model.gate")),
    ],
)
def test_a_string_is_the_module_and_the_rest_stays_default(path, shape, module, wanted):
    assert resolve_name(path, shape, module, quantized=False) == wanted


def test_both_stack_fields_count_layers_first_whatever_their_order_in_the_name():
    name = TensorName("e.{expert}.l.{layer}.{layer}")
    assert list(name.modules((2, 3, 16))) == [((i, j), f"e.{j}.l.{i}.{i}") for i in range(2) for j in range(3)]


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(
        LeafError, match=r"a/b: module name 'x.\{expert_id\}': wanted no braces but \{layer\} and \{expert\}"
    ):
        resolve_name("a/b", (2, 16), "x.{expert_id}", quantized=True)
    with pytest.raises(
        LeafError, match=r"a/b: shape \(16,\) for .*: wanted one leading axis for each of \['\{layer\}'"
    ):
        resolve_name("a/b", (16,), TensorName("x.{layer}.{expert}"), quantized=True)
    with pytest.raises(LeafError, match=r"a/b: shape \(2, 16\) for .*, and two more to transpose; correct the name"):
        resolve_name("a/b", (2, 16), TensorName("x.{layer}", transpose=True), quantized=False)
    with pytest.raises(LeafError, match="a/b: parameter='w' for a QuantizedWeight: wanted 'weight'; leave it out"):
        resolve_name("a/b", (16, 16), TensorName("x", parameter="w"), quantized=True)
    with pytest.raises(TypeError, match=r"names\['a/b'\] is 3: wanted the module's name as a string, or a TensorName"):
        resolve_name("a/b", (16,), 3, quantized=True)


def test_unmatched_names_are_refused():
    refuse_unmatched({"a": "b"}, ["a", "c"])
    with pytest.raises(
        ValueError, match=r"names has 'x' and 1 more, which match no leaf: wanted .* such as 'a'; correct"
    ):
        refuse_unmatched({"x": "b", "y": "b", "a": "b"}, ["a", "c"])
    with pytest.raises(ValueError, match="names has 'x', which match no leaf: wanted paths of the tree; correct"):
        refuse_unmatched({"x": "b"}, [])


def test_a_stack_of_no_entries_names_no_module():
    assert list(TensorName("x.{expert}").modules(np.zeros((0, 4)).shape)) == []
