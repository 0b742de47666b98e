"""Routed blocks: tokens that skip cost nothing and are seen by nobody; adaptive depth is causal, mixture of depths is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.accounting import Measured, account
from sparse_lm.layers.feed_forward import DenseFeedForward, TokenInfo
from sparse_lm.model.definition import define, token_info
from sparse_lm.model.depth import AdaptiveDepth, Depth, FullDepth, MixtureOfDepths
from sparse_lm.model.transformer import Model, empty_cache
from sparse_lm.routing.variable import ExpertChoiceRouter, ExpertThresholdRouter

MIXTURE = MixtureOfDepths(router=ExpertChoiceRouter(k=0.375, scores="sigmoid"))
ADAPTIVE = AdaptiveDepth(router=ExpertThresholdRouter(k=0.5))
DEPTHS: dict[str, Depth] = {"mixture": MIXTURE, "adaptive": ADAPTIVE}
BATCH = tiny.batch((10, 6), (9,))


def model(depth: Depth, **changes) -> Model:
    return tiny.model(DenseFeedForward(hidden=16, activation="relu_squared"), depth=depth, **changes)


@functools.cache
def found(name: str):
    """Losses and gradient of a model whose second block is routed; the same with skipped tokens computed and masked."""
    definition, params, state = tiny.materialized(model(DEPTHS[name]))

    def total(params, dense: bool):
        if dense:
            cache = empty_cache(definition.config, 2, tiny.LENGTH)
            logits = definition.logits(params, state, token_info(BATCH), cache)[0]
        else:
            logits = definition.logits(params, state, token_info(BATCH))[0]
        losses_BL = -jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["targets_BL"][..., None], -1)[..., 0]
        losses_BL = losses_BL * (BATCH["segments_BL"] > 0)
        return jnp.sum(losses_BL), losses_BL

    run = tiny.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    return run(params, False), run(params, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPTHS)
def test_a_routed_block_is_the_whole_block_with_the_skipped_tokens_masked(name: str) -> None:
    ((_, losses), grads), ((_, expected), expected_grads) = found(name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    tiny.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    assert (np.asarray(grads["blocks"]["1"]["depth"]["weight"]) != 0).any()


def test_a_mixture_of_depths_takes_its_share() -> None:
    definition, params, state = tiny.materialized(model(MIXTURE))
    aux = tiny.jit(lambda params: definition.token_losses(params, state, BATCH)[1])(params)
    passes_BL = np.asarray(aux.choices["1"]["depth"])[..., 0] < 1
    # ceil(0.375 * 16) = 6 of the full row, ceil(0.375 * 9) = 4 of the padded one
    assert passes_BL.sum(-1).tolist() == [6, 4] and not passes_BL[BATCH["segments_BL"] == 0].any()
    assert [float(v) for v in aux.metrics["1"]["depth_fraction"]] == [10, 25]
    assert "0" not in aux.choices


@pytest.mark.parametrize("name", DEPTHS)
def test_who_looks_ahead(name: str) -> None:
    definition, params, state = tiny.materialized(model(DEPTHS[name]))
    logits = tiny.jit(lambda tokens: definition.logits(params, state, info_of(tokens))[0])
    looks_ahead = False
    for seed in range(6):
        tokens = np.random.default_rng(seed).integers(0, tiny.VOCABULARY, (1, 12)).astype(np.int32)
        other = tokens.copy()
        other[:, 6:] = (other[:, 6:] + 17 + seed) % tiny.VOCABULARY
        looks_ahead |= not np.allclose(logits(tokens)[:, :6], logits(other)[:, :6], atol=1e-5)
    router = definition.config.depth.router_of(1)
    assert router is not None and looks_ahead is not router.causal and looks_ahead is (name == "mixture")


def info_of(tokens) -> TokenInfo:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return TokenInfo(tokens, positions, jnp.ones(tokens.shape, jnp.int32), None)


def test_adaptive_depth_decodes_token_by_token_as_it_reads() -> None:
    definition, params, state = tiny.materialized(model(ADAPTIVE))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 6)).astype(np.int32)
    full, aux = tiny.jit(
        lambda t: (definition.logits(params, state, info_of(t))[0], definition.hidden(params, state, info_of(t))[2])
    )(tokens)
    passes_BL = np.asarray(aux.choices["1"]["depth"])[..., 0] < 1
    assert 0 < passes_BL.sum() < passes_BL.size
    step = tiny.jit(lambda info, cache: definition.logits(params, state, info, cache))
    cache, pieces = empty_cache(definition.config, 2, 6), []
    info = info_of(tokens)
    for i in range(6):
        logits, cache = step(TokenInfo(*(a[:, i : i + 1] for a in info[:3]), None), cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, rtol=1e-5, atol=1e-5)


def test_which_blocks_are_routed_and_what_they_cost() -> None:
    assert [MixtureOfDepths(every=3).router_of(layer) is not None for layer in range(6)] == [False, False, True] * 2
    full, routed = (
        model(FullDepth(), layers=4),
        model(MixtureOfDepths(router=ExpertChoiceRouter(k=0.25, scores="sigmoid")), layers=4),
    )
    scanned = model(MIXTURE, layers=4, execution="scanned")
    assert [name for name, _ in scanned.runs()] == ["0", "1", "2", "3"]
    for config in (routed, scanned):
        assert account(config, 16).parameters == define(config).parameters()
    flops = {row.component: row.flops_per_token for row in account(full, 16).rows}
    less = {row.component: row.flops_per_token for row in account(routed, 16).rows}
    # two of four blocks at a quarter: (2 + 2 / 4) / 4; attention among a quarter of the tokens sees a quarter of the keys
    assert less["feed_forward"] == pytest.approx(0.625 * flops["feed_forward"])
    assert less["attention_scores"] == pytest.approx((2 + 2 / 16) / 4 * flops["attention_scores"])
    measured = account(routed, 16, measured={1: Measured(depth=0.5), 3: Measured(depth=0.0)})
    assert {row.component: row.flops_per_token for row in measured.rows}["feed_forward"] == pytest.approx(
        0.625 * flops["feed_forward"]
    )
