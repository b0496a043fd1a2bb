"""`Batch`: the model's one input besides its weights and the KV cache.

A step's tokens lie in one row of length T = Bd + Tp: first one token for each of `Bd` decoding sequences, then
the `Tp` tokens of prefill chunks, sequence after sequence. Both parts are padded to the shapes of a bucket.
"""

from dataclasses import dataclass

import jax


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
