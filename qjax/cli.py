"""The `qjax` command: flags made from `config.py`'s fields, and errors that a user can read.

Nothing heavy is imported before it is needed: help and wrong options answer at once. The commands that talk in the
terminal are in `terminal.py`, the server in `qjax.server`.
"""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
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
    parse_bytes,
)

EXAMPLE = "Qwen/Qwen3-0.6B"
SCREEN = f"""\
qjax: an inference engine for the Qwen3 models, in JAX

  qjax serve                                an HTTP server with the small Qwen3 that ships with qjax
  qjax serve {EXAMPLE}                 an HTTP server with OpenAI's API
  qjax chat {EXAMPLE}                  talk to a model in this terminal
  qjax generate {EXAMPLE} "Once upon"  continue a text
  qjax info {EXAMPLE}                  size and memory plan, without loading
  qjax train run.toml                        fine-tune a model on chats

A model is a name on the Hugging Face hub or a local folder; without one, the built-in model is used.
`qjax COMMAND --help` lists a command's options, `qjax --version` the version.
"""
COMMANDS = ("serve", "chat", "generate", "info", "train")
ALIASES = {"tensor_parallel_size": ["-tp"]}
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


class MainParser(Parser):
    def format_help(self) -> str:
        return SCREEN


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        if os.environ.get("QJAX_DEBUG"):
            raise
        print(f"qjax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `qjax … | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 141


def _run(argv: list[str]) -> int:
    if not argv:
        print(SCREEN, end="")
        return 0
    parser = make_parser()
    if argv[0] not in COMMANDS and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        parser.error(f"there is no command {argv[0]!r}" + (f": did you mean {close[0]}?" if close else ""))
    args, unknown = parser.parse_known_args(_with_dashes(argv))
    if args.version:
        import qjax

        print(f"qjax {qjax.__version__}")
        return 0
    if args.command is None:
        parser.error("no command given")
    if unknown:
        _unknown_argument(args.parser, next((u for u in unknown if u.startswith("-")), unknown[0]))
    _start_logging("%(asctime)s %(levelname)s %(message)s" if args.command == "serve" else "%(message)s")
    return args.run(args) or 0


def _start_logging(form: str) -> None:
    # XLA's own warnings (of the compiler's estimates) are for its developers. Read when jaxlib is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    level = os.environ.get("QJAX_LOG_LEVEL", "info").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"QJAX_LOG_LEVEL must be debug, info, warning or error, got {level.lower()!r}.")
    logging.basicConfig(level="WARNING", format=form)  # of other packages: some log a line for each request
    logging.getLogger("qjax").setLevel(level)


def make_parser() -> argparse.ArgumentParser:
    parser = MainParser(prog="qjax")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers(dest="command", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], description: str, more: str = "") -> Parser:
        usage = f"qjax {name} {'MODEL' if more else '[MODEL]'} {more}[OPTIONS]"
        sub = commands.add_parser(name, usage=usage, description=description, argument_default=argparse.SUPPRESS)
        sub.add_argument(
            "model", nargs="?", metavar="MODEL", help="Name on the Hugging Face hub, or local folder [built-in]"
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    serve = command("serve", _serve, "Starts an HTTP server with OpenAI's API.")
    serve.add_argument("--model", dest="model_flag", metavar="MODEL", help="The same as MODEL")
    add_options(serve, EngineConfig)
    add_options(serve, ServerConfig)

    generate = command("generate", _generate, "Continues a text, and prints it as it comes.", "[TEXT] ")
    generate.add_argument("prompt", nargs="?", metavar="TEXT", help="The text; without it, standard input is read")
    _add_sampling(generate)
    add_options(generate, EngineConfig)

    chat = command("chat", _chat, "Talks to a model in this terminal.")
    group = chat.add_argument_group("Chat")
    group.add_argument("--system", metavar="TEXT", help="System message")
    group.add_argument("--no-thinking", action="store_true", help="Answer without thinking (enable_thinking=false)")
    group.add_argument("--chat-template", metavar="FILE", help="Chat template [the tokenizer's]")
    _add_sampling(chat)
    add_options(chat, EngineConfig)

    info = command("info", _info, "Prints a model's size and memory plan. Downloads no weights.")
    info.add_argument(
        "--gpu-memory",
        type=_argument(parse_bytes),
        metavar="BYTES",
        help="Plan for a GPU with this much memory (80GiB) [this machine]",
    )
    add_options(info, EngineConfig)

    from qjax.research.config import TrainConfig

    description = "Trains a model on chats or token arrays. Options on the command line replace those of the file."
    train = commands.add_parser(
        "train",
        usage="qjax train [CONFIG] [OPTIONS]",
        description=description,
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("config", nargs="?", metavar="CONFIG", help="TOML or JSON file of the options below")
    train.set_defaults(run=_train, parser=train)
    train.add_argument("--model", metavar="MODEL", help="Name on the Hugging Face hub, or local folder")
    add_options(train, TrainConfig)
    return parser


# Options


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for each field of a config class, in the field's group."""
    groups: dict[str, Any] = {}
    for f in fields(config):
        if f.name == "model":
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
            options["type"] = _argument(_parser_of(f))
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


_METAVARS = {int: "COUNT", float: "NUMBER"}


def _parser_of(f: Field) -> Callable[[str], Any]:
    kind = kind_of(f)
    return f.metadata["parse"] or (kind.base if kind.base in (int, float) else str)


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which hides a ValueError's message."""

    def argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            message = str(error) if parse not in (int, float) else f"expected a number, got {text!r}"
            raise argparse.ArgumentTypeError(message.rstrip(".")) from None

    return argument


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


def _with_dashes(argv: list[str]) -> list[str]:
    """`--max_model_len=1` as `--max-model-len=1`: both forms are common. Nothing after a bare `--` is touched."""
    end = argv.index("--") if "--" in argv else len(argv)
    out = []
    for argument in argv[:end]:
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and " " not in name
        out.append((name.replace("_", "-") if is_flag else name) + equals + value)
    return out + argv[end:]


def _unknown_argument(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    name = argument.partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    close = difflib.get_close_matches(name, known, n=1)
    if not name.startswith("-"):
        parser.error(f"unexpected argument {argument!r}: put a text of several words in quotes")
    parser.error(f"unknown option {name}" + (f": did you mean {close[0]}?" if close else ""))


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Sampling", "Defaults are the model's own (generation_config.json).")
    for name, (parse, metavar, text) in SAMPLING.items():
        group.add_argument("--" + name.replace("_", "-"), type=_argument(parse), metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="Text that ends the answer; may be repeated")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was given. `--seed` is the engine's option too: here it makes the answer repeatable."""
    names = [*SAMPLING, "stop", "seed"]
    return {name: getattr(args, name) for name in names if name in args}


# Commands


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    positional, flag = getattr(args, "model", None), getattr(args, "model_flag", None)
    if positional and flag and positional != flag:
        raise ValueError(f"two models given: MODEL is {positional!r} and --model is {flag!r}.")
    model = positional or flag or os.environ.get("QJAX_MODEL")
    # `--api-key KEY MODEL` takes both for keys.
    lists = [f.name for f in fields(ServerConfig) if kind_of(f).base is list]
    if not model and any(len(getattr(args, name, [])) > 1 for name in lists):
        raise ValueError("no MODEL given before an option with several values. Put MODEL first, before the options.")
    return read_config(EngineConfig, args, model=model or BUILTIN_MODEL)


def _serve(args: argparse.Namespace) -> int | None:
    config, server_config = _engine_config(args), read_config(ServerConfig, args)
    from qjax.server import lifecycle

    return lifecycle.run(config, server_config)


def _generate(args: argparse.Namespace) -> None:
    config = _engine_config(args)
    prompt = getattr(args, "prompt", None)
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError(f'no text given.\nExample: qjax generate {args.model} "Once upon a time"')
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("the text is empty: give at least one character.")
    from qjax import terminal

    terminal.generate(config, prompt, _sampling(args))


def _chat(args: argparse.Namespace) -> None:
    config = _engine_config(args)
    template = getattr(args, "chat_template", None)
    if template is not None:
        try:
            with open(template, encoding="utf-8") as file:
                template = file.read()
        except OSError as error:
            raise ValueError(f"--chat-template: {error}.") from None
    from qjax import terminal

    terminal.chat(
        config,
        _sampling(args),
        system=getattr(args, "system", None),
        chat_template=template,
        is_thinking="no_thinking" not in args,
    )


def _info(args: argparse.Namespace) -> None:
    config = _engine_config(args)
    from qjax import terminal

    terminal.info(config, getattr(args, "gpu_memory", None))


def _train(args: argparse.Namespace) -> None:
    from qjax.research.config import TrainConfig, read_train_config

    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if f.name in args}
    config = read_train_config(args.config, **given) if "config" in args else TrainConfig(**given)
    if not config.output:
        raise ValueError("no output given: name the folder of the result with --output.")
    from qjax.research.train import Trainer

    for line in Trainer(config).train()[-1:]:
        print(f"step {line.step}: loss {line.loss:.4f}, {line.tokens_per_second:,.0f} tokens/s. Saved: {config.output}")
