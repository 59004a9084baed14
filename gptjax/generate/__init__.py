"""Prefill and decode in one compiled call. The package can be called: `gptjax.generate(model, prompts, ...)`."""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """`gptjax.generate` is this package's name and the function's."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See `gptjax.generate.text.generate`."""
        from gptjax.generate import text  # JAX is imported where it is used

        return text.generate(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
