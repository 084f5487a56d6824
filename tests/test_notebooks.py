"""Every notebook runs from top to bottom, and its two halves say the same."""

from pathlib import Path

import jupytext
import pytest
from covering import some
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
SAYS = {"quickstart": "The capital of France is Paris.", "layers": "The experts agree with numpy."}
SAYS |= {"quantizing": " MB: ", "formats": "by hand: [ 0.12817383 ", "shard": "both ends: all-reduce of 1024 bytes"}
SAYS |= {"deepseek": "80 numbers a token and layer", "gpt_oss": "layer 0: keys of 80 positions"}
SAYS |= {"planning": "(memory binds)", "finetuning": "adapter_model.safetensors: "}
# The functions of the others have tests of their own.
CHEAP = [path for path in NOTEBOOKS if path.stem not in ("planning", "finetuning")]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == SAYS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_halves_hold_the_same_cells(path):
    cells = [[(c.cell_type, c.source) for c in jupytext.read(p).cells] for p in (path, path.with_suffix(".ipynb"))]
    assert cells[0] == cells[1]


@pytest.mark.filterwarnings("default")  # what the kernel's own machinery warns about is not ours
@pytest.mark.parametrize("path", some(NOTEBOOKS, CHEAP), ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    notebook = jupytext.read(path)
    for cell in notebook.cells:  # drawing more than the first token would take another program, and a second for each
        cell.source = cell.source.replace("max_new_tokens=24", some("max_new_tokens=24", "max_new_tokens=1"))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert SAYS[path.stem] in text
