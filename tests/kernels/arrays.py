"""Arrays that are hard to round."""

import jax.numpy as jnp
import numpy as np

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def hostile(kind, shape, dtype, seed=0):
    """An array of a kind, with a row of negative zeros."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=shape)
    spread = 10.0 ** rng.integers(-30, 3, shape)
    values = {
        "normal": normal,
        "ties": rng.integers(-48, 49, shape) / 8,
        "spread": normal * spread,
        "tiny": normal * 1e-28,
        "subnormal": normal * 1e-38,
        "large": normal * 1e37 * 10.0 ** rng.integers(-70, 1, shape),
        "heavy": rng.standard_cauchy(shape),
        "equal": np.full(shape, 0.7),
        "zero": np.zeros(shape),
    }[kind]
    if dtype == jnp.float16:
        values = np.clip(values, -6e4, 6e4)
    array = values.astype(np.float32).astype(jnp.dtype(dtype))
    array[len(array) // 2] = -0.0
    return array


KINDS = ("normal", "ties", "spread", "tiny", "subnormal", "large", "heavy", "equal", "zero")
