"""From logits to token ids: penalties, bans, temperature, top-k, top-p, min-p, and logprobs. Pure jnp, inside the jit.

Three promises shape the code:

- *A row's token does not depend on its neighbours*, bit by bit. Sums decide which tokens top-p keeps, and the order
  of a float sum changes with the batch's shape; so probabilities are summed as integers, whose order is no matter.
- *No sort of the vocabulary.* The thresholds of top-k and top-p are found by bisection over the logits' bit
  patterns: 32 passes that only read. Where all rows have a small top_k, they read 2048 tokens instead of all.
- *NaN is an error, not token 0.* A row without a finite maximum gives token -1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

MAX_SCANNED_LOGPROBS = 32  # up to here one pass a rank beats a sort
MAX_FEW = 64  # top_k up to which only the likeliest blocks of tokens are looked at
BLOCK = 32  # tokens
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # beyond, z = logit / temperature could overflow or be 0 / 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingBatch:
    """Sampling options of R rows."""

    temperature: jax.Array  # float32 [R]; 0: greedy
    top_k: jax.Array | None  # int32 [R]; 0: off; None: off in all rows, which saves 32 passes
    top_p: jax.Array | None  # float32 [R]; 1: off; None likewise
    min_p: jax.Array  # float32 [R]; 0: off
    seeds: jax.Array  # uint32 [R, 2] high and low half of a 64-bit seed, see `split_seed`
    counters: jax.Array  # int32 [R] position of the token sampled: the number of tokens before it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PenaltyBatch:
    """Penalties of R rows; 1, 0, 0 are off."""

    repetition: jax.Array  # float32 [R]
    presence: jax.Array  # float32 [R]
    frequency: jax.Array  # float32 [R]


def split_seed(seed: int) -> tuple[int, int]:
    """High and low 32 bits of a 64-bit seed, negative ones in two's complement."""
    return (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF


def apply_penalties(
    logits: jax.Array, output_counts: jax.Array, prompt_mask: jax.Array, penalties: PenaltyBatch
) -> jax.Array:
    """Makes tokens that were seen less likely (repetition: Keskar et al., 2019, CTRL; the others: OpenAI's).

    Args:
      logits: float32 [R, V].
      output_counts: int [R, V] how often each token was generated.
      prompt_mask: bool [R, V] tokens of the prompt.
      penalties: repetition is over prompt and output: positive logits are divided by it, others multiplied.
        presence is subtracted once, frequency once for each time; both over the output.

    Returns:
      float32 [R, V].
    """
    generated = output_counts > 0
    repetition = penalties.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(prompt_mask | generated, repeated, logits)
    logits -= penalties.frequency[:, None] * output_counts.astype(logits.dtype)
    return logits - jnp.where(generated, penalties.presence[:, None], 0.0)


def apply_logit_edits(logits: jax.Array, ids: jax.Array, values: jax.Array, only_listed: jax.Array) -> jax.Array:
    """Adds a number to a few tokens' logits: bias, ban (-inf), and with `only_listed` the allowed tokens.

    Args:
      logits: float32 [R, V].
      ids: int32 [R, M] token ids of each row; -1 is padding.
      values: float32 [R, M] added to them; the values of an id given twice add up.
      only_listed: bool [R] ban every token that is not in the row's `ids`.

    Returns:
      float32 [R, V].
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    columns = jnp.where(ids < 0, logits.shape[1], ids)  # out of range, so dropped: -1 would be the last token
    listed = jnp.zeros(logits.shape, bool).at[rows, columns].set(True, mode="drop")
    logits = jnp.where(only_listed[:, None] & ~listed, -jnp.inf, logits)
    return logits.at[rows, columns].add(values, mode="drop")


def greedy(logits: jax.Array) -> jax.Array:
    """int32 [R]: the likeliest token of float32 [R, V] logits, the lowest id among equals; -1 for NaN."""
    # NaN counts as the largest, so the largest tells of it: the logits of a large batch are read once.
    tokens = jnp.argmax(logits, axis=-1)
    largest = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(largest), tokens, -1).astype(jnp.int32)


def apply_mask(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Bans the tokens whose bit is 0: `mask` is int32 [R, ceil(V / 32)], token i is bit i % 32 of word i // 32."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32) & 1  # [R, words, 32]
    return jnp.where(bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def sample(logits: jax.Array, batch: SamplingBatch, *, is_few: bool = False) -> jax.Array:
    """Samples a token for each row.

    Temperature, then min-p (Nguyen et al., 2024), then top-k (Fan et al., 2018), then top-p over what is left
    (Holtzman et al., 2019), in vLLM's order. Tokens as likely as the last one kept are kept too. Rows with
    temperature 0 are `greedy`, exactly.

    The draw is the Gumbel-max trick (Gumbel, 1954): argmax of logit / temperature + noise, with noise from a
    counter-based generator keyed by the row's seed and position: a seed gives the same text in any batch.

    Args:
      logits: float32 [R, V]; -inf is never sampled.
      batch: options of the R rows.
      is_few: static; every row with a temperature has a top_k of 1 to `MAX_FEW`. The same tokens in less time (among
        more than `MAX_FEW` blocks with an equal maximum, those of the lowest ids are looked at).

    Returns:
      int32 [R] token ids; -1 where the logits are NaN or +inf, or all -inf.
    """
    vocab_size = logits.shape[1]
    ids = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32), logits.shape)
    likely = logits
    if is_few and vocab_size > MAX_FEW * BLOCK:
        ids = _likely_ids(logits)
        likely = jnp.take_along_axis(logits, ids, axis=-1, mode="fill", fill_value=-jnp.inf)
    z, keep = kept_tokens(likely, batch, vocab_size, digit_bits=4 if is_few else 1)
    drawn = jnp.argmax(jnp.where(keep, z + _gumbel(batch.seeds, batch.counters, ids), -jnp.inf), axis=-1)
    drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    likeliest = greedy(logits)
    return jnp.where((batch.temperature > 0) & (likeliest >= 0), drawn, likeliest)


def kept_tokens(
    logits: jax.Array, batch: SamplingBatch, vocab_size: int | None = None, *, digit_bits: int = 1
) -> tuple[jax.Array, jax.Array]:
    """What `sample` draws from.

    Args:
      logits: float32 [R, n], of all tokens or of all that may be kept.
      vocab_size: V [n].
      digit_bits: see `_largest_threshold`.

    Returns:
      z float32 [R, n], logit / temperature less the row's largest, and keep bool [R, n], the tokens that can be
      drawn: in proportion to exp(z). Greedy rows keep all.
    """
    vocab_size = vocab_size or logits.shape[1]
    is_random = batch.temperature > 0
    temperature = jnp.where(is_random, jnp.clip(batch.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE), 1.0)
    z = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]  # [R, V], at most 0
    keep = z >= jnp.log(jnp.where(is_random, batch.min_p, 0.0))[:, None]

    # Whether a filter is needed is decided by the host (None): a `lax.cond` would make it wait for the device.
    keys = _sort_keys(logits)
    if batch.top_k is not None:
        top_k = jnp.where(is_random & (batch.top_k < vocab_size), batch.top_k, 0)
        keep &= keys >= _top_k_threshold(keys, top_k, digit_bits)[:, None]
    if batch.top_p is not None:
        top_p = jnp.where(is_random, batch.top_p, 1.0)
        keep &= keys >= _top_p_threshold(keys, z, keep, top_p, vocab_size, digit_bits)[:, None]
    return z, keep


def logprobs_of(logits: jax.Array, tokens: jax.Array, num: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of given tokens and of the likeliest ones.

    Args:
      logits: float32 [R, V], raw: before penalties, edits and temperature.
      tokens: int32 [R]; -1 is read as 0.
      num: how many of the likeliest tokens to return (static).

    Returns:
      token_logprob float32 [R]; rank int32 [R], 1 for the likeliest (tokens of equal logit share the best rank);
      top_ids int32 [R, num], likeliest first, lower ids first among equals; top_logprobs float32 [R, num].
    """
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [R, 1]
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)  # [R, 1]
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    top_ids = _top_ids(logits, num)
    top_logits = jnp.take_along_axis(logits, top_ids, axis=-1)
    return (chosen - normalizer)[:, 0], rank, top_ids, top_logits - normalizer


def _sort_keys(logits: jax.Array) -> jax.Array:
    """uint32 of the same order as the float32 logits (Herf, 2001): for non-negative ones set the sign bit, for
    negative ones flip all bits. -0 is made 0 first, as the two are equal."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


def _largest_threshold(is_enough, num_rows: int, digit_bits: int) -> jax.Array:
    """uint32 [R]: for each row the largest t with `is_enough(t)`, which must be true up to some t and false after.

    One digit a pass, from the highest. A fixed number of passes: a loop that may end early makes the host wait for the
    GPU at each turn. Larger digits are for few tokens, where a pass costs more than its questions.
    """

    def body(i, threshold):
        shift = (32 - digit_bits * (i + 1)).astype(jnp.uint32)
        answers = [is_enough(threshold | (jnp.uint32(digit) << shift)) for digit in range(1, 1 << digit_bits)]
        return threshold | (sum(answer.astype(jnp.uint32) for answer in answers) << shift)

    return lax.fori_loop(0, 32 // digit_bits, body, jnp.zeros((num_rows,), jnp.uint32))


def _top_k_threshold(keys: jax.Array, top_k: jax.Array, digit_bits: int) -> jax.Array:
    """uint32 [R]: the k-th largest of each row's keys; 0 where k is 0."""
    is_enough = lambda t: jnp.sum(keys >= t[:, None], axis=-1, dtype=jnp.int32) >= top_k
    return jnp.where(top_k > 0, _largest_threshold(is_enough, keys.shape[0], digit_bits), 0)


def _top_p_threshold(
    keys: jax.Array, z: jax.Array, keep: jax.Array, top_p: jax.Array, vocab_size: int, digit_bits: int
) -> jax.Array:
    """uint32 [R]: the key from which on the kept tokens have at least the share p of the kept probability.

    Probabilities are rounded to multiples of about 2**-32 of their sum, which stays below 2**32. The sum they are
    scaled by must not depend on the order of summation either, so it is taken of integers too, in two digits of 13
    bits: exact sums for V < 2**19, and short of the true one by V * 2**-26 at most, which is added.
    """
    weights = jnp.where(keep, jnp.exp(z), 0.0)  # [R, n]
    high = jnp.floor(weights * 2.0**13)
    low = jnp.floor((weights * 2.0**13 - high) * 2.0**13)
    add = lambda x: jnp.sum(x.astype(jnp.uint32), axis=-1).astype(jnp.float32)  # [R]
    bound = add(high) * 2.0**-13 + (add(low) + vocab_size) * 2.0**-26
    # Half a unit a token may be added by rounding, and float32 rounds the bound: 2**23 units are left for both.
    units = jnp.round(weights * ((2.0**32 - 2.0**23) / bound)[:, None]).astype(jnp.uint32)
    mass = jnp.sum(units, axis=-1)  # uint32 [R]
    # As float32 the mass may round up a little: all of it is always enough, else no threshold would do.
    wanted = jnp.minimum((mass.astype(jnp.float32) * top_p).astype(jnp.uint32), mass)
    is_enough = lambda t: jnp.sum(jnp.where(keys >= t[:, None], units, 0), axis=-1) >= jnp.maximum(wanted, 1)
    return jnp.where(top_p < 1.0, _largest_threshold(is_enough, keys.shape[0], digit_bits), 0)


def _likely_ids(logits: jax.Array) -> jax.Array:
    """int32 [R, MAX_FEW * BLOCK]: all tokens of the `MAX_FEW` blocks with the largest maxima, from the lowest id.

    Each of a row's `MAX_FEW` largest logits is in one of them: else as many blocks would have a larger one.
    """
    num_rows, vocab_size = logits.shape
    keys = jnp.pad(_sort_keys(logits), ((0, 0), (0, -vocab_size % BLOCK)))
    maxima = jnp.max(keys.reshape(num_rows, -1, BLOCK), axis=-1)  # [R, blocks]
    least = _top_k_threshold(maxima, jnp.full((num_rows,), MAX_FEW), digit_bits=4)[:, None]
    is_above, is_equal = maxima > least, maxima == least
    room = MAX_FEW - jnp.sum(is_above, axis=-1, keepdims=True)
    is_taken = is_above | (is_equal & (jnp.cumsum(is_equal, axis=-1) <= room))
    place = jnp.where(is_taken, jnp.cumsum(is_taken, axis=-1) - 1, MAX_FEW)
    rows = jnp.arange(num_rows)[:, None]
    number = jnp.broadcast_to(jnp.arange(maxima.shape[1], dtype=jnp.int32), maxima.shape)
    blocks = jnp.zeros((num_rows, MAX_FEW), jnp.int32).at[rows, place].set(number, mode="drop")
    ids = blocks[:, :, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    return ids.reshape(num_rows, -1)


def _gumbel(seeds: jax.Array, counters: jax.Array, ids: jax.Array) -> jax.Array:
    """float32 [R, n] of the standard Gumbel distribution, a function of each row's seed and counter and of the token's
    id (int32 [R, n]) alone: `jax.random.bits` of the whole vocabulary, at those places."""

    def row_key(seed, counter):
        return jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), counter)

    key = jax.random.key_data(jax.vmap(row_key)(seeds, counters))  # [R, 2]
    low = ids.astype(jnp.uint32)
    first, second = (jnp.broadcast_to(key[:, half, None], ids.shape) for half in (0, 1))
    bits = threefry2x32_p.bind(first, second, jnp.zeros_like(low), low)
    return _gumbel_of_bits(bits[0] ^ bits[1])


def _gumbel_of_bits(bits: jax.Array) -> jax.Array:
    """-log(-log1p(-u)) with u = (bits + 1/2) / 2**32.

    Large values come from small u, where float32 is finest. From u near 1, where it is coarse, two of 152 000 equally
    likely tokens would tie once in a hundred draws.
    """
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)  # u = 1 would be -inf
    return -jnp.log(-jnp.log1p(-u))


def _top_ids(logits: jax.Array, num: int) -> jax.Array:
    """int32 [R, num]: ids of the largest logits, lower ids first among equals."""
    if num > MAX_SCANNED_LOGPROBS:
        return lax.top_k(jnp.where(logits == 0, 0.0, logits), num)[1]  # to top_k, -0 is less than 0
    keys = _sort_keys(logits)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)

    def next_id(last, _):
        key, index = last  # [R, 1] each; what comes after them in the order of (key down, id up)
        is_after = (keys < key) | ((keys == key) & (ids > index))
        index = jnp.argmax(jnp.where(is_after, keys, 0), axis=-1, keepdims=True).astype(jnp.int32)
        return (jnp.take_along_axis(keys, index, axis=-1), index), index[:, 0]

    rows = (logits.shape[0], 1)
    start = (jnp.full(rows, 0xFFFFFFFF, jnp.uint32), jnp.full(rows, -1, jnp.int32))
    return lax.scan(next_id, start, None, length=num)[1].T
