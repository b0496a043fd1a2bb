"""The command line: what users see, with a fake engine and server behind it."""

import importlib.metadata
import io
import os
import random
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

import qjax.server
from qjax import cli, terminal
from qjax.config import EngineConfig, ServerConfig
from qjax.outputs import CompletionOutput, RequestOutput
from qjax.sampling_params import SamplingParams

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `qjax ...` in this process: exit code, stdout, stderr."""
    for name in list(os.environ):
        if name.startswith("QJAX_"):
            monkeypatch.delenv(name)

    def call(*argv: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main(argv)
        except SystemExit as exit_:  # argparse's --help
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What `qjax serve` hands to the server."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    lifecycle = types.ModuleType("qjax.server.lifecycle")
    lifecycle.run = lambda engine, server: calls.append((engine, server))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qjax.server.lifecycle", lifecycle)
    monkeypatch.setattr(qjax.server, "lifecycle", lifecycle, raising=False)
    return calls


class FakeTokenizer:
    chat_template: str | None = "template"

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def apply_chat_template(self, messages: list[dict[str, str]], *, chat_template: str | None, **kw: Any) -> str:
        if not (chat_template or self.chat_template):
            raise ValueError("the tokenizer has no chat template; give one with --chat-template.")
        text = "".join(f"[{m['role']}:{m['content']}]" for m in messages)
        return text + "".join(f"({k}={v})" for k, v in kw.items())


class FakeEngine:
    """Answers each prompt with the next of `answers`, a word a step; each word may be a function to call."""

    def __init__(self, answers: list[list[Any]]) -> None:
        self.answers = answers
        self.tokenizer = FakeTokenizer()
        self.default_sampling_params = {"temperature": 0.6, "top_k": 20}
        self.max_model_len = 1000
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.aborted: list[str] = []
        self._words: list[Any] = []
        self._id = ""

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        if len(prompt_token_ids) > self.max_model_len:
            raise ValueError("your prompt is too long")
        self.prompts.append("".join(map(chr, prompt_token_ids)))
        self.params.append(params)
        self._id, self._words = request_id, list(self.answers.pop(0))

    @property
    def has_work(self) -> bool:
        return bool(self._words)

    def step(self) -> list[RequestOutput]:
        if not self._words:
            return []
        word = self._words.pop(0)
        text = word() if callable(word) else word
        answer = CompletionOutput(0, text, [1], finish_reason=None if self._words else "stop")
        return [RequestOutput(self._id, None, [], [answer], not self._words)]

    def abort(self, request_id: str) -> RequestOutput | None:
        if not self._words:
            return None
        self.aborted.append(request_id)
        self._words = []
        return RequestOutput(request_id, None, [], [CompletionOutput(0, "", [], finish_reason="abort")], True)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine([])
    configs: list[EngineConfig] = []
    fake.configs = configs  # type: ignore[attr-defined]
    monkeypatch.setattr(terminal, "_engine", lambda config: configs.append(config) or fake)
    return fake


class TestScreens:
    def test_first_screen(self, run: Run) -> None:
        code, out, _ = run()
        assert code == 0
        assert all(f"qjax {command} " in out for command in cli.COMMANDS)
        assert len(out.splitlines()) <= 16 and max(map(len, out.splitlines())) <= 100
        assert run("--help")[:2] == (0, out)

    def test_version(self, run: Run) -> None:
        code, out, _ = run("--version")
        assert (code, out) == (0, f"qjax {importlib.metadata.version('qjax')}\n")

    @pytest.mark.parametrize("command", ["serve", "chat", "generate", "info", "run-batch"])
    def test_help_of_a_command(self, run: Run, command: str) -> None:
        code, out, _ = run(command, "--help")
        model = {"generate": "MODEL [TEXT]", "run-batch": "-i FILE -o FILE [MODEL]"}.get(command, "[MODEL]")
        assert code == 0 and f"usage: qjax {command} {model} [OPTIONS]" in out
        assert "--max-model-len TOKENS" in out and "-tp" in out and "--no-enable-prefix-caching" in out
        assert ("--api-key" in out) == (command == "serve")
        assert ("--top-p" in out) == (command in ("generate", "chat"))

    def test_help_of_train(self, run: Run) -> None:
        code, out, _ = run("train", "--help")
        assert code == 0 and "usage: qjax train [CONFIG]" in out
        assert all(
            flag in out for flag in ("--model MODEL", "--learning-rate NUMBER", "--no-from-scratch", "--lora JSON")
        )

    def test_light_commands_import_no_jax(self) -> None:
        """Measured in imports: time on a shared machine proves nothing."""
        code = (
            "import sys; from qjax.cli import main; import qjax; qjax.SamplingParams; qjax.EngineConfig\n"
            "commands = [], ['--version'], ['serve', '--zzz'], ['info', '/nowhere'], ['x']\n"
            "codes = [main(command) for command in commands]\n"
            "heavy = {'jax', 'numpy', 'flax', 'transformers', 'aiohttp', 'huggingface_hub'} & set(sys.modules)\n"
            "assert codes == [0, 0, 2, 2, 2], codes\n"
            "assert not heavy, heavy\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["serv"], "there is no command 'serv': did you mean serve?\nSee `qjax --help`."),
            (["serve", "--api-key", "a", "b"], "no MODEL given before an option with several values. Put MODEL first"),
            (["serve", "m", "--max-model-le", "3"], "unknown option --max-model-le: did you mean --max-model-len?"),
            (["serve", "m", "--zzz"], "unknown option --zzz\nSee `qjax serve --help`."),
            (["serve", "m", "--port", "x"], "--port: expected a number, got 'x'"),
            (["serve", "m", "--port", "99999"], "port must be in [0, 65535], got 99999."),
            (["serve", "m", "--max-model-len", "many"], "--max-model-len: max_model_len must be a number of tokens"),
            (["serve", "m", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
            (["serve", "m", "--model", "n"], "two models given: MODEL is 'm' and --model is 'n'."),
            (["generate", "m", "two", "words"], "unexpected argument 'words': put a text of several words in quotes"),
            (["generate", "m"], "the text is empty"),
            (["generate", "m", "x", "--temperature", "9"], "temperature must be in [0, 2], got 9.0."),
            (["chat", "m", "--chat-template", "/nowhere"], "--chat-template: [Errno 2] No such file"),
            (["info", "/nowhere"], "The folder '/nowhere' does not exist."),
        ],
    )
    def test_wrong_usage(self, run: Run, argv: list[str], message: str) -> None:
        code, out, err = run(*argv)
        assert code == 2 and out == ""
        assert err.startswith("qjax: error: ") and message in err

    def test_a_value_error_from_below_is_one_line(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> None:
            raise ValueError("config.json: vocab_size is missing.")

        monkeypatch.setattr(terminal, "info", fail)
        assert run("info", "m") == (2, "", "qjax: error: config.json: vocab_size is missing.\n")
        monkeypatch.setenv("QJAX_DEBUG", "1")
        with pytest.raises(ValueError, match="vocab_size"):
            cli.main(["info", "m"])

    def test_a_bug_keeps_its_traceback(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> None:
            raise RuntimeError("broken invariant")

        monkeypatch.setattr(terminal, "info", fail)
        with pytest.raises(RuntimeError):
            run("info", "m")

    def test_ctrl_c(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(terminal, "info", interrupt)
        assert run("info", "m") == (130, "", "")


class TestServe:
    def test_flags(self, run: Run, served: list[tuple[EngineConfig, ServerConfig]]) -> None:
        argv = ["serve", "m", "-tp", "2", "--max_model_len=32k", "--no-enable-prefix-caching", "--enforce-eager"]
        argv += ["--hf-overrides", '{"rope_theta": 1}', "--kv-cache-memory-bytes", "4GiB", "--port", "0"]
        argv += ["--served-model-name", "a", "b", "--api-key", "x", "--api-key", "y_z"]
        assert run(*argv) == (0, "", "")
        engine = EngineConfig(
            model="m",
            tensor_parallel_size=2,
            max_model_len=32000,
            enable_prefix_caching=False,
            enforce_eager=True,
            hf_overrides={"rope_theta": 1},
            kv_cache_memory_bytes=4 << 30,
        )
        assert served == [(engine, ServerConfig(port=0, served_model_name=["a", "b"], api_key=["x", "y_z"]))]

    def test_model_as_a_flag(self, run: Run, served: list[tuple[EngineConfig, ServerConfig]]) -> None:
        assert run("serve", "--model", "m")[0] == 0
        assert served == [(EngineConfig(model="m"), ServerConfig())]

    def test_environment(
        self, run: Run, served: list[tuple[EngineConfig, ServerConfig]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        env = {"MODEL": "m", "MAX_MODEL_LEN": "8k", "ENFORCE_EAGER": "1", "API_KEY": "a, b", "SEED": "7", "DTYPE": ""}
        for name, value in env.items():
            monkeypatch.setenv(f"QJAX_{name}", value)
        assert run("serve", "--seed", "8")[0] == 0
        engine = EngineConfig(model="m", max_model_len=8000, enforce_eager=True, seed=8)
        assert served == [(engine, ServerConfig(api_key=["a", "b"]))]

    def test_wrong_environment(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QJAX_MAX_NUM_SEQS", "many")
        assert "QJAX_MAX_NUM_SEQS: " in run("serve", "m")[2]
        monkeypatch.delenv("QJAX_MAX_NUM_SEQS")
        monkeypatch.setenv("QJAX_ENFORCE_EAGER", "maybe")
        assert "QJAX_ENFORCE_EAGER must be 0 or 1, got 'maybe'." in run("serve", "m")[2]

    def test_the_port_that_kubernetes_sets_is_not_ours(
        self, run: Run, served: list[tuple[EngineConfig, ServerConfig]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QJAX_PORT", "tcp://10.0.0.1:8000")
        assert run("serve", "m")[0] == 0
        assert served[0][1].port == ServerConfig().port


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
            first + "[assistant:<think>\nhm\n</think>\n\nHi][user:More /no_think]",
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
        talk.ask("Hello", io.StringIO(), False)
        assert talk.messages[1]["content"] == "<think>\nhm\n</think>\n\nHi"


class TestThinkingWriter:
    def styled(self, *pieces: str) -> str:
        out = io.StringIO()
        writer = terminal.ThinkingWriter(out, True)
        for piece in pieces:
            writer.write(piece)
        writer.close()
        return out.getvalue().replace(terminal.DIM, "{").replace(terminal.PLAIN, "}")

    def test_thinking_is_dim_and_tags_are_gone(self) -> None:
        assert self.styled("<think>\nhm, yes\n</think>\n\nHi") == "{hm, yes}\n\nHi\n"
        assert self.styled("<think>\n\n</think>\n\nHi\n") == "{}Hi\n", "an empty block leaves no empty lines"
        assert self.styled("<think>\nstopped") == "{stopped}\n"
        assert self.styled("a < b <thin") == "a < b <thin\n"
        assert self.styled() == ""

    def test_pieces_do_not_matter(self) -> None:
        text = "<think>\nif a<b </thin\nthen\n</think>\n\nAnswer: 1<2 <think\n"
        whole = self.styled(text)
        rng = random.Random(0)
        for _ in range(50):
            cuts = sorted(rng.sample(range(len(text)), 6))
            assert self.styled(*(text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True))) == whole


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
