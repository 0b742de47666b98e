"""Evaluation: perplexity, bits per byte, generation, the run report."""
