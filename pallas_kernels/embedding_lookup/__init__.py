"""Rows of a large table by address, and rows of float8 numbers with scales: see :func:`embedding_lookup`."""

from pallas_kernels.embedding_lookup.api import embedding_lookup
from pallas_kernels.embedding_lookup.float8_rows import pack, row_width, row_words, unpack

__all__ = ["embedding_lookup", "pack", "row_width", "row_words", "unpack"]
