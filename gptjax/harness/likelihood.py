"""How likely a model finds texts: continuations after contexts, and whole texts.

A text's number depends on the text and the parameters alone. Each row is padded to a length of its own choice (`padded_length`),
whatever rows stand beside it; rows never see each other; the device gives a log-probability a token, and these are added here,
in float64 and in their order. So no batch size, no order of the requests and no mesh changes more than rounding.

Texts become ids as in lm-evaluation-harness (EleutherAI, 2021), so that its scores are met: see `Likelihood.encode_pair`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.adapters.compose import hidden_of_texts
from gptjax.config import Config, UserError
from gptjax.config.adapter import context_of, describe_context
from gptjax.config.objective import sees_prompt_both_ways, writing_part, writing_refusal
from gptjax.model import primitives
from gptjax.model.decoder import output_table
from gptjax.parallel import hosts
from gptjax.parallel.mesh import batch_shards, make_mesh
from gptjax.parallel.pipeline import num_micro_batches
from gptjax.parallel.sharding import batch_sharding, laid_over, replicated, use_rules
from gptjax.train.loss import token_log_probs
from gptjax.train.step import head_options

SHORTEST = 16  # tokens that a row is padded to at least
FEWEST = 2  # rows of a batch: XLA would multiply one alone in another order, and its last bits would differ


@dataclass(frozen=True)
class Scored:
    """What a model gives to a continuation."""

    log_probs: np.ndarray  # float32 [n], natural logarithms, of each of its tokens after all before it
    is_greedy: bool  # whether each of its tokens is the model's most probable one

    @functools.cached_property
    def total(self) -> float:
        """The log-probability of the whole, summed in float64."""
        return float(self.log_probs.sum(dtype=np.float64))


@dataclass(frozen=True)
class Row:
    """Ids [n] of which the last `scored` are predicted; `prefix` of the first see each other both ways (0: none)."""

    ids: np.ndarray
    scored: int
    prefix: int = 0

    @property
    def length(self) -> int:
        """Tokens that the model reads: the last one is only predicted."""
        return len(self.ids) - 1


class Likelihood:
    """A model that scores texts, `batch_size` rows at once.

    `model`: what `gptjax.load` gives. `prefix`: the text that stands before a text without a context; by default the tokenizer's
    begin-of-text token, or else its end-of-text token. `log` hears of contexts that were cut.
    Raises `UserError` for a model that does not go on with texts.
    """

    def __init__(
        self, model: Any, *, batch_size: int = 32, prefix: str | None = None, log: Callable[[str], None] | None = None
    ) -> None:
        if refusal := writing_refusal(model.config.objective):
            raise UserError(refusal)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1.")
        self.model, self.config, self.tokenizer = model, model.config, model.tokenizer
        self.batch_size, self._prefix, self.log = batch_size, prefix, log or (lambda text: None)
        part = writing_part(self.config.objective)
        self._both_ways = sees_prompt_both_ways(self.config.objective)
        paradigm = self.tokenizer.token_id(part.token) if part is not None and part.token else None
        self._paradigm = [] if paradigm is None else [paradigm]
        self.mesh = make_mesh(self.config.mesh)

    @property
    def max_length(self) -> int:
        """Tokens that a continuation may have at most, and a context that all of it is seen with."""
        return context_of(self.config)

    # --- text to ids --------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_bos: bool | None = None) -> np.ndarray:
        """int32 ids. Special tokens spelt out in the text are those tokens. The begin-of-text token stands in front where the
        model was trained so (`data.add_bos`), unless the text begins with it or `add_bos` is False.
        """
        ids = np.asarray(self.tokenizer.encode_special(text), np.int32)
        if add_bos is False:
            return ids
        bos = self.tokenizer.bos_id if self.config.data.add_bos else None
        front = [*self._paradigm] + ([bos] if bos is not None and not (len(ids) and ids[0] == bos) else [])
        return np.concatenate([np.array(front, np.int32), ids])

    def before_text(self) -> np.ndarray:
        """The ids that stand before a text without a context. Raises `UserError` where there are none."""
        if self._prefix is not None:
            return self._checked_prefix(self.encode(self._prefix, add_bos=False))
        known = [i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None]
        return self._checked_prefix(np.array([*self._paradigm, *known[:1]], np.int32))

    def _checked_prefix(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) == 0:
            raise UserError(
                f"the {self.tokenizer.kind} tokenizer has neither a begin-of-text nor an end-of-text token, so that the "
                "first token of a text without a context has nothing to be predicted from; say with prefix what stands before it."
            )
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the context, ids of the continuation).

        Blanks at the context's end go to the continuation, for most tokenizers join them to the next word. Both are encoded as
        one text, which is cut where the context, encoded alone, ends. Without a context, `before_text` stands there.
        Raises `UserError` where nothing is left of the continuation.
        """
        if context == "":
            ids, before = self.encode(continuation, add_bos=False), self.before_text()
            if len(ids) > 1 and ids[0] == before[-1]:
                before, ids = ids[:1], ids[1:]
        else:
            kept = context.rstrip()
            continuation = context[len(kept) :] + continuation
            before = self.encode(kept)
            ids = self.encode(kept + continuation)[len(before) :]
            if len(before) == 0:
                before = self.before_text()
        if len(ids) == 0:
            raise UserError(
                f"the continuation {continuation!r} has no token of its own behind {context[-40:]!r}: the tokenizer joins both."
            )
        return before, ids

    # --- scores -------------------------------------------------------------------------------------------------------------

    def of_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """What each (context, continuation) gets. A context that does not fit is cut from the left, as lm-evaluation-harness
        does. Raises `UserError` for a continuation longer than the model's context.
        """
        return self.of_ids([self.encode_pair(context, continuation) for context, continuation in pairs])

    def of_ids(self, pairs: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]) -> list[Scored]:
        """As `of_pairs`, of ids, neither empty."""
        rows = [self._row(np.asarray(context, np.int32), np.asarray(ids, np.int32)) for context, ids in pairs]
        cut = sum(len(row.ids) < len(context) + len(ids) for row, (context, ids) in zip(rows, pairs, strict=True))
        if cut:
            self.log(f"{cut} of {len(rows)} contexts were cut from the left to {describe_context(self.config)}.")
        return score_rows(self.config, self.model.params, rows, self.mesh, self.batch_size)

    def _row(self, context: np.ndarray, ids: np.ndarray) -> Row:
        if len(ids) > self.max_length:
            raise UserError(f"a continuation of {len(ids)} tokens is longer than {describe_context(self.config)}.")
        whole = np.concatenate([context, ids])[-(self.max_length + 1) :]
        return Row(whole, len(ids), len(whole) - len(ids) if self._both_ways else 0)

    def of_texts(self, texts: Sequence[str]) -> list[Scored]:
        """Every token of each text after all before it, the first one after `before_text`; a long text goes through windows,
        see `rolling_ids`. An empty text gets 0.
        """
        before = self.before_text()
        return self.rolling_ids([(before, self.encode(text, add_bos=False)) for text in texts])

    def rolling_ids(self, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Scored]:
        """As `of_texts`, of (ids before the text, ids of the text). Of a text longer than the model's context each token is
        predicted once: the windows do not overlap, but the last one reaches back as far as there is room.
        """
        windows = [list(_windows(before, ids, self.max_length)) for before, ids in texts]
        scored = iter(self.of_ids([window for own in windows for window in own]))
        joined = []
        for own in windows:
            parts = [next(scored) for _ in own]
            log_probs = np.concatenate([np.zeros(0, np.float32), *(part.log_probs for part in parts)])
            joined.append(Scored(log_probs, all(part.is_greedy for part in parts)))
        return joined


def _windows(before: np.ndarray, ids: np.ndarray, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(context, continuation) of which the continuations, joined, are `ids`."""
    before, ids = np.asarray(before, np.int32), np.asarray(ids, np.int32)
    room = longest + 1 - len(before)  # one more than the model reads: the last token is only predicted
    if room < 1:
        raise UserError(f"{len(before)} tokens before a text leave no room in model.max_seq_len={longest}.")
    if len(ids):
        yield before, ids[:room]
    for start in range(room, len(ids), longest):
        end = min(start + longest, len(ids))
        yield ids[max(0, end - longest - 1) : start], ids[start:end]


# --- rows through the model ---------------------------------------------------------------------------------------------------


def score_rows(config: Config, params: Any, rows: Sequence[Row], mesh: Mesh, batch_size: int) -> list[Scored]:
    """What each row's last tokens get, in the order of the rows; at most `batch_size` rows at once, rounded up to what the mesh
    divides. Raises `UserError` where a length does not divide over the mesh.
    """
    step, found = make_step(_scoring_config(config), mesh), [Scored(np.zeros(0, np.float32), True)] * len(rows)
    with use_rules(config.mesh):
        layout = batch_sharding(mesh)
    pending: Any = None
    for number, (members, length, count) in enumerate(_batches(config, rows, mesh, batch_size)):
        hosts.moved("likelihood batch", number, patience=10)  # the first one compiles
        batch = _padded([rows[member] for member in members], count, length)
        own = hosts.batch_rows(layout, count)
        result = step(params, hosts.place_batch(layout, {name: array[own] for name, array in batch.items()}, count))
        if pending is not None:  # the next batch is under way before this one is waited for
            _take(found, rows, *pending)
        pending = members, result
    if pending is not None:
        _take(found, rows, *pending)
    return found


def _take(found: list[Scored], rows: Sequence[Row], members: Sequence[int], result: tuple[jax.Array, jax.Array]) -> None:
    log_probs_BT, is_best_BT = (np.asarray(array) for array in result)
    for place, member in enumerate(members):
        row = rows[member]
        span = slice(row.length - row.scored, row.length)
        found[member] = Scored(log_probs_BT[place, span].copy(), bool(is_best_BT[place, span].all()))


def _scoring_config(config: Config) -> Config:
    """Without what a row's neighbours or padding would show in: experts drop no token, as when the model writes; and with the
    attention that suits a length, where training may have asked for one that takes only some.
    """
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto", expert_capacity_factor=0.0))


@functools.cache
def make_step(config: Config, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, batch of `_padded`) -> `token_log_probs`, jitted; the same arguments give the same function."""
    options: dict[str, Any] = head_options(config)

    def scores(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        with primitives.fixed_order():
            hidden_BTD = hidden_of_texts(config, params, batch["inputs"], batch.get("prefix"))
            return token_log_probs(hidden_BTD, output_table(params, config.model), batch["targets"], **options)

    step = jax.jit(scores, out_shardings=replicated(mesh))

    def run(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        with laid_over(mesh, config.mesh):
            return step(params, batch)

    return run


def padded_length(length: int, longest: int, multiple: int = 1) -> int:
    """What a row of `length` tokens is padded to: 16, 24, 32, 48, 64, ..., a multiple of `multiple`, `longest` at most. Padding
    takes a third of a row's work at most, but for the shortest.
    """
    step = SHORTEST
    while step < length:
        step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
    return min(-(-step // multiple) * multiple, longest)


def _batches(config: Config, rows: Sequence[Row], mesh: Mesh, batch_size: int) -> Iterator[tuple[list[int], int, int]]:
    """(numbers of the rows, their padded length, rows that the batch is filled up to), the longest first: what does not fit into
    memory shows at once.
    """
    context, longest = mesh.shape["context"], context_of(config)
    multiple = 2 * context if context > 1 else 1  # see parallel.mesh.check_divides
    if longest % multiple:
        raise UserError(f"model.max_seq_len={longest} does not divide over 2 * mesh.context={multiple}; change one of them.")
    parts = batch_shards(mesh) * num_micro_batches(config.mesh, mesh.shape["stage"])
    full = -(-max(batch_size, FEWEST) // parts) * parts
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(padded_length(row.length, longest, multiple), []).append(number)
    for length, numbers in sorted(by_length.items(), reverse=True):
        # A power of two where the first batch is not full, so that few rows need little work and few compilations.
        count = min(full, -(-max(FEWEST, 1 << (len(numbers) - 1).bit_length()) // parts) * parts)
        for start in range(0, len(numbers), count):
            yield numbers[start : start + count], length, count


def _padded(rows: Sequence[Row], count: int, length: int) -> dict[str, np.ndarray]:
    """Arrays [count, length]: `inputs` and `targets`, int32, 0 behind the rows; `prefix`, bool, where a row has one."""
    inputs, targets = (np.zeros((count, length), np.int32) for _ in range(2))
    for place, row in enumerate(rows):
        inputs[place, : row.length], targets[place, : row.length] = row.ids[:-1], row.ids[1:]
    batch: dict[str, np.ndarray] = {"inputs": inputs, "targets": targets}
    if any(row.prefix for row in rows):
        prefixes = np.array([row.prefix for row in rows] + [0] * (count - len(rows)))
        batch["prefix"] = np.arange(length) < prefixes[:, None]
    return batch
