"""Our compressed-tensors exports, read by transformers: the same weights and the same logits.

What transformers makes of NVFP4 experts depends on its version, not on what we write; all of it was tried on the files
of this test. Every weight of every model is exact in 4.57.6, if read as `read` does. Since 5.0 experts are stacks, and
none of the releases tried has them right: in 5.6.2, 5.9 and 5.12.1 they are random, in 5.14.1, 5.18, 5.23 and 5.24 they
lack their global scale (transformers issue 48372: `integrations/compressed_tensors.py` collects `weight_global_scale`
and hands only codes and block scales on to the decompressor). No other content of the files changes that: the scale
would have to be 1, and block scales of usual weights lie below the normal numbers of E4M3 then. What these versions
read right is the checkpoint in bfloat16 (`jaxfp4 convert --format bfloat16`); the last test here is about that.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.models import drawn_decoder

import jaxfp4
from jaxfp4.checkpoints import export_checkpoint
from jaxfp4.checkpoints.streaming.dequantize_files import dequantize_files
from jaxfp4.models import DecoderConfig, checkpoint_names, from_flax
from jaxfp4.tensors import QuantizedWeight

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("compressed_tensors")

# Theirs, not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = [
    ("llama", "nvfp4_weight_only"),
    ("llama", "nvfp4"),
    ("qwen3_moe", "nvfp4_weight_only"),
]
EXPERTS_ARE_MODULES = int(transformers.__version__.partition(".")[0]) < 5
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)


def config_of(model_type):
    return DecoderConfig.from_hf({"model_type": model_type, **SIZES, **(EXPERTS if model_type == "qwen3_moe" else {})})


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """`(config, function, plan, quantized parameters, directory)`; weights are bfloat16, the computation is float32."""
    model_type, recipe = request.param
    config = config_of(model_type)
    model = drawn_decoder(config, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    apply_fn, params = from_flax(model)
    plan = jaxfp4.plan(apply_fn, params, TOKENS, recipe=recipe, expert_scale="expert")
    stats = jaxfp4.calibrate(apply_fn, params, [TOKENS], plan, progress=False) if plan.observed else None
    qparams = jaxfp4.quantize_params(params, plan, stats)
    out = tmp_path_factory.mktemp("export") / "out"
    export_checkpoint(
        qparams, out, format="compressed-tensors", names=checkpoint_names(config), config=config.to_hf("bfloat16")
    )
    return config, apply_fn, plan, qparams, out


def dequantized(config, qparams):
    """`{tensor name: float32 values}` of every module, `[N, K]`, rounded to bfloat16."""
    values = {}
    names = checkpoint_names(config)
    for path, weight in jaxfp4.weights(qparams).items():
        dense = np.asarray(weight.weight.dequantize(jnp.bfloat16)).astype(np.float32)
        for index, module in names[path].modules(dense.shape):
            values[module] = dense[index].T
    return values


def read(directory):
    if EXPERTS_ARE_MODULES:
        # 4.57 gives scalars the dtype of the model: in bfloat16 it would round the global scales.
        dense = transformers.CompressedTensorsConfig(run_compressed=False)
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, quantization_config=dense
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long))  # packed weights are decompressed by the first call
    return model


def logits_of(model):
    with torch.no_grad():
        return torch.nn.Module.float(model)(torch.tensor(TOKENS).long()).logits.numpy()


def logits_without_activation_quantization(apply_fn, qparams):
    """Of our function with the dequantized weights, in bfloat16, as parameters."""

    def dense(leaf):
        return leaf.weight.dequantize(jnp.bfloat16) if isinstance(leaf, QuantizedWeight) else leaf

    return apply_fn(jax.tree.map(dense, qparams, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight)), TOKENS)


@pytest.mark.parametrize("exported", MODELS, ids=str, indirect=True)
def test_transformers_holds_our_weights_and_computes_our_logits(exported):
    config, apply_fn, plan, qparams, out = exported
    model = read(out)
    wanted = dequantized(config, qparams)
    modules = dict(model.named_modules())
    found = {name: modules[name].weight.detach().float().numpy() for name in wanted if name in modules}
    assert len(found) == (14 if config.model_type == "llama" else 32 if EXPERTS_ARE_MODULES else 8)
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name], err_msg=name)
    if config.num_experts and not EXPERTS_ARE_MODULES:
        _put_experts(config, model, wanted)
    if EXPERTS_ARE_MODULES and plan.observed:
        return  # 4.57 quantizes activations in another way
    np.testing.assert_allclose(logits_of(model), jaxfp4.quantized(apply_fn, plan)(qparams, TOKENS), rtol=0, atol=2e-5)


def _put_experts(config, model, wanted):
    """Puts in the experts that transformers gets wrong; the test below shows that compressed-tensors has these."""
    for layer in range(config.num_hidden_layers):
        experts = model.model.layers[layer].mlp.experts
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([wanted[f"{prefix}.{e}.{name}"] for e in range(config.num_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        with torch.no_grad():
            experts.gate_up_proj.copy_(torch.tensor(np.concatenate([gate, up], 1)))
            experts.down_proj.copy_(torch.tensor(down))


# transformers itself rounds FP8 scales to bfloat16.
@pytest.mark.parametrize("exported", [*MODELS, ("llama", "nvfp4_mixed_fp8")], ids=str, indirect=True)
def test_compressed_tensors_decompresses_every_module_to_our_weights(exported):
    """Its own compressor on the tensors of each module, experts included."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config, _, _, qparams, out = exported
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(settings).config_groups.values()
    tensors = load_file(out / "model.safetensors")
    for module, values in dequantized(config, qparams).items():
        scheme = next(group for group in groups if {module, "Linear"} & set(group.targets))
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        state = {name.removeprefix(f"{module}."): v for name, v in tensors.items() if name.startswith(f"{module}.")}
        found = compressor.decompress(state, scheme)["weight"].to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(found, values, err_msg=module)


@pytest.mark.parametrize("exported", [("llama", "nvfp4"), ("qwen3_moe", "nvfp4")], ids=str, indirect=True)
def test_transformers_reads_the_checkpoint_in_bfloat16(exported, tmp_path):
    """Experts too, in every version: all weights are exactly ours, and the logits those of our dequantized model."""
    config, apply_fn, _, qparams, out = exported
    dequantize_files(out, tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for name, values in dequantized(config, qparams).items():
        np.testing.assert_array_equal(_weight_in(state, name, config), values, err_msg=name)
    logits = logits_without_activation_quantization(apply_fn, qparams)
    np.testing.assert_allclose(logits_of(model), logits, rtol=0, atol=2e-5)


def _weight_in(state, module, config):
    """The weight of a module, also from the stacks that transformers 5 keeps of experts."""
    prefix, experts, rest = module.partition(".experts.")
    if not experts or f"{module}.weight" in state:
        return state[f"{module}.weight"]
    number, _, name = rest.partition(".")
    if name == "down_proj":
        return state[f"{prefix}.experts.down_proj"][int(number)]
    gate, up = np.split(state[f"{prefix}.experts.gate_up_proj"][int(number)], [config.moe_intermediate_size])
    return gate if name == "gate_proj" else up
