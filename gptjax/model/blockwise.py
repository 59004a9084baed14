"""Placeholder until blockwise attention lands."""
from gptjax.model import attention


def blockwise_attention(q, k, v, *, segment_ids_BT=None):
    return attention.masked_attention(q, k, v, attention.causal_mask(q.shape[1], segment_ids_BT))
