"""Learning in which order the inputs of a packed matrix meet its rows (after PA-DST, Tyagi et al. 2025, arXiv 2510.14812).

A block structure reaches fewer masks than one of single weights; a permutation of the inputs, learned beside the blocks, gives some
of them back. While it is soft, the inputs pass a doubly stochastic matrix, x M, trained by gradient. A penalty drives every row and
column of M to a single one (Lyu et al. 2020, AutoShuffleNet, arXiv 1901.08624): the sum over rows and columns of ||m||_1 - ||m||_2,
which is zero for permutations alone. A matrix whose penalty falls below a threshold, or that is still soft at a set share of the
run, is hardened: a greedy assignment becomes a list of inputs, x[..., p], and costs a gather from then on.

State: `soft` [K, K] is a parameter, since it is differentiated; `hard` (0 or 1) and `permutation` int32 [K] are model state. A hardened
`soft` is the permutation's matrix and stays it.

Legend: K inputs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.config import Config
from sparse_lm.parallel.rules import as_whole

STAYS = 0.5
"""Share of an input that at first stays in its place; the rest is spread over all by random numbers."""
ROUNDS = 5
"""Times that columns and rows are divided by their sums after a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffle(Config):
    """How permutations of the inputs are learned, in matrices whose projection says permutation = learned."""

    penalty: float = 0.1
    """Factor of the penalty in the objective."""
    threshold: float = 0.1
    """A matrix is hardened when its penalty, the mean over rows and columns, is below this; 0.3 is about one entry of 0.8 and the rest even."""
    end: float = 0.5
    """Share of the run after which every matrix is hardened."""
    every: int = 50
    """Steps between two looks at the thresholds."""

    def check(self) -> None:
        """See Config.check."""
        self.require(self.penalty >= 0.0, "penalty", "0 or above")
        self.require(self.threshold >= 0.0, "threshold", "0 or above")
        self.require(0.0 < self.end <= 1.0, "end", "a share of the run above 0, at most 1")
        self.require(self.every >= 1, "every", "at least 1")

    def last(self, steps: int) -> int:
        """Returns the number of the step in which all are hardened."""
        return min(round(self.end * steps), steps - 1)

    def due(self, step: jax.Array | int, steps: int) -> jax.Array | bool:
        """Says whether matrices may be hardened in this step."""
        last = self.last(steps)
        # Once more after the last, in case that step was not sound.
        return (step > 0) & ((step == last) | ((step <= last + self.every) & (step % self.every == 0)))


def first_soft(uniform_KK: jax.Array) -> jax.Array:
    """Returns the soft matrix of step 0 from numbers between 0 and 1."""
    size = uniform_KK.shape[-1]
    return doubly_stochastic(STAYS * jnp.eye(size) + (1.0 - STAYS) * 2.0 / size * uniform_KK)


def doubly_stochastic(soft_KK: jax.Array) -> jax.Array:
    """Returns [..., K, K] without negative entries, its rows and (in turn) columns divided by their sums (Sinkhorn and Knopp 1967).

    Columns come last: what an input of the blocks is made of sums to exactly one; rows sum to one nearly. A line without any positive
    entry becomes even.
    """

    def divided(m: jax.Array, axis: int) -> jax.Array:
        total = jnp.sum(m, axis=axis, keepdims=True)
        return jnp.where(total > 0.0, m / jnp.maximum(total, 1e-30), 1.0 / m.shape[-1])

    m = jnp.maximum(soft_KK, 0.0)
    for _ in range(ROUNDS):
        m = divided(divided(m, -1), -2)
    return m


def penalty(soft_KK: jax.Array) -> jax.Array:
    """Returns the mean over the 2 K rows and columns of ||m||_1 - ||m||_2, float32 [...]; 0 for permutations, 1 - K^-1/2 at most."""

    def lines(axis: int) -> jax.Array:
        return jnp.mean(jnp.sum(jnp.abs(soft_KK), axis) - jnp.sqrt(jnp.sum(jnp.square(soft_KK), axis)), axis=-1)

    return (lines(-1) + lines(-2)) / 2.0


def penalty_gradient(soft_KK: jax.Array) -> jax.Array:
    """Returns the gradient of `penalty` where no entry is negative: (2 - m / ||its row|| - m / ||its column||) / 2 K."""
    rows, columns = (jnp.sqrt(jnp.sum(jnp.square(soft_KK), axis, keepdims=True)) for axis in (-1, -2))
    each = 2.0 - soft_KK / jnp.maximum(rows, 1e-30) - soft_KK / jnp.maximum(columns, 1e-30)
    return each / (2 * soft_KK.shape[-1])


def assignment(soft_KK: jax.Array) -> jax.Array:
    """Returns a permutation by greedy choice, int32 [K]: the largest entry of all, then the largest of the other rows and columns, and so on.

    Entry k of the result is the row (input) chosen in column k (row of the blocks); among equal entries the first in row order is taken.
    Where M is nearly a permutation this is it; the best assignment of other matrices may have a larger sum.
    """
    size = soft_KK.shape[-1]

    def choose(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left_KK, order_K = state
        row, column = jnp.divmod(jnp.argmax(left_KK.reshape(-1)), size)
        left_KK = left_KK.at[row, :].set(-jnp.inf).at[:, column].set(-jnp.inf)
        return left_KK, order_K.at[column].set(row.astype(jnp.int32))

    return jax.lax.fori_loop(0, size, choose, (soft_KK, jnp.zeros(size, jnp.int32)))[1]


def permutation_matrix(order_K: jax.Array) -> jax.Array:
    """Returns M of [..., K, K] with x M = x[..., order], float32."""
    return jnp.swapaxes(jax.nn.one_hot(order_K, order_K.shape[-1]), -1, -2)


def harden(
    soft_KK: jax.Array, order_K: jax.Array, hard: jax.Array, now: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (soft, order, hard) of one matrix after a look at its threshold; one that is hard stays as it is.

    Args:
      soft_KK: doubly stochastic.
      order_K: its permutation, if it is hard.
      hard: float32, 1 or 0.
      now: whether it is hardened whatever its penalty.
      threshold: of the penalty.
    """
    ripe = (hard == 0.0) & (now | (penalty(soft_KK) < threshold))
    # Every choice looks at the whole matrix: gathered once, not searched in parts K times.
    whole_KK = as_whole(soft_KK)

    def choose() -> tuple[jax.Array, jax.Array, jax.Array]:
        order = assignment(whole_KK)
        return permutation_matrix(order), order, jnp.ones_like(hard)

    return jax.lax.cond(ripe, choose, lambda: (soft_KK, order_K, hard))


def after_step(before: jax.Array, moved: jax.Array, hard: jax.Array, finite: jax.Array) -> jax.Array:
    """Returns the soft matrices [..., K, K] after an optimizer's step: doubly stochastic again, or as they were where nothing may change."""
    return jnp.where((finite & (hard == 0.0))[..., None, None], doubly_stochastic(moved), before)
