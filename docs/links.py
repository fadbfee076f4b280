"""Keep the documentation's links into the source on the right lines.

    python docs/links.py            put every line number right
    python docs/links.py --check    change nothing; exit 1 if a link is stale or names nothing

A link whose text is one name in backticks and whose target is a Python file,

    [`relu_backward`](../src/tapeless/ops/reference.py#L164)

belongs on the line of that name's `def` (or `class`, or assignment at the top of a module). A name
that has moved to another file of the same folder is followed there.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from functools import cache
from pathlib import Path

LINK = re.compile(r"\[`(?P<name>\w+)`\]\((?P<path>[^()\s#]+\.py)(?:#[^()\s]*)?\)")


@cache
def definitions(path: Path) -> dict[str, int]:
    """The line of each name a file defines; where one is defined twice, the outermost, then the first."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    lines: dict[str, int] = {}
    for node in ast.walk(tree):  # breadth first
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines.setdefault(node.name, node.lineno)
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                lines.setdefault(target.id, node.lineno)
    return lines


def resolve(name: str, path: Path) -> tuple[Path, int] | None:
    """Where `name` is defined: in `path`, or else in the one file beside it that has it."""
    if path.is_file() and name in definitions(path):
        return path, definitions(path)[name]
    beside = [p for p in sorted(path.parent.glob("*.py")) if name in definitions(p)]
    return (beside[0], definitions(beside[0])[name]) if len(beside) == 1 else None


def links(page: Path) -> list[tuple[str, Path]]:
    """(name, file) of every link of a page into the source."""
    text = page.read_text(encoding="utf-8")
    return [(m["name"], (page.parent / m["path"]).resolve()) for m in LINK.finditer(text)]


def refreshed(page: Path) -> tuple[str, list[str], list[str]]:
    """The page's text with its links put right; what was stale; what names nothing."""
    stale: list[str] = []
    broken: list[str] = []
    text = page.read_text(encoding="utf-8")

    def refresh(match: re.Match[str]) -> str:
        place = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        found = resolve(match["name"], (page.parent / match["path"]).resolve())
        if found is None:
            broken.append(f"{place}: {match['name']} is not defined there")
            return match[0]
        file, line = found
        path = Path(os.path.relpath(file, page.parent.resolve())).as_posix()
        right = f"[`{match['name']}`]({path}#L{line})"
        if right != match[0]:
            stale.append(f"{place}: should be {path}#L{line}")
        return right

    return LINK.sub(refresh, text), stale, broken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a link is not right")
    parser.add_argument(
        "pages", nargs="*", type=Path, help="Markdown files (default: all beside this script)"
    )
    options = parser.parse_args(arguments)
    failed = False
    for page in options.pages or sorted(Path(__file__).parent.glob("*.md")):
        text, stale, broken = refreshed(page)
        for line in broken + (stale if options.check else []):
            print(line, file=sys.stderr)
        if stale and not options.check:
            page.write_text(text, encoding="utf-8")
            print(f"{page}: {len(stale)} links put right")
        failed |= bool(broken or (stale and options.check))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
