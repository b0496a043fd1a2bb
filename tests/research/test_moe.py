"""Training a mixture of experts: loss, load-balancing loss and gradient are transformers', and the loss falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import sharding
from qjax.checkpoint.safetensors import load_params, open_folder
from qjax.research import Corpus, TrainConfig, Trainer
from qjax.research.batch import PackedBatch, RouterSums
from tests.models.test_moe import EXPECTED, GOLDEN, NAMES, golden
from tests.research.conftest import losses


def make(name: str, corpus: Corpus, **options) -> Trainer:
    defaults = {"seq_len": 64, "batch_size": 2, "num_steps": 1, "learning_rate": 3e-3}
    return Trainer(TrainConfig(model=str(GOLDEN / name), **(defaults | options)), corpus=corpus)


def golden_corpus(name: str) -> Corpus:
    return Corpus.from_documents([(golden(name)[0], [True] * 40)])


def counting_corpus() -> Corpus:
    rng = np.random.default_rng(0)
    starts, steps = rng.integers(0, 96, 100), rng.integers(1, 4, 100)
    documents = [((a + b * np.arange(30)) % 96).tolist() for a, b in zip(starts, steps, strict=True)]
    return Corpus.from_documents([(ids, [i > 1 for i in range(30)]) for ids in documents])


@pytest.mark.parametrize(("name", "options"), list(zip(NAMES, ({}, {"remat": True}), strict=True)))
def test_the_first_step_is_transformers(name, options, tmp_path):
    """The golden text in a row with padding. The loss has the load-balancing loss in it."""
    trainer = make(name, golden_corpus(name), batch_size=1, output=str(tmp_path), **options)
    coefficient = trainer.model_config.router_aux_loss_coef
    assert coefficient * EXPECTED[f"{name}.aux_loss"] > 1e-3
    trainer.train()
    np.testing.assert_allclose(losses(trainer), [EXPECTED[f"{name}.loss"]], rtol=1e-5)
    np.testing.assert_allclose(trainer.history[0].grad_norm, EXPECTED[f"{name}.grad_norm"], rtol=1e-4)

    assert open_folder(tmp_path).keys() == open_folder(GOLDEN / name).keys()
    leaves = load_params(tmp_path, trainer.model_config, trainer.mesh, jnp.bfloat16, progress=False)
    for path, leaf, trained in zip(trainer.modeldef.paths, leaves, trainer.params, strict=True):
        assert np.array_equal(leaf, np.asarray(trained).astype(jnp.bfloat16)), path


def test_it_learns_to_count():
    trainer = make("moe_sparse", counting_corpus(), num_steps=30, batch_size=4, learning_rate=1e-2, warmup_steps=3)
    trainer.train()
    curve = losses(trainer)
    assert np.mean(curve[-3:]) < 0.75 * curve[0] and np.isfinite(curve).all()


def test_the_same_run_on_more_devices():
    """Experts split over two devices and rows over two."""
    one = make("moe_sparse", counting_corpus(), num_steps=4)
    four = make("moe_sparse", counting_corpus(), num_steps=4, tensor_parallel_size=2, data_parallel_size=2)
    for trainer in (one, four):
        trainer.train()
    np.testing.assert_allclose(losses(four), losses(one), rtol=0, atol=2e-4)
    norms = [[metrics.grad_norm for metrics in trainer.history] for trainer in (one, four)]
    np.testing.assert_allclose(*norms, rtol=1e-3)


def test_the_load_balancing_loss_counts_no_padding_and_is_least_where_experts_are_balanced():
    probs = jnp.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]])
    segments = jnp.array([1, 1, 0], jnp.int32)
    batch = PackedBatch(segments, segments, segments, 3)
    with jax.set_mesh(sharding.make_mesh(1)):
        sums = batch.after_routing(probs, jnp.array([[0, 1], [3, 0], [2, 1]]), RouterSums.zeros(4))
    assert sums.chosen.tolist() == [2, 1, 0, 1] and sums.rows == 2
    # Over experts, the share of tokens that chose it times its mean probability; times the number of experts.
    assert sums.loss == pytest.approx(4 * (1.0 * 0.4 + 0.5 * 0.1 + 0.5 * 0.4))
    even = RouterSums(jnp.full(4, 10.0), jnp.full(4, 5.0), jnp.float32(20))
    assert even.loss == pytest.approx(2.0)  # k


def test_adapters_of_attention_only():
    with pytest.raises(ValueError, match="target_modules=gate_proj, up_proj, down_proj: adapters of experts"):
        make("moe_sparse", counting_corpus(), lora={"rank": 2})
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    trainer = make("moe_sparse", counting_corpus(), lora=lora, num_steps=6, learning_rate=1e-2)
    experts = trainer.modeldef.paths.index("layers.0.mlp.experts.gate_up_proj.kernel")
    before = np.asarray(trainer.frozen[experts])
    trainer.train()
    assert np.array_equal(trainer.params[experts], before)
    assert losses(trainer)[-1] < losses(trainer)[0]
