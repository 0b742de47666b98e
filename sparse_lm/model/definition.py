"""A model as data: its graph, the trees of shapes, dims and initial kinds, and the pure functions that use them.

Legend: B batch, L length, D model, V vocabulary.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from sparse_lm.layers.feed_forward import Aux, TokenInfo
from sparse_lm.layers.parameter import RUN_KEY, ModelState, StandsFor, map_leaves, materialize
from sparse_lm.layers.parametrization import HasUpdateKind, initial_scales, learning_rate_scales
from sparse_lm.memory.compression import TokenClasses, Tokens, compressed
from sparse_lm.memory.hashing import Hash
from sparse_lm.memory.memory import fetch, host_rows, initial_tables, table_dims, update_tables
from sparse_lm.memory.owners import Owners
from sparse_lm.model import loss
from sparse_lm.model.cudnn_attention import documents_bucket
from sparse_lm.model.transformer import MEMORY, Model, Transformer
from sparse_lm.weight_sparsity.gradient_probe import Probe
from sparse_lm.weight_sparsity.packed_matrix import PackedMatrix, initial_topologies, packed_matrices

Tree = dict[str, Any]
Batch = dict[str, jax.Array]
METADATA = {"inits": "init", "frozen": "frozen", "values": "initial", "stands_for": "stands_for"}


@dataclasses.dataclass(frozen=True)
class Definition:
    """Everything about a model but its values.

    Attributes:
      config: the model's config.
      graph: the NNX graph, split once.
      shapes: nested dict of parameter shapes; stacked runs carry the leading layers dimension.
      dims: nested dict of logical dims.
      stands_for: nested dict of `StandsFor`: the matrix that each parameter stores.
      inits: nested dict of kinds of initial value.
      frozen: nested dict of whether training leaves a parameter as it is.
      state_shapes: nested dict of shapes of the model state.
      state_dims: nested dict of its logical dims.
      state_values: nested dict of the value that fills each leaf of it at first; patterns of sparse matrices are drawn instead.
      packed: {path: matrix} of the sparse matrices, whose values and pattern stand below that path.
      probes: nested dict of what nobody asks of the gradients of sparse matrices; see `gradient_probe.Probe`.
      mesh: what its functions are spread over; None: one device.
      classes: what a memory's n-grams are made of; None: token ids.
    """

    config: Model
    graph: Any
    shapes: Tree
    dims: Tree
    stands_for: Tree
    inits: Tree
    frozen: Tree
    state_shapes: Tree
    state_dims: Tree
    state_values: Tree
    packed: dict[str, PackedMatrix]
    probes: Tree
    mesh: AbstractMesh | None = None
    classes: TokenClasses | None = None

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the mesh known to everything traced inside; see `parallel.mesh.current`."""
        return jax.sharding.use_abstract_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def parameters(self) -> int:
        """Returns the number of parameters: the leaf count of the real tree, rows of tables included."""
        shapes = jax.tree.leaves(self.shapes, is_leaf=lambda s: isinstance(s, tuple))
        tables = self.config.memory.tables().values()
        return sum(int(np.prod(shape)) for shape in shapes) + sum(table.rows * table.width for table in tables)

    def initial_params(self, key: jax.Array, shardings: Tree | None = None) -> Tree:
        """Draws the parameters, float32; [P] keys draw those of a population. See `parameter.materialize`."""
        parametrization, (dims, shapes, densities) = self.config.parametrization, self._matrices()
        scales = initial_scales(parametrization, dims, shapes, densities=densities)
        return materialize(key, self.shapes, self.inits, scales, shardings)

    def _matrices(self) -> tuple[Tree, Tree, Tree]:
        """Returns the trees of dims, shapes and densities of the matrices that the parameters store."""
        return tuple(map_leaves(lambda _, matrix, i=i: matrix[i], self.stands_for) for i in range(3))  # type: ignore[return-value]

    def learning_rate_scales(self, optimizer: HasUpdateKind) -> Tree:
        """Returns the tree of learning-rate multipliers that `optimizer.build(dims, scales)` takes."""
        dims, shapes, densities = self._matrices()
        return learning_rate_scales(self.config.parametrization, optimizer, dims, shapes, densities)

    def initial_state(self, key: jax.Array | None = None) -> Tree:
        """Returns the initial model state.

        Args:
          key: of random patterns of sparse matrices; None: that of seed 0.
        """
        state = map_leaves(
            lambda _, shape, value: jnp.full(shape, value, jnp.float32), self.state_shapes, self.state_values
        )
        return initial_topologies(jax.random.key(0) if key is None else key, self.packed, state)

    def initial_tables(self, key: jax.Array) -> Tree:
        """Returns the memory's tables with their hashes and optimizer slots; {} without memory."""
        return initial_tables(self.config.memory, self.hashes(), key)

    def host_rows(self, key: jax.Array, owners: Owners) -> Tree:
        """Returns the rows and slots of `initial_tables` in host memory, those that this process keeps."""
        return host_rows(self.config.memory, key, owners)

    def hashes(self) -> dict[str, Hash]:
        """Returns the hash of every table of the memory, derived anew."""
        return self.config.memory.hashes(self.config.vocab_size, self.classes)

    def table_dims(self) -> Tree:
        """Returns the logical dims of the tables."""
        return table_dims(self.config.memory)

    def fetch(self, tables: Tree, info: TokenInfo, cache: Tree | None = None) -> tuple[Tree, Tree]:
        """Returns ({table: rows [B, L, X]}, {table: addresses [B, L, H]}) of tokens; {} without memory."""
        history = cache["memory"] if cache is not None and "memory" in cache else None
        with self.on_mesh():
            return fetch(self.config.memory, tables, info.tokens_BL, info.segments_BL, info.positions_BL, history)

    def update_tables(
        self, tables: Tree, address: Tree, grads: Tree, rate: jax.Array, step: jax.Array, keep: jax.Array
    ) -> Tree:
        """Returns the tables after a step; see `memory.update_tables`."""
        with self.on_mesh():
            return update_tables(self.config.memory, tables, address, grads, rate, step, keep)

    def hidden(
        self,
        params: Tree,
        model_state: Tree,
        info: TokenInfo,
        cache: Tree | None = None,
        rows: Tree | None = None,
    ) -> tuple[jax.Array, jax.Array, Aux, Tree | None]:
        """Returns (final hidden states [B, L, D], head [D, V] float32, Aux, updated cache).

        Args:
          params: parameters; probes of sparse matrices may stand among them.
          model_state: model state; outside training also the tables (`TrainState.inference_state`).
          info: the tokens.
          cache: of decoding.
          rows: the memory's rows of the tokens, in training; None: they are looked up in the model state's tables.
        """
        state = {name: part for name, part in model_state.items() if name != "tables"}
        if rows is None:
            rows, _ = self.fetch(model_state.get("tables", {}), info, cache)
        model = nnx.merge(self.graph, _overlaid(self.probes, params), state)
        with self.on_mesh():
            h_BLD, aux, cache = model(info, cache, rows)
        return h_BLD, model.head_weight(), aux, cache

    def logits_multiplier(self) -> float:
        """Factor on the raw logits."""
        return self.config.parametrization.logits_multiplier(self.config.d_model)

    def logits(self, params: Tree, model_state: Tree, info: TokenInfo, cache: Any = None) -> tuple[jax.Array, Any]:
        """Returns (logits float32 [B, L, V], updated cache): for generation and small tests."""
        h_BLD, head_DV, _, cache = self.hidden(params, model_state, info, cache)
        raw = jnp.einsum("bld,dv->blv", h_BLD, head_DV.astype(h_BLD.dtype), preferred_element_type=jnp.float32)
        raw = raw * self.logits_multiplier()
        cap = self.config.logit_softcap
        return (raw if cap is None else cap * jnp.tanh(raw / cap)), cache

    def token_losses(
        self, params: Tree, model_state: Tree, batch: Batch, replay: Tree | None = None
    ) -> tuple[jax.Array, Aux]:
        """Returns (cross-entropy of every position [B, L], Aux): for evaluation.

        `Aux.choices` records the experts of every token; given back as `replay`, to this model or a later one, they are used again
        with weights from the current scores.
        """
        h_BLD, head_DV, aux, _ = self.hidden(params, model_state, token_info(batch, replay=replay))
        cap, multiplier = self.config.logit_softcap, self.logits_multiplier()
        with self.on_mesh():
            losses_BL = loss.token_losses(h_BLD, head_DV, batch["targets_BL"], softcap=cap, multiplier=multiplier)
        return losses_BL * (batch["segments_BL"] > 0), aux

    def objective(
        self,
        params: Tree,
        model_state: Tree,
        batch: Batch,
        units: dict[str, jax.Array],
        key: jax.Array | None,
        replay: Tree | None = None,
        rows: Tree | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Computes one microbatch's share of the training objective.

        Args:
          params: parameters.
          model_state: model state.
          batch: one microbatch.
          units: number of valid tokens and routing groups of the whole step: shares of microbatches then add exactly.
          key: key of this microbatch.
          replay: recorded choices of this microbatch, see `token_losses`; None: routers choose.
          rows: see `hidden`.

        Returns:
          (objective, {"metrics": (sum, count) pairs, "statistics"}), all additive over microbatches.
        """
        h_BLD, head_DV, aux, _ = self.hidden(params, model_state, token_info(batch, key, replay), rows=rows)
        mask_BL = (batch["segments_BL"] > 0).astype(jnp.float32)
        config, targets_BL = self.config, batch["targets_BL"]
        caps = config.logit_softcap, self.logits_multiplier(), config.z_coefficient
        with self.on_mesh():
            objective, entropy = loss.cross_entropy(h_BLD, head_DV, targets_BL, mask_BL, *caps)
        total = (objective + aux.objective["tokens"]) / units["tokens"] + aux.objective["groups"] / units["groups"]
        memory = {name: found for name, found in aux.metrics.items() if name.startswith(MEMORY)}
        blocks = {name: found for name, found in aux.metrics.items() if name not in memory}
        metrics = {"loss": (entropy, jnp.sum(mask_BL)), "blocks": blocks, "memory": memory}
        return total, {"metrics": jax.lax.stop_gradient(metrics), "statistics": jax.lax.stop_gradient(aux.statistics)}

    def units(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the valid tokens and the routing groups with a valid token of a whole batch, at least 1 each."""
        valid_BL = batch["segments_BL"] > 0
        sequences = self.group_sequences()
        groups = jnp.any(valid_BL.reshape(max(1, valid_BL.shape[0] // sequences), -1), axis=-1)
        return {
            "tokens": jnp.maximum(jnp.sum(valid_BL, dtype=jnp.float32), 1.0),
            "groups": jnp.maximum(jnp.sum(groups, dtype=jnp.float32), 1.0),
        }

    def group_sequences(self) -> int:
        """Sequences in one routing group; the same in every routed layer."""
        return self.config.group_sequences()


def _overlaid(below: Tree, above: Tree) -> Tree:
    """Returns the union of two nested dicts; where both have a leaf, that of the second."""
    out = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict):
            out[key] = _overlaid(below[key], above[key])
    return out


def for_documents(definition: Definition, found: int) -> Definition:
    """Returns the same model built for batches with `found` documents in a row (see `documents_bucket`)."""
    attention = definition.config.attention
    most = documents_bucket(attention.max_documents, found)
    if most == attention.max_documents:
        return definition
    config = dataclasses.replace(definition.config, attention=dataclasses.replace(attention, max_documents=most))
    return dataclasses.replace(define(config), mesh=definition.mesh)


def with_classes(definition: Definition, encoder: Tokens | None) -> Definition:
    """Returns the same model with the token classes of a tokenizer, where a memory compresses them."""
    if encoder is None or not definition.config.memory.compressed:
        return definition
    return dataclasses.replace(definition, classes=compressed(encoder, definition.config.vocab_size))


def token_info(batch: Batch, key: jax.Array | None = None, replay: Tree | None = None) -> TokenInfo:
    """Returns what blocks know of a batch's tokens."""
    return TokenInfo(batch["tokens_BL"], batch["positions_BL"], batch["segments_BL"], key, replay)


def define(config: Model) -> Definition:
    """Builds the abstract model; no array is made."""
    model = nnx.eval_shape(lambda: Transformer(config))
    graph, params, state, probes = nnx.split(model, nnx.Param, ModelState, Probe)

    def collect(tree: nnx.State, what: str) -> Tree:
        out: Tree = {}
        for path, variable in nnx.to_flat_state(tree):
            match = next((m for part in path if (m := RUN_KEY.match(str(part)))), None)
            size = int(match[2]) - int(match[1]) + 1 if match else 0
            layers, layer = ((size,), ("layers",)) if size else ((), ())
            value = {
                "shapes": layers + tuple(variable.get_raw_value().shape),
                "dims": layer + tuple(variable.get_metadata("dims")),
                **{name: variable.get_metadata(key) for name, key in METADATA.items() if variable.has_metadata(key)},
            }[what]
            if what == "stands_for":
                value = StandsFor(layer + value.dims, layers + value.shape, value.density)
            node = out
            for part in path[:-1]:
                node = node.setdefault(str(part), {})
            node[str(path[-1])] = value
        return out

    return Definition(
        config=config,
        graph=graph,
        shapes=collect(params, "shapes"),
        dims=collect(params, "dims"),
        stands_for=collect(params, "stands_for"),
        inits=collect(params, "inits"),
        frozen=collect(params, "frozen"),
        state_shapes=collect(state, "shapes"),
        state_dims=collect(state, "dims"),
        state_values=collect(state, "values"),
        packed=packed_matrices(model),
        probes=map_leaves(lambda _, shape: np.zeros(shape, np.float32), collect(probes, "shapes")),
    )
