"""Which parts of the package may know of which: imports point downwards, and families do not lean on siblings."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the lowest to the highest. What is not named stands above all of these.
LAYERS = (
    "errors",
    "confined_process",
    "confined",
    "patterns",
    "files",
    "entries",
    "formats",
    "encodings",
    "processor",
    "kernels",
    "parallel",
    "declaration",
    "memory",
    "placing",
    "requantize",
    "tracking",
    "layers",
)
LAYERS += ("models", "sampling", "tokenizer", "checkpoint")
TOP = len(LAYERS)
TOOLS = tuple(
    f"jaxllm.kernels.{name}" for name in ("bench", "gpu_report", "tpu_report")
)  # command lines beside kernels


def modules():
    """Every module's dotted name and the dotted names that it imports, inside functions too."""
    for folder, prefix in (("jaxllm", "jaxllm"), ("kernels", "jaxllm.kernels")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "kernels" in file.relative_to(ROOT / folder).parts:  # a link to kernels/, where there is one
                continue
            name = ".".join((prefix, *file.relative_to(ROOT / folder).with_suffix("").parts))
            yield name.removesuffix(".__init__"), imported(file)


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer(name):
    if name.startswith(TOOLS):
        return TOP
    part = name.split(".")[1] if "." in name else ""
    return LAYERS.index(part) if part in LAYERS else TOP


def test_imports_point_downwards():
    found = list(modules())
    assert len(found) > 80
    backward = [
        f"{name} imports {target}"
        for name, targets in found
        for target in targets
        if target.startswith("jaxllm.") and layer(target) > layer(name)
    ]
    assert not backward


def test_families_do_not_lean_on_siblings():
    families = {path.parent.name for path in (ROOT / "jaxllm" / "models").glob("*/family.py")}
    assert len(families) >= 3
    leaning = [
        f"{name} imports {target}"
        for name, targets in modules()
        if name.startswith("jaxllm.models.") and name.split(".")[2] in families
        for target in targets
        if target.startswith("jaxllm.models.") and target.split(".")[2] in families - {name.split(".")[2]}
    ]
    assert not leaning


def test_only_parallel_knows_the_mesh_by_its_axes():
    """Axis names, collectives and shard_map stand in one place; kernels are given theirs."""
    words = ("shard_map(", "lax.psum", "lax.pmax", "lax.all_gather", "axis_index(")
    exempt = {"parallel.py", *(f"{tool.split('.')[-1]}.py" for tool in TOOLS)}
    files = [f for folder in ("jaxllm", "kernels") for f in (ROOT / folder).rglob("*.py") if f.name not in exempt]
    assert [f.name for f in files if any(word in f.read_text() for word in words)] == []
