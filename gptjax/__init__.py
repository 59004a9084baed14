"""gptjax: pre-train, fine-tune, evaluate, sample from and take apart GPT models in JAX."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> Any:
    """A model to write with, from a run's folder or a Hugging Face folder; see `gptjax.train.loading.load`."""
    from gptjax.train import loading  # JAX is imported where it is used

    return loading.load(path, **options)


def __getattr__(name: str) -> Any:
    if name == "generate":  # the package, which can be called
        import gptjax.generate

        return gptjax.generate
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
