"""Texts of any size, read in blocks that can be tokenized one by one as if they had not been cut."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tapeless.errors import DataError, argument

BLOCK = 2**18  # characters of a block, roughly
BOM, NEWLINE, RETURN = codecs.BOM_UTF8, 10, 13
LONGEST = 2**24  # characters of a line that is a document

# Before a space between letters, and after a line end between characters that are not white space. White
# space before a word belongs to it, and how a run of white space is divided depends on what follows it. For
# which tokenizers nothing changes if a text is cut there, `tapeless.data.seams` says.
SEAM = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


class Cuts(Enum):
    """Where a text may be cut into blocks."""

    ANYWHERE = "anywhere"
    SEAMS = "seams"
    NOWHERE = "nowhere"


Told = Callable[[int], object]  # is told how many more bytes were read


class Block(NamedTuple):
    text: str
    opens: bool  # a document begins with it
    held_out: bool  # it is for validation


class Texts:
    """Text files, of which the last part is held out: from byte ⌊(1 − held_out)·size⌋ of their text on.

    `size` counts the bytes of the text however it is stored: no byte-order mark, one byte for each line
    end, and with `lines` one at the end of each file.

    A file is one document, or with `lines` each of its lines that is not blank. A document in which
    the part held out begins is divided there; a line is not: it belongs to the part it begins in.

    UTF-8; a byte-order mark is left out, and line ends become newlines.
    Raises `DataError` for what cannot be read.
    """

    def __init__(self, paths: Sequence[Path], held_out: float, lines: bool):
        self.paths, self.lines = list(paths), lines
        self.sizes = [_size(path) for path in self.paths]
        self.stored = sum(self.sizes)  # bytes of the files
        sizes = [_text_size(path, lines) for path in self.paths]
        self.size = sum(sizes)
        if not self.size:
            raise DataError(f"{', '.join(map(str, self.paths))} holds no text.")
        self.cut, left = 0, int((1 - held_out) * self.size)  # in bytes of the files
        for path, stored, size in zip(self.paths, self.sizes, sizes, strict=True):
            if left < size:
                self.cut += min(_position(path, left), stored)
                break
            self.cut, left = self.cut + stored, left - size

    def blocks(self, told: Told = lambda _: None, cuts: Cuts = Cuts.SEAMS) -> Iterator[Block]:
        """All of the text in turn, in blocks of `BLOCK` characters or, where it may not be cut there, more.
        With `lines`, blocks are whole lines.

        Raises `DataError` for what is not text, a file whose size has changed, or a line that is too long
        to be a document.
        """
        cut = self.cut
        for path, size in zip(self.paths, self.sizes, strict=True):
            yield from self._blocks(path, size, cut, told, cuts)
            cut -= size

    def _blocks(self, path: Path, size: int, cut: int, told: Told, cuts: Cuts) -> Iterator[Block]:
        rest, opens, held_out, searched = "", True, False, 0
        for more, beyond in _decoded(path, size, cut, told):
            text = more
            if beyond and not held_out:
                unfinished = self.lines and rest and not rest.endswith("\n")
                end = text.find("\n") + 1 if unfinished else 0
                if end or not unfinished:
                    if rest:
                        yield Block(rest + text[:end], opens, held_out)
                    rest, text, opens, held_out, searched = "", text[end:], True, True, 0
            rest += text
            while len(rest) >= BLOCK:
                end = rest.rfind("\n") + 1 if self.lines else _last_cut(rest, searched, cuts)
                if not end:
                    if self.lines and len(rest) > LONGEST:
                        raise DataError(
                            f"{path} has a line of more than {LONGEST:,} characters, too long for a "
                            f"document of its own: leave {argument('lines')} out."
                        )
                    searched = len(rest)
                    break
                yield Block(rest[:end], opens, held_out)
                rest, opens, searched = rest[end:], False, 0
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


def undecodable(content: bytes, at: int) -> str:
    """Where text is not UTF-8, or what it is instead, if it begins with that byte-order mark."""
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return "it is UTF-16: save it as UTF-8" if utf16 else f"byte {at:,}"


def _stored(path: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A file block by block without its byte-order mark: where each begins, its bytes, and which of them
    count as text. Of a line end of two, the second does not."""
    try:
        with open(path, "rb") as file:
            at, last = len(BOM), 0
            if file.read(at) != BOM:
                file.seek(at := 0)
            while raw := file.read(BLOCK):
                content = np.frombuffer(raw, np.uint8)
                before = np.append(np.uint8(last), content[:-1])
                yield at, content, ~((content == NEWLINE) & (before == RETURN))
                at, last = at + len(raw), content[-1]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def _text_size(path: Path, lines: bool) -> int:
    """The bytes of a file's text."""
    size, last = 0, NEWLINE
    for _, content, counts in _stored(path):
        size, last = size + int(np.count_nonzero(counts)), content[-1]
    return size + (lines and last not in (NEWLINE, RETURN))


def _position(path: Path, count: int) -> int:
    """Where in a file the text beyond its first `count` bytes begins: not in a line end or a character."""
    end = start = 0
    for at, content, counts in _stored(path):
        passed = np.cumsum(counts)
        index = int(np.searchsorted(passed, count, side="right"))
        begins = np.flatnonzero(content[: index + 1] & 0xC0 != 0x80)  # the other bytes continue a character
        start = at + int(begins[-1]) if len(begins) else start
        if index < len(content):
            return start
        end, count = at + len(content), count - int(passed[-1])
    return end


def _last_cut(text: str, searched: int, cuts: Cuts) -> int:
    """The last place where `text` can be cut, beyond what was `searched` in vain; 0 if there is none."""
    if cuts is not Cuts.SEAMS:
        return len(text) if cuts is Cuts.ANYWHERE else 0
    for length in (4096, len(text)):
        begin = max(0, searched - 2, len(text) - length)
        if places := [m.start() for m in SEAM.finditer(text, begin) if m.start()]:
            return places[-1]
    return 0


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
                    if at + len(raw) == cut and raw.endswith(b"\r"):
                        text += decoder.decode(
                            b"\n"
                        )  # the cut divides no line end: this return is all of one
                except UnicodeDecodeError as error:
                    place = at + len(raw) - len(error.object) + error.start
                    why = undecodable(error.object if not at else b"", place)
                    raise DataError(f"{path} is not UTF-8 text ({why}).") from None
                if "\0" in text:
                    raise DataError(f"{path} is not text: it holds null bytes.")
                yield text, beyond
                if not raw:
                    return
                at += len(raw)
                told(len(raw))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
