"""The recipes that have names."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from jaxfp4.recipes.kv_cache import KvCache
from jaxfp4.recipes.methods import (
    Awq,
    FourOverSix,
    Gptq,
    Hadamard,
    HeadroomActivations,
    LocalHessian,
    Max,
    Method,
    Mse,
    MseActivations,
    Nearest,
    PercentileActivations,
    SmoothQuant,
    WeightedMse,
)
from jaxfp4.recipes.recipe import Recipe, Rule, Scheme
from jaxfp4.tensors.cache import CacheFormat
from jaxfp4.transform.weights import Role

_MLP = frozenset({Role.LINEAR, Role.EXPERT})

METHODS = {
    "mse": Method(Mse()),
    "four_over_six": Method(FourOverSix()),
    "weighted_mse": Method(WeightedMse()),
    "local_hessian": Method(LocalHessian()),
    "gptq": Method(WeightedMse(), Gptq()),
    "gptq_max": Method(Max(), Gptq()),
    "gptq_mse": Method(Mse(), Gptq()),
    "awq": Method(Mse(), Nearest(), channels=Awq()),
    "awq_clip": Method(LocalHessian(), Nearest(), channels=Awq()),
    "smoothquant": Method(Mse(), Nearest(), channels=SmoothQuant()),
    "smoothquant_gptq": Method(Mse(), Gptq(), channels=SmoothQuant()),
    "hadamard": Method(Mse(), Nearest(), rotation=Hadamard()),
}
"""Each makes `nvfp4_<name>` and `nvfp4_weight_only_<name>`."""

ACTIVATIONS = {
    "act_headroom": Method(activations=HeadroomActivations()),
    "act_percentile": Method(activations=PercentileActivations()),
    "act_mse": Method(activations=MseActivations()),
}
"""Each makes `nvfp4_<name>`."""


@functools.cache
def presets() -> Mapping[str, Recipe]:
    """All named recipes, those of max calibration first."""
    recipes = [
        Recipe("nvfp4", (Rule(Scheme.W4A4),)),
        Recipe("nvfp4_weight_only", (Rule(Scheme.W4A16),)),
        Recipe("nvfp4_mlp_only", (Rule(Scheme.W4A4, roles=_MLP),)),
        Recipe("nvfp4_mlp_weight_only", (Rule(Scheme.W4A16, roles=_MLP),)),
        Recipe("nvfp4_experts_only", (Rule(Scheme.W4A4, roles=frozenset({Role.EXPERT})),)),
    ]
    for name, method in METHODS.items():
        recipes.append(Recipe(f"nvfp4_{name}", (Rule(Scheme.W4A4, method=method),)))
        recipes.append(Recipe(f"nvfp4_weight_only_{name}", (Rule(Scheme.W4A16, method=method),)))
    for name, method in ACTIVATIONS.items():
        recipes.append(Recipe(f"nvfp4_{name}", (Rule(Scheme.W4A4, method=method),)))
    for suffix, method in {"": Method(), "_gptq": METHODS["gptq"]}.items():
        attention = Rule(Scheme.W4A16, roles=frozenset({Role.ATTENTION}), method=method)
        recipes.append(Recipe(f"nvfp4_mixed{suffix}", (attention, Rule(Scheme.W4A4, roles=_MLP, method=method))))
        fp8_attention = Rule(Scheme.W8A8, roles=frozenset({Role.ATTENTION}))
        rules = (fp8_attention, Rule(Scheme.W4A4, roles=_MLP, method=method))
        recipes.append(Recipe(f"nvfp4_mixed_fp8{suffix}", rules))
    for cache in CacheFormat:
        recipes.append(Recipe(f"nvfp4_kv_{cache.value.lower()}", (Rule(Scheme.W4A4),), kv_cache=KvCache(cache)))
    return {recipe.name: recipe for recipe in recipes}


def names() -> tuple[str, ...]:
    """The names of the recipes that `plan` and the command line take.

    >>> "nvfp4" in names()
    True
    """
    return tuple(presets())


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of a name, or the recipe itself. ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in presets():
        raise ValueError(f"recipe={recipe!r}: wanted a Recipe or one of {', '.join(names())}")
    return presets()[recipe]
