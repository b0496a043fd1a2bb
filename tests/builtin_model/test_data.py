"""The data is a function of the seed, test items are not in it, and the mask covers what the model has to write."""

import hashlib
import random
import re

import numpy as np
import pytest

from scripts.builtin_model import dataset, mixture, render
from scripts.builtin_model.skills.tool_catalog import made_up
from scripts.builtin_model.world import World, is_test_item

SEED = 5


@pytest.fixture(scope="module")
def arrays():
    return dataset.encode(SEED, range(600))[0]


def documents(arrays):
    ends = np.cumsum(arrays.lengths)
    return [slice(end - length, end) for end, length in zip(ends, arrays.lengths, strict=True)]


def newest_switch(dialogue):
    switch = "on"
    for message in dialogue.messages:
        if message["role"] in ("system", "user"):
            for found in re.findall(r"/no_think\b|/think\b", message["content"]):
                switch = "no_think" if found == "/no_think" else "on"
    return switch


class TestDeterminism:
    def test_a_seed_gives_the_same_data_in_any_portion(self, arrays):
        parts = [dataset.encode(SEED, indices)[0] for indices in (range(100), range(100, 600))]
        assert np.array_equal(np.concatenate([p.tokens for p in parts]), arrays.tokens)
        assert np.array_equal(np.concatenate([p.loss_mask for p in parts]), arrays.loss_mask)

    def test_data_is_that_of_the_shipped_model(self):
        digest = hashlib.sha256()
        for i in range(300):
            for piece in render.pieces(mixture.make(SEED, i)):
                digest.update(piece.text.encode())
        assert digest.hexdigest() == "2149d5c13f89413783a3d60d69a9a82fcce2c2030fcb60860a8ef3adb068d4f6"

    def test_another_seed_and_the_test_split_give_other_data(self, arrays):
        for other in (dataset.encode(SEED + 1, range(50))[0], dataset.encode(SEED, range(50), "test")[0]):
            assert not np.array_equal(other.tokens[:1000], arrays.tokens[:1000])


class TestArrays:
    def test_packing_and_unpacking_gives_the_same_arrays(self, arrays):
        back = dataset.unpack(dataset.pack(arrays))
        assert np.array_equal(back.tokens, arrays.tokens) and back.tokens.dtype == np.uint16
        assert np.array_equal(back.loss_mask, arrays.loss_mask) and back.loss_mask.dtype == np.uint8
        assert np.array_equal(back.lengths, arrays.lengths)

    def test_unpacked_folder_has_the_three_files_of_training(self, arrays, tmp_path):
        packed, out = tmp_path / "packed", tmp_path / "out"
        packed.mkdir()
        for name in ("train_00", "train_01", "valid_00"):
            (packed / f"{name}.xz").write_bytes(dataset.pack(arrays))
        dataset.unpack_folder(packed, out)
        offsets = np.load(out / "train" / "offsets.npy")
        tokens, mask = (np.load(out / "train" / f"{name}.npy") for name in ("tokens", "loss_mask"))
        assert (offsets[0], offsets[-1], len(mask)) == (0, len(tokens), len(tokens))
        assert len(offsets) == 2 * len(arrays.lengths) + 1 and offsets.dtype == np.int64
        assert np.array_equal(np.load(out / "valid" / "tokens.npy"), arrays.tokens)

    def test_an_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"scripts\.builtin_model\.build"):
            dataset.unpack_folder(tmp_path, tmp_path / "out")


class TestMask:
    def test_targets_decode_to_what_the_assistant_writes(self, arrays, encoder):
        for i, where in enumerate(documents(arrays)):
            dialogue = mixture.make(SEED, i)
            tokens, mask = arrays.tokens[where], arrays.loss_mask[where].astype(bool)
            written = encoder.decode(tokens[mask].tolist(), skip_special_tokens=False)
            question = max(n for n, m in enumerate(dialogue.messages) if m["role"] == "user")
            answers = [m for m in dialogue.messages[question:] if m["role"] == "assistant"]
            expected = ""
            for message in answers:
                thought = message.get("reasoning_content")
                if message is not answers[-1] and not thought:
                    continue  # a call that came back without its thought
                if dialogue.mode == "on":
                    expected += f"<think>\n{thought}\n</think>\n\n"
                elif dialogue.mode == "no_think":
                    expected += "<think>\n\n</think>\n\n"
                expected += render.spoken(message) + "<|im_end|>"
            assert written == expected

    def test_thinking_is_there_exactly_where_the_mode_wants_it(self):
        for i in range(600):
            dialogue = mixture.make(SEED, i)
            *_, last = render.pieces(dialogue)
            if dialogue.mode != "off":
                assert newest_switch(dialogue) == dialogue.mode
            assert last.is_target and last.text.endswith("<|im_end|>")
            assert last.text.startswith("<think>\n\n") == (dialogue.mode == "no_think")
            assert last.text.startswith("<think>") == (dialogue.mode != "off")

    def test_the_newest_switch_counts_whatever_stands_before_it(self):
        """All four combinations of an earlier switch and the mode are there."""
        seen = set()
        for i in range(200):
            for mode in ("on", "no_think"):
                dialogue = mixture.make(SEED, i, "train", "recall", mode, "history")
                assert newest_switch(dialogue) == mode
                before = "".join(m["content"] for m in dialogue.messages[:-2] if m["role"] != "assistant")
                seen |= {(switch, mode) for switch in ("/think", "/no_think") if switch in before}
        assert len(seen) == 4

    def test_tool_results_may_follow_a_call_without_its_thought(self):
        made = [mixture.make(SEED, i, "train", "tool answers", "on") for i in range(50)]
        calls = [next(m for m in dialogue.messages if "tool_calls" in m) for dialogue in made]
        assert {"reasoning_content" in call for call in calls} == {True, False}
        for dialogue in made:
            assert render.pieces(dialogue)[-1].text.startswith("<think>\nI have the result")

    def test_pieces_apart_encode_as_the_whole_text_does(self, encoder):
        for i in range(300):
            pieces = render.pieces(mixture.make(SEED, i))
            apart = [t for p in pieces for t in encoder.encode(p.text, add_special_tokens=False).ids]
            assert apart == encoder.encode("".join(p.text for p in pieces), add_special_tokens=False).ids


class TestSplit:
    def test_arithmetic_pairs_of_the_test_are_not_in_training(self):
        for skill, sign in (("addition", "+"), ("subtraction", "-")):
            for split in ("train", "test"):
                for i in range(300):
                    content = mixture.make(SEED, i, split, skill, "on").messages[-1]["content"]
                    a, _, b, *_ = content.split()
                    pair = sorted((int(a), int(b)))
                    if pair[1] >= 10:
                        assert is_test_item(f"{pair[0]}{sign}{pair[1]}") == (split == "test")

    def test_made_up_tools_and_names_of_the_test_are_not_in_training(self):
        for split in ("train", "test"):
            world = World(random.Random(1), split)
            made = [made_up(world).name for _ in range(200)] + [world.new_word() for _ in range(200)]
            assert {is_test_item(item) for item in made} == {split == "test"}
