"""Chats become documents: what is learnt is what the engine would have had to write, after the prompt it would see."""

import json

import pytest

from qjax.research.data import open_corpus, render_chat
from qjax.text.tokenizer import Tokenizer
from tests.text.small_tokenizer import write_small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(write_small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def learnt(tokenizer, messages, **options) -> list[list[str]]:
    """For each document the texts that its mask holds."""
    documents = []
    for ids, mask in render_chat(tokenizer, messages, **options):
        assert len(ids) == len(mask) and mask[-1] and not mask[0]
        parts, current = [], []
        for token, is_learnt in zip([*ids, 0], [*mask, False], strict=True):
            if is_learnt:
                current.append(token)
            elif current:
                parts.append(tokenizer.decode(current, skip_special_tokens=False))
                current = []
        documents.append(parts)
    return documents


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def test_an_answer_is_learnt_to_its_end_token_and_its_prompt_is_not(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        user("Hello"),
        assistant("Hi", reasoning_content="A greeting."),
    ]
    assert learnt(tokenizer, messages) == [["<think>\nA greeting.\n</think>\n\nHi<|im_end|>"]]
    ids, mask = render_chat(tokenizer, messages)[0]
    prompt = tokenizer.apply_chat_template(messages[:2])
    assert ids[: mask.index(True)] == tokenizer.encode(prompt)


def test_an_empty_think_block_is_the_prompts_unless_the_user_asked_for_it(tokenizer):
    assert learnt(tokenizer, [user("Hello"), assistant("Hi")]) == [["Hi<|im_end|>"]]
    asked = [user("Hello /no_think"), assistant("Hi")]
    assert learnt(tokenizer, asked) == [["<think>\n\n</think>\n\nHi<|im_end|>"]]


def test_each_question_is_a_document_where_the_template_drops_earlier_thinking(tokenizer):
    messages = [
        *(user("One"), assistant("1", reasoning_content="First.")),
        *(user("Two"), assistant("2", reasoning_content="Second.")),
    ]
    assert learnt(tokenizer, messages) == [
        ["<think>\nFirst.\n</think>\n\n1<|im_end|>"],
        ["<think>\nSecond.\n</think>\n\n2<|im_end|>"],
    ]
    second, _ = render_chat(tokenizer, messages)[1]
    assert "First." not in tokenizer.decode(second)


def test_calls_and_the_answer_to_their_results_are_learnt_in_one_document(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [
        user("Add 1 and 2"),
        assistant("", reasoning_content="A call.", tool_calls=[call]),
        {"role": "tool", "content": "3"},
        assistant("3", reasoning_content="Done."),
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    documents = learnt(tokenizer, messages, tools=tools)
    assert len(documents) == 1
    first, second = documents[0]
    assert first.startswith("<think>\nA call.\n</think>") and '"name": "add"' in first and first.endswith("<|im_end|>")
    assert second == "<think>\nDone.\n</think>\n\n3<|im_end|>"


def test_a_file_of_chats(tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    chats = [{"messages": [user("Hello"), assistant("Hi")]}, {"messages": [user("Bye"), assistant("Goodbye")]}]
    path.write_text("\n".join(map(json.dumps, chats)) + "\n\n")
    corpus = open_corpus(path, lambda: tokenizer)
    assert len(corpus.offsets) == 3 and corpus.loss_mask.any()
    for line, message in (
        ("{", "line 3: "),
        ('{"message": []}', "line 3: 'messages' is missing"),
        ('{"messages": 3}', "line 3: "),
        ('{"messages": [{"role": "judge", "content": "x"}, {"role": "assistant", "content": "y"}]}', "line 3: "),
    ):
        path.write_text("\n".join([*map(json.dumps, chats), line]))
        with pytest.raises(ValueError, match=message):
            open_corpus(path, lambda: tokenizer)
    with pytest.raises(ValueError, match=r"nothing\.jsonl is missing"):
        open_corpus(tmp_path / "nothing.jsonl", lambda: tokenizer)
    with pytest.raises(ValueError, match=r"must be a folder of arrays or a \.jsonl file"):
        open_corpus(path.with_suffix(".txt"), lambda: tokenizer)
