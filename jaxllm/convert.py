"""`python -m jaxllm.convert`: a checkpoint as another one, in other types, another dtype or another kind of file.

Tensors are read, converted and written matrix by matrix, so memory use does not grow with the model. (Mapping a file
would be shorter, but pages read from a map stay with the process, and truncating the file meanwhile would kill it.)
What is written appears when it is complete; after an interruption, the same command goes on where it stopped.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.calibrate import read_text, text_chunks
from jaxllm.calibrated import common_group, with_awq, with_gptq
from jaxllm.checkpoint.checksums import ENDING, SUMS
from jaxllm.checkpoint.checksums import verify as verify_sums
from jaxllm.checkpoint.demo import is_demo
from jaxllm.checkpoint.demo_convert import to_demo, to_huggingface
from jaxllm.checkpoint.dtype_convert import TARGETS, NeedsModel, to_dtype
from jaxllm.checkpoint.exports import Export, awq, export, gptq
from jaxllm.checkpoint.matformer import sliced
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.checkpoint.safetensors import open_directory
from jaxllm.checkpoint.unfinished import GB, check_target
from jaxllm.checkpoint.uqff import REPORT, is_uqff
from jaxllm.checkpoint.writing import Advance, Tensor, safetensors_file, write_directory, write_files
from jaxllm.cli import Parser, adapters, add_adapters, add_matformer, execute
from jaxllm.compilation_cache import use_compilation_cache
from jaxllm.encodings import ENCODINGS
from jaxllm.errors import InputError, located
from jaxllm.exporting.directory import directory
from jaxllm.exporting.gguf import gguf
from jaxllm.exporting.model import Model, read_model
from jaxllm.exporting.target import CONTAINERS, MIXED, made_by, target
from jaxllm.exporting.uqff import VERSIONS, uqff
from jaxllm.exporting.writer import WORKERS, Output
from jaxllm.files import part_of
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.imatrix import importance_for
from jaxllm.loading import AdapterPath, find_checkpoint, load, read_adapters
from jaxllm.placing import Source
from jaxllm.processes import add_processes, joined
from jaxllm.recipe import ORGANIZATIONS, Plan, recipe

LAYOUTS = ("demo", "huggingface")
DEMO_CONFIG = "config_demo.json"
# Files that hold weights or run code when they are opened, their indexes (".index."), and hidden files.
_LEFT_OUT = re.compile(
    r"\.(safetensors|bin|pth?|ckpt|pkl|pickle|np[yz]|h5|msgpack|gguf|uqff|onnx\w*|ot)$|\.index\.|^\."
)
_PICKLES = (b"\x80", b"PK\x03\x04")  # the first bytes of a pickle, and of an archive such as torch's


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: str | int,
    container: str | None = None,
    organization: str | None = None,
    topology: str | os.PathLike | None = None,
    imatrix: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    matformer: tuple[str | os.PathLike, str] | None = None,
    adapters: Sequence[AdapterPath] = (),
    max_shard_size: int | str = "5GB",
    model_parallel: int | None = None,
    n_experts: int | None = None,
    config: str | os.PathLike | None = None,
    uqff_version: str = VERSIONS[0],
    checksums: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Plan | None:
    """Write a checkpoint as another one. Returns the plan, if matrices were encoded; `str` of it is a table.

    Any checkpoint that can be loaded can be written in any type of `jaxllm.encodings` that the container holds, and in
    GPTQ and AWQ, which calibrate on a text. Two conversions need not know the model: a Hugging Face directory in
    another dtype, and the files of DeepSeek's demo.

    For another dtype, the FP8 matrices of a blockwise FP8 checkpoint are dequantized; its other tensors stay the same
    bit for bit. A matrix whose scales are missing stays FP8: a warning names it, and the written config.json still
    declares FP8 but excludes the dequantized matrices. In a checkpoint without FP8, all floating-point tensors are
    converted except the router's correction bias (`e_score_correction_bias`, `expert_bias`); integers do not change.

    Files that hold no weights are copied from directory to directory; hidden files and subdirectories are not.

    Args:
        src: a file, directory or hub id, or "demo".
        dst: the directory to write, which must be empty or not exist; or the GGUF file to write, which must not exist.
            It appears when everything is written.
        to: a type such as "q4_k", "afq4", "fp8_block", "int4" or "gptq4"; "bfloat16" (rounded to nearest, ties to even)
            or "float32"; "demo", or "huggingface" from the demo's files, both of which change no value.
        container: "huggingface", "mlx", "gguf" or "uqff"; by default the first of them that holds the type.
        organization, topology, imatrix: see `load`.
        text: a file with the text that GPTQ and AWQ calibrate on.
        matformer: see `load`.
        adapters: low-rank adapters (LoRA) that are added to the matrices, see `load`.
        max_shard_size: bytes per file, or text such as "500MB"; a larger tensor gets its own file.
        model_parallel: how many files to write for the demo, one per GPU.
        n_experts: the expected number of experts, for "demo".
        config: for "huggingface", a config.json to use unchanged, or the demo's ModelArgs; by default those in `src`.
        uqff_version: of UQFF files: "1.2", or "0.2", which mistral.rs read before its version 0.8.4.
        checksums: write them too: SHA256SUMS in a directory, `<file>.sha256` beside a GGUF file.
        verify: first compare `src` with its checksums, see `load`.
        dry_run: only say what would be written.
        progress: whether to show progress, and a final line, on stderr.

    Raises:
        InputError: a file or argument cannot be used; one line saying what and where.
    """
    src, dst, limit = find_checkpoint(src), Path(dst), parse_size(max_shard_size)
    if (to == "demo") != (model_parallel is not None) or (n_experts is not None and to != "demo"):
        raise InputError("to 'demo' needs model_parallel, the number of files, and nothing else takes it or n_experts")
    if adapters and to in LAYOUTS:
        raise InputError(f"adapters mean nothing to '{to}', which changes no value")
    if config is not None and to != "huggingface":
        raise InputError(f"config '{config}': only to 'huggingface' takes one")
    if matformer is not None and to in LAYOUTS:
        raise InputError(f"matformer '{matformer[1]}': '{to}' changes no model")
    if dst.resolve().is_relative_to(src.resolve()):
        raise InputError(f"{dst}: is {src} itself or inside it; name a directory elsewhere")
    if verify:
        verify_sums(src, progress and sys.stderr.isatty())
    begun, pool = time.perf_counter(), ThreadPoolExecutor(WORKERS)
    try:
        if to in LAYOUTS:
            check_target(dst, False)
            output = _layout(src, dst, str(to), limit, model_parallel, n_experts, config)
        else:
            name, kind = target(to, container)
            check_target(dst, kind == "gguf")
            more = (matformer, adapters, uqff_version, dry_run)
            wanted = _Wanted(name, kind, organization, topology, imatrix, text, *more)
            types = partial(_types, src, dst, wanted, limit, pool)
            same = not adapters and matformer is None
            dtype_only = name in TARGETS and kind == "huggingface" and _is_directory(src) and same
            output = _dtype(src, dst, name, limit, types) if dtype_only else types()
        plan = output.plan if output.plan.rows else None
        if dry_run:
            if progress:
                print(f"{dst}: would be {len(output.tensors)} tensors, {output.nbytes} bytes", file=sys.stderr)
            return plan
        hide = None if progress else True  # None: where stderr is not a terminal
        options: Any = {"unit": "B", "unit_scale": True, "disable": hide, "leave": False}
        with tqdm(desc="converting", total=output.nbytes, **options) as bar:
            output.write(bar.update, checksums)
    finally:
        pool.shutdown(cancel_futures=True)
    if progress:
        seconds = time.perf_counter() - begun
        rate = f"{seconds:.1f} s, {output.nbytes / GB / seconds:.2f} GB/s"
        print(f"{dst}: {len(output.tensors)} tensors, {output.nbytes} bytes, {rate}", file=sys.stderr)
    return plan


def _layout(
    src: Path,
    dst: Path,
    to: str,
    limit: int,
    model_parallel: int | None,
    n_experts: int | None,
    config: str | os.PathLike | None,
) -> Output:
    """To or from the files of DeepSeek's demo."""
    files = {name: file for name, file in _others(src).items() if not re.fullmatch(r"config.*\.json", name)}
    if model_parallel is None:
        tensors, said = to_huggingface(src, None if config is None else Path(config))
        return _written(dst, tensors, files | {"config.json": _json(said)}, limit, _fingerprint(src, to))
    with located(src):
        parts, args = to_demo(open_directory(_directory(src)), model_parallel, n_experts)
    files |= {} if args is None else {DEMO_CONFIG: _json(args)}
    made = [safetensors_file(name, part) for name, part in parts.items()]

    def write(advance: Advance, checksums: bool) -> None:
        write_files(dst, made, files, advance, source=_fingerprint(src, to), checksums=checksums)

    return Output(Plan(()), list(chain(*parts.values())), write)


def _is_directory(src: Path) -> bool:
    """Whether this is a Hugging Face directory."""
    return src.is_dir() and not is_demo(src) and not is_uqff(src) and (src / "config.json").exists()


def _dtype(src: Path, dst: Path, to: str, limit: int, types: Callable[[], Output]) -> Output:
    """In another dtype. `types` does it for a model that has to be known for that."""
    try:
        with located(src):
            tensors, said = to_dtype(open_directory(src), to)
    except NeedsModel as error:
        try:
            return types()
        except InputError as reason:
            why = str(reason).removeprefix(f"{src}: ")
            raise InputError(f"{error}, which only who knows the model can convert: {why}") from reason
    return _written(dst, tensors, _others(src) | {"config.json": _json(said)}, limit, _fingerprint(src, to))


def _written(dst: Path, tensors: list[Tensor], files: Mapping[str, Path | bytes], limit: int, source: str) -> Output:
    def write(advance: Advance, checksums: bool) -> None:
        write_directory(dst, tensors, files, limit, advance, source, checksums)

    return Output(Plan(()), tensors, write)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `convert` for matrices in another type, which is `name` in the `container`."""

    name: str
    container: str
    organization: str | None
    topology: str | os.PathLike | None
    imatrix: str | os.PathLike | None
    text: str | os.PathLike | None
    matformer: tuple[str | os.PathLike, str] | None
    adapters: Sequence[AdapterPath]
    uqff_version: str
    dry_run: bool

    def check(self) -> None:
        """Raise InputError for what means nothing together."""
        if self.uqff_version not in VERSIONS or (self.container != "uqff" and self.uqff_version != VERSIONS[0]):
            raise InputError(f"uqff_version '{self.uqff_version}': only UQFF has one, {' or '.join(VERSIONS)}")
        calibrates = made_by(self.name, self.container) is None
        if self.text is not None and not calibrates:
            raise InputError(f"text '{self.text}': {self.name} is not calibrated; give an imatrix if the type uses one")
        if self.text is None and calibrates:
            raise InputError(f"{self.name} calibrates on a text: give one (--text)")
        if self.topology is not None and self.container not in MIXED:
            raise InputError(f"topology '{self.topology}': a directory has one type; only GGUF and UQFF mix them")
        for option, value in (("organization", self.organization), ("imatrix", self.imatrix)):
            if value is not None and calibrates:
                raise InputError(f"{option} '{value}': {self.name} takes none")


def _types(src: Path, dst: Path, wanted: _Wanted, limit: int, pool: ThreadPoolExecutor) -> Output:
    """Matrices in another type."""
    wanted.check()
    use_compilation_cache()
    checkpoint = open_checkpoint(src)
    checkpoint = checkpoint if wanted.matformer is None else sliced(checkpoint, *wanted.matformer)
    known = importance_for(wanted.imatrix, checkpoint)
    chosen = recipe(made_by(wanted.name, wanted.container), wanted.organization, wanted.topology, known)
    changes = (*(wanted.matformer or ()), *wanted.adapters, wanted.uqff_version)
    source = _fingerprint(src, wanted.container, wanted.name, *astuple(wanted)[2:6], *changes)
    folder = src.parent if src.is_file() and is_uqff(src) else src
    others = _others(folder) if folder.is_dir() else {}
    encodes = chosen.encodes if chosen else lambda name, source: True
    with located(src):
        model = read_model(checkpoint, folder, read_adapters(wanted.adapters), encodes)
        if wanted.container == "gguf":
            return gguf(model, chosen, dst, source, pool)
        if wanted.container == "uqff":
            assert chosen is not None
            return uqff(model, chosen, wanted.uqff_version, dst, others, limit, source, pool)
        how = export(wanted.container, wanted.name)
        if how.encoding not in ENCODINGS:
            model, how = _calibrated(src, model, how, wanted)
        return directory(model, chosen, how, dst, others, limit, source, pool)


def _calibrated(src: Path, model: Model, how: Export, wanted: _Wanted) -> tuple[Model, Export]:
    """The model with the weights and values that GPTQ or AWQ make, and how they are written."""
    assert wanted.text is not None
    text, group = read_text(wanted.text), common_group(model.shapes)
    bits, symmetric = (4, False) if how.name == "awq" else (int(how.name[4]), "asym" not in how.name)
    how = awq(group) if how.name == "awq" else gptq(bits, symmetric, group=group)
    if wanted.dry_run:  # all that is written about are the shapes
        names = (name for name in model.shapes if name.startswith("layers.") and model.is_matrix(name))
        return replace(model, made={name: _blank(how, model.shapes[name]) for name in names}), how
    loaded = load(
        src,
        dtype="float32",
        matformer=wanted.matformer,
        adapters=wanted.adapters,
        merge_adapters=True,
        progress=False,
    )
    tokens = text_chunks(loaded, text)
    calibrated = with_awq if how.name == "awq" else partial(with_gptq, bits=bits, symmetric=symmetric)
    result = calibrated(loaded, tokens, group=group)
    changed = {name: Source(model.sources[name].name, (Dense(v),)) for name, v in result.changed.items()}
    return replace(model, sources={**model.sources, **changed}, made=result.made), how


def _blank(how: Export, shape: tuple[int, ...]) -> Weight:
    """A weight of zeros that take no space."""
    *lead, out, in_ = shape

    def zeros(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.broadcast_to(np.zeros((), leaf.dtype), (*lead, *leaf.shape))

    return jax.tree.map(zeros, how.takes((out, in_)))


def _others(src: Path) -> dict[str, Path | bytes]:
    """The files that come along."""
    files = {file.name: file for file in sorted(_directory(src).iterdir()) if _comes_along(file)}
    return {name: file for name, file in files.items() if name not in (REPORT, SUMS) and not name.endswith(ENDING)}


def _directory(src: Path) -> Path:
    if not src.is_dir():
        raise InputError(f"{src}: not a directory")
    return src


def _json(said: Mapping[str, Any]) -> bytes:
    return (json.dumps(said, indent=2) + "\n").encode()


def _fingerprint(src: Path, *options: object) -> str:
    """What is written and what from, for a later run that wants to go on."""
    files = sorted(src.iterdir()) if src.is_dir() else [src]
    given = [Path(option) for option in options if isinstance(option, str | os.PathLike) and Path(option).is_file()]
    known = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in (*files, *given)]
    return f"{known} {[str(option) for option in options]}"


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text such as "5GB", "1.5 GiB" or "1000"."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*(?:(?:([KMGT])(i?))?B)?", str(size).strip(), re.IGNORECASE)
    power = "KMGT".find((found[2] or "-").upper()) + 1 if found else 0
    number = int(float(found[1]) * (1024 if found[3] else 1000) ** power) if found else 0
    if number < 1:
        raise InputError(f"max_shard_size '{size}': give a number of bytes, or for example 500MB or 5GB")
    return number


def _comes_along(file: Path) -> bool:
    if not file.is_file() or _LEFT_OUT.search(file.name):
        return False
    with part_of(file).open("rb") as opened:
        return not opened.read(4).startswith(_PICKLES)


class _Parser(Parser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)  # SRC and DST may be apart


def parser() -> argparse.ArgumentParser:
    p = _Parser("jaxllm.convert", __doc__.splitlines()[0])
    p.add_argument(
        "paths",
        nargs="*",
        metavar="SRC DST",
        help="a checkpoint, and the directory (new or empty) or GGUF file to write",
    )
    converting = "as DeepSeek's convert.py has it"
    casting = "as DeepSeek's fp8_cast_bf16.py has it; implies --to bfloat16"
    src, dst = p.add_mutually_exclusive_group(), p.add_mutually_exclusive_group()
    src.add_argument("--hf-ckpt-path", metavar="SRC", help=f"instead of SRC, {converting}")
    src.add_argument("--input-fp8-hf-path", metavar="SRC", help=f"instead of SRC, {casting}")
    dst.add_argument("--save-path", metavar="DST", help=f"instead of DST, {converting}")
    dst.add_argument("--output-bf16-hf-path", metavar="DST", help=f"instead of DST, {casting}")
    p.add_argument(
        "--to",
        metavar="TYPE",
        help="a type such as q4_k, afq4, int4, fp8_block or gptq4; bfloat16 or float32: for the FP8 matrices if there "
        "are any, otherwise for all floating-point tensors except the router's correction bias; the files of "
        "DeepSeek's demo (with --model-parallel); or huggingface from those",
    )
    p.add_argument("--container", choices=CONTAINERS, help="the kind of file (the first of these that holds the type)")
    p.add_argument("--organization", choices=ORGANIZATIONS, help="all matrices (default), or experts only (moqe)")
    p.add_argument("--topology", metavar="FILE", help="YAML with other types for some layers or matrices")
    p.add_argument("--imatrix", metavar="FILE", help="an importance matrix, see jaxllm calibrate")
    p.add_argument("--text", metavar="FILE", help="the text that GPTQ and AWQ calibrate on")
    add_matformer(p)
    add_adapters(p)
    p.add_argument("--uqff-version", choices=VERSIONS, default=VERSIONS[0], help="of UQFF files (%(default)s)")
    add_processes(p)
    p.add_argument("--checksums", action="store_true", help="write SHA256SUMS too, or the .sha256 of a file")
    p.add_argument("--verify", action="store_true", help="first compare the source with its checksums")
    p.add_argument("--dry-run", action="store_true", help="only print what would become of each matrix, and sizes")
    p.add_argument("--model-parallel", type=int, metavar="N", help="files for the demo, each for one GPU")
    p.add_argument("--n-experts", type=int, metavar="N", help="for the demo: how many there should be")
    p.add_argument("--config", metavar="FILE", help="to huggingface: a config.json, or the demo's ModelArgs")
    p.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file, such as 500MB (5GB)")
    return p


def run(args: argparse.Namespace) -> None:
    """Convert; of several processes, the first does it, and the others wait."""
    with joined(args, computes=False) as group:
        if group.leads:
            _run(args)
            group.tell({"call": "end"})
        else:
            group.told()


def _run(args: argparse.Namespace) -> None:
    paths = [args.hf_ckpt_path, args.input_fp8_hf_path, *args.paths, args.save_path, args.output_bf16_hf_path]
    paths = [path for path in paths if path is not None]
    if len(paths) != 2:
        raise InputError("give SRC and DST, the directory to read and the one to write")
    casting = args.input_fp8_hf_path or args.output_bf16_hf_path
    implied = "bfloat16" if casting else "demo" if args.model_parallel is not None else None
    to = args.to or implied
    if to is None:
        raise InputError("give --to, what to convert to")
    names = ("max_shard_size", "model_parallel", "n_experts", "config", "container", "organization", "topology")
    more = ("imatrix", "text", "matformer", "uqff_version", "checksums", "verify", "dry_run")
    options = {name: getattr(args, name) for name in (*names, *more)} | {"adapters": adapters(args)}
    try:
        plan = convert(*paths, to=to, **options)
        if args.dry_run and plan is not None:
            print(plan)
    except OSError as error:
        raise InputError(str(error)) from error


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
