"""Checksums beside a checkpoint, by which damage is noticed that happened since they were written: a bad disk, half a
copy. They do not protect against who can write both.

Those of a directory are in its SHA256SUMS, that of a file is beside it in `<file>.sha256`, as the command `sha256sum`
writes them and (`-c`) checks them.
"""

import glob
import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from jaxllm.errors import InputError
from jaxllm.files import PIECE, part_of, read_small

SUMS, ENDING = "SHA256SUMS", ".sha256"
_WEIGHTS = frozenset({".safetensors", ".gguf", ".uqff"})
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?([^/]+)")  # what is in folders below is not read
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def write_sums(folder: Path, file: str | None = None) -> Path:
    """Write the checksums of a directory, or of one `file` in it, into it. Returns where they are."""
    names = sorted(path.name for path in folder.iterdir()) if file is None else [file]
    target = folder / (SUMS if file is None else file + ENDING)
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names if name != target.name]
    target.write_text("".join(lines), encoding="utf-8")
    return target


def verify(path: Path, progress: bool = False) -> None:
    """Compare a checkpoint, a directory or a file, with its checksums. Of a directory, what these list is compared if
    it is there; files of weights have to be listed. The parts of a split GGUF file belong together.

    Args:
        progress: whether to show progress on stderr.

    Raises:
        InputError: there are no checksums, a file is not listed or missing, or a file is damaged.
    """
    path = path.parent if path.suffix == ".uqff" else path
    listed = _of_directory(path) if path.is_dir() else _of_file(path)
    sizes = sum(file.stat().st_size for file in listed)
    with tqdm(
        desc="verifying", total=sizes, unit="B", unit_scale=True, disable=not progress, leave=False, file=sys.stderr
    ) as bar:
        damaged = [str(file) for file, digest in listed.items() if _digest(part_of(file), bar) != digest]
    if damaged:
        raise InputError(f"{', '.join(damaged)}: damaged: not what the checksums were made of; get it anew")


def _of_directory(folder: Path) -> dict[Path, str]:
    if not (folder / SUMS).is_file():
        raise InputError(f"{folder}: no {SUMS} in it, so there is nothing to verify it with")
    listed = _read(folder / SUMS)
    there = {file.name for file in folder.iterdir() if file.is_file()}
    for name in sorted(there | listed.keys()):
        if Path(name).suffix in _WEIGHTS and not (name in there and name in listed):
            raise InputError(f"{folder / name}: {f'missing, but in {SUMS}' if name in listed else f'not in {SUMS}'}")
    return {folder / name: digest for name, digest in listed.items() if name in there}


def _of_file(path: Path) -> dict[Path, str]:
    part = _PART.fullmatch(path.name)
    files = sorted(path.parent.glob(f"{glob.escape(part[1])}-*-of-{part[2]}.gguf")) if part else [path]
    found = {}
    for file in files:
        beside = file.with_name(file.name + ENDING)
        sums = beside if beside.is_file() else file.with_name(SUMS)
        if not sums.is_file() or file.name not in (listed := _read(sums)):
            raise InputError(f"{file}: in no {beside.name} or {SUMS} beside it, so there is nothing to verify it with")
        found[file] = listed[file.name]
    return found


def _read(sums: Path) -> Mapping[str, str]:
    """The checksums of the files beside it, by their names."""
    lines = read_small(sums).decode(errors="replace").splitlines()
    found = {m[2]: m[1].lower() for line in lines if (m := _LINE.fullmatch(line))}
    if not found:
        raise InputError(f"{sums}: no line is a SHA-256 and the name of a file, as sha256sum writes them")
    return found


def _digest(file: Path, bar: tqdm | None = None) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                digest.update(piece)
                if bar is not None:
                    bar.update(len(piece))
    except OSError as error:
        raise InputError(f"{file}: not read: {error.strerror}") from error
    return digest.hexdigest()
