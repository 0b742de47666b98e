"""The embedding lookup.

Legend: B batch, L length, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sparse_lm.layers.row_lookup import row_lookup
from sparse_lm.parallel.collectives import sum_of_copies
from sparse_lm.parallel.mesh import current
from sparse_lm.parallel.rules import spec_of, split_tokens


def lookup(table_VD: jax.Array, tokens_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the rows of the tokens, [B, L, D] in `dtype`; ids past the vocabulary give its last row.

    On a mesh the table stays where it is: the ids of an fsdp group are gathered, each shard looks up its columns of their rows (its
    part of the vocabulary; the others give zeros), and an all-to-all brings each shard its tokens whole. That moves tokens x D
    numbers, where gathering the table would move V x D.
    """
    mesh = current()
    if mesh is None:
        return row_lookup(table_VD, tokens_BL, dtype)
    vocabulary, columns = spec_of(("vocab", "embed"), table_VD.shape, mesh)
    tokens = split_tokens(tokens_BL.shape[0], tokens_BL.shape[1], mesh)
    shared_rows = columns is not None and columns in tokens.rows

    def device(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        if shared_rows:
            tokens_BL = jax.lax.all_gather(tokens_BL, columns, axis=0, tiled=True)
        index_BL = tokens_BL
        if vocabulary is not None:
            size = table_VD.shape[0]
            index_BL = jnp.clip(tokens_BL, 0, size * mesh.shape[vocabulary] - 1) - jax.lax.axis_index(vocabulary) * size
            mine_BL = (index_BL >= 0) & (index_BL < size)
        x_BLD = row_lookup(table_VD, index_BL, dtype)
        if vocabulary is not None:
            x_BLD = jnp.where(mine_BL[..., None], x_BLD, 0)
        if shared_rows:
            x_BLD = jax.lax.all_to_all(x_BLD, columns, 0, 2, tiled=True)
        elif columns is not None:
            x_BLD = jax.lax.all_gather(x_BLD, columns, axis=2, tiled=True)
        return x_BLD if vocabulary is None else sum_of_copies(x_BLD, vocabulary)

    run = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(P(vocabulary, columns), tokens.spec()),
        out_specs=tokens.spec(None),
        check_vma=False,
    )
    return run(table_VD, tokens_BL)
