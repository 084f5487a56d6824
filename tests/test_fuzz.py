"""The harness that damages inputs, for a while, and requests that hypothesis makes. `make fuzz` goes on for longer."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import covering
import pytest
from fuzz import seeds, trial
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import InputError

TESTS = Path(__file__).parent


@pytest.mark.filterwarnings("ignore:topology")
def test_what_is_sound_is_answered(tmp_path):
    made = seeds.make(tmp_path)
    assert len(made) > 15
    for several in made.values():
        for seed in several:
            trial.TRIALS[seed.kind](seed.folder / seed.name, seed, False)


def test_damage_is_answered_or_refused():
    """New damage each time; the output says the seed, with which `python -m fuzz` does the same again."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    command = [sys.executable, "-m", "fuzz", "--seconds", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What JSON can say, in the place of what a document has.
SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
)
TRIED = settings(max_examples=1000 if covering.FULL else 60, deadline=None, database=None)


@st.composite
def changed(draw, documents):
    """One of the documents, in which up to three values are others, at any depth."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = None, None
        inner = document
        while isinstance(inner, dict | list) and inner and (holder is None or draw(st.booleans())):
            holder = inner
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
            inner = holder[key]
        holder[key] = draw(ANY)
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("structured")


@pytest.mark.parametrize("endpoint", seeds.BODIES)
def test_requests_of_any_structure(folder, endpoint):
    @TRIED
    @given(changed(seeds.BODIES[endpoint]))
    def tried(body):
        (folder / "body.json").write_text(json.dumps(body))
        with contextlib.suppress(InputError):
            trial.request(folder / "body.json", seeds.Seed(folder, base=endpoint), False)

    tried()


WHOLE = [path.parent for path in (seeds.GOLDEN / "checkpoints").glob("*/model.safetensors")]
CONFIGS = {folder: json.loads((folder / "config.json").read_text()) for folder in WHOLE}


def test_configurations_of_any_structure(folder):
    @TRIED
    @given(st.sampled_from(sorted(CONFIGS)), st.data())
    def tried(source, data):
        shutil.copy(source / "model.safetensors", folder)
        (folder / "config.json").write_text(json.dumps(data.draw(changed([CONFIGS[source]]))))
        with contextlib.suppress(InputError):
            trial.checkpoint(folder, seeds.Seed(folder), False)

    tried()
