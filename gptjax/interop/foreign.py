"""A model in another format: opened, which takes no memory to speak of, then read."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from gptjax.config import Config, ModelConfig, UserError, from_dict, to_dict
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop import layout
from gptjax.interop.layout import Row
from gptjax.interop.tensors import Tensors

# Of a tokenizer in a foreign folder: the tokenizer, or None and why there is none.
FoundTokenizer = tuple[Tokenizer | None, str]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a format's reader finds out before any tensor is read."""

    format: str
    architecture: str
    source: pathlib.Path  # the file that the knobs are from
    knobs: dict[str, Any]  # of ModelConfig
    tensors: Tensors
    rows: Callable[[ModelConfig], list[Row]]
    ignored: Callable[[str], bool]
    tokenizer: Callable[[], FoundTokenizer] = lambda: (None, "the format has none")
    canonical: Callable[[str], str] = str  # a tensor's name as the format writes it, of that in this file

    def config(self, others: dict[str, Any] | None = None) -> Config:
        """The knobs through the door of the schema, beside `others` (nested dicts). Raises `UserError` naming the file."""
        values = to_dict(Config()) if others is None else others
        values = values | {"model": {**values.get("model", {}), **self.knobs}}
        if others is None:
            values |= {"data": {"seq_len": 1}, "train": {"duration_steps": 1}}
        try:
            return from_dict(values)
        except UserError as error:
            raise UserError(str(error) if str(self.source) in str(error) else f"{self.source}: {error}") from None

    def check(self, config: ModelConfig) -> None:
        """Raises `UserError` where a tensor is missing, misshapen, of an unknown type or left over."""
        layout.check(self.rows(config), config, self.tensors, self.ignored)

    def read(self, config: ModelConfig) -> Any:
        """The parameters as a tree of numpy arrays in `config.param_dtype`; memory stays near their size."""
        self.check(config)
        return layout.fill(self.rows(config), config, self.tensors)

    def kinds(self, config: ModelConfig) -> dict[str, Any]:
        """{"default": the commonest encoding, "others": {name: encoding}}, to write the same ones again."""
        stored = layout.kinds(self.rows(config), config, self.tensors)
        found = {self.canonical(name): kind for name, kind in stored.items()}
        default = collections.Counter(found.values()).most_common(1)[0][0]
        return {"default": default, "others": {name: kind for name, kind in found.items() if kind != default}}


def param_dtype(kinds: set[str]) -> str:
    """The type that holds all of these: bfloat16 where they all are, else float32."""
    return "bfloat16" if kinds == {"BF16"} else "float32"
