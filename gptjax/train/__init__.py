"""State, objectives, optimizers, the step and the loop."""
