"""Write settings.md, the page on every setting, from the source: python docs/settings.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tapeless.presets import changed_by
from tapeless.settings import Setting, describe, names

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

<!-- Written by docs/settings.py from src/tapeless/config.py and src/tapeless/settings.py: change those. -->

Every setting of a model and of its training. Change them with `--set KEY=VALUE` (repeatable), in a TOML file
(`--config FILE`), or in Python with `tl.train(set={"n_embd": 32})` and `tl.GPTConfig(n_embd=32)`. Options of
the command line, such as `--steps`, override `--set`, which overrides the file, which overrides the preset.
`tapeless settings KEY` prints one of them.
"""
PARTS = {
    "model": "What the model is: `[model]` in TOML, `tl.GPTConfig` in Python.",
    "training": "How it is trained: `[training]` in TOML, which may also hold `seed`.",
}


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for part, about in PARTS.items():
        lines += [f"## {part.capitalize()}", "", about, ""]
        lines += [
            "| setting | what it is | values | default | presets that change it |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(one) for one in map(describe, names()) if one.table == part]
        lines.append("")
    return "\n".join(lines)


def _row(one: Setting) -> str:
    values = one.values if one.type in ("bool", "str") else f"{one.type}, {one.values}"
    presets = "; ".join(f"{value}: {', '.join(found)}" for value, found in changed_by(one.name).items())
    return f"| `{one.name}` | {one.about} | {values} | {one.default} | {presets} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is stale")
    if parser.parse_args(arguments).check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        if not current:
            print(f"{PAGE} is stale: run python docs/settings.py", file=sys.stderr)
        return int(not current)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
