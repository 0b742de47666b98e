"""Says what a recipe will take before it runs: python scripts/plan.py RECIPE [--devices N] [--compile] [--mesh.fsdp 2 ...].

With --topology v5p:8x8x8 (v5e, v6e), h100:64 or h200:64 the step is compiled ahead of time for machines that need not be there: for TPU
slices by libtpu, for GPUs by JAX's CUDA plugin, without which it is only lowered. With several topologies, separated by commas, every
device keeps its sequences: weak scaling.
"""

import sys

import jax
from rich.console import Console
from rich.table import Table

from experiments import command_line
from sparse_lm.accounting import FORMULA
from sparse_lm.ahead import Ahead, exponent, weak_scaling
from sparse_lm.evaluate.finish import output
from sparse_lm.parallel.topology import topology
from sparse_lm.plan import PARTS, Compiled, Plan, compile_here, device_count, make_plan
from sparse_lm.train.progress import count

HEADINGS = {
    "params": "parameters",
    "gradients": "gradients",
    "opt_state": "optimizer",
    "ema": "average",
    "model_state": "model state",
    "tables": "tables",
}


def main() -> int:
    """Prints the plan and returns the exit code."""
    arguments = command_line.parser(__doc__)
    arguments.add_argument(
        "--devices", type=int, help="devices of the run, here or not; default: the mesh's own number"
    )
    arguments.add_argument("--compile", action="store_true", help="also compile the step here and print what XLA says")
    arguments.add_argument(
        "--topology", metavar="CHIP:SHAPE", help="machines of the run: v5p:8x8x8, v5e:16x16, v6e:8x8, h100:64"
    )
    arguments.add_argument(
        "--require-kernels", action="store_true", help="fail if the program for --topology has no custom kernel"
    )
    recipe, options = command_line.read_recipe(__doc__, arguments)
    if options.topology:
        jax.config.update("jax_platforms", "cpu")  # devices that are here stay alone
        topologies = command_line.or_exit(lambda: [topology(name) for name in options.topology.split(",")])
        plans = command_line.or_exit(lambda: weak_scaling(recipe, topologies, kernels_required=options.require_kernels))
        console = output()
        show(plans[-1].plan, console)
        show_ahead(plans[-1], console)
        if len(plans) > 1:
            show_weak_scaling(plans, console)
        return 0
    devices = device_count(recipe.mesh, jax.device_count()) if options.devices is None else options.devices
    if devices < 1:
        arguments.error(f"--devices = {devices}; allowed: at least 1")
    plan = command_line.or_exit(lambda: make_plan(recipe, devices))
    console = output()
    show(plan, console)
    if options.compile:
        command_line.keep_compiled(recipe.data.directory)
        compared(plan, command_line.or_exit(lambda: compile_here(recipe)), console)
    return 0


def show(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    recipe, mesh = plan.recipe, plan.mesh
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    members = f", {plan.members} members" if plan.members > 1 else ""
    console.print(
        f"{recipe.name} on {plan.devices} device{'s' * (plan.devices > 1)}{f' ({axes})' if axes else ''}{members}\n"
    )
    console.print(operations(plan))
    console.print(memory(plan))
    console.print(
        "Activations: an estimate, what automatic differentiation keeps of one microbatch before XLA fuses; plain attention's scores "
        "are in it up to 1024 positions, and the GPU's attention keeps none. The tensor axis is not divided out of it.",
        soft_wrap=True,
    )
    if plan.host_bytes:
        held, processes = size_text(plan.host_bytes), recipe.distributed.processes or 1
        where = f"host memory of each of {processes} processes" if processes > 1 else "host memory"
        console.print(f"{where}: {held} of rows and slots, twice that while a save is under way", soft_wrap=True)
    for line in plan.whole:
        console.print(f"left whole: {line}", soft_wrap=True)
    steps = recipe.train.steps
    console.print(
        f"\n{plan.tokens_per_step:,} tokens a step, {steps:,} steps: {count(plan.tokens)} tokens, "
        f"{plan.tokens / plan.account.active_parameters:.3g} for each active parameter",
        soft_wrap=True,
    )
    console.print(f"training: {plan.step_flops:.4g} FLOPs a step, {plan.training_flops:.4g} in all", soft_wrap=True)
    console.print(FORMULA.split("; ", 1)[1], soft_wrap=True)


def operations(plan: Plan) -> Table:
    """Returns parameters and forward operations by component."""
    table = Table(
        title=f"One model, {plan.recipe.data.sequence_length} tokens a sequence", title_justify="left", show_footer=True
    )
    lines = plan.account
    table.add_column("component", footer="total")
    table.add_column("parameters", justify="right", footer=f"{lines.parameters:,}")
    table.add_column("active", justify="right", footer=f"{lines.active_parameters:,}")
    table.add_column("forward FLOPs a token", justify="right", footer=f"{lines.forward_flops:,.0f}")
    table.add_column("share", justify="right")
    for row in lines.rows:
        share = f"{row.flops_per_token / lines.forward_flops:.1%}"
        name = row.component.replace("_", " ")
        table.add_row(name, f"{row.parameters:,}", f"{row.active_parameters:,}", f"{row.flops_per_token:,.0f}", share)
    return table


def memory(plan: Plan) -> Table:
    """Returns bytes on each device by component."""
    shown = [part for part in PARTS if any(line[part] for line in plan.bytes.values())]
    sums = {part: sum(line[part] for line in plan.bytes.values()) for part in shown}
    table = Table(title="Bytes on each device", title_justify="left", show_footer=True)
    table.add_column("component", footer="total")
    for part in shown:
        table.add_column(HEADINGS[part], justify="right", footer=size_text(sums[part]))
    table.add_column("in all", justify="right", footer=size_text(plan.total_bytes))
    order = [row.component for row in plan.account.rows]
    for name, line in sorted(
        plan.bytes.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)
    ):
        cells = [size_text(line[part]) for part in shown]
        table.add_row(name.replace("_", " "), *cells, size_text(sum(line.values())))
    for name, size in (("activations (estimate)", plan.activation_bytes), ("logits of a chunk", plan.logits_bytes)):
        table.add_row(name, *[""] * len(shown), size_text(size))
    return table


def show_ahead(ahead: Ahead, console: Console) -> None:
    """Prints what the program for a topology holds, sends and takes."""
    chip, seconds = ahead.topology.chip, ahead.seconds()
    table = Table(
        title=f"What each device of {ahead.topology.name} sends in a step", title_justify="left", show_footer=True
    )
    table.add_column("collective", footer="total")
    table.add_column("axes")
    table.add_column("times", justify="right")
    table.add_column("largest result", justify="right")
    table.add_column("sent", justify="right", footer=size_text(ahead.sent_bytes))
    for kind, axes, times, largest, sent in ahead.table():
        table.add_row(kind, " x ".join(axes), f"{times:,}", size_text(largest), size_text(sent))
    console.print(table)
    share = ahead.memory_bytes / chip.memory_bytes
    if ahead.compiled is None:
        console.print(
            "Lowered, not compiled (no CUDA plugin: pip install 'jax[cuda13]'): collectives of dense matrices are counted from the parameters, "
            "memory is the estimate above.",
            soft_wrap=True,
        )
    else:
        compiled = ahead.compiled
        console.print(
            f"XLA: {size_text(compiled.argument_bytes)} state and batch, {size_text(compiled.temporary_bytes)} gradients, activations "
            f"and scratch; compiled in {compiled.seconds:.0f} s",
            soft_wrap=True,
        )
    fits = "fits" if share <= 1 else "does NOT fit"
    console.print(f"memory: {size_text(ahead.memory_bytes)} of {size_text(chip.memory_bytes)} ({share:.0%}), {fits}")
    called = ", ".join(f"{name} x {count}" for name, count in ahead.kernels.items()) or "none"
    console.print(f"kernels in the program: {called}")
    console.print(ahead.choices)
    rates = f"{chip.link_rate / 1e9:.0f} GB/s"
    if chip.machine is not None:
        rates += f", groups of more than {chip.machine} at {chip.network_rate / 1e9:.0f} GB/s"
    useful = ahead.plan.step_flops / ahead.plan.devices / chip.flops
    console.print(
        f"roofline: compute {seconds['compute']:.3g} s ({ahead.executed_flops:.3g} FLOPs at {chip.flops / 1e12:.0f} TFLOP/s), exchange "
        f"{seconds['exchange']:.3g} s (at {rates}), state {seconds['state']:.3g} s (read and written once at "
        f"{chip.memory_rate / 1e9:.0f} GB/s)",
        soft_wrap=True,
    )
    console.print(
        f"a step takes at best {seconds['best']:.3g} s (everything hidden: MFU {useful / seconds['best']:.0%}), at worst "
        f"{seconds['worst']:.3g} s (nothing hidden: MFU {useful / seconds['worst']:.0%}), at the peak rates of the data sheet",
        soft_wrap=True,
    )


def show_weak_scaling(plans: list[Ahead], console: Console) -> None:
    """Prints how what a device sends grows with the number of devices."""
    table = Table(title="Weak scaling: every device keeps its sequences", title_justify="left")
    for name in ("topology", "devices", "mesh", "sent by a device", "against the first", "step at best", "at worst"):
        table.add_column(name, justify="left" if name in ("topology", "mesh") else "right")
    for plan in plans:
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan.plan.mesh.items() if size > 1)
        ratio, seconds = plan.sent_bytes / plans[0].sent_bytes, plan.seconds()
        times = [f"{seconds[key]:.3g} s" for key in ("best", "worst")]
        table.add_row(
            plan.topology.name, f"{plan.plan.devices:,}", mesh, size_text(plan.sent_bytes), f"{ratio:.3f}", *times
        )
    console.print(table)
    console.print(f"bytes sent by a device grow with devices ** {exponent(plans):.4f}")


def size_text(size: float) -> str:
    """Writes bytes with three digits and a binary unit."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def compared(plan: Plan, compiled: Compiled, console: Console) -> None:
    """Prints XLA's analysis of the compiled step beside the plan."""
    table = Table(title=f"Compiled here in {compiled.seconds:.1f} s, on each device", title_justify="left")
    table.add_column("")
    table.add_column("XLA", justify="right")
    table.add_column("plan", justify="right")
    kept = sum(line[part] for line in plan.bytes.values() for part in PARTS if part != "gradients")
    gradients = sum(line["gradients"] for line in plan.bytes.values())
    table.add_row("state (arguments)", size_text(compiled.argument_bytes), size_text(kept))
    temporary = gradients + plan.activation_bytes + plan.logits_bytes
    table.add_row(
        "gradients, activations, scratch (temporary)", size_text(compiled.temporary_bytes), size_text(temporary)
    )
    fresh = compiled.output_bytes - compiled.alias_bytes
    table.add_row("outputs that reuse no argument", size_text(fresh), "")
    flops = "not given" if compiled.flops is None else f"{compiled.flops:.4g}"
    table.add_row("FLOPs a step", flops, f"{plan.step_flops / plan.devices:.4g}")
    console.print(table)
    console.print(
        "XLA counts the body of a loop once (scanned blocks, chunks of the loss, microbatches, tiles of the experts), attention in "
        "full where it is computed in full, and recomputation under remat; the plan counts what the model needs.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
