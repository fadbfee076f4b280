"""Where a text may be cut for a tokenizer so that the tokens of the parts are those of the whole.

That is known of few kinds, so it is decided by what a tokenizer is made of, not by what it is not. A cut of
`tapeless.data.texts.SEAM` stands before a single space between letters, or behind a single line end. There
the patterns below always end a word, and what they make of the text before or behind does not depend on the
other side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tapeless.data.bpe import BPETokenizer
from tapeless.data.table import TableTokenizer
from tapeless.data.texts import Cuts
from tapeless.data.tokenizers import CharTokenizer
from tapeless.tokenizer import Tokenizer

# These change a character by itself, or with the marks that follow it; neither reaches over a space.
NORMALIZERS = ("NFC", "NFD", "Lowercase")
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = {  # the patterns of GPT-2, of Llama 3 (also with cl100k's spelling of contractions), and of Qwen 2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(
        contractions
        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for contractions in (CONTRACTIONS, "(?i:[sdmt]|ll|ve|re)")
        for numbers in (r"\p{N}{1,3}", r"\p{N}")
    ),
}


def cuts(tokenizer: Tokenizer) -> tuple[Cuts, str]:
    """Return where a text may be cut for this tokenizer and, if nowhere, because of what."""
    if isinstance(tokenizer, CharTokenizer):  # how a letter is folded may depend on its neighbours
        return (Cuts.SEAMS if tokenizer.fold else Cuts.ANYWHERE), ""
    if isinstance(tokenizer, TableTokenizer):
        return Cuts.SEAMS, ""  # it encodes as GPT-2 does
    reason = obstacle(tokenizer.to_dict()) if isinstance(tokenizer, BPETokenizer) else "its kind"
    return (Cuts.NOWHERE, reason) if reason else (Cuts.SEAMS, "")


def obstacle(description: dict[str, Any]) -> str:
    """Return the part of a tokenizer.json that may look beyond a seam; "" if all are known not to."""
    for token in description.get("added_tokens") or ():
        if token["lstrip"] or token["rstrip"] or any(c.isspace() for c in token["content"]):
            return f"the added token {token['content']!r}"
    for part in _parts(description.get("normalizer"), "normalizers"):
        if part["type"] not in NORMALIZERS:
            return part["type"]
    words, parts = False, list(_parts(description.get("pre_tokenizer"), "pretokenizers"))
    for i, part in enumerate(parts):
        kind = part["type"]
        if kind == "ByteLevel" and i == len(parts) - 1:
            if part["add_prefix_space"]:
                return "add_prefix_space"
            words = words or part.get("use_regex", True)
        elif kind == "Split":
            if part["pattern"].get("Regex") not in WORDS or part["behavior"] != "Isolated" or part["invert"]:
                return "Split"
            words = True
        elif kind != "Digits":
            return kind
    return "" if words else "words without ends"


def _parts(part: Any, within: str) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, in order."""
    if part is not None and part["type"] == "Sequence":
        for each in part[within]:
            yield from _parts(each, within)
    elif part is not None:
        yield part
