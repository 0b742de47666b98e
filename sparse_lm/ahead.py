"""A recipe on machines that are not there: the real step, compiled or lowered for them, and what it would take.

The step is compiled ahead of time on this machine's CPU, for TPU slices by libtpu, for GPUs by XLA in JAX's CUDA plugin, so memory and
collectives are those of the real program. Where the plugin is not installed, a step for GPUs is only lowered: the collectives that the
model places itself are in the lowered program; those that XLA's partitioner adds for dense matrices are counted from the parameters, as
`partitioner_collectives` says.

The roofline: compute = executed operations / peak; exchange = bytes that a chip sends / its link rate (all links at once), axis by
axis one after another; state = parameters, gradients and optimizer state read and written once / memory rate. With everything
hidden that can be, a step takes max(compute, exchange) + state; with nothing hidden, the sum.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.backend import assume_device_kind, backend_report, clear_choices
from sparse_lm.config import override
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.parallel import rules
from sparse_lm.parallel.program import Collective, collectives, kernels, placed_collectives, sent
from sparse_lm.parallel.topology import Topology
from sparse_lm.plan import Compiled, Plan, analysis, make_plan
from sparse_lm.recipe import Recipe
from sparse_lm.train.session import Session, check_division, open_session


class KernelsMissing(ValueError):
    """A kernel was required and the program has none."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What a recipe would take on a topology.

    Attributes:
      plan: parameters, operations and state bytes, from the accounting.
      topology: the machines.
      compiled: XLA's analysis of the compiled step; None where it was only lowered.
      collectives: what the program sends.
      kernels: call sites of custom kernels by name.
      choices: which kernel each operation got, as text.
    """

    plan: Plan
    topology: Topology
    compiled: Compiled | None
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    choices: str

    @property
    def memory_bytes(self) -> int:
        """What a device holds at most: XLA's count where there is one, the plan's estimate elsewhere."""
        return self.compiled.peak_bytes if self.compiled else self.plan.total_bytes

    @property
    def executed_flops(self) -> float:
        """Operations of a step on each device; remat of whole blocks computes the forward pass of the blocks again."""
        again = 1.0 if self.plan.recipe.model.remat == "none" else 4 / 3
        return self.plan.step_flops / self.plan.devices * again

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in a step."""
        return sum(collective.total_bytes for collective in self.collectives)

    def rate(self, collective: Collective) -> float:
        """Bytes per second that a device sends in a collective: the network's where its group leaves a machine."""
        chip = self.topology.chip
        return chip.link_rate if chip.machine is None or collective.group <= chip.machine else chip.network_rate

    def seconds(self) -> dict[str, float]:
        """The roofline's parts: compute, exchange, state, and a step at best and at worst."""
        chip = self.topology.chip
        compute = self.executed_flops / chip.flops
        exchange = sum(collective.total_bytes / self.rate(collective) for collective in self.collectives)
        state = 2 * self.plan.state_bytes / chip.memory_rate
        best, worst = max(compute, exchange) + state, compute + exchange + state
        return {"compute": compute, "exchange": exchange, "state": state, "best": best, "worst": worst}

    def table(self) -> list[tuple[str, tuple[str, ...], int, int, float]]:
        """Returns (kind, axes, times in a step, largest result in bytes, bytes sent by a device in a step), most bytes first."""
        rows: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        for one in self.collectives:
            row = rows.setdefault((one.kind, one.axes), [0, 0, 0.0])
            row[0] += one.times
            row[1] = max(row[1], one.result_bytes)
            row[2] += one.total_bytes
        ordered = sorted(rows.items(), key=lambda item: -item[1][2])
        return [(kind, axes, int(times), int(most), sent) for (kind, axes), (times, most, sent) in ordered]


def look_ahead(recipe: Recipe, topology: Topology, *, kernels_required: bool = False) -> Ahead:
    """Plans a recipe on a topology.

    Raises:
      ConfigError: when the mesh does not fit the devices or the batch does not divide over it.
      ValueError: when the topology cannot be described here.
      KernelsMissing: when kernels are required and the program has none.
    """
    plan = make_plan(recipe, topology.devices)
    chip = topology.chip
    clear_choices()
    with assume_device_kind(chip.platform, chip.kind):
        if topology.compilable:
            session = open_session(recipe, topology.attach())
            compiled, seconds = session.compile_step()
            text, found = compiled.as_text(), analysis(compiled, seconds)
            sent = collectives(text, plan.mesh)
        else:
            names = tuple(plan.mesh)
            mesh = AbstractMesh(tuple(plan.mesh.values()), names, axis_types=(AxisType.Auto,) * len(names))
            session = open_session(recipe, mesh=mesh)
            traced = session.trace_step()
            text, found = traced.lower(lowering_platforms=(chip.platform,)).as_text(), None
            sent = placed_collectives(traced.jaxpr, plan.mesh, chip.platform)
            sent += partitioner_collectives(session, plan)
    present = kernels(text)
    if kernels_required and not present:
        raise KernelsMissing(
            f"{recipe.name} on {topology.name}: the program has no custom kernel; {backend_report(chip.platform)}"
        )
    return Ahead(plan, topology, found, tuple(sent), present, backend_report(chip.platform))


def weak_scaling(recipe: Recipe, topologies: Sequence[Topology], **options: bool) -> list[Ahead]:
    """Plans a recipe on topologies of growing size, every device with as many sequences as on the first.

    Raises what `look_ahead` does; a mesh that does not fit one of the topologies is refused before the first is compiled for.
    """
    rows = [recipe.data.batch_size * target.devices // topologies[0].devices for target in topologies]
    recipes = [override(recipe, "data.batch_size", count) for count in rows]
    for own, target in zip(recipes, topologies):
        if target.compilable:
            check_division(own, own.mesh.build(target.attach()))
    return [look_ahead(own, target, **options) for own, target in zip(recipes, topologies)]


def exponent(plans: Sequence[Ahead]) -> float:
    """Returns the slope of log(bytes that a device sends in a step) over log(devices); 0 is perfect weak scaling."""
    devices = np.log([plan.plan.devices for plan in plans])
    return float(np.polyfit(devices, np.log([plan.sent_bytes for plan in plans]), 1)[0])


def partitioner_collectives(session: Session, plan: Plan) -> list[Collective]:
    """Counts what XLA's partitioner adds for the matrices that the model does not split by hand: all but embedding, head and experts.

    Each such matrix is gathered over fsdp in the compute dtype once forward and once backward; its gradient is scattered over fsdp
    and summed over the other axes of the tokens. Over `tensor`, the outputs of attention and feed-forward are summed, forward and
    backward.
    """
    mesh, model, data = plan.mesh, session.definition.config, session.recipe.data
    tokens = [axis for axis in (*rules.BATCH_AXES, "context") if mesh[axis] > 1]
    width, pieces = model.dtype.itemsize, session.recipe.train.microbatches
    found: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], operand: float, result: float, times: int, source: str) -> None:
        group = math.prod(mesh[axis] for axis in axes)
        if group > 1:
            found.append(Collective(kind, axes, group, int(result), sent(kind, operand, group), times * pieces, source))

    def matrix(path: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
        if "experts" in dims or "vocab" in dims:
            return
        layers = shape[0] if dims[0] == "layers" else 1
        spec = rules.spec_of(dims, shape, session.mesh)
        split = math.prod(mesh[axis] for axis in spec if axis)
        shard = width * math.prod(shape) / layers / split
        if "fsdp" in spec:
            whole = shard * mesh["fsdp"]
            add("all-gather", ("fsdp",), shard, whole, 2 * layers, path)
            add("reduce-scatter", ("fsdp",), whole, shard, layers, path)
        rest = tuple(axis for axis in tokens if axis not in spec)
        add("all-reduce", rest, shard, shard, layers, path)

    map_leaves(matrix, session.definition.dims, session.definition.shapes)
    rows = data.batch_size * data.sequence_length / math.prod(mesh[axis] for axis in tokens) / pieces
    hidden = rows * model.d_model * width
    blocks = [model.feed_forward_of(layer) for layer in range(model.layers)]
    dense = sum(isinstance(block, DenseFeedForward) or getattr(block, "shared_hidden", 0) > 0 for block in blocks)
    add("all-reduce", ("tensor",), hidden, hidden, 2 * (model.layers + dense), "block outputs")
    return found
