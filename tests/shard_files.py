"""Token files written from the published layout, by none of the package's code."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

KINDS = {"uint16": (20240520, 1, "H"), "uint32": (20240801, 7, "I")}


def write_shard(path: Path, tokens: Sequence[int], kind: str = "uint16") -> Path:
    """256 int32 of which magic, version and count are used, and the tokens; "int32" has no header."""
    magic, version, code = KINDS.get(kind, (None, None, "i"))
    header = b"" if magic is None else struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{code}", *tokens))
    return path


def read_shard(path: Path) -> tuple[str, list[int]]:
    """The kind of a file with a header, and its tokens."""
    content = path.read_bytes()
    magic, version, count, *rest = struct.unpack("<256i", content[:1024])
    kind, code = next((k, code) for k, (m, v, code) in KINDS.items() if (m, v) == (magic, version))
    assert not any(rest)
    tokens = array(code, content[1024:]).tolist()
    assert len(tokens) == count
    return kind, tokens
