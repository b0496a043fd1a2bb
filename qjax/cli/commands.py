"""The commands that load a model and talk: their flags, and what they call. Heavy imports are inside functions."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from qjax.cli.options import (
    Parser,
    add_model_flag,
    add_options,
    add_sampling,
    argument,
    read_config,
    read_engine_config,
    read_sampling,
)
from qjax.config import EngineConfig, ServerConfig, parse_bytes

Run = Callable[[argparse.Namespace], int | None]


def add_model_command(commands: Any, name: str, run: Run, description: str, usage: str = "[MODEL]") -> Parser:
    """A subcommand with the positional MODEL."""
    sub: Parser = commands.add_parser(name, description=description, argument_default=argparse.SUPPRESS)
    sub.usage = f"{sub.prog} {usage} [OPTIONS]"
    text = "Name on the Hugging Face hub, or local folder [built-in]"
    sub.add_argument("model", nargs="?", metavar="MODEL", help=text)
    sub.set_defaults(run=run, parser=sub)
    return sub


def add_serve(commands: Any) -> None:
    serve = add_model_command(commands, "serve", _serve, "Starts an HTTP server with OpenAI's API.")
    add_model_flag(serve)
    add_options(serve, EngineConfig)
    add_options(serve, ServerConfig)


def _serve(args: argparse.Namespace) -> int | None:
    config, server_config = read_engine_config(args), read_config(ServerConfig, args)
    from qjax import logs
    from qjax.server.front import child

    logs.set_format(server_config.log_format)
    child.follow_front()
    if server_config.data_parallel_size > 1:
        from qjax.server.front import lifecycle as front

        return front.run(config, server_config)
    from qjax.server import lifecycle

    return lifecycle.run(config, server_config)


def add_generate(commands: Any) -> None:
    description = "Continues a text, and prints it as it comes."
    generate = add_model_command(commands, "generate", _generate, description, "MODEL [TEXT]")
    generate.add_argument("prompt", nargs="?", metavar="TEXT", help="The text; without it, standard input is read")
    add_sampling(generate)
    add_options(generate, EngineConfig)


def _generate(args: argparse.Namespace) -> None:
    config = read_engine_config(args)
    prompt = getattr(args, "prompt", None)
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError(f'no text given.\nExample: qjax generate {args.model} "Once upon a time"')
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("the text is empty: give at least one character.")
    from qjax import terminal

    terminal.generate(config, prompt, read_sampling(args))


def add_chat(commands: Any) -> None:
    chat = add_model_command(commands, "chat", _chat, "Talks to a model in this terminal.")
    group = chat.add_argument_group("Chat")
    group.add_argument("--system", metavar="TEXT", help="System message")
    group.add_argument("--no-thinking", action="store_true", help="Answer without thinking (enable_thinking=false)")
    group.add_argument("--chat-template", metavar="FILE", help="Chat template [the tokenizer's]")
    add_sampling(chat)
    add_options(chat, EngineConfig)


def _chat(args: argparse.Namespace) -> None:
    config = read_engine_config(args)
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
        read_sampling(args),
        system=getattr(args, "system", None),
        chat_template=template,
        is_thinking="no_thinking" not in args,
    )


def add_info(commands: Any) -> None:
    description = "Prints a model's size and memory plan. Downloads no weights."
    info = add_model_command(commands, "info", _info, description)
    info.add_argument(
        "--gpu-memory",
        type=argument(parse_bytes),
        metavar="BYTES",
        help="Plan for a GPU with this much memory (80GiB) [this machine]",
    )
    add_options(info, EngineConfig)


def _info(args: argparse.Namespace) -> None:
    config = read_engine_config(args)
    from qjax import terminal

    terminal.info(config, getattr(args, "gpu_memory", None))


def add_train(commands: Any) -> None:
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


def _train(args: argparse.Namespace) -> None:
    from qjax.research.config import TrainConfig, read_train_config

    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if f.name in args}
    config = read_train_config(args.config, **given) if "config" in args else TrainConfig(**given)
    if not config.output:
        raise ValueError("no output given: name the folder of the result with --output.")
    from qjax.research.train import Trainer

    for line in Trainer(config).train()[-1:]:
        print(f"step {line.step}: loss {line.loss:.4f}, {line.tokens_per_second:,.0f} tokens/s. Saved: {config.output}")
