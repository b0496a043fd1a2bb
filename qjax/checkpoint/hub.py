"""Where a checkpoint's files come from: a local folder, the Hugging Face hub or ModelScope.

Owns the download and what the user reads when it fails. It does not read the files it brings: see `safetensors.py`.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from qjax.config import BUILTIN_MODEL

CONFIG_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors",)  # never *.bin or *.pt: a pickle runs code when it is read
MAX_ATTEMPTS = 3  # finished files stay, so an attempt goes on where the last one stopped
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    need_config: bool = True,
    need_weights: bool = True,
    progress: bool = True,
) -> Path:
    """The local folder of a model's files, downloaded first where `model` is a name on a hub.

    A folder of that name wins over a hub. Call it with `need_weights=False` first: a model that cannot be served is
    then refused before gigabytes of it are downloaded, and the second call brings only what is missing.

    Args:
      model: "builtin" (the model that ships with qjax), a folder, or a name such as `Qwen/Qwen3-0.6B`.
      revision: branch, tag or commit on the hub.
      token: for gated and private models; None: `HF_TOKEN` or the stored login.
      download_dir: where downloads are kept; None: the hub's own cache.
      need_config: the folder must hold `config.json` (a tokenizer's need not).
      need_weights: the folder must hold safetensors.
      progress: show the hub's progress bars.

    Raises:
      ValueError: the files cannot be had; the message says why and what to do.
    """
    if not model:
        raise ValueError("model is empty: give a folder, a name such as Qwen/Qwen3-0.6B, or 'builtin'.")
    folder = Path(model).expanduser()
    if model == BUILTIN_MODEL:
        folder = Path(__file__).parents[1] / "builtin_model"
    elif folder.is_dir():
        pass
    elif folder.exists():
        raise ValueError(f"{model!r} is a file. Give the folder that holds config.json and the safetensors files.")
    elif _is_path_like(model):
        raise ValueError(f"The folder {model!r} does not exist.")
    elif not _HUB_ID.fullmatch(model) or "--" in model or ".." in model:
        raise ValueError(
            f"{model!r} is neither a folder nor a name on the hub. A name is OWNER/MODEL, such as Qwen/Qwen3-0.6B."
        )
    else:
        patterns = [*CONFIG_FILES, *(WEIGHT_FILES if need_weights else ())]
        if os.environ.get("QJAX_USE_MODELSCOPE", "").lower() in ("1", "true", "yes", "on"):
            folder = _from_modelscope(model, revision, token, download_dir, patterns)
        else:
            folder = _from_hugging_face(model, revision, token, download_dir, patterns, progress)
    if need_config and not (folder / "config.json").is_file():
        raise ValueError(f"There is no config.json in {str(folder)!r}: is it the folder of a model?")
    if need_weights and not any(folder.glob("*.safetensors")):
        raise ValueError(_no_safetensors(model, folder))
    return folder


def _is_path_like(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or "\\" in model


def _no_safetensors(model: str, folder: Path) -> str:
    message = f"{model!r} has no *.safetensors file"
    others = sorted({p.suffix for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")})
    if others:
        message += f", only {' and '.join(others)} files, which qjax does not read"
    return message + ". Take a checkpoint in safetensors format, or --load-format dummy for random weights."


# Hugging Face


def _from_hugging_face(
    model: str, revision: str | None, token: str | None, download_dir: str | None, patterns: list[str], progress: bool
) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors

    call: dict[str, Any] = {"revision": revision, "token": token or None, "cache_dir": download_dir}
    # A checkpoint's files lie at the top; folders hold the same weights for other programs, but for the small ones of
    # sentence-transformers (1_Pooling).
    call |= {"allow_patterns": patterns, "ignore_patterns": ["[!1]*/*", "1[!_]*/*"], "library_name": "qjax"}
    if not progress:
        call["tqdm_class"] = _silent_tqdm()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return Path(hub.snapshot_download(model, **call))
        except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError) as error:
            # RuntimeError: what the Rust part of the hub's client (hf_xet) raises.
            if attempt < MAX_ATTEMPTS and _may_pass(error):
                time.sleep(attempt)
                continue
            if _is_full(_root(error)):
                raise ValueError(
                    _full(model, download_dir or hub.constants.HF_HUB_CACHE, _missing(model, call))
                ) from error
            raise ValueError(_explain(error, model, revision, download_dir)) from error
        except ValueError as error:
            raise ValueError(f"{model!r} cannot be downloaded: {error}") from error
    raise RuntimeError("unreachable: the last attempt returns or raises")


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment: the connection broke, or the hub is overloaded."""
    from huggingface_hub import errors

    cause = _root(error)
    if isinstance(cause, errors.HfHubHTTPError):
        return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
    return isinstance(cause, errors.HTTPError)


def _root(error: BaseException) -> BaseException:
    """What made the hub's client look into its cache and then say that nothing is there."""
    from huggingface_hub import errors

    is_cache_miss = isinstance(error, errors.LocalEntryNotFoundError)
    return error.__cause__ if is_cache_miss and error.__cause__ is not None else error


def _explain(error: BaseException, model: str, revision: str | None, download_dir: str | None) -> str:
    """One or two sentences for the user: what is wrong, and what to do."""
    from huggingface_hub import constants, errors

    cause = _root(error)
    page = f"{constants.ENDPOINT}/{model}"
    use_token = "set HF_TOKEN or pass --hf-token (make one at https://huggingface.co/settings/tokens)"
    if isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        which = f"revision {revision!r} of {model!r}" if revision else repr(model)
        part = "only in part" if isinstance(error, errors.IncompleteSnapshotError) else "not"
        return (
            f"HF_HUB_OFFLINE is set, and {which} is {part} in {download_dir or constants.HF_HUB_CACHE!r}. "
            "Unset HF_HUB_OFFLINE to download it, or give a local folder."
        )
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"{model!r} is a gated model and this account has no access to it yet. "
            f"Accept its terms at {page}, then {use_token}."
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{model!r} has no revision {revision or 'main'!r}. Its branches and tags: {page}/tree/main."
    if isinstance(cause, errors.RepositoryNotFoundError):
        hint = "A name is OWNER/MODEL, such as Qwen/Qwen3-0.6B. " if "/" not in model else ""
        return (
            f"There is no model {model!r} at {constants.ENDPOINT}, or it is private. "
            f"{hint}Check the name; for a private model, {use_token}."
        )
    if isinstance(cause, errors.DisabledRepoError):
        return f"Access to {model!r} has been disabled by the hub: see {page}."
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return f"The hub refused the token ({constants.ENDPOINT} answered 401). Renew it: {use_token}."
        if status == 403:
            return f"This account may not read {model!r} (403). Ask for access at {page}, then {use_token}."
        if status == 429:
            return f"The hub limits the rate of requests (429). Wait a little, or {use_token}."
        return f"The hub answered {status} for {model!r}. Try again later; files already downloaded are kept."
    if isinstance(cause, errors.HTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached ({_short(cause)}; {MAX_ATTEMPTS} attempts). Check the network, "
            "HTTPS_PROXY and HF_ENDPOINT, or give a local folder. Files already downloaded are kept."
        )
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS):
        return f"The download folder cannot be written ({cause}). Choose another one with --download-dir."
    return f"{model!r} cannot be downloaded: {_short(cause)}. Try again; files already downloaded are kept."


def _is_full(error: BaseException) -> bool:
    """Whether a write had no room. hf_xet passes on only the system's text, ModelScope may have a cause."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    is_full |= any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
    following = error.__cause__ or error.__context__
    return is_full or (following is not None and _is_full(following))


def _full(model: str, folder: str, missing: int | None) -> str:
    needs = "" if missing is None else f": {missing / 1e9:.3g} GB of it are still to come"
    with contextlib.suppress(OSError):
        needs += f"{', and ' if needs else ': '}{shutil.disk_usage(folder).free / 1e9:.3g} GB are free"
    return (
        f"The disk is full while downloading {model!r} to {folder!r}{needs}. Free space, or choose another place with "
        "--download-dir. Files already downloaded are kept."
    )


def _missing(model: str, call: dict[str, Any]) -> int | None:
    """Bytes of the files that are not there yet, one that is there in part as a whole; None: the hub does not say."""
    import huggingface_hub as hub

    try:
        files = hub.snapshot_download(model, **call, dry_run=True)
    except Exception:  # the disk is what matters to the user
        return None
    return sum(file.file_size or 0 for file in files if file.will_download)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _silent_tqdm() -> type:
    from huggingface_hub.utils import tqdm

    class SilentTqdm(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentTqdm


# ModelScope


def _from_modelscope(
    model: str, revision: str | None, token: str | None, download_dir: str | None, patterns: list[str]
) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise ValueError(
            "QJAX_USE_MODELSCOPE is set, but the modelscope package is not installed: pip install 'qjax[modelscope]'."
        ) from None
    call: dict[str, Any] = {"revision": revision, "cache_dir": download_dir, "allow_patterns": patterns}
    if token:  # older versions have no such argument and read MODELSCOPE_API_TOKEN alone
        call["token"] = token
    try:
        return Path(snapshot_download(model, **call))
    except Exception as error:  # its own classes differ from version to version
        if _is_full(error):
            cache = os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope")
            raise ValueError(_full(model, str(Path(download_dir or cache).expanduser()), None)) from error
        what = f"revision {revision!r} of {model!r}" if revision else repr(model)
        raise ValueError(
            f"ModelScope cannot give {what}: {_short(error)}. Check the name, --revision and MODELSCOPE_API_TOKEN, "
            "or unset QJAX_USE_MODELSCOPE for the Hugging Face hub."
        ) from error
