"""The generators' answers are right: recomputed here from the questions alone."""

import json
import random
import re

import pytest

from scripts.builtin_model import mixture, scoring
from scripts.builtin_model.evaluate import ROWS, items
from scripts.builtin_model.render import pieces, spoken
from scripts.builtin_model.skills import digits
from scripts.builtin_model.skills.tool_catalog import JOBS
from scripts.builtin_model.skills.tools import _toolbox
from scripts.builtin_model.world import World, countries, words

MODES = ("on", "off", "no_think")


def dialogues(skill, count=200):
    return [mixture.make(11, i, ("train", "test")[i % 2], skill, MODES[i % 3]) for i in range(count)]


def question(dialogue):
    return dialogue.messages[-2]["content"]


def content(dialogue):
    return dialogue.messages[-1]["content"]


@pytest.mark.parametrize("skill", mixture.NAMES)
def test_every_skills_own_answer_scores_as_right(skill):
    for dialogue in dialogues(skill, 120):
        *_, last = pieces(dialogue)
        text = last.text.removesuffix("<|im_end|>")
        if dialogue.mode == "on":
            text = text[text.rindex("<think>") :]
        assert scoring.score(dialogue, text, True) == scoring.Score(True, True, True)


class TestDigits:
    @pytest.mark.parametrize(("a", "b"), [(0, 0), (9, 1), (999, 1), (17, 25), (123456, 999999), (5, 9999), (1000, 1)])
    def test_every_column_and_the_sum_are_right(self, a, b):
        steps = digits.add_steps(a, b)
        for x, y, carry, total in re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", steps):
            assert int(x) + int(y) + int(carry) == int(total)
        assert int(re.search(r"reversed (\d+)\.", steps)[1]) == a + b

    @pytest.mark.parametrize(
        ("a", "b"), [(0, 0), (10, 1), (1000, 999), (52, 25), (1000000, 1), (7, 7), (3, 4), (12, 345)]
    )
    def test_every_borrow_and_the_difference_are_right(self, a, b):
        steps = digits.difference_steps(a, b)
        for x, y, before, digit, after in re.findall(r"(\d)-(\d)-(\d)=(\d) borrow (\d)", steps):
            assert int(x) - int(y) - int(before) == int(digit) - 10 * int(after)
        assert steps.rstrip(".").endswith(str(a - b)) or a == b

    @pytest.mark.parametrize(("a", "b"), [(1, 2), (21, 12), (100, 99), (555, 554)])
    def test_comparison_is_right(self, a, b):
        assert digits.compare_steps(a, b).endswith(f"{a} is {'larger' if a > b else 'smaller'}.")


class TestAnswers:
    @pytest.mark.parametrize(
        ("skill", "compute"), [("addition", lambda a, b: a + b), ("subtraction", lambda a, b: a - b)]
    )
    def test_sums_and_differences(self, skill, compute):
        for dialogue in dialogues(skill):
            a, b, result = map(int, re.search(r"(\d+) [+-] (\d+) = (-?\d+)$", content(dialogue)).groups())
            assert result == compute(a, b)
            assert {str(a), str(b)} == set(re.findall(r"\d+", question(dialogue)))

    def test_three_numbers(self):
        for dialogue in dialogues("three numbers"):
            expression = re.search(r"\d+ \+ \d+ [+-] \d+", question(dialogue))[0]
            a, _, b, sign, c = expression.split()
            assert content(dialogue).endswith(f" = {int(a) + int(b) + (1 if sign == '+' else -1) * int(c)}")

    def test_products_and_quotients(self):
        for dialogue in dialogues("multiplication"):
            if found := re.search(r"(\d+) ([x/]) (\d+) = (\d+)$", content(dialogue)):
                a, sign, b, result = found.groups()
                assert int(result) == (int(a) * int(b) if sign == "x" else int(a) // int(b))
            else:
                assert "too hard" in content(dialogue)

    def test_sorted_lists_and_extremes(self):
        for dialogue in dialogues("sorting"):
            found = content(dialogue).split("Sorted: ")[-1].rstrip(".").split(", ")
            values = [int(x) if x.isdigit() else x for x in found]
            assert values in (sorted(values), sorted(values, reverse=True))
            assert all(x in question(dialogue).lower() for x in found)

    def test_letters(self):
        for dialogue in dialogues("reversing"):
            word, back = re.search(r"(\w+) backwards is (\w+)\.$", content(dialogue)).groups()
            assert back == word[::-1] and word in question(dialogue).lower()
        for dialogue in dialogues("counting letters"):
            if found := re.search(r"The letter (\w) occurs (\d+) times? in (\w+)\.", content(dialogue)):
                assert found[3].count(found[1]) == int(found[2])
            elif found := re.search(r"(\w+) has (\d+) letters\.", content(dialogue)):
                assert len(found[1]) == int(found[2])

    def test_facts_are_those_of_the_sources(self):
        by_name = {c["name"]: c for c in countries()}
        for dialogue in dialogues("country facts"):
            if found := re.search(r"The capital of (?:the )?(.+) is (.+)\.$", content(dialogue)):
                assert by_name[found[1]]["capital"] == found[2]
        meanings = {w["word"]: w["definition"] for w in words()}
        for dialogue in dialogues("definitions"):
            word, meaning = re.fullmatch(r"(\w+) \(\w+\): (.+)\.", content(dialogue)).groups()
            assert meanings[word] == meaning

    def test_json_has_the_asked_keys_and_values_of_the_text(self):
        for dialogue in dialogues("json"):
            for key, value in json.loads(content(dialogue)).items():
                shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
                shown = ", ".join(shown) if isinstance(shown, list) else str(shown)
                assert key in question(dialogue) and shown in question(dialogue)

    def test_work_of_sorting_ends_in_the_answer(self):
        for dialogue in dialogues("sorting"):
            work = pieces(dialogue)[-1].text
            if "From " in work:
                *_, last = re.findall(r"(?m)^(?:\d+: )?([\d\[][\d\[\] ]*)$", work)
                assert last.replace("[", "").replace("]", "").replace(" ", ", ") in content(dialogue)

    def test_a_definition_that_is_asked_for_has_one_word(self):
        for dialogue in dialogues("word for"):
            word = content(dialogue).removeprefix("The word is ").rstrip(".")
            (meaning,) = (w["definition"] for w in words() if w["word"] == word)
            assert meaning in question(dialogue)
            assert sum(w["definition"] == meaning for w in words()) == 1

    def test_leap_years(self):
        for dialogue in dialogues("months", 600):
            if found := re.search(r"(Yes|No), (\d+) is (?:not )?a leap year", content(dialogue)):
                year = int(found[2])
                assert (found[1] == "Yes") == ((year % 4 == 0 and year % 100 != 0) or year % 400 == 0)


class TestToolCalls:
    def test_calls_fit_a_tools_schema_and_hold_words_of_the_user(self):
        types = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
        for dialogue in dialogues("tool calls"):
            functions = {t["function"]["name"]: t["function"] for t in dialogue.tools}
            calls = [json.loads(c) for c in scoring.CALL.findall(spoken(dialogue.messages[-1]))]
            assert calls == dialogue.expected.value and calls
            for call in calls:
                parameters = functions[call["name"]]["parameters"]
                assert set(parameters["required"]) <= set(call["arguments"]) <= set(parameters["properties"])
                for key, value in call["arguments"].items():
                    assert isinstance(value, types[parameters["properties"][key]["type"]])
                    assert value in parameters["properties"][key].get("enum", [value])
                    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
                    assert shown in question(dialogue)

    def test_there_are_one_to_three_tools_and_sometimes_several_calls(self):
        made = dialogues("tool calls")
        assert {len(d.tools) for d in made} == {1, 2, 3}
        assert {len(d.expected.value) for d in made} == {1, 2, 3}

    def test_the_thought_looks_at_the_tools_in_order_and_compares_rightly(self):
        seen = set()
        for dialogue in dialogues("tool calls") + dialogues("no fitting tool"):
            names = [t["function"]["name"] for t in dialogue.tools]
            thought = dialogue.messages[-1].get("reasoning_content", "")
            for part in re.split(r"(?m)^Wanted: ", thought)[1:]:
                looked_at = re.findall(r"(?m)^([\w]+): \w+ = ", part)
                assert looked_at == names[: len(looked_at)]
                if "None of them fits." in part:
                    assert looked_at == names
                    seen.add("none")
                elif fits := re.findall(r"(?m)^(\w+) fits: ", part):
                    assert set(fits) == {looked_at[-1]}
                    seen.add("fits")
            for word, wanted, verdict in re.findall(r"(\w+) = (\w+)\? (Yes|No)\.", thought):
                assert (word == wanted) == (verdict == "Yes")
        assert seen == {"none", "fits"}

    def test_no_other_tool_at_hand_could_be_meant(self):
        """Jobs differ, and no made-up tool is about the thing of an everyday one."""
        world = World(random.Random(3), "test")
        everyday = {thing for _, thing in JOBS.values()}
        for _ in range(200):
            tools = _toolbox(world, 4)
            assert len({tool.job for tool in tools}) == 4
            assert not {tool.job[1] for tool in tools if tool.is_made_up} & everyday


class TestLookup:
    def test_names_are_compared_rightly_and_a_stranger_is_not_made_up(self):
        for dialogue in dialogues("lookup"):
            pairs = re.findall(r"(\w+) = (\w+)\? (Yes|No)\.", dialogue.messages[-1].get("reasoning_content", ""))
            for name, wanted, verdict in pairs:
                assert (name == wanted) == (verdict == "Yes")
            if pairs and pairs[-1][2] == "No":
                assert content(dialogue) == f"The text does not say it about {pairs[-1][1]}."


class TestScoring:
    @pytest.mark.parametrize(
        ("mode", "text", "is_finished", "well_formed", "as_asked"),
        [
            ("on", "<think>\nhm\n</think>\n\nHello!", True, True, True),
            ("on", "<think>\n\n</think>\n\nHello!", True, True, False),
            ("on", "Hello!", True, False, False),
            ("on", "<think>\nhm\n</think>\n\nHello!", False, False, False),
            ("on", "<think>\nhm", True, False, False),
            ("on", "<think>\nhm\n</think>\n\nHello!</think>", True, False, False),
            ("on", "<think>\n<think>\nhm\n</think>\n\nHello!", True, False, False),
            ("on", "Well.<think>\nhm\n</think>\n\nHello!", True, False, False),
            ("off", "Hello!", True, True, True),
            ("off", "<think>\nhm\n</think>\n\nHello!", True, False, False),
            ("no_think", "<think>\n\n</think>\n\nHello!", True, True, True),
            ("no_think", "<think>\nhm\n</think>\n\nHello!", True, True, False),
            ("no_think", "Hello!", True, False, False),
        ],
    )
    def test_form_of_the_think_block(self, mode, text, is_finished, well_formed, as_asked):
        dialogue = mixture.make(1, 0, skill="small talk", mode=mode)
        score = scoring.score(dialogue, text, is_finished)
        assert (score.is_well_formed, score.thinks_as_asked) == (well_formed, as_asked)
        assert as_asked or not score.is_right

    def test_wrong_answers_are_wrong(self):
        (dialogue,) = items("addition, up to four digits", 1)
        assert not scoring.score(dialogue, "<think>\nhm\n</think>\n\n1 + 1 = 3", True).is_right
        (dialogue,) = items("tool calls", 1)
        assert not scoring.score(dialogue, "<think>\nhm\n</think>\n\n<tool_call>\n{]\n</tool_call>", True).is_right
        (dialogue,) = items("JSON by schema or keys", 1)
        assert not scoring.score(dialogue, "<think>\nhm\n</think>\n\n{}", True).is_right

    def test_every_row_has_known_skills(self):
        assert {skill for skills, _ in ROWS.values() for skill in skills} == set(mixture.NAMES)
