"""The `qjax` command: its first screen, which command runs, and errors that a user can read.

Nothing heavy is imported before it is needed: help and wrong options answer at once. `options` makes flags of
`config.py`'s fields; the commands that talk in the terminal are in `qjax.terminal`, the server in `qjax.server`.
"""

import argparse
import contextlib
import difflib
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence

from qjax.cli import bench, commands, ray, tools
from qjax.cli.options import Parser, refuse_unknown, with_dashes

EXAMPLE = "Qwen/Qwen3-0.6B"
EXAMPLES = {
    "serve": "an HTTP server with the small built-in Qwen3",
    f"serve {EXAMPLE}": "an HTTP server with OpenAI's API",
    f"ray {EXAMPLE}": "replicas of it on Ray Serve",
    f"chat {EXAMPLE}": "talk to a model in this terminal",
    f'generate {EXAMPLE} "Once upon"': "continue a text",
    f"info {EXAMPLE}": "size and memory plan, without loading",
    "train run.toml": "fine-tune a model on chats",
    f"convert {EXAMPLE} OUT -q fp8": "write a quantised checkpoint",
    "run-batch -i IN.jsonl -o OUT.jsonl": "answer a file of requests",
    "bench serve": "measure a server; also: throughput, latency",
    "collect-env": "versions and devices, for a bug report",
}
SCREEN = f"""\
qjax: an inference engine for the Qwen3 models, in JAX

{"".join(f"  qjax {example:<38}{text}\n" for example, text in EXAMPLES.items())}
A model is a name on the Hugging Face hub or a local folder; without one, it is the built-in model.
`qjax COMMAND --help` lists a command's options, `qjax --version` the version.
"""
COMMANDS = {
    "serve": commands.add_serve,
    "ray": ray.add_ray,
    "chat": commands.add_chat,
    "generate": commands.add_generate,
    "info": commands.add_info,
    "train": commands.add_train,
    "convert": tools.add_convert,
    "run-batch": tools.add_run_batch,
    "bench": bench.add_bench,
    "collect-env": tools.add_collect_env,
}


class MainParser(Parser):
    def format_help(self) -> str:
        return SCREEN


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(ValueError, AttributeError):  # stderr is no file
            faulthandler.enable()  # a mapped checkpoint that is cut, or a disk that cannot read it: SIGBUS
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


def make_parser() -> argparse.ArgumentParser:
    parser = MainParser(prog="qjax")
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers(dest="command", parser_class=Parser)
    for add in COMMANDS.values():
        add(subparsers)
    return parser


def _run(argv: list[str]) -> int:
    if not argv:
        print(SCREEN, end="")
        return 0
    parser = make_parser()
    if argv[0] not in COMMANDS and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        parser.error(f"there is no command {argv[0]!r}" + (f": did you mean {close[0]}?" if close else ""))
    args, unknown = parser.parse_known_args(with_dashes(argv))
    if args.version:
        import qjax

        print(f"qjax {qjax.__version__}")
        return 0
    if args.command is None:
        parser.error("no command given")
    if unknown:
        refuse_unknown(args.parser, next((u for u in unknown if u.startswith("-")), unknown[0]))
    _start_logging()
    return args.run(args) or 0


def _start_logging() -> None:
    # XLA's own warnings (of the compiler's estimates) are for its developers. Read when jaxlib is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    level = os.environ.get("QJAX_LOG_LEVEL", "info").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(f"QJAX_LOG_LEVEL must be debug, info, warning or error, got {level.lower()!r}.")
    logging.basicConfig(level="WARNING", format="%(message)s")  # of other packages: some log a line for each request
    logging.getLogger("qjax").setLevel(level)
