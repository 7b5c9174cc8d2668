"""Orbax checkpoints of quantized parameters, statistics and plans: onto other meshes, and in the middle of things."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.checkpoints.orbax_store import restore, save
from jaxfp4.formats import LeafError
from jaxfp4.recipes.plan_data import plan_from_data, plan_to_data
from jaxfp4.tensors import FP8Tensor, quantize_fp8
from jaxfp4.tensors.cache import CacheAmax, CacheFormat

LAYERS, D, F, HEADS = 2, 128, 256, 8
SHAPES = {"norm": (D,), "gate": (D, F), "up": (D, F), "heads": (F, HEADS, 20), "down": (HEADS, 20, D)}
SPECS = {"norm": P(), "gate": P(None, "tp"), "up": P(None, "tp"), "heads": P(None, "tp"), "down": P("tp")}


def mesh(*names_and_sizes):
    names, sizes = names_and_sizes[::2], names_and_sizes[1::2]
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[:count])


@functools.cache
def tp(count):
    """Not made at import, where a machine with one GPU would fail to collect any test."""
    return mesh("tp", count)


def on_tp(count, spec):
    return NamedSharding(tp(count), spec)


def model(params, x):
    for p in params["layers"]:
        h = jax.nn.relu((x * p["norm"]) @ p["gate"]) + x @ p["up"]
        h = jnp.clip(jnp.einsum("tf,fhd->thd", h, p["heads"]), -8, 8)
        x = jnp.clip(jnp.einsum("thd,hdm->tm", h, p["down"]), -2, 2)
    return x


def draw(on):
    """Small integers, so that every sum is exact on every mesh."""
    rng = np.random.default_rng(0)
    layers = [{n: rng.integers(-3, 4, s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(LAYERS)]
    return jax.device_put({"layers": layers}, {"layers": [{n: NamedSharding(on, SPECS[n]) for n in SHAPES}] * LAYERS})


BATCHES = [np.random.default_rng(i).integers(-2, 3, (4, D)).astype(np.float32) for i in range(4)]


@pytest.fixture(scope="module")
def plan():
    params = jax.eval_shape(lambda: draw(tp(8)))
    return jaxfp4.plan(model, params, BATCHES[0])


def collected(plan, params, batches, stats=None):
    calibrate_fn = jaxfp4.make_calibrate_fn(model, plan)
    stats = plan.init_stats(params) if stats is None else stats
    for batch in batches:
        stats = calibrate_fn(params, stats, batch)
    return stats


@pytest.fixture(scope="module")
def qparams(plan):
    params = draw(tp(8))
    return jaxfp4.quantize_params(params, plan, collected(plan, params, BATCHES))


@pytest.fixture(scope="module")
def directory(tmp_path_factory, plan, qparams):
    path = tmp_path_factory.mktemp("orbax") / "saved"
    save(path, qparams=qparams, plan=plan)
    return path


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, isinstance(a, np.ndarray)) == (b.dtype, b.shape, isinstance(b, np.ndarray)), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def specs_of(weight):
    return weight.weight.packed.sharding.spec, weight.weight.scales.sharding.spec


def test_eight_to_four_to_eight_devices(directory, qparams, tmp_path):
    expected = jaxfp4.digest(qparams, inputs=True)
    four = restore(directory, mesh=tp(4)).qparams
    assert jaxfp4.digest(four, inputs=True) == expected
    save(tmp_path / "four", qparams=four)
    eight = restore(tmp_path / "four", mesh=tp(8))
    assert jaxfp4.digest(eight.qparams, inputs=True) == expected and eight.plan is None and eight.stats is None
    for name in ("gate", "up"):
        for tree, on in ((four, tp(4)), (eight.qparams, tp(8))):
            weight = tree["layers"][1][name]
            assert specs_of(weight) == (P(None, "tp"), P(None, "tp"))
            assert weight.weight.packed.sharding.mesh == on and weight.input_scale.sharding.mesh == on
    assert four["layers"][0]["gate"].weight.packed.addressable_shards[0].data.shape == (D // 2, F // 4)


def test_axes_that_a_mesh_lacks_or_that_do_not_divide_leave_dimensions_whole(directory, qparams):
    other = restore(directory, mesh=mesh("ep", 2, "tp", 3)).qparams
    for weight in other["layers"][0].values():
        assert all(part.sharding.is_fully_replicated for part in jax.tree.leaves(weight))
    assert jaxfp4.digest(other, inputs=True) == jaxfp4.digest(qparams, inputs=True)
    assert (
        restore(directory, mesh=mesh("ep", 2)).qparams["layers"][0]["gate"].weight.packed.sharding.is_fully_replicated
    )


def test_default_is_the_default_device_and_the_plan_works(directory, plan, qparams):
    found = restore(str(directory))
    assert_equal(found.qparams, qparams)
    assert found.plan == plan and found.custom_metadata == {}
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(found.qparams))
    single = jax.device_put(qparams, jax.devices()[0])
    outputs = jaxfp4.quantized(model, found.plan)(found.qparams, BATCHES[0])
    np.testing.assert_array_equal(outputs, jaxfp4.quantized(model, plan)(single, BATCHES[0]))
    with jax.default_device(jax.devices()[3]):
        moved = restore(directory).qparams["layers"][0]["norm"]
    assert moved.devices() == {jax.devices()[3]}


def test_shardings_by_path_are_those_of_the_logical_weight(directory, qparams):
    on = mesh("a", 2, "b", 2)
    shardings = {
        "layers/0/gate": NamedSharding(on, P("a", "b")),
        "layers/0/heads": NamedSharding(on, P("b", "a")),
        "layers/0/down": NamedSharding(on, P("a", None, "b")),
        "layers/0/norm": NamedSharding(on, P("b")),
        "layers/1/gate": SingleDeviceSharding(jax.devices()[5]),
    }
    found = restore(directory, shardings=shardings).qparams
    first, second = found["layers"]
    assert specs_of(first["gate"]) == (P("a", "b"),) * 2 and first["norm"].sharding.spec == P("b")
    assert first["gate"].weight.packed.addressable_shards[0].data.shape == (D // 4, F // 2)
    assert specs_of(first["heads"]) == (P("b", "a"),) * 2
    # 8 heads of 20 are stored as one axis, of which a device has 80 values: five blocks.
    assert first["down"].weight.packed.shape == (80, D) and specs_of(first["down"]) == (P("a", "b"),) * 2
    assert first["gate"].input_scale.sharding.is_fully_replicated and first["gate"].input_scale.sharding.mesh == on
    assert second["gate"].weight.scales.devices() == {jax.devices()[5]} == second["gate"].input_scale.devices()
    assert second["up"].weight.packed.devices() == {jax.devices()[0]}
    assert jaxfp4.digest(found, inputs=True) == jaxfp4.digest(qparams, inputs=True)


def test_shardings_that_cut_blocks_split_another_dimension(directory, qparams):
    found = restore(directory, shardings={"layers/0/down": on_tp(8, P("tp"))}).qparams
    assert specs_of(found["layers"][0]["down"]) == (P(None, "tp"),) * 2
    assert jaxfp4.digest(found) == jaxfp4.digest(qparams)


def test_one_sharding_for_everything(directory, qparams):
    found = restore(directory, shardings=on_tp(8, P("tp"))).qparams["layers"][0]
    assert specs_of(found["gate"]) == (P("tp"),) * 2 and found["norm"].sharding.spec == P("tp")
    assert found["gate"].weight.global_scale.sharding.spec == P()
    device = restore(directory, shardings=SingleDeviceSharding(jax.devices()[2])).qparams
    assert all(leaf.devices() == {jax.devices()[2]} for leaf in jax.tree.leaves(device))
    assert jaxfp4.digest(device) == jaxfp4.digest(qparams)


def test_a_mesh_beside_shardings(directory):
    found = restore(directory, shardings={"layers/0/gate": on_tp(4, P("tp"))}, mesh=tp(4)).qparams["layers"][0]
    assert specs_of(found["gate"]) == (P("tp"),) * 2 and specs_of(found["up"]) == (P(None, "tp"),) * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: {"shardings": {"layers/9/gate": on_tp(8, P())}}, ValueError, "'layers/9/gate', which is no leaf"),
        (lambda: {"shardings": {"layers/0/norm": on_tp(3, P("tp"))}}, ValueError, "does not divide the arr"),
        (lambda: {"shardings": {"layers/0/gate": P()}}, TypeError, "wanted a jax.sharding.NamedSharding or SingleDev"),
        (lambda: {"shardings": on_tp(8, P()), "mesh": tp(8)}, ValueError, "found mesh and one sharding for everything"),
        (lambda: {"target": {"layers": []}}, ValueError, "params holds no arrays"),
        (lambda: {"target": {"gate": jnp.ones(2)}}, ValueError, "target: the checkpoint has no leaf 'gate'"),
    ],
)
def test_arguments_that_do_not_fit(directory, arguments, error, message):
    with pytest.raises(error, match=message):
        restore(directory, **arguments())


def test_targets_that_do_not_fit(directory):
    params = jax.eval_shape(lambda: draw(tp(8)))
    del params["layers"][1]["gate"]
    with pytest.raises(ValueError, match="target: it has no leaf 'layers/1/gate': wanted the tree that was saved"):
        restore(directory, target=params)
    params = draw(tp(8))
    params["layers"][1]["gate"] = jnp.ones((D, 2 * F))
    with pytest.raises(LeafError, match=r"layers/1/gate: shape \(128, 512\) in target: wanted \(128, 256\), as saved"):
        restore(directory, target=params)


def test_a_target_gives_containers_and_shardings(directory, qparams):
    params = {"layers": tuple(draw(tp(4))["layers"])}
    found = restore(directory, target=params).qparams
    assert isinstance(found["layers"], tuple) and specs_of(found["layers"][1]["up"]) == (P(None, "tp"),) * 2
    assert found["layers"][1]["up"].weight.packed.sharding.mesh == tp(4)
    assert jaxfp4.digest(found, inputs=True) == jaxfp4.digest(qparams, inputs=True)
    again = restore(directory, target=qparams).qparams
    assert_equal(again, qparams)
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), again, qparams)
    assert all(jax.tree.leaves(same)), same


class Network(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


def test_flax_states_come_back_as_dicts_or_as_the_target(tmp_path):
    apply_fn, params = jaxfp4.from_flax(Network())
    x = jnp.ones((4, 32))
    plan = jaxfp4.plan(apply_fn, params, x)
    qparams = jaxfp4.quantize_params(params, plan, jaxfp4.calibrate(apply_fn, params, [x], plan, progress=False))
    save(tmp_path / "s", qparams=qparams, plan=plan)
    found = restore(tmp_path / "s")
    assert type(found.qparams) is dict and found.qparams["layers"][1].keys() == {"bias", "kernel"}
    quantized_fn = jaxfp4.quantized(apply_fn, found.plan)
    np.testing.assert_array_equal(quantized_fn(found.qparams, x), quantized_fn(qparams, x))
    assert_equal(restore(tmp_path / "s", target=params).qparams, qparams)


def everything():
    """A tree with all that a quantized weight may have, and all that may lie beside it."""
    rng = np.random.default_rng(1)
    tensor = jaxfp4.quantize(jnp.asarray(rng.normal(size=(3, 7, 20)), jnp.bfloat16), (0, 2))
    padded = jaxfp4.quantize(jnp.asarray(rng.normal(size=(5, 21)), jnp.float16), 1)
    stack = jaxfp4.quantize(jnp.asarray(rng.normal(size=(4, 32, 8)), jnp.float32), 1, global_amax=jnp.ones((4, 1, 1)))
    amax = CacheAmax(jnp.float32(3), None, CacheFormat.NVFP4)
    return {
        "a/b.c": jaxfp4.QuantizedWeight(tensor),
        "scaled": jaxfp4.QuantizedWeight(padded, jnp.float32(0.5), jnp.arange(21.0), 16, amax),
        "stack": [jaxfp4.QuantizedWeight(stack, jnp.arange(4.0)), tensor],
        "fp8": jaxfp4.QuantizedWeight(quantize_fp8(jnp.asarray(rng.normal(size=(6, 8)), jnp.bfloat16)), jnp.float32(2)),
        "plain": (jnp.ones((2,), jnp.bfloat16), np.arange(3), np.ones(2, np.float32), jnp.asarray(True)),
        "scalars": {1: jnp.uint8(3), 2: jnp.asarray(1.5, ml_dtypes.float8_e4m3fn)},
        "nothing": None,
        "empty": {},
        "": {"": jnp.ones((1, 3))},
    }


def test_everything_survives(tmp_path):
    tree = everything()
    save(tmp_path / "s", qparams=tree, custom_metadata={"batches": 3, "note": [1.5, None]})
    found = restore(tmp_path / "s")
    expected = {**tree, "plain": (*tree["plain"][:2], jnp.ones(2), tree["plain"][3])}
    assert_equal(found.qparams, expected)
    assert found.custom_metadata == {"batches": 3, "note": [1.5, None]}
    weight = found.qparams["scaled"]
    assert (weight.rotation, weight.cache.format, weight.cache.values) == (16, CacheFormat.NVFP4, None)
    assert weight.weight.shape == (5, 21) and found.qparams["a/b.c"].weight.shape == (3, 7, 20)
    assert [w.weight.dtype for w in (found.qparams["a/b.c"], weight)] == [jnp.bfloat16, np.float16]
    assert isinstance(found.qparams["plain"][1], np.ndarray) and found.qparams["plain"][1].dtype == np.int64
    np.testing.assert_array_equal(weight.weight.dequantize(), tree["scaled"].weight.dequantize())


def test_orbax_alone_saves_and_restores_quantized_weights(qparams, tmp_path):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_tp(4, P(*[None] * (x.ndim - 1), "tp"))
            if x.ndim > 1 else on_tp(4, P())), qparams)  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", qparams)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "plain", abstract)
    assert_equal(found, qparams)
    assert found["layers"][0]["gate"].weight.scales.sharding == on_tp(4, P(None, "tp"))
    assert jaxfp4.digest(found, inputs=True) == jaxfp4.digest(qparams, inputs=True)


def test_orbax_alone_reads_what_save_wrote(directory, qparams):
    one = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), qparams)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(directory / "qparams", abstract), qparams)


def test_a_checkpoint_manager_keeps_them_beside_other_items(plan, qparams, tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", item_names=("qparams", "plan")) as manager:
        items = ocp.args.Composite(qparams=ocp.args.StandardSave(qparams), plan=ocp.args.JsonSave(plan_to_data(plan)))
        manager.save(3, args=items)
        manager.wait_until_finished()
        found = manager.restore(
            3, args=ocp.args.Composite(qparams=ocp.args.StandardRestore(qparams), plan=ocp.args.JsonRestore())
        )
    assert_equal(found.qparams, qparams)
    assert plan_from_data(found.plan) == plan


CONTINUE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, sys.argv[1])
import test_orbax as t
import jaxfp4
found = t.restore(sys.argv[2], mesh=t.tp(4))
params = t.draw(t.tp(4))
stats = t.collected(found.plan, params, t.BATCHES[found.custom_metadata["batches"]:], found.stats)
print(jaxfp4.digest(jaxfp4.quantize_params(params, found.plan, stats), inputs=True))
"""


def test_a_calibration_continues_in_another_process_on_another_mesh(plan, qparams, tmp_path, pytestconfig):
    params = draw(tp(8))
    save(tmp_path / "half", stats=collected(plan, params, BATCHES[:2]), plan=plan, custom_metadata={"batches": 2})
    found = restore(tmp_path / "half", mesh=tp(8))
    assert found.qparams is None
    stats = collected(found.plan, params, BATCHES[2:], found.stats)
    expected = jaxfp4.digest(qparams, inputs=True)
    assert jaxfp4.digest(jaxfp4.quantize_params(params, found.plan, stats), inputs=True) == expected
    here = str(pytestconfig.rootpath / "tests" / "checkpoints")
    command = [sys.executable, "-W", "error", "-c", CONTINUE, here, str(tmp_path / "half")]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=pytestconfig.rootpath
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == expected
    half = jaxfp4.quantize_params(params, plan, collected(plan, params, BATCHES[:2]))
    assert jaxfp4.digest(half, inputs=True) != expected


@pytest.mark.parametrize("recipe", ["nvfp4_gptq", "nvfp4_act_headroom"])
def test_moments_and_histograms_continue_too(recipe, tmp_path):
    params = {"w": draw(tp(8))["layers"][0]["gate"]}

    def linear(p, x):
        return x @ p["w"]

    plan = jaxfp4.plan(linear, params, BATCHES[0], recipe=recipe)
    calibrate_fn = jaxfp4.make_calibrate_fn(linear, plan)
    stats = calibrate_fn(params, plan.init_stats(params), BATCHES[0])
    save(tmp_path / "half", stats=stats)
    for arguments in ({}, {"mesh": tp(8)}, {"shardings": on_tp(8, P("tp"))}, {"target": params}):
        found = restore(tmp_path / "half", **arguments).stats
        assert_equal(found, stats)
        # Integers, so that the sums are exact; and where nothing was said, they go where the parameters are.
        assert_equal(calibrate_fn(params, found, BATCHES[1]), calibrate_fn(params, stats, BATCHES[1]))


def test_statistics_follow_the_parameters_onto_their_mesh(plan, qparams, tmp_path):
    stats = collected(plan, draw(tp(8)), BATCHES[:1])
    save(tmp_path / "both", qparams=qparams, stats=stats)
    for arguments in ({"target": draw(tp(4))}, {"shardings": {"layers/0/up": on_tp(4, P())}}):
        found = restore(tmp_path / "both", **arguments).stats
        assert all(x.sharding == on_tp(4, P()) for x in jax.tree.leaves(found))
        assert_equal(found, stats)


def test_existing_directories_are_left_alone_unless_forced(qparams, tmp_path):
    small = {"w": qparams["layers"][0]["gate"]}
    save(tmp_path / "s", qparams=small)
    with pytest.raises(
        FileExistsError, match=r"s: it exists already: wanted a new directory; name another, or pass fo"
    ):
        save(tmp_path / "s", qparams={"other": small["w"]})
    assert restore(tmp_path / "s").qparams.keys() == {"w"}
    save(tmp_path / "s", qparams={"other": small["w"]}, force=True)
    assert restore(tmp_path / "s").qparams.keys() == {"other"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(ValueError, match="mine: it is no Orbax checkpoint: wanted one to replace with force=True"):
        save(tmp_path / "mine", qparams=small, force=True)
    assert (tmp_path / "mine" / "file").read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory: wanted one to save in; create it"):
        save(tmp_path / "nowhere" / "s", qparams=small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "s"]


class _Opaque:
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "save: found no qparams, stats or plan: wanted at least one of them"),
        ({"qparams": {"a": [jax.ShapeDtypeStruct((2,), jnp.float32)]}}, "a/0: a ShapeDtypeStruct: wanted an arr"),
        ({"qparams": {"a": 1.5}}, "qparams/a: a float: wanted an array with values"),
        ({"qparams": {"a": _Opaque()}}, "qparams/a: a _Opaque: wanted an array"),
        ({"stats": {"a": np.array([None])}}, "stats/a: an array of object: wanted numbers"),
        ({"qparams": {"a": jax.random.key(0)}}, "an array of key<fry>: wanted numbers; save jax.random.key_data"),
        ({"qparams": {"a": jnp.ones((0, 3))}}, r"an array of shape \(0, 3\): wanted values, as Orbax stores no"),
        ({"qparams": {}}, "params holds no arrays"),
        ({"qparams": {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}}, "two arrays would be stored as 'a.b': wanted one"),
        ({"qparams": {"a": jnp.ones(1)}, "custom_metadata": {"x": {1}}}, "custom_metadata: .*set.*: wanted a dict of"),
        ({"qparams": {"a": jnp.ones(1)}, "custom_metadata": {"x": np.nan}}, "custom_metadata: .*: wanted a dict of"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        save(tmp_path / "s", **arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(qparams, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", full)
    with pytest.raises(OSError, match=r"s: cannot write it: .*No space left on device; free space, or name another"):
        save(tmp_path / "s", qparams=qparams)
    assert not list(tmp_path.iterdir())


def test_directories_that_are_no_checkpoints(directory, qparams, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none: no such directory: wanted one that jaxfp4\.save wrote"):
        restore(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: it has no item 'jaxfp4': wanted a directory that"):
        restore(tmp_path / "empty")
    shutil.copytree(directory, tmp_path / "killed.orbax-checkpoint-tmp")
    for name in ("killed", "killed.orbax-checkpoint-tmp"):
        with pytest.raises(FileNotFoundError, match="its writing was not finished: wanted a checkpoint; save it again"):
            restore(tmp_path / name)


def description(path, item="jaxfp4"):
    return path / item / "metadata"


def changed(path, change, item="jaxfp4"):
    data = json.loads(description(path, item).read_text())
    change(data)
    description(path, item).write_text(json.dumps(data))


def data_files(path):
    return [file for file in (path / "qparams").rglob("*") if file.is_file() and file.parent.name == "d"]


def damage_version(path):
    changed(path, lambda data: data.update(version=2))


def damage_plan_version(path):
    changed(path, lambda data: data.update(version=7), "plan")


def damage_description(path):
    description(path).write_text("{")


def damage_plan(path):
    description(path, "plan").write_bytes(b"\xff")


def damage_kind(path):
    changed(path, lambda data: data["qparams"].update({"class": "SavedSet"}))


def damage_axes(path):
    changed(path, lambda data: gate(data)["weight"].update(axes=[3]))


def damage_shape(path):
    changed(path, lambda data: data["qparams"]["children"][0].update(shape=[64, 65]))


def damage_dtype(path):
    changed(path, lambda data: gate(data)["weight"]["packed"].update(dtype="uint9"))


def gate(data):
    layer = data["qparams"]["children"][0]["children"][0]
    return layer["children"][layer["keys"].index("gate")]


def damage_lost_item(path):
    shutil.rmtree(path / "qparams")


def damage_metadata(path):
    (path / "qparams" / "_METADATA").write_text("[]")


def damage_lost_manifest(path):
    (path / "qparams" / "manifest.ocdbt").unlink()


def damage_lost_data(path):
    for file in data_files(path):
        file.unlink()


def damage_cut_data(path):
    for file in data_files(path):
        file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_version, "version 2: wanted 1, which this jaxfp4 reads; install the jaxfp4 that wrote it"),
        (damage_plan_version, "plan: found version 7: wanted 1, which this jaxfp4 reads"),
        (damage_description, "cannot read jaxfp4: "),
        (damage_plan, "cannot read plan: "),
        (
            damage_kind,
            "cannot understand jaxfp4: qparams.class: found 'SavedSet': wanted one of SavedDict, SavedSequence",
        ),
        (damage_axes, r"cannot understand jaxfp4: qparams.children.*axes: found \(3,\): wanted negative ones"),
        (damage_dtype, "dtype: found 'uint9': wanted the name of one"),
        (damage_lost_item, "its item 'qparams' is missing: wanted qparams; save it again"),
    ],
)
def test_damaged_directories_are_one_line(directory, tmp_path, damage, message):
    path = tmp_path / "damaged"
    shutil.copytree(directory, path)
    damage(path)
    check_damaged(path, message)


def check_damaged(path, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        restore(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        damage_metadata,
        damage_lost_manifest,
        damage_lost_data,
        damage_cut_data,
        damage_shape,
    ],
)
def test_damaged_arrays_are_one_line(tmp_path, damage):
    """Of one array: where one read of several fails, Orbax closes the event loop under the others, and Python warns."""
    path = tmp_path / "damaged"
    save(path, qparams={"w": jnp.ones((64, 64))})
    damage(path)
    check_damaged(path, "cannot read qparams: ")


def test_weights_in_fp8_are_split_too(tmp_path):
    weight = jaxfp4.QuantizedWeight(quantize_fp8(jax.device_put(jnp.ones((8, 16)), on_tp(8, P("tp")))))
    save(tmp_path / "s", qparams={"w": weight})
    for arguments in ({"mesh": tp(4)}, {"shardings": {"w": on_tp(4, P("tp"))}}, {"target": {"w": weight}}):
        found = restore(tmp_path / "s", **arguments).qparams["w"].weight
        assert found.values.sharding.spec == P("tp") and found.global_scale.sharding.is_fully_replicated
        assert_equal(found, weight.weight)


def test_values_are_those_of_the_dataclasses(qparams):
    """What `QuantizedWeight` and `NVFP4Tensor` hold besides arrays; a new field must be saved too."""
    assert {f.name for f in dataclasses.fields(jaxfp4.QuantizedWeight)} == {
        *("weight", "input_scale", "pre_scale", "rotation", "cache"),
    }
    names = {f.name for f in dataclasses.fields(jaxfp4.NVFP4Tensor)}
    assert names == {"packed", "scales", "global_scale", "axes", "sizes", "dtype"}
    assert {f.name for f in dataclasses.fields(FP8Tensor)} == {"values", "global_scale", "axes", "dtype"}


def test_calibrate_continues(plan, qparams, tmp_path):
    params = draw(tp(8))
    half = jaxfp4.calibrate(model, params, BATCHES[:2], plan, progress=False)
    save(tmp_path / "half", stats=half, plan=plan)
    for on in (tp(8), tp(4)):
        params = draw(on)
        for arguments in ({}, {"mesh": tp(8)}, {"mesh": tp(4)}):
            found = restore(tmp_path / "half", **arguments)
            stats = jaxfp4.calibrate(model, params, BATCHES[2:], found.plan, stats=found.stats, progress=False)
            again = jaxfp4.quantize_params(params, found.plan, stats)
            assert jaxfp4.digest(again, inputs=True) == jaxfp4.digest(qparams, inputs=True)
    with pytest.raises(ValueError, match="stats of another plan: 'layers/0/down' is missing from them"):
        jaxfp4.calibrate(model, params, BATCHES, plan, stats={}, progress=False)
    with pytest.raises(ValueError, match="batches is empty"):
        jaxfp4.calibrate(model, params, [], plan, stats=found.stats, progress=False)
