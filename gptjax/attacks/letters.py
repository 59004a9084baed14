"""Changes of a word's letters: slips of the fingers, and letters that look alike."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # each row of keys stands half a key to the right of the one above


def _neighbours() -> dict[str, str]:
    """The keys that touch a key."""
    near: dict[str, set[str]] = {key: set() for row in _ROWS for key in row}
    for upper, row in enumerate(_ROWS):
        pairs = list(zip(row, row[1:], strict=False))
        if upper + 1 < len(_ROWS):
            below = _ROWS[upper + 1]
            pairs += [(key, below[i]) for i, key in enumerate(row) if i < len(below)]
            pairs += [(key, below[i - 1]) for i, key in enumerate(row) if 0 < i <= len(below)]
        for one, other in pairs:
            near[one].add(other)
            near[other].add(one)
    return {key: "".join(sorted(keys)) for key, keys in near.items()}


KEYBOARD = _neighbours()

# Latin letters and the Cyrillic or Greek ones that most fonts draw alike (among the confusables of Unicode's report 39).
_LATIN = "aceijopsxyhdqwvABCEHIJKMNOPSTXZ"
_ALIKE = (
    "\u0430\u0441\u0435\u0456\u0458\u043e\u0440\u0455\u0445\u0443\u04bb\u0501\u051b\u051d\u03bd"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u039d\u041e\u0420\u0405\u0422\u0425\u0396"
)

# Chinese characters that differ by a stroke or a part.
_HAN = """
    己已巳 未末 人入八 日曰 土士 大太犬 干千于 王玉主 天夭 午牛 鸟乌 木本 目自 刀力 今令 处外
    晴睛 情清请 住往 历厉 折拆 抢枪 辩辨辫 候侯 茶荼 贷货 季李 待侍 坐座 即既 拨拔 爪瓜
    戊戌戍 师帅 洒酒 券卷 密蜜 免兔 代伐 史吏 白百 早旱 厂广 问间 体休 远运 线钱 低底
    蓝篮 很狠 跟根 练炼 科料 治冶 准淮 冷泠 析祈 性姓 持特 技枝 构沟购 油抽 径经 防妨
    课棵 源原 流硫 理埋 城诚 型形 场扬 效郊 法去 研砚
"""

HOMOGLYPHS: dict[str, str] = dict(zip(_LATIN, _ALIKE, strict=True))
for _group in _HAN.split():
    for _character in _group:
        HOMOGLYPHS[_character] = HOMOGLYPHS.get(_character, "") + _group.replace(_character, "")


def swap_letters(word: str, rng: random.Random) -> Iterator[str]:
    """Two neighbours change places."""
    for i in _shuffled(len(word) - 1, rng):
        yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def delete_letter(word: str, rng: random.Random) -> Iterator[str]:
    if len(word) > 1:
        for i in _shuffled(len(word), rng):
            yield word[:i] + word[i + 1 :]


def insert_letter(word: str, rng: random.Random) -> Iterator[str]:
    """A letter comes in, at any place but before the first."""
    for i in _shuffled(len(word), rng):
        after = word[i + 1 : i + 2]
        yield word[: i + 1] + _letter_like(after if after.isalpha() else word[i], rng) + word[i + 1 :]


def substitute_letter(word: str, rng: random.Random) -> Iterator[str]:
    for i in _shuffled(len(word), rng):
        yield word[:i] + _letter_like(word[i], rng) + word[i + 1 :]


def keyboard_slip(word: str, rng: random.Random) -> Iterator[str]:
    """A letter becomes one of the keys around it."""
    yield from _from_table(word, rng, KEYBOARD)


def homoglyph(word: str, rng: random.Random) -> Iterator[str]:
    """A letter becomes one of another alphabet that looks the same; a Chinese character, one that looks much the same."""
    yield from _from_table(word, rng, HOMOGLYPHS)


def _from_table(word: str, rng: random.Random, table: dict[str, str]) -> Iterator[str]:
    for i in _shuffled(len(word), rng):
        letter = word[i]
        others = table.get(letter) or table.get(letter.lower(), "")
        if others:
            other = rng.choice(others)
            yield word[:i] + (other if letter in table else other.upper()) + word[i + 1 :]


def _letter_like(letter: str, rng: random.Random) -> str:
    """A Latin letter or a digit of the same case; a letter of another alphabet gives none but itself."""
    for alphabet in (string.ascii_lowercase, string.ascii_uppercase, string.digits):
        if letter in alphabet:
            return rng.choice(alphabet.replace(letter, ""))
    return letter


def _shuffled(count: int, rng: random.Random) -> list[int]:
    return rng.sample(range(max(count, 0)), max(count, 0))
