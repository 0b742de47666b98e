"""The account against hand counts, against the leaves of the real tree, and against XLA's count of the same computation."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from sparse_lm.accounting import account, mean_keys
from sparse_lm.layers import projection
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.memory.engram import Engram
from sparse_lm.model.attention import Attention
from sparse_lm.model.definition import define
from sparse_lm.model.transformer import Model
from sparse_lm.routing.experts import MoEFeedForward, RoutedExperts
from sparse_lm.routing.top_k import TopKRouter


def test_a_dense_layer_by_hand():
    """D 64, 4 query heads and 2 key heads of 16, F 160 SwiGLU, V 1000, L 128."""
    model = Model(
        vocab_size=1000,
        d_model=64,
        layers=1,
        attention=Attention(heads=4, kv_heads=2, head_dim=16),
        pattern=(DenseFeedForward(hidden=160),),
    )
    rows = {row.component: row for row in account(model, 128).rows}
    # query 64 x 64, key and value 64 x 32 each, out 64 x 64: 4096 + 2048 + 2048 + 4096 = 12288; QK-norm: 2 x 16.
    assert rows["attention"].parameters == 12288 + 32
    assert rows["attention"].flops_per_token == 2 * 12288
    # Scores: 2 products x 2 operations x 4 heads x 16 x 64 keys on average (128 / 2) = 16384.
    assert rows["attention_scores"].flops_per_token == 4 * 4 * 16 * 64 == 16384
    # gate, up and down: 3 x 64 x 160 = 30720.
    assert rows["feed_forward"][1:4] == (30720, 30720, 61440)
    # Two norms of the block and the final one: 3 x 64.
    assert rows["norms"].parameters == 192
    # The lookup reads one row and computes nothing; the head is 64 x 1000.
    assert rows["embedding"][1:4] == (64000, 64, 0)
    assert rows["head"][1:4] == (64000, 64000, 128000)
    lines = account(model, 128)
    assert lines.parameters == 12320 + 30720 + 192 + 64000 + 64000 == 171232
    assert lines.forward_flops == 24576 + 16384 + 61440 + 128000 == 230400
    assert lines.train_flops == 3 * 230400


def test_a_routed_layer_by_hand():
    """D 64, 8 experts of F 48, 2 a token, shared expert of 32, head tied to the embedding."""
    model = Model(
        vocab_size=1000,
        d_model=64,
        layers=1,
        attention=Attention(heads=4, head_dim=16, qk_norm=False),
        pattern=(MoEFeedForward(experts=8, hidden=48, shared_hidden=32, router=TopKRouter(k=2)),),
        tied_embeddings=True,
    )
    rows = {row.component: row for row in account(model, 128).rows}
    # One expert: 3 x 64 x 48 = 9216; 8 of them held, 2 active: 18432 parameters, 36864 operations.
    assert rows["experts"][1:4] == (73728, 18432, 36864)
    assert rows["router"][1:4] == (512, 512, 1024)  # 64 x 8
    assert rows["shared_expert"][1:4] == (6144, 6144, 12288)  # 3 x 64 x 32
    # A tied head adds no parameter; its product counts, and its matrix is active.
    assert rows["head"][1:4] == (0, 64000, 128000)
    assert rows["attention"].parameters == 4 * 64 * 64
    assert account(model, 128).parameters == 64000 + 16384 + 73728 + 512 + 6144 + 192


def test_a_memory_by_hand():
    """D 64, two orders of 2 heads, 8 wide each, so X = 16 and rows of 4; heads of 101, 103, 107 and 109 rows; 4 taps."""
    model = Model(d_model=64, layers=2, memory=Engram(at=(1,), heads=2, width=8, rows=100))
    rows = {row.component: row for row in account(model, 128).rows}
    # key and value 16 x 64 each; norms of key, hidden state and convolution input, and 4 taps: 7 x 64.
    assert rows["memory"].parameters == 2 * 1024 + 7 * 64
    # Two products, the score of the gate 2 x 64, the taps 2 x 4 x 64.
    assert rows["memory"].flops_per_token == 2 * 2 * 1024 + 128 + 512
    # 420 rows, held as 512; a token reads 4 of 4 numbers and computes nothing.
    assert rows["memory_rows"] == ("memory_rows", 512 * 4, 16, 0.0, 4 * 512 * 4)
    params = jax.eval_shape(define(model).initial_params, jax.random.key(0))
    assert account(model, 128).parameters == sum(leaf.size for leaf in jax.tree.leaves(params)) + 2048
    assert account(model, 128).parameters == define(model).parameters()


def test_keys_seen_by_a_query():
    assert mean_keys(1024, None) == 512
    assert mean_keys(1024, None, causal_half=False) == 1024
    # A window of 256 over 1024: 768 queries see 256 keys, the first 256 see 128 on average.
    assert mean_keys(1024, 256) == (768 * 256 + 256 * 128) / 1024
    assert mean_keys(1024, 4096) == 512


SHARED = MoEFeedForward(experts=4, hidden=16, shared_hidden=24)
BIASED = MoEFeedForward(experts=3, hidden=8, router=TopKRouter(k=1, bias_rate=0.1), activation="gelu")
CONFIGS = {
    "dense": tiny.model(),
    "scanned": tiny.model(execution="scanned", layers=3),
    "many key heads": tiny.model(attention=Attention(heads=2, head_dim=8)),
    "one key head": tiny.model(attention=Attention(heads=4, kv_heads=1, head_dim=4)),
    "heads wider than the model": tiny.model(attention=Attention(heads=4, kv_heads=2, head_dim=16)),
    "no qk norm": tiny.model(attention=Attention(heads=2, head_dim=8, qk_norm=False)),
    "tied": tiny.model(tied_embeddings=True),
    "gelu": tiny.model(DenseFeedForward(hidden=40, activation="gelu")),
    "routed": tiny.model(tiny.MOE),
    "routed and tied": tiny.model(tiny.MOE, tied_embeddings=True, execution="scanned"),
    "shared expert": tiny.model(SHARED),
    "biased router": tiny.model(BIASED),
    "leading": tiny.model(tiny.MOE, layers=4, leading=(tiny.DENSE,)),
    "pattern": tiny.model(layers=5, pattern=(tiny.DENSE, SHARED), leading=(BIASED,), execution="scanned"),
    "one layer": tiny.model(SHARED, layers=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_leaves_of_the_real_tree(name):
    definition = define(CONFIGS[name])
    params = jax.eval_shape(definition.initial_params, jax.random.key(0))
    leaves = sum(leaf.size for leaf in jax.tree.leaves(params))
    lines = account(CONFIGS[name], 32)
    assert lines.parameters == leaves == definition.parameters()
    assert all(row.bytes == 4 * row.parameters for row in lines.rows)


def equal_groups(x_AI, w_EIO, group_sizes_E):
    """The grouped product when every expert has as many rows: exactly the operations of the rows present."""
    return jnp.einsum("eai,eio->eao", x_AI.reshape(w_EIO.shape[0], -1, x_AI.shape[1]), w_EIO).reshape(x_AI.shape[0], -1)


BATCH, LENGTH = 4, 128
WIDE = {"vocab_size": 2048, "d_model": 256, "attention": Attention(heads=4, kv_heads=2, head_dim=64), "layers": 2}


@pytest.mark.parametrize(
    ("feed_forward", "backward"),
    [
        pytest.param(DenseFeedForward(hidden=1024), False, id="dense forward"),
        pytest.param(DenseFeedForward(hidden=1024), True, id="dense step"),
        pytest.param(MoEFeedForward(experts=4, hidden=512, shared_hidden=256), False, id="routed forward"),
    ],
)
def test_operations_are_those_that_xla_counts(feed_forward, backward, monkeypatch):
    """Unrolled, not chunked, nothing recomputed, attention counted in full; within 3%."""
    # XLA cannot count loops whose length depends on the routing, so the experts' products stand in as equal groups.
    monkeypatch.setattr(projection, "grouped_matmul", equal_groups)
    monkeypatch.setattr(RoutedExperts, "on_tokens", None)  # product by product
    model = Model(pattern=(feed_forward,), **WIDE)
    definition = define(model)
    params = jax.eval_shape(definition.initial_params, jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in tiny.full_batch(BATCH, length=LENGTH).items()}

    def objective(params, batch):
        return definition.objective(params, definition.initial_state(), batch, definition.units(batch), None)[0]

    function = jax.grad(objective) if backward else objective
    compiled = jax.jit(function, compiler_options=tiny.FAST_COMPILE).lower(params, batch).compile()
    cost = compiled.cost_analysis()
    counted = (cost[0] if isinstance(cost, list) else cost)["flops"] / (BATCH * LENGTH)
    lines = account(model, LENGTH, causal_half=False)
    assert counted == pytest.approx(lines.train_flops if backward else lines.forward_flops, rel=0.03)
