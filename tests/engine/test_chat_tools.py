"""`LLM.chat` with tools and formats: what the server does, in Python."""

import json

import pytest

from qjax.sampling_params import SamplingParams, StructuredOutputsParams

HI = [{"role": "user", "content": "Hi"}]
PARAMETERS = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["n"],
}
PARAMETERS |= {"additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
PARAMS = SamplingParams(temperature=1.0, seed=1, max_tokens=80)
OFF = {"chat_template_kwargs": {"enable_thinking": False}, "use_tqdm": False}


def test_a_demanded_call_obeys(llm):
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        params = [PARAMS, PARAMS.with_(seed=2)]
        outputs = llm.chat([HI, HI], params, tools=TOOLS, tool_choice=choice, parse=True, **OFF)
        for output in outputs:
            [call, *_] = output.outputs[0].message["tool_calls"]
            assert call["function"]["name"] == "f" and 1 <= json.loads(call["function"]["arguments"])["n"] <= 99
    with pytest.raises(ValueError, match="'g'"):
        llm.chat(HI, PARAMS, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}})
    with pytest.raises(ValueError, match="needs tools"):
        llm.chat(HI, PARAMS, tool_choice="required")


def test_thinking_comes_before_the_format(llm):
    think = llm.engine.tokenizer.encode("<think>")[0]
    wanted = StructuredOutputsParams(choice=["yes"])
    params = PARAMS.with_(structured_outputs=wanted, thinking_token_budget=3, logit_bias={think: 100.0})
    [output] = llm.chat(HI, params, parse=True, use_tqdm=False)
    assert output.outputs[0].message["content"] == "yes" and output.outputs[0].token_ids[0] == think


def test_no_tools_by_choice(llm):
    shown, hidden = (
        llm.chat(HI, PARAMS.with_(max_tokens=1), tools=TOOLS, tool_choice=choice, **OFF)[0].prompt
        for choice in ("auto", "none")
    )
    assert '"name": "f"' in shown and '"name": "f"' not in hidden
