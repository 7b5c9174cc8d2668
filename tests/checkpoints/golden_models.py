"""Quantized trees made from the golden Hugging Face weights, without any model code."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.checkpoints import SafetensorsFile, TensorName
from jaxfp4.tensors import QuantizedWeight, global_amax, quantize

GOLDEN = pathlib.Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden checkpoints are not at {GOLDEN}")

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def read_json(path):
    return json.loads(path.read_text())


def tensors_of(directory):
    file = SafetensorsFile(directory / "model.safetensors")
    return {name: np.array(file.tensor(name)) for name in file.names()}


def assert_same_tensors(directory, golden):
    """Names, dtypes, shapes and bytes."""
    found, wanted = tensors_of(directory), tensors_of(golden)
    assert sorted(found) == sorted(wanted)
    for name, values in wanted.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert found[name].tobytes() == values.tobytes(), name


class GoldenModel:
    """`tree` and `names` for one golden model; `layers` and `experts` stack these in leading axes."""

    def __init__(self, name, *, stack_layers=False, place=lambda w, role: w):
        self.directory = GOLDEN / name
        self.hf = tensors_of(self.directory / "hf")
        self.wanted = tensors_of(self.directory / "modelopt")
        self.config = read_json(self.directory / "hf" / "config.json")
        self.experts = self.config.get("num_local_experts", 0)
        self.layers = self.config["num_hidden_layers"]
        self.place = place
        self.tree, self.names = {}, {}
        for layer in ["{layer}"] if stack_layers else range(self.layers):
            self._add_layer(layer)
        self._plain("embed/embedding", "model.embed_tokens")
        self._plain("head/kernel", "lm_head", transpose=True)
        self._plain("norm/scale", "model.norm")

    def _stack(self, name, source):
        """The hf tensors that `name` with its fields stands for, stacked in front."""
        for field, count in (("{layer}", self.layers), ("{expert}", self.experts)):
            if field in name:
                return np.stack([self._stack(name.replace(field, str(i)), source) for i in range(count)])
        return source[name]

    def _add_layer(self, layer):
        prefix = f"model.layers.{layer}"
        mlp = f"{prefix}.mlp.experts.{{expert}}" if self.experts else f"{prefix}.mlp"
        for group in SIBLINGS:
            modules = [
                f"{mlp if p in ('gate_proj', 'up_proj', 'down_proj') else f'{prefix}.self_attn'}.{p}" for p in group
            ]
            self._quantized(modules)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self._plain(f"layers/{layer}/{norm}/scale", f"{prefix}.{norm}")
        if self.experts:
            self._plain(f"layers/{layer}/router/kernel", f"{prefix}.mlp.gate", transpose=True)
            for norm in ("q_norm", "k_norm"):
                self._plain(f"layers/{layer}/{norm}/scale", f"{prefix}.self_attn.{norm}")
        else:
            for name in ("k", "v"):
                module = f"{prefix}.self_attn.{name}_proj"
                self._plain(f"layers/{layer}/kv/{name}", module, parameter=f"{name}_scale", source=self.wanted)

    def _quantized(self, modules):
        weights = [self._kernel(module) for module in modules]
        amax = None
        for w in weights:
            own = global_amax(w, keep_axes=tuple(range(w.ndim - 2)))
            amax = own if amax is None else jnp.maximum(amax, own)
        for module, w in zip(modules, weights, strict=True):
            input_scale = jnp.asarray(self._stack(f"{module}.input_scale", self.wanted))
            path = "quantized/" + module.replace(".", "/") + "/kernel"
            self._set(path, QuantizedWeight(quantize(w, w.ndim - 2, global_amax=amax), input_scale))
            self.names[path] = TensorName(module)

    def _kernel(self, module):
        """`[.., in, out]`, as JAX holds it."""
        w = np.swapaxes(self._stack(f"{module}.weight", self.hf), -1, -2)
        return self.place(jnp.asarray(w), module)

    def _plain(self, path, module, *, transpose=False, parameter="weight", source=None):
        values = self._stack(f"{module}.{parameter}", self.hf if source is None else source)
        self._set(path, jnp.asarray(np.swapaxes(values, -1, -2) if transpose else values))
        self.names[path] = TensorName(module, transpose=transpose, parameter=parameter)

    def _set(self, path, leaf):
        *parents, last = path.split("/")
        node = self.tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * len(axes))
