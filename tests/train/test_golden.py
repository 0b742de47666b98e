"""Metrics of the first two steps of three small models, written down.

When a number here changes on purpose (another initial value, loss or update rule), run

    python -m pytest tests/train/test_golden.py

read the new numbers in the failure, satisfy yourself that the change explains them, write them into GOLDEN and say why in the
commit. When nothing was meant to change, something broke: the message says which model and which number.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.model.definition import define
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Constant
from sparse_lm.train.state import initial_state
from sparse_lm.train.step import Train, build_step

ADAMW = AdamW(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0))
MUON = Muon(learning_rate=0.01, schedule=Constant(warmup_fraction=0.0), precision="float32")
MODELS = {
    "dense": (tiny.model(layers=1), ADAMW),
    "moe": (tiny.model(tiny.MOE, layers=1), ADAMW),
    "muon": (tiny.model(layers=1, tied_embeddings=True, z_coefficient=1e-3), MUON),
}
# name: (loss, gradient norm) of the first step, then of the second
GOLDEN: dict[str, list[float]] = {
    "dense": [4.639609, 13.95301, 4.478742, 10.60243],
    "moe": [4.651735, 13.04417, 4.370616, 9.565485],
    "muon": [4.164553, 1.757379, 4.153901, 1.136152],
}


@pytest.mark.parametrize("name", ["dense", "moe", pytest.param("muon", marks=pytest.mark.slow)])
def test_the_first_two_steps_are_what_they_were(name: str) -> None:
    model, optimizer = MODELS[name]
    definition = define(model)
    state = tiny.jit(lambda: initial_state(definition, optimizer.build(definition.dims), 0, with_ema=False))()
    step = tiny.jit(build_step(definition, optimizer, Train(steps=2)))
    found: list[float] = []
    for i in range(2):
        state, metrics = step(state, tiny.batch((10, 6), (9,), (16,), seed=i), jnp.float32(1))
        found += np.asarray(metrics["pulse"])[:2].tolist()
    np.testing.assert_allclose(
        found,
        GOLDEN[name],
        rtol=1e-5,
        err_msg=f"{name}: found {[float(f'{value:.7g}') for value in found]}. The numerics changed; see the top of this file",
    )
