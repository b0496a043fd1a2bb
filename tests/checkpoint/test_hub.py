"""Downloads with the real client, over loopback, from a stub of the hub; and what the user reads when one fails."""

import json
import os
import random
import re
import resource
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from qjax.checkpoint import hub
from tests.checkpoint.hub_stub import COMMIT, HubStub

WEIGHTS = random.Random(0).randbytes(14 << 20)  # the client flushes, and so can resume, every 10 MiB
FILES = {
    "config.json": b'{"architectures": ["Qwen3ForCausalLM"]}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "merges.txt": b"#version: 0.2\n",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "1_Pooling/config.json": b"{}",
    "README.md": b"# A model",
}
WANTED = {name for name in FILES if name not in ("pytorch_model.bin", "onnx/config.json", "README.md")}

# The hub's client reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, so it runs in a process of its own.
CLIENT = """
import json, sys, time
from qjax.checkpoint import hub
time.sleep = lambda seconds: None
for line in sys.stdin:
    call = json.loads(line)
    try:
        answer = {"path": str(hub.resolve(call.pop("model"), progress=False, **call))}
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that calls `resolve` on demand."""

    def __init__(self, home: Path, **env: str) -> None:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "QJAX_"))}
        env = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **env}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={**keep, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def call(self, model: str, **options: object) -> dict[str, str]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"model": model, **options}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def resolve(self, model: str, **options: object) -> Path:
        answer = self.call(model, **options)
        assert "path" in answer, answer
        return Path(answer["path"])

    def error(self, model: str, **options: object) -> str:
        answer = self.call(model, **options)
        assert "error" in answer, answer
        return answer["error"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    with HubStub(FILES) as stub:
        yield stub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def client(stub: HubStub, home: Path) -> Iterator[Client]:
    client = Client(home, HF_ENDPOINT=stub.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(stub: HubStub, home: Path) -> Iterator[Client]:
    client = Client(home, HF_ENDPOINT=stub.url, HF_HUB_OFFLINE="1")
    yield client
    client.close()


def test_downloads_what_is_needed_and_nothing_else(client: Client, stub: HubStub, tmp_path: Path) -> None:
    folder = client.resolve("org/model", download_dir=str(tmp_path))
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert folder.is_relative_to(tmp_path)
    stub.requests.clear()
    assert client.resolve("org/model", download_dir=str(tmp_path), revision="main") == folder
    assert not [r for r in stub.requests if "/resolve/" in r[1]], "the second call downloads nothing"


def test_weights_come_only_when_needed(client: Client, stub: HubStub, tmp_path: Path) -> None:
    stub.requests.clear()
    folder = client.resolve("org/model", download_dir=str(tmp_path), need_weights=False)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == WANTED - {"model.safetensors"}
    assert stub.downloads("model.safetensors") == []
    assert client.resolve("org/model", download_dir=str(tmp_path), revision=COMMIT) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(stub.downloads("tokenizer.json")) == 1


def test_a_cut_download_is_resumed(client: Client, stub: HubStub, tmp_path: Path) -> None:
    stub.requests.clear()
    stub.cut["model.safetensors"] = 12 << 20
    folder = client.resolve("org/model", download_dir=str(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert stub.downloads("model.safetensors") == [None, f"bytes={10 << 20}-"]


def test_a_disk_that_is_full_and_then_is_not(client: Client, stub: HubStub, tmp_path: Path) -> None:
    """No file may be larger than 12 MiB. The part that was written is not taken for the whole."""
    stub.requests.clear()
    pid = client.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (12 << 20, resource.RLIM_INFINITY))
    try:
        error = client.error("org/model", download_dir=str(tmp_path))
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert f"The disk is full while downloading 'org/model' to {str(tmp_path)!r}: 0.0147 GB" in error
    assert "are free" in error and "--download-dir" in error
    stub.fail[:] = [503] * hub.MAX_ATTEMPTS
    assert "answered 503" in client.error("org/model", download_dir=str(tmp_path)), "what is there is no model yet"
    folder = client.resolve("org/model", download_dir=str(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_reset_connection_is_tried_again(client: Client, stub: HubStub, tmp_path: Path) -> None:
    stub.requests.clear()
    stub.reset["model.safetensors"] = 1 << 20
    folder = client.resolve("org/model", download_dir=str(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(stub.downloads("model.safetensors")) == 2
    assert len(stub.downloads("tokenizer.json")) == 1, "finished files are kept"


def test_an_overloaded_hub_is_asked_again(client: Client, stub: HubStub, tmp_path: Path) -> None:
    stub.fail[:] = [503, 502]
    assert client.resolve("org/model", download_dir=str(tmp_path), need_weights=False).is_dir()
    stub.fail[:] = [503] * hub.MAX_ATTEMPTS
    assert "answered 503 for 'org/other'" in client.error("org/other")
    assert stub.fail == []


def test_gated_model(client: Client, stub: HubStub, tmp_path: Path) -> None:
    message = client.error("org/gated", download_dir=str(tmp_path))
    assert "'org/gated' is a gated model" in message
    assert f"{stub.url}/org/gated" in message and "HF_TOKEN" in message and "--hf-token" in message
    assert client.resolve("org/gated", download_dir=str(tmp_path), token="good", need_weights=False).is_dir()


def test_private_unknown_and_bad_token(client: Client, stub: HubStub) -> None:
    for model in ("org/private", "org/missing"):
        message = client.error(model)
        assert f"no model {model!r} at {stub.url}, or it is private" in message and "--hf-token" in message
    assert client.resolve("org/private", token="good", need_weights=False).is_dir()
    message = client.error("org/model", token="bad", revision="main")
    assert "refused the token" in message and "HF_TOKEN" in message


def test_missing_revision(client: Client) -> None:
    assert "'org/model' has no revision 'v9'" in client.error("org/model", revision="v9")


def test_offline(client: Client, offline: Client, stub: HubStub, home: Path) -> None:
    stub.requests.clear()
    message = offline.error("org/cached")
    assert "HF_HUB_OFFLINE is set" in message and "'org/cached' is not in" in message and str(home) in message
    folder = client.resolve("org/cached", need_weights=False)
    stub.requests.clear()
    assert offline.resolve("org/cached", need_weights=False) == folder
    assert "'org/cached' is only in part in" in offline.error("org/cached")
    client.resolve("org/cached")
    stub.requests.clear()
    assert offline.resolve("org/cached") == folder
    assert "revision 'v2' of 'org/cached' is not in" in offline.error("org/cached", revision="v2")
    assert stub.requests == [], "offline mode asks nobody"


def test_unreachable_hub(tmp_path: Path) -> None:
    client = Client(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    message = client.error("org/model")
    client.close()
    assert "http://127.0.0.1:9 cannot be reached" in message and f"{hub.MAX_ATTEMPTS} attempts" in message
    assert "HTTPS_PROXY" in message


class TestLocal:
    def test_a_folder_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert hub.resolve(str(tmp_path), need_weights=False) == tmp_path
        with pytest.raises(ValueError, match=r"no \*\.safetensors file\. .*--load-format dummy"):
            hub.resolve(str(tmp_path))
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(ValueError, match=r"only \.bin files, which qjax does not read"):
            hub.resolve(str(tmp_path))
        (tmp_path / "model.safetensors").touch()
        assert hub.resolve(str(tmp_path)) == tmp_path

    def test_a_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=re.escape(f"no config.json in {str(tmp_path)!r}")):
            hub.resolve(str(tmp_path))
        assert hub.resolve(str(tmp_path), need_config=False, need_weights=False) == tmp_path

    @pytest.mark.parametrize("model", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", "nowhere/"])
    def test_a_path_that_does_not_exist(self, model: str) -> None:
        with pytest.raises(ValueError, match=r"The folder .* does not exist"):
            hub.resolve(model)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        with pytest.raises(ValueError, match=r"is a file\. Give the folder"):
            hub.resolve(str(tmp_path / "model.gguf"))

    @pytest.mark.parametrize("model", ["", "Qwen3 8B", "-model", "org--model", "org/mod..el", "org/mödel"])
    def test_no_name(self, model: str) -> None:
        with pytest.raises(ValueError, match=r"Qwen/Qwen3-0\.6B"):
            hub.resolve(model)


class TestModelScope:
    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QJAX_USE_MODELSCOPE", "true")
        monkeypatch.setitem(sys.modules, "modelscope", None)
        with pytest.raises(ValueError, match=re.escape("pip install 'qjax[modelscope]'")):
            hub.resolve("Qwen/Qwen3-0.6B")

    def test_its_client_is_called(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        calls = []

        def snapshot_download(model: str, **options: object) -> str:
            calls.append((model, options))
            if model == "org/large":
                raise RuntimeError("download failed") from OSError(28, "No space left on device")
            if model == "org/missing":
                raise RuntimeError("404 not found\nmore")
            (tmp_path / "config.json").touch()
            return str(tmp_path)

        module = types.ModuleType("modelscope.hub.snapshot_download")
        module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        for name in ("modelscope", "modelscope.hub"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setenv("QJAX_USE_MODELSCOPE", "true")
        assert hub.resolve("org/model", revision="v1", need_weights=False) == tmp_path
        patterns = list(hub.CONFIG_FILES)
        assert calls == [("org/model", {"revision": "v1", "cache_dir": None, "allow_patterns": patterns})]
        with pytest.raises(ValueError, match=r"The disk is full while downloading 'org/large' to .*--download-dir"):
            hub.resolve("org/large")
        with pytest.raises(ValueError, match=r"ModelScope cannot give 'org/missing': 404 not found\. Check"):
            hub.resolve("org/missing")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "The disk is full .*--download-dir"),
        (RuntimeError("Data processing error: File I/O: No space left on device (os error 28)"), "The disk is full"),
        (PermissionError(13, "Permission denied", "/cache"), "cannot be written .*--download-dir"),
        (RuntimeError("Data processing error: CAS\nmore"), "cannot be downloaded: Data processing error: CAS. Try"),
        (ValueError("too large"), "cannot be downloaded: too large"),
    ],
)
def test_other_failures(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message):
        hub.resolve("org/model")
