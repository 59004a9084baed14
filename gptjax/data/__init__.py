"""Documents to batches: sources, cleaning, tokenizers, packing and the pipeline. Only numpy; nothing here imports jax.

Grain does the reading ahead. It imports jax itself where jax is installed, so it is imported only where batches are iterated.
"""
