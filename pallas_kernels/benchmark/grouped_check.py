"""Values of the grouped products on this device, those of every candidate tiling included: ragged groups, poisoned memory.

python -m pallas_kernels.benchmark.grouped_check
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import BACKEND_NAMES
from pallas_kernels.benchmark.grouped import products
from pallas_kernels.benchmark.timing import has_device_timer
from pallas_kernels.benchmark.tuning import grouped_candidates, tile_functions
from pallas_kernels.grouped_matmul import groups as row_groups
from pallas_kernels.grouped_matmul import reference


def check(functions: Mapping[str, Mapping[str, Callable]], seed: int = 0) -> bool:
    """Compares products with the reference on ragged groups (odd, empty, all in one, none), NaN past their sum, memory poisoned before; says each.

    Args:
        functions: label -> {"forward", "dx" or "dw": function of (x [A, K], w [E, K, N], dy [A, N], sizes [E])}.
        seed: Of the operands.

    Returns:
        Whether every relative Frobenius error is at most 2.5e-3 and every product gives the same bits twice.
    """
    right = True
    rows, inner, outer = 4096, 512, 768
    keys = jax.random.split(jax.random.key(seed), 3)
    x, dy = (jax.random.normal(k, (rows, n), jnp.bfloat16) for k, n in zip(keys, (inner, outer)))
    w = (jax.random.normal(keys[2], (8, inner, outer)) * 0.05).astype(jnp.bfloat16)
    for sizes in ([512] * 8, [1, 0, 1003, 7, 0, 2048, 129, 500], [0, 0, 0, 4000, 0, 0, 0, 0], [0] * 8):
        s = jnp.array(sizes, jnp.int32)
        bad_x, bad_dy = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dy))
        groups = row_groups.contiguous(s)
        clean_x, clean_dy = (jnp.where(jnp.isnan(a), 0, a) for a in (bad_x, bad_dy))
        wanted = {
            "forward": functools.partial(
                reference.product, clean_x, w, groups, None, None, transpose=False, output_rows=rows
            ),
            "dx": functools.partial(
                reference.product, clean_dy, w, groups, None, None, transpose=True, output_rows=rows
            ),
            "dw": functools.partial(reference.weight_gradient, clean_x, clean_dy, groups, None, None),
        }
        for label, group in functions.items():
            for name, f in group.items():
                poison = [jnp.full((rows, outer), jnp.nan, jnp.bfloat16) for _ in range(8)]
                jax.block_until_ready(poison)
                del poison
                first, second = (np.asarray(jax.jit(f)(bad_x, w, bad_dy, s), np.float32) for _ in range(2))
                target = np.asarray(wanted[name](), np.float32)
                error = np.linalg.norm(first - target) / max(np.linalg.norm(target), 1e-30)
                same = np.array_equal(first, second)
                ok = error <= 2.5e-3 and same
                right &= ok
                found = f"error {error:.1e} same bits {same} {'ok' if ok else 'WRONG'}"
                print(f"check {label:26s} {name:8s} {str(sizes):50s} {found}", flush=True)
    return right


def main(argv=None):
    """Command line; exits with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", choices=BACKEND_NAMES, help="of the functions labelled ours; not given: the automatic choice"
    )
    args = parser.parse_args(argv)
    tiles = grouped_candidates() if has_device_timer() and args.backend is None else {}
    right = check({"ours": products(args.backend)} | {n: tile_functions(*t) for n, t in tiles.items()})
    sys.exit(not right)


if __name__ == "__main__":
    main()
