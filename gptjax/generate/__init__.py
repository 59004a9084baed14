"""Prefill and decode in one compiled call."""
