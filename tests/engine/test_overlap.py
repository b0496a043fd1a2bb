"""Requests whose next mask needs their last token beside others that do not: who waits for whom."""

import pytest

from qjax.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

PROMPT = [5, 6, 7, 8]
FREE = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
LONG = StructuredOutputsParams(regex="[0-9]{10}")


@pytest.fixture
def engine(llm):
    return llm.engine


def run(engine, requests):
    """Steps until all have ended: the token ids and finish reasons, and the step in which each got its last token."""
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    ids, reasons, last, step = [[] for _ in requests], [""] * len(requests), [0] * len(requests), 0
    while engine.has_work:
        step += 1
        for output in engine.step():
            ids[int(output.request_id)] += output.outputs[0].token_ids
            last[int(output.request_id)] = step
            reasons[int(output.request_id)] = output.outputs[0].finish_reason
    engine.scheduler.check_integrity()
    return ids, reasons, last


def constrained(**fields):
    return SamplingParams(temperature=0.0, max_tokens=30, structured_outputs=LONG, **fields)


def test_one_constrained_request_leaves_the_others_one_step_ahead(engine):
    free = [([10 + i, 3, 4], FREE) for i in range(3)]
    alone, _, [alone_steps, *_] = run(engine, free)
    [[expected], _, _] = run(engine, [(PROMPT, constrained())])
    ids, reasons, last = run(engine, [*free, (PROMPT, constrained())])
    assert ids == [*alone, expected] and reasons[-1] == "stop"
    assert set(last[:-1]) == {alone_steps}, "they took part in every step"
    assert len(expected) <= 10 and last[-1] == pytest.approx(2 * len(expected), abs=2), "it took part in every second"


def test_many_constrained_requests_are_not_slowed_for_a_few(engine):
    [[expected], _, _] = run(engine, [(PROMPT, constrained())])
    ids, _, last = run(engine, [(PROMPT, constrained())] * 3 + [(PROMPT, FREE)])
    assert ids[:3] == [expected] * 3
    assert last[0] <= len(expected) + 1, "they took part in every step"


def test_a_budget_waits_only_at_its_end(engine):
    """Thinking is free until the budget is nearly used up, and the answer behind it is."""
    think, end = (engine.tokenizer.encode(tag)[0] for tag in ("<think>", "</think>"))
    params = FREE.with_(thinking_token_budget=10, logit_bias={end: -100.0})
    [[ids], _, [steps]] = run(engine, [([5, think], params)])
    assert ids.index(end) == 10 and ids.count(end) == 1 and len(ids) == 30
    assert steps <= 30 + 3


def test_a_loop_ends_the_answer(engine):
    word = engine.tokenizer.encode("a")[0]
    loops = RepetitionDetectionParams(max_pattern_size=4, min_count=5)
    [[ids], [reason], _] = run(engine, [(PROMPT, FREE.with_(repetition_detection=loops, logit_bias={word: 100.0}))])
    assert (ids, reason) == ([word] * 5, "repetition")


def test_a_loop_in_a_think_block_closes_it(engine):
    think, end, word = (engine.tokenizer.encode(tag)[0] for tag in ("<think>", "</think>", "a"))
    loops = RepetitionDetectionParams(max_pattern_size=4, min_count=5, end_thinking=True)
    params = FREE.with_(repetition_detection=loops, logit_bias={word: 100.0})
    others = [([10 + i, 3, 4], FREE) for i in range(3)]
    for beside in ([], others):
        ids, reasons, _ = run(engine, [([5, think], params), *beside])
        assert ids[0].count(end) == 1, "closed once, though a token was in flight"
        at = ids[0].index(end)
        assert 5 <= at <= 6 and ids[0][:at] == [word] * at
        assert ids[0][at + 1 :] == [word] * 5 and reasons[0] == "repetition", "the answer may loop by itself"


def test_an_answer_with_a_grammar_does_not_end_while_it_thinks(engine):
    """The end of text in a think block would leave what was asked for unwritten."""
    think, eos = engine.tokenizer.encode("<think>")[0], sorted(engine.eos_token_ids)
    wanted = StructuredOutputsParams(choice=["yes"], after_thinking=True)
    params = FREE.with_(structured_outputs=wanted, thinking_token_budget=5, logit_bias=dict.fromkeys(eos, 90.0))
    [[ids], [reason], _] = run(engine, [([5, think], params.with_(ignore_eos=False))])
    assert engine.tokenizer.decode(ids).endswith("</think>yes") and reason == "stop"
