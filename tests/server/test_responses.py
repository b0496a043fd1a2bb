"""/v1/responses by the openai client, and event by event."""

import asyncio
import json

import aiohttp
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}
THOUGHT = "<think>\nLet me see.\n\nYes.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo 🙂"}}\n</tool_call>'
ARGUMENTS = '{"city": "Oslo 🙂"}'
CUT = [(THOUGHT + "Hi", 4, "reasoning"), ("One, two, three", 3, "message"), (CALL, 25, "function_call")]
ALL = f"{THOUGHT}I look.\n{CALL}\n{CALL}\nDone."


@pytest.fixture
def says(start):
    async def start_saying(text, config=None, **options):
        return await start(config, answer=lambda *_: text, **{"max_model_len": 4096, **options})

    return start_saying


async def events_of(server, **body):
    """The events of a stream; each is checked against the SDK's type, its name, and its number."""
    async with server.session.post(server.url + PATH, json={"input": "Hi", **body, "stream": True}) as response:
        text = (await response.read()).decode()
        assert response.status == 200 and response.content_type == "text/event-stream", text
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for i, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == i
        EVENT.validate_python(event)
        events.append(event)
    return events


def without_ids(response):
    """What two answers to one request have in common."""
    own = {k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at")}
    own["output"] = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in own["output"]]
    return own


def rebuilt(events):
    """The output that the events add up to, by the rules of the API."""
    items = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
        elif kind == "output_item.done":
            assert {**items[-1], "status": event["item"]["status"]} == event["item"]
            items[-1] = event["item"]
        elif kind == "content_part.added":
            items[-1]["content"].append(event["part"])
        elif kind == "content_part.done":
            assert items[-1]["content"][event["content_index"]] == event["part"]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            items[-1]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert items[-1]["content"][event["content_index"]]["text"] == event["text"]
        elif kind == "function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert items[-1]["arguments"] == event["arguments"]
        if "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (items[-1]["id"], len(items) - 1)
    return items


async def both(server, **body):
    """The whole response, after checking that the stream says the same."""
    status, whole, _ = await server.post(PATH, {"input": "Hi", **body})
    assert status == 200, whole
    Response.model_validate(whole)
    events = await events_of(server, **body)
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [(e["response"]["status"], e["response"]["output"]) for e in events[:2]] == [("in_progress", [])] * 2
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    assert without_ids(last["response"]) == without_ids(whole)
    assert rebuilt(events) == last["response"]["output"]
    return whole


class TestAnswer:
    async def test_by_the_client(self, says):
        server = await says(THOUGHT + "Hi there")
        answer = await server.client.responses.create(model="", input="Hi", metadata={"a": "b"}, temperature=0.5)
        assert answer.output_text == "Hi there" and answer.status == "completed"
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.output[0].content[0].text == "Let me see.\n\nYes."
        assert (answer.metadata, answer.temperature, answer.store) == ({"a": "b"}, 0.5, False)
        assert answer.id.startswith("resp_") and answer.completed_at >= answer.created_at
        prompt, num = len(server.engine.calls[0][1]), len(server.engine.tokenizer.encode(THOUGHT + "Hi there")) + 1
        num_reasoning = len(server.engine.tokenizer.encode("\nLet me see.\n\nYes.\n"))
        assert answer.usage.to_dict() == {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": prompt // 16 * 16, "cache_write_tokens": 0},
            "output_tokens": num,
            "output_tokens_details": {"reasoning_tokens": num_reasoning},
            "total_tokens": prompt + num,
        }

    async def test_by_the_clients_stream(self, says):
        server = await says(ALL)
        async with server.client.responses.stream(model="", input="Hi", tools=[TOOL]) as stream:
            texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(texts) == final.output_text
        calls = [item for item in final.output if item.type == "function_call"]
        assert [(c.name, c.arguments, c.status) for c in calls] == [("get_weather", ARGUMENTS, "completed")] * 2
        assert len({c.call_id for c in calls}) == 2

    @pytest.mark.parametrize(
        ("text", "body", "kinds"),
        [
            ("Hi", {}, ["message"]),
            ("", {}, []),
            (THOUGHT + "Hi", {}, ["reasoning", "message"]),
            (THOUGHT + "Hi", {"include_reasoning": False}, ["message"]),
            (THOUGHT + "Hi", {"reasoning": {"effort": "none"}}, ["message"]),  # the block was closed in the prompt
            (ALL, {"tools": [TOOL]}, ["reasoning", "message", "function_call", "function_call", "message"]),
            (
                ALL,
                {"tools": [TOOL], "parallel_tool_calls": False},
                ["reasoning", "message", "function_call", "message"],
            ),
            (ALL, {"tools": [TOOL], "tool_choice": "none"}, ["reasoning", "message"]),
            (ALL, {"tools": []}, ["reasoning", "message"]),
        ],
    )
    async def test_streamed_is_whole(self, says, text, body, kinds):
        answer = await both(await says(text), **body)
        assert [item["type"] for item in answer["output"]] == kinds
        assert {item["status"] for item in answer["output"]} <= {"completed"}

    async def test_the_order_of_events(self, says):
        events = await events_of(await says(f"<think>\nHm\n</think>\n\nOk{CALL}"), tools=[TOOL])
        kinds = [e["type"].removeprefix("response.") for e in events]
        assert [k for i, k in enumerate(kinds) if k != kinds[i - 1]] == [  # neighbouring deltas as one
            *("created", "in_progress"),
            *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
            *("content_part.done", "output_item.done"),
            *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
            *("content_part.done", "output_item.done"),
            *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
            "completed",
        ]

    @pytest.mark.parametrize(("text", "part", "kind"), CUT)
    async def test_cut(self, says, text, part, kind):
        answer = await both(await says(text), tools=[TOOL], max_output_tokens=part)
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert answer["usage"]["output_tokens"] == part and answer["completed_at"] is None
        assert [(item["type"], item["status"]) for item in answer["output"]] == [(kind, "incomplete")]

    async def test_a_loop(self, says):
        server = await says("One, two")
        run = server.engine._run

        async def looping(*args):
            async for output in run(*args):
                for delta in output.outputs:
                    object.__setattr__(delta, "finish_reason", delta.finish_reason and "repetition")
                yield output

        server.engine._run = looping
        answer = await both(server)
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": None})

    async def test_a_json_schema(self, says):
        server = await says('{"a": 1}')
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
        answer = await server.client.responses.create(model="", input="Hi", text=text)
        assert answer.text.format.to_dict() == text["format"]
        assert server.engine.calls[-1][2].structured_outputs.json == schema
        await server.client.responses.create(model="", input="Hi", text={"format": {"type": "json_object"}})
        assert server.engine.calls[-1][2].structured_outputs.json_object
        await server.client.responses.create(model="", input="Hi", text={"format": {"type": "text"}})
        assert server.engine.calls[-1][2].structured_outputs is None

    async def test_sampling_fields_reach_the_engine(self, says):
        server = await says("Hi")
        values = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["x"], "min_tokens": 1}
        await both(server, **values, max_output_tokens=9, cache_salt="s", request_id="mine")
        request_id, _, params, _, salt = server.engine.calls[-1]
        assert {name: getattr(params, name) for name in values} == values
        assert (params.max_tokens, salt, request_id) == (9, "s", "resp_mine")


class TestInput:
    async def test_the_answer_can_be_sent_back(self, says):
        """The prompt then holds the model's own text, so that it is found in the prefix cache."""
        text = f"{THOUGHT}I look.\n{CALL}\n{CALL}"
        server = await says(text)
        user = {"role": "user", "content": "Hi"}
        first = await server.client.responses.create(model="", input=[user], tools=[TOOL])
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
            for item in first.output
            if item.type == "function_call"
        ]
        items = [user, *(item.to_dict() for item in first.output), *results]
        await server.client.responses.create(model="", input=items, tools=[TOOL])
        one, two = (server.engine.tokenizer.decode(c[1], skip_special_tokens=False) for c in server.engine.calls)
        assert two.startswith(f"{one}{text}<|im_end|>\n") and two.count("sunny") == 2

    @pytest.mark.parametrize(
        "choice",
        [
            "required",
            {"type": "function", "name": "get_weather"},
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
        ],
    )
    async def test_demanded_calls(self, says, choice):
        server = await says(CALL)
        answer = await both(server, tools=[TOOL, {**TOOL, "name": "other"}], tool_choice=choice)
        assert [item["type"] for item in answer["output"]] == ["function_call"]
        assert answer["tool_choice"] == choice and [t["name"] for t in answer["tools"]] == ["get_weather", "other"]
        grammar = json.dumps(server.engine.calls[-1][2].structured_outputs.structural_tag)
        assert "get_weather" in grammar and ("other" in grammar) == (choice == "required")

    async def test_effort_turns_thinking_on_and_off(self, says):
        server = await says("Hi", {"default_chat_template_kwargs": {"enable_thinking": False}})

        async def is_closed(**body):
            await server.post(PATH, {"input": "Hi", **body})
            return server.engine.tokenizer.decode(server.engine.calls[-1][1]).endswith("</think>\n\n")

        assert await is_closed() and await is_closed(reasoning={"effort": "none"})
        assert not await is_closed(reasoning={"effort": "low", "summary": "auto"})

    async def test_truncation_drops_the_oldest_turns(self, says):
        server = await says("Hi", max_model_len=120)
        turns = [
            item
            for i in range(20)
            for item in ({"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": f"A{i}."})
        ]
        body = {"instructions": "Be kind.", "input": [*turns, {"role": "user", "content": "Last?"}]}
        status, got, _ = await server.post(PATH, body)
        assert status == 400 and "maximum context length is 120" in got["error"]["message"]
        await both(server, **body, truncation="auto", max_output_tokens=20)
        ids = server.engine.calls[-1][1]
        prompt = server.engine.tokenizer.decode(ids)
        assert "Be kind." in prompt and "Last?" in prompt and "A19." in prompt and "Q0?" not in prompt
        kept = next(i for i in range(20) if f"Q{i}?" in prompt)
        one_more = server.engine.tokenizer.encode(
            f"<|im_start|>user\nQ{kept}?<|im_end|>\n<|im_start|>assistant\nA1.<|im_end|>\n"
        )
        assert len(ids) <= 100 < len(ids) + len(one_more)


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            *(({name: "x"}, name) for name in ("previous_response_id", "conversation", "prompt", "moderation")),
            *(({name: True}, name) for name in ("background", "nonsense", "top_logprobs", "enable_response_messages")),
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"messages": []}, "messages"),
            ({"max_tokens": 3}, "max_tokens"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 5000}, "max_output_tokens"),
            ({"temperature": 3}, "temperature"),
            ({"cache_salt": "/"}, "cache_salt"),
            ({"include": ["message.output_text.logprobs"]}, "include"),
            ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
            ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
            ({"text": {"verbosity": "low"}}, "text.verbosity"),
            ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
            ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
            ({"truncation": "middle"}, "truncation"),
            ({"tools": [TOOL, {"search_context_size": "low", "type": "web_search"}]}, "tools[1].type"),
            ({"tools": [{"type": "function"}]}, "tools[0].name"),
            ({"tools": [3]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": "sometimes"}, "tool_choice"),
            ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
            ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
            ({"tool_choice": {"type": "allowed_tools", "tools": [{"name": "f"}]}}, "tool_choice"),
            ({"service_tier": "flex"}, "service_tier"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
        ],
    )
    async def test_what_is_not_done_is_refused_by_name(self, says, body, param):
        server = await says("Hi")
        got = {}
        for stream in (False, True):
            status, got[stream], headers = await server.post(PATH, {"input": "Hi", **body, "stream": stream})
            assert status == 400 and headers["Content-Type"].startswith("application/json"), got
        assert got[False] == got[True] and got[True]["error"]["param"] == param
        assert param.split("[")[0] in got[True]["error"]["message"]
        assert not server.engine.calls

    async def test_errors_of_chat_have_the_names_of_this_api(self, says):
        server = await says("Hi")
        both = {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"choice": ["a"]}}
        _, got, _ = await server.post(PATH, {"input": "Hi", **both})
        assert got["error"]["message"] == "only one of text.format and structured_outputs can be set."
        _, got, _ = await server.post(PATH, {"input": "Hi", "max_output_tokens": 5000})
        assert got["error"]["message"].startswith("max_output_tokens=5000 cannot be greater than")

    async def test_neutral_values_are_accepted(self, says):
        neutral = {
            "store": True,
            "background": False,
            "service_tier": "auto",
            "truncation": "disabled",
            "user": "u",
            "top_logprobs": 0,
            "max_tool_calls": 3,
            "include": ["reasoning.encrypted_content"],
            "prompt": None,
            "text": {"verbosity": "medium"},
            "tool_choice": "auto",
            "previous_response_id": None,
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "parallel_tool_calls": True,
        }
        await both(await says("Hi"), **neutral)

    async def test_an_unknown_model(self, says):
        server = await says("Hi")
        with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
            await server.client.responses.create(model="nope", input="Hi")


class TestFailures:
    @pytest.mark.parametrize("depth", [300, 700, 900, 950, 990])
    async def test_deep_nesting_is_never_a_fault_of_the_server(self, says, depth):
        server = await says("Hi", max_model_len=8192)
        deep = '{"a":' * depth + "1" + "}" * depth
        tool = '{"type": "function", "name": "f", "parameters": %s}'
        for body in (
            '{"input": "x", "tools": [' + tool + "]}",
            '{"input": "x", "tool_choice": "none", "tools": [' + tool + "]}",
            '{"input": "x", "text": {"format": {"type": "json_schema", "schema": %s}}}',
            '{"input": "x", "chat_template_kwargs": %s}',
            '{"input": [%s]}',
            '{"input": [{"role": "user", "content": [%s]}]}',
        ):
            data = (body % deep).encode()
            status, got, _ = await server.post(PATH, data=data, headers={"Content-Type": "application/json"})
            assert status in (200, 400), (body, got)

    async def test_a_failure_while_streaming(self, says):
        server = await says("One two three four")
        server.engine.error_after = 2
        status, got, _ = await server.post(PATH, {"input": "Hi"})
        assert status == 500 and got["error"]["type"] == "InternalServerError"
        last = (await events_of(server))[-1]
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert [item["status"] for item in last["response"]["output"]] == ["incomplete"]

    async def test_a_stopping_server(self, says):
        server = await says("word " * 1000, delay=0.01)
        stream = await server.client.responses.create(model="", input="Hi", stream=True)
        assert (await anext(stream)).type == "response.created"
        server.stop.ask()
        last = [event async for event in stream][-1]
        assert last.type == "response.failed" and "stopped" in last.response.error.message

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_client_that_goes_away_ends_its_request(self, says, stream):
        server = await says("word " * 1000, delay=0.01)
        async with aiohttp.ClientSession() as session:
            post = session.post(server.url + PATH, json={"input": "Hi", "stream": stream})
            task = asyncio.ensure_future(post)
            while not server.engine.num_tokens:
                await asyncio.sleep(0.01)
            task.cancel()
        for _ in range(200):
            if not server.engine.num_unfinished:
                break
            await asyncio.sleep(0.01)
        assert list(server.engine.ends.values()) == ["closed"] and server.engine.num_tokens < 1000
