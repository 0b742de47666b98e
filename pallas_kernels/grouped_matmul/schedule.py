"""The work list of a grouped product: which row tiles exist, for groups of any size at any offset.

A tile starts at a multiple of 8 rows (what the copy engines need) at or before its first own row, so a group may share its first tile's rows with the group before
it; the kernels store own rows only. Rows in no group are tiles too, of zero steps: the kernel writes their zeros. Everything here is a handful of integer operations
on [tiles, ranges] arrays, fused by XLA into a few small kernels, and the same for every product over the same groups.

Legend: G groups, J ranges (groups, then gaps), V tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.groups import RowGroups

ALIGN = 8


class Tiles(NamedTuple):
    """Row tiles: `entries_4V` = first row (multiple of 8), first own row, end of own rows, weight; `count_2` = tiles of groups, all tiles."""

    entries_4V: jax.Array
    count_2: jax.Array


def row_tiles(groups: RowGroups, rows: int, height: int, align: int = ALIGN) -> Tiles:
    """Tiles of `height` rows over the groups in order, then over the gaps between them.

    First rows are multiples of `align`, and a tile never sticks out of the rows, which needs rows >= height. With `align` 1 a tile begins at its first own row.
    """
    assert height % align == 0 and (align == 1 or rows >= height and rows % align == 0)
    end_G = groups.start_G + groups.size_G
    zero = jnp.zeros((1,), jnp.int32)
    start_J = jnp.concatenate([groups.start_G, zero, end_G])
    end_J = jnp.concatenate([end_G, groups.start_G, zero + rows])
    weight_J = jnp.concatenate([groups.weight_G, jnp.zeros_like(groups.weight_G), zero])
    first_J = start_J // align * align
    tiles_J = jnp.where(end_J > start_J, (end_J - first_J + height - 1) // height, 0)
    ranges = start_J.shape[0]
    upto_J = jnp.cumsum(tiles_J, dtype=jnp.int32)
    tile_V = jnp.arange(rows // height + 2 * ranges, dtype=jnp.int32)
    # The range of a tile: how many ranges end at or before it. A comparison table is one fused reduction; a search is a loop.
    range_V = jnp.minimum(jnp.sum(upto_J[None, :] <= tile_V[:, None], axis=1, dtype=jnp.int32), ranges - 1)
    begin_V = first_J[range_V] + (tile_V - (upto_J - tiles_J)[range_V]) * height
    first_V = jnp.clip(begin_V, 0, max(0, rows - height))
    own_V = jnp.maximum(begin_V, start_J[range_V])
    stop_V = jnp.minimum(begin_V + height, end_J[range_V])
    count_2 = jnp.stack([upto_J[groups.start_G.shape[0] - 1], upto_J[-1]])
    return Tiles(jnp.stack([first_V, own_V, stop_V, weight_J[range_V]]), count_2)
