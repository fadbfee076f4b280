"""The planted mistakes of benchmarks/mutants.py still fit the source, and name tests that exist."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mutants import MUTANTS, SOURCE

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_a_mistake_fits_the_source(number, tmp_path):
    mutant = MUTANTS[number]
    path = Path(SOURCE) / mutant.file
    (tmp_path / path).parent.mkdir(parents=True)
    shutil.copy(ROOT / path, tmp_path / path)
    mutant.apply(tmp_path)
    assert (tmp_path / path).read_text(encoding="utf-8") != (ROOT / path).read_text(encoding="utf-8")
    assert [test for test in mutant.tests.split() if not (ROOT / test).exists()] == []
