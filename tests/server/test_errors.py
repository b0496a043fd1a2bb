import json
import zlib

import openai
import pytest

from qjax.config import ServerConfig

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def error_of(body, status, type="BadRequestError"):
    """The error's message, after checking that it has OpenAI's shape."""
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status and body["error"]["type"] == type
    assert body["error"]["message"]
    return body["error"]["message"]


async def refused(server, path, body, param=None):
    """The message of a 400, the same whether streamed or not."""
    status, got, _ = await server.post(path, body)
    assert status == 400, got
    status, streamed, headers = await server.post(path, {**body, "stream": True})
    assert status == 400 and headers["Content-Type"].startswith("application/json")
    if "prompt_logprobs" not in body:
        assert streamed == got
    if param is not None:
        assert got["error"]["param"] == param
    assert not server.engine.calls
    return error_of(got, 400)


class TestHttp:
    async def test_unknown_paths_and_methods(self, server):
        status, body, _ = await server.get("/v1/nothing")
        assert status == 404 and "/v1/nothing" in error_of(body, 404, "NotFoundError")
        status, body, headers = await server.get(CHAT)
        assert status == 405 and "POST" in error_of(body, 405, "MethodNotAllowedError")
        assert headers["Allow"] == "POST"

    @pytest.mark.parametrize(
        "data", [b"{", b"", b'{"messages": NaN}', b"\xff", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 5000]
    )
    async def test_malformed_json(self, server, data):
        status, body, _ = await server.post(CHAT, data=data, headers={"Content-Type": "application/json"})
        assert status == 400
        error_of(body, 400, body["error"]["type"])

    async def test_content_type(self, server):
        status, body, _ = await server.post(CHAT, data=json.dumps({"messages": HI}))
        assert status == 400 and "Only 'application/json' is allowed" in error_of(body, 400, "Bad Request")

    async def test_body_too_large(self, start):
        assert ServerConfig().max_body_size == 32 * 2**20
        server = await start({"max_body_size": 5000})
        headers = {"Content-Type": "application/json"}
        bomb = zlib.compress(b" " * 10**6)
        for data, more in ((b'{"messages": "' + b"x" * 5000 + b'"}', {}), (bomb, {"Content-Encoding": "deflate"})):
            status, body, _ = await server.post(CHAT, data=data, headers={**headers, **more})
            assert status == 413 and "5000" in error_of(body, 413, "RequestEntityTooLargeError")

    async def test_encoded_bodies(self, server):
        headers = {"Content-Type": "application/json"}
        data = json.dumps({"messages": HI}).encode()
        deflate = {**headers, "Content-Encoding": "deflate"}
        assert (await server.post(CHAT, data=zlib.compress(data), headers=deflate))[0] == 200
        status, body, _ = await server.post(CHAT, data=data, headers=deflate)
        assert status == 400 and error_of(body, 400)
        status, body, _ = await server.post(CHAT, data=data, headers={**headers, "Content-Encoding": "rot13"})
        assert status == 415 and "gzip" in error_of(body, 415, "UnsupportedMediaTypeError")

    async def test_unknown_model(self, start):
        server = await start({"served_model_name": ["a", "b/c"]})
        for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "x"})):
            status, got, _ = await server.post(path, {"model": "nope", **body})
            message = error_of(got, 404, "NotFoundError")
            assert status == 404 and message == "The model `nope` does not exist. Valid aliases: a, b/c."
            status, got, _ = await server.post(path, {"model": "b/c", **body})
            assert status == 200 and got["model"] == "b/c"
        with pytest.raises(openai.NotFoundError):
            await server.client.models.retrieve("nope")
        assert (await server.client.models.retrieve("b/c")).id == "b/c"
        assert [m.id for m in (await server.client.models.list()).data] == ["a", "b/c"]


class TestFields:
    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("temperature", 3, r"temperature must be in [0, 2], got 3.0. (parameter=temperature, value=3.0)"),
            ("temperature", "1", 'temperature must be a number, got "1".'),
            ("top_p", 0, "top_p must be in (0, 1], got 0.0."),
            ("n", 0, "n must be at least 1, got 0."),
            ("n", 1000, "n must be at most 128, got 1000."),
            ("n", True, "n must be an integer, got true."),
            ("n", 2**70, "n must be an integer"),
            ("seed", 1.5, "seed must be an integer, got 1.5."),
            ("stop", 3, "stop must be a string or a list of strings, got 3."),
            ("stop", [""], "stop must hold non-empty strings"),
            ("stop", ["x"] * 17, "stop can have at most 16 items, got 17."),
            ("min_tokens", -1, "min_tokens must be at least 0, got -1."),
            ("logit_bias", {"x": 1}, "logit_bias must be"),
            ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage must be true or false"),
            ("cache_salt", "a/b", "cache_salt must be 1 to 128 characters"),
            ("request_id", "a b", "request_id must be 1 to 128 letters"),
            ("max_tokens", 257, "max_tokens=257 cannot be greater than max_model_len=256."),
            ("logprobs_count", 21, "greater than max allowed: 20"),
            ("prompt_logprobs", 21, "greater than max allowed: 20"),
            ("truncate_prompt_tokens", 0, "must be -1 or at least 1"),
            ("min_tokens", 256, "min_tokens must be at most max_tokens="),
        ],
    )
    async def test_bad_values_are_named(self, server, field, value, said):
        for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "x", "max_tokens": None})):
            if field == "logprobs_count":
                wrong = {"logprobs": True, "top_logprobs": value} if path == CHAT else {"logprobs": value}
            else:
                wrong = {field: value}
            if field == "stream_options":
                status, got, _ = await server.post(path, {**body, **wrong, "stream": True})
                assert status == 400 and said in error_of(got, 400)
            else:
                message = await refused(server, path, {**body, **wrong})
                assert said in message or field == "prompt_logprobs"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((f, "x") for f in ("guided_decoding_backend", "vllm_xargs", "kv_transfer_params", "session_id")),
            *((f, True) for f in ("use_beam_search", "store", "nonsense", "return_weight_versions")),
            *(("reasoning_effort", "much"), ("include_reasoning", "no")),
            *(("best_of", 2), ("chat_template", "x"), ("repetition_detection", {"max_pattern_size": 3})),
            ("logprob_token_ids", [1]),
            *(("parallel_tool_calls", "no"), ("functions", []), ("function_call", {}), ("documents", [{}])),
            *(("length_penalty", 2.0), ("spaces_between_special_tokens", False), ("stream_interval", 2)),
            *(("modalities", ["text", "audio"]), ("service_tier", "flex"), ("web_search_options", {})),
            *(("tool_choice", "required"), ("tool_choice", {"type": "function", "function": {"name": "f"}})),
            *(("tool_choice", "auto"), ("tools", []), ("tools", [{"type": "web_search"}])),
            ("tools", [{"type": "function", "function": {"name": "f", "strict": "yes"}}]),
            ("top_logprobs", 2),
        ],
    )
    async def test_what_is_not_done_is_refused_by_name(self, server, field, value):
        message = await refused(server, CHAT, {"messages": HI, field: value})
        assert field in message

    @pytest.mark.parametrize("field", ["suffix", "prompt_embeds", "messages", "best_of"])
    async def test_and_for_completions(self, server, field):
        assert field in await refused(server, TEXT, {"prompt": "x", field: "y"})

    async def test_neutral_values_of_refused_fields_are_accepted(self, server):
        neutral = {
            "response_format": {"type": "text"},
            "use_beam_search": False,
            "best_of": 1,
            "store": False,
            "guided_json": None,
            "service_tier": "auto",
            "thinking_token_budget": -1,
            "length_penalty": 1.0,
            "modalities": ["text"],
        }
        assert "best_of" in await refused(server, TEXT, {"prompt": "x", "best_of": True})  # true is not 1
        status, body, _ = await server.post(CHAT, {"messages": HI, **neutral})
        assert status == 200, body

    @pytest.mark.parametrize("depth", [300, 700, 900, 950, 990])
    async def test_deep_nesting_is_never_a_fault_of_the_server(self, start, depth):
        server = await start(max_model_len=8192)
        deep = "[" * depth + "]" * depth
        for body in (
            '{"messages": [{"role": "user", "content": %s}]}',
            '{"messages": [{"role": "user", "content": "x", "other": %s}]}',
            '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": '
            '{"name": "f", "parameters": {"x": %s}}}]}',
            '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"x": %s}}',
            '{"messages": [{"role": "user", "content": "x"}], "temperature": %s}',
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "%s"}}]}]}',
        ):
            data = (body % deep).encode()
            status, got, _ = await server.post(CHAT, data=data, headers={"Content-Type": "application/json"})
            assert status in (200, 400), (body, got)

    async def test_contradictions(self, server):
        await refused(server, CHAT, {"messages": HI, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens")
        both = {"continue_final_message": True, "add_generation_prompt": True}
        await refused(server, CHAT, {"messages": HI, **both}, "continue_final_message")
        status, body, _ = await server.post(CHAT, {"messages": HI, "stream_options": {"include_usage": True}})
        assert status == 400 and "`stream=True`" in error_of(body, 400)
        status, body, _ = await server.post(CHAT, {"messages": HI, "stream": True, "prompt_logprobs": 1})
        assert status == 400 and "prompt_logprobs" in error_of(body, 400)

    async def test_missing_and_bad_prompts(self, server):
        assert await refused(server, CHAT, {}, "messages") == "messages is required: a list of objects."
        assert "non-empty list" in await refused(server, CHAT, {"messages": []}, "messages")
        assert "image_url" in await refused(
            server, CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
        )
        for prompt in ("", [], [[]], ["x", ""]):
            assert "empty" in await refused(server, TEXT, {"prompt": prompt}, "prompt")
        assert "0 to 519" in await refused(server, TEXT, {"prompt": [[1], [9999]]}, "prompt")
        assert "surrogate" in await refused(server, TEXT, {"prompt": "a\ud83d"})
        assert "at most 1024" in await refused(server, TEXT, {"prompt": ["x"] * 1025}, "prompt")
        assert "priority" in await refused(server, TEXT, {"prompt": "x", "priority": 1})
        kwargs = {"chat_template_kwargs": {"tokenize": True}}
        assert "'tokenize'" in await refused(server, CHAT, {"messages": HI, **kwargs}, "chat_template_kwargs")

    async def test_a_prompt_longer_than_the_context(self, server):
        for num in (256, 257, 300):
            message = await refused(server, TEXT, {"prompt": [1] * num}, "input_tokens")
            assert "maximum context length is 256 tokens" in message and f"contains {num} input tokens" in message

    async def test_an_id_that_is_in_use(self, start):
        server = await start(delay=0.05)
        async with server.session.post(
            server.url + CHAT, json={"messages": HI, "stream": True, "request_id": "a"}
        ) as stream:
            await stream.content.readline()
            status, body, _ = await server.post(CHAT, {"messages": HI, "request_id": "a"})
            assert status == 400 and "in use" in error_of(body, 400)


class TestKeys:
    async def test_keys_guard_all_but_the_probes(self, start):
        server = await start({"api_key": ["k1", "k2"]})
        for path in ("/v1/models", "/version", "/nothing"):
            status, body, headers = await server.get(path)
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
            error_of(body, 401, "AuthenticationError")
        for path in ("/health", "/ping"):
            assert (await server.get(path))[0] == 200
        for given in ("Bearer k", "Bearer ", "Basic k1", "k1", "Bearer k1k2", "Bearer é"):
            status, _, _ = await server.get("/v1/models", headers={"Authorization": given})
            assert status == 401, given
        for key in ("k1", "k2"):
            client = server.client.with_options(api_key=key)
            assert (await client.models.list()).data[0].id == "org/fake-model"
        with pytest.raises(openai.AuthenticationError):
            await server.client.models.list()

    async def test_the_key_of_the_environment(self, start, monkeypatch):
        monkeypatch.setenv("QJAX_API_KEY", "from-env")
        server = await start()
        assert (await server.get("/version"))[0] == 401
        headers = {"Authorization": "Bearer from-env"}
        assert (await server.get("/version", headers=headers))[1]["version"]


class TestEngineFaults:
    async def test_a_fault_of_one_request(self, server):
        server.engine.error_after = 3
        status, body, _ = await server.post(CHAT, {"messages": HI})
        assert status == 500
        error_of(body, 500, "InternalServerError")
        with pytest.raises(openai.APIError, match="could not compute"):
            stream = await server.client.chat.completions.create(model="", messages=HI, stream=True)
            async for _ in stream:
                pass

    async def test_mid_stream_there_is_one_error_then_the_end(self, server):
        server.engine.error_after = 3
        chunks = await server.events(CHAT, {"messages": HI})
        assert [("error" in c) for c in chunks] == [False] * (len(chunks) - 1) + [True]
        error_of(chunks[-1], 500, "InternalServerError")
        assert (await server.get("/health"))[0] == 200

    async def test_a_bug_says_nothing_of_its_inside(self, server, monkeypatch):
        def broken(*args, **options):
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(server.engine, "generate", broken)
        status, body, _ = await server.post(CHAT, {"messages": HI})
        assert status == 500 and "secret" not in error_of(body, 500, "InternalServerError")

    async def test_several_prompts_end_together(self, start):
        server = await start(delay=0.01)
        server.engine.error_after = 3
        status, _, _ = await server.post(TEXT, {"prompt": ["x"] * 5})
        assert status == 500 and server.engine.num_unfinished == 0
