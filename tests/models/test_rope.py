"""Rotary embedding against transformers' (tests/golden), and the options that choose it."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels.elementwise import apply_rope
from qjax.models.config import ModelConfig, apply_overrides
from qjax.models.rope import rope_angles, rope_frequencies
from tests.tiny import TINY

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = np.load(GOLDEN / "expected.npz")
ROPES = json.loads((GOLDEN / "made_with.json").read_text())["ropes"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
QWEN3 = TINY | {"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1_000_000}


def config_of(rope: dict | None) -> ModelConfig:
    return ModelConfig.from_hf(QWEN3 | {"rope_scaling": rope})


@pytest.mark.parametrize("name", ROPES)
def test_angles_equal_transformers_up_to_131072(name):
    config, positions = config_of(ROPES[name]), EXPECTED["rope.positions"]
    _, factor = rope_frequencies(config)
    got = np.stack(rope_angles(jnp.asarray(positions), config))
    # A frequency's last bit, times the position, is what two float32 computations may differ by.
    angles = positions[:, None].astype(np.float64) * rope_frequencies(config)[0]
    tolerance = factor * (2 * np.finfo(np.float32).eps * angles + 1e-6)
    assert (np.abs(got - EXPECTED[f"rope.{name}"]) <= tolerance).all()
    small = positions < 2048
    np.testing.assert_allclose(got[:, small], EXPECTED[f"rope.{name}"][:, small], rtol=0, atol=5e-4)


def test_neighbouring_positions_near_the_end_differ():
    positions = jnp.arange(131_000, 131_072)
    cos, sin = rope_angles(positions, config_of(YARN))
    turned = jnp.arctan2(sin, cos)[:, 0]  # one radian a position, fast enough to be kept by YaRN
    steps = np.mod(np.diff(np.asarray(turned)), 2 * np.pi)
    np.testing.assert_allclose(steps, 1.0, atol=0.02)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    config = config_of(None)
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 2, 128)), jnp.float32)
    scores = []
    for start in (0, 1000):
        turned = [apply_rope(x, *rope_angles(jnp.array([p]), config)) for x, p in ((q, start + 7), (k, start))]
        np.testing.assert_allclose(np.linalg.norm(turned[0]), np.linalg.norm(q), rtol=1e-5)
        scores.append(jnp.sum(turned[0] * turned[1]))
    np.testing.assert_allclose(*scores, rtol=1e-3)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope_type='dynamic' is not supported. Supported: default, linear, yarn",
        ),
        ({"type": "llama3", "factor": 2.0}, "rope_type='llama3'"),
        ({"rope_type": "yarn"}, "rope_type='yarn' needs 'factor'"),
        ({**YARN, "beta_fats": 3}, "unknown key 'beta_fats'"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "unknown key 'beta_fast' for rope_type='linear'"),
        ({"rope_type": "default", "mrope_section": [1]}, "unknown key 'mrope_section'"),
        ({**YARN, "factor": "4"}, "factor must be a number above 0, got '4'"),
        ({**YARN, "factor": 0.5}, "factor must be at least 1"),
    ],
)
def test_unknown_kinds_and_keys_are_refused_by_name(rope, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(rope)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_the_older_and_the_newer_form_mean_the_same(name, kind):
    rope = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert ModelConfig.from_hf(QWEN3 | {name: rope}) == config_of(YARN)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 40960),
        (YARN, 131072),
        ({**YARN, "factor": 1.0}, 40960),  # never shorter than the model's own
        ({"rope_type": "yarn", "factor": 2.0}, 81920),
        ({"rope_type": "linear", "factor": 2.0}, 81920),
    ],
)
def test_context_grows_with_the_scaling(rope, length):
    assert config_of(rope).max_context_len == length


def overridden(base: dict, overrides: dict, rope_scaling: dict | None = None) -> ModelConfig:
    return ModelConfig.from_hf(apply_overrides(base, overrides, rope_scaling))


NEWER = {k: v for k, v in QWEN3.items() if k != "rope_theta"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000}
}


@pytest.mark.parametrize("base", [QWEN3, QWEN3 | {"rope_scaling": None}, NEWER], ids=["older", "null", "newer"])
def test_overrides_choose_yarn_whatever_form_the_file_has(base):
    expected = config_of(YARN)
    assert overridden(base, {}, YARN) == expected
    assert overridden(base, {"rope_scaling": YARN}) == expected
    assert overridden(base, {"rope_parameters": YARN}) == expected
    assert overridden(base, {"rope_parameters": {**YARN, "rope_theta": 5e5}}).rope_theta == 5e5
    assert overridden(base, {"rope_theta": 5e5}, YARN).rope_theta == 5e5


def test_overrides_merge_within_a_kind_and_replace_another():
    base = QWEN3 | {"rope_scaling": {**YARN, "beta_fast": 24}}
    assert overridden(base, {"rope_scaling": {"factor": 2.0}}).rope_scaling == {**YARN, "factor": 2.0, "beta_fast": 24}
    assert overridden(base, {}, YARN).rope_scaling == YARN
    linear = {"rope_type": "linear", "factor": 2.0}
    assert overridden(base, {"rope_scaling": linear}).rope_scaling == linear
    assert overridden(base, {"rope_scaling": None}).rope_scaling is None


def test_overrides_of_other_fields():
    base = dict(QWEN3)
    config = overridden(base, {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5})
    assert (config.max_position_embeddings, config.rms_norm_eps) == (4096, 1e-5)
    assert base == QWEN3  # not changed in place
    assert overridden(base, {}) == ModelConfig.from_hf(QWEN3)
    with pytest.raises(ValueError, match=r"hf_overrides: config\.json has no field 'max_position'"):
        apply_overrides(base, {"max_position": 1}, None)
    with pytest.raises(ValueError, match="no field 'qk_norm'"):  # ModelConfig's name, none of config.json
        apply_overrides(base, {"qk_norm": False}, None)
    with pytest.raises(ValueError, match="hf_overrides: rope_scaling must be an object or null, got 'yarn'"):
        apply_overrides(base, {"rope_scaling": "yarn"}, None)
