"""Random small models of transformers, for the checks against it."""

from __future__ import annotations

import warnings
from typing import Any


def random_transformer(kind: str, **values: Any) -> Any:
    """Every tensor random, norms and biases too, so that none is 0 or 1 by its initialisation; the same at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        import torch
        import transformers
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": 101} | values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
