"""What is done to documents before they are tokenized, and how much of it was done."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from gptjax.config import DataConfig, UserError
from gptjax.data.sources import Document, Source, Subset

# C0 without tab and newline, DEL, C1. A carriage return goes too, so that all lines end in a newline alone.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Cleaned:
    """The splits as they will be tokenized; `digest` is a hash of all their names and texts; `report` counts what was dropped."""

    splits: dict[str, Source]
    digest: str
    train_digest: str
    report: dict[str, int]


def clean_text(text: str, config: DataConfig) -> str:
    """The text with the configured Unicode form and without control characters.

    A lone surrogate (JSON can hold one, UTF-8 cannot) becomes U+FFFD whatever the options.
    """
    if not text.isascii():  # ASCII is the same in every Unicode form
        text = _SURROGATE.sub("\ufffd", text)
        if config.unicode_form != "none":
            text = unicodedata.normalize(cast(Literal["NFC", "NFD", "NFKC", "NFKD"], config.unicode_form), text)
    return _CONTROL.sub("", text) if config.drop_control_characters else text


def clean(sources: Mapping[str, Source], config: DataConfig) -> Cleaned:
    """Cleans all splits, and drops documents that are empty or, on request, exact copies.

    Copies are looked for across the splits, training documents first: of a text in both, the held-out copy is the one dropped,
    so that nothing evaluated was trained on. Reads every document once; keeps only hashes.
    Raises `UserError` where nothing of a split is left.
    """
    report = {"changed_documents": 0, "dropped_characters": 0, "empty_documents": 0, "duplicate_documents": 0}
    seen: set[bytes] = set()
    digests = []
    splits: dict[str, Source] = {}
    for split, source in sources.items():
        digest = hashlib.sha256(split.encode())
        kept = []
        for index in range(len(source)):
            document = source[index]
            text = clean_text(document.text, config)
            report["changed_documents"] += text != document.text
            report["dropped_characters"] += max(0, len(document.text) - len(text))
            if not text:
                report["empty_documents"] += 1
                continue
            content = hashlib.sha256(text.encode()).digest()
            if config.drop_duplicates and content in seen:
                report["duplicate_documents"] += 1
                continue
            seen.add(content) if config.drop_duplicates else None
            digest.update(hashlib.sha256(document.name.encode("utf-8", "surrogatepass")).digest() + content)
            kept.append(index)
        if not kept:
            raise UserError(f"no document of the {split} split is left after cleaning: {len(source)} were read.")
        splits[split] = Subset(source, kept, lambda document: Document(document.name, clean_text(document.text, config)))
        digests.append(digest.hexdigest())
    return Cleaned(splits, hashlib.sha256("".join(digests).encode()).hexdigest(), digests[0], report)
