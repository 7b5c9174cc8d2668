"""Random programs of the operations through which channel scales may or may not pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T, D = 4, 6

Step = Callable[[dict[str, jax.Array], list[jax.Array]], jax.Array]


class _Program:
    """Steps that each make one more `[T, D]` value out of parameters and of earlier values."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, jax.Array] = {}
        self.steps: list[Step] = []

    def parameter(self, *shape: int) -> str:
        name = f"p{len(self.params):02}"
        values = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1, 1], shape)
        self.params[name] = jnp.asarray(values, jnp.float32)
        return name

    def weight(self, *shape: int) -> str:
        """A new parameter or, now and then, one that was used before."""
        known = [name for name, value in self.params.items() if value.shape == shape]
        return str(self.rng.choice(known)) if known and self.rng.random() < 0.2 else self.parameter(*shape)

    def add_step(self) -> None:
        """One of the operations on one or two of the values."""
        i, j = (int(self.rng.integers(0, len(self.steps) + 1)) for _ in "ij")
        makers = (self.linear, self.elementwise, self.rearranging, self.structured)
        self.steps.append(makers[int(self.rng.choice(4, p=[0.4, 0.25, 0.2, 0.15]))](i, j))

    def pick(self, choices: dict[str, Step]) -> Step:
        return choices[str(self.rng.choice(list(choices)))]

    def linear(self, i: int, j: int) -> Step:
        kind = self.rng.choice(
            ["plain", "scale", "inverse", "one plus", "bias", "heads", "batch", "fused", "two", "ragged"]
        )
        if kind in ("scale", "inverse", "one plus", "bias"):
            k = self.weight(D)
            return {
                "scale": lambda p, v: v[i] * p[k],
                "inverse": lambda p, v: v[i] / p[k],
                "one plus": lambda p, v: v[i] * (1 + p[k]),
                "bias": lambda p, v: v[i] + p[k],
            }[kind]
        shape = {"heads": (2, 3, D), "batch": (2, 3, 3), "fused": (D, 2 * D), "two": (2 * D, D), "ragged": (2, D, D)}
        k = self.weight(*shape.get(kind, (D, D)))
        sizes = jnp.array([1, 3], jnp.int32)

        def fused(p, v):
            gate, up = jnp.split(v[i] @ p[k], 2, axis=1)
            return jax.nn.silu(gate) * up

        return {
            "plain": lambda p, v: v[i] @ p[k],
            "heads": lambda p, v: jnp.einsum("thd,hdf->tf", v[i].reshape(T, 2, 3), p[k]),
            "batch": lambda p, v: jnp.einsum("thd,hdf->thf", v[i].reshape(T, 2, 3), p[k]).reshape(T, D),
            "fused": fused,
            "two": lambda p, v: jnp.concatenate([v[i], v[j]], 1) @ p[k],
            "ragged": lambda p, v: lax.ragged_dot(v[i], p[k], sizes),
        }[kind]

    def elementwise(self, i: int, j: int) -> Step:
        return self.pick(
            {
                "relu": lambda p, v: jax.nn.relu(v[i]),
                "leaky": lambda p, v: jax.nn.leaky_relu(v[i]),
                "tanh": lambda p, v: jnp.tanh(v[i]),
                "add": lambda p, v: v[i] + v[j],
                "sub": lambda p, v: v[i] - v[j],
                "max": lambda p, v: jnp.maximum(v[i], v[j]),
                "mul": lambda p, v: v[i] * v[j],
                "gate": lambda p, v: jax.nn.silu(v[i]) * v[j],
                "where": lambda p, v: jnp.where(jnp.arange(D) > 2, v[i], 0.0),
                "clip": lambda p, v: jnp.clip(v[i], -1, 1),
                "norm": lambda p, v: v[i] * lax.rsqrt((v[i] ** 2).mean(-1, keepdims=True) + 1e-3),
            }
        )

    def rearranging(self, i: int, j: int) -> Step:
        columns, rows, cut = self.rng.permutation(D), self.rng.integers(0, T, T), int(self.rng.integers(1, D))
        return self.pick(
            {
                "columns": lambda p, v: v[i][:, columns],
                "rows": lambda p, v: v[i][rows],
                "cut": lambda p, v: jnp.concatenate([v[i][:, cut:], v[j][:, :cut]], 1),
                "roll": lambda p, v: jnp.roll(v[i], 2, axis=1),
                "reverse": lambda p, v: v[i][:, ::-1],
                "shift rows": lambda p, v: jnp.pad(v[i], ((0, 1), (0, 0)))[1:],
                "shift columns": lambda p, v: jnp.pad(v[i], ((0, 0), (1, 0)))[:, 1:],
                "update": lambda p, v: lax.dynamic_update_slice(v[i], v[j][:2], (1, 0)),
                "scatter": lambda p, v: jnp.zeros((T, D)).at[jnp.array([1, 0, 1, 2])].add(v[i]),
            }
        )

    def structured(self, i: int, j: int) -> Step:
        kind = self.rng.choice(["cond", "scan", "stack", "mean", "scores"])
        if kind == "scan":
            scale, weight = self.parameter(3, D), self.parameter(3, D, D)

            def layer(c, a):
                return jnp.tanh(c * a[0]) + (c * a[0]) @ a[1], None

            return lambda p, v: lax.scan(layer, v[i], (p[scale], p[weight]))[0]
        if kind == "stack":
            k = self.parameter(2, D, D)
            return lambda p, v: (v[i] @ p[k][0]) @ p[k][1]
        return {
            "cond": lambda p, v: lax.cond(v[0].sum() > 0, lambda: v[i], lambda: v[j]),
            "mean": lambda p, v: v[i] - v[i].mean(0, keepdims=True),
            "scores": lambda p, v: jnp.einsum("td,sd->ts", v[i], v[j]) @ v[j],
        }[kind]


def draw(seed: int) -> tuple[Callable[..., Any], dict[str, jax.Array], jax.Array]:
    """`(apply, params, x)` of a random program, which ends in a contraction and may show another of its values."""
    program = _Program(seed)
    for _ in range(program.rng.integers(3, 13)):
        program.add_step()
    last = program.parameter(D, 3)
    shown = int(program.rng.integers(0, len(program.steps) + 1)) if program.rng.random() < 0.2 else None

    def apply(params: dict[str, jax.Array], x: jax.Array) -> list[jax.Array]:
        values = [x]
        for step in program.steps:
            values.append(step(params, values))
        return [values[-1] @ params[last]] + ([] if shown is None else [values[shown]])

    return apply, program.params, jnp.asarray(program.rng.normal(size=(T, D)), jnp.float32)
