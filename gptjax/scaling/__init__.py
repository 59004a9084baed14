"""Scaling laws: families of models over compute, the laws fitted to them, and predictions of runs that are not made yet."""
