"""Training: prepared data, state, step, checkpoints, the loop, the demo's tower."""
