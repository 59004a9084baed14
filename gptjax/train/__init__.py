"""Training: state, objectives, optimizers, the step, the loop and what is kept of a run."""
