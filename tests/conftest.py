"""Eight emulated CPU devices, strict dtypes, and caches that stay inside the checkout.

What tests compile in their own process is kept nowhere: hardly any program is compiled twice, and JAX's cache takes
longer to look up and to write than that would save. The command lines that they start keep theirs, as users' do.
"""

import collections
import gc
import os
import sys
from pathlib import Path

import covering
import forked
import pytest
import short_demo as short

BEGUN = pytest.StashKey[float]()
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xdg"
os.environ["XDG_CACHE_HOME"] = str(CACHE)  # read by jaxllm, in this process and in the command lines that tests start
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # each of the processes that tests start would compile all sources
    sys.dont_write_bytecode = False

import jax  # noqa: E402
from jax._src import compiler  # noqa: E402

import jaxllm  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # of tiny models, compiling takes longer than running
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)
gc.freeze()  # tracing makes many objects, of which few are garbage in cycles: looking for those took 7% of the time
gc.set_threshold(100_000, 20, 50)


def field(number, payload):
    """Bytes of a message's field, as protocol buffers write those below 16,384 that hold less than 128 bytes."""
    tag = number << 3 | 2
    return (bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])) + bytes([len(payload)]) + payload


# CompileOptions.executable_build_options.debug_options.xla_backend_extra_options, a map that otherwise only XLA_FLAGS
# sets, for all tests. Messages that follow each other are merged.
OLD_EMITTERS = field(3, field(3, field(500, field(1, b"xla_cpu_disable_new_fusion_emitters") + field(2, b"true"))))
get_compile_options = compiler.get_compile_options
compiled = 0  # programs, since mappings were listed


def quick_compile_options(*args, **kwargs):
    """Where optimizations are off, also XLA's older emitters, all in one module: a MLIR context for each fusion is what
    the newer ones spend a third of the compiler's time on."""
    global compiled
    compiled += 1
    options = get_compile_options(*args, **kwargs)
    if options.executable_build_options.debug_options.xla_backend_optimization_level == 0:
        options = options.ParseFromString(options.SerializeAsString() + OLD_EMITTERS)
        options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_parallel_codegen_split_count", 1)]
    return options


compiler.get_compile_options = quick_compile_options


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="full products of case tables instead of covering ones")
    parser.addoption("--cpu-times", action="store_true", help="show which files and tests took the most CPU time")


def pytest_configure(config):
    covering.FULL = config.getoption("--full")


# Workers take whole files. One that took long and came last would leave the other worker idle.
LONGEST = "fuzz notebooks finetuning faults adapters plan deepseek engine executables hf gemma3n"
LONGEST += " processes perplexity quantized_models cli quantizing exporting demo uqff kernels_cpu coded gpt_oss"
LONGEST += " serving_attacks"


def pytest_collection_modifyitems(items):
    """With --no-loadscope-reorder, files are handed out in this order."""
    order = [f"test_{name}" for name in LONGEST.split()]
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))


def cpu_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + forked.cpu_seconds


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Wall time says little on a machine that others use too."""
    item.stash[BEGUN] = cpu_seconds()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "teardown":
        outcome.get_result().user_properties.append(("cpu", cpu_seconds() - item.stash[BEGUN]))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--cpu-times"):
        return
    tests = {
        r.nodeid: dict(r.user_properties)["cpu"] for r in terminalreporter.stats.get("", []) if r.when == "teardown"
    }
    files = collections.Counter()
    for name, seconds in tests.items():
        files[name.split("::")[0]] += seconds
    terminalreporter.section(f"CPU seconds: {sum(files.values()):.0f}")
    for name, seconds in [*files.most_common(), *collections.Counter(tests).most_common(60)]:
        terminalreporter.write_line(f"{seconds:8.1f} {name}")


@pytest.fixture(autouse=True)
def optimizations(request):
    """Where bits count, programs are compiled as users have them compiled: XLA's optimizations could change bits."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


MOST_MAPPINGS, MOST_MODELS = 40_000, 12
LOOK = 100  # programs: listing mappings takes longer than most tests


@pytest.fixture(autouse=True)
def forget_programs():
    """A compiled program is about 100 mappings of memory, of which a process may have 65,530: a worker that runs many
    tests died of a segmentation fault."""
    global compiled
    yield
    maps = Path("/proc/self/maps")
    if compiled > LOOK and maps.exists():
        compiled = 0
        if maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
            jax.clear_caches()
            gc.collect()


@pytest.fixture(scope="module")
def load_once():
    """`jaxllm.load`, but the same arguments give the same model, and compiled programs, to the tests of a file; of many
    models, those that were asked for last."""
    loaded = {}

    def load(path, **options):
        key = str(path), tuple(sorted(options.items()))
        loaded[key] = loaded.pop(key, None) or jaxllm.load(path, progress=False, **options)
        if len(loaded) > MOST_MODELS:
            del loaded[next(iter(loaded))]
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory):
    """The path of the demo's first layers."""
    return short.write(tmp_path_factory.mktemp("demo") / "short.gguf")
