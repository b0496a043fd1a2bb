import math

URL = "/v1/completions"


async def test_an_answer_by_the_openai_client(server):
    answer = await server.client.completions.create(model="org/fake-model", prompt="ab")
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert answer.choices[0].text == "Hello from answer 0." and answer.choices[0].finish_reason == "stop"
    assert server.engine.calls[0][1] == server.engine.tokenizer.encode("ab")
    assert server.engine.calls[0][2].max_tokens == 16  # OpenAI's default


async def test_the_four_forms_of_a_prompt(start):
    server = await start(answer=lambda prompt, params, index: f"<{prompt}:{index}>")
    ids = server.engine.tokenizer.encode("ab")
    for prompt, texts in (
        ("ab", ["<ab:0>", "<ab:1>"]),
        (ids, ["<ab:0>", "<ab:1>"]),
        (["x", "y"], ["<x:0>", "<x:1>", "<y:0>", "<y:1>"]),
        ([ids, ids[:1]], ["<ab:0>", "<ab:1>", "<a:0>", "<a:1>"]),
    ):
        _, body, _ = await server.post(URL, {"prompt": prompt, "n": 2, "max_tokens": 20})
        assert [c["text"] for c in body["choices"]] == texts
        assert [c["index"] for c in body["choices"]] == list(range(len(texts)))
        chunks = await server.events(URL, {"prompt": prompt, "n": 2, "max_tokens": 20})
        streamed = [""] * len(texts)
        for chunk in chunks:
            streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert streamed == texts
        assert sum(c["choices"][0]["finish_reason"] == "stop" for c in chunks) == len(texts)


async def test_usage_counts_all_prompts(server):
    body = {"prompt": ["ab", "abc"], "n": 2, "max_tokens": 3}
    _, whole, _ = await server.post(URL, body)
    num_prompt = sum(len(server.engine.tokenizer.encode(p)) for p in body["prompt"])
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (num_prompt, 12)
    chunks = await server.events(URL, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []


async def test_echo_with_logprobs_scores_the_prompt(server):
    """What evaluation harnesses ask for: no answer, the logprob of each prompt token."""
    _, body, _ = await server.post(URL, {"prompt": "ab☃c", "echo": True, "max_tokens": 0, "logprobs": 1})
    choice = body["choices"][0]
    assert choice["text"] == "ab☃c" and body["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(math.isclose(p, math.log(0.25)) for p in logprobs["token_logprobs"][1:])
    ids = server.engine.tokenizer.encode("ab☃c")
    assert logprobs["tokens"] == [server.engine.tokenizer.token_text(i) for i in ids]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 2, 3]  # the snowman's three tokens begin at one character


async def test_echo_goes_before_the_answer(server):
    ids = server.engine.tokenizer.encode("ab")
    for prompt in ("ab", ids):
        body = {"prompt": prompt, "echo": True, "logprobs": 2, "return_token_ids": True}
        _, whole, _ = await server.post(URL, body)
        choice = whole["choices"][0]
        assert choice["text"] == "abHello from answer 0."
        assert choice["prompt_token_ids"] == ids
        assert len(choice["logprobs"]["tokens"]) == len(ids) + len(choice["token_ids"])
        chunks = [c["choices"][0] for c in await server.events(URL, body)]
        assert "".join(c["text"] for c in chunks) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for c in chunks for x in c["logprobs"][name]] == choice["logprobs"][name]


async def test_top_logprobs_have_the_sampled_token(server):
    _, body, _ = await server.post(URL, {"prompt": "ab", "logprobs": 0, "max_tokens": 1})
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"Hel": math.log(0.25)}]
    _, body, _ = await server.post(URL, {"prompt": "ab", "logprobs": 1, "max_tokens": 1})
    assert sorted(body["choices"][0]["logprobs"]["top_logprobs"][0].values()) == [math.log(0.25), math.log(0.75)]


async def test_prompt_logprobs_are_a_choices(server):
    _, body, _ = await server.post(URL, {"prompt": ["ab", "c"], "prompt_logprobs": 0})
    first, second = (c["prompt_logprobs"] for c in body["choices"])
    assert first[0] is None and list(first[1]) == [str(server.engine.tokenizer.encode("b")[0])] and second == [None]
