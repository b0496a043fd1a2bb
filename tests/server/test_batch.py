"""`qjax run-batch` over a fake engine: every line gets its own line back, whatever is wrong with the others."""

import json
import os

import pytest

from qjax.config import ServerConfig
from qjax.server.batch import BatchOptions, run_engine
from tests.server.fake_engine import FakeEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id, url=CHAT, method="POST", **body):
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": f"I am {custom_id}"}], **body}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


@pytest.fixture
def answer(tmp_path, tokenizer, monkeypatch):
    """Answers lines: the engine, the summary, and the lines of the output."""
    monkeypatch.delenv("QJAX_API_KEY", raising=False)

    async def run(*lines, max_inflight=8, config=None, kind=FakeEngine, **engine_options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(lines))
        engine = kind(tokenizer, **engine_options)
        options = BatchOptions(input_file=str(source), output_file=str(target), max_inflight=max_inflight)
        summary = await run_engine(engine, config or ServerConfig(), options)
        return engine, summary, [json.loads(text) for text in target.read_text().splitlines()]

    return run


async def test_answers_are_the_servers(answer):
    engine, summary, out = await answer(line("a", seed=1), "", line("b", TEXT, prompt="Hello", max_tokens=3))
    assert (summary.num_answered, summary.num_failed, engine.phase) == (2, 0, "stopping")
    assert [(r["custom_id"], r["error"]) for r in out] == [("a", None), ("b", None)]
    assert all(set(r) == {"id", "custom_id", "response", "error"} and r["id"].startswith("batch_req_") for r in out)
    chat, completion = (r["response"] for r in out)
    assert chat["status_code"] == 200 and chat["body"]["id"].endswith(chat["request_id"])
    assert chat["body"]["object"] == "chat.completion" and completion["body"]["object"] == "text_completion"
    assert chat["body"]["choices"][0]["message"]["content"] == "Hello from answer 0."
    assert completion["body"]["usage"]["completion_tokens"] == 3
    assert engine.calls[0][2].seed == 1


async def test_a_bad_line_is_an_error_of_its_own(answer):
    cases = [
        ("{", "Line 1 is not valid JSON"),
        ('"text"', "Line 2: The body must be a JSON object"),
        ('{"custom_id": "x", "method": "POST", "body": {}}', "Line 3: url is required"),
        (line("get", method="GET"), 'Line 4: method must be "POST"'),
        (line("far", "https://example.com"), "Line 5: url must be a path of the API"),
        (line("live", stream=True), "Line 6: body.stream must be false"),
        (line("half \ud800", TEXT, prompt="Hello"), None),
        (line("half \ud800"), "Line 8: custom_id must be of this line alone"),
        (line("more", tier=1), "Unrecognized request argument supplied: tier"),
        (line("lost", "/v1/nothing"), "The path /v1/nothing does not exist."),
        (line("other", model="gpt"), "The model `gpt` does not exist."),
        (line("last"), None),
    ]
    _, summary, out = await answer(*(text for text, _ in cases))
    assert (summary.num_answered, summary.num_failed) == (2, 10)
    for result, (text, message) in zip(out, cases, strict=True):
        assert message is None or message in result["error"]["message"], text
        assert (result["error"] is None) == (message is None)
    assert [r["custom_id"] for r in out[:4]] == [None, None, "x", "get"]
    assert [r["response"] and r["response"]["status_code"] for r in out[8:]] == [400, 404, 404, 200]
    assert out[10]["response"]["body"]["error"] == out[10]["error"]


async def test_many_at_a_time_and_no_more_than_asked(answer):
    most, running = 0, set()

    class Engine(FakeEngine):
        async def generate(self, *args, **options):
            nonlocal most
            running.add(args[2])
            most = max(most, len(running))
            async for output in super().generate(*args, **options):
                yield output
            running.remove(args[2])

    lines = (line(str(i)) for i in range(30))
    _, _, out = await answer(*lines, max_inflight=5, kind=Engine, answer=lambda prompt, *_: prompt, delay=0.001)
    assert most == 5
    assert [r["custom_id"] for r in out] == [str(i) for i in range(30)], "in the order of the lines"
    assert all(f"I am {i}" in r["response"]["body"]["choices"][0]["message"]["content"] for i, r in enumerate(out))


async def test_the_key_of_the_environment_does_not_lock_the_batch_out(answer, monkeypatch):
    monkeypatch.setenv("QJAX_API_KEY", "secret")
    _, summary, _ = await answer(line("a"), config=ServerConfig(api_key=["other"]))
    assert summary.num_failed == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
async def test_a_full_disk_is_told_in_a_line(tmp_path, tokenizer):
    (tmp_path / "in").write_text("\n".join(line(str(i)) for i in range(3)))
    options = BatchOptions(input_file=str(tmp_path / "in"), output_file="/dev/full", max_inflight=1)
    with pytest.raises(ValueError, match=r"output_file '/dev/full' cannot be written: .*No space left"):
        await run_engine(FakeEngine(tokenizer), ServerConfig(), options)


async def test_a_failed_start_is_raised(tmp_path, tokenizer):
    (tmp_path / "in").write_text(line("a"))
    engine = FakeEngine(tokenizer)
    engine.start_error = ValueError("config.json: vocab_size is missing.")
    options = BatchOptions(input_file=str(tmp_path / "in"), output_file=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="vocab_size"):
        await run_engine(engine, ServerConfig(), options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_file": "https://x/y"}, "input_file must be a local path, got 'https://x/y'"),
        ({"output_file": "s3://x/y"}, "output_file must be a local path"),
        ({"input_file": "/nowhere"}, "input_file '/nowhere' cannot be read: No such file"),
        ({"output_file": "/nowhere/out"}, "is in a folder that does not exist"),
        ({"output_file": __file__}, "output_file must be another file than input_file"),
        ({"max_inflight": 0}, "max_inflight must be at least 1, got 0"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        BatchOptions(**{"input_file": __file__, "output_file": str(tmp_path / "out"), **options})
