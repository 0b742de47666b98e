"""The model: a decoder-only transformer, who calls whom.

tokens -> embedding -> blocks (stacked runs are scanned, others unrolled) -> final norm -> hidden states.
The head is applied by the loss (model/loss.py), in chunks.

Legend: B batch, L length, D model, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import Config, ConfigError, component
from sparse_lm.layers.feed_forward import Aux, DenseFeedForward, FeedForward, TokenInfo, no_aux
from sparse_lm.layers.norm import RMSNorm
from sparse_lm.layers.parameter import RUN_KEY, declare
from sparse_lm.layers.parametrization import Parametrization, Standard
from sparse_lm.memory.memory import History, Memory, NoMemory, remember
from sparse_lm.model.attention import Attention, Cache, rotary_angles
from sparse_lm.model.block import Block
from sparse_lm.model.depth import Depth, FullDepth
from sparse_lm.model.embedding import lookup
from sparse_lm.parallel.rules import as_tokens
from sparse_lm.routing.exchange import PLAN, ROWS

SavedName = Literal["query", "key", "value", "attention", "gate", "up", "router_plan"]
SAVED_NAMES: tuple[SavedName, ...] = ("query", "key", "value", "attention", "gate", "up", "router_plan")
"""Names of intermediate values that remat can keep."""
MEMORY = "memory."
"""Prefix of a memory layer's name among the reports of the blocks."""
NEVER_REPEATED = (PLAN, ROWS)
"""Names that every kind of remat keeps: a router's choice and rows that came from other shards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Config):
    """A decoder-only transformer."""

    vocab_size: int = 8192
    """Rows of the embedding; at least the tokenizer's vocabulary. Multiples of 128 are fast."""
    d_model: int = 256
    """Size D of the residual stream."""
    layers: int = 4
    """Number of blocks."""
    attention: Attention = Attention()
    """Self-attention of every block."""
    leading: tuple[FeedForward, ...] = component("feed_forward", ())
    """Feed-forwards of the first blocks, before the pattern starts."""
    pattern: tuple[FeedForward, ...] = component("feed_forward", (DenseFeedForward(),))
    """Feed-forwards of the remaining blocks, repeated in this order."""
    depth: Depth = component("depth", FullDepth())
    """Which tokens pass through which blocks."""
    memory: Memory = component("memory", NoMemory())
    """Tables addressed by n-grams, and where their rows are added."""
    tied_embeddings: bool = False
    """Use the embedding as output head."""
    logit_softcap: float | None = None
    """Cap c of c * tanh(logits / c) (Gemma 2, arXiv 2408.00118, section 2); None: no cap."""
    z_coefficient: float = 0.0
    """Weight of the output z-loss."""
    norm_epsilon: float = 1e-6
    """Epsilon of every RMS norm."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products; parameters are float32."""
    execution: Literal["scanned", "unrolled"] = "unrolled"
    """Runs of equal blocks: scanned compiles in constant time, unrolled runs faster."""
    remat: Literal["none", "names", "block"] = "none"
    """What the backward pass recomputes: nothing, all but `saved_names`, or all of each block; a router's choice and rows exchanged between experts are always kept."""
    saved_names: tuple[SavedName, ...] = SAVED_NAMES
    """Values kept when remat = names."""
    parametrization: Parametrization = component("parametrization", Standard())
    """Initial scales and learning-rate multipliers by path."""

    def check(self) -> None:
        """See Config.check."""
        for name in ("vocab_size", "d_model", "layers"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(len(self.pattern) >= 1, "pattern", "at least one feed-forward")
        self.require(
            len(self.leading) <= self.layers, "leading", f"at most as many feed-forwards as layers ({self.layers})"
        )
        if self.memory.blocks and max(self.memory.blocks) >= self.layers:
            raise ConfigError("memory.at", self.memory.blocks, f"blocks below layers ({self.layers})")
        self.require(self.logit_softcap is None or self.logit_softcap > 0, "logit_softcap", "None or above 0")
        self.require(self.z_coefficient >= 0, "z_coefficient", "0 or above")
        self.require(0 < self.norm_epsilon < 1, "norm_epsilon", "between 0 and 1")
        if self.remat == "names" and not self.saved_names:
            raise ConfigError(
                "saved_names", self.saved_names, f"at least one of {', '.join(SAVED_NAMES)} (or remat = block)"
            )
        first = self.group_sequences()
        for field in ("leading", "pattern"):
            for i, forward in enumerate(getattr(self, field)):
                size = getattr(forward, "group_sequences", first)
                if size != first:
                    raise ConfigError(f"{field}.{i}.group_sequences", size, f"{first}, as in the other routed layers")

        routed = any(self.depth.router_of(layer) for layer in range(self.layers))
        if routed and first != 1:
            raise ConfigError(
                "depth", type(self.depth).__name__, "FullDepth where routing groups have several sequences"
            )

    def feed_forward_of(self, layer: int) -> FeedForward:
        """Returns the feed-forward of one block."""
        if layer < len(self.leading):
            return self.leading[layer]
        return self.pattern[(layer - len(self.leading)) % len(self.pattern)]

    def runs(self) -> list[tuple[str, FeedForward]]:
        """Returns (name, feed-forward) of each run of blocks as held in memory: "3", or "0_to_5" for a stacked run."""
        # A memory layer stands before a block, so a run begins there.
        memories = [sum(block <= layer for block in self.memory.blocks) for layer in range(self.layers)]
        blocks = [(self.feed_forward_of(n), self.depth.router_of(n), memories[n]) for n in range(self.layers)]
        if self.execution == "unrolled":
            return [(str(layer), feed_forward) for layer, (feed_forward, *_) in enumerate(blocks)]
        runs, first = [], 0
        for (feed_forward, *_), members in itertools.groupby(blocks):
            size = len(list(members))
            runs.append((str(first) if size == 1 else f"{first}_to_{first + size - 1}", feed_forward))
            first += size
        return runs

    def group_sequences(self) -> int:
        """Sequences in one routing group, the same in every routed layer; 1 without routed layers."""
        sizes = [getattr(forward, "group_sequences", None) for forward in (*self.leading, *self.pattern)]
        return next((size for size in sizes if size is not None), 1)

    @property
    def dtype(self) -> Any:
        """The compute dtype."""
        return jnp.dtype(self.compute_dtype)


class Transformer(nnx.Module):
    """Maps tokens to final hidden states."""

    def __init__(self, config: Model):
        self.config = config
        vocabulary, d_model, epsilon = config.vocab_size, config.d_model, config.norm_epsilon
        scale = config.parametrization.attention_scale(config.attention.head_dim)
        self.embedding = declare((vocabulary, d_model), ("vocab", "embed"))
        self.blocks = nnx.Dict(
            {
                name: Block(
                    config.attention, forward, d_model, scale, epsilon, config.depth.router_of(first_block(name))
                )
                for name, forward in config.runs()
            }
        )
        self.memory = nnx.Dict(
            {str(block): config.memory.build(block, d_model, epsilon) for block in config.memory.blocks}
        )
        self.final_norm = RMSNorm(d_model, epsilon=epsilon)
        self.head = None if config.tied_embeddings else declare((d_model, vocabulary), ("embed", "vocab"))

    def head_weight(self) -> jax.Array:
        """Returns the output head, float32 [D, V]."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def __call__(
        self, info: TokenInfo, cache: dict[str, Any] | None = None, rows: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, Aux, dict[str, Any] | None]:
        """Computes final hidden states.

        Args:
          info: tokens with positions and segments, [B, L]; its replay holds one entry for each run of blocks.
          cache: keys and values by run and the memory's history, from `empty_cache`; None in training.
          rows: what the memory's tables hold for these tokens, {table: [B, L, X]}.

        Returns:
          (hidden states [B, L, D] in the compute dtype, Aux, the updated cache).
        """
        config = self.config
        x_BLD = lookup(self.embedding[...], info.tokens_BL, config.dtype)
        angles = rotary_angles(info.positions_BL, config.attention.head_dim, config.attention.rope_theta)
        reports: dict[str, Aux] = {}
        caches: dict[str, Any] = {}
        history = cache["memory"] if cache is not None and config.memory.blocks else None
        values: dict[str, jax.Array] = {}
        for name, block in self.blocks.items():
            if (first := str(first_block(name))) in self.memory:
                x_BLD, remembered = self._recall(first, x_BLD, info, (rows or {}), history)
                reports[MEMORY + first], values[first] = remembered
            graph, state = nnx.split(block)

            def apply(state: Any, x_BLD: jax.Array, layer: Any, cache: Any, replay: Any, graph: Any = graph) -> Any:
                key = None if info.key is None else jax.random.fold_in(info.key, layer)
                return nnx.merge(graph, state)(x_BLD, info._replace(key=key, replay=replay), angles, cache)

            apply = _with_remat(apply, config)
            run_cache = cache[name] if cache is not None else None
            replay = info.replay.get(name) if info.replay is not None else None
            if match := RUN_KEY.match(name):

                def body(x_BLD: jax.Array, layer: Any, apply: Callable = apply) -> Any:
                    own, *rest = layer
                    x_BLD, aux, layer_cache = apply(own, x_BLD, *rest)
                    return x_BLD, (aux, layer_cache)

                layers = jnp.arange(int(match[1]), int(match[2]) + 1)
                x_BLD, (aux, run_cache) = jax.lax.scan(body, x_BLD, (state, layers, run_cache, replay))
            else:
                x_BLD, aux, run_cache = apply(state, x_BLD, jnp.asarray(int(name)), run_cache, replay)
            reports[name] = aux
            if cache is not None:
                caches[name] = run_cache
        if history is not None:
            caches["memory"] = _remembered(history, info, values)
        return self.final_norm(x_BLD), _merge_reports(reports), caches if cache is not None else None

    def _recall(
        self, block: str, x_BLD: jax.Array, info: TokenInfo, rows: dict[str, jax.Array], history: History | None
    ) -> tuple[jax.Array, tuple[Aux, jax.Array]]:
        """Returns (x with what the memory layer before a block adds, (its report, what its convolution looks back on))."""
        graph, state = nnx.split(self.memory[block])
        past = None if history is None else (history.values[block], history.segments_BW)

        def apply(state: Any, x_BLD: jax.Array, rows_BLX: jax.Array) -> Any:
            return nnx.merge(graph, state)(x_BLD, rows_BLX, info.segments_BL, past)

        table = self.config.memory.table_of(int(block))
        delta_BLD, each_BL, values = _with_remat(apply, self.config)(state, x_BLD, rows[table])
        valid_BL = (info.segments_BL > 0).astype(jnp.float32)
        metrics = {name: (jnp.sum(own_BL * valid_BL), jnp.sum(valid_BL)) for name, own_BL in each_BL.items()}
        return as_tokens(x_BLD + delta_BLD), (no_aux()._replace(metrics=metrics, gates=each_BL), values)


def _with_remat(apply: Callable, config: Model) -> Callable:
    if config.remat == "none":
        return apply
    names = config.saved_names if config.remat == "names" else ()
    return jax.checkpoint(apply, policy=jax.checkpoint_policies.save_only_these_names(*names, *NEVER_REPEATED))


def _merge_reports(reports: dict[str, Aux]) -> Aux:
    """Sums objectives over blocks; all else keeps the name of its run."""
    objective = {unit: sum(jnp.sum(aux.objective[unit]) for aux in reports.values()) for unit in ("tokens", "groups")}
    metrics = {name: aux.metrics for name, aux in reports.items() if aux.metrics}
    statistics = {name: aux.statistics for name, aux in reports.items() if aux.statistics}
    choices = {name: aux.choices for name, aux in reports.items() if aux.choices}
    gates = {name: aux.gates for name, aux in reports.items() if aux.gates}
    return Aux(objective, metrics, {"blocks": statistics} if statistics else {}, choices, gates)


def first_block(run: str) -> int:
    """Returns the number of the first block of a run."""
    return int(run.partition("_")[0])


def _remembered(history: History, info: TokenInfo, values: dict[str, jax.Array]) -> History:
    """Returns the history after these positions, of which those of segment 0 (at the end) were not written."""
    written_B = jnp.sum(info.segments_BL > 0, axis=1)
    return History(
        remember(history.tokens_BW, info.tokens_BL, written_B),
        remember(history.segments_BW, info.segments_BL, written_B),
        {block: remember(past, values[block], written_B) for block, past in history.values.items()},
    )


def empty_cache(config: Model, batch: int, length: int) -> dict[str, Any]:
    """Returns a cache of `length` positions for every run of blocks, and the memory's empty history."""
    attention, caches = config.attention, dict[str, Any]()
    if config.memory.blocks:
        past = (batch, config.memory.history_length)
        width = config.memory.history_width(config.d_model)
        values = {str(block): jnp.zeros((*past, width), config.dtype) for block in config.memory.blocks}
        caches["memory"] = History(jnp.zeros(past, jnp.int32), jnp.full(past, -1, jnp.int32), values)
    for name, _ in config.runs():
        match = RUN_KEY.match(name)
        stacked = (int(match[2]) - int(match[1]) + 1,) if match else ()
        shape = (*stacked, batch, length, attention.key_heads, attention.head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        segments = jnp.zeros((*stacked, batch, length), jnp.int32)
        caches[name] = Cache(zeros, zeros, segments, jnp.zeros(stacked, jnp.int32))
    return caches


def advance(config: Model, model_state: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
    """Returns the next model state from the statistics of the whole step. Called once a step; evaluation never calls it."""
    if not model_state:
        return model_state
    blocks = dict(model_state["blocks"])
    for name, feed_forward in config.runs():
        if name in blocks:
            state, found = dict(blocks[name]), statistics.get("blocks", {}).get(name, {})
            router = config.depth.router_of(first_block(name))
            if "feed_forward" in state:
                state["feed_forward"] = feed_forward.advance(state["feed_forward"], found.get("feed_forward", {}))
            if "depth" in state and router is not None:
                state["depth"] = router.advance(state["depth"], found["depth"])
            blocks[name] = state
    return {**model_state, "blocks": blocks}
