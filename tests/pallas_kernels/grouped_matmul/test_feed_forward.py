"""The routed feed-forward: values and gradients against a dense float32 computation, what it stores, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import jax_version
from pallas_kernels.grouped_matmul import grouped_feed_forward

T, D, F, E, S = 24, 8, 12, 4, 3


def plan(seed, tokens=T, experts=E, per_token=S, missing=True):
    """Each token picks distinct experts; with `missing`, some assignments are absent. Returns sizes, token_A, row_TS."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(experts)[:per_token] for _ in range(tokens)])
    present = rng.random((tokens, per_token)) < 0.8 if missing else np.ones((tokens, per_token), bool)
    rows = tokens * per_token
    key = np.where(present, chosen, experts).reshape(-1)
    order = np.argsort(key, kind="stable")
    row_TS = np.empty(rows, np.int32)
    row_TS[order] = np.arange(rows)
    row_TS = np.where(present, row_TS.reshape(tokens, per_token), rows)
    sizes = np.bincount(key, minlength=experts + 1)[:experts]
    token_A = np.where(np.arange(rows) < sizes.sum(), order // per_token, tokens + 7)  # rows of no group point nowhere
    return (jnp.asarray(a, jnp.int32) for a in (sizes, token_A, row_TS)), chosen, present


def operands(seed, dtype=jnp.float32, tokens=T, model=D, ffn=F, experts=E, per_token=S):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = (tokens, model), (experts, model, ffn), (experts, model, ffn), (experts, ffn, model)
    arrays = [0.4 * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
    return (*arrays, jax.random.uniform(keys[4], (tokens, per_token)))


def dense(x, gate, up, down, weight_TS, chosen, present):
    """Every expert on every token, in the dtype of x."""
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    y_TED = jnp.einsum("tef,efd->ted", h, down)
    y_TSD = jnp.take_along_axis(y_TED, jnp.asarray(chosen)[..., None], axis=1)
    return jnp.einsum("ts,tsd->td", jnp.where(present, weight_TS, 0), y_TSD)


@pytest.mark.parametrize("backend", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
def test_values_and_gradients_equal_the_dense_computation(backend):
    (sizes, token_A, row_TS), chosen, present = plan(0)
    arguments = operands(0)

    def ours(*a):
        y = grouped_feed_forward(*a[:4], sizes, token_A, row_TS, a[4], backend=backend, precision="highest")
        return jnp.sum(jnp.sin(y)), y

    def wanted(*a):
        y = dense(*a, chosen, present)
        return jnp.sum(jnp.sin(y)), y

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.value_and_grad(ours, argnums=range(5), has_aux=True))(*arguments)
        expected = jax.jit(jax.value_and_grad(wanted, argnums=range(5), has_aux=True))(*arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def test_a_token_without_assignments_gets_zero_and_no_gradient():
    (sizes, token_A, row_TS), _, _ = plan(1, missing=False)
    row_TS = row_TS.at[5].set(T * S)
    x, gate, up, down, weight = operands(1)
    f = jax.jit(lambda x: grouped_feed_forward(x, gate, up, down, sizes, token_A, row_TS, weight))
    y, vjp = jax.vjp(f, x)
    assert not np.asarray(y[5]).any()
    assert not np.asarray(vjp(jnp.ones_like(y))[0][5]).any()


def shapes(tokens, model, ffn, experts, per_token, dtype=jnp.bfloat16):
    """x, weights, router weights and plan as shapes."""
    struct, rows = jax.ShapeDtypeStruct, tokens * per_token
    weights = [struct((experts, *s), dtype) for s in ((model, ffn), (model, ffn), (ffn, model))]
    plan_ = [struct(s, jnp.int32) for s in ((experts,), (rows,), (tokens, per_token))]
    return struct((tokens, model), dtype), *weights, struct((tokens, per_token), jnp.float32), *plan_


def residual_bytes(*sizes):
    """Bytes kept from the forward to the backward pass, weights excluded."""

    def residuals(x, gate, up, down, weight, *plan):
        def f(*a):
            return grouped_feed_forward(*a[:4], *plan, a[4])

        return jax.vjp(f, x, gate, up, down, weight)[1]

    arguments = shapes(*sizes)
    stored = jax.tree.leaves(jax.eval_shape(residuals, *arguments))
    weights = [w.shape for w in arguments[1:4]]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in stored if leaf.shape not in weights)


def test_stored_activations_do_not_grow_with_the_number_of_experts():
    tokens, model, active = 64, 128, 512
    # The least a dense SwiGLU of the same active size stores: its input, the gate and the up product, in bfloat16.
    dense_bytes = 2 * tokens * (model + 2 * active)
    for experts, per_token in ((4, 2), (16, 8)):
        assert residual_bytes(tokens, model, active // per_token, experts, per_token) <= 1.1 * dense_bytes


@pytest.mark.slow
def test_vmap_equals_a_loop():
    plans = [plan(seed)[0] for seed in (3, 4)]
    sizes, token_A, row_TS = (jnp.stack(a) for a in zip(*plans, strict=True))
    members = [operands(seed) for seed in (3, 4)]
    x, gate, up, down, weight = (jnp.stack(a) for a in zip(*members, strict=True))

    def loss(x, gate, up, down, weight, *plan):
        return jnp.sum(jnp.sin(grouped_feed_forward(x, gate, up, down, *plan, weight)))

    grad = jax.grad(loss, argnums=range(5))
    found = jax.jit(jax.vmap(grad))(x, gate, up, down, weight, sizes, token_A, row_TS)
    one = jax.jit(grad)
    for p in range(2):
        expected = one(*(a[p] for a in (x, gate, up, down, weight, sizes, token_A, row_TS)))
        jax.tree.map(lambda a, b, p=p: np.testing.assert_allclose(a[p], b, rtol=1e-5, atol=1e-5), found, expected)


def scalar_loss(backend):
    def loss(x, gate, up, down, weight, *plan):
        y = grouped_feed_forward(x, gate, up, down, *plan, weight, backend=backend)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(loss, argnums=range(5)))


@pytest.mark.slow
@pytest.mark.skipif(jax_version() < (0, 11, 0), reason="the Hopper kernels need JAX 0.11")
def test_a_training_step_lowers_for_cuda():
    traced = scalar_loss("mosaic_gpu").trace(*shapes(256, 256, 128, 4, 2))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 7  # swiglu, down; dx of down, of gate and up together; three weight gradients


@pytest.mark.gpu
def test_on_the_device_values_and_gradients_equal_the_xla_path_and_repeat_to_the_bit():
    tokens, experts, per_token = 512, 8, 4
    plan_, _, _ = plan(7, tokens, experts, per_token)
    plan_ = tuple(plan_)
    arguments = operands(7, jnp.bfloat16, tokens, 256, 128, experts, per_token)
    arguments = (*arguments[:4], arguments[4], *plan_)
    found, again = (scalar_loss(None)(*arguments) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    expected = scalar_loss("xla")(*arguments)
    for a, b in zip(jax.tree.leaves(found)[1:], jax.tree.leaves(expected)[1:], strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # Three roundings to bfloat16 (h, y, dh) lie between the inputs and a gradient: 2 ** -9 * sqrt(3) and the sine's slope.
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)


CHANGES = [
    ("x_TD", {"x_TD": jnp.ones((2, 3, 8))}),
    ("up_EDF", {"up_EDF": jnp.ones((4, 8, 5))}),
    ("down_EFD", {"down_EFD": jnp.ones((4, 8, 12))}),
    ("group_sizes_E", {"group_sizes_E": jnp.ones((3,), jnp.int32)}),
    ("token_A", {"token_A": jnp.ones((4,))}),
    ("row_TS", {"row_TS": jnp.ones((3, 2), jnp.int32)}),
    ("weight_TS", {"weight_TS": jnp.ones((24, 2))}),
    ("group_sizes_E", {"group_sizes_E": jnp.array([70, 3, 0, 0], jnp.int32)}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_mistakes_are_named(name, change):
    (sizes, token_A, row_TS), _, _ = plan(0)
    names = ("x_TD", "gate_EDF", "up_EDF", "down_EFD", "weight_TS")
    arguments = dict(zip(names, operands(0), strict=True))
    arguments |= {"group_sizes_E": sizes, "token_A": token_A, "row_TS": row_TS} | change
    with pytest.raises(ValueError, match=name):
        grouped_feed_forward(**arguments, check=True)
