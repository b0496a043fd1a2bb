"""`qjax bench throughput` and `latency` over a fake `LLM`: what is asked, printed and saved."""

import json
from types import SimpleNamespace

import pytest

from qjax.bench import offline
from qjax.bench.config import LatencyConfig, ThroughputConfig
from qjax.bench.dataset import load_tokenizer
from qjax.config import EngineConfig
from qjax.outputs import CompletionOutput, RequestOutput


class FakeLLM:
    """Answers with as many tokens as were asked for."""

    def __init__(self):
        self.engine = SimpleNamespace(tokenizer=load_tokenizer("builtin"))
        self.calls = []

    def generate(self, prompts, params, use_tqdm):
        params = params if isinstance(params, list) else [params] * len(prompts)
        self.calls.append((prompts, params))
        return [
            RequestOutput(
                "0", None, self._ids(prompt), [CompletionOutput(i, "", [1] * p.max_tokens) for i in range(p.n)], True
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]

    def _ids(self, prompt):
        return prompt["prompt_token_ids"] if isinstance(prompt, dict) else self.engine.tokenizer.encode(prompt)


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr(offline, "_load", lambda config: fake)
    return fake


def test_throughput(llm, tmp_path, capsys):
    path = tmp_path / "out.json"
    config = ThroughputConfig(
        num_prompts=4, input_len=6, output_len=3, n=2, num_warmups=5, disable_detokenize=True, output_json=str(path)
    )
    result = offline.throughput(config, EngineConfig())
    (warmups, _), (prompts, params) = llm.calls
    assert len(warmups) == 5 and len(prompts) == 4 and not set(warmups) & set(prompts), "nothing measured was cached"
    assert all(p.ignore_eos and p.max_tokens == 3 and p.n == 2 and not p.detokenize for p in params)
    assert json.loads(path.read_text()) == result
    assert (result["num_requests"], result["total_num_tokens"]) == (4, 4 * 6 + 4 * 2 * 3)
    assert result["tokens_per_second"] == pytest.approx(result["total_num_tokens"] / result["elapsed_time"])
    out = capsys.readouterr().out
    assert "Throughput: " in out and "Total num prompt tokens:  24\nTotal num output tokens:  24\n" in out


def test_latency(llm, capsys):
    config = LatencyConfig(input_len=4, output_len=3, batch_size=2, num_iters=3, num_iters_warmup=1)
    result = offline.latency(config, EngineConfig())
    assert len(llm.calls) == 4 and all(call == llm.calls[0] for call in llm.calls)
    assert [len(p["prompt_token_ids"]) for p in llm.calls[0][0]] == [4, 4]
    assert len(result["latencies"]) == 3 and result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 3)
    assert list(result["percentiles"]) == [10, 25, 50, 75, 90, 99]
    assert capsys.readouterr().out.startswith("Avg latency: ")


def test_a_file_that_cannot_be_written():
    with pytest.raises(ValueError, match="output_json '/nowhere/x' cannot be written"):
        offline._save("/nowhere/x", {})
