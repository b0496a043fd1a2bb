"""Values of options that are written in a form of their own: lengths, sizes of memory, JSON. Standard library only."""

import json
import re
from typing import Any, Literal


def parse_length(text: str | int) -> int | Literal["auto"]:
    """`4096`, `32k` (32 × 1000), `32K` (32 × 1024), `25.6k`; `auto` or -1: as many as the KV cache holds."""
    if text in ("auto", -1, "-1"):
        return "auto"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", str(text).strip())
    unit = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
    length = round(float(match[1]) * unit[match[2]]) if match and (match[2] or "." not in match[1]) else 0
    if length < 1:
        raise ValueError(f"max_model_len must be a number of tokens such as 4096, 32k or 'auto', got {text!r}.")
    return length


def parse_bytes(text: str | int) -> int:
    """`4294967296`, `4GiB`, `4G` (both 4 × 2**30), `500M`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?[bB])?", str(text).strip())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ValueError(f"a memory size is a number of bytes such as 4294967296 or 4GiB, got {text!r}.")
    return size


def parse_nnodes(text: str | int) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"expected a number of hosts, or 'auto', got {text!r}.")
    return int(text)


def parse_json(text: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(text, dict):
        return text
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"expected a JSON object, got {text!r}: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}.")
    return value
