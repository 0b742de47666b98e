"""Layers below every mechanism: parameters with dims, projections, norms, the dense feed-forward."""
