"""What the backward pass keeps of the decoder's scanned layers, by rematerialisation policy: bytes, analytic.

Pure arithmetic on the size tables; it is what jax hands from the forward to the backward pass, to the byte,
before any compiler has seen it.
"""

from __future__ import annotations

from vlmscale.attention import splash_block
from vlmscale.models.sizes import DecoderSize

_FLOAT32 = 4  # bytes of what norms and softmax keep, whatever the dtype of the computation


def layer_residual_bytes(
    size: DecoderSize,
    remat: str,
    attention: str,
    rows: int,
    length: int,
    itemsize: int,
    *,
    trained: bool = True,
) -> int:
    """Bytes that one layer leaves for its backward pass; all layers leave `num_layers` times as much.

    "block": the layer's input alone. "dots": also what its products with weights give, before biases, but for
    the last one, down, which no gradient reads. Neither the backend of attention nor whether weights train
    makes a difference to these two. "none": all that any gradient reads:

      both norms         in float32: input, two numbers a position, scale; trained: also the input scaled to 1
      qwen3              the same of each head's queries and keys
      products           the weights, if they were cast; trained: also the inputs
      attention, xla     queries, keys, values, probabilities; in float32: exponentials of all T x T scores,
                         two numbers a query and head
      attention, splash  queries, keys, values, result; in float32: one number a query and head. All of it of
                         a length padded to whole blocks
      MLP                five times its width: gate, up, and what lies between them and down

    Parameters themselves are not counted, nor what is kept once for all layers: positions and segments, and
    with "none" rotary angles and, of the backend "xla", the mask (a byte for each head's scores, and one
    float32 constant spread as wide).

    Args:
      size: of the decoder.
      remat: the policy, from `vlmscale.models.decoder.REMAT`.
      attention: the backend: "xla" or "splash".
      rows: B of one device.
      length: T, positions of a row.
      itemsize: bytes of a number in the computation's dtype, 4 of float32 or 2.
      trained: whether the decoder trains; if not, gradients only pass through it.
    """
    kv_width, q_width = size.num_kv_heads * size.head_dim, size.num_heads * size.head_dim
    if remat == "block":
        return rows * length * itemsize * size.width
    if remat == "dots":
        return rows * length * itemsize * (2 * size.width + q_width + 2 * kv_width + 2 * size.mlp_width)
    scaled = 1 + trained  # copies of a norm's input: as it came, and before the scale
    norms = 2 * (scaled * size.width + 2)
    scales = 2 * size.width
    if size.family == "qwen3":
        norms += scaled * (q_width + kv_width) + 2 * (size.num_heads + size.num_kv_heads)
        scales += 2 * size.head_dim
    hidden = 5 * size.mlp_width
    if trained:
        hidden += 2 * size.width + q_width + size.mlp_width
    layer = rows * length * (_FLOAT32 * norms + itemsize * hidden) + _FLOAT32 * scales
    if itemsize < _FLOAT32:
        layer += itemsize * (2 * size.width * (q_width + kv_width) + 3 * size.width * size.mlp_width)
    return layer + rows * _attention_bytes(size, attention, length, itemsize)


def _attention_bytes(size: DecoderSize, attention: str, length: int, itemsize: int) -> int:
    """What attention itself keeps of one row where nothing is computed again."""
    kv_width, q_width = size.num_kv_heads * size.head_dim, size.num_heads * size.head_dim
    if attention == "xla":
        per_head = (_FLOAT32 + itemsize) * length + 2 * _FLOAT32
        return length * (itemsize * (q_width + 2 * kv_width) + size.num_heads * per_head)
    if attention != "splash":
        raise ValueError(f"what attention {attention} keeps is not known: use xla or splash")
    block = splash_block(length)
    padded = -(-length // block) * block
    return padded * (itemsize * (2 * q_width + 2 * kv_width) + _FLOAT32 * size.num_heads)
