"""What `generate`, `chat` and `info` print, with a fake engine behind them."""

import io
import os
import random
import signal
from typing import Any

import pytest

from qjax import terminal
from qjax.config import EngineConfig
from qjax.sampling_params import SamplingParams
from qjax.text.answer_parser import AnswerParser
from tests.cli.conftest import FakeEngine, Run


class TestGenerate:
    def test_streams_and_ends_the_line(self, run: Run, engine: FakeEngine) -> None:
        engine.answers = [["Once", " upon", " a time"]]
        code, out, _ = run("generate", "m", "Tell", "--top-p", "0.5", "--seed", "3", "--stop", "\n\n", "--stop", "x")
        assert (code, out) == (0, "Once upon a time\n")
        assert engine.prompts == ["Tell"]
        expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.5, seed=3, stop=["\n\n", "x"], max_tokens=None)
        assert engine.params == [expected]
        assert engine.configs == [EngineConfig(model="m", seed=3)]  # type: ignore[attr-defined]

    def test_reads_standard_input(self, run: Run, engine: FakeEngine) -> None:
        engine.answers = [["done\n"]]
        assert run("generate", "m", "--max-tokens", "5", stdin="From a\npipe") == (0, "done\n", "")
        assert engine.prompts == ["From a\npipe"]
        assert engine.params[0].max_tokens == 5


class TestChat:
    def test_conversation(self, run: Run, engine: FakeEngine) -> None:
        engine.answers = [["<think>\nhm\n</think>\n\n", "Hi"], ["Again"], ["New"]]
        stdin = "Hello\nMore /no_think\n/clear\nFresh\n/exit\nnever\n"
        code, out, err = run("chat", "m", "--system", "Be brief", stdin=stdin)
        assert (code, err) == (0, "")
        assert out == "<think>\nhm\n</think>\n\nHi\nAgain\nNew\n"
        first = "[system:Be brief][user:Hello]"
        assert engine.prompts == [
            first,
            first + "[assistant:Hi][user:More /no_think]",
            "[system:Be brief][user:Fresh]",
        ]

    def test_thinking_off_and_own_template(self, run: Run, engine: FakeEngine, tmp_path: Any) -> None:
        engine.tokenizer.chat_template = None
        assert "has no chat template" in run("chat", "m", stdin="Hello")[2]
        (tmp_path / "t.jinja").write_text("x")
        engine.answers = [["Hi"]]
        argv = ["chat", "m", "--no-thinking", "--chat-template", str(tmp_path / "t.jinja")]
        assert run(*argv, stdin="Hello") == (0, "Hi\n", "")
        assert engine.prompts == ["[user:Hello](enable_thinking=False)"]

    def test_commands(self, run: Run, engine: FakeEngine) -> None:
        code, out, _ = run("chat", "m", stdin="/help\n/nonsense\n\n/quit\n")
        assert code == 0 and "Ctrl-C      stop an answer" in out and "There is no command /nonsense." in out
        assert engine.prompts == []

    def test_too_long_a_conversation_goes_on(self, run: Run, engine: FakeEngine) -> None:
        engine.answers = [["Hi"]]
        code, out, err = run("chat", "m", stdin="x" * 2000 + "\nHello\n")
        assert (code, out) == (0, "Hi\n")
        assert err == "qjax: error: your prompt is too long\n/clear starts a new conversation.\n"
        assert engine.prompts == ["[user:Hello]"], "the refused message is forgotten"

    @pytest.mark.parametrize(("first", "is_kept"), [("Well", True), ("<think>\nhm", False)])
    def test_ctrl_c_stops_the_answer_alone(self, run: Run, engine: FakeEngine, first: str, is_kept: bool) -> None:
        def interrupt() -> str:
            os.kill(os.getpid(), signal.SIGINT)
            return first

        engine.answers = [[interrupt, " never", " said"], ["Yes"]]
        code, out, _ = run("chat", "m", stdin="Hello\nStill there?\n")
        assert (code, out) == (0, f"{first}\nYes\n")
        assert engine.aborted == ["chat-0"]
        kept = f"[user:Hello][assistant:{first}]" if is_kept else ""
        assert engine.prompts[1] == kept + "[user:Still there?]"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_template_that_opens_the_think_block(self, engine: FakeEngine) -> None:
        engine.tokenizer.apply_chat_template = lambda messages, **kw: "prompt<think>\n"  # type: ignore[method-assign]
        engine.answers = [["hm\n</think>\n\nHi"]]
        talk = terminal.Conversation(engine, SamplingParams(), None, None, True)  # type: ignore[arg-type]
        out = io.StringIO()
        talk.ask("Hello", out, False)
        assert out.getvalue() == "<think>\nhm\n</think>\n\nHi\n"
        assert talk.messages[1]["content"] == "Hi" and talk.messages[1]["reasoning_content"] == "hm"


class TestAnswerWriter:
    def written(self, is_styled: bool, *pieces: str) -> str:
        out, parser = io.StringIO(), AnswerParser()
        writer = terminal.AnswerWriter(out, is_styled)
        for piece in pieces:
            writer.write(parser.feed(piece))
        writer.write(parser.finish())
        writer.close()
        return out.getvalue().replace(terminal.DIM, "{").replace(terminal.PLAIN, "}")

    @pytest.mark.parametrize(
        ("text", "styled"),
        [
            ("<think>\nhm, yes\n</think>\n\nHi", "{hm, yes}\n\nHi\n"),
            ("<think>\n\n</think>\n\nHi\n", "Hi\n"),
            ("<think>\nstopped", "{stopped}\n"),
            ("a < b <thin", "a < b <thin\n"),
            ("", ""),
        ],
    )
    def test_thinking_is_dim_and_tags_are_gone(self, text: str, styled: str) -> None:
        assert self.written(True, text) == styled

    def test_unstyled_it_is_what_the_model_wrote(self) -> None:
        text = "<think>\nif a<b </thin\nthen\n</think>\n\nAnswer: 1<2 <think\n"
        assert self.written(False, text) == text
        rng = random.Random(0)
        for _ in range(50):
            cuts = sorted(rng.sample(range(len(text)), 6))
            pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert self.written(False, *pieces) == text


class TestInfo:
    CONFIG = (
        '{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "head_dim": 128,'
        '"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,'
        '"max_position_embeddings": 40960, "tie_word_embeddings": true, "rope_theta": 1000000}'
    )

    def test_facts_and_plan(self, run: Run, tmp_path: Any) -> None:
        (tmp_path / "config.json").write_text(self.CONFIG)
        code, out, err = run("info", str(tmp_path), "--gpu-memory", "24GiB", "--max-model-len", "8k")
        assert (code, err) == (0, "")
        assert "Qwen3ForCausalLM" in out and "0.60 billion" in out and "112 KiB a token in bfloat16" in out
        assert "memory plan (GPU, bfloat16" in out and "of 22.08" in out

    def test_refused_model(self, run: Run, tmp_path: Any) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        assert "LlamaForCausalLM" in run("info", str(tmp_path), "--gpu-memory", "24GiB")[2]
        (tmp_path / "config.json").write_text("{")
        assert "config.json is not valid JSON" in run("info", str(tmp_path), "--gpu-memory", "24GiB")[2]
