"""The documentation tells the truth: its links hit their lines, its examples print what they show."""

import contextlib
import importlib.util
import io
import re
import shutil
from pathlib import Path

import pytest

import tapeless as tl
from commands import succeeds
from test_bpe import gpt2_files

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gradients.md"
OPS = ROOT / "src" / "tapeless" / "ops"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load_links():
    spec = importlib.util.spec_from_file_location("docs_links", ROOT / "docs" / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = load_links()


def test_links_are_on_the_right_lines(capsys):
    assert links.main(["--check"]) == 0, capsys.readouterr().err + "\nRun: python docs/links.py"


def test_every_backward_op_is_linked():
    linked = set(links.links(PAGE))
    reference = OPS / "reference.py"
    backward = {name for name in links.definitions(reference) if name.endswith("_backward")}
    assert len(backward) >= 16
    wanted = {(name, reference) for name in backward}
    for file in sorted((OPS / "cpu").glob("*.py")):
        wanted |= {(name, file) for name in links.definitions(file) if name in backward}
    assert not {(name, str(file.relative_to(ROOT))) for name, file in wanted - linked}


def test_examples_print_what_the_page_shows():
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    assert [b[1] for b in blocks if b[1] not in ("python", "text")] == []
    namespace = {}
    for i, block in enumerate(blocks):
        if block[1] != "python":
            assert [b[1] for b in blocks[max(i - 1, 0) : i]] == ["python"], "an output without its code"
            continue
        line = text.count("\n", 0, block.start()) + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines before the code make tracebacks name the page's own lines.
            exec(compile("\n" * line + block[2], str(PAGE), "exec"), namespace)
        follows = i + 1 < len(blocks) and blocks[i + 1][1] == "text"
        shown = blocks[i + 1][2] if follows else ""
        assert printed.getvalue() == shown, f"{PAGE.name}, line {line}"


def test_math_survives_markdown():
    """Markdown reads formulas before the mathematics does: it drops the backslash before punctuation
    and takes an underscore after punctuation for the beginning of emphasis."""
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", PAGE.read_text(encoding="utf-8")))
    pieces = text.split("$$")
    assert len(pieces) % 2 == 1
    formulas, prose = pieces[1::2], pieces[::2]
    for paragraph in "\n\n".join(prose).split("\n\n"):
        inline = paragraph.split("$")
        assert len(inline) % 2 == 1, paragraph
        formulas += inline[1::2]
        for before, formula, after in zip(inline[::2], inline[1::2], inline[2::2], strict=False):
            assert formula == formula.strip() != "", paragraph
            assert not re.search(r"\w", before[-1:] + after[:1]), paragraph
    assert len(formulas) > 100
    for formula in formulas:
        assert not re.search(r"\\[^a-zA-Z]|[^\w\s]_|\s_|\*|\n\s*[-+=>#]", formula), formula


def test_other_links_lead_somewhere():
    text = FENCE.sub("", PAGE.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 10
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (PAGE.parent / path).exists(), target
        assert path or anchor in anchors, target


def test_claims_name_tests_that_there_are():
    """On the page on reliability each claim names its test, or the file of its tests."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", text)
    assert len([test for _, test in named if test]) > 10
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text("X = 1\n\n\n@staticmethod\ndef f():\n    def inner():\n        pass\n")
    (folder / "b.py").write_text("class C:\n    def f(self):\n        pass\n\n\ndef moved():\n    pass\n")
    return folder


def test_links_are_put_right(package, capsys):
    page = package / "page.md"
    page.write_text("[`f`](a.py#L1) [`inner`](a.py) [`X`](a.py#L9-L10) [`moved`](a.py#L2) [f](a.py#L1)\n")
    assert links.main(["--check", str(page)]) == 1
    assert links.main([str(page)]) == 0
    assert (
        page.read_text()
        == "[`f`](a.py#L5) [`inner`](a.py#L6) [`X`](a.py#L1) [`moved`](b.py#L6) [f](a.py#L1)\n"
    )
    assert links.main(["--check", str(page)]) == 0
    shutil.move(package / "a.py", package / "c.py")  # `f` is now in two files beside the one linked
    assert links.main([str(page)]) == 1
    assert "f is not defined there" in capsys.readouterr().err


def test_the_commands_of_the_page_on_gpt2_can_be_run_in_turn(tmp_path):
    """Those that make tokens, as they stand there; GPT-2's tokenizer from files instead of the network."""
    text = (ROOT / "docs" / "gpt2.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ tapeless (tokenize [^#\n]*)", text, re.MULTILINE)
    assert len(commands) == 2
    (tmp_path / "input.txt").write_text("Before we proceed any further, hear me speak.\n" * 50)
    for command in commands:
        words = command.replace("--tokenizer gpt2", f"--tokenizer {gpt2_files()}").split()
        told = succeeds(*("input.txt" if word == "*.txt" else word for word in words), cwd=tmp_path)
        assert "Train with: tapeless train" in told.stderr


def test_the_example_of_the_page_on_gpt2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpt2.md").read_text("utf-8"), re.DOTALL)
    exec(compile(code, "gpt2.md", "exec"), {"tl": tl})
    assert 0 < float(capsys.readouterr().out) < 10
    assert not list(tmp_path.iterdir())


def test_the_picture_of_memory_is_of_this_code(tmp_path):
    succeeds("export", "microgpt", "--draw", "memory.svg", cwd=tmp_path)
    assert (tmp_path / "memory.svg").read_text() == (ROOT / "docs" / "microgpt-memory.svg").read_text()
