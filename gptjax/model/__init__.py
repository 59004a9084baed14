"""The decoder: pure Flax Linen modules."""
