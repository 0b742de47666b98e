"""Weight sparsity: masks over dense weights (fidelity), and packed blocks (speed and memory), behind one door to the step."""
