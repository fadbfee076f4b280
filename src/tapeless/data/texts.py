"""Texts of any size, read in blocks that can be tokenized one by one as if they had not been cut."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tapeless.errors import DataError, argument

BLOCK = 2**18  # characters of a block, roughly
LONGEST = 2**24  # characters of a line that is a document

# Places where a text can be cut and no tokenizer of words notices: before a space between letters, and
# after a line end between characters that are not white space. White space before a word belongs to it,
# and how a run of white space is divided depends on what follows it: elsewhere a cut would be noticed.
SEAM = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")

Told = Callable[[int], object]  # is told how many more bytes were read


class Block(NamedTuple):
    text: str
    opens: bool  # a document begins with it
    held_out: bool  # it is for validation


class Texts:
    """Text files, of which the last part is held out: from byte ⌊(1 − held_out)·size⌋ of all on.

    A file is one document, or with `lines` each of its lines that is not blank. A document in which
    the part held out begins is divided there; a line is not: it belongs to the part it begins in.

    UTF-8; a byte-order mark is left out, and line ends become newlines.
    Raises `DataError` for what cannot be read.
    """

    def __init__(self, paths: Sequence[Path], held_out: float, lines: bool):
        self.paths, self.lines = list(paths), lines
        self.sizes = [_size(path) for path in self.paths]
        self.size = sum(self.sizes)
        if not self.size:
            raise DataError(f"{', '.join(map(str, self.paths))} holds no text.")
        self.cut = int((1 - held_out) * self.size)

    def blocks(self, told: Told = lambda _: None) -> Iterator[Block]:
        """All of the text in turn. With `lines`, blocks are whole lines.

        Raises `DataError` for what is not text, a file whose size has changed, or a line that is too long
        to be a document.
        """
        cut = self.cut
        for path, size in zip(self.paths, self.sizes, strict=True):
            yield from self._blocks(path, size, cut, told)
            cut -= size

    def _blocks(self, path: Path, size: int, cut: int, told: Told) -> Iterator[Block]:
        rest, opens, held_out = "", True, False
        for more, beyond in _decoded(path, size, cut, told):
            text = more
            if beyond and not held_out:
                unfinished = self.lines and rest and not rest.endswith("\n")
                end = text.find("\n") + 1 if unfinished else 0
                if end or not unfinished:
                    if rest:
                        yield Block(rest + text[:end], opens, held_out)
                    rest, text, opens, held_out = "", text[end:], True, True
            rest += text
            while len(rest) >= BLOCK:
                end = rest.rfind("\n") + 1 if self.lines else _seam(rest)
                if not end:
                    if len(rest) > LONGEST:
                        raise DataError(
                            f"{path} has a line of more than {LONGEST:,} characters, too long for a "
                            f"document of its own: leave {argument('lines')} out."
                        )
                    break
                yield Block(rest[:end], opens, held_out)
                rest, opens = rest[end:], False
        if rest:
            yield Block(rest, opens, held_out)


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder; expected text files, such as {path / '*.txt'}.")
        if not path.exists():
            raise DataError(f"no text file {str(path)!r}.")
        if not path.is_file():
            raise DataError(f"{path} is no regular file; expected a text file.")
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def _seam(text: str) -> int:
    """The last place where `text` can be cut; its end if there is none."""
    for length in (4096, len(text)):
        begin = max(0, len(text) - length)
        if places := [m.start() for m in SEAM.finditer(text, begin) if m.start()]:
            return places[-1]
    return len(text)


def pieces(text: str, length: int = 4096) -> Iterator[str]:
    """`text` in pieces of at least so many characters, but for the last."""
    at = 0
    while seam := SEAM.search(text, at + length):
        yield text[at : seam.start()]
        at = seam.start()
    yield text[at:]


def _decoded(path: Path, size: int, cut: int, told: Told) -> Iterator[tuple[str, bool]]:
    """The text of a file of `size` bytes, and whether it lies beyond byte `cut`."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    at, beyond = 0, False
    try:
        with open(path, "rb") as file:
            while True:
                raw = file.read(min(BLOCK, cut - at) if at < cut else BLOCK)
                if at + len(raw) > size or (not raw and at < size):
                    longer = "longer" if raw else "shorter"
                    raise DataError(f"{path} has become {longer} than the {size:,} bytes it began with.")
                beyond = at >= cut if raw else beyond  # what was begun before belongs to that
                try:
                    text = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    place = at + len(raw) - len(error.object) + error.start
                    raise DataError(f"{path} is not UTF-8 text (byte {place:,}).") from None
                if "\0" in text:
                    raise DataError(f"{path} is not text: it holds null bytes.")
                yield text, beyond
                if not raw:
                    return
                at += len(raw)
                told(len(raw))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
