"""What lies beside a tokenizer's own files: added tokens, their roles, settings. AutoTokenizer is the judge,
among the oracles; here some of its answers by hand."""

from __future__ import annotations

import json

import pytest

import tapeless as tl
from commands import succeeds
from helpers import random_model
from tapeless.convert import convert
from tapeless.data.bpe import END, BPETokenizer, train_bpe
from tapeless.data.tokenizers import read_tokenizer
from tapeless.errors import DataError

pytest.importorskip("tokenizers")
TEXTS = ["the cat sat on the mat, that cat", "the hat at the end"]
N = 270


def about(content, **flags):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content} | plain | flags


@pytest.fixture(params=["pair", "one"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """GPT-2's two files, or one, of a tokenizer of 270 tokens; and as transformers knows what is in it."""
    content = train_bpe(TEXTS, N).to_dict()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    if kind == "one":
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    else:
        merges = "".join(f"{' '.join(merge)}\n" for merge in content["model"]["merges"])
        (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), encoding="utf-8")
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return tmp_path


def put(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


BESIDE = {
    "nothing": {},
    "ids": {"added_tokens": {"<|pad|>": 270, "<|user|>": 271}},
    "ids and roles": {
        "added_tokens": {"<|pad|>": 270, "<|user|>": 271},
        "special_tokens_map": {"pad_token": "<|pad|>"},
    },
    "roles that are new tokens": {
        "added_tokens": {"<|pad|>": 270},
        "special_tokens_map": {
            "pad_token": about("<|pad|>", lstrip=True),
            "additional_special_tokens": ["<x>", "<y>"],
        },
    },
    "the list": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "270": about("<|pad|>"),
                "271": about("new word", special=False, normalized=True),
            },
            "pad_token": "<|pad|>",
        }
    },
    "flags": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "270": about("<|pad|>", lstrip=True, rstrip=True),
                "271": about("cap", special=False, single_word=True),
            }
        }
    },
    "a space before": {"tokenizer_config": {"add_prefix_space": True, "eos_token": "he"}},
    "a list makes the older files void": {
        "tokenizer_config": {"added_tokens_decoder": {"270": about("<a>")}},
        "added_tokens": {"<b>": 270},
        "special_tokens_map": {"pad_token": "<c>"},
    },
    "more roles": {
        "tokenizer_config": {"pad_token": "[PAD]", "extra_special_tokens": ["<e>"], "image_token": "<img>"}
    },
    "many roles": {
        "tokenizer_config": {
            "image_token": "<img>", "mask_token": "<m>", "pad_token": "<p>", "sep_token": "<q>",
            "extra_special_tokens": ["<e>"], "unk_token": "<u>", "bos_token": "<b0>", "audio_token": "<au>",
        }
    },
    "roles of old and new tokens": {
        "special_tokens_map": {"pad_token": "<p>", "eos_token": "h", "sep_token": "<q>"}
    },
    "flags that are not said": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "270": {"content": "<a>", "special": False}, "271": {"content": "<b>", "special": True},
                "272": {"content": "<c>"},
            }
        }
    },
    "a role with flags": {
        "tokenizer_config": {"eos_token": {"__type": "AddedToken"} | about("<|pad|>", rstrip=True)}
    },
}  # fmt: skip
SAMPLES = [
    "the cat", "<|pad|> the <|user|>cat", "a new word cap caps <x><y> <e> zz he the", f"at{END}<|pad|>  a",
    "[PAD] <img> x  <|pad|>  y<a><b><c>",
]  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("beside", BESIDE)
def test_as_transformers_reads_them(beside, folder):
    transformers = pytest.importorskip("transformers", reason="the oracles need transformers")
    put(folder, **BESIDE[beside])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)
    expected = {id: token.__getstate__() for id, token in theirs.added_tokens_decoder.items()}
    for id, token in expected.items():
        token["id"] = id
    assert {token["id"]: token for token in ours.to_dict()["added_tokens"]} == expected
    for text in SAMPLES:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.oracle
@pytest.mark.parametrize("beside", ["nothing", "ids and roles", "flags"])
def test_a_folder_written_here_gives_transformers_the_same(beside, folder, tmp_path):
    """Whatever the normalizer and the pre-tokenizer: without a tokenizer_config.json it leaves these out."""
    transformers = pytest.importorskip("transformers", reason="the oracles need transformers")
    put(folder, **BESIDE[beside])
    content = read_tokenizer(folder).to_dict()
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    content["normalizer"] = {"type": "Lowercase"}
    tokenizer = BPETokenizer(content)
    config = tl.presets["gpt2"].model.replace(block_size=8, n_layer=1, n_head=2, n_embd=8)
    model = random_model(config.replace(vocab_size=tokenizer.vocab_size), dtype="float32")
    model.tokenizer = tokenizer
    model.save(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token, theirs.eos_token) == (END, END)
    for text in [*SAMPLES, "THE CAT 1984"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_added_tokens_are_read(folder):
    put(folder, **BESIDE["ids and roles"])
    tokenizer = read_tokenizer(folder)
    assert tokenizer.vocab_size == 272
    assert tokenizer.encode("<|user|><|pad|>") == [271, 270]
    special = {token["content"]: token["special"] for token in tokenizer.to_dict()["added_tokens"]}
    assert special == {END: True, "<|pad|>": True, "<|user|>": False}


PLAIN, SPECIAL = (False, True), (True, False)  # special, normalized


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ("ids", {"<|pad|>": PLAIN, "<|user|>": PLAIN}),
        ("ids and roles", {"<|pad|>": SPECIAL, "<|user|>": PLAIN}),
        ("a list makes the older files void", {"<a>": SPECIAL}),
        ("flags that are not said", {"<a>": PLAIN, "<b>": SPECIAL, "<c>": PLAIN}),
        (
            "many roles",
            dict.fromkeys(["<b0>", "<u>", "<q>", "<p>", "<m>", "<img>", "<au>", "<e>"], SPECIAL),
        ),
        ("roles of old and new tokens", {"<q>": SPECIAL, "<p>": SPECIAL}),
    ],
)
def test_added_tokens_are_those_of_transformers(beside, expected, folder):
    """As AutoTokenizer of transformers 5.24 said when it was asked: from 270 on, in this order."""
    put(folder, **BESIDE[beside])
    tokens = read_tokenizer(folder).to_dict()["added_tokens"]
    found = {t["content"]: (t["id"], t["special"], t["normalized"]) for t in tokens if t["id"] >= N}
    assert found == {name: (N + i, *flags) for i, (name, flags) in enumerate(expected.items())}


def test_they_come_along_in_a_command(folder, tmp_path):
    put(folder, **BESIDE["ids"])
    (tmp_path / "text.txt").write_text("the cat<|user|>")
    succeeds(
        "tokenize", "text.txt", "--tokenizer", folder, "--val-fraction", 0, "--out", "data", cwd=tmp_path
    )
    assert read_tokenizer(tmp_path / "data") == read_tokenizer(folder)
    assert (tmp_path / "data/text_train.bin").read_bytes()[-2:] == (271).to_bytes(2, "little")


def test_byte_order_marks(folder):
    put(folder, **BESIDE["ids and roles"])
    before = read_tokenizer(folder)
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_tokenizer(folder) == before


@pytest.mark.parametrize("name", ["added_tokens", "special_tokens_map", "tokenizer_config"])
@pytest.mark.parametrize("content", ["[]", "{", "3", ""])
def test_damaged_files(name, content, folder):
    (folder / f"{name}.json").write_text(content)
    with pytest.raises(DataError, match=rf"{name}\.json is damaged"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added_tokens": {"<a>": 300}}, "the added token '<a>' the id 300, where its vocabulary has 270"),
        ({"added_tokens": {"<a>": 3}}, "the added token '<a>' the id 3, where its vocabulary has 270"),
        ({"added_tokens": {"<a>": "x"}}, "its added tokens cannot be read"),
        ({"added_tokens": {"<a>": True}}, "its added tokens cannot be read"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": about("<a>")}}},
            "its added tokens cannot be read",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"270": {}}}}, "its added tokens cannot be read"),
        ({"tokenizer_config": {"added_tokens_decoder": 3}}, "its added tokens cannot be read"),
        ({"special_tokens_map": {"additional_special_tokens": 3}}, "its added tokens cannot be read"),
    ],
)
def test_files_that_say_no_tokens(files, words, folder):
    put(folder, **files)
    with pytest.raises(DataError) as error:
        read_tokenizer(folder)
    assert words in str(error.value)


# ---------------------------------------------------------------- what a tokenizer.json may say


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"dropout": 0.1}, "a dropout of 0.1, which gives a text other tokens every time"),
        ({"end_of_word_suffix": "</w>"}, "an? end_of_word_suffix"),
        ({"continuing_subword_prefix": "##"}, "a continuing_subword_prefix"),
    ],
)
def test_what_would_change_texts_is_refused(model, words):
    content = train_bpe(TEXTS, N).to_dict()
    with pytest.raises(DataError, match=words):
        BPETokenizer(content | {"model": content["model"] | model})


def test_a_decoder_that_is_missing_is_gpt2s():
    content = train_bpe(TEXTS, N).to_dict() | {"decoder": None}
    tokenizer = BPETokenizer(content)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_the_bytes_of_added_tokens():
    """As the library decodes them: letters that stand for bytes are these, other text is itself."""
    content = train_bpe(TEXTS, N).to_dict()
    new = [about("né w"), about("愛"), about("new word")]
    content["added_tokens"] += [token | {"id": N + i} for i, token in enumerate(new)]
    tokenizer = BPETokenizer(content)
    for id, token in enumerate(tokenizer.token_bytes()):
        assert token.decode("utf-8", errors="replace") == tokenizer.decode([id])
    assert tokenizer.token_bytes()[N:] == ["né w".encode(), "愛".encode(), b"new word"]


def test_a_template_tells_the_token_that_begins_a_text():
    content = train_bpe(TEXTS, N).to_dict()
    content["added_tokens"].append(about("<s>") | {"id": N})
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [N], "tokens": ["<s>"]}}
    for beyond in (N + 1, 2**31):
        template["special_tokens"]["<s>"]["ids"] = [beyond]
        with pytest.raises(DataError, match=f"its post_processor adds token {beyond}, which"):
            BPETokenizer(content | {"post_processor": template})
    template["special_tokens"]["<s>"]["ids"] = [N]
    tokenizer = BPETokenizer(content | {"post_processor": template})
    assert (tokenizer.bos, tokenizer.start) == (N, N)
    assert tokenizer.encode("the") == BPETokenizer(content).encode("the")
