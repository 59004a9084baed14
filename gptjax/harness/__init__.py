"""Likelihoods of texts, and what is measured with them: lm-evaluation-harness, built-in suites, few-shot tables."""
