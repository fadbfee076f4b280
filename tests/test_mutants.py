"""The mistakes of benchmarks/mutants.py still fit the source, so that it can be run at any time."""

import ast
from functools import cache
from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, SOURCE


@cache
def parsed(text: str) -> str:
    return ast.dump(ast.parse(text))


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1))
def test_a_mistake_fits_the_source(number):
    mutant = MUTANTS[number - 1]
    text = (ROOT / SOURCE / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    changed = text.replace(mutant.old, mutant.new)
    assert changed != text
    if mutant.file.endswith(".py"):
        assert parsed(changed) != parsed(text)  # it is more than a comment
    assert mutant.tests.split()
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file()
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_every_folder_has_mistakes():
    source = ROOT / SOURCE
    files = [path.relative_to(source) for kind in ("*.py", "*.c") for path in source.rglob(kind)]
    folders = {file.parent for file in files if (source / file).read_text(encoding="utf-8").count("\n") > 30}
    assert folders - {Path(mutant.file).parent for mutant in MUTANTS} == set()
    assert len(set(MUTANTS)) == len(MUTANTS) >= 50
