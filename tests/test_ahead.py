"""Plans for machines that are not there: what the program sends, by hand; the real step through libtpu and JAX's CUDA plugin among the slow tests."""

import dataclasses
import importlib.util
import math
import re

import jax
import pytest
import tiny

from pallas_kernels.backend import assume_device_kind
from sparse_lm.ahead import KernelsMissing, exponent, look_ahead, weak_scaling
from sparse_lm.config import ConfigError
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.parallel.topology import topology
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.session import open_session


@pytest.fixture
def only_lowered(monkeypatch) -> None:
    """GPUs as where JAX's CUDA plugin is not installed."""
    monkeypatch.setattr("sparse_lm.parallel.topology.CUDA_PLUGINS", ("no_such_plugin",))


@pytest.mark.slow
@pytest.mark.usefixtures("only_lowered")
def test_what_a_routed_step_sends_on_gpus(tmp_path) -> None:
    recipe = tiny.recipe(tmp_path, tiny.MOE, data__batch_size=8, model__remat="block")
    ahead = look_ahead(dataclasses.replace(recipe, mesh=MeshShape(data=1, fsdp=2, expert=4)), topology("h100:8"))
    exchanges = [c for c in ahead.collectives if c.kind == "ragged-all-to-all"]
    # A = 1 sequence x 32 tokens x 2 experts = 64 rows of D = 16 float32; 3 of 4 parts leave the device.
    rows = [c for c in exchanges if c.sent_bytes == 64 * 16 * 4 * 3 / 4]
    weights = [c for c in exchanges if c.sent_bytes == 64 * 4 * 3 / 4]
    # Two layers, forward and backward, out and back; weights go once each way. Remat repeats none.
    assert (len(rows), len(weights), len(exchanges)) == (8, 4, 12)
    assert {c.axes for c in exchanges} == {("expert",)}
    assert sum(c.total_bytes for c in rows) <= 2 * 2 * 2 * 64 * 16 * 4
    gathers = [c for c in ahead.collectives if c.kind == "all-gather"]
    assert gathers and all("expert" not in c.axes for c in gathers)
    # By hand: two matrices of experts in and one out, an expert's 16 x 16 float32 over fsdp = 2, forward and in remat's replay.
    experts = [c for c in gathers if c.result_bytes == 16 * 16 * 4]
    assert len(experts) >= 2 * 2 * 3
    assert ahead.compiled is None and ahead.memory_bytes == ahead.plan.total_bytes
    seconds = ahead.seconds()
    assert seconds["best"] == max(seconds["compute"], seconds["exchange"]) + seconds["state"] < seconds["worst"]
    # Eight devices are one machine: everything at NVLink's rate.
    assert seconds["exchange"] == pytest.approx(ahead.sent_bytes / 450e9)


@pytest.mark.slow
@pytest.mark.usefixtures("only_lowered")
def test_bytes_of_fsdp_and_data_do_not_grow_with_the_devices(tmp_path) -> None:
    """Weak scaling from 64 to 4096 devices, the parameters over 16 of them and replicated over the rest."""
    recipe = tiny.recipe(tmp_path, data__batch_size=64, model__execution="scanned")
    recipe = dataclasses.replace(recipe, mesh=MeshShape(data=-1, fsdp=16))
    plans = weak_scaling(recipe, [topology(f"h100:{devices}") for devices in (64, 4096)])
    assert [plan.plan.mesh["data"] for plan in plans] == [4, 256]
    assert plans[1].sent_bytes == pytest.approx(plans[0].sent_bytes, rel=0.1)
    # two points: the slope is log(ratio) / log(64)
    assert exponent(plans) == pytest.approx(math.log(plans[1].sent_bytes / plans[0].sent_bytes) / math.log(64))


@pytest.mark.parametrize(
    ("name", "hosts"), [("h100:1", "1x1x1"), ("h200:8", "1x1x8"), ("h100:64", "1x8x8"), ("h100:12", "1x3x4")]
)
def test_gpus_stand_in_machines_of_equally_many(name, hosts) -> None:
    assert topology(name).hosts() == hosts


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_tpus_without_their_compiler_say_what_to_install() -> None:
    with pytest.raises(ValueError, match=r"v5p:4x4x4.*libtpu cannot describe it \(pip install libtpu\)"):
        topology("v5p:4x4x4").attach()


@pytest.mark.usefixtures("only_lowered")
def test_gpus_without_their_compiler_say_what_to_install(monkeypatch) -> None:
    def refuse(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(ValueError, match=r"h100:8.*JAX's CUDA plugin cannot describe it \(pip install jax\[cuda13\]\)"):
        topology("h100:8").attach()


@pytest.mark.slow
def test_the_real_step_is_compiled_for_gpus(tmp_path) -> None:
    pytest.importorskip("jax_cuda13_plugin")
    if jax.config.jax_platforms != "cpu":
        pytest.skip("needs JAX_PLATFORMS=cpu")
    recipe = tiny.recipe(tmp_path, tiny.MOE, data__batch_size=8, model__remat="block")
    ahead = look_ahead(dataclasses.replace(recipe, mesh=MeshShape(data=1, fsdp=2, expert=4)), topology("h100:8"))
    assert ahead.compiled is not None and ahead.memory_bytes == ahead.compiled.peak_bytes > ahead.plan.state_bytes
    # As in the lowered program above: rows 64 x 16 float32, 3 of 4 parts leave, 8 times; weights 64 float32, 4 times.
    exchanges = [c for c in ahead.collectives if c.kind == "ragged-all-to-all"]
    assert {c.axes for c in exchanges} == {("expert",)}
    assert sum(c.total_bytes for c in exchanges) == 8 * 64 * 16 * 4 * 3 / 4 + 4 * 64 * 4 * 3 / 4
    gathers = [c for c in ahead.collectives if c.kind == "all-gather"]
    assert gathers and all("expert" not in c.axes for c in gathers)


@pytest.mark.usefixtures("only_lowered")
def test_missing_kernels_are_an_error_when_asked_for(tmp_path) -> None:
    with pytest.raises(KernelsMissing, match="no custom kernel"):
        look_ahead(tiny.recipe(tmp_path), topology("h100:1"), kernels_required=True)


def test_a_mesh_that_must_split_a_torus_axis_names_the_setting() -> None:
    pytest.importorskip("libtpu")
    devices = topology("v5p:4x4x4").attach()
    with pytest.raises(ConfigError, match=r"allow_split_physical_axes = False.*fsdp=8 x expert=8 on a 4 x 4 x 4 torus"):
        MeshShape(data=1, fsdp=8, expert=8).build(devices)
    mesh = MeshShape(data=1, fsdp=8, expert=8, allow_split_physical_axes=True).build(devices)
    assert (mesh.shape["fsdp"], mesh.shape["expert"]) == (8, 8)
    with pytest.raises(ValueError, match="libtpu cannot describe it"):
        topology("v5p:3x5x7").attach()


@pytest.mark.slow
def test_the_real_step_is_compiled_for_a_tpu_slice() -> None:
    pytest.importorskip("libtpu")
    base = Recipe(name="small")
    moe = MoEFeedForward(experts=4, hidden=256, shared_hidden=256, receive_factor=2.0, router=TopKRouter(k=2))
    attention = Attention(heads=4, kv_heads=2, head_dim=128)
    model = dataclasses.replace(
        base.model,
        d_model=512,
        layers=3,
        attention=attention,
        leading=(DenseFeedForward(hidden=512),),
        pattern=(moe,),
        compute_dtype="bfloat16",
        execution="scanned",
        remat="block",
    )
    data = dataclasses.replace(base.data, sequence_length=512, batch_size=8)
    recipe = dataclasses.replace(base, model=model, data=data, mesh=MeshShape(data=1, fsdp=2, expert=4))
    ahead = look_ahead(recipe, topology("v5p:2x2x2"), kernels_required=True)
    assert ahead.kernels["tpu_custom_call"] >= 4  # attention and the experts' products, forward and backward
    assert 0 < ahead.memory_bytes < 2**31
    sent = [c for c in ahead.collectives if c.kind == "ragged-all-to-all"]
    # two routed layers in one scan: rows and weights out, rows back; the same backward
    assert sum(c.times for c in sent) == 2 * 6 and {c.axes for c in sent} == {("expert",)}
    payload = sum(c.total_bytes for c in sent if c.result_bytes >= 512 * 2 * 512 * 2)
    assert payload <= 2 * 2 * 2 * (512 * 2) * 512 * 2  # layers x directions x out and back x A x D x itemsize
    assert all("expert" not in c.axes for c in ahead.collectives if c.kind == "all-gather")


@pytest.mark.slow
def test_on_a_tpu_the_shared_expert_computes_while_rows_travel() -> None:
    """In the schedule that libtpu made, products of the shared expert stand between the start and the end of an exchange."""
    pytest.importorskip("libtpu")
    shared = 640  # no other size is 640
    moe = MoEFeedForward(experts=4, hidden=256, shared_hidden=shared, receive_factor=2.0, router=TopKRouter(k=2))
    base = Recipe(name="small")
    attention = Attention(heads=4, kv_heads=2, head_dim=128)
    model = dataclasses.replace(
        base.model, d_model=512, layers=1, attention=attention, pattern=(moe,), compute_dtype="bfloat16"
    )
    data = dataclasses.replace(base.data, sequence_length=512, batch_size=8)
    recipe = dataclasses.replace(base, model=model, data=data, mesh=MeshShape(data=1, fsdp=1, expert=4))
    slice_ = topology("v5p:2x2x1")
    with assume_device_kind(slice_.chip.platform, slice_.chip.kind):
        lowered = open_session(recipe, slice_.attach()).trace_step().lower()
    compiled = lowered.compile(compiler_options={"xla_tpu_enable_async_ragged_all_to_all": True})
    lines, begun, hidden = compiled.as_text().splitlines(), {}, []
    for number, line in enumerate(lines):
        if start := re.match(r" +%(ragged-all-to-all-start[.\d]*) = ", line):
            begun[start[1]] = number
        elif done := re.search(r"ragged-all-to-all-done\(%(\S+)\)", line):
            travelling = lines[begun.pop(done[1]) + 1 : number]
            products = [
                op for op in travelling if "dot_general" in op and re.search(rf"= \(?bf16\[[\d,]*\b{shared}\b", op)
            ]
            hidden.append((products, "transpose(" in line))
    # Six exchanges; how many of them libtpu waits for, with nothing to do meanwhile, differs between its versions.
    assert not begun
    for backward in (False, True):
        assert any(products for products, is_backward in hidden if is_backward is backward)
