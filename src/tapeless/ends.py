"""The tokens that begin and end a text, as a model's files name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tapeless.config import whole

LARGEST = 2**31 - 1  # id in a file


class Ends(NamedTuple):
    """`bos` begins a text; each of `eos` ends one, () for none. None: not named, so the tokenizer decides.

    The ids are those of the file, which may lie beyond the vocabulary: see `within`.
    """

    bos: int | None = None
    eos: tuple[int, ...] | None = None

    def within(self, vocab_size: int) -> Ends:
        """Without ids that the vocabulary does not have: such a token is never generated."""
        bos = self.bos if self.bos is not None and self.bos < vocab_size else None
        eos = tuple(id for id in self.eos or () if id < vocab_size)
        return Ends(bos, eos if eos or not self.eos else None)

    def or_else(self, other: Ends) -> Ends:
        """These, and what `other` names where these do not."""
        bos = other.bos if self.bos is None else self.bos
        return Ends(bos, other.eos if self.eos is None else self.eos)

    def also(self, id: int | None) -> Ends:
        """With one more token that ends a text, where any are named."""
        if id is None or not self.eos or id in self.eos:
            return self
        return self._replace(eos=(*self.eos, id))

    def to_dict(self) -> dict[str, Any]:
        """By the names in Hugging Face's files; nothing where nothing is named."""
        named: dict[str, Any] = {}
        if self.bos is not None:
            named["bos_token_id"] = self.bos
        if self.eos is not None:
            named["eos_token_id"] = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        return named

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> Ends:
        """Read `bos_token_id` and `eos_token_id`, one id or a list. Negative ids stand for none.

        Raises `ConfigError` for anything but ids.
        """
        begins = _ids("bos_token_id", [about.get("bos_token_id")])
        eos = about.get("eos_token_id")
        ends = _ids("eos_token_id", eos if isinstance(eos, list) else [eos])
        return cls(begins[0] if begins else None, None if eos is None else ends)


def _ids(name: str, values: list[Any]) -> tuple[int, ...]:
    ids = [whole(name, value, -LARGEST, LARGEST) for value in values if value is not None]
    return tuple(dict.fromkeys(id for id in ids if id >= 0))


def eos_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the token ids that `eos_token_id`, one id or several, means. Raises `ConfigError` for anything
    but ids of the vocabulary."""
    ids = value if isinstance(value, Iterable) else [value]
    return tuple(dict.fromkeys(whole("eos_token_id", id, 0, vocab_size - 1) for id in ids))
