"""`llava-jax serve` as a deployment of Ray Serve: its whole interface, answered by N replicas.

    # serve.yaml, for `serve run serve.yaml` or a RayService of Kubernetes
    applications:
    - name: llava
      import_path: llava_jax.serving.ray_serve:application
      args: {checkpoint: /models/llava, batch_size: 16}
      deployments:
      - {name: Llava, num_replicas: 4, ray_actor_options: {num_gpus: 1}}

A replica takes requests once its model is loaded and compiled, is replaced when its engine fails
for good, and ends its running answers before it is removed.
"""

import asyncio
from collections.abc import Mapping

from ray import serve

from llava_jax.errors import LlavaError
from llava_jax.serving.command_line import from_keywords
from llava_jax.serving.serve import add_arguments, check_arguments, load, make_server

RAYS = ("host", "port", "dry_run")  # flags that mean nothing here


def application(arguments: Mapping) -> serve.Application:
    """The application of the flags of `llava-jax serve`, by their names, for a config file.

    How many replicas it has, and what each needs, the file says of its deployment, `Llava`.
    """
    return bind(arguments)


def bind(arguments: Mapping, **options) -> serve.Application:
    """The same for `serve.run`; options: of the deployment, such as num_replicas=2."""
    if wrong := [name for name in RAYS if name in arguments]:
        raise LlavaError(f"{wrong[0]} is no argument under Ray Serve, which has http_options")
    args = from_keywords(add_arguments, arguments)
    check_arguments(args)
    limits = {
        "max_ongoing_requests": args.max_queue,
        "max_queued_requests": args.max_queue,
        "graceful_shutdown_timeout_s": args.drain_seconds,
    }
    return Llava.options(**limits | options).bind(dict(arguments))


async def _asgi(scope, receive, send) -> None:
    """The server of the replica that this runs in."""
    if scope["type"] == "lifespan":  # loading and ending are the replica's
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    await serve.get_replica_context().servable_object.server(scope, receive, send)


@serve.deployment
@serve.ingress(lambda: _asgi)  # a builder, as Ray Serve takes any function to be one
class Llava:
    """A replica: a server with a model of its own.

    Attributes:
      server: answers the requests that Ray Serve passes on.
    """

    async def __init__(self, arguments: Mapping):
        args = from_keywords(add_arguments, arguments)
        self.server = make_server(args)
        await asyncio.to_thread(load, args, self.server)
        self.server.start(asyncio.get_running_loop())

    def check_health(self) -> None:
        """Raises an error once only a new process can help."""
        if self.server.worker.failed:
            raise RuntimeError("the engine failed for good")

    async def __del__(self):
        self.server.stop()
