"""Training: the step, the loop, and what keeps a run safe."""
