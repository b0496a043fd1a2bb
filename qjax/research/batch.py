"""`PackedBatch`: training's input of the model. Rows of several documents each, attended to densely: no cache.

The model wants one row of T tokens, so the rows [B, L] lie one after the other, T = B * L.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qjax import sharding
from qjax.kernels.elementwise import norm_and_rotate, sum_parts
from qjax.research.attention import block_causal_mask, dense_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterSums:
    """What the load-balancing loss needs of all routers together; padding does not count."""

    chosen: jax.Array  # float32 [E] assignments to each expert
    probs: jax.Array  # float32 [E] sums of the router's probabilities
    rows: jax.Array  # float32 tokens, each counted once a sparse layer

    @classmethod
    def zeros(cls, num_experts: int) -> "RouterSums":
        return cls(jnp.zeros(num_experts), jnp.zeros(num_experts), jnp.zeros(()))

    @property
    def loss(self) -> jax.Array:
        """Least where all experts are chosen equally often: equations 4 to 6 of Fedus et al. 2021, "Switch
        Transformers" (arXiv:2101.03961), over all layers together and times k, as transformers computes it."""
        rows = jnp.maximum(self.rows, 1.0)
        return len(self.chosen) * jnp.sum(self.chosen / rows * (self.probs / rows))


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

    @property
    def is_token(self) -> jax.Array:
        """bool [T]; False: padding."""
        return self.segment_ids > 0

    def after_routing(self, probs: jax.Array, experts: jax.Array, cache: "RouterSums | None") -> "RouterSums | None":
        """The sums over layers with this layer's routing added; None: nobody asked for them."""
        if cache is None:
            return None
        real = self.is_token.astype(jnp.float32)
        is_chosen = experts[:, :, None] == jnp.arange(probs.shape[1])  # [T, k, E]
        chosen = jnp.sum(is_chosen * real[:, None, None], axis=(0, 1))
        return RouterSums(
            cache.chosen + chosen, cache.probs + jnp.sum(real[:, None] * probs, axis=0), cache.rows + jnp.sum(real)
        )

    def attend(
        self,
        parts: jax.Array,
        norms: tuple[jax.Array, jax.Array] | None,
        eps: float,
        rope: tuple[jax.Array, jax.Array],
        cache: Any,
        layer: jax.Array | int,
        *,
        dtype: jnp.dtype,
        kv_scales: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Attention inside each document, in `dtype`; what has to do with a cache is the engine's matter.

        Args:
          parts: [N, T, K, G + 2, H], T split over data and K over tensor parallelism; norms, eps and rope: see `Batch`.
        Returns:
          ([T, K, G, H], cache).
        """
        del layer, kv_scales
        q, k, v = norm_and_rotate(sum_parts(parts, dtype), norms, eps, *rope)
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
