"""`qjax bench serve | throughput | latency`: their flags, and what they call."""

import argparse
from dataclasses import fields, replace
from typing import Any

from qjax.bench.config import LatencyConfig, ServeBenchConfig, ThroughputConfig
from qjax.cli.commands import add_model_command
from qjax.cli.options import Parser, add_model_flag, add_options, read_engine_config
from qjax.config import EngineConfig

SCREEN = """\
qjax bench: how fast a model answers

  qjax bench serve                 ask a running server, as users would: latencies and tokens a second
  qjax bench throughput            answer many prompts at once, without a server
  qjax bench latency               answer one batch again and again, without a server

`qjax bench COMMAND --help` lists the options; they are vLLM's.
"""


def add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench")
    bench.format_help = lambda: SCREEN
    bench.set_defaults(run=_no_command, parser=bench)
    kinds = bench.add_subparsers(dest="bench_command", parser_class=Parser)

    description = "Measures the answers of a server with OpenAI's API. A key is read from OPENAI_API_KEY."
    serve = kinds.add_parser("serve", description=description, argument_default=argparse.SUPPRESS)
    serve.usage = f"{serve.prog} [OPTIONS]"
    serve.set_defaults(run=_serve, parser=serve)
    serve.add_argument("--model", metavar="MODEL", help="Name of the model [the server's first]")
    add_options(serve, ServeBenchConfig)

    throughput = add_model_command(kinds, "throughput", _throughput, "Answers many prompts at once, without a server.")
    add_model_flag(throughput)
    add_options(throughput, ThroughputConfig)
    add_options(throughput, EngineConfig)

    description = "Answers one batch of random prompts again and again, without a server and its prefix cache."
    latency = add_model_command(kinds, "latency", _latency, description)
    add_model_flag(latency)
    add_options(latency, LatencyConfig)
    add_options(latency, EngineConfig)


def _no_command(args: argparse.Namespace) -> None:
    args.parser.error("no benchmark given: serve, throughput or latency")


def _given(config: type, args: argparse.Namespace) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in fields(config) if f.name in args}


def _serve(args: argparse.Namespace) -> int:
    config = ServeBenchConfig(**_given(ServeBenchConfig, args))
    from qjax.bench import serve

    return serve.run(config)


def _throughput(args: argparse.Namespace) -> None:
    config, engine_config = ThroughputConfig(**_given(ThroughputConfig, args)), read_engine_config(args)
    from qjax.bench import offline

    offline.throughput(config, engine_config)


def _latency(args: argparse.Namespace) -> None:
    config, engine_config = LatencyConfig(**_given(LatencyConfig, args)), read_engine_config(args)
    if "enable_prefix_caching" not in args:  # the batch is the same each time
        engine_config = replace(engine_config, enable_prefix_caching=False)
    from qjax.bench import offline

    offline.latency(config, engine_config)
