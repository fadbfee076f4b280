"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mean, shape, texts, right = done.stdout.splitlines()
    assert float(mean.split()[0]) < 2.4
    assert shape.endswith("(1, 16, 48)")
    assert texts.count("'jo") + texts.count('"jo') == 3
    assert right == "True"
    assert not list(tmp_path.iterdir())
