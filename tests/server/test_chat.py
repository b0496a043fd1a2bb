import math

import pytest

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


class TestWhole:
    async def test_an_answer_by_the_openai_client(self, server):
        answer = await server.client.chat.completions.create(model="org/fake-model", messages=HI)
        assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
        assert answer.model == "org/fake-model"
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", "Hello from answer 0.")
        assert choice.finish_reason == "stop" and choice.stop_reason is None
        _, prompt_ids, params, *_ = server.engine.calls[0]
        num = len(server.engine.tokenizer.encode("Hello from answer 0.")) + 1
        assert answer.usage.prompt_tokens == len(prompt_ids)
        assert answer.usage.completion_tokens == num and answer.usage.total_tokens == num + len(prompt_ids)
        assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt_ids) // 16 * 16
        assert params.max_tokens == 256 - len(prompt_ids)  # absent: the rest of the context

    async def test_the_prompt_is_the_chat_template(self, server):
        await server.post(CHAT, {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}})
        prompt = server.engine.tokenizer.decode(server.engine.calls[0][1], skip_special_tokens=False)
        assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    async def test_default_chat_template_kwargs_and_template_file(self, start, tmp_path):
        template = tmp_path / "t.jinja"
        template.write_text("{{ messages[0].content }}|{{ a }}{{ b }}")
        server = await start({"chat_template": str(template), "default_chat_template_kwargs": {"a": 1, "b": 2}})
        await server.post(CHAT, {"messages": HI, "chat_template_kwargs": {"b": 3}})
        assert server.engine.tokenizer.decode(server.engine.calls[0][1]) == "Hi|13"

    async def test_several_answers_by_index(self, server):
        answer = await server.client.chat.completions.create(model="", messages=HI, n=3)
        assert [(c.index, c.message.content) for c in answer.choices] == [
            (i, f"Hello from answer {i}.") for i in range(3)
        ]

    async def test_sampling_fields_reach_the_engine(self, start):
        server = await start(defaults={"temperature": 0.6, "top_k": 20, "top_p": 0.95})
        extra = {
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "stop_token_ids": [7],
            "min_tokens": 2,
            "ignore_eos": True,
            "bad_words": ["no"],
            "allowed_token_ids": [1, 2],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "cache_salt": "salt",
        }
        options = {"temperature": 0, "presence_penalty": 1, "frequency_penalty": -1, "seed": 42, "stop": ["x"]}
        bias = {"5": 300.0, "6": -1.0}
        await server.client.chat.completions.create(
            model="", messages=HI, max_completion_tokens=9, logit_bias=bias, extra_body=extra, **options
        )
        *_, params, _priority, salt = server.engine.calls[0]
        expected = {**options, **extra, "max_tokens": 9, "logit_bias": {5: 100.0, 6: -1.0}, "top_p": 0.95}
        expected.pop("cache_salt")
        assert {name: getattr(params, name) for name in expected} == expected
        assert salt == "salt"

    async def test_max_tokens_is_cut_to_the_context(self, server):
        status, body, _ = await server.post(CHAT, {"messages": HI, "max_tokens": 256})
        assert status == 200 and body["choices"][0]["finish_reason"] == "stop"
        _, prompt_ids, params, *_ = server.engine.calls[0]
        assert params.max_tokens == 256 - len(prompt_ids)

    async def test_finish_reasons(self, server):
        _, body, _ = await server.post(CHAT, {"messages": HI, "max_tokens": 2})
        assert body["choices"][0]["finish_reason"] == "length"
        _, body, _ = await server.post(CHAT, {"messages": HI, "stop": ["zzz", "from"]})
        choice = body["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "from")
        assert choice["message"]["content"] == "Hello "

    async def test_logprobs_are_openais_and_finite(self, server):
        answer = await server.client.chat.completions.create(model="", messages=HI, logprobs=True, top_logprobs=3)
        tokens = answer.choices[0].logprobs.content
        text = b"".join(bytes(t.bytes) for t in tokens)
        assert text.decode() == "Hello from answer 0.<|im_end|>"
        assert all(math.isclose(t.logprob, math.log(0.25)) for t in tokens)
        assert [a.logprob for a in tokens[0].top_logprobs] == [math.log(0.75), math.log(0.25), -9999.0]
        answer = await server.client.chat.completions.create(model="", messages=HI, logprobs=True)
        assert [t.top_logprobs for t in answer.choices[0].logprobs.content] == [[]] * len(tokens)

    async def test_extensions_of_the_answer(self, server):
        _, body, _ = await server.post(
            CHAT,
            {
                "messages": HI,
                "prompt_logprobs": 1,
                "return_token_ids": True,
                "return_prompt_text": True,
                "logprobs": True,
                "return_tokens_as_token_ids": True,
            },
        )
        tokenizer = server.engine.tokenizer
        ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        answer_ids = [*tokenizer.encode("Hello from answer 0."), tokenizer.eos_token_id]
        assert body["prompt_token_ids"] == ids and body["choices"][0]["token_ids"] == answer_ids
        assert body["prompt_text"] == tokenizer.decode(ids, skip_special_tokens=False)
        assert [t["token"] for t in body["choices"][0]["logprobs"]["content"]] == [f"token_id:{i}" for i in answer_ids]
        assert body["prompt_logprobs"][0] is None and len(body["prompt_logprobs"]) == len(ids)
        entry = body["prompt_logprobs"][1][str(ids[1])]
        assert entry == {"logprob": math.log(0.25), "rank": 2, "decoded_token": tokenizer.token_text(ids[1])}

    async def test_continue_final_message_and_echo(self, server):
        messages = [*HI, {"role": "assistant", "content": "They"}]
        for extra in ({}, {"add_generation_prompt": False}):
            _, body, _ = await server.post(
                CHAT, {"messages": messages, "continue_final_message": True, "echo": True, **extra}
            )
            assert body["choices"][0]["message"]["content"] == "TheyHello from answer 0."
        prompt = server.engine.tokenizer.decode(server.engine.calls[0][1])
        assert prompt.endswith("</think>\n\nThey")

    async def test_tools_are_shown_unless_the_choice_is_none(self, start):
        server = await start(max_model_len=1024)
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        for choice, is_shown in (({}, True), ({"tool_choice": "auto"}, True), ({"tool_choice": "none"}, False)):
            await server.post(CHAT, {"messages": HI, "tools": tools, **choice})
            prompt = server.engine.tokenizer.decode(server.engine.calls[-1][1])
            assert ('"name": "f"' in prompt) is is_shown

    async def test_truncated_prompts(self, server):
        whole = server.engine.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        for options, expected in (
            ({"truncate_prompt_tokens": 4}, whole[-4:]),
            ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, whole[:4]),
            ({"truncate_prompt_tokens": -1}, whole),
            ({"truncate_prompt_tokens": -1, "max_tokens": 250}, whole[-6:]),
        ):
            await server.post(CHAT, {"messages": HI, **options})
            assert server.engine.calls[-1][1] == expected

    async def test_request_ids(self, server):
        _, body, headers = await server.post(CHAT, {"messages": HI}, headers={"X-Request-Id": "abc"})
        assert (body["id"], headers["X-Request-Id"]) == ("chatcmpl-abc", "abc")
        _, body, _ = await server.post(CHAT, {"messages": HI, "request_id": "r-1"}, headers={"X-Request-Id": "abc"})
        assert body["id"] == "chatcmpl-r-1" == server.engine.calls[-1][0]

    @pytest.mark.parametrize("field", ["user", "safety_identifier", "prompt_cache_key"])
    async def test_labels_change_nothing(self, server, field):
        status, _, _ = await server.post(CHAT, {"messages": HI, field: "x", "store": False, "temperature": None})
        assert status == 200


class TestStream:
    async def test_chunks_in_order(self, server):
        chunks = await server.events(CHAT, {"messages": HI})
        deltas = [c["choices"][0]["delta"] for c in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert "".join(d["content"] for d in deltas[1:-1]) == "Hello from answer 0."
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
        assert all("usage" not in c for c in chunks)

    async def test_usage(self, server):
        chunks = await server.events(CHAT, {"messages": HI, "stream_options": {"include_usage": True}})
        assert chunks[-1]["choices"] == [] and all(c["usage"] is None for c in chunks[:-1])
        _, whole, _ = await server.post(CHAT, {"messages": HI})
        assert chunks[-1]["usage"] == whole["usage"]
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await server.events(CHAT, {"messages": HI, "stream_options": options})
        counts = [c["usage"]["completion_tokens"] for c in chunks]
        assert counts == sorted(counts) and counts[0] == 0 and counts[1] == 1

    async def test_the_openai_client_reads_several_answers(self, server):
        texts, reasons = {}, {}
        stream = await server.client.chat.completions.create(
            model="", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                reasons.setdefault(choice.index, []).append(choice.finish_reason)
        assert texts == {0: "Hello from answer 0.", 1: "Hello from answer 1."}
        assert all(r[-1] == "stop" and set(r[:-1]) == {None} for r in reasons.values())
        assert chunk.usage.completion_tokens == 2 * (len(server.engine.tokenizer.encode(texts[0])) + 1)

    async def test_text_and_logprobs_equal_the_whole_answers(self, start):
        server = await start(answer=lambda *_: "Zwölf 🙂 日本 \u2028 done STOP more")
        body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "stop": "STOP", "return_token_ids": True}
        _, whole, _ = await server.post(CHAT, body)
        chunks = await server.events(CHAT, body)
        choices = [c["choices"][0] for c in chunks]
        expected = whole["choices"][0]
        text = "".join(c["delta"].get("content", "") for c in choices)
        assert text == expected["message"]["content"] == "Zwölf 🙂 日本 \u2028 done "
        assert [e for c in choices for e in (c["logprobs"] or {"content": []})["content"]] == expected["logprobs"][
            "content"
        ]
        assert [i for c in choices for i in c.get("token_ids", [])] == expected["token_ids"]
        assert choices[-1]["stop_reason"] == "STOP"
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]

    async def test_separators_inside_a_line_are_escaped(self, start):
        server = await start(answer=lambda *_: "a\u2028b\u2029c\x85d")
        async with server.session.post(server.url + CHAT, json={"messages": HI, "stream": True}) as response:
            text = await response.text()
        assert "\\u2028" in text and len(text.splitlines()) == text.count("\n")
