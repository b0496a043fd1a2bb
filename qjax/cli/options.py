"""Flags: made from the fields of `config.py`, read from the command line or the environment, and refused in words."""

import argparse
import difflib
import os
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, NoReturn

from qjax.config import (
    BUILTIN_MODEL,
    EngineConfig,
    ServerConfig,
    describe,
    environment_name_of,
    flag_of,
    kind_of,
)

ALIASES = {"tensor_parallel_size": ["-tp"], "data_parallel_size": ["-dp"], "quantization": ["-q"]}
SAMPLING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "temperature": (float, "NUMBER", "0: always the likeliest token"),
    "top_p": (float, "SHARE", "Sample from the likeliest tokens that make up this share"),
    "top_k": (int, "COUNT", "Sample from this many likeliest tokens; 0: all"),
    "min_p": (float, "SHARE", "Leave out tokens less likely than this share of the likeliest"),
    "max_tokens": (int, "COUNT", "Longest answer [what the context has room for]"),
    "repetition_penalty": (float, "NUMBER", "Above 1: avoid tokens that were there before"),
    "presence_penalty": (float, "NUMBER", "Above 0: avoid tokens already generated"),
    "frequency_penalty": (float, "NUMBER", "Above 0: avoid tokens by how often they were generated"),
}


class Parser(argparse.ArgumentParser):
    """argparse with this program's own form of an error: one line, and where to read on."""

    def __init__(self, **options: Any) -> None:
        # No abbreviations: a script that uses one breaks when an option is added.
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise ValueError(f"{message}\nSee `{self.prog} --help`.")


class HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """`--model`, beside the positional MODEL."""
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="The same as MODEL")


def add_options(parser: argparse.ArgumentParser, config: type, names: tuple[str, ...] = ()) -> None:
    """A flag for each field of a config class (or those named), in the field's group."""
    groups: dict[str, Any] = {}
    for f in fields(config):
        if f.name == "model" or (names and f.name not in names):
            continue
        name = f.metadata["group"]
        group = groups[name] = groups.get(name) or parser.add_argument_group(name)
        text, default = describe(f)
        kind = kind_of(f)
        text = text if default == "none" else f"{text} [{default}]"
        options: dict[str, Any] = {"dest": f.name, "help": text.replace("%", "%%")}
        if kind.base is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind.base is str and kind.choices:
            options["choices"] = kind.choices
        else:
            options["type"] = argument(_parser_of(f))
            options["metavar"] = f.metadata["metavar"] or _METAVARS.get(kind.base, "TEXT")
        if kind.base is list:
            options |= {"nargs": "+", "action": "extend"}
        group.add_argument(flag_of(f), *ALIASES.get(f.name, []), **options)


def read_config(config: type, args: argparse.Namespace, **more: Any) -> Any:
    """A config of what was given: on the command line, else in the environment, else the default."""
    values: dict[str, Any] = {}
    for f in fields(config):
        if f.name in args:
            values[f.name] = getattr(args, f.name)
        elif (text := _environment(f)) is not None:
            values[f.name] = text
    return config(**{**values, **more})


def read_engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's options, and the model from MODEL, `--model` or the environment."""
    positional, flag = getattr(args, "model", None), getattr(args, "model_flag", None)
    if positional and flag and positional != flag:
        raise ValueError(f"two models given: MODEL is {positional!r} and --model is {flag!r}.")
    model = positional or flag or os.environ.get("QJAX_MODEL")
    # `--api-key KEY MODEL` takes both for keys.
    lists = [f.name for f in fields(ServerConfig) if kind_of(f).base is list]
    if not model and any(len(getattr(args, name, [])) > 1 for name in lists):
        raise ValueError("no MODEL given before an option with several values. Put MODEL first, before the options.")
    return read_config(EngineConfig, args, model=model or BUILTIN_MODEL)


_METAVARS = {int: "COUNT", float: "NUMBER"}


def _parser_of(f: Field) -> Callable[[str], Any]:
    kind = kind_of(f)
    return f.metadata["parse"] or (kind.base if kind.base in (int, float) else str)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which hides a ValueError's message."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            message = str(error) if parse not in (int, float) else f"expected a number, got {text!r}"
            raise argparse.ArgumentTypeError(message.rstrip(".")) from None

    return parse_argument


def _environment(f: Field) -> Any:
    name = environment_name_of(f)
    text = os.environ.get(name)
    if not text or (f.name == "port" and "://" in text):  # Kubernetes sets QJAX_PORT for a service named qjax
        return None
    kind = kind_of(f)
    if kind.base is bool:
        if text.lower() not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
            raise ValueError(f"{name} must be 0 or 1, got {text!r}.")
        return text.lower() in ("1", "true", "yes", "on")
    if kind.base is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return _parser_of(f)(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def with_dashes(argv: list[str]) -> list[str]:
    """`--max_model_len=1` as `--max-model-len=1`: both forms are common. Nothing after a bare `--` is touched."""
    end = argv.index("--") if "--" in argv else len(argv)
    out = []
    for text in argv[:end]:
        name, equals, value = text.partition("=")
        is_flag = name.startswith("--") and " " not in name
        out.append((name.replace("_", "-") if is_flag else name) + equals + value)
    return out + argv[end:]


def refuse_unknown(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    """Raises ValueError for an argument that no option took, with the option that may have been meant."""
    name = text.partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    close = difflib.get_close_matches(name, known, n=1)
    if not name.startswith("-"):
        parser.error(f"unexpected argument {text!r}: put a text of several words in quotes")
    parser.error(f"unknown option {name}" + (f": did you mean {close[0]}?" if close else ""))


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Sampling", "Defaults are the model's own (generation_config.json).")
    for name, (parse, metavar, text) in SAMPLING.items():
        group.add_argument("--" + name.replace("_", "-"), type=argument(parse), metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="Text that ends the answer; may be repeated")


def read_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was given. `--seed` is the engine's option too: here it makes the answer repeatable."""
    names = [*SAMPLING, "stop", "seed"]
    return {name: getattr(args, name) for name in names if name in args}
