"""What comes before the first step: is it the same run, do all processes see its files, where does it go on, what is it."""

import json
import math
import pathlib
import secrets
import time
from typing import Any

from etils import epath

from sparse_lm.accounting import absent_operations, account, with_operations
from sparse_lm.config import ConfigError
from sparse_lm.data import storage
from sparse_lm.data.dataset import Dataset
from sparse_lm.parallel.distributed import Cluster
from sparse_lm.recipe import Recipe, differences, recipe_from_json, save_recipe
from sparse_lm.train import machine
from sparse_lm.train.checkpoint import Checkpointer
from sparse_lm.train.checkpoint_files import newest_sound_step, set_aside, step_directories
from sparse_lm.train.checkpoint_reader import DamagedCheckpoint, saved_recipe
from sparse_lm.train.progress import Progress
from sparse_lm.train.session import Session, starting_point
from sparse_lm.train.state import TrainState

PLACEMENT = "model.memory.placement"
FREE_FIELDS = (
    *("log.", "checkpoint.", "validation.", "mesh.", "distributed.", "name:", "data.directory", "data.workers"),
    *(f"{PLACEMENT}: OnDevice -> OnHost", f"{PLACEMENT}: OnHost -> OnDevice", f"{PLACEMENT}.room"),
)
"""Fields in which a resumed run may differ from the run it continues: they change no number that is trained on (a mesh
changes the order of sums, so going on elsewhere is equal to rounding, not to the bit)."""


def check_same_run(recipe: Recipe, checkpoints: epath.Path) -> None:
    """Raises ConfigError if the directory holds checkpoints of another recipe."""
    for step in reversed(step_directories(checkpoints)):
        try:
            document = saved_recipe(checkpoints, step)
        except Exception:  # a damaged step is dealt with when a step is chosen
            continue
        saved = recipe_from_json(document, f"checkpoint {step} in {checkpoints}")
        changed = [line for line in differences(saved, recipe) if not line.startswith(FREE_FIELDS)]
        if changed:
            allowed = (
                "the recipe that it was started with, or another --run-dir (start_from.run branches from it). Changed: "
            )
            raise ConfigError("run_dir", str(checkpoints.parent), allowed + "; ".join(changed))
        return


def check_shared(checkpoints: epath.Path, cluster: Cluster) -> None:
    """Raises Disagreement if some process does not see the checkpoint directory of the others."""
    if cluster.count == 1:
        return

    def write() -> str:
        checkpoints.mkdir(parents=True, exist_ok=True)
        name = f".shared-{secrets.token_hex(8)}"
        (checkpoints / name).write_text("")
        return name

    probe = checkpoints / cluster.of_first("probe", write)
    for _ in range(50):  # network disks show a new file late
        if probe.exists():
            break
        time.sleep(0.1)
    cluster.agree("storage", lambda: {f"sees the files that process 0 writes into {checkpoints}": probe.exists()})
    if cluster.first:
        probe.unlink()


def restored_or_new(
    session: Session, checkpoints: epath.Path, cluster: Cluster, progress: Progress
) -> tuple[int | None, TrainState, dict[str, Any] | None, Checkpointer]:
    """Restores the newest sound checkpoint, or makes the starting point when there is none.

    Returns:
      (finished steps of the checkpoint or None, state, data state, the checkpointer).
    """
    passed_over = 0
    while True:
        cluster.progress("choosing a checkpoint")
        chosen = cluster.of_first(f"chosen/{passed_over}", lambda: json.dumps(newest_sound_step(checkpoints)))
        latest, notes = json.loads(chosen)
        for note in notes:
            progress.event(note)
        checkpointer = Checkpointer(
            checkpoints,
            session.recipe.checkpoint,
            session.abstract,
            session.dims,
            session.mesh,
            population=session.recipe.population.active,
            owners=session.owners,
        )
        if latest is None:
            return None, *starting_point(session), checkpointer
        cluster.progress(f"restoring checkpoint {latest}")
        try:
            return latest, *checkpointer.restore(latest, session.shardings), checkpointer
        except DamagedCheckpoint as error:
            checkpointer.close()
            if cluster.count > 1:  # the others may have read their parts
                raise
            progress.event(f"{error}; set aside as {set_aside(checkpoints / str(latest))}; an earlier one is used")
            passed_over += 1


def write_description(session: Session, dataset: Dataset, run_dir: pathlib.Path) -> None:
    """Writes config.json, environment.json, data.json, accounting.json and the tokenizer into the run directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(session.recipe, run_dir)
    lines = account(session.recipe.model, session.recipe.data.sequence_length)
    assert lines.parameters == session.definition.parameters(), "the account does not add up to the tree"
    documents = {
        "environment.json": machine.environment(),
        "data.json": dataset.describe(),
        "accounting.json": [row._asdict() for row in lines.rows],
    }
    if sparse := session.sparsifier.description():
        dense = lines.forward_flops
        if session.sparsifier.accounted:
            absent_weights = {r["path"]: r["matrices"] * math.prod(r["shape"]) - r["kept"] for r in sparse["matrices"]}
            dense += absent_operations(session.recipe.model, absent_weights)
        documents["sparsity.json"] = with_operations(sparse, session.recipe.model, dense)
    for name, document in documents.items():
        storage.write_atomically(run_dir / name, (json.dumps(document, indent=1, default=str) + "\n").encode())
