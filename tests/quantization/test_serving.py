"""Quantised checkpoints from the options to the answer, and what is refused of them by name."""

import pytest

from qjax import LLM, SamplingParams
from qjax.config import EngineConfig
from qjax.engine.memory import Device, plan
from qjax.models.config import ModelConfig
from qjax.research import TrainConfig, Trainer, score_texts
from qjax.terminal import info
from tests.quantization.checkpoints import write_pair
from tests.research.conftest import counting_corpus
from tests.text.small_tokenizer import write_small_tokenizer

PROMPTS = [[7, 8, 9, 10], list(range(20, 60))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS = {"kv_cache_memory_bytes": "16MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}


@pytest.fixture(scope="module", params=["fp8", "awq", "gptq"])
def folders(request, tmp_path_factory):
    pair = write_pair(tmp_path_factory.mktemp(request.param), request.param, vocab_size=640)
    for folder in pair:
        write_small_tokenizer(folder)
    return pair


def answers(llm: LLM) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_answers_are_those_of_the_dequantised_model(folders):
    quantised, plain = folders
    expected = answers(LLM(str(plain), **OPTIONS))
    assert len({tuple(ids) for ids in expected}) == 2 and len(set(expected[0])) > 2
    llm = LLM(str(quantised), quantization=quantised.name, **OPTIONS)
    assert answers(llm) == expected
    llm.sleep(1)
    llm.wake_up()
    llm.update_weights(llm.engine.runner.leaves)
    assert answers(llm) == expected
    with pytest.raises(ValueError, match=f"scoring: the model is quantised \\({quantised.name}\\)"):
        score_texts(llm, PROMPTS)


def test_dummy_weights_answer(folders):
    llm = LLM(str(folders[0]), load_format="dummy", **OPTIONS)
    assert [len(ids) for ids in answers(llm)] == [12, 12]


def test_the_option_must_match(folders):
    quantised, plain = folders
    other = {"fp8": "awq", "awq": "gptq", "gptq": "fp8"}[quantised.name]
    with pytest.raises(ValueError, match=f"quantization='{other}', but the checkpoint is quantised by"):
        LLM(str(quantised), quantization=other, **OPTIONS)
    with pytest.raises(ValueError, match="the checkpoint is not quantised"):
        LLM(str(plain), quantization="awq" if other == "fp8" else other, **OPTIONS)
    with pytest.raises(ValueError, match="quantization must be one of awq, fp8, gptq, int4"):
        EngineConfig(model=str(plain), quantization="hqq")  # type: ignore[arg-type]


def test_training_is_refused(folders, tmp_path):
    config = TrainConfig(model=str(folders[0]), output=str(tmp_path), seq_len=64, batch_size=4)
    with pytest.raises(ValueError, match="model: the model is quantised"):
        Trainer(config, corpus=counting_corpus(60))


def test_info_says_it(folders, capsys):
    quantised, _ = folders
    info(EngineConfig(model=str(quantised)), gpu_memory=8 * 2**30)
    printed = capsys.readouterr().out
    assert f"quantised: {quantised.name}" in printed


@pytest.mark.parametrize(("method", "gib"), [("fp8", 8.79), ("awq", 5.75), ("gptq", 5.75)])
def test_plan_of_the_8b(method, gib):
    """Qwen3-8B: 6.95e9 weights in projections, 1.24e9 in bfloat16 embeddings and output."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
    quantization = {
        "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    }
    hf_config = {"architectures": ["Qwen3ForCausalLM"], "quantization_config": quantization[method]} | sizes | heads
    model = ModelConfig.from_hf(hf_config)
    sized = plan(EngineConfig(model="x", max_model_len=4096), model, Device("gpu", 24 * 2**30))
    assert sized.weights_bytes / 2**30 == pytest.approx(gib, abs=0.01)
