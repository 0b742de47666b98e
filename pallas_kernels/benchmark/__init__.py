"""Timing of the kernels against dense products, rooflines and other libraries."""
