"""`qjax bench serve` against the server with a fake engine: what is sent, and what comes of it."""

import json

import pytest

from qjax.bench import serve
from qjax.bench.config import ServeBenchConfig
from tests.server.conftest import folder, start, tokenizer  # noqa: F401 (fixtures)

LENGTHS = {"num_prompts": 6, "random_input_len": 9, "random_output_len": 5}


@pytest.fixture
def measure(start, folder, tmp_path, monkeypatch):  # noqa: F811
    """Runs the benchmark: its exit code, the requests that came, and the saved result."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    async def run(server=None, **options):
        server = server or await start(answer=lambda *_: "one two three four five six seven eight")
        options = {"base_url": server.url, "tokenizer": str(folder), "disable_tqdm": True, **LENGTHS, **options}
        config = ServeBenchConfig(save_result=True, result_dir=str(tmp_path), result_filename="out.json", **options)
        code = await serve._run(config)
        return code, server.engine.calls, json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
async def test_both_backends(measure, backend, capsys):
    code, calls, result = await measure(backend=backend, temperature=0.0, num_warmups=2, save_detailed=True)
    assert code == 0 and len(calls) == 8, "two warm-ups are not counted"
    assert all(params.ignore_eos and params.max_tokens == 5 and params.temperature == 0 for _, _, params, *_ in calls)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
    assert all(n == 9 for n in result["input_lens"]) or backend == "openai-chat"
    assert result["output_lens"] == [5] * 6 and all(len(gaps) <= 4 for gaps in result["itls"])
    assert result["model_id"] == "org/fake-model" and result["backend"] == backend
    assert all(result[f"{what}_{name}_ms"] > 0 for what in ("mean", "median", "p99") for name in ("ttft", "e2el"))
    out = capsys.readouterr().out
    assert "Successful requests:                     6" in out and "Mean TTFT (ms):" in out and "Saved: " in out


async def test_keys_headers_and_fields(measure, start, monkeypatch):  # noqa: F811
    server = await start(config={"api_key": ["secret"]})
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    code, calls, result = await measure(server, extra_body={"top_k": 7}, header=["X-Request-Id=mine"], num_prompts=1)
    assert code == 0 and calls[0][0] == "cmpl-mine" and calls[0][2].top_k == 7
    assert "secret" not in json.dumps(result)


async def test_concurrency_and_rate(measure):
    _, _, result = await measure(max_concurrency=2, request_rate=200.0, metadata=["gpu=none"])
    assert result["max_concurrent_requests"] <= 2 and result["completed"] == 6
    assert (result["request_rate"], result["gpu"], result["max_concurrency"]) == (200.0, "none", 2)
    assert result["duration"] >= 6 / 200


async def test_failures_are_counted_and_told(measure, capsys):
    code, _, result = await measure(random_input_len=300)
    assert (code, result["completed"], result["failed"]) == (1, 0, 6)
    err = capsys.readouterr().err
    assert err.count("failed: 400") == 1 or err.count("maximum context length") == 1, "each error once"


async def test_an_error_in_the_stream(measure, start, capsys):  # noqa: F811
    server = await start(answer=lambda *_: "one two three four")
    server.engine.error_after = 2
    code, _, result = await measure(server, num_prompts=2)
    assert (code, result["failed"]) == (1, 2)
    assert "could not compute this request" in capsys.readouterr().err


async def test_no_server(measure, start):  # noqa: F811
    server = await start()
    server.url = "http://127.0.0.1:1"
    with pytest.raises(ValueError, match=r"http://127.0.0.1:1/v1/models did not answer"):
        await measure(server)
    with pytest.raises(ValueError, match="is not ready after"):
        await measure(server, model="m", ready_check_timeout_sec=0.5)
