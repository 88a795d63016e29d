"""The deliberate mistakes of mutants.py can still be made; `make mutants` makes them."""

import pytest

from .mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_has_its_place(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.right) == 1
    assert mutant.right != mutant.wrong
    compile(text.replace(mutant.right, mutant.wrong), mutant.file, "exec")
