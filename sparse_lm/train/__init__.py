"""Training: state, the pure step, the loop around it, checkpoints."""
