"""How each of the model's leaves is made of Hugging Face's tensors, and back. Knows shapes, not files or devices."""

import math
from dataclasses import replace

import numpy as np

from qjax.checkpoint.kv_scales import kv_scales_leaf
from qjax.checkpoint.leaf import Leaf, Tensors, flipped, not_written, stacked, transpose_into
from qjax.models.config import ModelConfig
from qjax.quantization.config import GROUP, TENSORS, Stored
from qjax.quantization.int4 import CELL_OUTPUTS, is_in_order, repack_scales, repack_weights

# By the parameter's name; a kernel is "weight" in every checkpoint, quantised or not.
STORED = {
    "kernel": Stored("weight", "", 1, 1),
    "bias": Stored("bias", "", 1, 1),
    **TENSORS["fp8"],
}


def leaf_of(path: str, config: ModelConfig, num_kv_heads: int, tensor_parallel_size: int = 1) -> Leaf:
    """The leaf at `path` (`ModelDef.paths`) of a model with `num_kv_heads` KV heads, copies included.

    Args:
      tensor_parallel_size: which may cut the blocks of FP8's scales.

    Raises:
      RuntimeError: no leaf of the model has this path.
    """
    owner, is_of_experts, kind = path.partition(".experts.")
    if is_of_experts:
        return _of_experts(f"{owner}.experts", kind, config, num_kv_heads, tensor_parallel_size)
    return _leaf_of(path, config, num_kv_heads, tensor_parallel_size)


def _of_experts(owner: str, kind: str, config: ModelConfig, K: int, tp: int) -> Leaf:
    """All experts' leaves of a kind, such as "gate_up_proj.kernel"; the tensors are those of as many feed-forwards."""
    F, whole = config.moe_intermediate_size, None
    if config.expert_parallel:
        module, _, name = kind.partition(".")
        is_made = config.quantization is not None and config.quantization.is_made
        units = {"weight_scale_inv": GROUP}
        if not is_made:
            is_down = module == "down_proj"
            units |= {"words": GROUP if is_down else CELL_OUTPUTS, "scales_zeros": GROUP if is_down else 1}
        tp, whole = 1, F // units.get(name, 1)
    one = replace(config, intermediate_size=F)
    return stacked([_leaf_of(f"{owner}.{e}.{kind}", one, K, tp) for e in range(config.num_experts)], whole)


def _leaf_of(path: str, config: ModelConfig, num_kv_heads: int, tensor_parallel_size: int) -> Leaf:
    *owner, module, kind = path.split(".")
    prefix = ".".join(["model", *owner])
    D, V = config.hidden_size, config.vocab_size
    match (module, kind):
        case ("embed_tokens", _):
            return _plain("model.embed_tokens.weight", (V, D))
        case ("lm_head", _):
            return _transposed("lm_head.weight", (V, D), axis=1)
        case ("o_proj", "bias"):
            return _plain(f"{prefix}.o_proj.bias", (D,))
        case ("qkv_proj" | "o_proj" | "gate_up_proj" | "down_proj", _) if kind in STORED:
            stored = STORED[kind]
            if stored.is_kept:
                return _kept(prefix, module, stored, config, num_kv_heads, tensor_parallel_size)
            leaf = _projection(prefix, module, stored, config, num_kv_heads)
            return flipped(leaf) if stored.is_transposed else leaf
        case (_, "words" | "scales_zeros") if config.quantization is not None and config.quantization.is_made:
            return _projection(prefix, module, STORED["kernel"], config, num_kv_heads)  # the weight it is made of
        case (_, "words"):
            return _int4_words(prefix, module, config, num_kv_heads)
        case (_, "scales_zeros"):
            return _int4_scales(prefix, module, config, num_kv_heads)
        case ("gate", "kernel"):
            return _transposed(f"{prefix}.gate.weight", (config.num_experts, D), axis=1)
        case ("self_attn", "kv_scales"):
            return kv_scales_leaf(f"{prefix}.self_attn", config.num_key_value_heads, num_kv_heads)
        case ("q_norm" | "k_norm", _):
            return _plain(f"{prefix}.{module}.weight", (config.head_dim,))
        case ("norm" | "input_layernorm" | "post_attention_layernorm", _):
            return _plain(f"{prefix}.{module}.weight", (D,))
    raise RuntimeError(f"no rule for the weight {path!r}")


def _projection(prefix: str, module: str, stored: Stored, config: ModelConfig, K: int) -> Leaf:
    """A tensor of a projection, as if it was stored [out, in]."""
    D, F, H, kind = config.hidden_size, config.intermediate_size, config.head_dim, stored.name
    out, inner = stored.out_step, stored.in_step
    match module:
        case "qkv_proj":
            return _qkv(prefix, kind, D // inner, H // out, config, K)
        case "o_proj":
            N, quantization = config.num_attention_heads, config.quantization
            if (
                H % GROUP
                and quantization is not None
                and quantization.is_int4
                and quantization.covers(f"{prefix}.o_proj")
            ):
                return _output(f"{prefix}.o_proj.{kind}", D // out, N * H // inner, 1, 1)  # groups are of two heads
            return _output(f"{prefix}.o_proj.{kind}", D // out, H // inner, N, K)
        case "gate_up_proj":
            return _gate_up(prefix, kind, D // inner, F // out)
    return _transposed(f"{prefix}.{module}.{kind}", (D // out, F // inner), axis=0)


def _kept(prefix: str, module: str, stored: Stored, config: ModelConfig, K: int, tp: int) -> Leaf:
    """A tensor [out, in] of a projection kept as [*outputs, *inputs]: rows or columns, and no transpose.

    Where a device's share of F, or a head, is not made of whole blocks, the leaf has smaller ones and repeats their
    numbers.
    """
    F, G = config.intermediate_size, config.num_attention_heads // K
    D, H = config.hidden_size, config.head_dim
    part = math.gcd(stored.out_step, F // tp)  # out_step is in_step
    part_of_head = math.gcd(stored.out_step, H)

    def along_f(start: int, stop: int) -> slice | np.ndarray:
        return np.s_[start:stop] if part == stored.out_step else np.arange(start, stop) * part // stored.out_step

    def along_heads(start: int, stop: int) -> slice | np.ndarray:
        if part_of_head == stored.out_step:
            return np.s_[start * H // part_of_head : stop * H // part_of_head]
        return np.arange(start * H, stop * H, part_of_head) // stored.out_step

    def read_gate_up(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        return np.stack([tensors[name][along_f(start, stop)] for name in names])

    def read_down(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(tensors[names[0]][:, along_f(start, stop)])

    def read_output(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        columns = tensors[names[0]][:, along_heads(start * G, stop * G)]
        return np.ascontiguousarray(columns).reshape(columns.shape[0], stop - start, G, -1)

    def read_qkv(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, G + 2, H // part_of_head, d), tensors[names[0]].dtype)
        for i, head in enumerate(range(start, stop)):
            kv = along_heads(head // copies, head // copies + 1)
            out[i, :G] = tensors[names[0]][along_heads(head * G, (head + 1) * G)].reshape(G, -1, d)
            out[i, G], out[i, G + 1] = tensors[names[1]][kv], tensors[names[2]][kv]
        return out

    d, f = D // stored.in_step, F // stored.in_step
    copies, N = K // config.num_key_value_heads, config.num_attention_heads
    repeats, repeats_of_head = stored.in_step // part, stored.in_step // part_of_head
    rows_of = lambda heads: heads * H // stored.in_step
    match module:
        case "qkv_proj":
            names = [f"{prefix}.{x}_proj.{stored.name}" for x in "qkv"]
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (rows_of(config.num_key_value_heads), d))
            shapes[names[0]] = (rows_of(N), d)

            def write_qkv(leaf: np.ndarray) -> dict[str, np.ndarray]:
                parts = (leaf[:, :G], leaf[::copies, G], leaf[::copies, G + 1])
                return {n: part.reshape(-1, d)[::repeats_of_head] for n, part in zip(names, parts, strict=True)}

            return Leaf(shapes, 0, read_qkv, write_qkv)
        case "o_proj":
            names = [f"{prefix}.o_proj.{stored.name}"]
            write_output = lambda leaf: {names[0]: leaf.reshape(d, -1)[:, ::repeats_of_head]}
            return Leaf({names[0]: (d, rows_of(N))}, 1, read_output, write_output)
        case "gate_up_proj":
            names = [f"{prefix}.{x}_proj.{stored.name}" for x in ("gate", "up")]
            write = lambda leaf: {name: leaf[i, ::repeats] for i, name in enumerate(names)}
            return Leaf(dict.fromkeys(names, (f, d)), 1, read_gate_up, write)
    names = [f"{prefix}.{module}.{stored.name}"]
    return Leaf({names[0]: (d, f)}, 1, read_down, lambda leaf: {names[0]: leaf[:, ::repeats]})


def _int4_words(prefix: str, module: str, config: ModelConfig, K: int) -> Leaf:
    """`words` of an `Int4Linear`, made of the checkpoint's `qweight`."""
    assert config.quantization is not None
    method, num_inputs = config.quantization.method, 3 if module == "o_proj" else 1
    stored = TENSORS[method]["qweight"]
    source = flipped(_projection(prefix, module, stored, config, K))
    # Elements of the source's axis in one of the leaf's; heads are heads.
    ratio = {"gate_up_proj": CELL_OUTPUTS // stored.out_step, "down_proj": GROUP // stored.in_step}.get(module, 1)

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        part = source.read(tensors, start * ratio, stop * ratio)
        inputs, outputs = part.shape[:num_inputs], part.shape[num_inputs:]
        words = repack_weights(part.reshape(math.prod(inputs), -1), method)
        groups = (*inputs[:-1], inputs[-1] * stored.in_step // GROUP)
        return words.reshape(*groups, *outputs[:-1], outputs[-1] * stored.out_step // CELL_OUTPUTS, -1)

    return Leaf(source.shapes, source.axis, read, not_written, dict.fromkeys(source.shapes, stored.dtype))


def _int4_scales(prefix: str, module: str, config: ModelConfig, K: int) -> Leaf:
    """`scales_zeros` of an `Int4Linear`, made of the checkpoint's `scales` and `qzeros`; looks at GPTQ's `g_idx`."""
    assert config.quantization is not None
    method, num_inputs = config.quantization.method, 3 if module == "o_proj" else 1
    tensors = TENSORS[method]
    zeros, scales = (flipped(_projection(prefix, module, tensors[x], config, K)) for x in ("qzeros", "scales"))
    ratio = tensors["qzeros"].out_step if module == "gate_up_proj" else 1  # leaf's elements in one of the zeros' axis
    shapes = {**zeros.shapes, **scales.shapes}
    dtypes = dict.fromkeys(zeros.shapes, "int32") | dict.fromkeys(scales.shapes, "float32")
    indices = {}
    if method == "gptq":
        inputs = {"o_proj": config.num_attention_heads * config.head_dim, "down_proj": config.intermediate_size}
        size = inputs.get(module, config.hidden_size)
        indices = {name.removesuffix("scales") + "g_idx": (size,) for name in scales.shapes}

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        for name in indices:
            if not is_in_order(tensors[name]):
                raise ValueError(
                    f"tensor {name}: its groups are not 128 inputs that follow each other (desc_act), which is not "
                    "supported: quantise with desc_act false."
                )
        zero, scale = zeros.read(tensors, start // ratio, stop // ratio), scales.read(tensors, start, stop)
        rows = math.prod(scale.shape[:num_inputs])
        return repack_scales(zero.reshape(rows, -1), scale.reshape(rows, -1), method).reshape(scale.shape)

    dtypes |= dict.fromkeys(indices, "int32")
    return Leaf(shapes | indices, scales.axis, read, not_written, dtypes)


def _plain(name: str, shape: tuple[int, ...]) -> Leaf:
    return Leaf({name: shape}, 0, lambda t, start, stop: t[name][start:stop], lambda leaf: {name: leaf})


def _transposed(name: str, shape: tuple[int, int], axis: int) -> Leaf:
    """A matrix [out, in] kept as [in, out], split on `axis` of the latter."""

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        part = tensors[name][:, start:stop] if axis == 0 else tensors[name][start:stop]
        out = np.empty(part.shape[::-1], part.dtype)
        transpose_into(out, part)
        return out

    return Leaf({name: shape}, axis, read, lambda leaf: {name: leaf.T})


def _gate_up(prefix: str, kind: str, D: int, F: int) -> Leaf:
    """[D, 2, F] of gate_proj and up_proj [F, D]."""
    names = [f"{prefix}.gate_proj.{kind}", f"{prefix}.up_proj.{kind}"]

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        out = np.empty((D, 2, stop - start), tensors[names[0]].dtype)
        for i, name in enumerate(names):
            transpose_into(out[:, i], tensors[name][start:stop])
        return out

    return Leaf(dict.fromkeys(names, (F, D)), 2, read, lambda leaf: {n: leaf[:, i].T for i, n in enumerate(names)})


def _qkv(prefix: str, kind: str, D: int, H: int, config: ModelConfig, K: int) -> Leaf:
    """Kernel [D, K, G + 2, H], or bias [K, G + 2, H], of q_proj [N * H, D] and k_proj, v_proj [heads * H, D].

    Each of the checkpoint's KV heads is there `copies` times, every copy with its own G query heads.
    """
    q, k, v = (f"{prefix}.{x}_proj.{kind}" for x in "qkv")
    N = config.num_attention_heads
    G, copies = N // K, K // config.num_key_value_heads
    tail = () if kind == "bias" else (D,)
    shapes = {q: (N * H, *tail), **dict.fromkeys((k, v), (config.num_key_value_heads * H, *tail))}

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        out = np.empty((*tail, stop - start, (G + 2) * H), tensors[q].dtype)
        for i, head in enumerate(range(start, stop)):
            kv_rows = slice(head // copies * H, (head // copies + 1) * H)
            parts = (tensors[q][head * G * H : (head + 1) * G * H], tensors[k][kv_rows], tensors[v][kv_rows])
            column = 0
            for part in parts:
                where = out[..., i, column : column + len(part)]
                if tail:
                    transpose_into(where, part)
                else:
                    where[...] = part
                column += len(part)
        return out.reshape(*out.shape[:-1], G + 2, H)

    def write(leaf: np.ndarray) -> dict[str, np.ndarray]:
        parts = {q: leaf[..., :G, :], k: leaf[..., ::copies, G : G + 1, :], v: leaf[..., ::copies, G + 1 :, :]}
        return {name: part.reshape(*tail, -1).T for name, part in parts.items()}

    return Leaf(shapes, len(tail), read, write)


def _output(name: str, D: int, H: int, N: int, K: int) -> Leaf:
    """[K, G, H, D] of o_proj [D, N * H]."""
    G = N // K

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        out = np.empty(((stop - start) * G * H, D), tensors[name].dtype)
        transpose_into(out, tensors[name][:, start * G * H : stop * G * H])
        return out.reshape(stop - start, G, H, D)

    return Leaf({name: (D, N * H)}, 0, read, lambda leaf: {name: leaf.reshape(N * H, D).T})
