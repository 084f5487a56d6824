"""Compiled programs that are found on disk without being traced.

JAX's own cache (`compilation_cache.py`) is asked with the text of a program, and to trace and lower one takes longer
than to read what was compiled. Here the key is all that the text would be made of: the files of this package
(`sources.py`), the versions of the libraries, options, the model's graph, and the arguments' shapes and shardings.
What cannot be pickled, such as a function without a name, says nothing that outlives the process: programs with that
are always traced. So are those of processes that run more than this package, those of several processes together, and
those for accelerators, whose compilers and drivers are more than these versions say.

Entries are pickles, and the machine code in them is run: like JAX's entries, they are as trusted as the user's folder.
"""

import copyreg
import hashlib
import io
import os
import pickle
import platform
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import flax
import jax
import jaxlib
import ml_dtypes
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from jaxllm import sources
from jaxllm.compilation_cache import cache_folder

MOST = 1000  # entries, of 6 to 160 KB for the demo; the least recently used ones make room
AHEAD = 5  # which a thread reads while a model is loaded: those that a first answer needs
VERSIONS = (platform.python_version(), *(m.__version__ for m in (jax, jaxlib, flax, np, ml_dtypes)))
VARIABLES = ("JAX", "XLA")  # what such variables of the environment begin with


_ahead: dict[Path, Future] = {}  # what was begun to be read for the model that is being loaded


def read_ahead(mesh: Mesh) -> None:
    """Begin to read the programs that were used last on the mesh: most likely they are of the model to be loaded."""
    if (process := _process(mesh)) is not None:
        _ahead.update(_begin(process, mesh))


def _begin(name: str, mesh: Mesh) -> dict[Path, Future]:
    """A thread that reads the last used entries whose names begin so."""
    reader = ThreadPoolExecutor(1, "executables")
    begun = {file: reader.submit(_read, file, mesh) for file in _newest(f"{name}-*", AHEAD)}
    reader.shutdown(wait=False)
    return begun


class Executables:
    """The compiled programs of one model on one mesh.

    Args:
        made_of: what all of them are made of, besides sources and settings of the process.
        arrays: which all of them are given.
    """

    def __init__(self, mesh: Mesh, made_of: object, arrays: object) -> None:
        self._mesh, process, begun = mesh, _process(mesh), _ahead.copy()
        _ahead.clear()
        model = process and _key(made_of, _described(arrays))
        self._common = model and f"{process}-{model}"
        self._ahead: dict[Path, Future] = {}
        if self._common is not None:
            self._ahead = {file: read for file, read in begun.items() if file.name.startswith(self._common)}
            self._ahead = self._ahead or _begin(self._common, mesh)
        for file in begun.keys() - self._ahead.keys():
            begun[file].cancel()

    def get(self, what: object, args: object, compile: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        """The program `what` for arguments like `args`: read, or else compiled and written."""
        key = self._common and _key(self._common, what, _described(args))
        if key is None:
            return compile()
        file = _folder() / f"{self._common}-{key}"
        ahead = self._ahead.pop(file, None)
        program = ahead.result() if ahead else _read(file, self._mesh)
        if program is not None:
            _used_now(file)
            return program
        with _jax_cache_off():
            program = compile()
        if sources.unchanged():
            _write(file, program)
        return program


def _process(mesh: Mesh) -> str | None:
    """What the names of a process's entries begin with; None if none can be kept."""
    devices, here = list(mesh.devices.flat), sources.remembered()
    possible = devices[0].platform == "cpu" and not mesh.is_multi_process
    keeps = here is not None and possible and jax.config.jax_enable_compilation_cache
    return _key(here, devices) if keeps else None


def _read(file: Path, mesh: Mesh) -> jax.stages.Compiled | None:
    """The entry, if there is one. Damaged entries are removed, with a warning."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    try:
        code, given, returned = pickle.loads(zlib.decompress(content))
        devices = list(mesh.devices.flat)
        return deserialize_and_load(code, given, returned, devices[0].client, devices)
    except Exception as error:  # whatever the contents make these libraries raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"{file}: a damaged program was removed and compiled again: {reason}", stacklevel=2)
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None


def _described(tree: object) -> tuple[jax.tree_util.PyTreeDef, list[str]]:
    """What programs are compiled for: all of a tree of arrays but their values."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [f"{leaf.shape} {leaf.dtype} {leaf.weak_type} {leaf.format}" for leaf in leaves]


@contextmanager
def _jax_cache_off() -> Iterator[None]:
    """Programs that JAX's cache has read lack functions when they are serialized once more (jaxlib 0.11 on CPUs)."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # which otherwise asks only once whether it is to be used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        reset_cache()


def _write(file: Path, program: jax.stages.Compiled) -> None:
    """Where that is not possible, the program will be traced the next time too; JAX's cache has said why."""
    try:
        content = zlib.compress(pickle.dumps(serialize(program)), level=1)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):  # not every platform's can be
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as unfinished:
            unfinished.write(content)
        Path(unfinished.name).replace(file)
        _used_now(file)
        for old in set(file.parent.iterdir()).difference(_newest("*", MOST)):
            old.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_folder("executables")


def _used_now(file: Path) -> None:
    """By this clock, because the kernel's own times of files may move in steps of 10 ms."""
    now = time.time_ns()
    with suppress(OSError):
        os.utime(file, ns=(now, now))


def _newest(pattern: str, count: int) -> list[Path]:
    """The entries that were used last, in the order of that."""
    times = []
    for entry in _folder().glob(pattern):
        with suppress(OSError):  # another process may have removed it
            times.append((entry.stat().st_mtime_ns, entry))
    return [entry for _, entry in sorted(times)[-count:]]


def _key(*parts: object) -> str | None:
    """A name for what programs are made of, the same in every process; None if there is none."""
    named = io.BytesIO()
    # Otherwise the second of two equal objects would be named by the first if it is the same one, which differs between
    # processes: threads that load weights may make one object or two. Python's pickler, as C's fast one fails in depth.
    pickler = pickle._Pickler(named)
    pickler.fast = True
    pickler.dispatch_table = {**copyreg.dispatch_table, type(jax.devices()[0]): _device}
    variables = sorted(pair for pair in os.environ.items() if pair[0].startswith(VARIABLES))
    try:
        pickler.dump((VERSIONS, variables, jax.config.values, *parts))
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
        return None
    return hashlib.sha256(named.getbuffer()).hexdigest()[:40]


def _device(device: jax.Device) -> tuple[Callable, tuple]:
    return tuple, ((device.id, device.platform, device.device_kind, device.client.platform_version),)
