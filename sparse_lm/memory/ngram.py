"""What all n-gram memories share: hashed addresses into tables of rows.

Legend: B batch, L length, H heads of all orders, X width of what is looked up for a token.
"""

import concurrent.futures
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from sparse_lm.config import ConfigError, component
from sparse_lm.memory.compression import TokenClasses, uncompressed
from sparse_lm.memory.hashing import Hash, addresses, addresses_on_host, distinct_primes, make_hash
from sparse_lm.memory.memory import History, Memory
from sparse_lm.memory.placement import OnDevice, Placement
from sparse_lm.memory.row_optimizer import RowOptimizer, TouchAdam
from sparse_lm.memory.table import TableSpec

SHARED = "shared"
"""Name of a table that all layers read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramMemory(Memory):
    """Base of the n-gram memories."""

    at: tuple[int, ...] = (1,)
    """Blocks, counted from 0, before whose attention a memory layer stands."""
    orders: tuple[int, ...] = (2, 3)
    """Lengths of the n-grams that are looked up; 1 is the token alone."""
    heads: int = 8
    """Rows looked up for each n-gram, under different hashes."""
    width: int = 512
    """Width of what each order looks up; a row has width / heads numbers."""
    rows: int = 646_400
    """Rows of each head, at least: the next unused primes are taken."""
    shared: bool = False
    """Whether all layers read one table, looked up once; otherwise each has its own."""
    compression: Literal["text", "none"] = "text"
    """What n-grams are made of: classes of tokens that read the same, or token ids."""
    addressing: Literal["ngram", "shuffled"] = "ngram"
    """shuffled mixes the position into the hash: as many rows and operations, but a row no longer belongs to an n-gram. A control."""
    dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    """Dtype of the rows; slots and updates are float32. float8: a power-of-two scale for each 32 numbers, stochastic rounding."""
    deviation: float = 0.0
    """Standard deviation of the initial rows. Zero: an n-gram never seen in training adds nothing."""
    seed: int = 0
    """Seed of the hash's multipliers."""
    optimizer: RowOptimizer = component("row_optimizer", TouchAdam())
    """How rows are updated."""
    placement: Placement = component("placement", OnDevice())
    """Where rows and their slots live."""

    def check(self) -> None:
        """See Config.check."""
        rising = all(a < b for a, b in zip(self.at, self.at[1:]))
        self.require(bool(self.at) and self.at[0] >= 0 and rising, "at", "ascending block numbers, at least one")
        rising = all(a < b for a, b in zip(self.orders, self.orders[1:]))
        self.require(bool(self.orders) and self.orders[0] >= 1 and rising, "orders", "ascending lengths from 1")
        self.require(self.orders[-1] <= 16, "orders", "lengths of at most 16")
        self.require(self.heads >= 1, "heads", "at least 1")
        self.require(self.width >= 1 and self.width % self.heads == 0, "width", f"a multiple of heads ({self.heads})")
        if self.dtype == "float8" and self.width // self.heads % 4:
            raise ConfigError("width", self.width, f"a multiple of 4 * heads ({4 * self.heads}) for rows of float8")
        self.require(self.rows >= 2, "rows", "at least 2")
        self.require(self.deviation >= 0, "deviation", "0 or above")
        self.require(self.seed >= 0, "seed", "0 or above")
        most = 2**31 // (len(self.orders) * self.heads)
        if self.rows > 0.99 * most:
            raise ConfigError("rows", self.rows, f"below {int(0.99 * most)}: a table's rows are counted in 31 bits")

    @property
    def blocks(self) -> tuple[int, ...]:
        """See Memory.blocks."""
        return self.at

    @property
    def compressed(self) -> bool:
        """See Memory.compressed."""
        return self.compression == "text"

    def table_of(self, block: int) -> str:
        """See Memory.table_of."""
        return SHARED if self.shared else str(block)

    @property
    def looked_up(self) -> int:
        """Width X of what is looked up for a token."""
        return len(self.orders) * self.width

    def tables(self) -> dict[str, TableSpec]:
        """See Memory.tables."""
        names = list(dict.fromkeys(self.table_of(block) for block in self.at))
        primes = distinct_primes(len(names), len(self.orders), self.heads, self.rows)
        dtype = jnp.dtype(jnp.float8_e4m3fn if self.dtype == "float8" else self.dtype)
        width = self.width // self.heads
        return {name: TableSpec(own, width, dtype, self.optimizer, self.deviation) for name, own in zip(names, primes)}

    def hashes(self, vocab_size: int, classes: TokenClasses | None) -> dict[str, Hash]:
        """See Memory.hashes."""
        if classes is None or self.compression == "none":
            classes = uncompressed(vocab_size)
        layers = {self.table_of(block): block for block in reversed(self.at)}
        return {
            name: make_hash(classes, self.seed, layers[name], self.orders, spec.primes)
            for name, spec in self.tables().items()
        }

    def addresses(
        self, hashes: dict[str, Hash], tokens_BL: Any, segments_BL: Any, positions_BL: Any, history: History | None
    ) -> dict[str, Any]:
        """See Memory.addresses."""
        before = None if history is None else (history.tokens_BW, history.segments_BW)
        salt_BL = positions_BL if self.addressing == "shuffled" else None
        out = {}
        for name, spec in self.tables().items():
            bits = max(spec.primes).bit_length()
            found = addresses(hashes[name], self.orders, tokens_BL, segments_BL, before, salt_BL, bits=bits)
            out[name] = jnp.where(segments_BL[..., None] > 0, found, spec.rows)
        return out

    def addresses_on_host(
        self,
        hashes: dict[str, Hash],
        tokens_BL: np.ndarray,
        segments_BL: np.ndarray,
        positions_BL: np.ndarray,
        *,
        threads: concurrent.futures.ThreadPoolExecutor | None = None,
    ) -> dict[str, np.ndarray]:
        """See Memory.addresses_on_host."""
        salt_BL = positions_BL if self.addressing == "shuffled" else None
        out = {}
        for name, spec in self.tables().items():
            arrays = hashes[name], self.orders, tokens_BL, segments_BL
            found = addresses_on_host(*arrays, salt_BL=salt_BL, threads=threads)
            out[name] = np.where(segments_BL[..., None] > 0, found, np.int32(spec.rows))
        return out

    @property
    def history_length(self) -> int:
        """See Memory.history_length."""
        return max(1, self.orders[-1] - 1)
