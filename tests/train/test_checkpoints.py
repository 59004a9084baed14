import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from gptjax.config import CheckpointConfig, UserError
from gptjax.train import manifest
from gptjax.train.checkpoints import Checkpoints, CheckpointsDamaged, CheckpointsFailing


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_state(step=0, size=300):
    params = {
        "blocks": {
            "kernel": jnp.arange(size, dtype=jnp.float32).reshape(-1, 3) + step,
            "scale": jnp.full((4,), step, jnp.bfloat16),
        },
        "count": jnp.full((), step, jnp.int32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask={"kernel": True, "scale": False}))
    return State(jnp.int32(step), params, optimizer.init(params["blocks"]), jax.random.key(step))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip(tmp_path):
    lines = []
    with Checkpoints(tmp_path, CheckpointConfig(), lines.append) as checkpoints:
        assert checkpoints.last_saved_step is None
        assert checkpoints.restore(abstract(make_state())) is None
        checkpoints.save(7, make_state(7), {"data": {"step": 7}})
        checkpoints.wait()
        assert checkpoints.last_saved_step == 7
    restored = Checkpoints(tmp_path, CheckpointConfig(), lines.append).restore(abstract(make_state()))
    assert restored.step == 7 and restored.metadata == {"data": {"step": 7}}
    assert_same(restored.state, make_state(7))
