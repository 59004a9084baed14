"""gptjax: pre-train, fine-tune, evaluate, sample from and take apart GPT models in JAX."""

__version__ = "0.1.0"
