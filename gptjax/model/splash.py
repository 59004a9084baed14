"""Splash attention, the Pallas kernel for TPUs that JAX ships; a CPU interprets it, slowly. Axis letters: see decoder.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import primitives
from gptjax.model.context import Shared, from_zigzag, gather, own_places, to_zigzag


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Causal attention of arrays that one device holds, [B, T, N, H]; arguments as `blockwise_attention`. 128 divides T."""
    kernel = _kernel(q_BTNH.shape[1], np.arange(q_BTNH.shape[1]), q_BTNH.shape[2], window, softcap)
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return _run(kernel, q_BTNH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BT, scale)


def splash_context_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    shared: Shared,
    *,
    segment_ids_BT: jax.Array | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """As `context_attention`, inside `jax.shard_map`: this device's queries in zig-zag order against all keys."""
    chunks = np.arange(shared.length).reshape(2 * shared.parts, shared.chunk)
    places_T = np.concatenate([chunks[[r, -1 - r]].reshape(-1) for r in range(shared.parts)])
    whole = _kernel(shared.length, places_T, q_BTNH.shape[2], window, softcap, shared.parts)

    # The backward pass gathers again what it needs; the rest that is kept grows with this device's share alone.
    @functools.partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    def attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        # Gathered last, just as the kernel takes them: a copy in another order would be kept.
        k_BKSH, v_BKSH = (gather(x.swapaxes(1, 2), shared, 2) for x in (k_BTKH, v_BTKH))
        segments_BS = None if segment_ids_BT is None else gather(segment_ids_BT, shared, 1)
        segments_BT = None if segments_BS is None else segments_BS[:, own_places(shared)]
        kernel = _own_part(whole, shared)
        out_BTNH = _run(kernel, to_zigzag(q_BTNH, shared), k_BKSH, v_BKSH, segments_BT, segments_BS, scale)
        return from_zigzag(out_BTNH, shared)

    return attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _kernel(length: int, places_T: np.ndarray, heads: int, window: int, softcap: float, parts: int = 1) -> Any:
    """For queries at these places of a row, in this order, and all its keys; `parts` devices take equal shares of the queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    shape = (length, length)
    one = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0) if window else splash_attention_mask.CausalMask(shape)
    one.q_sequence = places_T.astype(np.int32)
    mask = splash_attention_mask.MultiHeadMask([one] * heads)
    q_block = _block(length // (2 * parts) if parts > 1 and length // parts % 256 == 0 else length // parts)
    k_block = _block(length)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_q_dq=q_block,
        block_kv_dq=k_block,
    )
    return splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None,
        interpret=primitives.platform() == "cpu",
    )


def _block(length: int) -> int:
    """Large blocks keep the matrix unit busy; 512 x 512 scores in float32 take 1 MiB of some 16 MiB of a core's memory."""
    return next(size for size in (512, 384, 256, 128) if length % size == 0)


def _own_part(kernel: Any, shared: Shared) -> Any:
    """The kernel of this device's queries: what it knows of the mask, block by block, is laid out [heads, queries, keys]."""
    device = jax.lax.axis_index(shared.axis)

    def part(x: Any, axis: int) -> Any:
        if x is None:
            return None
        size = x.shape[axis] // shared.parts
        return jax.lax.dynamic_slice_in_dim(x, device * size, size, axis)

    def of(info: Any) -> Any:
        by_block = {name: part(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(**by_block, q_sequence=part(info.q_sequence, 0))

    infos = (of(info) for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return type(kernel)(*infos, **kernel.kwargs)


def _run(kernel: Any, q_BTNH: Any, k_BKSH: Any, v_BKSH: Any, segments_BT: Any, segments_BS: Any, scale: Any) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    q_BNTH = q_BTNH.swapaxes(1, 2) * jnp.asarray(scale, q_BTNH.dtype)  # the kernel does not scale
    segments = None if segments_BT is None else splash_attention_kernel.SegmentIds(segments_BT, segments_BS)
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments).swapaxes(1, 2)
