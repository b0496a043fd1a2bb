"""The choice of a replica: where a conversation began, unless that replica is too busy."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.server.prefix_routing import MAX_BLOCKS, PrefixMemory, choose, hash_blocks, prompt_text

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 20}


def user(text):
    return {"role": "user", "content": text}


def memories(*sent):
    """One for each argument, a list of texts that were sent to it."""
    made = {}
    for i, texts in enumerate(sent):
        made[i] = PrefixMemory()
        for text in texts:
            made[i].add(hash_blocks(text))
    return made


class TestBlocks:
    @given(st.text(max_size=60), st.text(max_size=60))
    def test_equal_hashes_are_equal_beginnings(self, a, b):
        first, second = hash_blocks(a, 4), hash_blocks(b, 4)
        assert len(first) == len(a) // 4
        for i, (one, other) in enumerate(zip(first, second, strict=False), 1):
            assert (one == other) == (a[: 4 * i] == b[: 4 * i])

    def test_the_same_block_behind_another_beginning_is_another(self):
        assert hash_blocks("aaaabbbb", 4)[1] != hash_blocks("ccccbbbb", 4)[1]

    def test_a_huge_text_has_a_limit(self):
        assert len(hash_blocks("x" * (MAX_BLOCKS + 5), 1)) == MAX_BLOCKS


class TestText:
    @pytest.mark.parametrize("name", ["messages", "input"])
    def test_the_next_turn_begins_with_the_last_one(self, name):
        turn = [SYSTEM, user("Hi")]
        first = prompt_text({name: turn, "max_tokens": 5, "temperature": 0, "model": "m"})
        turn = [*turn, {"role": "assistant", "content": "Hello."}, user("Why?")]
        second = prompt_text({"model": "m", "stream": True, name: turn})
        assert second.startswith(first[:-1])  # but for the bracket that closed the list

    def test_every_api_has_its_beginning(self):
        assert prompt_text({"prompt": "Once"}) == "Once"
        assert prompt_text({"prompt": [1, 2]}).startswith(prompt_text({"prompt": [1]})[:-1])
        assert prompt_text({"system": "Be brief.", "messages": []}).startswith("Be brief.")
        assert prompt_text({"instructions": "Be brief.", "input": "Hi"}) == "Be brief.\0Hi"
        assert prompt_text({"max_tokens": 3}) == ""

    def test_what_has_a_cache_of_its_own_begins_differently(self):
        body = {"messages": [SYSTEM]}
        texts = [prompt_text({**body, **more}) for more in ({}, {"model": "adapter"}, {"cache_salt": "x"})]
        assert len({hash_blocks(text)[0] for text in texts}) == 3


class TestMemory:
    @given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=8), st.integers(1, 12))
    def test_it_stays_small_and_forgets_tails_first(self, texts, size):
        memory = PrefixMemory(size)
        for text in texts:
            blocks = hash_blocks("".join(map(str, text)), 1)
            memory.add(blocks)
            assert len(memory) <= size
            assert memory.num_known(blocks) == min(len(blocks), size)

    def test_what_was_used_stays(self):
        memory = PrefixMemory(4)
        for text in ("ab", "cd", "ab", "ef"):
            memory.add(hash_blocks(text, 1))
        known = [memory.num_known(hash_blocks(text, 1)) for text in ("ab", "cd", "ef")]
        assert known == [2, 0, 2]


class TestChoice:
    def test_the_longest_match_wins(self):
        text = "".join(random.Random(0).choices("abc", k=2048))
        held = memories([text[:1024]], [text[:2000]], ["x" * 2048])
        assert choose(hash_blocks(text), held, {0: 0, 1: 3, 2: 0}) == 1

    def test_not_if_it_is_too_busy(self):
        text = "y" * 2048
        held, blocks = memories([text], [], []), hash_blocks(text)
        assert choose(blocks, held, {0: 8, 1: 0, 2: 1}) == 0  # up to the margin
        assert choose(blocks, held, {0: 9, 1: 0, 2: 1}) == 1
        assert choose(blocks, held, {0: 150, 1: 100, 2: 120}) == 0  # up to the factor
        assert choose(blocks, held, {0: 151, 1: 100, 2: 120}) == 1

    def test_a_short_match_decides_nothing_but_ties(self):
        text = "z" * 512 + "".join(random.Random(1).choices("abc", k=2048))
        held, blocks = memories(["z" * 512], []), hash_blocks(text)
        assert choose(blocks, held, {0: 1, 1: 0}) == 1
        assert choose(blocks, held, {0: 0, 1: 0}) == 0

    def test_without_a_match_the_least_busy_then_the_emptiest(self):
        held = memories(["w" * 999], [], ["w" * 300])
        assert choose([], held, {0: 2, 1: 3, 2: 2}) == 2
        assert choose([], held, {0: 0, 1: 0, 2: 0}) == 1

    def test_only_replicas_with_a_memory_are_asked(self):
        assert choose([], memories([]), {0: 9, 1: 0}) == 0
        with pytest.raises(ValueError, match="no replica"):
            choose([], {}, {})

    @given(st.lists(st.tuples(st.integers(0, 300), st.lists(st.integers(0, 5), max_size=9)), min_size=1), st.data())
    def test_whoever_is_chosen_is_not_too_busy(self, replicas, data):
        blocks = data.draw(st.lists(st.integers(0, 5), max_size=9))
        held = {i: PrefixMemory() for i in range(len(replicas))}
        for i, (_, sent) in enumerate(replicas):
            held[i].add(sent)
        loads = {i: load for i, (load, _) in enumerate(replicas)}
        limit, chosen = max(1.5 * min(loads.values()), min(loads.values()) + 8), choose(blocks, held, loads)
        known = {i: held[i].num_known(blocks) for i in held if loads[i] <= limit}
        assert chosen in known
        if blocks and max(known.values()) * 2 >= len(blocks):
            assert known[chosen] == max(known.values())
        else:
            assert loads[chosen] == min(loads.values())

    def test_many_conversations_spread_and_stay(self):
        """Of 40 conversations with a system prompt in common each stays where it began; all replicas get some."""
        rng, held, homes = random.Random(2), memories([], [], [], []), {}
        loads = dict.fromkeys(held, 0)
        talks = {i: [SYSTEM, user("".join(rng.choices("abc", k=900)))] for i in range(40)}
        for turn in range(4):
            for i, talk in talks.items():
                blocks = hash_blocks(prompt_text({"messages": talk}))
                chosen = choose(blocks, held, loads)
                held[chosen].add(blocks)
                loads[chosen] += turn == 0  # they run side by side, the answers take long
                assert homes.setdefault(i, chosen) == chosen
                talk += [{"role": "assistant", "content": "".join(rng.choices("abc", k=300))}, user("And then?")]
        assert sorted(list(homes.values()).count(name) for name in held) == [10] * 4
