"""What a Hugging Face folder says beside its tokenizer: begin and end of a text, special and added tokens, chat templates."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG = "tokenizer_config.json"
# Older folders name the special tokens here; a tokenizer_config.json with an added_tokens_decoder goes before it.
NAMES = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary; it is found in a text before anything is cut into pieces."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class SpecialTokens:
    """What the files state; empty where there are none."""

    names: Mapping[str, str]  # {"bos_token": "<s>", ...}
    stated: bool  # whether the beginning or the end of a text is named at all, be it as none
    added: tuple[AddedToken, ...]  # by id
    adds_bos: bool | None
    templates: Mapping[str, str]  # {"default": Jinja source, ...}

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> SpecialTokens:
        """Reads what is there of the side files. Raises ValueError naming the file that is not as it should be."""
        config, names = _read(files, CONFIG), _read(files, NAMES)
        decoder = config.get("added_tokens_decoder") or {}
        said = names | config if decoder else config | names
        adds_bos = config.get("add_bos_token")
        spelt = {name: text for name in TOKEN_NAMES if (text := _spelling(said.get(name)))}
        # The other special tokens go by either name, as a list.
        more = [said.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
        others = {text for tokens in more if isinstance(tokens, list) for token in tokens if (text := _spelling(token))}
        return cls(
            names=spelt,
            stated="bos_token" in said or "eos_token" in said,
            added=_added(decoder, _read(files, ADDED), others | set(spelt.values())),
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            templates=_templates(files, config.get("chat_template")),
        )


def side_files(folder: pathlib.Path) -> dict[str, bytes]:
    """{name: content} of the files beside a tokenizer that are there."""
    paths = [folder / name for name in (CONFIG, NAMES, ADDED, TEMPLATE)] + sorted((folder / TEMPLATES).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def is_side_file(name: str) -> bool:
    return name in (CONFIG, NAMES, ADDED, TEMPLATE) or name.startswith(f"{TEMPLATES}/")


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object")
    return values


def _spelling(token: Any) -> str:
    """A token is written as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _added(decoder: dict[str, Any], numbered: dict[str, Any], special: set[str]) -> tuple[AddedToken, ...]:
    """The tokens of `added_tokens_decoder`, {id: token}, and of added_tokens.json, {text: id}."""
    found: dict[str, AddedToken] = {}
    try:
        for content, number in numbered.items():
            found[content] = AddedToken(content, int(number), special=content in special)
        for number, token in decoder.items():
            flags = {flag: bool(token.get(flag, False)) for flag in ("special", "lstrip", "rstrip", "single_word", "normalized")}
            found[token["content"]] = AddedToken(token["content"], int(number), **flags)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{CONFIG} or {ADDED} has an added token that is none: {error}") from None
    return tuple(sorted(found.values(), key=lambda token: token.id))


def _templates(files: Mapping[str, bytes], stated: Any) -> dict[str, str]:
    """Those of tokenizer_config.json, one or a list of named ones; files of their own go before them."""
    templates: dict[str, str] = {}
    if isinstance(stated, str):
        templates["default"] = stated
    elif isinstance(stated, list):
        try:
            templates = {str(entry["name"]): str(entry["template"]) for entry in stated}
        except (TypeError, KeyError) as error:
            raise ValueError(f"the chat_template of {CONFIG} is a list whose entries lack {error}") from None
    elif stated is not None:
        raise ValueError(f"the chat_template of {CONFIG} is neither a text nor a list")
    for name, content in files.items():
        path = pathlib.PurePosixPath(name)
        if name == TEMPLATE or path.parent.name == TEMPLATES:
            try:
                templates["default" if name == TEMPLATE else path.stem] = content.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not UTF-8: {error}") from None
    return templates
