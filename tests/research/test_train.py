"""Training runs of a micro model: it learns, and the same run in parts, on more devices or resumed is the same."""

import json

import jax
import numpy as np
import pytest

from qjax.research import Corpus
from qjax.research.config import TrainConfig
from qjax.research.optimizer import decays, learning_rate
from tests.research.conftest import losses

# Of the losses around 1 to 5: other order of float32 sums, over 8 steps of learning.
OTHER_ORDER = 2e-4


def test_fifty_steps_learn_to_count(make_trainer):
    trainer = make_trainer(from_scratch=True, num_steps=50, learning_rate=1e-2, schedule="cosine", warmup_steps=5)
    records = trainer.train()
    curve = losses(trainer)
    assert len(curve) == 50 and records[-1].step == 50
    assert abs(curve[0] - np.log(160)) < 0.2  # knows nothing
    assert np.mean(curve[-5:]) < 0.6 * curve[0]
    assert records[-1].tokens == sum(metrics.num_tokens for metrics in trainer.history)
    assert all(np.isfinite(metrics.grad_norm) for metrics in trainer.history)


@pytest.fixture(scope="module")
def one_device(micro_checkpoint, corpus):
    from qjax.research import Trainer

    options = {"model": str(micro_checkpoint), "seq_len": 64, "batch_size": 4, "num_steps": 8, "learning_rate": 3e-3}
    trainer = Trainer(TrainConfig(**options), corpus=corpus)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation_steps": 4},
        {"remat": True, "num_loss_chunks": 4},
        {"data_parallel_size": 2, "tensor_parallel_size": 2, "accumulation_steps": 2, "num_loss_chunks": 2},
    ],
    ids=str,
)
def test_the_same_run_however_it_is_computed(make_trainer, one_device, options):
    trainer = make_trainer(**options)
    trainer.train()
    np.testing.assert_allclose(losses(trainer), losses(one_device), rtol=0, atol=OTHER_ORDER)
    norms = [metrics.grad_norm for metrics in trainer.history]
    np.testing.assert_allclose(norms, [m.grad_norm for m in one_device.history], rtol=1e-3)


def test_copies_of_kv_heads_are_not_trained(make_trainer):
    with pytest.raises(ValueError, match="tensor_parallel_size=4 is more than num_key_value_heads=2"):
        make_trainer(tensor_parallel_size=4)


def test_a_run_repeats_bit_by_bit(make_trainer, one_device):
    trainer = make_trainer()
    trainer.train()
    assert losses(trainer) == losses(one_device)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_resumed_run_repeats_the_losses_of_the_whole_one(make_trainer, tmp_path, lora):
    """Over the border of an epoch; a checkpoint in the middle, and the last one not taken."""
    options = {"lora": lora, "save_every": 5, "schedule": "linear", "batch_size": 32, "num_steps": 9}
    whole = make_trainer(**options, output=str(tmp_path / "whole"))
    whole.train()
    assert whole.position.epoch > 0

    resumed = make_trainer(**options, output=str(tmp_path / "whole"), resume=True)
    assert resumed.step == 5
    resumed.train()
    assert losses(resumed) == losses(whole)[5:]
    for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match=r"resume: the checkpoint in .* was made with seed=0, this run has 1"):
        make_trainer(**options, output=str(tmp_path / "whole"), resume=True, seed=1)
    with pytest.raises(ValueError, match="has checkpoints of another run: set resume"):
        make_trainer(**options, output=str(tmp_path / "whole")).train()
    with pytest.raises(ValueError, match="resume: there is no checkpoint"):
        make_trainer(**options, output=str(tmp_path / "other"), resume=True)


def test_a_time_limit_ends_the_run_with_the_learning_rate_at_its_end(make_trainer, tmp_path):
    trainer = make_trainer(num_steps=None, max_seconds=3.0, schedule="linear", output=str(tmp_path), log_every=1)
    trainer.compile()
    records = trainer.train()
    assert records[-1].learning_rate < 0.2 * trainer.config.learning_rate
    rates = [record.learning_rate for record in records]
    assert rates == sorted(rates, reverse=True)
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert len(lines) == trainer.step == len(trainer.history)
    assert set(lines[0]) >= {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"}


def test_a_step_without_a_finite_gradient_changes_nothing(make_trainer):
    trainer = make_trainer(num_steps=1, learning_rate=1e-3)
    broken = tuple(leaf * np.nan if i == 0 else leaf for i, leaf in enumerate(trainer.state.params))
    trainer.state = type(trainer.state)(broken, trainer.state.opt_state)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state)]
    records = trainer.train()
    assert records[-1].skipped == 1
    for a, b in zip(before, jax.tree.leaves(trainer.state), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_schedules():
    rate = lambda step, share, **options: learning_rate(TrainConfig(learning_rate=1.0, **options), step, share)
    assert rate(0, 0.0, warmup_steps=4) == 0.25 and rate(4, 0.0, warmup_steps=4) == 1.0
    assert rate(9, 0.5, schedule="cosine") == pytest.approx(0.5)
    assert rate(9, 0.5, schedule="linear", min_learning_rate_ratio=0.5) == 0.75
    assert [rate(9, share, schedule="wsd", decay_share=0.2) for share in (0.5, 0.8)] == [1.0, pytest.approx(1.0)]
    assert rate(9, 0.9, schedule="wsd", decay_share=0.2) == pytest.approx(0.5)
    assert rate(9, 1.0, schedule="constant") == 1.0
    for schedule in ("cosine", "linear", "wsd"):
        assert rate(9, 1.0, schedule=schedule, min_learning_rate_ratio=0.1) == pytest.approx(0.1)


def test_norms_and_biases_do_not_decay(make_trainer):
    kept = {path.removeprefix("layers.0.") for path in make_trainer().modeldef.paths if not decays(path)}
    assert kept == {
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *("self_attn.q_norm.weight", "self_attn.k_norm.weight", "norm.weight"),
    }


def test_wrong_data_is_refused(make_trainer):
    with pytest.raises(ValueError, match="token id 160 is there, but vocab_size is 160"):
        make_trainer(Corpus.from_documents([([1, 160] * 200, [True] * 400)]))
    with pytest.raises(ValueError, match="no token would be learnt"):
        make_trainer(Corpus.from_documents([([1, 2] * 200, [False] * 400)]))
