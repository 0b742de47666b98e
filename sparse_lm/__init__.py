"""sparse_lm: training language models whose sparsity is real, in JAX."""

__version__ = "0.1.0"
