"""`jaxllm serve`: a server that OpenAI's clients speak to, see docs/serving.md."""

import argparse
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Never

from jaxllm.cli import Parser, execute
from jaxllm.engine.engine import Engine
from jaxllm.errors import InputError
from jaxllm.generate import add_loading, emulate_devices, loading
from jaxllm.loading import load

KEY = "JAXLLM_API_KEY"


def parser() -> Parser:
    p = Parser("jaxllm.serve", "Answer requests over HTTP, as OpenAI's API has them.")
    p.add_argument("--model", required=True, metavar="PATH", help="a file, directory or hub id, or 'demo'")
    p.add_argument("--name", help="what clients call the model (as here, or the file's name)")
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1: this machine)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="(8000; 0 for any that is free)")
    p.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients have to know; the variable {KEY} does not show in lists of processes",
    )
    p.add_argument("--slots", type=int, default=8, metavar="N", help="how many answers are made at once (8)")
    p.add_argument(
        "--capacity", type=int, metavar="N", help="tokens of a prompt and its answer (the model's, up to 4096)"
    )
    p.add_argument("--queue", type=int, default=64, metavar="N", help="how many more may wait (64)")
    p.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds after which an answer ends (600)")
    p.add_argument("--grace", type=int, default=30, metavar="S", help="seconds for what runs, after a signal (30)")
    add_loading(p)
    return p


def run(args: argparse.Namespace) -> None:
    """Load the model, and serve it until a signal comes."""
    try:
        from jaxllm.serving.app import application
        from jaxllm.serving.connection import server
        from jaxllm.serving.worker import Worker
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'jaxllm[serve]'") from error
    key = args.api_key or os.environ.get(KEY)
    _check(args, key)
    emulate_devices(args.tp * args.ep * args.dp)
    with _listen(args.host, args.port) as listener:
        model = load(args.model, **loading(args))
        if model.tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer, and what is served is text")
        worker = Worker(Engine(model, args.slots, args.capacity), args.slots + args.queue, args.timeout)
        name = args.name or (model.name if Path(args.model).exists() else args.model)
        app = application(model, worker, name, key)
        host, port = listener.getsockname()[:2]
        print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):  # which uvicorn raises once more after it has ended
            signal.signal(number, _exit)
        server(app, args.grace).run([listener])


def _check(args: argparse.Namespace, key: str | None) -> None:
    if min(args.slots, args.tp, args.ep, args.dp) < 1:
        raise InputError("--slots, --tp, --ep and --dp must be 1 or above")
    if min(args.queue, args.grace) < 0 or args.timeout <= 0:
        raise InputError("--queue and --grace must be 0 or above, --timeout above 0")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port {args.port}: must be 0 to 65535")
    if key and not (key.isascii() and key.isprintable()):
        raise InputError("the API key has characters that headers of HTTP cannot have: use ASCII")
    if not key and not _is_loopback(args.host):
        raise InputError(f"--host {args.host} lets other machines in: give --api-key KEY, or set {KEY}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}") from error


def _exit(signal: int, frame: FrameType | None) -> Never:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
