"""Knobs of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError, knob
from gptjax.config.mixture import check_mixture

if TYPE_CHECKING:
    from gptjax.config.schema import Config


@dataclass(frozen=True)
class DataConfig:
    """Documents to batches."""

    source: str = knob("stdlib", "Where documents come from.", choices=("stdlib", "text", "jsonl", "tfds"))
    path: str = knob("", "text, jsonl: a file, a glob, or several separated by commas; tfds: its data_dir.")
    eval_path: str = knob("", "text, jsonl: files held out for evaluation; empty: eval_fraction of `path`.")
    name: str = knob("", "tfds: the data set's name, as in tiny_shakespeare or tiny_shakespeare:1.0.0.")
    train_split: str = knob("train", "tfds: split to train on.")
    eval_split: str = knob("validation", "tfds: split to evaluate on, as in validation+test.")
    text_field: str = knob("text", "jsonl, tfds: the field that holds the text.")
    split_by: str = knob(
        "hash",
        "How eval_fraction is held out: documents by a hash of their name, or the tail of the text.",
        choices=("hash", "tail"),
    )
    eval_fraction: float = knob(0.1, "Share held out for evaluation.", above=0, below=1)
    mixture: tuple[str, ...] = knob(
        (),
        "Several sources, which take the place of source, path, eval_path and name: NAME=stdlib, NAME=text:PATH, "
        "NAME=jsonl:PATH or NAME=tfds:DATA_SET. Each has its own rows, random order, epochs and held-out part, and its own "
        "duplicates. Tokenizer, cleaning and packing are shared; a tokenizer that is made from text sees all of them, whatever "
        "their weights.",
    )
    mixture_weights: tuple[str, ...] = knob(
        (),
        "Shares of the rows, to any sum: NAME=WEIGHT, or NAME=WEIGHT@PLACE with places from 0, the run's start, to 1, its end: "
        "straight lines between them, a step where two are at one place; a source of weight 0 is evaluated all the same. "
        "Empty: by their rows, as if they were one source.",
    )
    mixture_settings: tuple[str, ...] = knob(
        (),
        "What a source has of its own, NAME.SETTING=VALUE: path, eval_path, name, train_split, eval_split, text_field, split_by, "
        "eval_fraction; of these the last five are those of `data` for a source that doesn't say.",
    )

    verify_files: bool = knob(
        False,
        "Read and hash all text at each start, also of files whose path, size, inode and times of change are as they were when "
        "they were last read.",
        shapes_run=False,
    )

    unicode_form: str = knob("none", "Unicode normalisation of each document.", choices=("none", "NFC", "NFD", "NFKC", "NFKD"))
    drop_control_characters: bool = knob(False, "Remove control characters other than tab and newline.")
    drop_duplicates: bool = knob(False, "Keep the first of documents with exactly the same cleaned text.")

    tokenizer: str = knob(
        "byte",
        "Text to ids; init_from: as the model that the run starts from has it.",
        choices=("byte", "char", "sentencepiece", "gpt2", "huggingface", "init_from"),
    )
    tokenizer_path: str = knob(
        "",
        "sentencepiece: a .model file or its folder (empty: train one on the source); "
        "gpt2: the folder of encoder.json and vocab.bpe; "
        "huggingface: a tokenizer.json, or a folder, whose other files count too.",
    )
    tokenizer_vocab_size: int = knob(8192, "Vocabulary of a SentencePiece model trained on the source.", at_least=300)
    add_eos: bool = knob(True, "End each document with the end-of-text token, where the tokenizer has one.")
    add_bos: bool = knob(True, "Begin each document with the begin-of-text token, where the tokenizer has one.")

    packing: str = knob(
        "packed",
        "packed: rows of whole documents and pieces, which never see each other; padded: each of them in a row of its own; "
        "windows: consecutive windows of the concatenated text, in random order.",
        choices=("packed", "padded", "windows"),
    )
    seq_len: int = knob(256, "Tokens a row that are predicted.", at_least=1)
    batch_size: int = knob(16, "Rows a step, over all hosts and micro-batches.", at_least=1)
    shuffle: bool = knob(True, "Visit rows in an order drawn from the seed, anew each epoch.")
    prefetch: int = knob(16, "Batches prepared ahead of the step.", at_least=0, shapes_run=False)


def check(config: Config) -> None:
    """Raises `UserError` for data knobs that don't go together."""
    data = config.data
    if data.batch_size % config.train.accumulation_steps:
        raise UserError(
            f"train.accumulation_steps={config.train.accumulation_steps} does not divide data.batch_size={data.batch_size}."
        )
    check_mixture(data)
    if data.source in ("text", "jsonl") and not data.path and not data.mixture:
        raise UserError(f"data.source={data.source} needs data.path, a file or a glob.")
    if data.source == "tfds" and not data.name and not data.mixture:
        raise UserError("data.source=tfds needs data.name, the data set's name.")
    if data.tokenizer == "init_from" and not config.init_from:
        raise UserError("data.tokenizer=init_from needs init_from, a run's folder or a Hugging Face folder.")
    if data.tokenizer in ("gpt2", "huggingface") and not data.tokenizer_path:
        what = "the folder of encoder.json and vocab.bpe" if data.tokenizer == "gpt2" else "a tokenizer.json"
        raise UserError(f"data.tokenizer={data.tokenizer} needs data.tokenizer_path, {what}.")
