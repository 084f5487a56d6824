"""An input is tried: what comes of it, how long it takes, how much memory, and which files are touched.

This runs in a process of its own, which the harness replaces when it dies. Times are of the CPU, as other programs may
keep it busy.
"""

import functools
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import jax
from pydantic import ValidationError
from starlette.testclient import TestClient
from tiny_chat import write_chat

import jaxllm
from fuzz import damage
from fuzz.seeds import GOLDEN, Seed
from jaxllm.checkpoint import matching
from jaxllm.checkpoint.adapter_files import read_adapter
from jaxllm.checkpoint.adapting import adapter as adapted
from jaxllm.checkpoint.matformer import sliced
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.engine.engine import Engine
from jaxllm.errors import InputError
from jaxllm.finetuning.data import fitted, read_examples
from jaxllm.imatrix import importance_for
from jaxllm.layers.parameter import parameters
from jaxllm.parallel import make_mesh
from jaxllm.serving import bodies
from jaxllm.serving.answers import Served
from jaxllm.serving.app import application, most_bytes
from jaxllm.serving.chat import ChatReply
from jaxllm.serving.completions import TextReply
from jaxllm.serving.errors import RequestError, as_request_error
from jaxllm.serving.responses import ResponseReply
from jaxllm.serving.worker import Worker
from jaxllm.tokenizer.chat import ChatTemplate
from jaxllm.topology import Topology

SECONDS, MEMORY = 10, 1 << 30  # the promise: no input takes longer, or more memory beside its own size
LOADED = 0.01  # of the inputs that are checkpoints, the share that is loaded and asked for logits
TREE = Path(__file__).resolve().parents[2]
KNOWN = [
    str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, TREE, "/proc", "/sys", "/usr", "/lib", "/dev/null")
]
FORBIDDEN = ("pickle.find_class", "socket.connect", "os.system", "os.exec", "os.fork")
PROGRAMS = ("jaxllm/confined_process.py", "jaxllm/structured_trial.py")  # what may be started
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


CONTEXT = 128
ENDPOINTS: dict[str, tuple[str, type[bodies.Options], Callable]] = {
    "chat": ("chat/completions", bodies.Chat, ChatReply),
    "completions": ("completions", bodies.Text, TextReply),
    "responses": ("responses", bodies.Response, ResponseReply),
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}}]


class Outcome(NamedTuple):
    """What came of an input: "answered", "refused", or a failure, which `says` describes."""

    kind: str
    number: int
    what: str
    came: str
    says: str = ""
    seconds: float = 0.0
    memory: int = 0


def checkpoint(path: Path, seed: Seed, load: bool) -> None:
    """All that is done with a checkpoint before its weights are read, or all until there are logits."""
    if load:
        model = jaxllm.load(path, progress=False)
        model.logits([[1, 2, 0]])
        return
    opened = open_checkpoint(path)
    sketch = opened.family.model(opened.config, make_mesh(), 1)
    matching.match(sketch, opened.tensors, opened.rules, opened.ignored)
    if opened.texts.tokenizer is not None:
        tokenizer = opened.texts.tokenizer
        tokenizer.decode(tokenizer.encode("Hello, world! <s> 12345 \u00e9\u4e2d" + "a" * 100))
        if tokenizer.chat_template is not None:
            tokenizer.encode_chat([{"role": "user", "content": "Hello"}])


def adapter(path: Path, seed: Seed, load: bool) -> None:
    file = read_adapter(path)
    base = open_checkpoint(GOLDEN / seed.base)
    sketch = base.family.model(base.config, make_mesh(), 1)
    adapted(file, base.config, {name: param.get_value() for name, param in parameters(sketch).items()})


def importance(path: Path, seed: Seed, load: bool) -> None:
    importance_for(path, open_checkpoint(GOLDEN / seed.base))


def topology(path: Path, seed: Seed, load: bool) -> None:
    found = Topology.read(path)
    for i in range(3):
        found.find([f"layers.{i}.self_attn.q_proj.weight", f"blk.{i}.attn_q.weight"])


def matformer(path: Path, seed: Seed, load: bool) -> None:
    sliced(open_checkpoint(GOLDEN / "checkpoints" / "gemma3n"), path, "small")


def training(path: Path, seed: Seed, load: bool) -> None:
    fitted(read_examples(path, talker().tokenizer), 64, "cut")


def request(path: Path, seed: Seed, load: bool) -> None:
    """A body, as the server parses it; or sent to a server in this process."""
    model, data = talker(), path.read_bytes()
    where, body, reply = ENDPOINTS[seed.base]
    try:
        if load:
            answered(model, f"/v1/{where}", data)
        elif len(data) > most_bytes(2**17) or (parsed := body.model_validate_json(data)).answers > 4:
            raise InputError("the server refuses it before it does more")
        else:
            reply(Served("tiny", model.tokenizer, CONTEXT, model.sampling), parsed)
    except (RequestError, ValidationError) as error:
        if (told := as_request_error(error)).status >= 500:
            raise
        raise InputError(str(told)) from error


def answered(model: jaxllm.LanguageModel, path: str, data: bytes) -> None:
    """Raises RequestError if a server does not answer with what was asked for, and ends it."""
    app = application(model, Worker(Engine(model, 2), 4, timeout=60), "tiny")
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        answer = client.post(path, content=data)
    if answer.status_code != 200:
        raise RequestError(answer.status_code, answer.json()["error"]["message"])


def template(path: Path, seed: Seed, load: bool) -> None:
    text = path.read_text(errors="replace")
    ChatTemplate(text, {"bos_token": "<s>"}).render([{"role": "user", "content": "Hello"}], tools=TOOLS)


TRIALS: dict[str, Callable[[Path, Seed, bool], None]] = {
    f.__name__: f for f in (checkpoint, adapter, importance, topology, matformer, template, training, request)
}


@functools.cache
def talker() -> jaxllm.LanguageModel:
    """The model that requests are for."""
    with tempfile.TemporaryDirectory() as folder:
        return jaxllm.load(write_chat(Path(folder, "tiny.gguf"), CONTEXT), progress=False)


class Watch:
    """Notes which files the process touches, by Python's audit events."""

    def __init__(self) -> None:
        self.folder, self.seen = "", list[str]()
        sys.addaudithook(self._event)

    def _event(self, event: str, args: tuple) -> None:
        if not self.folder:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            self._path(os.fsdecode(args[0]), "writes" if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "reads")
        elif event in CHANGES:
            self._path(os.fsdecode(args[0]), event)
        elif event in FORBIDDEN or (
            event == "subprocess.Popen" and not any(str(arg).endswith(PROGRAMS) for arg in args[1])
        ):
            self.seen.append(f"{event} {args[:2]}")

    def _path(self, path: str, what: str) -> None:
        real = os.path.realpath(path)
        known = [self.folder, os.environ["XDG_CACHE_HOME"]] + (KNOWN if what == "reads" else ["/dev/null"])
        if not any(real == each or real.startswith(each + "/") for each in known):
            self.seen.append(f"{what} {path}")


def work(connection: Connection, made: dict[str, list[Seed]], root: Path, seed: str) -> None:
    """Try the inputs whose numbers come, one after the other; each gives an `Outcome`."""
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("ignore")
    jax.config.update("jax_disable_most_optimizations", True)  # of tiny models, compiling takes longer than running
    watch = Watch()
    place = Path(root, f"worker-{os.getpid()}")
    seed_of_all = Seed(GOLDEN / "checkpoints" / "llama")
    talker()
    checkpoint(seed_of_all.folder, seed_of_all, True)  # what is imported and started once is there
    while (number := connection.recv()) is not None:
        shutil.rmtree(place, ignore_errors=True)
        kind, what, chosen, load = put(made, place, seed, number)
        connection.send((kind, what))
        connection.send(attempt(watch, place / "input", kind, number, what, chosen, load))


def put(made: dict[str, list[Seed]], place: Path, seed: str, number: int) -> tuple[str, str, Seed, bool]:
    """The input of this number, in the folder `place`/input: its kind, what was done to it, and to which one."""
    rng = random.Random(f"{seed} {number}")
    kind = list(made)[number % len(made)]
    chosen = rng.choice(made[kind])
    for folder in ("input", damage.SECRET):
        (place / folder).mkdir(parents=True)
        for file in chosen.folder.iterdir():
            os.link(file, place / folder / file.name)
    what = damage.damage(rng, place / "input", chosen.name)
    return kind, f"{chosen.folder.name}: {what}", chosen, rng.random() < LOADED


def attempt(watch: Watch, folder: Path, kind: str, number: int, what: str, chosen: Seed, load: bool) -> Outcome:
    """What comes of the input in `folder`."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and not file.is_symlink())
    before, begun = _memory("VmRSS"), _seconds()
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the most memory since now
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + size + 2 * MEMORY, resource.RLIM_INFINITY))
    watch.seen, watch.folder = [], str(folder.resolve())
    came, says = "answered", ""
    try:
        TRIALS[chosen.kind](folder / chosen.name, chosen, load)
    except InputError as error:
        came, says = "refused", str(error)
        if not says.isprintable() or not 10 < len(says) < 2000:
            came, says = "failed", f"a message that is not one line of text: {says[:300]!r}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        came, says = (
            "failed",
            f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {str(error)[:200]!r}",
        )
    watch.folder = ""
    seconds, memory = _seconds() - begun, max(0, _memory("VmHWM") - before)
    for wrong, complaint in (
        (watch.seen, f"it {', '.join(watch.seen[:3])}"),
        (seconds > SECONDS, f"{seconds:.0f} seconds"),
        (memory > size + MEMORY, f"{memory >> 20} MiB of memory"),
    ):
        if wrong:
            came, says = "failed", f"{complaint}; {says}"
    return Outcome(kind, number, what, came, says, seconds, memory)


def _seconds() -> float:
    """CPU time of this process and of those it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _memory(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{entry}:"))
