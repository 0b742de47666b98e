"""Optimizers: against optax and an SVD, groups, stacked = unrolled, members of a population = separate runs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm import config
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.layers.tree_paths import flatten, prune
from sparse_lm.train.adafactor import Adafactor
from sparse_lm.train.muon import QUINTIC, Muon, orthogonalize
from sparse_lm.train.optimizer import AdamW, Group, Optimizer, ema_update, global_norm_by_group, state_dims
from sparse_lm.train.schedule import WarmupStableDecay

D, H, F, V, E, LAYERS = 8, 10, 12, 16, 3, 2

BLOCK_DIMS = {
    "norm": {"scale": ("embed",)},
    "attention": {"output": {"weight": ("heads", "embed")}},
    "router": {"weight": ("embed", "routes")},
    "experts": {"up": ("experts", "embed", "ffn"), "bias": ("experts", "ffn")},
}
OUTER_DIMS = {"embedding": {"weight": ("vocab", "embed")}, "head": {"weight": ("embed", "vocab")}}
SIZES = {"embed": D, "heads": H, "ffn": F, "vocab": V, "experts": E, "routes": E, "layers": LAYERS}

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""Most of the time here is XLA's; the steps are tiny."""

UNROLLED_DIMS = {**OUTER_DIMS, "blocks": {str(i): BLOCK_DIMS for i in range(LAYERS)}}
STACKED_DIMS = {**OUTER_DIMS, "blocks": map_leaves(lambda _, dims: ("layers", *dims), BLOCK_DIMS)}

OPTIMIZERS = {
    "adamw": AdamW(groups=(Group(path="blocks.router.*", learning_rate=0.5, weight_decay=0.0),)),
    "muon": Muon(precision="float32"),
    "adafactor": Adafactor(smallest_factored_dim=D, momentum=0.9),
}


def random_tree(dims: dict, seed: int) -> dict:
    """Random values of the right shapes; a path's values depend on its name and the seed."""

    def leaf(path: str, leaf_dims: tuple[str, ...]) -> np.ndarray:
        generator = np.random.default_rng([seed, *path.encode()])
        return generator.normal(size=[SIZES[dim] for dim in leaf_dims]).astype(np.float32)

    return map_leaves(leaf, dims)


def stack(tree: dict) -> dict:
    """Unrolled blocks -> one stacked block."""
    blocks = [tree["blocks"][str(i)] for i in range(LAYERS)]
    return {**tree, "blocks": stack_trees(blocks)}


def stack_trees(trees: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def run(
    optimizer: Optimizer, dims: dict, params: dict, gradients: list[dict], learning_rate: Any = 0.1
) -> tuple[dict, dict]:
    """Applies the gradients one after the other, as the trainer does; returns the last parameters and state."""
    return trajectory(optimizer, dims, params, gradients, learning_rate)[-1]


def trajectory(
    optimizer: Optimizer, dims: dict, params: dict, gradients: list[dict], learning_rate: Any = 0.1
) -> list[tuple[dict, dict]]:
    """Returns (parameters, state) after every step, from one compiled scan."""

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def whole(params: dict, gradients: dict) -> Any:
        step = descent(optimizer, dims, learning_rate)
        return jax.lax.scan(step, (params, optimizer.build(dims).init(params)), gradients)[1]

    out = jax.device_get(whole(params, stack_trees(gradients)))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(len(gradients))]


def descent(optimizer: Optimizer, dims: dict, learning_rate: Any) -> Any:
    """Returns the body of a scan over gradients."""
    transformation = optimizer.build(dims)

    def step(carry: tuple[dict, dict], grads: dict) -> Any:
        params, state = carry
        updates, state = transformation.update(grads, state, params)
        params = jax.tree.map(lambda weight, update: weight - learning_rate * update, params, updates)
        return (params, state), (params, state)

    return step


def assert_close(left: dict, right: dict, **tolerance: float) -> None:
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_allclose(left[path], right[path], err_msg=path, **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_step_equals_unrolled_step(name: str) -> None:
    params = random_tree(UNROLLED_DIMS, 0)
    # Layers differ by a factor of 10: any mean taken over the stacked leaf would show.
    gradients = [
        map_leaves(lambda path, leaf: leaf * (10.0 if "blocks.1" in path else 1.0), random_tree(UNROLLED_DIMS, i + 1))
        for i in range(3)
    ]
    unrolled = trajectory(OPTIMIZERS[name], UNROLLED_DIMS, params, gradients)
    stacked = trajectory(OPTIMIZERS[name], STACKED_DIMS, stack(params), [stack(grads) for grads in gradients])
    for step in (0, 2):
        assert_close(stack(unrolled[step][0]), stacked[step][0], rtol=1e-6, atol=1e-6)
    # The state has the dims it says, stacked and unrolled.
    for state, dims in ((unrolled[0][1], UNROLLED_DIMS), (stacked[0][1], STACKED_DIMS)):
        named = flatten(state_dims(state, dims))
        for path, leaf in flatten(state).items():
            assert leaf.shape == tuple(SIZES[dim] for dim in named[path]), path


def test_stacked_orthogonalization_in_bfloat16_equals_unrolled() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24, 40)), jnp.float32)
    one_by_one = [orthogonalize(matrix) for matrix in x.reshape(6, 24, 40)]
    np.testing.assert_allclose(orthogonalize(x).reshape(6, 24, 40), np.stack(one_by_one), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_of_a_population_equal_separate_runs(name: str) -> None:
    optimizer = dataclasses.replace(OPTIMIZERS[name], groups=())
    dims = {"head": OUTER_DIMS["head"], "experts": {"up": ("layers", "experts", "embed", "ffn")}}
    members = [random_tree(dims, i) for i in range(3)]
    gradients = [[random_tree(dims, 10 * i + j) for j in range(2)] for i in range(3)]
    rates = np.asarray([0.1, 0.03, 0.01], np.float32)

    def member(params: dict, gradients: dict, rate: jax.Array) -> dict:
        carry = (params, optimizer.build(dims).init(params))
        return jax.lax.scan(descent(optimizer, dims, rate), carry, gradients)[0][0]

    arguments = stack_trees(members), stack_trees([stack_trees(list(grads)) for grads in gradients]), rates
    together = jax.device_get(jax.jit(jax.vmap(member), compiler_options=FAST_COMPILE)(*arguments))
    alone = jax.jit(member, compiler_options=FAST_COMPILE)
    for i in range(3):
        one = alone(*jax.tree.map(lambda leaf, i=i: leaf[i], arguments))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), one, rtol=1e-5, atol=1e-6)


def test_adamw_equals_optax() -> None:
    """Also shows who decays: matrices, head and router, not norms, biases and embedding."""
    params = random_tree(UNROLLED_DIMS, 0)
    gradients = [random_tree(UNROLLED_DIMS, i + 1) for i in range(5)]
    ours, _ = run(AdamW(weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3), UNROLLED_DIMS, params, gradients)
    decays = map_leaves(lambda path, _: not any(word in path for word in ("norm", "bias", "embedding")), params)
    reference = optax.adamw(0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, mask=decays)
    state, update = reference.init(params), jax.jit(reference.update, compiler_options=FAST_COMPILE)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
    assert_close(ours, params, rtol=1e-5, atol=1e-6)


def test_adamw_by_hand() -> None:
    # First update: mu-hat = g, nu-hat = g^2, so the direction is g / (|g| + eps) = 1; plus 0.1 * 2 of decay.
    transformation = AdamW(weight_decay=0.1).build({"w": ("embed", "ffn")})
    params = {"w": jnp.full((2, 2), 2.0)}
    updates, _ = transformation.update({"w": jnp.full((2, 2), 0.5)}, transformation.init(params), params)
    np.testing.assert_allclose(updates["w"], 1.2, rtol=1e-6)


@pytest.mark.parametrize(("shape", "scale_by_parameter"), [((12, 8), True), ((8, 12), False)])
def test_adafactor_equals_optax_on_every_matrix(shape: tuple[int, int], scale_by_parameter: bool) -> None:
    """On [experts, in, out] each expert must do what optax does on that matrix alone."""
    generator = np.random.default_rng(0)
    scales = np.asarray([0.01, 1.0, 5.0])[:, None, None]
    weights = (generator.normal(size=(3, *shape)) * scales).astype(np.float32)
    gradients = [(generator.normal(size=(3, *shape)) ** 3 * scales).astype(np.float32) for _ in range(4)]
    ours = Adafactor(smallest_factored_dim=8, weight_decay=0.02, scale_by_parameter=scale_by_parameter, momentum=0.5)
    dims = {"w": ("experts", "embed", "ffn")}
    mine, state = run(ours, dims, {"w": weights}, [{"w": grads} for grads in gradients])
    assert state["row"]["w"].shape == (3, shape[0])
    assert state["column"]["w"].shape == (3, shape[1])
    reference = optax.chain(
        optax.adafactor(
            min_dim_size_to_factor=8,
            multiply_by_parameter_scale=scale_by_parameter,
            momentum=0.5,
        ),
        optax.scale(0.1),
    )
    reference_update = jax.jit(reference.update, compiler_options=FAST_COMPILE)
    for i in range(3):
        weight = weights[i]
        reference_state = reference.init(weight)
        for grads in gradients:
            # optax would decay after its own learning rate; ours decays by learning rate * decay * weight.
            update, reference_state = reference_update(grads[i], reference_state, weight)
            weight = weight + np.asarray(update) - 0.1 * 0.02 * weight
        np.testing.assert_allclose(mine["w"][i], weight, rtol=1e-5, atol=1e-6)


def test_adafactor_by_hand() -> None:
    # Update 1: t = 1, so the decay of the moments is 1 - 1 = 0 and v = g^2 (one column and one row of it).
    # g = [[1, 2], [2, 4]] is of rank 1 in g^2 = [[1, 4], [4, 16]]: rows (2.5, 10), columns (2.5, 10), mean 6.25;
    # v = row * column / mean: 2.5 * 2.5 / 6.25 = 1, 4, 4, 16, exactly g^2: every direction is 1, its mean square 1.
    # Weights of mean square 4 double it.
    ours = Adafactor(smallest_factored_dim=2, weight_decay=0.0)
    transformation = ours.build({"w": ("embed", "ffn")})
    params = {"w": jnp.asarray([[2.0, -2.0], [2.0, -2.0]])}
    updates, state = transformation.update(
        {"w": jnp.asarray([[1.0, 2.0], [2.0, 4.0]])}, transformation.init(params), params
    )
    np.testing.assert_allclose(state["row"]["w"], [2.5, 10.0])
    np.testing.assert_allclose(updates["w"], 2.0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (40, 40)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(1).normal(size=shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    # A polynomial of X acts on the singular values alone: iterate it on them.
    expected = s / np.linalg.norm(x)
    for _ in range(5):
        expected = QUINTIC[0] * expected + QUINTIC[1] * expected**3 + QUINTIC[2] * expected**5
    out = np.asarray(orthogonalize(jnp.asarray(x, jnp.float32), dtype="float32"))
    np.testing.assert_allclose(out, (u * expected) @ vt, atol=2e-5)
    coarse = np.asarray(orthogonalize(jnp.asarray(x, jnp.float32)))
    for result in (out, coarse):
        values = np.linalg.svd(result, compute_uv=False)
        large = s > 0.02 * np.linalg.norm(x)
        assert large.sum() > 25
        assert values[: large.sum()].max() < 1.3
        assert values[: large.sum()].min() > 0.6


def test_orthogonalize_ignores_scale_and_lets_vanished_matrices_rest() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 9)), jnp.float32).at[1].set(0.0)
    out = orthogonalize(x, dtype="float32")
    assert not np.any(out[1])
    np.testing.assert_allclose(orthogonalize(1e-3 * x, dtype="float32"), out, atol=1e-4)
    # Squares of 1e-20 underflow: the momentum of an expert without tokens gets there after some 900 steps.
    assert float(jnp.max(jnp.abs(orthogonalize(1e-20 * x, dtype="float32")))) < 1e-6


def test_muon_scales_by_shape() -> None:
    # adam_rms: 0.2 * sqrt(max(4, 9)) = 0.6. spectral: sqrt(9 / 4) = 1.5, never below 1.
    assert Muon().matrix_scale(4, 9) == Muon().matrix_scale(9, 4) == pytest.approx(0.6)
    assert Muon(update_scale="spectral").matrix_scale(4, 9) == 1.5
    assert Muon(update_scale="spectral").matrix_scale(9, 4) == 1.0


def test_muon_momentum_and_the_leaves_left_to_adam() -> None:
    params = random_tree(UNROLLED_DIMS, 0)
    gradients = [random_tree(UNROLLED_DIMS, i + 1) for i in range(2)]
    muon = Muon(weight_decay=0.0, precision="float32", adam_multiplier=0.5)
    before, after = trajectory(muon, UNROLLED_DIMS, params, gradients, learning_rate=1.0)
    # Nesterov: m = 0.95 g1 + g2, direction of g2 + 0.95 m; an expert's [8, 12] matrix at the scale of its shape.
    first, second = (grads["blocks"]["0"]["experts"]["up"][1] for grads in gradients)
    expected = orthogonalize(jnp.asarray(second + 0.95 * (0.95 * first + second)), dtype="float32")
    moved = before[0]["blocks"]["0"]["experts"]["up"][1] - after[0]["blocks"]["0"]["experts"]["up"][1]
    np.testing.assert_allclose(moved, 0.2 * 12**0.5 * expected, atol=1e-5)
    # The rest moves as AdamW at half the learning rate, and matrices have no Adam moments.
    plans = muon.leaf_plans(UNROLLED_DIMS)
    assert plans["blocks.0.router.weight"].kind == plans["embedding.weight"].kind == plans["head.weight"].kind == "adam"
    rest = {path for path, plan in plans.items() if plan.role != "matrix"}
    assert set(flatten(after[1]["adam"]["mu"])) == rest
    assert set(flatten(after[1]["momentum"])) == set(plans) - rest

    def left(tree: dict) -> dict:
        return prune(tree, lambda path: path in rest)

    adam, _ = run(AdamW(weight_decay=0.0), left(UNROLLED_DIMS), left(params), [left(g) for g in gradients], 0.5)
    assert_close(left(after[0]), adam, rtol=1e-6, atol=1e-6)


def test_muon_adam_rms_scale_has_the_root_mean_square_of_adam() -> None:
    # An orthogonal [in, out] matrix has mean square min / (in * out) = 1 / max(in, out): times 0.2 sqrt(max) its root is 0.2;
    # the iteration leaves singular values within [0.7, 1.2] of that.
    grads = {"w": np.random.default_rng(3).normal(size=(64, 256)).astype(np.float32)}
    zero = {"w": np.zeros((64, 256), np.float32)}
    params, _ = run(Muon(weight_decay=0.0), {"w": ("embed", "ffn")}, zero, [grads], learning_rate=1.0)
    assert 0.7 * 0.2 < np.sqrt(np.mean(params["w"] ** 2)) < 1.2 * 0.2


def test_groups_by_path_first_match_counts() -> None:
    groups = (
        Group(path="blocks.attention.*", learning_rate=0.5),
        Group(path="*.weight", learning_rate=2.0, weight_decay=0.7),
        Group(path="blocks.1.norm.scale", weight_decay=0.2),
    )
    plans = AdamW(weight_decay=0.1, groups=groups).leaf_plans(UNROLLED_DIMS)
    assert plans["blocks.1.attention.output.weight"][2:] == (0.5, 0.1)
    assert plans["embedding.weight"][2:] == (2.0, 0.7)
    assert plans["blocks.0.norm.scale"][2:] == (1.0, 0.0)
    assert plans["blocks.1.norm.scale"][2:] == (1.0, 0.2)
    # Without layer numbers a group means the same for stacked blocks.
    stacked = AdamW(weight_decay=0.1, groups=groups[:2]).leaf_plans({"blocks": {"0_to_1": STACKED_DIMS["blocks"]}})
    assert stacked["blocks.0_to_1.attention.output.weight"][2:] == (0.5, 0.1)
    with pytest.raises(config.ConfigError, match=r"groups\.0\.path = 'blocks\.7\.\*'.*embedding\.weight"):
        AdamW(groups=(Group(path="blocks.7.*"),)).build(UNROLLED_DIMS)


def test_multiplier_scales_decay_or_not() -> None:
    # direction 1, weight 2, decay 0.1, multiplier 0.5: 0.5 * (1 + 0.2) = 0.6, or 0.5 * 1 + 0.2 = 0.7.
    dims, params, grads = {"w": ("embed", "ffn")}, {"w": jnp.full((2, 2), 2.0)}, {"w": jnp.ones((2, 2))}
    for scale_decay, expected in ((True, 0.6), (False, 0.7)):
        transformation = AdamW(weight_decay=0.1, scale_decay=scale_decay).build(dims, {"w": 0.5})
        updates, _ = transformation.update(grads, transformation.init(params), params)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


def test_reduced_first_moment_storage() -> None:
    params = random_tree(UNROLLED_DIMS, 0)
    _, state = run(AdamW(first_moment_dtype="bfloat16"), UNROLLED_DIMS, params, [params])
    assert {leaf.dtype for leaf in jax.tree.leaves(state["mu"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["nu"])} == {jnp.dtype("float32")}


def test_elementwise_is_what_packed_sparsity_may_rely_on() -> None:
    assert AdamW().elementwise
    assert not Muon().elementwise
    assert not Adafactor().elementwise


def test_muon_refuses_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"muon: w has dims \('blocks', 'embed', 'ffn'\)"):
        Muon().build({"w": ("blocks", "embed", "ffn")})


@pytest.mark.parametrize(
    "optimizer",
    [*OPTIMIZERS.values(), Muon(), Adafactor(), AdamW(schedule=WarmupStableDecay(decay_start=5, decay_steps=3))],
)
def test_config_is_valid_and_reads_back_equal(optimizer: Optimizer) -> None:
    config.validate(optimizer)
    assert config.from_dict(type(optimizer), config.to_dict(optimizer, "optimizer")) == optimizer


@pytest.mark.parametrize(
    ("optimizer", "field"),
    [
        (AdamW(learning_rate=0.0), "learning_rate"),
        (AdamW(weight_decay=-0.1), "weight_decay"),
        (AdamW(beta2=1.0), "beta2"),
        (AdamW(epsilon=0.0), "epsilon"),
        (Muon(momentum=1.0), "momentum"),
        (Muon(iterations=0), "iterations"),
        (Adafactor(clip_threshold=0.0), "clip_threshold"),
        (Adafactor(decay_exponent=0.0), "decay_exponent"),
        (AdamW(groups=(Group(path=""),)), "groups.0.path"),
    ],
)
def test_impossible_values_name_their_field(optimizer: Optimizer, field: str) -> None:
    with pytest.raises(config.ConfigError, match=f"^{field} = "):
        config.validate(optimizer)


def test_global_norm_by_group() -> None:
    grads = {
        "embedding": {"weight": jnp.asarray([3.0])},
        "blocks": {"0": {"a": jnp.asarray([[4.0, 0.0]])}, "1": {"a": jnp.asarray([jnp.nan])}},
    }
    norms = global_norm_by_group(grads)
    assert set(norms) == {"embedding", "blocks"}
    assert float(norms["embedding"]) == 3.0
    assert bool(jnp.isnan(norms["blocks"]))
    deeper = jax.jit(functools.partial(global_norm_by_group, depth=2))(grads)
    assert float(deeper["blocks.0"]) == 4.0
    assert [group for group, norm in deeper.items() if not jnp.isfinite(norm)] == ["blocks.1"]


def test_ema_by_hand() -> None:
    # Step 0: min(0.99, 1 / 10) = 0.1: 0.1 * 1 + 0.9 * 2 = 1.9. Step 8: 9 / 18 = 0.5: (1 + 2) / 2. Step 10^4: 0.99.
    for step, expected in ((0, 1.9), (8, 1.5), (10_000, 1.01)):
        out = jax.jit(lambda ema, new, step: ema_update(ema, new, 0.99, step))(
            {"w": jnp.ones(2)}, {"w": jnp.full(2, 2.0)}, step
        )
        np.testing.assert_allclose(out["w"], expected, rtol=1e-6)
