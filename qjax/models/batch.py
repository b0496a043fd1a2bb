"""`Batch`: the model's one input besides its weights and the KV cache.

A step's tokens lie in one row of length T = Bd + Tp: first one token for each of `Bd` decoding sequences, then
the `Tp` tokens of prefill chunks, sequence after sequence. Both parts are padded to the shapes of a bucket.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from qjax import sharding
from qjax.kernels.norm_rope_write import norm_rope_write
from qjax.kernels.paged_attention import paged_decode, paged_prefill


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeMetadata:
    """Sequences with one new token each. A padding row has context length 0."""

    page_table: jax.Array  # int32 [Bd, W] pages of each sequence in order; entries past its end are page 0
    context_lens: jax.Array  # int32 [Bd] tokens in the sequence, the new one included


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillMetadata:
    """Chunks of prompts. A padding row has an empty chunk."""

    page_table: jax.Array  # int32 [Bp, W]
    context_lens: jax.Array  # int32 [Bp] tokens in the sequence up to this chunk's end
    query_starts: (
        jax.Array
    )  # int32 [Bp + 1] chunk i has rows query_starts[i] to query_starts[i + 1] of the prefill part


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step of the engine: where each token stands and where its keys and values are."""

    token_ids: jax.Array  # int32 [T]
    positions: jax.Array  # int32 [T]
    slots: jax.Array  # int32 [T] page * S + offset where the token's K and V are written; -1: nowhere
    decode: DecodeMetadata | None  # None where Bd = 0
    prefill: PrefillMetadata | None  # None where Tp = 0

    implementation: ClassVar[str | None] = None  # of the model's kernels: the fastest here

    @property
    def is_token(self) -> jax.Array:
        """bool [T]; False: padding."""
        return self.slots >= 0

    def after_routing(self, probs: jax.Array, experts: jax.Array, cache: jax.Array) -> jax.Array:
        """The cache: what a router decided matters in training only."""
        return cache

    def attend(
        self,
        parts: jax.Array,
        norms: tuple[jax.Array, jax.Array] | None,
        eps: float,
        rope: tuple[jax.Array, jax.Array],
        cache: jax.Array,
        layer: jax.Array | int,
        *,
        dtype: jnp.dtype,
        kv_scales: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Writes the step's keys and values into the cache, then attends to each token's sequence up to itself.

        Args:
          parts: [N, T, K, G + 2, H] that add up to the projection, of each KV head its queries, its key, its value;
            split on K.
          norms: weights [H] of the queries' and the keys' RMSNorm, `eps` its epsilon; None: the model has none.
          rope: cos and sin, float32 [T, H / 2].
          cache: [L, 2, P, K, S, H].
          layer: index into the cache's first axis.
          dtype: the model's, and the result's.
          kv_scales: float32 [2, K] of the layer's keys and values in an e4m3 cache; None: 1.
        Returns:
          ([T, K, G, H], cache). Rows of padding hold anything.
        """
        heads = ("tokens", "kv_heads", "heads_of_kv", "head_dim")

        def on_shard(parts, norms, rope, cache, slots, decode, prefill, scales):  # K: the device's own KV heads
            q, cache = norm_rope_write(cache, parts, norms, *rope, slots, scales, dtype=dtype, eps=eps, layer=layer)
            T, K, G, H = q.shape
            q = q.reshape(T, K * G, H)
            num_decode = 0 if decode is None else decode.context_lens.shape[0]
            out, options = [], {"layer": layer, "out_dtype": dtype}
            if decode is not None:
                tables = decode.page_table, decode.context_lens
                out.append(paged_decode(q[:num_decode], cache, *tables, scales, **options))
            if prefill is not None:
                tables = prefill.page_table, prefill.context_lens, prefill.query_starts
                out.append(paged_prefill(q[num_decode:], cache, *tables, scales, **options))
            return jnp.concatenate(out).reshape(T, K, G, H), cache

        on_shards = sharding.per_shard(
            on_shard,
            in_axes=(
                *(("parts", *heads), None, None, sharding.KV_CACHE_AXES, None, None, None),
                None if kv_scales is None else sharding.KV_SCALES_AXES,
            ),
            out_axes=(heads, sharding.KV_CACHE_AXES),
        )
        return on_shards(parts, norms, rope, cache, self.slots, self.decode, self.prefill, kv_scales)
