r"""What llama.cpp calls the pre-tokenizers of byte-level BPEs, and what else it does unlike Hugging Face.

A GGUF file names the rule that splits a text into words before BPE merges the bytes of each. The names stand
for regular expressions in llama.cpp's source (src/llama-vocab.cpp); `NAMES` has those that split as a known
tokenizer.json does. They are told apart by what each step of the `pre_tokenizer` splits a text at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tapeless.errors import ConfigError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SHORTER = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # the same
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _LETTERS + r"\p{N}{1,3}" + _REST
QWEN2 = _LETTERS + r"\p{N}" + _REST
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED_CODER = _LETTERS + "\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
DIGIT, DIGITS, PUNCTUATION = r"\p{N}", r"\p{N}+", "runs of punctuation"
BYTES = "bytes"  # from here on letters stand for bytes
COMPARED = 10_000_000  # characters

# By the steps, and whether words of the vocabulary are taken whole (ignore_merges).
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2, BYTES), False): "gpt-2",
    ((DIGIT, GPT2, BYTES), False): "smollm",
    ((LLAMA3, BYTES), True): "llama-bpe",
    ((LLAMA3, BYTES), False): "smaug-bpe",
    ((QWEN2, BYTES), False): "qwen2",
    ((QWEN35, BYTES), False): "qwen35",
    ((BAILING, BYTES), False): "bailingmoe",
    ((SEED_CODER, BYTES), False): "seed-coder",
    ((*DEEPSEEK_V3, BYTES), False): "deepseek-v3",
    ((*DEEPSEEK_CODER, DIGIT, BYTES), False): "deepseek-coder",
    ((PUNCTUATION, GPT2, BYTES, DIGITS, "[0-9][0-9][0-9]"), False): "falcon",
}


def name_of(description: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises `ConfigError` where llama.cpp
    would give other tokens than the tokenizer does."""
    part, model = description.get("pre_tokenizer"), description["model"]
    steps = tuple(step for each in _parts(part) for step in _steps(each))
    if any(each.get("add_prefix_space") for each in _parts(part)):
        raise ConfigError(_differs("it puts a space before a text (add_prefix_space), llama.cpp does not"))
    if (name := NAMES.get((steps, bool(model.get("ignore_merges"))))) is None:
        known = ", ".join(sorted(NAMES.values()))
        raise ConfigError(
            _differs(f"it splits texts into words by a rule that llama.cpp does not have ({known})")
        )
    normalizer = description.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ConfigError(_differs(f"it changes texts first ({_types(normalizer)}), llama.cpp does not"))
    for token in description["added_tokens"]:
        if odd := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
            raise ConfigError(_differs(f"its token {token['content']!r} has {odd[0]}, which GGUF cannot say"))
    if crossing := _crossing(description["added_tokens"]):
        first, second = crossing
        raise ConfigError(_differs(f"its tokens {first!r} and {second!r} can overlap in a text"))
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        raise ConfigError(_differs(f"it has a token for unknown bytes, {unknown!r}, llama.cpp drops them"))
    return name


def _differs(reason: str) -> str:
    return (
        f"llama.cpp would make other tokens of a text than this tokenizer: {reason}. To write a file that "
        "knows tokens only by number, move the tokenizer's files away."
    )


def _types(part: Mapping[str, Any]) -> str:
    return ", ".join(str(each.get("type")) for each in part.get("normalizers") or [part])


def _parts(part: Any) -> list[Mapping[str, Any]]:
    """A pre-tokenizer's steps, one after the other."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part["pretokenizers"] for step in _parts(each)]
    return [part]


def _steps(part: Mapping[str, Any]) -> Sequence[str]:
    """What a step splits a text at."""
    pattern = part.get("pattern") or {}
    match part["type"]:
        case "ByteLevel":
            return [GPT2, BYTES] if part.get("use_regex", True) else [BYTES]
        case "Digits":
            return [DIGIT if part.get("individual_digits") else DIGITS]
        case "Punctuation" if part.get("behavior") == "Contiguous":
            return [PUNCTUATION]
        case "Split" if part.get("behavior") == "Isolated" and not part.get("invert"):
            regex = pattern.get("Regex", pattern)
            return [GPT2 if regex == GPT2_SHORTER else str(regex)]
    return [repr(dict(part))]  # no rule of llama.cpp's


def _crossing(added: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return two added tokens that llama.cpp finds otherwise where one begins within the other: it looks for
    the longest first, the tokenizer for what comes first, and for normalized tokens last."""
    tokens = sorted((token["content"] for token in added), key=len, reverse=True)
    if sum(len(token) ** 2 for token in tokens) > COMPARED:
        raise ConfigError(_differs("its added tokens are too long to be compared with each other"))
    normalized = {token["content"] for token in added if token.get("normalized")}
    theirs = [[token] for token in tokens]
    ours = [[token for token in tokens if (token in normalized) == last] for last in (False, True)]
    begins: dict[str, list[str]] = {}
    for token in tokens:
        for length in range(1, len(token)):
            begins.setdefault(token[:length], []).append(token)
    pairs: dict[str, tuple[str, str]] = {}  # by a text that has both
    for first in tokens:
        for at in range(1, len(first)):
            for second in begins.get(first[at:], ()):
                pairs.setdefault(first[:at] + second, (first, second))
    return next((pair for text, pair in pairs.items() if _cut(text, ours) != _cut(text, theirs)), None)


def _cut(text: str, passes: Sequence[Sequence[str]]) -> list[str]:
    """Cut a text at the tokens of each pass, leaving whole what was found before."""
    pieces = [(text, False)]
    for tokens in passes:
        cut = [[(piece, True)] if found else _cut_once(piece, tokens) for piece, found in pieces]
        pieces = [piece for each in cut for piece in each]
    return [piece for piece, _ in pieces]


def _cut_once(text: str, tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Cut a text at the tokens that begin first, of these the longest. True: it is a token."""
    pieces, begin, at = [], 0, 0
    while at < len(text):
        token = max((token for token in tokens if text.startswith(token, at)), key=len, default="")
        if token:
            pieces += [(text[begin:at], False), (token, True)]
            begin = at + len(token)
        at += len(token) or 1
    return [(piece, found) for piece, found in [*pieces, (text[begin:], False)] if piece]
