"""Training beside a live engine: new weights without a reload, and both give a token the same probability."""

import numpy as np
import pytest

from qjax import SamplingParams
from qjax.research import TrainConfig, Trainer, consistency, score_texts
from tests.engine.conftest import make_llm, tiny_folder  # noqa: F401
from tests.research.conftest import counting_corpus

PROMPTS = [[3, 5, 7, 9], list(range(20, 60)), [100, 90]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
# Sums in another order, float32 and logits around 1; and bfloat16's, as issue 3 states them.
FLOAT32_MAX, BFLOAT16_MEAN = 1e-4, 2e-3


@pytest.fixture(scope="module")
def llm(tiny_folder):  # noqa: F811
    return make_llm(tiny_folder)


@pytest.fixture(scope="module")
def trainer(tiny_folder):  # noqa: F811
    options = {"from_scratch": True, "seq_len": 64, "batch_size": 4, "num_steps": 15, "learning_rate": 3e-3}
    return Trainer(TrainConfig(model=str(tiny_folder), **options), corpus=counting_corpus())


def tokens(llm, params=GREEDY):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_the_engine_samples_from_new_weights_and_training_agrees(llm, trainer):
    """One run through all of it: the same random weights, training, new weights, and the same numbers from both."""
    old = tokens(llm)
    before = score_texts(trainer, PROMPTS)
    for scores, engine in zip(before, llm.prompt_logprobs(PROMPTS, use_tqdm=False), strict=True):
        np.testing.assert_allclose(scores.logprobs, engine, rtol=0, atol=FLOAT32_MAX)

    trainer.train()
    num_traces = llm.engine.runner.compiles.count
    llm.update_weights(trainer.params)
    new = tokens(llm)
    assert new != old
    assert llm.engine.runner.compiles.count == num_traces  # no step was compiled again

    sampled = llm.generate(
        PROMPTS, SamplingParams(temperature=1.0, max_tokens=30, logprobs=0, seed=1, ignore_eos=True), use_tqdm=False
    )
    found = consistency(trainer, sampled)
    assert found.num_tokens == 90
    assert found.max_difference <= FLOAT32_MAX and found.mean_difference <= found.max_difference
    assert consistency(llm, sampled).max_difference <= FLOAT32_MAX

    trainer.config = TrainConfig(**{**vars(trainer.config), "num_steps": 16})
    trainer.train()  # takes its own arrays over; the engine's are copies
    assert tokens(llm) == new
    assert consistency(trainer, sampled).max_difference > 10 * FLOAT32_MAX


def test_new_weights_forget_the_prefix_cache_and_wait_for_requests(llm, trainer):
    prompt = list(range(200, 264))
    first = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens > 0
    llm.engine.add_request("running", prompt, GREEDY)
    with pytest.raises(ValueError, match=r"update_weights: 1 request\(s\) run"):
        llm.update_weights(trainer.params)
    llm.engine.abort("running")
    llm.update_weights(trainer.params)
    again = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert again.num_cached_tokens == 0 and again.prompt_token_ids == first.prompt_token_ids


def test_wrong_weights_are_refused_before_any_is_changed(llm, trainer):
    before = tokens(llm)
    with pytest.raises(ValueError, match="params: expected 19 arrays"):
        llm.update_weights(trainer.params[:-1])
    wrong = (*trainer.params[:-1], trainer.params[0])
    with pytest.raises(ValueError, match=r"params: norm.weight has shape|params: .* has shape"):
        llm.update_weights(wrong)
    assert tokens(llm) == before


def test_bfloat16_training_is_near_the_engine_in_bfloat16(tiny_folder):  # noqa: F811
    llm = make_llm(tiny_folder, dtype="bfloat16")
    params = SamplingParams(temperature=1.0, max_tokens=40, logprobs=0, seed=2, ignore_eos=True)
    sampled = llm.generate(PROMPTS, params, use_tqdm=False)
    found = consistency(llm, sampled)
    assert found.num_tokens == 120
    assert 0 < found.mean_difference <= BFLOAT16_MEAN


def test_scores_and_hidden_states_do_not_depend_on_the_neighbours(llm):
    texts = ["hello", "The quick brown fox jumps over the lazy dog.", *PROMPTS]
    together = score_texts(llm, texts, with_hidden_states=True)
    for text, scores in zip(texts, together, strict=True):
        alone = score_texts(llm, [text], with_hidden_states=True)[0]
        assert alone.token_ids == scores.token_ids
        assert scores.hidden_states.shape == (len(scores.token_ids), 64)
        assert len(scores.logprobs) == len(scores.token_ids) - 1
        np.testing.assert_allclose(scores.logprobs, alone.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(scores.hidden_states, alone.hidden_states, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="text 1 has 1 tokens"):
        score_texts(llm, [[1, 2], [1]])
