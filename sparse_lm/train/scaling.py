"""What a mesh costs on this machine: the same step on one device and on all, timed and compared.

Weak scaling: every device keeps its number of sequences, so a perfect mesh takes as long as one device; efficiency is the ratio of
the two times. Agreement: loss and gradient norm of one step from the same initial values and batch.
"""

import dataclasses
import json
import pathlib
import time
import traceback
from typing import Any

import jax
import numpy as np

from sparse_lm.config import override
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.model.transformer import Model
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.benchmark import packed_batch, time_step
from sparse_lm.train.session import open_session
from sparse_lm.train.step import PULSE


def over(recipe: Recipe, axis: str, devices: int) -> Recipe:
    """Returns the recipe with one mesh axis over all devices, each keeping its number of sequences."""
    rows = recipe.data.batch_size * (devices if axis in ("data", "fsdp", "expert") else 1)
    spread = override(dataclasses.replace(recipe, mesh=MeshShape(data=1)), f"mesh.{axis}", devices)
    return override(spread, "data.batch_size", rows)


def small(name: str, dtype: str) -> Recipe:
    """Returns a model whose step compiles in seconds and which every axis of two devices divides."""
    forward = {
        "dense": DenseFeedForward(hidden=1024),
        "moe": MoEFeedForward(experts=8, hidden=512, shared_hidden=512, router=TopKRouter(k=2, bias_rate=1e-3)),
    }[name]
    model = Model(
        vocab_size=4096,
        d_model=512,
        layers=2,
        attention=Attention(heads=8, kv_heads=4, head_dim=64),
        pattern=(forward,),
        compute_dtype="float32" if dtype == "float32" else "bfloat16",
    )
    recipe = Recipe(name=f"{name}_{dtype}", model=model, mesh=MeshShape(data=1))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sequence_length=512, batch_size=8))


def one_step(recipe: Recipe, devices: list[jax.Device]) -> dict[str, float]:
    """Returns the scalars of one step on a fixed batch."""
    session = open_session(recipe, devices)
    data, vocabulary = recipe.data, recipe.model.vocab_size
    fixed = packed_batch(data.batch_size, data.sequence_length, vocabulary, mean_document=200, seed=0)
    compiled, _ = session.compile_step(int(fixed["segments_BL"].max()))
    _, metrics = compiled(session.create(), session.put(fixed))
    return dict(zip(PULSE, np.asarray(metrics["pulse"], np.float64).tolist(), strict=True))


def agreement(name: str, dtype: str, axes: tuple[str, ...], write: Any) -> None:
    """Compares one step of a small model on one device with the same step over each axis."""
    recipe, devices = small(name, dtype), jax.devices()
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        alone = one_step(recipe, devices[:1])
        for axis in axes:
            start = time.perf_counter()
            found = one_step(override(recipe, f"mesh.{axis}", len(devices)), devices)
            off = {key: abs(found[key] - alone[key]) / abs(alone[key]) for key in ("loss", "grad_norm")}
            seconds = time.perf_counter() - start
            write(
                {
                    "what": f"{recipe.name} over {axis}",
                    "loss": found["loss"],
                    "alone": alone["loss"],
                    **off_by(off),
                    "s": seconds,
                }
            )


def off_by(relative: dict[str, float]) -> dict[str, float]:
    """Names relative differences."""
    return {f"{key}_off": value for key, value in relative.items()}


def efficiency(recipe: Recipe, axes: tuple[str, ...], repeats: int, write: Any) -> None:
    """Times a recipe on one device and over each axis of all of them."""
    devices = jax.devices()
    alone = time_step(over(recipe, "data", 1), repeats=repeats, devices=devices[:1])
    write({"what": f"{recipe.name} on 1 device", **alone})
    for axis in axes:
        found = time_step(over(recipe, axis, len(devices)), repeats=repeats, devices=devices)
        ratio = found["tokens_per_s"] / len(devices) / alone["tokens_per_s"]
        write({"what": f"{recipe.name} over {axis} = {len(devices)}", **found, "efficiency": ratio})


def run(recipe: Recipe, repeats: int, path: pathlib.Path | None) -> int:
    """Runs everything, each part on its own: what fails is reported and the rest goes on. Returns the number of failures."""
    device = jax.devices()[0]
    rows: list[dict[str, Any]] = []
    failures = 0

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if path is not None:
            about = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__}
            path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

    every = ("data", "fsdp", "tensor", "context")
    parts = [
        lambda: efficiency(recipe, ("data", "fsdp"), repeats, write),
        lambda: agreement("moe", "bfloat16", ("expert",), write),
        lambda: agreement("moe", "float32", ("expert", "tensor"), write),
        lambda: agreement("dense", "float32", every, write),
    ]
    for part in parts:
        try:
            part()
        except Exception:  # a benchmark on a lent machine: one part's failure must not cost the others
            failures += 1
            traceback.print_exc()
    return failures
