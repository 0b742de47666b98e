"""Parametrizations: hand-worked scales, and coordinate checks over width and density on a toy network."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config
from sparse_lm.layers.parametrization import (
    MuP,
    Parametrization,
    PathDensity,
    SparseMuP,
    Standard,
    initial_scales,
    learning_rate_scales,
    residual_writes,
)
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.train.adafactor import Adafactor
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW, Optimizer

# Three layers of D = 1024, heads 1024, ffn 4096, 8 experts; stacked.
DIMS = {
    "embedding": {"weight": ("vocab", "embed")},
    "blocks": {
        "norm": ("layers", "embed"),
        "query": ("layers", "embed", "heads"),
        "output": ("layers", "heads", "embed"),
        "router": ("layers", "embed", "routes"),
        "up": ("layers", "experts", "embed", "ffn"),
        "down": ("layers", "experts", "ffn", "embed"),
    },
    "head": {"weight": ("embed", "vocab")},
}
SHAPES = {
    "embedding": {"weight": (500, 1024)},
    "blocks": {
        "norm": (3, 1024),
        "query": (3, 1024, 1024),
        "output": (3, 1024, 1024),
        "router": (3, 1024, 8),
        "up": (3, 8, 1024, 4096),
        "down": (3, 8, 4096, 1024),
    },
    "head": {"weight": (1024, 500)},
}


def test_standard_by_hand() -> None:
    assert residual_writes(DIMS, SHAPES) == 6  # output and down in each of 3 layers; the 8 experts count once
    scales = flatten(initial_scales(Standard(embedding_std=0.03, gain=2.0, head_gain=0.5), DIMS, SHAPES))
    assert scales == pytest.approx(
        {
            "embedding.weight": 0.03,
            "blocks.norm": 0.0,
            "blocks.query": 2 / 32,  # sqrt(1024) = 32
            "blocks.output": 2 / 32 / math.sqrt(6),
            "blocks.router": 2 / 32,
            "blocks.up": 2 / 32,
            "blocks.down": 2 / 64 / math.sqrt(6),  # sqrt(4096) = 64
            "head.weight": 0.5 / 32,
        }
    )
    assert set(flatten(learning_rate_scales(Standard(), AdamW(), DIMS, SHAPES)).values()) == {1.0}
    assert Standard().logits_multiplier(1024) == 1.0
    assert Standard().attention_scale(64) == 0.125
    unscaled = flatten(initial_scales(Standard(scale_residual=False), DIMS, SHAPES))
    assert unscaled["blocks.down"] == 1 / 64


def test_mup_by_hand() -> None:
    mup = MuP(base_width=256, base_head_dim=64)  # m = 1024 / 256 = 4
    scales = flatten(initial_scales(mup, DIMS, SHAPES))
    assert scales["blocks.query"] == 1 / 32
    assert scales["blocks.down"] == pytest.approx(1 / 64 / math.sqrt(6))
    assert scales["blocks.router"] == 1 / 32 / 2  # falls as 1 / width: 1 / 16 at the base, a quarter of it at m = 4
    assert scales["head.weight"] == 1 / 16  # stays what it is at D = 256; the logits are divided instead
    assert mup.logits_multiplier(1024) == 0.25
    assert mup.attention_scale(64) == 0.125
    assert mup.attention_scale(128) == 0.0625  # 8 / 128: as 1 / head_dim
    one = {"embedding.weight": 1.0, "blocks.norm": 1.0, "head.weight": 1.0}
    matrices = ("blocks.query", "blocks.output", "blocks.up", "blocks.down")
    for optimizer, matrix, router in (
        (AdamW(), 1 / 4, 1 / 4),
        (Muon(update_scale="adam_rms"), 1 / 2, 1 / 4),
        (Muon(update_scale="spectral"), 1.0, 1 / 4),
        (Adafactor(), 1 / 2, 1.0),
        (Adafactor(scale_by_parameter=False), 1 / 4, 1 / 4),
    ):
        found = flatten(learning_rate_scales(mup, optimizer, DIMS, SHAPES))
        assert found == {**one, **dict.fromkeys(matrices, matrix), "blocks.router": router}, optimizer


def test_mup_equals_standard_at_the_base_width() -> None:
    base = MuP(base_width=1024, base_head_dim=64)
    assert initial_scales(base, DIMS, SHAPES) == initial_scales(Standard(), DIMS, SHAPES)
    assert base.attention_scale(64) == Standard().attention_scale(64)
    for optimizer in (AdamW(), Muon(), Adafactor()):
        assert set(flatten(learning_rate_scales(base, optimizer, DIMS, SHAPES)).values()) == {1.0}


def test_sparse_mup_by_hand() -> None:
    sparse = SparseMuP(
        base_width=256, densities=(PathDensity(path="*.up", density=1 / 16), PathDensity(path="*", density=1.0))
    )
    scales = flatten(initial_scales(sparse, DIMS, SHAPES))
    assert scales["blocks.up"] == pytest.approx(1 / 8)  # 1024 / 16 = 64 inputs are left: 1 / sqrt(64)
    assert scales["blocks.query"] == 1 / 32
    rates = flatten(learning_rate_scales(sparse, AdamW(), DIMS, SHAPES))
    assert rates["blocks.up"] == 4.0  # 1 / (m * density) = 1 / (4 / 16)
    assert rates["blocks.query"] == 0.25
    with pytest.raises(ValueError, match=r"blocks\.up: sparse_mup at density 0\.0625 with muon_adam_rms updates"):
        learning_rate_scales(sparse, Muon(), DIMS, SHAPES)
    misnamed = SparseMuP(densities=(PathDensity(path="blocks.1.up", density=0.5),))
    with pytest.raises(config.ConfigError, match=r"densities\.0\.path = 'blocks\.1\.up'.*embedding\.weight"):
        initial_scales(misnamed, DIMS, SHAPES)


def test_finite_inputs_do_not_grow_and_unknown_growth_is_refused() -> None:
    mup = MuP(base_width=16)
    assert mup.learning_rate_scale("w", ("rank", "ffn"), (8, 512), "adam") == 1.0
    with pytest.raises(ValueError, match=r"w with dims \('ffn', 'rank'\): its growth with the width is unknown"):
        mup.learning_rate_scale("w", ("ffn", "rank"), (512, 8), "adam")


@pytest.mark.parametrize(
    ("parametrization", "field"),
    [
        (Standard(embedding_std=-1.0), "embedding_std"),
        (MuP(base_width=0), "base_width"),
        (MuP(base_head_dim=0), "base_head_dim"),
        (SparseMuP(densities=(PathDensity(path="*", density=0.0),)), "densities.0.density"),
    ],
)
def test_impossible_values_name_their_field(parametrization: Parametrization, field: str) -> None:
    with pytest.raises(config.ConfigError, match=f"^{field} = "):
        config.validate(parametrization)


@pytest.mark.parametrize(
    "parametrization", [Standard(), MuP(), SparseMuP(densities=(PathDensity(path="*.up", density=0.1),))]
)
def test_config_reads_back_equal(parametrization: Parametrization) -> None:
    config.validate(parametrization)
    data = config.to_dict(parametrization, "parametrization")
    assert config.from_dict(type(parametrization), data) == parametrization


TOY_DIMS = {
    "embedding": ("vocab", "embed"),
    "up": ("embed", "ffn"),
    "middle": ("ffn", "embed"),
    "head": ("embed", "vocab"),
}
V, STEPS = 16, 3


def movement(
    parametrization: Parametrization, optimizer: Optimizer, width: int, rate: float, density: float = 1.0
) -> np.ndarray:
    """Trains a toy MLP on next-token pairs; returns the root mean square change of its ffn, its output and its logits.

    tokens -> embedding -> up -> relu -> middle (-> added to the embedding) -> head, masked to a random density inside.
    """
    shapes = {"embedding": (V, width), "up": (width, 2 * width), "middle": (2 * width, width), "head": (width, V)}
    stds = initial_scales(parametrization, TOY_DIMS, shapes)
    generator = np.random.default_rng(0)
    params = {name: (stds[name] * generator.normal(size=shapes[name])).astype(np.float32) for name in shapes}
    masks = {name: (generator.random(shapes[name]) < density).astype(np.float32) for name in ("up", "middle")}
    labels = generator.permutation(V)
    transformation = optimizer.build(TOY_DIMS, learning_rate_scales(parametrization, optimizer, TOY_DIMS, shapes))

    def forward(params: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        ffn = params["embedding"] @ (params["up"] * masks["up"])
        out = params["embedding"] + jax.nn.relu(ffn) @ (params["middle"] * masks["middle"])
        return ffn, out, parametrization.logits_multiplier(width) * out @ params["head"]

    def loss(params: dict) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(forward(params)[2])[jnp.arange(V), labels])

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def change(params: dict) -> list[jax.Array]:
        def step(_: int, carry: tuple[dict, dict]) -> tuple[dict, dict]:
            params, state = carry
            updates, state = transformation.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(lambda weight, update: weight - rate * update, params, updates), state

        first = params
        params, _ = jax.lax.fori_loop(0, STEPS, step, (params, transformation.init(params)))
        pairs = zip(forward(params), forward(first), strict=True)
        return [jnp.sqrt(jnp.mean(jnp.square(new - old))) for new, old in pairs]

    return np.asarray(change(params))


ADAM = AdamW(weight_decay=0.0, epsilon=1e-12)
SPECTRAL = Muon(weight_decay=0.0, update_scale="spectral", epsilon=1e-12, precision="float32", adam_multiplier=0.1)
RMS = Muon(weight_decay=0.0, epsilon=1e-12, precision="float32")


@pytest.mark.parametrize(
    ("optimizer", "rate", "widths"),
    [
        (ADAM, 2e-3, (256, 1024)),
        pytest.param(RMS, 4e-3, (256,), marks=pytest.mark.slow),
        pytest.param(SPECTRAL, 2e-2, (256,), marks=pytest.mark.slow),
    ],
)
def test_coordinate_check_over_width(optimizer: Optimizer, rate: float, widths: tuple[int, ...]) -> None:
    """Under muP three updates move every activation by a size that does not depend on the width; under Standard it grows."""
    mup = MuP(base_width=64, embedding_std=1.0)
    standard = Standard(embedding_std=1.0)
    narrow = movement(mup, optimizer, 64, rate)
    for width in widths:
        growth = movement(mup, optimizer, width, rate) / narrow
        assert np.all((growth > 0.8) & (growth < 1.25)), (width, growth)
    # Standard is the same at the base width; beyond it the logits' movement grows at least as the root of the width.
    assert (movement(standard, optimizer, widths[-1], rate) / narrow)[-1] > math.sqrt(widths[-1] / 64)


def test_coordinate_check_over_density() -> None:
    """Under sparse muP activations move alike at density 1 and 1/16; under muP alone the sparse ones lag."""
    entries = tuple(PathDensity(path=name, density=1 / 16) for name in ("up", "middle"))
    dense = movement(MuP(base_width=64, embedding_std=1.0), ADAM, 512, 2e-3)
    corrected = movement(SparseMuP(base_width=64, embedding_std=1.0, densities=entries), ADAM, 512, 2e-3, 1 / 16)
    uncorrected = movement(MuP(base_width=64, embedding_std=1.0), ADAM, 512, 2e-3, 1 / 16)
    change = corrected / dense
    assert np.all((change > 0.8) & (change < 1.4)), change
    assert (uncorrected / dense)[0] < 1 / 3
