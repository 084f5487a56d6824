"""Several processes that run one model: how they are started, and how JAX's runtimes are connected; see `meeting`."""

import argparse
import hashlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Never

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.errors import InputError
from jaxllm.meeting import Disagreement, Group, Launch, meet, wait_seconds

AUTO = "auto"
GRACE = 10.0  # seconds in which the end of a process is noticed after computations with it have failed


def add_processes(p: argparse.ArgumentParser) -> None:
    """The options of commands that several processes run together; `joined` reads them."""
    p.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="run with other processes, which meet here; 'auto' asks Slurm, MPI, Kubernetes or a TPU pod (torchrun's "
        "variables are read without this)",
    )
    p.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    p.add_argument("--process-id", type=int, metavar="I", help="which of them this is; 0 reads prompts and prints")


def launch(coordinator: str | None, count: int | None, index: int | None, env: Mapping[str, str]) -> Launch | None:
    """How this process was started, from the options or from torchrun's variables; None: alone.

    Args:
        coordinator: "HOST:PORT" where process 0 listens, or None.
        count, index: how many processes there are and which this one is, or None.
        env: the environment's variables.

    Raises:
        InputError: something is missing or impossible.
    """
    if coordinator is None and count is None and index is None and env.get("WORLD_SIZE", "1") != "1":
        names = "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"
        if lacking := [name for name in names if name not in env]:
            raise InputError(f"WORLD_SIZE is set, but not {', '.join(lacking)}: start with torchrun, or --coordinator")
        # Under torchrun itself, its own store has that port.
        port = _integer(env["MASTER_PORT"], "MASTER_PORT") + (env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        count, index = (_integer(env[name], name) for name in names[2:])
        coordinator = f"{env['MASTER_ADDR']}:{port}"
    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or count is None or index is None:
        raise InputError("--coordinator HOST:PORT, --num-processes and --process-id belong together")
    host, _, port_text = coordinator.rpartition(":")
    port = _integer(port_text, "the port of --coordinator")
    if not host or not 0 < port < 65535:
        raise InputError(f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.1:8476")
    if not 0 <= index < count:
        raise InputError(f"process {index} of {count}: they are numbered from 0")
    return None if count == 1 else Launch(host, port, count, index)


def _integer(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{what} is {text!r}, not a number") from error


def join(where: Launch, computes: bool = True) -> Group:
    """Meet the other processes and connect JAX's runtimes. Must run before JAX looks for devices.

    Args:
        where: what `launch` returned.
        computes: whether they compute together; if not, JAX knows nothing of the others.

    Raises:
        InputError: the others did not come, or were started differently.
    """
    group = meet(where, time.monotonic() + wait_seconds())
    if not computes:
        return group
    if group.leads:
        with socket.create_server((where.host, 0)) as free:
            address = f"{where.host}:{free.getsockname()[1]}"
        group.tell({"jax": address})
    else:
        address = group.told()["jax"]
    local = os.environ.get("LOCAL_RANK")  # torchrun's: one accelerator for each process
    jax.distributed.initialize(
        address,
        where.count,
        where.index,
        local_device_ids=None if local is None else [int(local)],
        initialization_timeout=int(wait_seconds()),
    )
    return group


def join_cluster() -> Group:
    """Like `join`, where JAX finds the other processes by itself: under Slurm, MPI or Kubernetes, on TPU pods.

    Raises:
        InputError: JAX finds none.
    """
    try:
        jax.distributed.initialize(initialization_timeout=int(wait_seconds()))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator auto: JAX found no cluster: {error}") from error
    if jax.process_count() == 1:
        return Group()
    address = np.zeros(256, np.uint8)
    with socket.create_server(("", 0)) as free:
        written = f"{_own_address()}:{free.getsockname()[1]}".encode()
    address[: len(written)] = np.frombuffer(written, np.uint8)
    host, _, port = bytes(multihost_utils.broadcast_one_to_all(address)).rstrip(b"\0").decode().rpartition(":")
    where = Launch(host, int(port), jax.process_count(), jax.process_index())
    return meet(where, time.monotonic() + wait_seconds())


def _own_address() -> str:
    """This machine's address as other machines see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


@contextmanager
def joined(args: argparse.Namespace, computes: bool = True) -> Iterator[Group]:
    """The group of the processes that run this command, from its options; see `join`.

    If one of them fails, all end: the others with one line that says which one and why.
    """
    found = args.coordinator == AUTO
    where = None if found else launch(args.coordinator, args.num_processes, args.process_id, os.environ)
    if found or where is not None:
        _only_python_prints()
    group = join_cluster() if found else Group() if where is None else join(where, computes)
    try:
        yield group
    except BaseException as error:
        if group.count == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(GRACE)  # computations fail when another process ends; then the line to it has ended too
        group.leave(None if isinstance(error, Disagreement) else f"{error}" or type(error).__name__)
        _end_at_once(error)
    group.leave()
    if group.count > 1 and (found or computes):
        jax.distributed.shutdown()  # waits for all


def _end_at_once(error: BaseException) -> Never:
    """End this process as the command line would; but JAX would wait for the others while Python exits."""
    if isinstance(error, InputError):
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1)


def _only_python_prints() -> None:
    """Keep what libraries in C++ print (gloo does, on CPUs) out of stdout, where answers go."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)


def fingerprint(path: Path) -> dict[str, str]:
    """The files of a checkpoint by name: their sizes, and a hash of how they begin, where headers are."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    found = {}
    for file in files:
        with file.open("rb") as opened:
            found[file.name] = f"{file.stat().st_size} bytes ({hashlib.sha256(opened.read(2**16)).hexdigest()[:12]})"
    return found
