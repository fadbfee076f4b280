"""The tokens that begin and end a text, as a model's files name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tapeless.config import whole

LARGEST = 2**31 - 1  # id in a file
NAMES = {"bos": "bos_token_id", "eos": "eos_token_id"}  # in Hugging Face's files


class Ends(NamedTuple):
    """`bos` begins a text, each of `eos` ends one. () says that there is none; None says nothing, so that the
    tokenizer decides.

    The ids are those of a file, which may lie beyond the vocabulary: see `within`.
    """

    bos: tuple[int, ...] | None = None
    eos: tuple[int, ...] | None = None

    def within(self, vocab_size: int) -> Ends:
        """Without ids that the vocabulary does not have: such a token is never generated."""
        kept = [ids and tuple(id for id in ids if id < vocab_size) for ids in self]
        return Ends(*(new if new or not old else None for old, new in zip(self, kept, strict=True)))

    def or_else(self, other: Ends) -> Ends:
        """These, and what `other` says where these say nothing."""
        return Ends(*(ours if ours is not None else theirs for ours, theirs in zip(self, other, strict=True)))

    def also(self, id: int | None) -> Ends:
        """With one more token that ends a text, where any are named."""
        if id is None or not self.eos or id in self.eos:
            return self
        return self._replace(eos=(*self.eos, id))

    def to_dict(self) -> dict[str, Any]:
        """By the names in Hugging Face's files; nothing where nothing is said."""
        said = {NAMES[field]: list(ids) for field, ids in self._asdict().items() if ids is not None}
        return {name: ids if len(ids) > 1 else ids[0] if ids else None for name, ids in said.items()}

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> Ends:
        """Read `bos_token_id`, an id, and `eos_token_id`, one or a list. Negative ids stand for none.

        Raises `ConfigError` for anything else.
        """
        said: dict[str, tuple[int, ...]] = {}
        for field, name in NAMES.items():
            if name in about:
                value = about[name]
                several = value if field == "eos" and isinstance(value, list) else [value]
                ids = [whole(name, id, -LARGEST, LARGEST) for id in several if id is not None]
                said[field] = tuple(dict.fromkeys(id for id in ids if id >= 0))
        return cls(**said)


def eos_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the token ids that `eos_token_id`, one id or several, means. Raises `ConfigError` for anything
    but ids of the vocabulary."""
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    ids = value if several else [value]
    return tuple(dict.fromkeys(whole("eos_token_id", id, 0, vocab_size - 1) for id in ids))
