"""A session: shapes, dims and shardings of every leaf before anything is computed."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.train.population import Population
from sparse_lm.train.session import check_division, open_session

ONE = jax.devices()[:1]


def session(**changes):
    return open_session(tiny.recipe(pathlib.Path("unused"), tiny.MOE, **changes), ONE)


def leaves(tree) -> dict:
    from sparse_lm.layers.tree_paths import flatten

    return flatten(
        {f.name: v if isinstance(v := getattr(tree, f.name), dict) else {"": v} for f in dataclasses.fields(tree)}
    )


def test_every_leaf_has_dims_and_a_sharding() -> None:
    opened = session(train__ema_decay=0.9, model__execution="scanned")
    shapes, dims, shardings = leaves(opened.abstract), leaves(opened.dims), leaves(opened.shardings)
    assert shapes.keys() == dims.keys() == shardings.keys()
    assert {path.split(".")[0] for path in shapes} == {"step", "params", "opt_state", "ema", "key", "skipped"}
    assert all(len(dims[path]) == len(shape.shape) for path, shape in shapes.items())
    assert shapes["params.blocks.0_to_1.feed_forward.gate.weight"].shape == (2, 4, 16, 16)  # layers, experts, D, F
    assert dims["opt_state.mu.blocks.0_to_1.feed_forward.gate.weight"] == ("layers", "experts", "embed", "ffn")


def test_in_a_population_members_lead_everywhere() -> None:
    opened = session(population=Population(seeds=(1, 2, 3)))
    assert opened.members == 3 and opened.multipliers.tolist() == [1.0, 1.0, 1.0]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(opened.abstract)} == {3}
    assert {names[0] for names in leaves(opened.dims).values()} == {"members"}
    assert session().members is None


def test_a_batch_is_placed_without_what_the_model_does_not_read() -> None:
    batch = {**tiny.full_batch(4, length=32), "domains_BL": np.zeros((4, 32), np.int8)}
    placed = session().put(batch)
    assert sorted(placed) == ["positions_BL", "segments_BL", "targets_BL", "tokens_BL"]
    np.testing.assert_array_equal(placed["tokens_BL"], batch["tokens_BL"])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_routing_groups_must_fit_the_microbatches(microbatches: int) -> None:
    grouped = dataclasses.replace(tiny.MOE, group_sequences=4)
    recipe = tiny.recipe(pathlib.Path("unused"), grouped, train__microbatches=microbatches)
    if microbatches == 1:
        assert open_session(recipe, ONE).definition.group_sequences() == 4
        return
    with pytest.raises(
        ConfigError, match=r"data\.batch_size = 4 .*microbatches \(2\) x group_sequences of the routed layers \(4\) x"
    ):
        check_division(recipe, recipe.mesh.build(ONE))
