"""Files that the originals' figures were measured on. They are not part of the repository."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

SHA256 = {
    "names.txt": "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}


def places() -> list[Path]:
    """Folders that may have them: the one that the variable TAPELESS_DATA names, or else those below."""
    if named := os.environ.get("TAPELESS_DATA"):
        return [Path(named).expanduser()]
    return [Path(__file__).parents[2] / "shared" / "data"]


def original(name: str) -> Path:
    """The file of this name. Skips the test where there is none; fails where it is another file, or where
    TAPELESS_DATA names a folder without it."""
    for folder in places():
        path = folder / name
        if path.is_file():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            assert found == SHA256[name], f"{path} is not the file that was measured on"
            return path
    assert "TAPELESS_DATA" not in os.environ, f"no {name} in TAPELESS_DATA, {os.environ['TAPELESS_DATA']}"
    pytest.skip(f"no {name}: set TAPELESS_DATA to a folder that has it")
