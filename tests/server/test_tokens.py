"""/tokenize, /detokenize, and what operators read: /metrics, /load, /reset_prefix_cache."""

import pytest

from tests.server.test_structured import CHAT


async def test_a_text_and_back(server, tokenizer):
    text = "Hello, 世界 🙂<|im_end|>"
    status, answer, _ = await server.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200
    assert answer["tokens"] == tokenizer.encode(text) and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == server.engine.max_model_len
    assert answer["token_strs"][-1] == "<|im_end|>"
    status, back, _ = await server.post("/detokenize", {"tokens": answer["tokens"]})
    assert (status, back) == (200, {"prompt": text})


async def test_a_conversation_becomes_what_chat_reads(server):
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    _, answer, _ = await server.post("/tokenize", body)
    await server.post("/v1/chat/completions", body)
    assert answer["tokens"] == server.engine.calls[-1][1]
    _, by_effort, _ = await server.post("/tokenize", {"messages": messages, "reasoning_effort": "none"})
    assert by_effort == answer


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "temperature": 1}, "temperature"),
        ("/tokenize", CHAT | {"temperature": 1}, "temperature"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, "model"),
        ("/detokenize", {"tokens": ["x"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
async def test_errors_name_the_field(server, path, body, param):
    status, answer, _ = await server.post(path, body)
    assert status in (400, 404) and answer["error"]["param"] == param


async def test_metrics_load_and_cache(start):
    server = await start(config={"api_key": ["k"]})
    async with server.session.get(server.url + "/metrics") as response:
        assert response.status == 401
    headers = {"Authorization": "Bearer k"}
    async with server.session.get(server.url + "/metrics", headers=headers) as response:
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"vllm:generation_tokens_total" in await response.read()
    assert (await server.get("/load", headers=headers))[1]["server_load"] == 0
    for query, reset_external in (("", False), ("?reset_external=true", True)):
        assert (await server.post("/reset_prefix_cache" + query, headers=headers))[1] == {"success": True}
        assert server.engine.reset_external == reset_external
    assert (await server.post("/reset_prefix_cache?reset_external=maybe", headers=headers))[0] == 400
