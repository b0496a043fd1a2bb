"""Reasoning and tool calls as fields of their own, by the openai client and field by field."""

import pytest

from qjax.config import ServerConfig

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
THOUGHT = "<think>\nLet me see.\n\nYes.\n</think>\n\n"
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo 🙂 </tool_call>", "days": 3}}\n</tool_call>'
ARGUMENTS = '{"city": "Oslo 🙂 </tool_call>", "days": 3}'
OTHER = '<tool_call>\n{"name": "f"}\n</tool_call>'
BAD = '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>'


@pytest.fixture
def says(start):
    """A server whose model says this."""

    async def start_saying(text, config=None, **options):
        return await start(config, answer=lambda *_: text, max_model_len=4096, **options)

    return start_saying


async def collect(server, **body):
    """The message that a stream's deltas add up to, the finish reason, and the deltas."""
    message, reason, deltas = {"reasoning": "", "content": "", "tool_calls": []}, None, []
    stream = await server.client.chat.completions.create(model="", messages=HI, stream=True, **body)
    async for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            deltas.append(delta)
            kinds = [getattr(delta, name, None) for name in ("reasoning", "content", "tool_calls")]
            assert sum(bool(kind) for kind in kinds) <= 1
            message["reasoning"] += getattr(delta, "reasoning", None) or ""
            message["content"] += delta.content or ""
            for call in delta.tool_calls or []:
                if call.index == len(message["tool_calls"]):
                    assert call.id and call.type == "function"
                    message["tool_calls"].append([call.id, call.function.name, ""])
                else:
                    assert call.index == len(message["tool_calls"]) - 1
                    assert call.id is None and call.function.name is None
                message["tool_calls"][call.index][2] += call.function.arguments
            reason = choice.finish_reason or reason
    return message, reason, deltas


async def both(server, **body):
    """The streamed answer, which is checked to be the whole one but for the ids of its calls."""
    answer = await server.client.chat.completions.create(model="", messages=HI, **body)
    choice = answer.choices[0]
    streamed, reason, _ = await collect(server, **body)
    assert reason == choice.finish_reason
    assert streamed["content"] == (choice.message.content or "")
    assert streamed["reasoning"] == (getattr(choice.message, "reasoning", None) or "")
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    assert [(name, arguments) for _, name, arguments in streamed["tool_calls"]] == calls
    assert all(c.id.startswith("chatcmpl-tool-") for c in choice.message.tool_calls or [])
    return choice.message, calls, reason


def test_vllms_flags_are_accepted():
    from qjax.cli import make_parser
    from qjax.cli.options import read_config

    argv = ["serve", "m", "--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    config = read_config(ServerConfig, make_parser().parse_args(argv))
    assert (config.reasoning_parser, config.enable_auto_tool_choice, config.tool_call_parser) == (
        "qwen3",
        True,
        "hermes",
    )
    with pytest.raises(ValueError, match="reasoning_parser must be one of auto, qwen3, deepseek_r1, none"):
        ServerConfig(reasoning_parser="granite")


class TestReasoning:
    async def test_under_both_names(self, says):
        server = await says(THOUGHT + "Hi there")
        message, _, reason = await both(server)
        assert (message.reasoning, message.content, reason) == ("Let me see.\n\nYes.", "Hi there", "stop")
        assert message.reasoning_content == message.reasoning and message.tool_calls is None
        _, _, deltas = await collect(server)
        assert all(getattr(d, "reasoning_content", None) == getattr(d, "reasoning", None) for d in deltas)

    async def test_without_any_the_names_are_absent(self, says):
        server = await says("<think>\n\n</think>\n\nHi")
        _, body, _ = await server.post(CHAT, {"messages": HI})
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "refusal": None}

    async def test_left_out_at_wish(self, says):
        server = await says(THOUGHT + "Hi")
        message, _, _ = await both(server, extra_body={"include_reasoning": False})
        assert message.content == "Hi" and not hasattr(message, "reasoning")

    async def test_cut_while_thinking(self, says):
        server = await says(THOUGHT + "Hi")
        message, _, reason = await both(server, max_tokens=4)
        assert reason == "length" and message.content is None and message.reasoning

    @pytest.mark.parametrize(
        ("variables", "text", "expected"),
        [
            ({}, "Hi </think>", (None, "Hi </think>")),  # Instruct: no block
            ({"enable_thinking": False}, "Hi", (None, "Hi")),
            ({"opened": True}, "hm\n</think>\n\nHi", ("hm", "Hi")),  # Thinking: the template opens it
        ],
    )
    async def test_the_prompt_says_where_the_answer_begins(self, says, tmp_path, tokenizer, variables, text, expected):
        template = tmp_path / "t.jinja"
        template.write_text(tokenizer.chat_template + "{% if opened %}{{ '<think>\\n' }}{% endif %}")
        server = await says(text, {"chat_template": str(template)})
        for cut in ({}, {"truncate_prompt_tokens": 8}):
            message, _, _ = await both(server, extra_body={"chat_template_kwargs": variables, **cut})
            assert (getattr(message, "reasoning", None), message.content) == expected

    async def test_continued_reasoning(self, says):
        server = await says(" more\n</think>\n\nHi")
        messages = [*HI, {"role": "assistant", "content": "x", "reasoning": "hm"}]
        body = {"messages": messages, "continue_final_message": True, "echo": True}
        _, got, _ = await server.post(CHAT, body)
        assert got["choices"][0]["message"]["content"] == "x more\n</think>\n\nHi"

    async def test_the_servers_parser(self, says):
        server = await says("hm\n</think>\n\nHi", {"reasoning_parser": "deepseek_r1"})
        message, _, _ = await both(server)
        assert (message.reasoning, message.content) == ("hm", "Hi")
        server = await says(THOUGHT + "Hi", {"reasoning_parser": "none"})
        message, _, _ = await both(server)
        assert message.content == THOUGHT + "Hi" and not hasattr(message, "reasoning")

    async def test_effort_turns_thinking_on_and_off(self, says):
        server = await says("Hi", {"default_chat_template_kwargs": {"enable_thinking": False}})

        async def is_closed(**body):
            await server.client.chat.completions.create(model="", messages=HI, **body)
            return server.engine.tokenizer.decode(server.engine.calls[-1][1]).endswith("</think>\n\n")

        assert await is_closed() and await is_closed(reasoning_effort="none")
        assert not await is_closed(reasoning_effort="low")
        assert await is_closed(
            reasoning_effort="low", extra_body={"chat_template_kwargs": {"enable_thinking": False}}
        ), "the request's own variable counts"

    async def test_tokens_are_counted(self, says):
        server = await says(THOUGHT + "Hi there")
        num = len(server.engine.tokenizer.encode("\nLet me see.\n\nYes.\n"))
        answer = await server.client.chat.completions.create(model="", messages=HI, n=2)
        assert answer.usage.completion_tokens_details.reasoning_tokens == 2 * num
        chunks = await server.events(CHAT, {"messages": HI, "n": 2, "stream_options": {"include_usage": True}})
        assert chunks[-1]["usage"] == answer.usage.model_dump(exclude_unset=True)


class TestTools:
    async def test_a_call(self, says):
        server = await says(THOUGHT + OSLO)
        message, calls, reason = await both(server, tools=TOOLS)
        assert (message.reasoning, message.content, reason) == ("Let me see.\n\nYes.", None, "tool_calls")
        assert calls == [("get_weather", ARGUMENTS)]

    async def test_several_and_text_around(self, says):
        server = await says(f"I look.\n{OSLO}\n{BAD}\n{OTHER}\nDone.")
        message, calls, reason = await both(server, tools=TOOLS, tool_choice="auto")
        assert calls == [("get_weather", ARGUMENTS), ("f", "{}")]
        assert (message.content, reason) == (f"I look.\n{BAD}\nDone.", "tool_calls")

    async def test_a_bad_call_alone_is_content(self, says):
        message, calls, reason = await both(await says(BAD), tools=TOOLS)
        assert (message.content, calls, reason) == (BAD, [], "stop")

    async def test_only_the_first(self, says):
        _, calls, reason = await both(await says(f"{OSLO}\n{OTHER}"), tools=TOOLS, parallel_tool_calls=False)
        assert calls == [("get_weather", ARGUMENTS)] and reason == "tool_calls"

    async def test_inside_unclosed_reasoning(self, says):
        message, calls, reason = await both(await says(f"<think>\nI need it.\n{OSLO}"), tools=TOOLS)
        assert (message.reasoning, message.content, reason) == ("I need it.", None, "tool_calls")
        assert calls == [("get_weather", ARGUMENTS)]

    @pytest.mark.parametrize("body", [{}, {"tools": TOOLS, "tool_choice": "none"}])
    async def test_text_where_there_are_no_tools(self, says, body):
        message, calls, reason = await both(await says(OSLO), **body)
        assert (message.content, calls, reason) == (OSLO, [], "stop")

    @pytest.mark.parametrize(
        "config",
        [{"tool_call_parser": "none"}, {"tool_call_parser": "qwen3_coder"}, {"enable_auto_tool_choice": False}],
    )
    async def test_text_where_the_server_says_so(self, says, config):
        message, calls, reason = await both(await says(OSLO, config), tools=TOOLS)
        assert (message.content, calls, reason) == (OSLO, [], "stop")

    async def test_xml(self, says):
        call = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n"
        server = await says(f"{call}</parameter>\n</function>\n</tool_call>")
        _, calls, reason = await both(server, tools=TOOLS)
        assert calls == [("get_weather", '{"city": "Oslo", "days": 3}')] and reason == "tool_calls"

    async def test_cut(self, says):
        server = await says(OSLO)
        num = len(server.engine.tokenizer.encode(OSLO[: OSLO.index(" 🙂")]))
        message, calls, reason = await both(server, tools=TOOLS, max_tokens=num)
        assert calls == [("get_weather", '{"city": "Oslo')] and message.content is None and reason == "length"

    async def test_a_final_part_of_a_tag_is_sent(self, says):
        message, _, _ = await both(await says("I think <tool"), tools=TOOLS)
        assert message.content == "I think <tool"

    async def test_the_answer_can_be_sent_back(self, says):
        """The client's next request holds the message, and the prompt then holds the model's own text."""
        server = await says(f"{THOUGHT}I look.\n{OSLO.replace(' </tool_call>', '', 1)}")
        answer = await server.client.chat.completions.create(model="", messages=HI, tools=TOOLS)
        message = answer.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        await server.client.chat.completions.create(
            model="", messages=[*HI, message.model_dump(exclude_unset=True), result], tools=TOOLS
        )
        first, second = (
            server.engine.tokenizer.decode(call[1], skip_special_tokens=False) for call in server.engine.calls
        )
        text = f"{THOUGHT}I look.\n{OSLO.replace(' </tool_call>', '', 1)}<|im_end|>\n"
        assert second.startswith(first + text)

    async def test_logprobs_and_token_ids_of_a_stream_are_complete(self, says):
        server = await says(f"{THOUGHT}I look.\n{OSLO}")
        body = {"messages": HI, "tools": TOOLS, "logprobs": True, "return_token_ids": True}
        _, whole, _ = await server.post(CHAT, body)
        choices = [c["choices"][0] for c in await server.events(CHAT, body)]
        expected = whole["choices"][0]
        logprobs = [e for c in choices for e in (c["logprobs"] or {"content": []})["content"]]
        assert logprobs == expected["logprobs"]["content"]
        assert [i for c in choices for i in c.get("token_ids", [])] == expected["token_ids"]
