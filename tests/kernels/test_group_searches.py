"""Searches in kernels that know the channels' importance or second moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.algorithms.local_hessian import hessian_table, local_hessian_scales
from jaxfp4.algorithms.mse import importance_table, mse_scales
from jaxfp4.formats import nvfp4
from jaxfp4.kernels import hessian_search, search
from jaxfp4.kernels.blocks import Geometry, Launch
from jaxfp4.kernels.groups import Groups
from jaxfp4.kernels.quantize import quantize_in_groups
from jaxfp4.kernels.rounding import Scales
from jaxfp4.recipes import LocalHessian, Method, WeightedMse
from jaxfp4.tensors import accelerated, quantize_unchecked
from jaxfp4.tensors.blocks import Blocking

from .arrays import KINDS, hostile

WEIGHTED = search.weighted_mse_scales, importance_table
HESSIAN = hessian_search.local_hessian_scales, hessian_table

LAYOUTS = {
    "first axis": Groups(1, 1, 1, 4, 48),
    "last axis": Groups(1, 1, 40, 6, 1),
    "experts, first axis": Groups(3, 3, 1, 2, 24),
    "experts, last axis": Groups(1, 2, 24, 3, 1),
    "outputs on both sides": Groups(1, 1, 5, 3, 16),
}
SEARCHED = ("experts, first axis", "last axis")
DTYPES = dict(zip(SEARCHED, (jnp.float32, jnp.bfloat16), strict=True))


def drawn(groups, kind, dtype, divisor=2688):
    """Blocks of a layout and a global scale for each part."""
    x = hostile(kind, groups.shape, dtype)
    parts = np.abs(x.astype(np.float32)).reshape(groups.outer, -1).max(1)
    return x, np.asarray(nvfp4.global_scale(jnp.asarray(parts), divisor))


def importance_of(groups, seed=0):
    """`[1, lead, 1, groups, 16, 1]`, of very different sizes and partly zero."""
    rng = np.random.default_rng(seed)
    shape = (1, groups.lead, 1, groups.groups, 16, 1)
    importance = np.exp(2 * rng.normal(size=shape)) * (rng.random(shape) < 0.8)
    importance[:, 0, :, 0] = 0
    return importance.astype(np.float32)


def moments_of(groups, seed=0):
    """`[16, lead, 1, groups, 16, 1]` of correlated channels, those of the first group zero throughout."""
    rng = np.random.default_rng(seed)
    shape = (groups.lead, groups.groups)
    inputs = rng.normal(size=(*shape, 40, 16)) @ (np.eye(16) + 0.5 * rng.normal(size=(*shape, 16, 16)))
    inputs *= np.exp(rng.normal(size=(*shape, 1, 16)))
    inputs[0, 0] = 0
    products = np.einsum("lgti,lgtj->lgij", inputs, inputs)
    return np.moveaxis(products, 2, 0)[:, :, None, :, :, None].astype(np.float32)


@functools.partial(jax.jit, static_argnames=("groups", "choice", "interpret"))
def in_kernel(x, global_scale, moments, groups, choice, interpret):
    choose, table_of = choice
    table = table_of(jnp.asarray(moments), 4)
    table = jnp.moveaxis(table, 0, -1).reshape(groups.lead, groups.groups, len(table))
    return quantize_in_groups(x, global_scale, table, groups, choose, Launch(32, 1), interpret=interpret)[1]


@functools.partial(jax.jit, static_argnames=("groups", "choose"))
def in_plain_jax(x, global_scale, moments, groups, choose):
    scale = jnp.repeat(global_scale, groups.lead // groups.outer).reshape(groups.lead, 1, 1, 1, 1)
    return choose(x, scale, 3, moments)


def plain_weighted(x, scale, axis, moments):
    return mse_scales(x, scale, axis, moments[0])


def scales_of_table(values, context):
    """A choice that takes the codes from the table."""
    return Scales.of_codes(jnp.broadcast_to(context.table[0].astype(jnp.int32), values.even[0].shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_get_the_numbers_of_their_channels(layout):
    groups = LAYOUTS[layout]
    x, scale = drawn(groups, "normal", jnp.bfloat16)
    table = np.random.default_rng(0).integers(1, 127, (groups.lead, groups.groups, 1))
    scales = np.broadcast_to(table[:, None, :, :, None], (*groups.shape[:3], 1, groups.inner))
    quantized = jax.jit(
        functools.partial(
            quantize_in_groups, groups=groups, choose=scales_of_table, launch=Launch(32, 1), interpret=True
        )
    )
    packed, found = quantized(x, scale, table.astype(np.float32))
    np.testing.assert_array_equal(found, scales)
    each = np.repeat(scale, groups.lead // groups.outer).reshape(-1, 1, 1, 1, 1)
    codes = np.asarray(nvfp4.encode_values(x, nvfp4.decode_scale(scales.astype(np.uint8)), each))
    np.testing.assert_array_equal(packed, codes[:, :, :, ::2] | codes[:, :, :, 1::2] << 4)


@pytest.mark.parametrize("layout", SEARCHED)
def test_weighted_search_chooses_as_plain_jax_does(layout):
    groups = LAYOUTS[layout]
    moments = importance_of(groups)
    for kind in KINDS:
        x, scale = drawn(groups, kind, DTYPES[layout])
        found = in_kernel(x, scale, moments, groups, WEIGHTED, interpret=True)
        wanted = in_plain_jax(x, scale, moments, groups, plain_weighted)
        np.testing.assert_array_equal(found, wanted, err_msg=kind)


def shares_of_choices(x, scale, moments, groups, found, wanted):
    """How many choices are equal, and the largest excess of the error, relative."""
    damped = np.moveaxis(moments, 0, 3)[:, :, :, :, :, 0].astype(np.float64)  # lead, 1, groups, 16, 16
    mean = np.trace(damped, axis1=-2, axis2=-1)[..., None, None] / 16
    damped = np.where(mean > 0, damped + 0.01 * mean * np.eye(16), np.eye(16))
    scale = np.repeat(scale, groups.lead // groups.outer).reshape(-1, 1, 1, 1, 1)

    def error(codes):
        step = np.asarray(nvfp4.decode_scale(codes)) * scale
        codes = nvfp4.encode_values(x, nvfp4.decode_scale(codes), scale)
        difference = x.astype(np.float64) - np.asarray(nvfp4.decode_values(codes)) * step
        d = np.moveaxis(difference, 3, -1)  # lead, repeat, groups, inner, 16
        return np.einsum("lrgni,lugij,lrgnj->lrgn", d, damped, d)

    excess = error(found) / np.maximum(error(wanted), 1e-300)
    return np.mean(np.asarray(found) == np.asarray(wanted)), np.max(excess) - 1


def test_local_hessian_search_chooses_as_plain_jax_does():
    """But for near ties of float sums."""
    groups = LAYOUTS["last axis"]
    moments = moments_of(groups)
    for kind in ("normal", "heavy", "ties"):
        x, scale = drawn(groups, kind, jnp.bfloat16)
        found = in_kernel(x, scale, moments, groups, HESSIAN, interpret=True)
        wanted = in_plain_jax(x, scale, moments, groups, local_hessian_scales)
        equal, excess = shares_of_choices(x, scale, moments, groups, found, wanted)
        assert equal >= 0.99 and excess < 1e-5, kind


@pytest.mark.parametrize("choice", [WEIGHTED, HESSIAN], ids=["weighted", "hessian"])
def test_blocks_that_are_zero_or_not_finite_keep_their_codes(choice):
    groups = LAYOUTS["last axis"]
    x, scale = drawn(groups, "normal", jnp.bfloat16)
    x[0, 3, 2, 5], x[0, 4, 1, 7], x[0, 9, 5] = np.nan, np.inf, 0
    moments = importance_of(groups) if choice is WEIGHTED else moments_of(groups)
    found = np.asarray(in_kernel(x, scale, moments, groups, choice, interpret=True))[0, :, :, 0, 0]
    assert np.argwhere(found == 0x7F).tolist() == [[3, 2], [4, 1]]
    assert found[9, 5] == 0x38


@pytest.mark.parametrize(
    "shape, axes, moments, scales, expected",
    [
        ((64, 48), (0,), (64, 1), 1, Groups(1, 1, 1, 4, 48)),
        ((48, 64), (1,), (1, 64), 1, Groups(1, 1, 48, 4, 1)),
        ((3, 32, 24), (1,), (3, 32, 1), 3, Groups(3, 3, 1, 2, 24)),
        ((3, 24, 32), (2,), (3, 1, 32), 1, Groups(1, 3, 24, 2, 1)),
        ((3, 24, 32), (2,), (1, 1, 32), 3, None),
        ((5, 32, 4, 8), (1,), (1, 32, 1, 1), 1, Groups(1, 1, 5, 2, 32)),
        ((4, 16, 24), (0, 1), (4, 16, 1), 1, Groups(1, 4, 1, 1, 24)),
        ((4, 32, 24), (1,), (1, 32, 24), 1, None),
        ((2, 3, 32), (2,), (1, 3, 32), 1, None),
    ],
)
def test_which_blocks_share_moments(shape, axes, moments, scales, expected):
    blocking = Blocking(shape, axes)
    global_scale = jnp.ones(scales if scales == 1 else (scales, *(1,) * (len(shape) - 1)))
    geometry = accelerated.geometry_of(blocking, global_scale if scales > 1 else jnp.ones(()))
    assert isinstance(geometry, Geometry)
    in_blocks = jax.vmap(Blocking(moments, axes).to_blocks)(jnp.ones((1, *moments)))
    assert accelerated.groups_of(blocking, geometry, in_blocks) == expected


@pytest.mark.parametrize("choice", [WEIGHTED, HESSIAN], ids=["weighted", "hessian"])
@pytest.mark.parametrize("layout", ["first axis", "experts, last axis"])
@pytest.mark.skipif(not jax.__version__.startswith("0.10"), reason="newer versions lower kernels only beside a GPU")
def test_searches_lower_for_cuda_without_a_gpu(choice, layout):
    groups = LAYOUTS[layout]
    entries = 1 if choice is WEIGHTED else 16
    arguments = (
        jax.ShapeDtypeStruct(groups.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((groups.outer,), jnp.float32),
        jax.ShapeDtypeStruct((entries, groups.lead, 1, groups.groups, 16, 1), jnp.float32),
    )
    traced = in_kernel.trace(*arguments, groups, choice, interpret=False)
    assert "__gpu$xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


CASES = {
    "first axis": ((512, 384), (0,), None, jnp.bfloat16),
    "last axis": ((96, 2048), (1,), None, jnp.float32),
    "experts, first axis": ((4, 64, 128), (1,), (0,), jnp.float16),
    "experts, last axis": ((4, 96, 64), (2,), None, jnp.bfloat16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scales", [WeightedMse(), LocalHessian()], ids=["weighted", "hessian"])
def test_quantizer_of_the_gpu_chooses_as_that_of_the_cpu(case, scales):
    """Through the quantizer, so that on the GPU the kernel runs."""
    shape, axes, keep, dtype = CASES[case]
    rng = np.random.default_rng(5)
    contraction = shape[axes[0]]
    entries = 1 if isinstance(scales, WeightedMse) else 16
    inputs = rng.normal(size=(shape[0] if len(shape) == 3 else 1, contraction // 16, 64, 16)) * np.exp(
        rng.normal(size=(1, contraction // 16, 1, 16))
    )
    products = np.einsum("lgti,lgtj->jlgi", inputs, inputs)
    if entries == 1:
        products = np.einsum("ilgi->lgi", products)[None]
    beside = [n if a in axes or (len(shape) == 3 and a == 0) else 1 for a, n in enumerate(shape)]
    moments = products.reshape(entries, *beside).astype(np.float32)
    encoder = encoder_for(Method(scales))
    for kind in KINDS:
        w = hostile(kind, shape, dtype)
        amax = np.abs(w.astype(np.float32)).max(tuple(range(1, len(shape))) if keep else None, keepdims=bool(keep))

        def codes(device, w=w, amax=amax):
            put = functools.partial(jax.device_put, device=device)
            tensor = quantize_unchecked(
                put(w), axes, global_amax=put(amax), divisor=1536, encoder=encoder, moments=put(moments)
            )
            return [np.asarray(part).view(np.uint8) for part in (tensor.scales, tensor.packed)]

        found, wanted = codes(jax.devices()[0]), codes(jax.devices("cpu")[0])
        if entries == 1:
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=kind)
        else:
            assert np.mean(found[0] == wanted[0]) > 0.99, kind
