"""Loss over a whole split, the same for any batch size."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, UserError
from gptjax.data.pipeline import Dataset, Split, eval_batches
from gptjax.model.decoder import output_table
from gptjax.parallel import hosts
from gptjax.parallel.mesh import check_divides
from gptjax.parallel.sharding import batch_sharding, laid_over, replicated, use_rules
from gptjax.train.loss import row_nll
from gptjax.train.objectives import OBJECTIVES
from gptjax.train.step import hidden_states


def _sums(config: Config, params: Any, token_bytes: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """(nats, targets, UTF-8 bytes of the targets), each [B] in float32: a row's sum does not depend on the rows beside it."""
    example = OBJECTIVES[config.objective.name](batch)
    nats = row_nll(
        hidden_states(config, params, example)[0],
        output_table(params, config.model),
        example.targets,
        example.weights,
        transposed=config.model.tied_embeddings,
        chunk=config.objective.loss_chunk,
        dtype=jnp.dtype(config.model.dtype),
    )
    return nats, example.weights.sum(-1), (example.weights * token_bytes[example.targets]).sum(-1)


@functools.cache
def make_eval_step(config: Config, mesh: Mesh) -> Callable[..., tuple[jax.Array, ...]]:
    """(params, token_bytes [V], batch) -> the sums of `_sums`, jitted; the same arguments give the same function."""
    step = jax.jit(functools.partial(_sums, config), out_shardings=replicated(mesh))

    def run(params: Any, token_bytes: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        with laid_over(mesh, config.mesh):
            return step(params, token_bytes, batch)

    run.compiled = step  # type: ignore[attr-defined]
    return run


def token_byte_counts(config: Config, dataset: Dataset) -> np.ndarray:
    """[V] float32: bytes of text that each id stands for; ids beyond the tokenizer's stand for none."""
    counts = np.zeros(config.model.vocab_size, np.float32)
    own = dataset.tokenizer.token_bytes()
    counts[: len(own)] = own
    return counts


def evaluate(config: Config, params: Any, dataset: Dataset, mesh: Mesh, max_batches: int = 0) -> dict[str, float | int]:
    """{"loss" (nats a target), "perplexity", "bits_per_byte", "tokens", "bytes"} of `dataset.eval`; max_batches=0: the whole
    split. `tokens` are those that are predicted, and `bytes` the text that they stand for; there are bits per byte only where
    each byte of a text is predicted from those before it. Of a mixture, these
    are over the targets of all sources' splits together, whatever the weights, and SOURCE/loss and so on are each source's own;
    max_batches is then of each source.

    Rows are summed on the device in float32 and added here in float64, always in the order of the split.
    """
    check_divides(config, mesh)
    if isinstance(dataset.eval, Split):
        return _figures(config, _totals(config, params, dataset, dataset.eval, mesh, max_batches))
    totals = {name: _totals(config, params, dataset, split, mesh, max_batches) for name, split in dataset.eval.items()}
    figures = _figures(config, np.sum(list(totals.values()), axis=0))
    for source, own in totals.items():
        figures |= {
            f"{source}/{name}": value for name, value in _figures(config, own, f"the evaluation split of {source}").items()
        }
    return figures


def _totals(config: Config, params: Any, dataset: Dataset, split: Split, mesh: Mesh, max_batches: int) -> np.ndarray:
    """float64 [3]: the sums of `_sums` over a split."""
    rows = config.evaluate.batch_size or config.data.batch_size // config.train.accumulation_steps
    step = make_eval_step(config, mesh)
    with use_rules(config.mesh):
        layout = batch_sharding(mesh)
    token_bytes = jax.device_put(token_byte_counts(config, dataset), replicated(mesh))
    batches = eval_batches(config, split, rows, hosts.batch_rows(layout, rows))
    totals = np.zeros(3)
    pending: Any = None
    for number, batch in enumerate(itertools.islice(batches, max_batches or None)):
        hosts.moved("evaluation batch", number, patience=10)  # the first one compiles
        sums = step(params, token_bytes, hosts.place_batch(layout, batch, rows))
        if pending is not None:  # the next batch is under way before these are waited for
            totals += [np.sum(np.asarray(column), dtype=np.float64) for column in pending]
        pending = sums
    if pending is not None:
        totals += [np.sum(np.asarray(column), dtype=np.float64) for column in pending]
    return totals


def _figures(config: Config, totals: np.ndarray, what: str = "the evaluation split") -> dict[str, float | int]:
    nats, tokens, text_bytes = totals.tolist()
    if tokens == 0:
        raise UserError(f"{what} has no token to predict; give it more text.")
    loss = nats / tokens
    in_order = config.objective.name in ("causal", "prefix")
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        **({"bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.nan} if in_order else {}),
        "tokens": int(tokens),
        "bytes": int(text_bytes),
    }


def by_source(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{source: its loss, perplexity, bits_per_byte, tokens} of what `evaluate` gave; {} where there is no mixture."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in figures.items():
        source, slash, name = key.partition("/")
        if slash and name != "bytes":
            found.setdefault(source, {})[name] = value
    return found
