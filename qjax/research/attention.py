"""Dense attention of packed rows, with gradients: cuDNN's flash attention on a GPU, plain XLA everywhere else."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger("qjax")

IMPLEMENTATIONS = ("xla", "cudnn")
PROBE_TOLERANCE = 0.06  # bfloat16, values and gradients around 1


def block_causal_mask(segment_ids: jax.Array) -> jax.Array:
    """int32 [B, L] → bool [B, 1, L, L]: query i sees key j of its own document with j <= i."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    length = segment_ids.shape[1]
    return same & (jnp.arange(length)[:, None] >= jnp.arange(length))


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, implementation: str) -> jax.Array:
    """Softmax attention, scaled by H ** -0.5, summed in float32.

    Args:
      q: [B, L, N, H].
      k, v: [B, L, K, H] with N a multiple of K.
      mask: bool [B, 1, L, L], causal.
      implementation: "cudnn" (bfloat16 on a GPU; reads the mask, keeps no scores) or "xla".
    Returns:
      [B, L, N, H].
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return _xla_attention(q, k, v, mask)


@jax.checkpoint  # the scores [B, N, L, L] are computed again, not kept: they outweigh all else
def _xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    B, L, N, H = q.shape
    K = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(B, L, K, N // K, H)
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores * H**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights, v, precision=precision).reshape(B, L, N, H)


def choose_implementation(wanted: str, dtype: str, head_dim: int, device: jax.Device) -> str:
    """What "auto" stands for: cuDNN where a trial run on this device gives XLA's values and gradients.

    Raises:
      ValueError: "cudnn" was asked for by name and does not run here.
    """
    if wanted == "xla" or (wanted == "auto" and (device.platform != "gpu" or dtype != "bfloat16")):
        return "xla"
    problem = _probe(head_dim, device)
    if problem is None:
        return "cudnn"
    if wanted == "cudnn":
        raise ValueError(f"attention='cudnn' does not run here: {problem}. Use attention='xla'.")
    log.warning("cuDNN's attention does not run here (%s); using XLA's, which is slower.", problem)
    return "xla"


@functools.cache
def _probe(head_dim: int, device: jax.Device) -> str | None:
    """Runs both implementations forwards and backwards on a small case. What is wrong with cuDNN's, or None."""
    if device.platform != "gpu":
        return "it needs an NVIDIA GPU"
    B, L, N, K = 2, 256, 4, 2
    rng = np.random.default_rng(0)
    make = lambda heads: jax.device_put(rng.standard_normal((B, L, heads, head_dim)).astype(jnp.bfloat16), device)
    segments = jax.device_put(np.sort(rng.integers(1, 5, (B, L)), axis=1).astype(np.int32), device)
    args = (make(N), make(K), make(K))
    toward = make(N)

    def run(implementation: str) -> list[np.ndarray]:
        def loss(q, k, v):
            out = dense_attention(q, k, v, block_causal_mask(segments), implementation)
            return jnp.sum(out.astype(jnp.float32) * toward.astype(jnp.float32)), out

        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    try:
        pairs = zip(run("cudnn"), run("xla"), strict=True)
    except Exception as error:  # cuDNN is missing, too old, or has no engine for this case
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    worst = max(float(np.max(np.abs(a - b)) / (1 + np.max(np.abs(b)))) for a, b in pairs)
    return None if worst <= PROBE_TOLERANCE else f"its result is off by {worst:.3f}"
