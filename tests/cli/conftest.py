"""`qjax ...` in this process, with a fake engine behind it."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from qjax import cli, terminal
from qjax.config import EngineConfig
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
