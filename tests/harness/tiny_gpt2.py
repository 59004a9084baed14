"""A tiny random GPT-2 as a Hugging Face folder with a byte-level tokenizer, for this package and for transformers alike."""

from __future__ import annotations

import json
import pathlib

from gptjax.data.byte_pairs import byte_characters
from tests.interop.transformer_models import random_transformer

END = "<|endoftext|>"


def write_folder(folder: pathlib.Path, positions: int = 96) -> pathlib.Path:
    """256 bytes, a few merges and the end-of-text token."""
    letters = list(byte_characters())
    merges = ["h e", "Ġ t", "Ġt he", "Ġ a", "i n", "r e", "e r", "Ġ s", "Ġ w", "o n", "a n", "t h"]
    pieces = [*letters, *(merge.replace(" ", "") for merge in merges)]
    vocab = {piece: number for number, piece in enumerate(pieces)} | {END: len(pieces)}
    model = random_transformer(
        "gpt2", vocab_size=len(vocab), n_positions=positions, n_embd=16, n_layer=2, n_head=2, bos_token_id=268, eos_token_id=268
    )
    assert vocab[END] == 268
    model.save_pretrained(folder)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 268, "content": END, "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder
