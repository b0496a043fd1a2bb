"""The scheduler's decisions, one by one. What must hold in any order of events is in test_engine_machine.py."""

import pytest

from qjax.engine.block_pool import BlockPool
from qjax.engine.request import Request, RequestStatus
from qjax.engine.scheduler import Scheduler, SchedulerConfig
from qjax.sampling_params import SamplingParams

EOS = 500


def scheduler(num_pages=100, page_size=4, caching=True, **limits) -> Scheduler:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 1000} | limits
    return Scheduler(SchedulerConfig(**limits), BlockPool(num_pages, page_size, caching))


def request(name, prompt=5, max_tokens=100, **options) -> Request:
    """`prompt` is the token ids, or how many: ids that no other request has then."""
    if isinstance(prompt, int):
        prompt = [1000 * (1 + sum(map(ord, name))) + i for i in range(prompt)]
    options.setdefault("params", SamplingParams(max_tokens=max_tokens))
    return Request(
        request_id=name, prompt_token_ids=prompt, max_tokens=max_tokens, eos_token_ids=frozenset([EOS]), **options
    )


def add(s: Scheduler, *requests: Request) -> None:
    for r in requests:
        s.add(r)


def chunks(batch) -> list[tuple]:
    """Decodes by name, prefills as (name, start, tokens, samples)."""
    decodes = [chunk.request.request_id for chunk in batch.decodes]
    return decodes + [(c.request.request_id, c.start, c.num_tokens, c.samples) for c in batch.prefills]


def step(s: Scheduler, token=7) -> list[tuple]:
    """One step, read at once."""
    batch = s.schedule()
    s.update(batch, [token] * len(batch.sampling))
    return chunks(batch)


def test_a_request_is_prefilled_then_decoded_until_max_tokens():
    s = scheduler()
    a = request("a", max_tokens=3)
    add(s, a)
    assert [step(s) for _ in range(4)] == [[("a", 0, 5, True)], ["a"], ["a"], []]
    assert (a.output_token_ids, a.finish_reason, a.stop_reason) == ([7, 7, 7], "length", None)
    assert not s.has_work
    assert a.arrival_time <= a.first_scheduled_time <= a.first_token_time <= a.finished_time
    s.check_integrity()


def test_steps_are_scheduled_before_their_tokens_are_known():
    s = scheduler()
    a = request("a", max_tokens=3)
    add(s, a)
    batches = [s.schedule() for _ in range(4)]
    assert [chunks(b) for b in batches] == [[("a", 0, 5, True)], ["a"], ["a"], []]
    assert (a.num_pending, a.num_tokens, a.num_known_tokens, a.num_computed_tokens) == (3, 8, 5, 7)
    assert s.has_work
    assert [s.update(b, [t] * len(b.sampling)) for t, b in enumerate(batches)] == [[(a, 0)], [(a, 1)], [(a, 2)], []]
    assert (a.output_token_ids, a.finish_reason, a.num_pending) == ([0, 1, 2], "length", 0)


@pytest.mark.parametrize(("max_model_len", "num_pages"), [(8, 100), (1000, 3)])
def test_the_length_is_bounded_by_max_model_len_and_by_the_pool(max_model_len, num_pages):
    s = scheduler(max_model_len=max_model_len, num_pages=num_pages)
    a = request("a")
    add(s, a)
    batches = [s.schedule() for _ in range(4)]
    assert batches[3].is_empty
    for b in batches:
        s.update(b, [7] * len(b.sampling))
    assert (len(a.output_token_ids), a.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("token", "reason", "stop_reason"), [(EOS, "stop", None), (9, "stop", 9), (8, None, None), (-1, "error", None)]
)
def test_why_a_request_ends(token, reason, stop_reason):
    s = scheduler()
    a = request("a", stop_token_ids=frozenset([9, EOS]))
    add(s, a)
    step(s)
    ahead = s.schedule(), s.schedule()
    assert s.update(ahead[0], [token]) == [(a, token)]
    assert (a.finish_reason, a.stop_reason) == (reason, stop_reason)
    assert a.output_token_ids == ([7, token] if token >= 0 else [7])
    # The step ahead has computed a token too many: it is dropped, and nobody is told.
    assert s.update(ahead[1], [3]) == ([] if reason else [(a, 3)])
    assert a.output_token_ids == ([7] + [token] * (token >= 0) + [3] * (reason is None))
    s.check_integrity()


def test_a_stop_id_counts_after_min_tokens():
    s = scheduler()
    a = request("a", params=SamplingParams(min_tokens=2), stop_token_ids=frozenset([7]))
    add(s, a)
    step(s)
    step(s)
    assert not a.is_finished
    step(s)
    assert (a.output_token_ids, a.finish_reason) == ([7, 7, 7], "stop")


def test_pages_of_a_request_that_met_nan_are_not_shared():
    s = scheduler()
    add(s, request("a", list(range(9))))
    step(s)
    s.update(s.schedule(), [-1])
    b = request("b", list(range(9)))
    add(s, b)
    assert step(s) == [("b", 0, 9, True)]


def test_tokens_must_be_those_of_the_step():
    s = scheduler()
    add(s, request("a"))
    with pytest.raises(RuntimeError, match="samples 1 tokens, got 2"):
        s.update(s.schedule(), [1, 2])


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    s = scheduler(max_num_batched_tokens=6)
    add(s, request("a", 5), request("b", 13))
    assert [step(s) for _ in range(5)] == [
        [("a", 0, 5, True), ("b", 0, 1, False)],
        ["a", ("b", 1, 5, False)],
        ["a", ("b", 6, 5, False)],
        ["a", ("b", 11, 2, True)],
        ["a", "b"],
    ]


def test_a_prompt_whose_rest_is_one_token_is_still_a_prefill():
    s = scheduler(max_num_batched_tokens=4)
    add(s, request("a", 5))
    assert [step(s) for _ in range(3)] == [[("a", 0, 4, False)], [("a", 4, 1, True)], ["a"]]


def test_limits_of_a_step():
    s = scheduler(max_num_prefills=2, max_num_seqs=3)
    add(s, *(request(name, 2) for name in "abcd"))
    assert [step(s) for _ in range(2)] == [
        [("a", 0, 2, True), ("b", 0, 2, True)],
        ["a", "b", ("c", 0, 2, True)],
    ]
    assert step(s) == ["a", "b", "c"]  # no slot for d
    assert {r.slot for r in s.running} == {0, 1, 2}
    s.abort("b")
    assert step(s) == ["a", "c", ("d", 0, 2, True)]
    assert [r.slot for r in s.running if r.request_id == "d"] == [1]


def test_the_order_of_waiting_requests():
    names = [("a", 2), ("b", 1), ("c", 1), ("d", 0)]
    for policy, order in (("fcfs", "abcd"), ("priority", "dbca")):
        s = scheduler(policy=policy, max_num_prefills=1)
        add(s, *(request(name, priority=p) for name, p in names))
        assert [step(s)[-1][0] for _ in range(4)] == list(order)


def test_a_prefix_is_taken_from_the_cache_but_for_the_last_token():
    s = scheduler()
    a, b = request("a", list(range(12))), request("b", list(range(12)))
    add(s, a)
    step(s)
    add(s, b, request("c", list(range(14))))
    assert step(s) == ["a", ("b", 8, 4, True), ("c", 12, 2, True)]
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)
    assert b.page_ids[:2] == a.page_ids[:2] != b.page_ids[2:]
    s.check_integrity()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_answer_is_a_prefix_too(depth):
    s = scheduler()
    a = request("a", list(range(6)), max_tokens=7)
    add(s, a)
    in_flight = []
    for token in range(6, 13 + depth):
        in_flight.append(s.schedule())
        if len(in_flight) == depth:
            batch = in_flight.pop(0)
            s.update(batch, [token - depth + 1] * len(batch.sampling))
    assert a.output_token_ids == list(range(6, 13))
    assert a.finish_reason == "length"
    add(s, request("b", list(range(15))))
    assert step(s) == [("b", 12, 3, True)]  # K and V of the last token, 12, were never computed


def test_what_is_computed_again_is_cached_again():
    s = scheduler(num_pages=5)
    b = request("b", list(range(7)))
    add(s, request("a", 7), b)
    step(s, 7)
    step(s, 8)
    assert s.schedule().preempted == [b]  # its second page goes to a
    s.abort("a")
    assert step(s, 9) == [("b", 4, 5, True)]
    s.abort("b")
    add(s, request("c", list(range(10))))
    assert step(s) == [("c", 8, 2, True)]


def test_who_shares_no_prefix():
    s = scheduler()
    tokens = list(range(12))
    add(s, request("a", tokens, cache_salt="x"))
    step(s)
    others = {
        "plain": {},
        "salt": {"cache_salt": "y"},
        "logprobs": {"cache_salt": "x", "params": SamplingParams(prompt_logprobs=0)},
    }
    for name, options in others.items():
        add(s, request(name, tokens, **options))
        assert step(s)[-1] == (name, 0, 12, True)
    add(s, request("same", tokens, cache_salt="x"))
    assert step(s)[-1] == ("same", 8, 4, True)


def test_preemption_takes_the_last_and_it_computes_its_tokens_again():
    s = scheduler(num_pages=5, caching=False)
    a, b = request("a", 7), request("b", 7)
    add(s, a, b)
    assert step(s, 1) == [("a", 0, 7, True), ("b", 0, 7, True)]
    assert step(s, 2) == ["a", "b"]  # pages 2 + 2 are full now
    ahead = s.schedule()
    assert (chunks(ahead), ahead.preempted) == (["a"], [b])
    assert (b.status, b.slot, b.page_ids, b.num_computed_tokens) == (RequestStatus.WAITING, None, [], 0)
    assert b.output_token_ids == [1, 2]
    s.check_integrity()
    s.update(ahead, [3])
    assert step(s) == ["a"]
    s.abort("a")
    assert step(s, 4) == [("b", 0, 9, True)]
    assert (b.output_token_ids, b.num_preemptions, b.num_cached_tokens) == ([1, 2, 4], 1, 0)
    assert step(s) == ["b"]


def test_a_preempted_request_waits_for_its_late_token():
    s = scheduler(num_pages=5)
    a, b = request("a", 7), request("b", 7)
    add(s, a, b)
    batches = [s.schedule(), s.schedule(), s.schedule()]
    assert batches[2].preempted == [b]
    assert b.num_pending == 2
    s.abort("a")
    assert s.schedule().is_empty  # there is room, but the host does not know what to compute
    s.update(batches[0], [1, 1])
    assert s.schedule().is_empty
    assert s.update(batches[1], [2, 2]) == [(b, 2)]
    assert b.output_token_ids == [1, 2]
    s.update(batches[2], [3])
    # The step in flight wrote b's 8th token. Its second page stayed cached, and is found.
    assert chunks(s.schedule()) == [("b", 4, 5, True)]
    assert b.num_cached_tokens == 0  # as at its first admission


def test_a_late_token_can_end_a_preempted_request():
    s = scheduler(num_pages=5)
    a, b = request("a", 7), request("b", 7)
    add(s, a, b)
    batches = [s.schedule(), s.schedule(), s.schedule()]
    s.update(batches[0], [1, EOS])
    assert (b.finish_reason, s.num_waiting) == ("stop", 0)
    assert s.update(batches[1], [1, 2]) == [(a, 1)]
    s.check_integrity()


def test_who_is_preempted_is_the_last_in_rank():
    for policy, victim in (("fcfs", "b"), ("priority", "a")):
        s = scheduler(num_pages=5, policy=policy)
        add(s, request("a", 7, priority=1), request("b", 7, priority=0))
        step(s)
        step(s)
        batch = s.schedule()
        assert [r.request_id for r in batch.preempted] == [victim]
        assert len(batch.decodes) == 1


def test_a_preempted_request_comes_before_those_that_never_ran():
    s = scheduler(num_pages=5)
    add(s, request("a", 7), request("b", 7), request("c", 1))
    for _ in range(3):
        step(s)
    assert [r.request_id for r in s.waiting] == ["b", "c"]  # c would fit: it must not overtake b for ever
    assert step(s) == ["a"]


def test_a_request_is_let_in_only_with_pages_for_its_whole_prompt():
    s = scheduler(num_pages=6, max_num_batched_tokens=4)
    add(s, request("a", 8), request("b", 12))
    assert [step(s)[0] for _ in range(3)] == [("a", 0, 4, False), ("a", 4, 4, True), "a"]
    s.abort("a")
    assert step(s) == [("b", 0, 4, False)]
    assert len(s.running[0].page_ids) == 3


def test_requests_that_can_never_run_are_refused():
    s = scheduler(num_pages=5, max_model_len=20)
    for prompt, options, message in (
        (20, {}, r"20 tokens.*max_model_len=20"),
        (16, {}, r"16 tokens.*5 pages of 4 tokens.*has 4.*kv_cache_memory_bytes"),
        ([], {}, "prompt is empty"),
        (3, {"max_tokens": 0, "params": SamplingParams()}, "max_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            s.add(request("a", prompt, **options))
    add(s, request("a", 15))
    with pytest.raises(ValueError, match="'a' is in use"):
        s.add(request("a", 3))
    while s.has_work:
        step(s)
    add(s, request("a", 3))  # the id is free again


def test_abort_of_waiting_running_ended_and_unknown():
    s = scheduler(max_num_seqs=1)
    a, b = request("a"), request("b")
    add(s, a, b)
    ahead = s.schedule()
    assert [s.abort("b"), s.abort("a"), s.abort("a"), s.abort("x")] == [b, a, None, None]
    assert (a.finish_reason, b.finish_reason) == ("abort", "abort")
    assert s.update(ahead, [1]) == []
    s.finish(a, "stop")
    assert (a.finish_reason, a.output_token_ids) == ("abort", [])
    assert s.pool.num_free == s.pool.num_usable
    s.check_integrity()


@pytest.mark.parametrize("field", ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_num_prefills"])
def test_limits_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        scheduler(**{field: 0})
    with pytest.raises(ValueError, match="scheduling_policy"):
        scheduler(policy="random")


def test_lost_slots_and_requests_are_noticed():
    for break_it, message in (
        (lambda s: s._free_slots.pop(), "slots"),
        (lambda s: setattr(s.running[0], "slot", 5), "slots"),
        (lambda s: s.waiting.append(s.running[0]), "queue"),
        (lambda s: s.running[0].page_ids.pop(), "what requests hold"),
    ):
        s = scheduler()
        add(s, request("a"))
        step(s)
        s.check_integrity()
        break_it(s)
        with pytest.raises(RuntimeError, match=message):
            s.check_integrity()


def test_running_requests_keep_pages_to_grow_into():
    s = scheduler(num_pages=7)
    add(s, request("a", 3), request("b", 3), request("c", 16))
    assert step(s) == [("a", 0, 3, True), ("b", 0, 3, True)]  # c would take the last four pages
    s.abort("b")
    assert step(s) == ["a", ("c", 0, 16, True)]
