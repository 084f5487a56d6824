"""Every notebook runs from top to bottom, and its two halves say the same."""

import ast
import inspect
from pathlib import Path

import jax
import jupytext
import matplotlib
import pytest
from compiled import QUICK
from covering import some
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
SAYS = {"quickstart": "largest difference between 1 and 8 devices: ", "layers": "The experts agree with numpy."}
SAYS |= {"quantizing": " MB: ", "formats": "by hand: [ 0.12817383 ", "shard": "both ends: all-reduce of 1024 bytes"}
SAYS |= {"deepseek": "80 numbers a token and layer", "gpt_oss": "layer 0: keys of 80 positions"}
SAYS |= {"planning": "(memory binds)", "finetuning": "adapter_model.safetensors: "}
# The functions of the others have tests of their own, and they call what there is; they run with --full.
CHEAP = [path for path in NOTEBOOKS if path.stem not in ("planning", "finetuning", "layers")]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == SAYS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_halves_hold_the_same_cells(path):
    cells = [[(c.cell_type, c.source) for c in jupytext.read(p).cells] for p in (path, path.with_suffix(".ipynb"))]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_calls_exists(path):
    """What it imports, with the attributes and the keywords that it uses."""
    cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    nodes, names = list(ast.walk(ast.parse("\n".join(cells)))), {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "cell", "exec"), names)

    def found(node):
        """What an expression of imported names and attributes stands for; None for others."""
        if isinstance(node, ast.Attribute):
            owner = found(node.value)
            return None if owner is None else getattr(owner, node.attr)
        return names.get(node.id) if isinstance(node, ast.Name) else None

    for node in nodes:
        if isinstance(node, ast.Attribute):
            found(node)
        if isinstance(node, ast.Call) and getattr(called := found(node.func), "__module__", "").startswith("jaxllm"):
            inspect.signature(called).bind_partial(**{given.arg: None for given in node.keywords if given.arg})


@pytest.mark.filterwarnings("default")  # what the kernel's own machinery warns about is not ours
@pytest.mark.parametrize("path", some(NOTEBOOKS, [FOLDER / "layers.py"]), ids=lambda path: path.stem)
def test_a_notebook_runs_in_jupyter(path, monkeypatch):
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert SAYS[path.stem] in text
    assert path.stem != "quickstart" or "The capital of France is Paris." in text


# So that less is computed. Drawing more than the first token would take another program, and a second for each.
SHORTER = {
    **{f"max_new_tokens={count}": "max_new_tokens=1" for count in (12, 24, 32)},
    '"tp=2", "tp=8"': '"tp=8"',
    '"qwen3_moe", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4': (
        '"qwen3_moe", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 1'
    ),
    '"num_hidden_layers": 4': '"num_hidden_layers": 2',
    'mesh="tp=2,ep=4", quantize': 'mesh="tp=2", quantize',
    'mesh="ep=8"': 'mesh="ep=2"',
    '"afq4", "nf4", "int4", "mxfp4", "nvfp4"': '"nf4", "mxfp4"',
    "for layer in (1, 2, 3)": "for layer in (1,)",
    "layers.20.": "layers.1.",
    'will turn. " * 24': 'will turn. " * 12',
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", some([], CHEAP), ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch, capsys, short_demo):
    """Without Jupyter, in this process, with fewer layers."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("jaxllm.loading._demo", lambda: short_demo)
    matplotlib.use("agg")
    names = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):
        for cell in jupytext.read(path).cells:
            if cell.cell_type == "code":
                for old, new in SHORTER.items():
                    cell.source = cell.source.replace(old, new)
                show(cell.source, names)
    assert SAYS[path.stem] in capsys.readouterr().out


def show(source, names):
    """Run a cell; what its last line is, is drawn as Jupyter would draw it."""
    *lines, last = ast.parse(source).body
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        exec(compile(ast.Module([last], []), "cell", "exec"), names)
        return
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    assert any(getattr(value, name)() for name in ("_repr_html_", "_repr_png_", "__repr__") if hasattr(value, name))
