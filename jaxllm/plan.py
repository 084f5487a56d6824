"""`jaxllm plan`: whether a model fits on devices that need not be here, and what bounds its speed there.

The module is also the function: `jaxllm.plan("gpt-oss-120b", "v5e:4x4")`, see `jaxllm.planning.planner`. For layers and
models of your own there are the functions that it is made of.
"""

import argparse
import json
import sys
from types import ModuleType

import jax

from jaxllm.cli import Parser, execute
from jaxllm.generate import emulate_devices
from jaxllm.loading import CACHE_DTYPES
from jaxllm.planning.compiling import collectives as collectives
from jaxllm.planning.compiling import collectives_of as collectives_of
from jaxllm.planning.compiling import lower_decode as lower_decode
from jaxllm.planning.planner import plan as plan
from jaxllm.planning.shapes import deepseek_fp8 as deepseek_fp8
from jaxllm.planning.shapes import dense as dense
from jaxllm.planning.shapes import fill_with_shapes as fill_with_shapes
from jaxllm.planning.topologies import EXAMPLES


class _Callable(ModuleType):
    """Importing the module puts it where `jaxllm.plan` was the function, so it can be called likewise."""

    __call__ = staticmethod(plan)


sys.modules[__name__].__class__ = _Callable


def parser() -> Parser:
    p = Parser("jaxllm.plan", "Say whether a model fits on devices that need not be here, and what bounds its speed.")
    p.add_argument("--model", required=True, metavar="NAME", help="a preset, file, directory, or hub id (config.json)")
    p.add_argument("--topology", required=True, metavar="CHIPS", help=EXAMPLES)
    p.add_argument("--mesh", metavar="AXES", help="such as tp=8,ep=2; by default the best that --search finds")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences that are processed together (1)")
    p.add_argument("--context", type=int, metavar="N", help="tokens of each (4096, or as many as the model has)")
    p.add_argument("--quantize", metavar="TYPE", help="plan with matrices quantized, for example to q4_k or 4")
    p.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="plan with keys and values cached in 8 bits")
    p.add_argument("--search", action="store_true", help="rank all meshes of these devices, and plan the best one")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def run(args: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for the chips whose compilers are installed
    chip, _, shape = args.topology.partition(":")
    if chip == "cpu" and shape.isdecimal():
        emulate_devices(int(shape))
    made = plan(
        args.model,
        args.topology,
        args.mesh,
        batch=args.batch,
        context=args.context,
        quantize=args.quantize,
        cache_dtype=args.cache_dtype,
        search=args.search,
    )
    print(json.dumps(made.json()) if args.json else made)


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
