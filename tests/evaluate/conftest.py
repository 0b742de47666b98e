"""Fixtures of the evaluation tests."""

import jax
import pytest

from sparse_lm.layers import parameter


@pytest.fixture(scope="module")
def fast_compiles():
    """Compiles without optimizations: the programs are tiny, and most of their time is XLA's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # Programs that are kept for the whole process must not stay unoptimized: other tests compare bits with other processes.
    parameter._compiled_draw.cache_clear()
    jax.clear_caches()
