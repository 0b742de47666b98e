"""Models, batches and recipes small enough to compile in a second; shared by the tests of the model and of training."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from sparse_lm.config import override
from sparse_lm.data.files import Files
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.data.tokenizer import Bytes
from sparse_lm.layers.feed_forward import DenseFeedForward, FeedForward
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.model.attention import Attention
from sparse_lm.model.definition import Definition, define
from sparse_lm.model.transformer import Model
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.metrics import LogConfig
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.step import Train
from sparse_lm.train.validation import Validation

VOCABULARY = 64
LENGTH = 16
FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""Most of the time of these tests is XLA's; the programs are tiny."""

DENSE = DenseFeedForward(hidden=32)
MOE = MoEFeedForward(experts=4, hidden=16, router=TopKRouter(k=2, balance_coefficient=0.1, z_coefficient=0.01))


def model(feed_forward: FeedForward = DENSE, **changes: Any) -> Model:
    """Two blocks of width 16 with grouped queries; changes are fields of Model."""
    attention = changes.pop("attention", Attention(heads=2, kv_heads=1, head_dim=8))
    start = {"vocab_size": VOCABULARY, "d_model": 16, "layers": 2, "attention": attention, "pattern": (feed_forward,)}
    return Model(**{**start, **changes})


jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


@functools.cache
def materialized(config: Model, seed: int = 3) -> tuple[Definition, dict, dict]:
    """Returns (definition, parameters, model state) of a model."""
    definition = define(config)
    return definition, jit(definition.initial_params)(jax.random.key(seed)), definition.initial_state()


def batch(
    *rows: tuple[int, ...], length: int = LENGTH, vocabulary: int = VOCABULARY, seed: int = 0
) -> dict[str, np.ndarray]:
    """A packed batch: each row is given by the lengths of its documents; the rest of a row is padding (segment 0)."""
    draw = np.random.default_rng(seed)
    shape = (len(rows), length)
    tokens = draw.integers(0, vocabulary, shape).astype(np.int32)
    targets = draw.integers(0, vocabulary, shape).astype(np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents, 1):
            positions[b, start : start + size] = np.arange(size)
            segments[b, start : start + size] = number
            start += size
        assert start <= length
    return {"tokens_BL": tokens, "targets_BL": targets, "positions_BL": positions, "segments_BL": segments}


def full_batch(rows: int, **keywords: Any) -> dict[str, np.ndarray]:
    """A batch of one document a row, without padding."""
    return batch(*[(keywords.get("length", LENGTH),)] * rows, **keywords)


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Returns {dotted path: numpy array} of nested dicts; other pytrees by their key path."""
    flat: dict[str, np.ndarray] = {}
    if dataclasses.is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    map_leaves(lambda path, leaf: flat.__setitem__(path, np.asarray(leaf)), tree)
    return flat


def assert_close(left: Any, right: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Every leaf equal within tolerances, `atol` relative to the largest value of the leaf."""
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        scale = float(np.max(np.abs(right[path]), initial=0.0)) or 1.0
        np.testing.assert_allclose(left[path], right[path], rtol=rtol, atol=atol * scale, err_msg=path)


def assert_same(left: Any, right: Any) -> None:
    """Every leaf bitwise equal."""
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    different = [path for path in left if left[path].tobytes() != right[path].tobytes()]
    assert not different, f"not bitwise equal: {different}"


TEXT = "A raven flew over the quiet harbour. 12 boats slept; nobody counted them. "


def corpus(folder: pathlib.Path, documents: int = 24) -> pathlib.Path:
    """Writes a folder of short text files of different lengths, the files of folder `held_out` for validation."""
    for number in range(documents):
        where = folder / ("held_out" if number % 8 == 7 else "train")
        where.mkdir(parents=True, exist_ok=True)
        (where / f"{number:02}.txt").write_text(f"{number}: " + TEXT[number % 30 :] * (2 + number % 5))
    return folder


def recipe(folder: pathlib.Path, feed_forward: FeedForward = DENSE, **changes: Any) -> Recipe:
    """An 8-step run on the texts of `corpus`; changes are fields by path with `__` for dots, such as train__steps=4."""
    base = Recipe(
        name="tiny",
        data=DataConfig(
            sources=(Files(paths=(str(folder / "text"),), validation=("held_out/*",)),),
            tokenizer=Bytes(),
            sequence_length=32,
            batch_size=4,
            directory=str(folder / "data"),
        ),
        model=model(feed_forward, vocab_size=264),
        optimizer=AdamW(learning_rate=3e-3, schedule=Constant(warmup_steps=2)),
        train=Train(steps=8),
        validation=Validation(every=4, tokens_per_domain=128, batch_size=4),
        checkpoint=Checkpoints(every=4),
        log=LogConfig(log_every=1, display="off", tensorboard=False),
    )
    for path, value in changes.items():
        base = override(base, path.replace("__", "."), value)
    return base
