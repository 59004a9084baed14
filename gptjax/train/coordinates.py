"""The coordinate check: how the sizes of activations follow the width (Yang et al., 2022, "Tensor Programs V", appendix D.1).

The same recipe is trained for a few steps at several widths. Of each activation its scale, the mean absolute value over the rows
of one batch, is taken before the first step and after each; also of its change since initialisation. Under muP neither depends on
the width once it is large, so that log(scale) against log(width) has slope 0. All are judged but three, which are given only:

- the scale of logits: initial ones sum up independent terms over the width, and shrink as 1 / sqrt(width) by design;
- the change of logits after the first step, of which a good part is that of those sums; later it is not;
- the change of scores: a step along the sign of a gradient also turns queries and keys by chance overlaps of inputs, beside
  those that learn; that part shrinks as 1 / sqrt(width) and is not small at width 64 (slopes of -0.13 to -0.09 were measured).

Scores are q . k, scaled, over the pairs that a causal query sees, before rotary positions turn the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, ModelConfig, UserError, layer_configs
from gptjax.data.pipeline import Mixture, Split, train_batches
from gptjax.model.block import Block
from gptjax.model.decoder import Decoder, logits, output_table
from gptjax.model.embedding import Embedding
from gptjax.model.parameterization import query_multiplier
from gptjax.model.positions import angles_by_base, angles_key
from gptjax.model.rows import Rows
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.objectives import OBJECTIVES, Example
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step

TOLERANCE = 0.1
ROWS = 8  # of the batch, whose activations are measured

# {quantity: its mean absolute value}; a quantity of the blocks is named with its layer, "residual.0".
Scales = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Slope:
    """One quantity after one step, over the widths."""

    quantity: str
    measure: str  # "scale" or "change": of the activation, or of its difference from the one at initialisation
    step: int
    values: tuple[float, ...]  # geometric mean over seeds, width by width
    slope: float  # of log(value) over log(width), by least squares
    judged: bool

    @property
    def passes(self) -> bool:
        """NaN, from values that are 0 or not finite, does not."""
        return abs(self.slope) <= TOLERANCE


def at_width(config: Config, width: int) -> Config:
    """The recipe with model.model_dim=width: heads of the same size, as many as fit, and MLP and experts in proportion.

    Raises `UserError` where one of them would not be whole.
    """
    model = config.model

    def scaled(name: str) -> int:
        size, rest = divmod(getattr(model, name) * width, model.model_dim)
        if rest or (not size and getattr(model, name)):
            raise UserError(
                f"--widths: at width {width} model.{name} would be {getattr(model, name) * width / model.model_dim:g}; it is "
                f"{getattr(model, name)} at the recipe's model.model_dim={model.model_dim}, and grows in proportion."
            )
        return size

    names = ("num_heads", "num_kv_heads", "mlp_dim", "expert_mlp_dim")
    sizes: dict[str, Any] = {name: scaled(name) for name in names}
    return dataclasses.replace(config, model=dataclasses.replace(model, model_dim=width, **sizes))


def measure(config: Config, split: Split | Mixture, steps: int, seeds: Sequence[int]) -> list[list[dict[str, Scales]]]:
    """[seed][step 0 .. steps]{"scale" | "change": Scales} of one width.

    Each step takes a batch of the split, at the recipe's peak learning rate without warm-up, so that one step shows what it does;
    dropout is as in the recipe while training, and off while measuring. `config` has its vocabulary's size.
    """
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="none"),
        optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0, warmup_tokens=0, warmup_epochs=0.0),
    )
    mesh, lengths = make_mesh(config.mesh, jax.devices()[:1]), Lengths(total=steps, warmup=0, decay=steps)
    train_step, observe = make_train_step(config, lengths, mesh), _observer(config, mesh)
    found = []
    for seed in seeds:
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        batches: Iterator[Any] = train_batches(seeded, split)
        state = init_state(seeded, lengths, mesh)
        first = next(batches)
        rows = {name: array[:ROWS] for name, array in first.items()}
        initial = observe(state.params, rows)
        rounds = [{"scale": _scales(initial)}]
        for step in range(steps):
            state, _ = train_step(state, next(batches) if step else first)
            now = observe(state.params, rows)
            rounds.append({"scale": _scales(now), "change": _scales({name: now[name] - initial[name] for name in now})})
        found.append(rounds)
    return found


def _observer(config: Config, mesh: Mesh) -> Callable[[Any, Any], dict[str, np.ndarray]]:
    """(params, batch) -> `activations`."""
    observe = jax.jit(lambda params, batch: activations(config, params, OBJECTIVES[config.objective.name](batch)))

    def run(params: Any, batch: Any) -> dict[str, np.ndarray]:
        with laid_over(mesh, config.mesh):
            return jax.device_get(observe(params, batch))

    return run


def _scales(arrays: dict[str, np.ndarray]) -> Scales:
    return {name: float(np.abs(array).mean(dtype=np.float64)) for name, array in arrays.items()}


def activations(config: Config, params: Any, example: Example) -> dict[str, jax.Array]:
    """{"embedding", "attention.0", "mlp.0", "residual.0", "scores.0", ..., "logits"}: float32 arrays."""
    model, kinds = config.model, layer_configs(config.model)
    segment_ids_BT = example.segment_ids if config.data.packing != "windows" else None
    rows = Rows(example.positions, None, segment_ids_BT, example.prefix, None)
    angles = angles_by_base(example.positions, kinds)
    x_BTD: Any = Embedding(model).apply({"params": params["embed"]}, example.inputs, example.positions)
    named = {"embedding": x_BTD}
    for layer in range(model.num_layers):
        kind = kinds[layer % len(kinds)]
        own = {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])}
        how: Any = {"capture_intermediates": lambda module, method: method == "__call__", "mutable": ["intermediates"]}
        found: Any = Block(kind).apply(own, x_BTD, rows._replace(angles=angles.get(angles_key(kind))), layer, None, **how)
        (x_BTD, _), captured = found
        inside = captured["intermediates"]
        named |= {
            f"attention.{layer}": _output(inside["attention"]),
            f"mlp.{layer}": _output(inside["experts" if model.num_experts else "mlp"]),
            f"residual.{layer}": x_BTD,
        }
        if model.attention_kind == "multi_head" and model.attention_score == "scaled_dot":
            named[f"scores.{layer}"] = _scores(model, inside["attention"])
    hidden_BTD: Any = Decoder(model).apply({"params": params}, x_BTD, method=Decoder.out)
    named["logits"] = logits(hidden_BTD, output_table(params, model), model)
    return {name: value.astype(jnp.float32) for name, value in named.items()}


def _output(captured: Any) -> jax.Array:
    """What a module returned; the first of several things."""
    (output,) = captured["__call__"]
    return output[0] if isinstance(output, tuple) else output


def _scores(c: ModelConfig, captured: Any) -> jax.Array:
    """[B, N, T, S]; 0 where a query does not see the key."""
    query, key = ("query_norm", "key_norm") if c.query_key_norm else ("query", "key")
    q_BTNH, k_BSKH = _output(captured[query]), _output(captured[key])
    k_BSNH = jnp.repeat(k_BSKH, c.num_heads // c.num_kv_heads, axis=2)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    return jnp.tril(scores_BNTS) * (query_multiplier(c) / math.sqrt(c.head_dim))


def slopes(widths: Sequence[int], found: Sequence[list[list[dict[str, Scales]]]]) -> list[Slope]:
    """Of each quantity, measure and step; `found` has what `measure` gave, width by width."""
    lines = []
    for step, measures in enumerate(found[0][0]):
        for measure, quantities in measures.items():
            for quantity in quantities:
                by_width = [[seed[step][measure][quantity] for seed in of_width] for of_width in found]
                with np.errstate(divide="ignore", invalid="ignore"):
                    values = tuple(float(np.exp(np.mean(np.log(seeds)))) for seeds in by_width)
                lines.append(Slope(quantity, measure, step, values, slope(widths, values), _judged(quantity, measure, step)))
    return lines


def _judged(quantity: str, measure: str, step: int) -> bool:
    if quantity == "logits":
        return measure == "change" and step >= 2
    return measure == "scale" or not quantity.startswith("scores")


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log(value) over log(width), by least squares; NaN where a value is not above 0 and finite."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        return math.nan
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])
