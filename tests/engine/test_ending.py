"""Ends that the host finds: loops, complete and failed grammars."""

from random import Random
from types import SimpleNamespace

import pytest

from qjax.engine.ending import host_end
from qjax.engine.repetition import LoopDetector, loop_detector
from qjax.engine.request import Request, RequestStatus
from qjax.sampling_params import RepetitionDetectionParams, SamplingParams


def is_loop(tokens, params):
    """The definition: the end is one pattern, `min_count` times."""
    for size in range(max(1, params.min_pattern_size), params.max_pattern_size + 1):
        end = tokens[-size * params.min_count :]
        if len(end) == size * params.min_count and end == end[:size] * params.min_count:
            return True
    return False


@pytest.mark.parametrize("sizes", [(0, 1, 2), (1, 3, 2), (2, 4, 3), (3, 3, 2), (0, 8, 5)])
def test_loops_are_found_where_they_are(sizes):
    params = RepetitionDetectionParams(min_pattern_size=sizes[0], max_pattern_size=sizes[1], min_count=sizes[2])
    num_found = 0
    for seed in range(200):
        random, detector, tokens = Random(seed), LoopDetector(params), []
        for _ in range(60):
            # Often what came some tokens ago, so that there are loops
            tokens.append(
                tokens[-sizes[1]] if len(tokens) > sizes[1] and random.random() < 0.8 else random.randrange(3)
            )
            found = detector.add(tokens[-1])
            assert found == is_loop(tokens, params), (tokens, params)
            num_found += found
    assert num_found > 100


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pattern_size": 3},
        {"max_pattern_size": 3, "min_count": 1},
        {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2},
        {"max_pattern_size": -1},
        {"max_pattern_size": 5000, "min_count": 2},
        {"max_pattern_size": 2, "min_count": 2, "end_thinking": 1},
    ],
)
def test_wrong_parameters_are_refused(fields):
    with pytest.raises(ValueError, match="repetition_detection"):
        RepetitionDetectionParams(**fields)
    assert loop_detector(RepetitionDetectionParams()) is None


def request(status=RequestStatus.RUNNING, reason=None, **constraint):
    state = {"error": None, "is_finished": False, "is_thinking": False, "accept": lambda token: True, **constraint}
    made = Request("r", [1], SamplingParams(), max_tokens=9, constraint=SimpleNamespace(**state))
    made.status, made.finish_reason = status, reason
    return made


def test_grammars_end_answers():
    assert host_end(request(), 5) is None
    assert host_end(request(is_finished=True), 5) == ("stop", None)
    assert host_end(request(accept=lambda token: False), 5)[0] == "error"
    ended = RequestStatus.FINISHED
    assert host_end(request(ended, "stop"), 5) is None
    assert host_end(request(ended, "stop", error="a limit"), 5)[0] == "error", "its end was all that it could write"
    assert host_end(request(ended, "length", error="a limit"), 5) is None


def test_a_loop_ends_the_answer_or_its_thinking():
    asked = []
    for is_thinking, end_thinking, expected in ((True, False, True), (True, True, False), (False, True, True)):
        params = RepetitionDetectionParams(max_pattern_size=1, min_count=3, end_thinking=end_thinking)
        looping = request(is_thinking=is_thinking, end_thinking=lambda: asked.append(1))
        looping.loops = LoopDetector(params)
        ends = [host_end(looping, 7) for _ in range(3)]
        assert ends == [None, None, ("repetition", "repetition_detected") if expected else None]
    assert asked == [1]
