"""Properties of the whole model: causality, packing, stacking, rematerialisation, tying, muP, decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.layers.feed_forward import DenseFeedForward, TokenInfo
from sparse_lm.layers.parameter import map_leaves
from sparse_lm.layers.parametrization import MuP
from sparse_lm.model.attention import Attention
from sparse_lm.model.definition import Definition, define, token_info
from sparse_lm.model.transformer import Model, empty_cache
from sparse_lm.train.state import unstack

KEY = jax.random.key(3)
# squared ReLU: one grouped product fewer to compile than SwiGLU
MOE = dataclasses.replace(tiny.MOE, activation="relu_squared")
ATTENTION = tiny.model().attention


def logits_of(definition: Definition):
    return tiny.jit(lambda params, state, batch: definition.logits(params, state, token_info(batch))[0])


def losses_of(definition: Definition):
    return tiny.jit(lambda params, state, batch: definition.token_losses(params, state, batch)[0])


VARIANTS = {
    "dense": tiny.model(layers=2),
    "dense, window, no qk norm": tiny.model(
        layers=2, attention=Attention(heads=2, kv_heads=1, head_dim=8, qk_norm=False, window=3)
    ),
    "moe, all heads": tiny.model(MOE, layers=1, attention=Attention(heads=2, head_dim=8)),
}


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), *list(VARIANTS)[1:]])
def test_no_output_depends_on_a_later_token(name: str) -> None:
    """By gradient: d output[i] / d embedding of input[j] is zero for j > i and, inside the window, not zero for j <= i."""
    config, length = VARIANTS[name], 6
    definition, params, state = tiny.materialized(config)
    # Every position has its own token, so a row of the embedding's gradient is one position.
    tokens = jnp.arange(length, dtype=jnp.int32)[None]
    info = TokenInfo(tokens, tokens, jnp.ones_like(tokens), None)

    def outputs(embedding):
        h_BLD = definition.hidden({**params, "embedding": embedding}, state, info)[0]
        return h_BLD[0, :, 0]

    gradient_LVD = tiny.jit(jax.jacrev(outputs))(params["embedding"])
    depends_LL = np.abs(np.asarray(gradient_LVD)[:, :length]).max(-1) > 0
    reach = length if config.attention.window is None else config.layers * (config.attention.window - 1) + 1
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    np.testing.assert_array_equal(depends_LL, (distance >= 0) & (distance < reach))


@pytest.mark.parametrize("name", ["dense", pytest.param("moe, all heads", marks=pytest.mark.slow)])
def test_packed_documents_are_separate_documents(name: str) -> None:
    definition, params, state = tiny.materialized(VARIANTS[name])
    packed = tiny.batch((7, 5), (4, 4, 4), length=12)
    documents = [
        (b, start, size) for b, row in enumerate([(7, 5), (4, 4, 4)]) for start, size in zip(np.cumsum((0, *row)), row)
    ]
    # One document a row, padded at its end.
    alone = tiny.batch(*[(size,) for _, _, size in documents], length=12)
    for row, (b, start, size) in enumerate(documents):
        for array in ("tokens_BL", "targets_BL"):
            alone[array][row, :size] = packed[array][b, start : start + size]

    def evaluate(params, batch):
        losses_BL = definition.token_losses(params, state, batch)[0]
        return jnp.sum(losses_BL), (losses_BL, definition.logits(params, state, token_info(batch))[0])

    gradient = tiny.jit(jax.value_and_grad(evaluate, has_aux=True))
    (_, (losses, logits)), grads = gradient(params, packed)
    (_, (losses_alone, logits_alone)), grads_alone = gradient(params, alone)
    for row, (b, start, size) in enumerate(documents):
        here, there = (b, slice(start, start + size)), (row, slice(0, size))
        np.testing.assert_allclose(logits[here], logits_alone[there], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(losses[here], losses_alone[there], rtol=1e-5, atol=1e-5)
    assert (np.asarray(losses_alone)[alone["segments_BL"] == 0] == 0).all()
    if name == "dense":  # routed layers drop padding from the plan; dense ones mask it from the loss
        tiny.assert_close(grads, grads_alone)


def objective(config: Model):
    """(params, batch) -> (objective, gradient, metrics) with unrolled block names."""
    definition = define(config)

    def run(params, batch):
        function = functools.partial(
            definition.objective,
            model_state=definition.initial_state(),
            batch=batch,
            units=definition.units(batch),
            key=KEY,
        )
        (value, aux), grads = jax.value_and_grad(function, has_aux=True)(params)
        return value, unstack(grads, 0), aux["metrics"]["loss"]

    return tiny.jit(run)


BATCH = tiny.batch((10, 6), (9,), (16,), (5, 5, 4))


@pytest.fixture(scope="module")
def moe_objective():
    """The mixed model, unrolled, without rematerialisation."""
    config = mixed()
    params = tiny.materialized(config)[1]
    return params, objective(config)(params, BATCH)


def mixed(**changes) -> Model:
    """A dense block, then two routed ones: two runs when scanned."""
    return tiny.model(MOE, layers=3, leading=(tiny.DENSE,), **changes)


@pytest.mark.slow
def test_scanned_is_unrolled(moe_objective) -> None:
    params, (value, grads, _) = moe_objective
    config = mixed(execution="scanned")
    assert [name for name, _ in config.runs()] == ["0", "1_to_2"]
    definition, stacked, _ = tiny.materialized(config)
    tiny.assert_same(unstack(stacked, 0), params)
    assert definition.parameters() == define(mixed()).parameters()
    scanned_value, scanned_grads, _ = objective(config)(stacked, BATCH)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-6)
    tiny.assert_close(scanned_grads, grads)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"remat": "names"}, {"remat": "block"}])
def test_rematerialisation_changes_no_gradient(changes, moe_objective) -> None:
    params, (value, grads, _) = moe_objective
    again_value, again_grads, _ = objective(mixed(**changes))(params, BATCH)
    np.testing.assert_allclose(again_value, value, rtol=1e-6)
    tiny.assert_close(again_grads, grads, rtol=1e-5)


def test_rematerialisation_recomputes_what_is_not_saved() -> None:
    """Block by block, fewer values are kept for the backward pass."""

    def kept(**changes) -> int:
        config = tiny.model(layers=2, **changes)
        definition, params, state = tiny.materialized(config)
        batch = tiny.full_batch(4)
        run = lambda p: definition.objective(p, state, batch, definition.units(batch), KEY)[0]  # noqa: E731
        leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], params))
        return sum(leaf.size for leaf in leaves)

    assert kept(remat="block") < kept(remat="names", saved_names=("attention",)) < kept()


@pytest.mark.slow
def test_tied_embeddings_get_both_gradients() -> None:
    tied = tiny.model(layers=1, tied_embeddings=True)
    untied = dataclasses.replace(tied, tied_embeddings=False)
    params = tiny.materialized(tied)[1]
    assert "head" not in params
    both = {**params, "head": params["embedding"].T}
    value, grads, _ = objective(tied)(params, BATCH)
    untied_value, untied_grads, _ = objective(untied)(both, BATCH)
    np.testing.assert_allclose(value, untied_value, rtol=1e-6)
    expected = untied_grads["embedding"] + untied_grads.pop("head").T
    tiny.assert_close(grads, {**untied_grads, "embedding": expected})


@pytest.mark.slow
def test_mup_multiplies_logits_and_attention() -> None:
    # base width 4 for D = 16: logits times 1/4; base head dim 2 for N = 8: scores times sqrt(2) / 8 instead of 1 / sqrt(8)
    config = tiny.model(layers=1, parametrization=MuP(base_width=4, base_head_dim=2))
    plain = tiny.model(layers=1)
    definition, params, state = tiny.materialized(config)
    batch = tiny.full_batch(2)
    logits = logits_of(definition)(params, state, batch)

    # The same numbers from a standard model: head / 4, queries times (sqrt(2) / 8) / (1 / sqrt(8)) = 1 / 2.
    scaled = map_leaves(lambda path, leaf: leaf * {"head": 0.25}.get(path, 1.0), params)
    scaled = map_leaves(lambda path, leaf: leaf * (0.5 if path.endswith("query_norm.scale") else 1.0), scaled)
    np.testing.assert_allclose(logits, logits_of(define(plain))(scaled, state, batch), rtol=1e-5, atol=1e-6)

    # The loss uses the same multiplier as the logits.
    losses = losses_of(definition)(params, state, batch)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets_BL"][..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_the_cap_reaches_logits_and_loss() -> None:
    config = tiny.model(layers=1, logit_softcap=0.5)
    definition, params, state = tiny.materialized(config)
    batch = tiny.full_batch(2)
    params = {**params, "head": 20 * params["head"]}
    logits = logits_of(definition)(params, state, batch)
    assert 0.4 < np.abs(logits).max() <= 0.5
    losses = losses_of(definition)(params, state, batch)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets_BL"][..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", [pytest.param("unrolled", marks=pytest.mark.slow), "scanned"])
def test_decoding_with_a_cache_is_the_full_forward(execution) -> None:
    attention = dataclasses.replace(ATTENTION, window=5)
    definition, params, state = tiny.materialized(tiny.model(execution=execution, attention=attention))
    batch = tiny.full_batch(2, length=12)
    full = logits_of(definition)(params, state, batch)
    cache = empty_cache(definition.config, 2, 12)

    @tiny.jit
    def step(info, cache):
        return definition.logits(params, state, info, cache)

    pieces, start = [], 0
    for size in (7, 1, 1, 1, 1, 1):  # a prompt, then token by token
        part = {name: array[:, start : start + size] for name, array in batch.items()}
        logits, cache = step(token_info(part), cache)
        pieces.append(logits)
        start += size
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_decoding_a_routed_model_is_the_full_forward() -> None:
    definition, params, state = tiny.materialized(tiny.model(MOE, layers=1))
    batch = tiny.full_batch(1, length=4)
    full = logits_of(definition)(params, state, batch)
    step = tiny.jit(lambda info, cache: definition.logits(params, state, info, cache))
    cache, pieces = empty_cache(definition.config, 1, 4), []
    for i in range(4):
        logits, cache = step(token_info({name: array[:, i : i + 1] for name, array in batch.items()}), cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_losses() -> None:
    definition, params, state = tiny.materialized(tiny.model(layers=1, compute_dtype="bfloat16"))
    batch = tiny.full_batch(2)
    hidden, head, _, _ = jax.eval_shape(lambda: definition.hidden(params, state, token_info(batch)))
    assert hidden.dtype == jnp.bfloat16 and head.dtype == jnp.float32
    losses = losses_of(definition)(params, state, batch)
    assert losses.dtype == jnp.float32
    exact = losses_of(define(tiny.model(layers=1)))(params, state, batch)
    np.testing.assert_allclose(losses, exact, atol=0.1)  # eight bits of mantissa through one block
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_patterns_and_leading_blocks() -> None:
    a, b, c = DenseFeedForward(hidden=1), DenseFeedForward(hidden=2), DenseFeedForward(hidden=3)
    config = Model(layers=6, leading=(a,), pattern=(b, b, c))
    assert [config.feed_forward_of(layer) for layer in range(6)] == [a, b, b, c, b, b]
    assert config.runs() == [("0", a), ("1", b), ("2", b), ("3", c), ("4", b), ("5", b)]
    scanned = dataclasses.replace(config, execution="scanned")
    assert scanned.runs() == [("0", a), ("1_to_2", b), ("3", c), ("4_to_5", b)]


def test_initial_values_of_a_block_do_not_depend_on_the_others() -> None:
    dense = tiny.materialized(tiny.model(layers=2))[1]["blocks"]["1"]["attention"]
    routed = tiny.materialized(tiny.model(MOE, layers=2))[1]["blocks"]["1"]["attention"]
    tiny.assert_same(dense, routed)
