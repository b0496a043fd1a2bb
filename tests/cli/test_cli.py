"""The command line: what users see, and what the commands are given."""

import importlib.metadata
import subprocess
import sys
import types
from typing import Any

import pytest

import qjax.server
from qjax import cli, terminal
from qjax.config import EngineConfig, ServerConfig
from tests.cli.conftest import Run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What `qjax serve` hands to the server."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    lifecycle = types.ModuleType("qjax.server.lifecycle")
    lifecycle.run = lambda engine, server: calls.append((engine, server))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qjax.server.lifecycle", lifecycle)
    monkeypatch.setattr(qjax.server, "lifecycle", lifecycle, raising=False)
    return calls


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

    def test_help_of_bench(self, run: Run) -> None:
        code, out, _ = run("bench", "--help")
        assert code == 0 and all(f"qjax bench {kind} " in out for kind in ("serve", "throughput", "latency"))
        code, out, _ = run("bench", "serve", "--help")
        assert code == 0 and "usage: qjax bench serve [OPTIONS]" in out
        assert all(flag in out for flag in ("--request-rate NUMBER", "--goodput NAME:MS", "--random-input-len TOKENS"))
        assert "--max-model-len" not in out
        code, out, _ = run("bench", "latency", "--help")
        assert code == 0 and "usage: qjax bench latency [MODEL] [OPTIONS]" in out and "--max-model-len TOKENS" in out

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
            (["run-batch", "-i", "/nowhere", "-o", "x"], "input_file '/nowhere' cannot be read"),
            (["run-batch", "-i", "x"], "the following arguments are required: -o/--output-file"),
            (["bench"], "no benchmark given: serve, throughput or latency\nSee `qjax bench --help`."),
            (["bench", "serve", "--dataset-name", "sonnet"], "--dataset-name: invalid choice: 'sonnet'"),
            (["bench", "serve", "--num-prompt", "3"], "unknown option --num-prompt: did you mean --num-prompts?"),
            (["bench", "latency", "--input-len", "0"], "input_len must be at least 1, got 0."),
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


class TestBench:
    def test_what_is_given(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from qjax.bench import offline, serve
        from qjax.bench.config import LatencyConfig, ServeBenchConfig, ThroughputConfig

        calls: list[Any] = []
        monkeypatch.setattr(serve, "run", lambda config: calls.append(config) or 1)
        monkeypatch.setattr(offline, "throughput", lambda *configs: calls.append(configs))
        monkeypatch.setattr(offline, "latency", lambda *configs: calls.append(configs))
        monkeypatch.setenv("QJAX_HOST", "0.0.0.0")  # where a server listens is not where it is found
        argv = ["bench", "serve", "--num-prompts", "5", "--request-rate", "inf", "--goodput", "ttft:1", "tpot:2"]
        assert run(*argv, "--extra-body", '{"a": 1}', "--save-result")[0] == 1
        assert calls.pop() == ServeBenchConfig(
            num_prompts=5, goodput=["ttft:1", "tpot:2"], extra_body={"a": 1}, save_result=True
        )
        assert run("bench", "throughput", "--model", "m", "--input-len", "7", "--seed", "3")[0] == 0
        assert calls.pop() == (ThroughputConfig(input_len=7), EngineConfig(model="m", seed=3))
        assert run("bench", "latency", "m", "--n", "2")[0] == 0
        assert calls.pop() == (LatencyConfig(n=2), EngineConfig(model="m", enable_prefix_caching=False))
        assert run("bench", "latency", "m", "--enable-prefix-caching")[0] == 0
        assert calls.pop() == (LatencyConfig(), EngineConfig(model="m"))


class TestRunBatch:
    def test_flags(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        from qjax.server import batch

        calls: list[Any] = []
        monkeypatch.setattr(batch, "run", lambda *configs: calls.append(configs) or 0)
        source = tmp_path / "in.jsonl"
        source.write_text("")
        monkeypatch.setenv("QJAX_MAX_NUM_QUEUED_REQS", "1")
        argv = ["run-batch", "-i", str(source), "-o", str(tmp_path / "out"), "--model", "m", "--max-inflight", "3"]
        assert run(*argv, "--served-model-name", "gpt", "--tool-call-parser", "none") == (0, "", "")
        options = batch.BatchOptions(input_file=str(source), output_file=str(tmp_path / "out"), max_inflight=3)
        server = ServerConfig(served_model_name=["gpt"], tool_call_parser="none")
        assert calls == [(EngineConfig(model="m"), server, options)]
