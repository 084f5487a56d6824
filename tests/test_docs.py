"""The reference has every public name, each says what it is, and the pages build."""

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import covering
import pytest

import jaxllm
from jaxllm import layers, plots

DOCS = Path(__file__).parent.parent / "docs"
ENTRY = re.compile(r"^\.\. auto(?:function|class|exception):: (\S+)\n((?:   :.*\n)*)", re.MULTILINE)
ENTRIES = dict(ENTRY.findall((DOCS / "api.md").read_text()))  # with their options
CONSTANTS = {"PRESETS", "__version__", *(name for name in layers.__all__ if name.isupper())}  # named in the text


def resolved(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_reference_has_every_public_name():
    listed = {name.rpartition(".")[2] for name in ENTRIES} | {*plots.__all__}  # a whole module
    assert {*jaxllm.__all__, *layers.__all__} - CONSTANTS <= listed


def shown(name, value, options):
    """A function; or a class, and what it defines that has no underscore, as far as the page shows it."""
    yield name, value
    if inspect.isclass(value) and ":no-members:" not in options:
        for attribute, member in vars(value).items():
            function = getattr(member, "__func__", member)
            public = not attribute.startswith("_") and f":exclude-members: {attribute}" not in options
            if public and (inspect.isfunction(function) or isinstance(member, property)):
                yield f"{name}.{attribute}", function


DOCUMENTED = dict(pair for name, options in ENTRIES.items() for pair in shown(name, resolved(name), options))
DOCUMENTED |= {f"plots.{name}": getattr(plots, name) for name in plots.__all__}


def test_every_public_name_says_what_it_is():
    assert len(DOCUMENTED) > 100
    assert not [name for name, value in DOCUMENTED.items() if not inspect.getdoc(value)]


def test_every_argument_is_explained():
    """Or the docstring says where it is."""
    missing = []
    for name, value in DOCUMENTED.items():
        text = inspect.getdoc(value) or ""
        if inspect.isfunction(value) and not re.search("[Ss]ee `|those of `", text):
            arguments = inspect.signature(value).parameters.keys() - {"self", "cls"}
            missing += [f"{name}: {a}" for a in sorted(arguments) if not re.search(rf"\b{a}\b", text)]
        if is_dataclass(value):
            missing += [f"{name}: {f.name}" for f in fields(value) if not re.search(rf"\b{f.name}\b", text)]
    assert not missing


def test_what_a_function_raises_is_said():
    functions = {name: value for name, value in DOCUMENTED.items() if inspect.isfunction(value)}
    raising = [name for name, value in functions.items() if "raise InputError" in inspect.getsource(value)]
    assert len(raising) > 10
    assert not [name for name in raising if "InputError" not in inspect.getdoc(functions[name])]


@pytest.mark.skipif(not covering.FULL, reason="with --full")
def test_the_pages_build_without_warnings(tmp_path):
    pytest.importorskip("sphinx_book_theme", reason="pip install '.[docs]'")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", DOCS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "load" in (tmp_path / "api.html").read_text()


PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [file for file in files if file and not (page.parent / file).exists()] == []
