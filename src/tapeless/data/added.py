"""What other files of a Hugging Face folder add to its tokenizer: `completed`.

    tokenizer_config.json    added tokens by id (added_tokens_decoder), their roles (eos_token and others),
                             add_prefix_space
    added_tokens.json        older: the ids of added tokens
    special_tokens_map.json  older: their roles

As in transformers' AutoTokenizer, the older files count only without an added_tokens_decoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tapeless.errors import DataError
from tapeless.regular import open_regular

CONFIG, TOKENS, ROLES = FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}
# Roles in the order in which transformers numbers their tokens; others follow as the file has them.
ROLE_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE = ("extra_special_tokens", "additional_special_tokens")  # roles without a name
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")  # whose add_prefix_space is that of their config


def completed(description: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a tokenizer.json's content with the tokens that the other files of its folder add.

    Raises `DataError` if one of these is damaged.
    """
    config, added, roles = ({**_read(folder / name)} for name in FILES)
    if not (config or added or roles):
        return description
    try:
        return _completed(description, config, added, roles)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        there = [name for name in FILES if (folder / name).exists()]
        raise DataError(
            f"{folder} has a damaged {' or '.join(there)}: its added tokens cannot be read."
        ) from None


def _completed(
    description: dict[str, Any], config: dict[str, Any], added: dict[str, Any], roles: dict[str, Any]
) -> dict[str, Any]:
    listed = config.get("added_tokens_decoder")
    if listed is None:
        config = config | roles
    special = {_content(token): token if isinstance(token, dict) else {} for token in _special(config)}
    tokens = {_content(token): dict(token) for token in description.get("added_tokens") or ()}
    if listed is not None:
        new = {int(id): token for id, token in listed.items()}
    else:
        new = {id: {"content": name, "special": name in special} for name, id in added.items()}
    for id, token in sorted(new.items()):
        if (name := _content(token)) not in tokens:
            tokens[name] = _token(id, token)
    vocab = description["model"]["vocab"]
    free = max([*vocab.values(), *(token["id"] for token in tokens.values())], default=-1) + 1
    for name, about in special.items():
        if name not in tokens:
            tokens[name] = _token(vocab.get(name, free), about | {"content": name, "special": True})
            free += name not in vocab
        tokens[name]["special"] = True
    described = description | {"added_tokens": sorted(tokens.values(), key=lambda token: token["id"])}
    if config.get("tokenizer_class", GPT2_CLASSES[0]) in GPT2_CLASSES and "add_prefix_space" in config:
        space = bool(config["add_prefix_space"])
        described["pre_tokenizer"] = _with_prefix_space(description.get("pre_tokenizer"), space)
    return described


def _read(path: Path) -> dict[str, Any]:
    """A file's content, {} if it is not there."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: expected a JSON object.")
    return content


def _content(token: Any) -> str:
    """The text of a token, which may be given with what else is known of it."""
    content = token["content"] if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise TypeError
    return content


def _special(config: Mapping[str, Any]) -> Iterable[Any]:
    """The tokens that have a role, such as eos_token, in the order of transformers."""
    roles = [key for key, token in config.items() if key.endswith("_token") and isinstance(token, str | dict)]
    for key in sorted(roles, key=lambda key: [*ROLE_ORDER, key].index(key)):
        yield config[key]
    for key in MORE:
        more = config.get(key) or []
        yield from more.values() if isinstance(more, dict) else more


def _token(id: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """An added token as tokenizer.json has it."""
    special = about.get("special", False)
    flags = {name: bool(about.get(name, default)) for name, default in PLAIN.items()}
    if isinstance(id, bool) or not isinstance(id, int) or not isinstance(special, bool):
        raise TypeError
    normalized = bool(about.get("normalized", not special))
    return {"id": id, "content": _content(about)} | flags | {"normalized": normalized, "special": special}


def _with_prefix_space(part: Any, space: bool) -> Any:
    """A pre-tokenizer whose ByteLevel puts a space before a text, or does not."""
    if isinstance(part, dict) and part.get("type") == "ByteLevel":
        return part | {"add_prefix_space": space}
    if isinstance(part, dict) and part.get("type") == "Sequence":
        return part | {"pretokenizers": [_with_prefix_space(each, space) for each in part["pretokenizers"]]}
    return part
