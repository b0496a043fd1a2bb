"""Replicas of the server on Ray Serve: what Ray is told of them, and their start and stop. `run` is `qjax ray`.

    Ray's proxy (HTTP) ─▶ Ingress: PrefixRouter chooses ─▶ Replica (an actor) ─▶ `qjax serve`, over a unix socket

`build_app` is for Ray's own configuration files (`import_path: qjax.server.ray_app:build_app`).
"""

import logging
import os
import signal
import threading
import time
from typing import Any

from qjax.config import EngineConfig, ServerConfig
from qjax.server.ray_config import RayConfig, check_fits_ray, read_args

try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
    from ray.serve.schema import LoggingConfig
except ImportError as error:
    raise ValueError(f"Ray Serve is not installed ({error}): install qjax with its extra, '.[ray]'.") from None

from qjax.server.ray_ingress import Ingress
from qjax.server.ray_replica import Replica

log = logging.getLogger("qjax.server")

APP_NAME = "qjax"
HEALTH_PERIOD_SECONDS = 5.0  # between two questions of Ray; the third bad answer in a row replaces the replica
HEALTH_TIMEOUT_SECONDS = 10.0
EXIT_SECONDS = 25.0  # that a drained server gets to end, after which Ray kills the replica
TELL_SECONDS = 5.0  # that the ingress then has to tell the clients
DRAIN_POLL_SECONDS = 0.5
MAX_ATTEMPTS = 3  # to start a replica, after which the deployment has failed


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of Ray's configuration files.

    Args:
      args: options by the names of their fields (`model`, `max_model_len`, `max_replicas`, …).

    Raises:
      ValueError: an unknown option, or a wrong value.
    """
    return make_app(*read_args(args))


def make_app(engine: EngineConfig, server: ServerConfig, options: RayConfig) -> serve.Application:
    """The two deployments. Ray must be running: whether there are GPUs is asked of the cluster.

    Raises:
      ValueError: options that do not go with Ray.
    """
    check_fits_ray(engine, server)
    num_gpus = options.num_gpus
    if num_gpus is None:
        num_gpus = engine.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
    quiet = LoggingConfig(enable_access_log=False)  # the replica's server writes a line for each request
    drain = server.shutdown_timeout + EXIT_SECONDS
    replicas = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": num_gpus},
        max_ongoing_requests=options.max_ongoing_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.num_replicas_at_most,
            target_ongoing_requests=options.target_ongoing_requests,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
        ),
        request_router_config=RequestRouterConfig(request_router_class="qjax.server.ray_router:PrefixRouter"),
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        max_constructor_retry_count=MAX_ATTEMPTS,
        logging_config=quiet,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_SECONDS,
        graceful_shutdown_timeout_s=drain,
    )
    ingress = serve.deployment(
        Ingress,
        num_replicas=options.num_routers,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.max_ongoing_requests * options.num_replicas_at_most * 4,  # those that wait too
        logging_config=quiet,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_SECONDS,
        graceful_shutdown_timeout_s=drain + TELL_SECONDS,
    )
    return ingress.bind(replicas.bind(engine, server), server.max_body_size, server.root_path)


def run(engine: EngineConfig, server: ServerConfig, options: RayConfig) -> int:
    """Serves until SIGTERM or SIGINT; then replicas drain. Returns the exit code.

    Raises:
      ValueError: options that do not go with Ray, or replicas that could not start.
    """
    check_fits_ray(engine, server)
    started = time.monotonic()
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    is_own = address == "local"
    if is_own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address=address,
        namespace=APP_NAME,
        logging_level=logging.WARNING,
        **({"include_dashboard": False} if is_own else {}),  # type: ignore[arg-type]
    )
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options=HTTPOptions(
                host=server.host,
                port=server.port,
                ssl_certfile=server.ssl_certfile,
                ssl_keyfile=server.ssl_keyfile,
            ),
            logging_config=LoggingConfig(enable_access_log=False),
        )
        serve.run(make_app(engine, server, options), name=APP_NAME, route_prefix="/", blocking=False)
        print(ready_line(engine, server, options, time.monotonic() - started), flush=True)
        asked.wait()
        log.info("stopping: running requests get up to %g seconds", server.shutdown_timeout)
        return 0
    except RuntimeError as error:
        raise ValueError(f"Ray Serve could not start the replicas: {_reason() or error}") from None
    finally:
        serve.delete(APP_NAME)  # returns when they have drained
        if is_own:
            serve.shutdown()
        ray.shutdown()


def _reason() -> str | None:
    """What a replica's server said before it ended."""
    deployments = serve.status().applications[APP_NAME].deployments.values()
    said = [line for d in deployments for line in d.message.splitlines() if "qjax: error: " in line]
    return said[-1].partition("qjax: error: ")[2] if said else None


def ready_line(engine: EngineConfig, server: ServerConfig, options: RayConfig, seconds: float) -> str:
    """What is printed once requests are served."""
    name = (server.served_model_name or [engine.model])[0]
    host = "localhost" if server.host in ("0.0.0.0", "::", "") else server.host
    least, most = options.min_replicas, options.num_replicas_at_most
    count = f"{least} replica{'s' * (least > 1)}" if least == most else f"{least} to {most} replicas"
    scheme = "https" if server.ssl_certfile else "http"
    return f"qjax serves {name} at {scheme}://{host}:{server.port} by {count} on Ray (ready after {seconds:.1f} s)"
