"""What the digest covers, and what it does not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms import digest
from jaxfp4.formats import LeafError
from jaxfp4.tensors import QuantizedWeight, global_amax, quantize


def weight(seed: int = 0, shape=(32, 8), axis=0, keep=(), input_scale=0.5) -> QuantizedWeight:
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    scale = None if input_scale is None else jnp.asarray(input_scale, jnp.float32)
    return QuantizedWeight(quantize(w, axis, global_amax=global_amax(w, keep_axes=keep) if keep else None), scale)


QPARAMS = {"a": weight(0), "b": weight(1), "kept": jnp.ones(3)}


def changed(field: str, leaf: QuantizedWeight) -> QuantizedWeight:
    """The same weight with one byte of one array changed."""
    array = np.asarray(getattr(leaf.weight, field)).copy()
    array.reshape(-1).view(np.uint8)[-1] ^= 1
    return dataclasses.replace(leaf, weight=dataclasses.replace(leaf.weight, **{field: array}))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("field", ["packed", "scales", "global_scale"])
def test_every_byte_counts(name, field):
    assert digest(QPARAMS | {name: changed(field, QPARAMS[name])}) != digest(QPARAMS)


def test_weights_swapped():
    assert digest(QPARAMS | {"a": QPARAMS["b"], "b": QPARAMS["a"]}) != digest(QPARAMS)


def test_other_leaves_do_not_count():
    assert digest(QPARAMS | {"kept": jnp.zeros(9)}) == digest(QPARAMS)


def test_input_scales_count_if_asked():
    other = QPARAMS | {"a": dataclasses.replace(QPARAMS["a"], input_scale=jnp.float32(0.25))}
    without = QPARAMS | {"a": dataclasses.replace(QPARAMS["a"], input_scale=None)}
    assert digest(other) == digest(QPARAMS) == digest(without)
    assert len({digest(q, inputs=True) for q in (other, QPARAMS, without)}) == 3
    assert digest(QPARAMS, inputs=True) != digest(QPARAMS)


def stacked(axis: int, keep=None, **facts) -> tuple[QuantizedWeight, list[QuantizedWeight]]:
    """Three layers stacked along an axis, and the same layers apart."""
    layers = [np.random.default_rng(i).normal(size=(32, 8)).astype(np.float32) for i in range(3)]
    scales = jnp.arange(1.0, 4)
    w = np.stack(layers, axis)
    contraction = 0 if axis > 0 else 1
    whole = quantize(w, contraction, global_amax=global_amax(w, keep_axes=(axis,)))
    return QuantizedWeight(whole, scales), [
        QuantizedWeight(quantize(layer, 0), scale) for layer, scale in zip(layers, scales, strict=True)
    ]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layers_stacked_along_any_axis(axis):
    whole, parts = stacked(axis)
    apart = {"layers": [{"w": part, "v": QPARAMS["a"]} for part in parts]}
    together = {"layers": {"w": whole, "v": QPARAMS["a"]}}
    assert digest({"w": whole}, inputs=True) == digest({"w": parts}, inputs=True)
    assert digest({"layers": {"w": whole}}) == digest({"layers": [{"w": p} for p in parts]})
    assert digest({"layers": {"w": whole}}) == digest({f"layers_{i}": {"w": p} for i, p in enumerate(parts)})
    assert digest(together) != digest(apart)  # `v` is there three times.


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("field", ["packed", "scales", "global_scale"])
def test_every_byte_of_a_stack_counts(axis, field):
    whole, _ = stacked(axis)
    seen = {digest({"w": whole})}
    array = np.asarray(getattr(whole.weight, field))
    flat = array.copy().reshape(-1).view(np.uint8)
    for position in range(0, flat.size, max(1, flat.size // 24)):
        other = flat.copy()
        other[position] ^= 1
        tensor = dataclasses.replace(whole.weight, **{field: other.view(array.dtype).reshape(array.shape)})
        seen.add(digest({"w": dataclasses.replace(whole, weight=tensor)}))
    assert len(seen) == 1 + len(range(0, flat.size, max(1, flat.size // 24)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_input_scale_of_a_stack_counts(axis, layer):
    whole, _ = stacked(axis)
    other = dataclasses.replace(whole, input_scale=whole.input_scale.at[layer].set(9))
    assert digest({"w": whole}) == digest({"w": other})
    assert digest({"w": whole}, inputs=True) != digest({"w": other}, inputs=True)


def test_stack_behind_a_merged_contraction():
    """Contraction axes of 4 and 12 are stored as one in front of the layers."""
    w = np.random.default_rng(0).normal(size=(4, 12, 3, 8)).astype(np.float32)
    whole = QuantizedWeight(quantize(w, (0, 1), global_amax=global_amax(w, keep_axes=(2,))), jnp.ones(3))
    parts = [QuantizedWeight(quantize(w[:, :, i], (0, 1)), jnp.float32(1)) for i in range(3)]
    assert digest({"w": whole}, inputs=True) == digest({"w": parts}, inputs=True)


def test_stack_of_layers_and_experts():
    """With one scale for each expert, experts count behind layers, also where layers are kept apart."""
    w = np.random.default_rng(0).normal(size=(2, 3, 32, 8)).astype(np.float32)
    whole = QuantizedWeight(quantize(w, 2, global_amax=global_amax(w, keep_axes=(0, 1))), jnp.array([1.0, 2.0]))
    parts = [
        QuantizedWeight(quantize(w[i], 1, global_amax=global_amax(w[i], keep_axes=(0,))), jnp.float32(i + 1))
        for i in range(2)
    ]
    assert digest({"layers": {"w": whole}}, inputs=True) == digest({"layers": [{"w": p} for p in parts]}, inputs=True)


def test_stacks_of_layers_in_numbered_groups():
    """A pattern of layers, scanned group by group: the path's number comes before the position in the stack."""
    groups = [stacked(0), stacked(1)]
    together = {"groups": [{"layers": {"w": whole}} for whole, _ in groups]}
    apart = {"groups": [{"layers": [{"w": part} for part in parts]} for _, parts in groups]}
    assert digest(together, inputs=True) == digest(apart, inputs=True)


def test_more_than_ten_layers_in_order():
    """Layer 10 comes after layer 2."""
    parts = [weight(i) for i in range(12)]
    assert digest({"w": parts}) == digest({f"w_{i}": p for i, p in enumerate(parts)})


def test_nothing_quantized():
    with pytest.raises(ValueError, match="qparams holds no QuantizedWeight: wanted the result of quantize_params"):
        digest({"w": jnp.ones((2, 2))})


def test_weights_of_other_processes(monkeypatch):
    array = QPARAMS["a"].weight.packed
    monkeypatch.setattr(type(array), "is_fully_addressable", property(lambda self: False))
    with pytest.raises(LeafError, match=r"^a: spread over several processes; wanted all shards here; gather it first"):
        digest(QPARAMS)


def test_survives_a_move_to_the_host():
    assert digest(jax.device_get(QPARAMS), inputs=True) == digest(QPARAMS, inputs=True)
