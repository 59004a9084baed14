"""The formats that models come in: which one a path is, and what opens it."""

from __future__ import annotations

import pathlib

from gptjax.config import UserError
from gptjax.interop import gguf, huggingface, llama2c
from gptjax.interop.foreign import Foreign

FORMATS = {"huggingface": huggingface.open_folder, "gguf": gguf.open_file, "llama2c": llama2c.open_file}
# A PyTorch file is a zip archive or, of old, a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_model(path: pathlib.Path, format: str = "") -> Foreign:
    """The model at `path`, not read yet; its format is told by what is there, unless it is given. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    try:
        return FORMATS[format or _guess(path)](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _guess(path: pathlib.Path) -> str:
    if path.is_dir():
        return "huggingface"
    with open(path, "rb") as file:
        start = file.read(4)
    if start == gguf.MAGIC or path.suffix == ".gguf":
        return "gguf"
    if start.startswith(_PICKLES):
        raise UserError(
            f"{path} is a pickle, which can run any code when read; convert it to safetensors first: load it where you trust it, "
            "and transformers' save_pretrained(folder, safe_serialization=True) writes it."
        )
    if path.suffix == ".safetensors":
        raise UserError(
            f"{path} is one file of a Hugging Face folder; name the folder, {path.parent}, which has config.json too."
        )
    return "llama2c"
