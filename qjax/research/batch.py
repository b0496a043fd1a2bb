"""`PackedBatch`: training's input of the model. Rows of several documents each, attended to densely: no cache.

The model wants one row of T tokens, so the rows [B, L] lie one after the other, T = B * L.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from qjax import sharding
from qjax.kernels.elementwise import norm_and_rotate, sum_parts
from qjax.research.attention import block_causal_mask, dense_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """Documents packed into rows of equal length. A token sees the tokens of its document up to itself."""

    token_ids: jax.Array  # int32 [T]
    positions: jax.Array  # int32 [T] from 0 in each document
    segment_ids: jax.Array  # int32 [T] number of the document in its row, from 1; 0: padding
    row_length: int = field(metadata={"static": True})  # L
    attention: str = field(default="xla", metadata={"static": True})  # "xla" or "cudnn"
    implementation: ClassVar[str | None] = "reference"  # of the model's kernels: what has gradients

    def attend(
        self,
        parts: jax.Array,
        norms: tuple[jax.Array, jax.Array] | None,
        eps: float,
        rope: tuple[jax.Array, jax.Array],
        cache: Any,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, Any]:
        """Attention inside each document; `cache` and `layer` are the engine's matter and passed through.

        Args:
          parts: [N, T, K, G + 2, H], T split over data and K over tensor parallelism; norms, eps and rope: see `Batch`.
        Returns:
          ([T, K, G, H], cache).
        """
        q, k, v = norm_and_rotate(sum_parts(parts, parts.dtype), norms, eps, *rope)
        L = self.row_length

        def on_shard(q, k, v, segment_ids):  # the device's own rows and KV heads
            T, K, G, H = q.shape
            mask = block_causal_mask(segment_ids.reshape(T // L, L))
            out = dense_attention(
                q.reshape(T // L, L, K * G, H),
                k.reshape(T // L, L, K, H),
                v.reshape(T // L, L, K, H),
                mask,
                self.attention,
            )
            return out.reshape(T, K, G, H)

        tokens = ("rows", "kv_heads", "head_dim")
        queries = ("rows", "kv_heads", "heads_of_kv", "head_dim")
        on_shards = sharding.per_shard(
            lambda *args: (on_shard(*args),), in_axes=(queries, tokens, tokens, ("rows",)), out_axes=(queries,)
        )
        return on_shards(q, k, v, self.segment_ids)[0], cache
