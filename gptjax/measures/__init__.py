"""How good predictions are: metrics with intervals, and baselines, on plain lists and numpy arrays. No jax."""
