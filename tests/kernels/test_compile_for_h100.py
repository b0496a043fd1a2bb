"""Compiles the kernels for an H100 that is not there: lowering, register allocation, and the cache's place in memory.

Needs jax's CUDA plugin with ptxas, and no GPU: `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt
nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink`, JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 and JAX_PLATFORMS=cpu.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qjax.kernels.norm_rope_write import norm_rope_write
from qjax.kernels.paged_attention import paged_decode, paged_prefill
from tests.kernels.cases import HEADS

pytest.importorskip("jax_cuda13_plugin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ, reason="see the module's docstring"),
]

L, P, B, W, T = 3, 64, 4, 640, 256
SHAPES = [(heads, 64) for heads in HEADS] + [((32, 8, 128), 16), ((14, 2, 64), 16), ((32, 8, 128), 128)]


@pytest.fixture(scope="module")
def mesh():
    target = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


@pytest.mark.parametrize(("heads", "page_size"), SHAPES, ids=str)
def test_every_shape_compiles_and_no_cache_is_copied(mesh, heads: tuple[int, int, int], page_size: int):
    """Decode and prefill between writes, layer after layer, in one step that owns the cache."""
    N, K, H = heads
    sharding = NamedSharding(mesh, PartitionSpec())
    shape = lambda *dims, dtype=jnp.int32: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
    half = lambda *dims: shape(*dims, dtype=jnp.bfloat16)
    kv = half(L, 2, P * 128 // page_size, K, page_size, H)

    def step(kv, decode_q, qkv, angle, weight, table, lens, starts, slots):
        for layer in range(L):
            norms = (weight, weight)
            q, kv = norm_rope_write(kv, (qkv + layer)[None], norms, angle, angle, slots, eps=1e-6, layer=layer)
            decode_q = decode_q + paged_decode(decode_q, kv, table, lens, layer=layer)
            q = paged_prefill(q.reshape(T, N, H), kv, table, lens, starts, layer=layer)
            qkv = qkv.at[:, :, :-2].add(q.reshape(T, K, -1, H))
        return kv, decode_q, qkv

    angle = shape(T, H // 2, dtype=jnp.float32)
    args = (kv, half(B, N, H), half(T, K, N // K + 2, H), angle, half(H), shape(B, W), shape(B), shape(B + 1), shape(T))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count('custom_call_target="mosaic_gpu') == 4 * L  # write, decode's two, prefill
    assert memory.alias_size_in_bytes == kv.size * 2
    assert " copy(" not in "".join(line for line in text.splitlines() if f"bf16[{L}," in line)
