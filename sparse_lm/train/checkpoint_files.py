"""What a finished checkpoint consists of, so that a damaged one is seen before it is read and the file is named.

The last item of every step directory is an inventory: path and size of each file of the other items, and a hash of the small ones
(metadata, manifests, the data state, the recipe). Orbax writes it before it gives the directory its final name, so a finished
checkpoint always has one. Large files are checked by size: hashing terabytes would cost more than the check is worth.
"""

import concurrent.futures
import hashlib
import json
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

ITEM = "inventory"
FILE = "inventory.json"
COMMITTED = "_CHECKPOINT_METADATA"
"""Written by Orbax itself; its content changes when a step is finished."""

HASHED_BYTES = 1 << 20
"""Files up to this size are compared by content."""


class InventoryHandler(ocp.CheckpointHandler):
    """Orbax item that lists the files of the items beside it, once these are complete."""

    def save(self, directory: epath.Path, args: "InventorySave") -> None:
        """Nothing yet: the other items are still being written."""

    def finalize(self, directory: epath.Path) -> None:
        """Writes the inventory. Orbax finalizes items in the order of their handlers; this one's is the last."""
        files = listing(directory.parent, leave_out=directory.name)
        (directory / FILE).write_text(json.dumps(files, indent=1, sort_keys=True))

    def restore(self, directory: epath.Path, args: Any = None) -> dict[str, Any]:
        """Reads the inventory."""
        return json.loads((directory / FILE).read_text())


@ocp.args.register_with_handler(InventoryHandler, for_save=True, for_restore=True)
class InventorySave(ocp.args.CheckpointArgs):
    """Asks for an inventory."""


class Entry(NamedTuple):
    """One file of a checkpoint."""

    bytes: int
    sha256: str | None


def _entry(path: epath.Path) -> Entry:
    size = path.stat().length
    return Entry(size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else None)


def _walk(directory: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
    found: dict[str, epath.Path] = {}
    for path in sorted(directory.iterdir(), key=lambda p: p.name):
        if path.is_dir():
            found.update(_walk(path, f"{prefix}{path.name}/"))
        else:
            found[prefix + path.name] = path
    return found


def listing(step: epath.Path, *, leave_out: str = ITEM) -> dict[str, Entry]:
    """Returns {relative path: Entry} of the files of a step directory's items."""
    paths: dict[str, epath.Path] = {}
    for item in step.iterdir():
        if item.is_dir() and item.name != leave_out:
            paths.update(_walk(item, f"{item.name}/"))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a remote store answers slowly but many at once
        return dict(zip(paths, pool.map(_entry, paths.values())))


def damage(step: epath.Path) -> list[str]:
    """Returns what is wrong with a finished checkpoint, one line a file: missing, truncated, altered, foreign; empty: nothing.

    Args:
      step: the directory of one step.
    """
    wanted = step / ITEM / FILE
    if not wanted.exists():
        return [f"missing {wanted}: not a finished checkpoint of a run"]
    try:
        inventory = {path: Entry(*entry) for path, entry in json.loads(wanted.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        return [f"unreadable {wanted}"]
    found = listing(step)
    problems = [] if (step / COMMITTED).exists() else [f"missing {step / COMMITTED}"]
    problems += [f"missing {step / path}" for path in sorted(inventory.keys() - found.keys())]
    problems += [
        f"foreign {step / path}: not part of this checkpoint" for path in sorted(found.keys() - inventory.keys())
    ]
    for path in sorted(inventory.keys() & found.keys()):
        want, have = inventory[path], found[path]
        if want.bytes != have.bytes:
            word = "truncated" if have.bytes < want.bytes else "grown"
            problems.append(f"{word} {step / path}: {have.bytes} of {want.bytes} bytes")
        elif want.sha256 != have.sha256:
            problems.append(f"altered {step / path}: its content is not what was saved")
    return problems


def step_directories(directory: epath.Path) -> dict[int, epath.Path]:
    """Returns the directories that bear a step's number, oldest first."""
    if not directory.exists():
        return {}
    found = {int(path.name): path for path in directory.iterdir() if path.name.isdigit()}
    return dict(sorted(found.items()))


def set_aside(step: epath.Path) -> epath.Path:
    """Renames a damaged step directory, so that its step can be saved anew and nothing is deleted; returns the new path."""
    number = 0
    while (aside := step.parent / f"damaged-{step.name}{f'-{number}' if number else ''}").exists():
        number += 1
    step.rename(aside)
    return aside


def newest_sound_step(directory: epath.Path, *, keep_damaged: bool = False) -> tuple[int | None, list[str]]:
    """Finds the checkpoint to go on from.

    Args:
      directory: RUN/checkpoints.
      keep_damaged: leave damaged steps where they are (for those who only read).

    Returns:
      (the newest step without damage, or None; a note for each damaged one that was passed over).
    """
    notes: list[str] = []
    for number, step in reversed(step_directories(directory).items()):
        problems = damage(step)
        if not problems:
            return number, notes
        where = "" if keep_damaged else f"; set aside as {set_aside(step)}"
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        notes.append(f"checkpoint {number} is damaged: {shown}{where}; an earlier one is used")
    return None, notes
