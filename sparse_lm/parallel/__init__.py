"""Meshes and the one table from logical dims to mesh axes."""
