"""Arrays split over all GPUs of the machine: `pytest -m gpu -n 0`; skipped where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden_data import assert_same_bits, nvfp4_cases
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernels.arrays import KINDS, hostile
from tensors.logical import assert_quantized
from tensors.meshes import collectives, put

import jaxfp4
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.recipes import FourOverSix, Method, Mse
from jaxfp4.tensors import block_amax, fake_quantize, global_amax, quantize, quantize_unchecked
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.mesh import layout_of
from jaxfp4.tensors.quantize import NEAREST, _quantize_sharded
from jaxfp4.tensors.together import Order, _programs, placed, quantize_together

pytestmark = pytest.mark.gpu

PLATFORM = "gpu"
BOTH_KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
METHODS = pytest.mark.parametrize("method", [Method(), Method(Mse()), Method(FourOverSix())], ids=["max", "mse", "4/6"])
STACK = P("ep", "tp")
STACK_SPECS = (STACK, P("ep", None, "tp"))


@pytest.fixture(params=["tp", "both"])
def mesh(request):
    """A function of the kind of its axes: a mesh over as many GPUs as is a power of two, at most eight.

    Of two GPUs "both" is one with `tp` = 1 and `ep` = 2.
    """
    devices = [device for device in jax.devices() if device.platform == PLATFORM]
    count = min(8, 1 << (len(devices).bit_length() - 1))
    if count < 2:
        pytest.skip(f"wanted several GPUs, found {len(devices)}")
    sizes = {"tp": (count, 1), "both": (count // 2, 2)}[request.param]
    return lambda kind=AxisType.Auto: jax.make_mesh(
        sizes, ("tp", "ep"), axis_types=(kind,) * 2, devices=devices[:count]
    )


def on_cpu(x):
    return jax.device_put(x, jax.devices("cpu")[0])


def stack(kind="normal", dtype=jnp.bfloat16):
    return hostile(kind, (8, 256, 128), dtype)


def parts(tensor):
    return [np.asarray(part) for part in (tensor.packed, tensor.scales, tensor.global_scale)]


def assert_same_parts(found, wanted):
    for one, other in zip(parts(found), parts(wanted), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(P(("tp", "ep")), AxisType.Auto), (P(None, ("tp", "ep")), AxisType.Explicit)],
    ids=["rows", "contraction"],
)
def test_golden_bytes(mesh, spec, kind):
    """What Model-Optimizer wrote, from arrays split along the rows or along the contraction, in both axis orders."""
    on = mesh(kind)
    for case in nvfp4_cases():
        if len(case.w) % on.size or case.w.shape[1] % on.size:
            continue
        expected = case.packed, case.scales, case.scale_2
        w = case.w.astype(case.dtype)
        tensor = quantize(put(w, on, spec), -1)
        assert_quantized(tensor, expected)
        values = reference.dequantize_last_axis(*expected).astype(case.dtype)
        assert_same_bits(tensor.dequantize(), values)
        assert_same_bits(fake_quantize(put(w, on, spec)), values)
        turned = quantize(put(w.T.copy(), on, P(*reversed((*spec, None)[:2]))), 0)
        assert_quantized(turned, (case.packed.T, case.scales.T, case.scale_2))


@METHODS
@pytest.mark.parametrize("spec", STACK_SPECS, ids=str)
def test_kernels_on_shards_give_what_plain_jax_gives_on_gpus_and_on_the_cpu(mesh, spec, method):
    """Eagerly the kernels run on each shard; under jit on Auto axes the compiler splits plain JAX."""
    encoder, divisor = encoder_for(method), method.scales.divisor

    def run(w):
        return quantize_unchecked(w, 1, divisor=divisor, encoder=encoder)

    for kind in KINDS:
        w = stack(kind)
        split = put(w, mesh(), spec)
        wanted = run(on_cpu(w))
        assert_same_parts(run(split), wanted)
        assert_same_parts(jax.jit(run)(split), wanted)


@METHODS
def test_one_scale_for_each_expert(mesh, method):
    w = stack("heavy")

    def run(w):
        amax = global_amax(w, keep_axes=(0,))
        return quantize_unchecked(w, 1, global_amax=amax, divisor=method.scales.divisor, encoder=encoder_for(method))

    assert_same_parts(run(put(w, mesh(AxisType.Explicit), STACK)), run(on_cpu(w)))


@BOTH_KINDS
@pytest.mark.parametrize("axis", [1, 2])
def test_the_other_functions(mesh, axis, kind):
    for name in ("heavy", "subnormal", "ties"):
        w = stack(name)
        split, whole = put(w, mesh(kind), STACK), on_cpu(w)
        assert_same_bits(global_amax(split), np.asarray(global_amax(whole)))
        assert_same_bits(block_amax(split, axis), np.asarray(block_amax(whole, axis)))
        assert_same_bits(fake_quantize(split, axis), np.asarray(fake_quantize(whole, axis)))
        assert_same_bits(quantize(split, axis).dequantize(), np.asarray(quantize(whole, axis).dequantize()))


@METHODS
@pytest.mark.parametrize(("keep", "kind"), [((), AxisType.Auto), ((0,), AxisType.Explicit)], ids=["stack", "expert"])
def test_several_weights_in_one_program(mesh, keep, kind, method):
    order = Order((1,), keep, method.scales.divisor, encoder_for(method))
    weights = [[stack("normal"), stack("heavy")], [stack("ties"), stack("spread")]]

    def run(place):
        groups = [tuple(place(w) for w in group) for group in weights]
        signature = placed(groups[0], [order] * 2)
        assert signature is not None
        tensors, finite = quantize_together(groups, signature)
        assert bool(finite)
        return tensors

    found, wanted = run(lambda w: put(w, mesh(kind), STACK)), run(on_cpu)
    for one, other in zip(sum(found, ()), sum(wanted, ()), strict=True):
        assert_same_parts(one, other)


def test_shards_are_quantized_by_kernels_and_one_number_is_communicated(mesh):
    w = put(stack(), mesh(), STACK)
    amax, blocking, layout = global_amax(w), Blocking(w.shape, (1,)), layout_of(w)
    lowered = _quantize_sharded.__wrapped__.lower(w, amax, None, blocking, 2688, NEAREST, False, layout)
    assert "triton" in lowered.as_text() and collectives(lowered.compile()) == []
    group = (w, w + w)
    lowered = _programs.__wrapped__.lower((group, group), placed(group, [Order((1,), (), 2688, NEAREST)] * 2))
    assert "triton" in lowered.as_text() and collectives(lowered.compile()) == ["all-reduce"]
    assert set(collectives(jax.jit(lambda w: quantize(w, 1)).lower(w).compile())) == {"all-reduce"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_value_on_the_last_gpu_is_an_error(mesh, bad):
    w = stack()
    w[-1, -1, -1] = bad
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        quantize(put(w, mesh(), STACK), 1)


@BOTH_KINDS
@pytest.mark.parametrize("x_spec", [P("ep"), P(None, ("tp", "ep")), P("tp", "ep")], ids=str)
def test_calibration_of_split_activations(mesh, kind, x_spec):
    """The statistics of split activations are those of the whole ones, sums but for their order."""
    made = mesh(kind)
    w, x = (np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(64, 32), (16, 64)]))

    def statistics(params, x, out_sharding=None):
        def apply(params, x):
            return jnp.einsum("td,df->tf", x, params["w"], out_sharding=out_sharding)

        plan = jaxfp4.plan(apply, params, x, recipe="nvfp4_gptq")
        return jaxfp4.calibrate(apply, params, [x, x], plan, progress=False)["w"]

    with jax.default_matmul_precision("highest"):
        wanted = statistics({"w": on_cpu(w)}, on_cpu(x))
        with jax.set_mesh(made):
            # On Explicit axes JAX asks what becomes of a product over a split axis.
            whole = P() if kind is AxisType.Explicit else None
            found = statistics({"w": put(w, made, P())}, put(x, made, x_spec), whole)
    np.testing.assert_array_equal(found["amax"], wanted["amax"])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
