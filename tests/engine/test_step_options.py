"""`StepOptions.covers`: which batches a step that is compiled already may serve."""

import pytest

from qjax.engine.step import StepOptions

GREEDY = StepOptions()
PLAIN = StepOptions(sampling=True)
TOP_P = StepOptions(sampling=True, filtering=True)
TOP_K = StepOptions(sampling=True, filtering=True, few=True)


@pytest.mark.parametrize(
    ("compiled", "covered"),
    [
        (GREEDY, {GREEDY}),
        (PLAIN, {GREEDY, PLAIN}),
        (TOP_P, {GREEDY, PLAIN, TOP_P, TOP_K}),
        (TOP_K, {GREEDY, TOP_K}),
    ],
)
def test_covers(compiled: StepOptions, covered: set[StepOptions]):
    assert {options for options in (GREEDY, PLAIN, TOP_P, TOP_K) if compiled.covers(options)} == covered
    assert not compiled.covers(StepOptions(penalties=True))
    assert not compiled.covers(StepOptions(sampling=True, num_logprobs=5))
