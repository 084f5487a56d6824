"""The mistakes of mutants.py can still be made. `make mutants`, which takes long, shows that each is noticed."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_replaces_is_there(mutant):
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert (mutants.ROOT / mutant.tests[0]).exists()
