"""The smoke transform: any recipe at a size that runs in seconds on the devices of this machine, its kinds of components unchanged."""

import dataclasses
from typing import Any

from sparse_lm.config import Config
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe

SMALL: dict[str, Any] = {
    "hidden": 64,
    "shared_hidden": 64,
    "d_model": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 0,
    "head_dim": 32,
    "sequence_length": 64,
    "overlap": 32,
    "batch_size": 8,
    "microbatches": 1,
    "steps": 6,
    "warmup_steps": 2,
    "tokens_per_domain": 1024,
    "documents_per_domain": 40,
    "log_every": 1,
    "experts": 4,
    "k": 2,
    "block": 16,
    "rank": 2,
    "rows": 1000,
}
"""Upper bounds by field name, wherever the field occurs."""


def shrink(config: Any) -> Any:
    """Returns a config with every number of `SMALL` at most its bound."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            changes[field.name] = shrink(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Config):
            changes[field.name] = tuple(shrink(item) for item in value)
        elif field.name == "at":
            changes[field.name] = tuple(block for block in value if block < SMALL["layers"]) or (0,)
        elif field.name == "documents_per_domain":
            changes[field.name] = SMALL[field.name]
        elif field.name in SMALL and isinstance(value, int):
            changes[field.name] = min(value, SMALL[field.name])
    if changes.get("leading"):
        changes["layers"] = max(changes["layers"], len(changes["leading"]) + 1)
    return dataclasses.replace(config, **changes)


def smoke(recipe: Recipe) -> Recipe:
    """Returns the smoke variant of a recipe."""
    small = shrink(recipe)
    checkpoint = dataclasses.replace(small.checkpoint, every=4)
    validation = dataclasses.replace(small.validation, every=4)
    name = f"{recipe.name}_smoke"
    return dataclasses.replace(small, name=name, mesh=MeshShape(), checkpoint=checkpoint, validation=validation)
