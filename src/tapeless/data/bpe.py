"""Byte-level BPE, as GPT-2 uses it, through the `tokenizers` library: read, trained, saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tapeless import hub
from tapeless.data.added import completed
from tapeless.data.texts import pieces
from tapeless.errors import DataError, RunError, install

END = "<|endoftext|>"  # stands between documents
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LEAST = 257  # tokens: the bytes, and END


class BPETokenizer:
    """Byte-level byte-pair encoding: any text has tokens, and `decode(encode(text)) == text` as long
    as the tokenizer does not normalise texts (GPT-2's does not), and all 256 bytes are in its vocabulary.
    Text with another byte is refused, unless the tokenizer has a token for what it does not know.

    `bos` is the token that the tokenizer puts before a text (see `template`), or else `<|endoftext|>`, which
    a text may also contain spelled out, or None.

    `description` is the library's JSON, as in Hugging Face's tokenizer.json. Its limits (truncation, padding)
    are not used, and a decoder that it lacks is GPT-2's.
    Raises `DataError` if it describes no byte-level BPE, or the library is not there.
    """

    def __init__(self, description: dict[str, Any]):
        _check(description)
        if description.get("decoder") is None:
            description = description | {"decoder": BYTE_LEVEL}
        lib = library()
        try:
            with _no_panic():
                self._library = lib.Tokenizer.from_str(json.dumps(description))
        except DataError:
            raise
        except Exception as error:  # the library raises nothing more particular
            raise DataError(f"it describes no tokenizer: {error}.") from None
        self._library.no_truncation()
        self._library.no_padding()
        self._check_ids(description.get("added_tokens") or ())
        self.template = _template(description.get("post_processor"))
        begins = self.template[0]
        self.bos: int | None = begins[0] if len(begins) == 1 else self._library.token_to_id(END)
        vocab, unknown = description["model"]["vocab"], description["model"].get("unk_token")
        # The library would leave these out of a text without a word.
        self._missing = {
            byte[0] for letter, byte in _alphabet().items() if not {letter, unknown} & vocab.keys()
        }

    def _check_ids(self, added: Iterable[Mapping[str, Any]]) -> None:
        """The library numbers added tokens itself, one after the other, whatever the file says."""
        for token in added:
            given, taken = token["id"], self._library.token_to_id(token["content"])
            if given != taken:
                raise DataError(
                    f"it gives the added token {token['content']!r} the id {given}, where its vocabulary has "
                    f"{taken}."
                )
        ids = self._library.get_vocab(with_added_tokens=True)
        if len(set(ids.values())) < len(ids):
            raise DataError("it gives an added token the id of another token.")

    @cached_property
    def vocab_size(self) -> int:
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def start(self) -> int:
        """The token to generate from when there is no prompt: BOS, or else a line end."""
        # A normaliser may leave nothing of a line end.
        return next(iter(self.encode("\n")), 0) if self.bos is None else self.bos

    def encode(self, text: str) -> list[int]:
        try:
            written = text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not Unicode: it has {text[error.start]!r}.") from None
        if self._missing and (unknown := self._missing.intersection(written)):
            example = next(c for c in text if unknown.intersection(c.encode()))
            raise DataError(
                f"the tokenizer cannot encode {example!r}: its vocabulary has {256 - len(self._missing)} "
                "of the 256 bytes, and no token for what it does not know."
            )
        with _no_panic():
            [encoding] = self._library.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD, and ids without a token (of a
        padded vocabulary) nothing."""
        known = [t for t in tokens if 0 <= t < self.vocab_size]
        with _no_panic():
            return self._library.decode(known, skip_special_tokens=False)

    def spelled(self) -> list[str]:
        """Each token as the vocabulary has it; "" for an id that no token has."""
        return [self._library.id_to_token(t) or "" for t in range(self.vocab_size)]

    def token_bytes(self) -> list[bytes]:
        """An id that no token has stands for no bytes."""
        bytes_of = _alphabet()
        # As the library decodes: a token of other letters, which was added, stands for its own text.
        return [
            b"".join([bytes_of[c] for c in token]) if bytes_of.keys() >= set(token) else token.encode()
            for token in self.spelled()
        ]

    def to_dict(self) -> dict[str, Any]:
        return json.loads(self._library.to_str())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _alphabet() -> dict[str, bytes]:
    """The letter that stands for each byte in GPT-2's vocabulary: the byte's own in Latin-1 where that can
    be seen, and for the others, in turn, the letters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    letters = {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}


@contextmanager
def _no_panic() -> Iterator[None]:
    """A panic of the library as a `DataError`. It is no `Exception`, and has no name to import."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the tokenizers library fails with this tokenizer: {error}.") from None


def library() -> Any:
    """The `tokenizers` library. Raises `DataError` if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            f"GPT-2's kind of tokenizer needs the tokenizers library: {install('bpe')}."
        ) from None
    return tokenizers


def _check(description: dict[str, Any]) -> None:
    """Raise `DataError` for another kind of tokenizer, for two tokens of one id, or for merges that the
    vocabulary does not have: they would make the library panic. Nor may an id be far beyond the others."""
    try:
        model = description["model"]
        kind = model.get("type", "BPE" if "merges" in model else "unknown")  # older files name none
        around = json.dumps([description.get("pre_tokenizer"), description.get("normalizer")])
        if kind != "BPE" or '"ByteLevel"' not in around:
            raise DataError(f"it describes a {kind} tokenizer; expected byte-level BPE, as GPT-2's.")
        types = set(_types([description.get("normalizer"), description.get("decoder")]))
        if odd := types & {"Replace", "Precompiled"}:
            raise DataError(f"it uses {min(odd)}, which no byte-level BPE needs.")
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(affix):
                raise DataError(f"it has a {affix}, which no byte-level BPE needs.")
        if model.get("dropout"):
            raise DataError(
                f"it has a dropout of {model['dropout']}, which gives a text other tokens every time: "
                "set it to null."
            )
        token_of: dict[int, str] = {}
        for token, i in model["vocab"].items():
            if (first := token_of.setdefault(i, token)) != token:
                raise DataError(f"it gives {first!r} and {token!r} the same id, {i}.")
        if not token_of:
            raise DataError("it has no tokens.")
        # Ids without a token are what padded vocabularies have; but memory goes by the largest.
        if (largest := max(token_of)) > 2 * len(token_of) + 1024:
            raise DataError(f"it has {len(token_of):,} tokens, and gives one the id {largest:,}.")
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if not {left, right, left + right} <= model["vocab"].keys():
                raise DataError(f"it merges {left!r} and {right!r}, which its vocabulary does not have.")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise DataError("it describes no tokenizer: it has no vocabulary and merges.") from None


def _types(part: Any) -> Iterator[str]:
    """The types of what a tokenizer is made of. Replacements within replacements make gigabytes of a
    letter, where the library ends the process."""
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        yield part["type"]
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _types(each)


def _template(part: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a post-processor puts before a text, and after it."""
    before: list[int] = []
    after: list[int] = []
    for each in part.get("processors") or [part] if isinstance(part, dict) else ():
        try:
            if each.get("type") == "TemplateProcessing":
                side = before
                for piece in each["single"]:
                    if "Sequence" in piece:
                        side = after
                    else:
                        side += each["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            elif each.get("type") == "RobertaProcessing":
                before, after = [each["cls"][1]], [each["sep"][1]]
        except (KeyError, TypeError, AttributeError, IndexError):
            raise DataError("its post_processor describes no template.") from None
    return before, after


def from_bytes(tokens: Sequence[bytes], merges: Iterable[tuple[bytes, bytes]]) -> BPETokenizer:
    """GPT-2's way with these tokens, in order of their ids, and these merges, in theirs."""
    letter_of = {byte[0]: letter for letter, byte in _alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join([letter_of[byte] for byte in token])

    vocab = {spelled(token): i for i, token in enumerate(tokens)}
    return BPETokenizer(_describe(vocab, [[spelled(left), spelled(right)] for left, right in merges]))


def _describe(vocab: Mapping[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """GPT-2's way with this vocabulary and these merges."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[END], "content": END} | plain] if END in vocab else [],
        "pre_tokenizer": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def read_pair(vocab: Path, merges: Path) -> BPETokenizer:
    """The tokenizer of GPT-2's own files: vocab.json and merges.txt, or encoder.json and vocab.bpe, with the
    tokens that other files of the folder add.

    Raises `DataError` if they cannot be read, or do not belong together.
    """
    path = vocab
    try:
        tokens = json.loads(vocab.read_text(encoding="utf-8-sig"))
        path = merges
        lines = merges.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged: it is no {'JSON' if path == vocab else 'text'}.") from None
    pairs = [line.split() for line in lines[lines[0].startswith("#version") :] if line.strip()]
    try:
        described = _describe(tokens, pairs)
    except TypeError as error:
        raise DataError(f"{vocab} and {merges.name} do not belong together: {error}") from None
    described = completed(described, vocab.parent)
    try:
        return BPETokenizer(described)
    except (DataError, TypeError) as error:
        raise DataError(f"{vocab} and {merges.name} do not belong together: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A tokenizer of at most `vocab_size` tokens: the 256 bytes, what is most often found together in
    `texts`, and `<|endoftext|>`, which is the last. Texts are split into words as GPT-2 does it."""
    lib = library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The library takes 256 texts at a time: in small ones, it takes them as fast as it counts their words.
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return BPETokenizer(_describe(model["vocab"] | {END: len(model["vocab"])}, model["merges"]))


def fetch_gpt2() -> Path:
    """The folder of GPT-2's tokenizer.json, from Hugging Face's hub or where it was kept the last time.

    Raises `DataError` if that is not possible.
    """
    instead = "the folder of its vocab.json and merges.txt (or encoder.json and vocab.bpe)"
    try:
        return hub.fetch("gpt2", ["tokenizer.json"], "GPT-2's tokenizer is not on this machine", instead)
    except RunError as error:
        raise DataError(str(error)) from None
