"""The harness that damages inputs, for a while: with --full new damage each time; `make fuzz` goes on for longer."""

import os
import subprocess
import sys
from pathlib import Path

import covering
import pytest
from fuzz import seeds, trial

TESTS = Path(__file__).parent


@pytest.mark.filterwarnings("ignore:topology")
def test_what_is_sound_is_answered(tmp_path):
    made = seeds.make(tmp_path)
    assert len(made) > 15
    for several in made.values():
        for seed in several:
            trial.TRIALS[seed.kind](seed.folder / seed.name, seed, False)


def test_damage_is_answered_or_refused():
    """The output says the seed, with which `python -m fuzz` does the same again. Without --full it is always the same:
    whether somebody's change passes should not depend on luck."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    chosen = ["--seconds", "60"] if covering.FULL else ["--seconds", "8", "--seed", "0"]
    command = [sys.executable, "-m", "fuzz", *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
