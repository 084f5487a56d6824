"""`jaxllm.kernels`, which lies at the top of the repository, is a part of jaxllm like any other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "order",
    [
        "import jaxllm, jaxllm.kernels.dispatch",
        "import jaxllm.kernels.block_fp8, jaxllm.kernels.mxfp4, jaxllm.kernels.experts, jaxllm",
    ],
)
def test_either_may_be_imported_first(order):
    shown = "import jaxllm.kernels.dispatch as d; print(d.__file__)"
    got = subprocess.run([sys.executable, "-c", f"{order}; {shown}"], capture_output=True, text=True, check=True)
    assert Path(got.stdout.strip()).resolve() == ROOT / "kernels" / "dispatch.py"


@pytest.mark.parametrize("place", ["jaxllm/x.py", "kernels/x.py", "tests/x.py"])
def test_tools_sort_it_with_jaxllm(tmp_path, place):
    """By our settings alone: in this tree there is no jaxllm/kernels, as in a checkout."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("jaxllm", "kernels", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "jaxllm" / "parallel.py").touch()
    together = "import numpy\n\nimport jaxllm.kernels.dense\nimport jaxllm.parallel\n"
    apart = "import numpy\nimport jaxllm.kernels.dense\n\nimport jaxllm.parallel\n"
    options = "--no-cache", "--select", "I", "--stdin-filename", tmp_path / place, "-"
    command = [sys.executable, "-m", "ruff", "check", *options]
    checked = lambda text: subprocess.run(command, input=text, capture_output=True, text=True, cwd=tmp_path)  # noqa: E731
    assert [checked(text).returncode for text in (together, apart)] == [0, 1]
