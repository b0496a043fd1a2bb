"""What a checkpoint is for: text, embeddings or scores; and what of it the last two need. Reads files, loads no model.

The official Qwen3-Embedding and Qwen3-Reranker both call themselves `Qwen3ForCausalLM`. An embedder is told by the
files of sentence-transformers beside it, a reranker by its name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qjax.config import EngineConfig

CAUSAL, BACKBONE, CLASSIFIER = "Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"
ANSWERS = ("no", "yes")  # the next tokens that Qwen3-Reranker was trained to choose between
SCORE_WEIGHT = "score.weight"


@dataclass(frozen=True)
class Pooling:
    """What is made of the last token's hidden state h.

    `embed`: h is the embedding. `score`: sigmoid(w · h), where w is the difference of the output layer's rows of
    `tokens[1]` and `tokens[0]` (so the score is P(yes) / (P(yes) + P(no)) of the next token), or the checkpoint's own
    `score.weight` where `tokens` is None. A token is given by its text or its id.
    """

    kind: Literal["embed", "score"]
    tokens: tuple[str | int, str | int] | None = None

    def backbone(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """The `config.json` of the decoder to load: without an output layer where none is needed."""
        names = [name for name in hf_config.get("architectures") or [] if name not in (BACKBONE, CLASSIFIER)]
        changed = hf_config | {"architectures": names or [CAUSAL]}
        return changed if self.tokens else changed | {"tie_word_embeddings": True}


def find_pooling(config: EngineConfig, folder: Path, hf_config: dict[str, Any]) -> Pooling | None:
    """How `--runner` and the checkpoint want the model to be used; None: it generates.

    Raises:
      ValueError: it pools in a way that qjax does not know; the message names the file or field.
    """
    if config.runner == "generate":
        return None
    pooling = _from_config(hf_config) or _from_modules(folder) or _from_name(config.model)
    if pooling is None and config.runner == "pooling":
        pooling = Pooling("score", ANSWERS) if "reranker" in Path(config.model).name.lower() else Pooling("embed")
    return pooling


def score_weight(tensors: Mapping[str, np.ndarray], hidden_size: int) -> np.ndarray:
    """float32 [D]: the classifier of a converted reranker, from its checkpoint's tensors.

    Raises:
      ValueError: it is missing, or has several labels.
    """
    weight = tensors.get(SCORE_WEIGHT)
    if weight is None or weight.shape != (1, hidden_size):
        found = "is missing" if weight is None else f"has shape {list(weight.shape)}"
        raise ValueError(
            f"the checkpoint's {SCORE_WEIGHT} {found}, expected [1, {hidden_size}]. For a model that answers with "
            'tokens use --hf-overrides \'{"classifier_from_token": ["no", "yes"]}\'.'
        )
    return weight[0].astype(np.float32)


def _from_config(hf_config: dict[str, Any]) -> Pooling | None:
    tokens = hf_config.get("classifier_from_token")
    if tokens is not None:
        if not (isinstance(tokens, list) and len(tokens) == 2 and all(isinstance(t, str) and t for t in tokens)):
            raise ValueError(f'config.json: classifier_from_token must be like ["no", "yes"], got {tokens!r}.')
        return Pooling("score", (tokens[0], tokens[1]))
    names = hf_config.get("architectures") or []
    if CLASSIFIER in names:
        return Pooling("score", ANSWERS if hf_config.get("is_original_qwen3_reranker") else None)
    return Pooling("embed") if BACKBONE in names else None


def _from_modules(folder: Path) -> Pooling | None:
    """What sentence-transformers would do: modules.json lists what follows the model, one folder each."""
    modules = _read_json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        options = _read_json(folder / str(module.get("path", "")) / "config.json") or {}
        if kind == "LogitScore":
            return Pooling("score", _answer_ids(options) if options else ANSWERS)
        if kind == "Pooling":
            _check_last_token(options)
            return Pooling("embed")
    return None


def _answer_ids(options: dict[str, Any]) -> tuple[int, int]:
    no, yes = options.get("false_token_id"), options.get("true_token_id")
    if not isinstance(no, int) or not isinstance(yes, int):
        raise ValueError(
            "1_LogitScore/config.json: a reranker needs both token ids, "
            f"got true_token_id={yes} and false_token_id={no}."
        )
    return no, yes


def _check_last_token(options: dict[str, Any]) -> None:
    """Older files have a switch for each mode, newer ones `pooling_mode`; no file: Qwen3-Embedding's mode is meant."""
    modes = {name.removeprefix("pooling_mode_") for name, on in options.items() if "pooling_mode_" in name and on}
    named = options.get("pooling_mode")
    modes |= set(named if isinstance(named, list) else [named] if named else [])
    if modes - {"lasttoken"}:
        raise ValueError(
            f"1_Pooling/config.json: pooling by {', '.join(sorted(modes))} is not supported, expected lasttoken."
        )


def _from_name(model: str) -> Pooling | None:
    found = re.search(r"qwen3-(embedding|reranker)", Path(model).name.lower())
    if found is None:
        return None
    return Pooling("embed") if found[1] == "embedding" else Pooling("score", ANSWERS)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
