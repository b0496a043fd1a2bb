"""The jitted step: page-table updates → model → sampler, and the one packed array it takes from the host.

Everything that changes from step to step crosses to the device as ONE int32 array; `Layout` says where each field
lies in it, for the host (numpy views) and for the device (slices) alike.
"""

import functools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from qjax.engine.buckets import Bucket
from qjax.engine.sampler import (
    PenaltyBatch,
    SamplingBatch,
    apply_logit_edits,
    apply_mask,
    apply_penalties,
    greedy,
    logprobs_of,
    sample,
)
from qjax.models.batch import Batch, DecodeMetadata, PrefillMetadata
from qjax.models.qwen3 import merge

PROMPT_LOGPROBS_BLOCK = 128  # prompt rows whose logits exist at a time


@dataclass(frozen=True)
class StepOptions:
    """What a compiled step can do besides the greedy choice. Static: each combination is a compilation."""

    sampling: bool = False  # some row has a temperature
    filtering: bool = False  # and some row has top_k or top_p
    few: bool = False  # and all of these rows have a small top_k
    penalties: bool = False
    num_edits: int = 0  # M: logit edits a row (bias, allowed and banned tokens)
    masked: bool = False  # some row obeys a grammar
    num_logprobs: int | None = None  # likeliest tokens returned a row; None: no logprobs at all
    num_prompt_logprobs: int | None = None
    pooling: bool = False  # the step gives hidden states; nothing is sampled
    num_steps: int = 1  # decode steps one after the other; more than one only with what is above `penalties`

    def covers(self, other: "StepOptions") -> bool:
        """Whether a step with these options gives what one with the `other` ones does: it samples more ways."""
        is_same_otherwise = replace(other, sampling=self.sampling, filtering=self.filtering, few=self.few) == self
        is_drawn = self.filtering >= other.filtering and self.few <= other.few
        return is_same_otherwise and self.sampling >= other.sampling and (is_drawn or not other.sampling)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What the device remembers of each running request. The last row belongs to no request: padding goes there."""

    last_tokens: jax.Array  # int32 [slots + 1] the token sampled last, which the host may not know yet
    page_table: jax.Array  # int32 [slots + 1, pages of the longest sequence]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenCounts:
    """For penalties: what each running request has in its prompt and in its output."""

    output: jax.Array  # int16 [slots + 1, V]
    prompt: jax.Array  # bool [slots + 1, V]


class Layout:
    """Names, offsets and shapes of the fields in the packed int32 array of a step."""

    def __init__(self, bucket: Bucket, options: StepOptions, page_size: int, vocab_size: int):
        rows = bucket.num_rows
        # Room for one new page a decode row and for the prompt's own pages; what is more goes ahead of the step.
        self.num_updates = bucket.num_decodes + bucket.num_tokens // page_size + 2 * bucket.num_prefills
        fields: dict[str, tuple[tuple[int, ...], type]] = {
            "decode_slots": ((bucket.num_decodes,), np.int32),
            "decode_lens": ((bucket.num_decodes,), np.int32),
            "token_ids": ((bucket.num_tokens,), np.int32),
            "prefill_slots": ((bucket.num_prefills,), np.int32),
            "prefill_lens": ((bucket.num_prefills,), np.int32),
            "query_starts": ((bucket.num_prefills + 1,), np.int32),
            "table_updates": ((self.num_updates, 3), np.int32),  # row, column, page
            "sample_slots": ((rows,), np.int32),  # where the sampled token is remembered
        }
        if options.sampling:
            fields |= dict.fromkeys(("temperature", "min_p"), ((rows,), np.float32))
            fields["seeds"] = ((rows, 2), np.uint32)
        if options.filtering:
            fields |= {"top_p": ((rows,), np.float32), "top_k": ((rows,), np.int32)}
        if options.penalties:
            fields |= dict.fromkeys(("repetition", "presence", "frequency"), ((rows,), np.float32))
        if options.num_edits:
            fields["edit_ids"] = ((rows, options.num_edits), np.int32)
            fields["edit_values"] = ((rows, options.num_edits), np.float32)
            fields["only_listed"] = ((rows,), np.int32)
        if options.masked:
            fields["mask"] = ((rows, -(-vocab_size // 32)), np.int32)  # bit i % 32 of word i // 32: token i is allowed
        if options.num_prompt_logprobs is not None:
            fields["targets"] = ((bucket.num_tokens,), np.int32)
        self.fields: dict[str, tuple[int, tuple[int, ...], type]] = {}
        self.size = 0
        for name, (shape, dtype) in fields.items():
            self.fields[name] = (self.size, shape, dtype)
            self.size += math.prod(shape)
        self.size = max(1 << (self.size - 1).bit_length(), 1024)  # few sizes: each has a place on the device

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of the fields of a host array, int32 [size]."""
        return {
            name: packed[start : start + math.prod(shape)].view(dtype).reshape(shape)
            for name, (start, shape, dtype) in self.fields.items()
        }

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The fields of the device's array."""
        return {
            name: jax.lax.bitcast_convert_type(packed[start : start + math.prod(shape)], dtype).reshape(shape)
            for name, (start, shape, dtype) in self.fields.items()
        }


def step(
    modeldef, bucket: Bucket, options: StepOptions, page_size: int, leaves, kv, state: DeviceState, counts, packed
):
    """One step of the engine, traced once a bucket and option set.

    Args:
      modeldef, leaves: the model, split (`qjax.models.qwen3.split`).
      kv: [L, 2, P, K, S, H], donated.
      state, counts: donated; `counts` is None without penalties.
      packed: int32 [Layout.size].

    Returns:
      (kv, state, counts, out, prompt_out). `out` is int32 [R, num_steps] with the sampled tokens (-1: the row's
      logits are not numbers), and with logprobs [R, 3 + 2 N]: token, logprob (float bits), rank, N ids, N logprobs
      (float bits). `prompt_out` is None or int32 [Tp, 3 + 2 N] of the same form for the prompt's own next tokens. With
      pooling `out` is int32 [R, D]: the hidden states after the last norm (float32 bits).
    """
    model = merge(modeldef, leaves)
    meta = Layout(bucket, options, page_size, model.config.vocab_size).unpack(packed)
    num_slots = state.last_tokens.shape[0] - 1

    updates = meta["table_updates"]
    page_table = state.page_table.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")
    if options.num_steps > 1:
        run = functools.partial(_decode, model, meta, bucket, options, page_size, page_table)
        kv, last_tokens, out = run(kv, state.last_tokens)
        return kv, DeviceState(last_tokens, page_table), counts, out, None
    batch, sample_rows, lengths = _batch(meta, bucket, page_size, page_table, state.last_tokens)
    hidden, kv = model(batch, kv)
    if options.pooling:
        out = jax.lax.bitcast_convert_type(hidden[sample_rows].astype(jnp.float32), jnp.int32)
        return kv, DeviceState(state.last_tokens, page_table), counts, out, None

    logits = model.logits(hidden[sample_rows])  # float32 [R, V]
    raw = logits
    if options.penalties:
        penalties = PenaltyBatch(meta["repetition"], meta["presence"], meta["frequency"])
        rows = meta["sample_slots"]
        logits = apply_penalties(logits, counts.output[rows], counts.prompt[rows], penalties)
    if options.num_edits:
        logits = apply_logit_edits(logits, meta["edit_ids"], meta["edit_values"], meta["only_listed"] != 0)
    if options.masked:
        logits = apply_mask(logits, meta["mask"])
    tokens = _choose(logits, meta, lengths, options)
    slots = meta["sample_slots"]
    state = DeviceState(state.last_tokens.at[slots].set(jnp.maximum(tokens, 0)), page_table)
    if options.penalties:
        # Only the rows of requests count; a chunk that samples nothing has the padding slot.
        counted = jnp.where(slots < num_slots, 1, 0).astype(counts.output.dtype)
        counts = TokenCounts(counts.output.at[slots, jnp.maximum(tokens, 0)].add(counted), counts.prompt)
    out = tokens[:, None]
    if options.num_logprobs is not None:
        out = _pack_logprobs(raw, tokens, options.num_logprobs)
    prompt_out = None
    if options.num_prompt_logprobs is not None:
        prompt_out = _prompt_logprobs(model, hidden[bucket.num_decodes :], meta["targets"], options.num_prompt_logprobs)
    return kv, state, counts, out, prompt_out


def _choose(logits: jax.Array, meta, lengths: jax.Array, options: StepOptions) -> jax.Array:
    """int32 [R]: the next tokens."""
    if not options.sampling:
        return greedy(logits)
    params = SamplingBatch(
        temperature=meta["temperature"],
        top_k=meta.get("top_k"),
        top_p=meta.get("top_p"),
        min_p=meta["min_p"],
        seeds=meta["seeds"],
        counters=lengths,
    )
    return sample(logits, params, is_few=options.few)


def _decode(model, meta, bucket: Bucket, options: StepOptions, page_size: int, page_table, kv, last_tokens):
    """`num_steps` steps of decoding sequences whose pages are all there: (kv, last_tokens, tokens [R, num_steps])."""

    def one(i, carry):
        kv, last_tokens, out = carry
        lens = meta["decode_lens"]
        now = meta | {"decode_lens": jnp.where(lens > 0, lens + i, 0)}
        batch, rows, lengths = _batch(now, bucket, page_size, page_table, last_tokens)
        hidden, kv = model(batch, kv)
        tokens = _choose(model.logits(hidden[rows]), meta, lengths, options)
        last_tokens = last_tokens.at[meta["sample_slots"]].set(jnp.maximum(tokens, 0))
        return kv, last_tokens, out.at[:, i].set(tokens)

    out = jnp.zeros((bucket.num_rows, options.num_steps), jnp.int32)
    return jax.lax.fori_loop(0, options.num_steps, one, (kv, last_tokens, out))


def _batch(meta, bucket: Bucket, page_size: int, page_table, last_tokens):
    """The model's input, the rows that are sampled and their sequence lengths, from the packed fields."""
    width = bucket.num_pages

    def pages(slots, lens):  # [B, W]; entries past a sequence's end may be left over from the slot's last owner
        used = jnp.arange(width)[None, :] * page_size < lens[:, None]
        return jnp.where(used, page_table[slots, :width], 0)

    def kv_slots(pages_of_token, positions):
        return pages_of_token * page_size + positions % page_size

    tokens, positions, slots, rows, lengths = [], [], [], [], []
    decode = prefill = None
    if bucket.num_decodes:
        lens = meta["decode_lens"]
        decode = DecodeMetadata(pages(meta["decode_slots"], lens), lens)
        position = jnp.maximum(lens - 1, 0)
        page = jnp.take_along_axis(decode.page_table, (position // page_size)[:, None], axis=1)[:, 0]
        tokens.append(last_tokens[meta["decode_slots"]])
        positions.append(position)
        slots.append(jnp.where(lens > 0, kv_slots(page, position), -1))
        rows.append(jnp.arange(bucket.num_decodes))
        lengths.append(lens)
    if bucket.num_tokens:
        lens, starts = meta["prefill_lens"], meta["query_starts"]
        prefill = PrefillMetadata(pages(meta["prefill_slots"], lens), lens, starts)
        row = jnp.arange(bucket.num_tokens)
        chunk = jnp.sum(row[:, None] >= starts[None, 1:], axis=1)  # rows of padding come after the last
        chunk = jnp.minimum(chunk, bucket.num_prefills - 1)
        position = jnp.clip(lens[chunk] - starts[chunk + 1] + row, 0, width * page_size - 1)
        page = prefill.page_table[chunk, position // page_size]
        tokens.append(meta["token_ids"])
        positions.append(position)
        slots.append(jnp.where(row < starts[-1], kv_slots(page, position), -1))
        rows.append(bucket.num_decodes + jnp.maximum(starts[1:] - 1, 0))
        lengths.append(lens)
    join = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return Batch(join(tokens), join(positions), join(slots), decode, prefill), join(rows), join(lengths)


def _pack_logprobs(logits, tokens, num: int):
    """int32 [R, 3 + 2 num]; floats are carried as their bits."""
    logprob, rank, top_ids, top_logprobs = logprobs_of(logits, tokens, num)
    bits = lambda x: jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.concatenate(
        [tokens[:, None], bits(logprob)[:, None], rank[:, None], top_ids, bits(top_logprobs)], axis=1
    )


def _prompt_logprobs(model, hidden, targets, num: int):
    """Logprobs of the prompt's own next tokens, in blocks: the logits of a whole prompt would fill the memory."""
    size = math.gcd(PROMPT_LOGPROBS_BLOCK, hidden.shape[0])
    blocks = (hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size))
    packed = jax.lax.map(lambda block: _pack_logprobs(model.logits(block[0]), block[1], num), blocks)
    return packed.reshape(hidden.shape[0], -1)


@functools.partial(jax.jit, donate_argnums=0)
def write_page_table(state: DeviceState, updates: jax.Array) -> DeviceState:
    """Applies int32 [U, 3] (row, column, page) updates that do not fit a step's packed array."""
    page_table = state.page_table.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")
    return DeviceState(state.last_tokens, page_table)


@functools.partial(jax.jit, donate_argnums=0)
def write_counts(counts: TokenCounts, slot, prompt_ids: jax.Array, output_ids: jax.Array) -> TokenCounts:
    """Starts a request's penalty counts. Token id arrays are padded with ids past the vocabulary."""
    output = counts.output.at[slot].set(0).at[slot, output_ids].add(1, mode="drop")
    prompt = counts.prompt.at[slot].set(False).at[slot, prompt_ids].set(True, mode="drop")
    return TokenCounts(output, prompt)
