"""The commands beside serving and talking: batches, and what this machine is. Heavy imports are inside functions."""

import argparse
from typing import Any

from qjax.cli.commands import add_model_command
from qjax.cli.options import add_model_flag, add_options, argument, read_config, read_engine_config
from qjax.config import EngineConfig, ServerConfig

# A batch is answered as the server would, but listens nowhere.
ANSWERS = (
    *("served_model_name", "chat_template", "default_chat_template_kwargs"),
    *("reasoning_parser", "tool_call_parser", "enable_auto_tool_choice"),
)


def add_run_batch(commands: Any) -> None:
    description = "Answers a file of requests in OpenAI's batch format. A wrong request stops no other."
    batch = add_model_command(commands, "run-batch", _run_batch, description, "-i FILE -o FILE [MODEL]")
    add_model_flag(batch)
    group = batch.add_argument_group("Batch")
    text = "Local file with a request a line: custom_id, method, url and body"
    group.add_argument("-i", "--input-file", required=True, metavar="FILE", help=text)
    group.add_argument("-o", "--output-file", required=True, metavar="FILE", help="File that the answers go to")
    text = "Requests on their way at a time [1024]"
    group.add_argument("--max-inflight", type=argument(int), metavar="COUNT", help=text)
    add_options(batch, EngineConfig)
    add_options(batch, ServerConfig, ANSWERS)


def _run_batch(args: argparse.Namespace) -> int:
    config, given = read_engine_config(args), read_config(ServerConfig, args)
    # what the environment says of the socket and the queue is for servers
    server_config = ServerConfig(**{name: getattr(given, name) for name in ANSWERS})
    from qjax.server import batch

    names = ("input_file", "output_file", "max_inflight")
    options = batch.BatchOptions(**{name: getattr(args, name) for name in names if name in args})
    return batch.run(config, server_config, options)


def add_convert(commands: Any) -> None:
    description = (
        "Quantises a plain checkpoint and writes it as another, which qjax, vLLM and transformers load, with configs "
        "and tokenizer. fp8: e4m3 in blocks of 128 x 128, as Qwen publishes it. int4: AWQ's format (groups of 128, "
        "zero points), each group by itself and without calibration data."
    )
    convert = add_model_command(commands, "convert", _convert, description, "MODEL OUTPUT --quantization fp8|int4")
    convert.add_argument("output", nargs="?", metavar="OUTPUT", help="Folder that is made; it must not be there yet")
    add_options(convert, EngineConfig, ("revision", "hf_token", "download_dir"))
    group = convert.add_argument_group("Conversion")
    text = "What the weights of the decoder's layers become"
    group.add_argument("-q", "--quantization", required=True, choices=("fp8", "int4"), help=text)


def _convert(args: argparse.Namespace) -> None:
    if "output" not in args:
        raise ValueError("no output given.\nExample: qjax convert Qwen/Qwen3-0.6B Qwen3-0.6B-FP8 --quantization fp8")
    config = read_engine_config(args)
    from pathlib import Path

    import jax

    jax.config.update("jax_platforms", "cpu")  # tensor after tensor: a GPU would wait for the disk
    from qjax.checkpoint import convert, hub

    source = hub.resolve(
        config.model, revision=config.revision, token=config.hf_token, download_dir=config.download_dir
    )
    output = Path(args.output).expanduser()
    convert.convert(source, output, args.quantization)
    size = sum(path.stat().st_size for path in output.iterdir()) / 2**30
    print(f"Saved: {output} ({size:.2f} GiB). Try it: qjax chat {output}")


def add_collect_env(commands: Any) -> None:
    description = "Prints versions, devices and settings, to paste into a bug report. Keys and tokens are not shown."
    collect = commands.add_parser("collect-env", description=description)
    collect.set_defaults(run=_collect_env, parser=collect)


def _collect_env(args: argparse.Namespace) -> None:
    from qjax import collect_env

    print(collect_env.report())
