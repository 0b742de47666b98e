"""Reading a compiled program: which collectives it holds, over which mesh axes, how often, and how many bytes they send.

Works on the text of XLA's optimized module (one program that every device runs). A collective in a loop counts as often as the loop
turns; the number comes from XLA's own annotation or from the constant that the loop's condition compares with.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\][^ ]* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
_OPERATION = re.compile(r" (" + "|".join(KINDS) + r")(-start)?\(([^)]*)\)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      axes: mesh axes that it spans, of size above 1.
      group: devices that take part in one.
      result_bytes: size of its result on each device.
      sent_bytes: what each device sends each time.
      times: how often it runs in a step.
      source: the operation of the model that it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    result_bytes: int
    sent_bytes: float
    times: int
    source: str

    @property
    def total_bytes(self) -> float:
        """What each device sends in a step."""
        return self.sent_bytes * self.times


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        # A kernel's description may hold line breaks, so only a line that is a closing brace ends a computation.
        if current is None:
            match = _COMPUTATION.match(line)
            if match and not line.startswith(("HloModule", " ")):
                current = match[1]
                found[current] = []
                entry = current if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":
            current = None
        else:
            found[current].append(line)
    return found, entry


def _trips(line: str, condition: list[str]) -> int:
    if match := _TRIPS.search(line):
        return int(match[1])
    bounds = [int(n) for other in condition for n in _CONSTANT.findall(other)]
    return max(bounds, default=1)


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, str, int]]:
    """Yields (computation, line, how often it runs) of every instruction that a computation runs."""
    for line in computations.get(name, ()):
        yield name, line, times
        if loop := _WHILE.search(line):
            yield from _walk(computations, loop[2], times * _trips(line, computations.get(loop[1], [])))
        elif "-done(" not in line and "-update(" not in line:
            for group in _CALLED.findall(line):
                for called in group.split(", "):
                    yield from _walk(computations, called.lstrip("%"), times)


def _arrays(text: str) -> list[int]:
    return [BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in _ARRAY.findall(text)]


def _first_group(line: str) -> list[int] | tuple[str, ...]:
    """Returns the devices of the first group of a collective, or the mesh axes where the text names ours."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        names = re.findall(r"'([^']+)'", match[3])
        if "axis_0" not in sizes and ":(" not in match[3]:
            return tuple(name for name in names if sizes[name] > 1)
        order = np.arange(math.prod(sizes.values()))
        if shuffled := re.search(r"device_ids=\(?\[([\d,]+)\]T?\(?([\d,]*)\)?", match[2]):
            dims = [int(n) for n in shuffled[1].split(",")]
            permutation = [int(n) for n in shuffled[2].split(",") if n]
            order = order.reshape(dims).transpose(permutation).reshape(-1) if permutation else order
        # A piece 'axis':(before)size of an axis splits it into before, size and the rest.
        pieces: list[tuple[str, int, bool]] = []
        for name, size in sizes.items():
            if part := re.search(rf"'{re.escape(name)}':\((\d+)\)(\d+)", match[3]):
                before, own = int(part[1]), int(part[2])
                pieces += [(name, before, False), (name, own, True), (name, size // before // own, False)]
            else:
                pieces.append((name, size, name in names))
        grid = order.reshape([size for _, size, _ in pieces])
        return grid[tuple(slice(None) if inside else 0 for _, _, inside in pieces)].reshape(-1).tolist()
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        grid = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            grid = grid.transpose([int(n) for n in match[3].split(",")])
        return grid.reshape(shape)[0].tolist()
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(n) for n in match[1].split(",")]
    return []


def _axes(line: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns (axes, devices of a group)."""
    group = _first_group(line)
    if group and isinstance(group[0], str):
        return tuple(group), math.prod(mesh[axis] for axis in group)
    places = np.array(np.unravel_index(np.array(group or range(math.prod(mesh.values()))), tuple(mesh.values())))
    varies = (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, moved in zip(mesh, varies) if moved), max(len(places[0]), 1)


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Returns the collectives of a compiled module.

    Args:
      text: `compiled.as_text()`.
      mesh: sizes of the mesh axes in order; device i of the program is at row-major position i.
    """
    computations, entry = _computations(text)
    defined = {
        match[1]: match[2] for lines in computations.values() for line in lines if (match := _INSTRUCTION.match(line))
    }
    found = []
    for where, line, times in _walk(computations, entry, 1):
        operation = _OPERATION.search(line)
        if operation is None or "=" not in line[: operation.start()]:
            continue
        kind, operands = operation[1], [name.strip().lstrip("%") for name in operation[3].split(",")]
        result = _arrays(line[line.index("=") : operation.start()])
        sent_from = [sum(_arrays(defined.get(name, "").split("(", 1)[0])) for name in operands]
        axes, group = _axes(line, mesh)
        # XLA for TPU writes a reduce-scatter as an all-reduce in a fusion that keeps one slice.
        if kind == "all-reduce" and "all-reduce-scatter" in where:
            kind = "reduce-scatter"
        size = min(sent_from[:2]) if kind == "ragged-all-to-all" else sum(sent_from)
        source = _SOURCE.search(line)
        produced = {"all-gather": size * group, "ragged-all-to-all": sum(sent_from[1:2])}.get(kind, sum(result))
        name = source[1] if source else ""
        found.append(Collective(kind, axes, group, int(produced), sent(kind, size, group), times, name))
    return found


def sent(kind: str, operand: float, group: int) -> float:
    """Returns the bytes that each of `group` devices sends in a collective with an operand of so many bytes."""
    share = (group - 1) / max(group, 1)
    factor = {"all-gather": group - 1, "all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return operand * factor


PRIMITIVES = {
    "all_gather": "all-gather",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
}


def placed_collectives(jaxpr: Any, mesh: dict[str, int], platform: str, times: int = 1) -> list[Collective]:
    """Returns the collectives that the model places itself, from the traced program; see `collectives` for the others.

    Args:
      jaxpr: the traced program.
      mesh: sizes of the mesh axes.
      platform: which branch counts where the program differs by platform.
      times: how often the program runs.
    """
    found: list[Collective] = []
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in PRIMITIVES:
            names = parameters.get("axis_name", parameters.get("axes"))
            axes = tuple(axis for axis in (names if isinstance(names, tuple) else (names,)) if mesh.get(axis, 1) > 1)
            group = math.prod(mesh[axis] for axis in axes)
            if group > 1:
                kind = PRIMITIVES[name]
                sizes = [v.aval.size * v.aval.dtype.itemsize for v in equation.invars]
                size = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
                result = sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
                source = str(equation.source_info.name_stack)
                found.append(Collective(kind, axes, group, result, sent(kind, size, group), times, source))
        again = times * parameters["length"] if name == "scan" else times
        branches = parameters.get("branches_platforms")
        for key, value in parameters.items():
            for index, inner in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                if key == "branches" and branches is not None:
                    chosen = next(i for i, names in enumerate(branches) if names is None or platform in names)
                    if index != chosen:
                        continue
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += placed_collectives(inner, mesh, platform, again)
    return found


def kernels(text: str) -> dict[str, int]:
    """Returns {name: number of call sites} of the custom kernels in a compiled or lowered program."""
    names = re.findall(r'custom_call_target="(tpu_custom_call|mosaic_gpu[\w]*|__cudnn[\w$]*)"', text)
    names += re.findall(r"custom_call @(tpu_custom_call|mosaic_gpu[\w]*|__cudnn[\w$]*)", text)
    return {name: len(list(group)) for name, group in itertools.groupby(sorted(names))}
