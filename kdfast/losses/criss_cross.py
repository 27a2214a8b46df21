"""Criss-cross attention (Huang et al., CCNet), one of the non-local types of structured distillation."""

from __future__ import annotations

from torch import Tensor

from ..ops.criss_cross import criss_cross
from ._common import check_float, describe


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of every position over its own row and column: H + W - 1 cells, its own counted once.

    ``out[b, :, h, w] = sum_q softmax_q(<query[b, :, h, w], key[b, :, q]>) value[b, :, q]``, q in row h or column w,
    without a scale (CCNet). The scores [B, H, W, H + W] never exist as a tensor, forward or backward.

    Args:
        query, key: [B, d, H, W]; value: [B, e, H, W]. One type (float32, float64, float16 or bfloat16) and one device,
            any strides (contiguous and channels_last are read in place).

    Returns:
        [B, e, H, W] of the type of ``value``; sums run in float32 (float64 for float64), large scores are safe.
        Differentiable in the three inputs, twice too.

    Raises:
        TypeError: an input is no floating point tensor.
        ValueError: shapes, types or devices that do not fit.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_float(name, x)
        if x.dim() != 4 or x.shape[1] == 0:
            raise ValueError(f"{name}: need [B, channels, H, W] with at least one channel, got {describe(x)}")
    got = f"got query {describe(query)}, key {describe(key)}, value {describe(value)}"
    if query.shape != key.shape:
        raise ValueError(f"query and key need one shape [B, d, H, W], {got}")
    if value.shape[0] != query.shape[0] or value.shape[2:] != query.shape[2:]:
        raise ValueError(f"value needs the B, H and W of query, {got}")
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        raise ValueError(f"query, key and value need one type and one device, {got}")
    return criss_cross(query, key, value)
