"""Scales of an FP8 KV cache in a checkpoint: the names that tools give them, what is missing, what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from qjax.checkpoint.kv_scales import has_kv_scales, kv_scales_leaf, with_kv_scales
from qjax.models.config import ModelConfig
from tests.tiny import TINY

CONFIG = replace(ModelConfig.from_hf(TINY), kv_scales=True)  # two layers, two KV heads
OWNER = "model.layers.0.self_attn"
scalar = lambda value: np.array(value, np.float32)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("k_scale", "v_scale"), (2, 3)),
        (("attn.k_scale", "attn.v_scale"), (2, 3)),
        (("k_proj.k_scale", "v_proj.v_scale"), (2, 3)),
        (("qkv_proj.k_scale", "qkv_proj.v_scale"), (2, 3)),
        (("kv_scale", "q_scale"), (2, 2)),
        (("attn.v_scale", "attn.prob_scale"), (2, 2)),
    ],
)
def test_names(names, expected):
    tensors = {f"{OWNER}.{name}": scalar(value) for name, value in zip(names, (2, 3), strict=True)}
    assert has_kv_scales(tensors) and not has_kv_scales({f"{OWNER}.q_scale": scalar(1)})
    found = with_kv_scales(tensors | {"model.norm.weight": scalar(0)}, CONFIG)
    assert set(found) == {f"model.layers.{i}.self_attn.{x}_scale" for i in (0, 1) for x in "kv"} | {"model.norm.weight"}
    for kind, value in zip("kv", expected, strict=True):
        assert found[f"{OWNER}.{kind}_scale"].tolist() == [value, value]
        assert found[f"model.layers.1.self_attn.{kind}_scale"].tolist() == [1, 1]
    assert set(with_kv_scales(tensors, replace(CONFIG, kv_scales=False))) == set()


def test_scales_of_heads_and_their_copies():
    tensors = {f"{OWNER}.k_scale": np.array([[[2.0]], [[4.0]]], np.float16), f"{OWNER}.v_scale": scalar([0.5])}
    found = with_kv_scales(tensors, CONFIG)
    leaf = kv_scales_leaf(OWNER, 2, 4)
    whole = leaf.read(found, 0, 4)
    assert whole.dtype == np.float32 and whole.tolist() == [[2, 2, 4, 4], [0.5] * 4]
    assert leaf.read(found, 1, 3).tolist() == [[2, 4], [0.5] * 2]
    assert {name: tensor.tolist() for name, tensor in leaf.write(whole).items()} == {
        f"{OWNER}.k_scale": [2, 4],
        f"{OWNER}.v_scale": [0.5, 0.5],
    }


@pytest.mark.parametrize(
    ("value", "message"), [([1, 2, 3], r"shape \[3\], expected 1 or 2"), ([0], "above 0"), ([np.nan, 1], "above 0")]
)
def test_wrong_scales_are_named(value, message):
    with pytest.raises(ValueError, match=rf"{OWNER}\.k_scale.*{message}"):
        with_kv_scales({f"{OWNER}.k_scale": scalar(value)}, CONFIG)
