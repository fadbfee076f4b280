"""Where texts begin and end: several tokens that end one, what model files say, and what conversions keep."""

from __future__ import annotations

import json
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
import tapeless as tl
from commands import contents, refused, succeeds
from firmware import export, needs, run
from helpers import random_model
from tapeless.convert import convert
from tapeless.data.tokenizers import CharTokenizer
from tapeless.ends import Ends
from tapeless.errors import ConfigError, RunError

GPT2 = tl.presets["gpt2"].model
SMALL = GPT2.replace(vocab_size=11, block_size=12, n_layer=1, n_head=2, n_embd=8)
GENERATION = "generation_config.json"


def numbers(text):
    return [int(word) for word in text.split()]


@pytest.fixture
def here(tmp_path):
    """A Hugging Face folder of golden weights with a tokenizer of 11 tokens, whose end is 10."""
    golden.tokenizer(golden.huggingface(tmp_path / "hf"))
    return tmp_path


def say(folder, name, **about):
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | about))


def said(folder):
    """What a folder's config.json says, in transformers' names."""
    about = json.loads((folder / "config.json").read_text())
    return {name: about[name] for name in ("bos_token_id", "eos_token_id") if name in about}


# ---------------------------------------------------------------- generating


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_text_ends_before_any_of_its_ends(engine):
    """The same draws, cut at the first token that ends a text."""
    model = tl.GPT(SMALL, None, engine)
    model.params["wte"][...] = random_model(SMALL).params["wte"]

    @given(st.lists(st.integers(0, 10), max_size=4), st.integers(0, 99))
    @settings(max_examples=20)
    def check(eos, seed):
        options = {"n": 1, "temperature": 2.0, "seed": seed, "max_tokens": 8}
        prompt, *whole = numbers(model.generate([3], eos_token_id=[], **options)[0])
        assert (prompt, len(whole)) == (3, 8)
        expected = [3, *takewhile(lambda token: token not in eos, whole)]
        assert numbers(model.generate([3], eos_token_id=eos, **options)[0]) == expected
        model.eos_token_id = eos
        assert numbers(model.generate([3], **options)[0]) == expected

    check()


def test_ends_are_the_tokenizer_s_unless_others_are_set():
    model = tl.GPT(SMALL, None, "reference", tokenizer=CharTokenizer("abcdefghij", bos=10))
    assert (model.bos_token_id, model.eos_token_id) == (10, (10,))
    model.bos_token_id, model.eos_token_id = 3, [4, 5, 4]
    assert (model.bos_token_id, model.eos_token_id) == (3, (4, 5))
    model.bos_token_id = model.eos_token_id = None
    assert (model.bos_token_id, model.eos_token_id) == (10, (10,))
    model.tokenizer = None
    assert (model.bos_token_id, model.eos_token_id) == (None, ())
    assert tl.GPT(SMALL, None, "reference", bos_token_id=1, eos_token_id=2).ends == Ends((1,), (2,))


@pytest.mark.parametrize("eos", [11, -1, "3", 1.5, [3, None], True, [[1]], {"a": 1}])
def test_ends_that_are_no_tokens(eos):
    model = tl.GPT(SMALL, None, "reference")
    with pytest.raises(ConfigError, match="eos_token_id must be a whole number from 0 to 10"):
        model.generate([1], eos_token_id=eos)
    with pytest.raises(ConfigError, match="eos_token_id"):
        model.eos_token_id = eos


def test_a_text_begins_with_bos():
    """The first logits are those after BOS, whatever the tokenizer would begin with."""
    model = random_model(SMALL, dtype="float32")
    model.bos_token_id = 7
    (text,) = model.generate(n=1, temperature=0, max_tokens=1)
    assert numbers(text) == [int(np.argmax(model.logits([7])))]
    model.tokenizer = CharTokenizer("abcdefghij", bos=10)
    (text,) = model.generate("cab", n=1, temperature=0, max_tokens=1)
    last = model.logits([7, 2, 0, 1])[-1]
    assert text == "cab" + "abcdefghij"[int(np.argmax(last))]


# ---------------------------------------------------------------- what files say


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, (10, (10,))),  # the tokenizer's
        ({"bos_token_id": 3, "eos_token_id": 4}, {}, (3, (4,))),
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, {"eos_token_id": [6]}, (3, (6,))),
        ({"eos_token_id": 4}, {"bos_token_id": 0, "eos_token_id": [6, 2]}, (0, (6, 2))),
        ({"eos_token_id": None, "bos_token_id": None}, {}, (None, ())),  # none, says the file
        ({"bos_token_id": 50256, "eos_token_id": 50256}, {}, (10, (10,))),  # transformers' defaults
        ({"eos_token_id": [50256, 5]}, {}, (10, (5,))),
        ({"eos_token_id": [11, 5]}, {}, (10, (5,))),  # the first beyond the vocabulary
        ({"bos_token_id": -1, "eos_token_id": -1}, {}, (None, ())),
    ],
)
def test_what_hugging_face_files_say(config, generation, expected, here):
    say(here / "hf", "config.json", **config)
    if generation:
        say(here / "hf", GENERATION, **generation)
    model = tl.load(here / "hf", "reference")
    assert (model.bos_token_id, model.eos_token_id) == expected
    for to in ("run", "hf"):  # and on
        convert(here / "hf", here / f"to-{to}", to)
        again = tl.load(here / f"to-{to}", "reference")
        assert (again.bos_token_id, again.eos_token_id) == expected
    convert(here / "to-run", here / "back")
    again = tl.load(here / "back", "reference")
    assert (again.bos_token_id, again.eos_token_id) == expected
    model.save(here / "saved")
    assert contents(here / "saved")["config.json"] == contents(here / "to-run")["config.json"]


@pytest.mark.parametrize("name", ["config.json", GENERATION])
@pytest.mark.parametrize("value", ["3", 1.5, [3, "x"], {"a": 1}, True, 2**70])
def test_files_that_say_no_tokens(name, value, here):
    say(here / "hf", name, eos_token_id=value)
    with pytest.raises(RunError, match=rf"{name} cannot be used: eos_token_id must be a whole number"):
        tl.load(here / "hf")


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_damaged_generation_config(content, here):
    (here / "hf" / GENERATION).write_text(content)
    assert f"hf/{GENERATION} is damaged" in refused("sample", "hf", cwd=here)


def test_a_byte_order_mark_in_a_generation_config(here):
    (here / "hf" / GENERATION).write_text('{"eos_token_id": 4}', encoding="utf-8-sig")
    assert tl.load(here / "hf", "reference").eos_token_id == (4,)


def test_the_command_stops_at_the_end(here):
    model = tl.load(here / "hf", "reference")
    first = int(np.argmax(model.logits([10, 0])[-1]))  # after BOS and "a"
    options = ("--prompt", "a", "--temperature", 0, "-n", 1, "--max-tokens", 4, "--engine", "reference")
    for eos, text in (([], "a"), ([9, first], "a\n"), ([first], "a\n")):
        say(here / "hf", GENERATION, eos_token_id=eos)
        shown = succeeds("sample", "hf", *options, cwd=here).stdout
        assert shown == text if eos else len(shown) > 2


def test_ends_that_cannot_come_along_are_told(here):
    say(here / "hf", "config.json", eos_token_id=[4, 5])
    told = succeeds("convert", "hf", "model.bin", cwd=here).stderr
    assert "An llm.c file does not name the tokens that begin and end a text: eos_token_id [4, 5]" in told
    say(here / "hf", "config.json", eos_token_id=[4, 99])
    told = succeeds("convert", "hf", "run", "--to", "run", cwd=here).stderr
    assert "Tokens beyond the 11 of hf begin or end no text: of eos_token_id [4, 99], left out." in told
    assert said(here / "run") == {"eos_token_id": 4}
    assert "beyond" not in succeeds("convert", "hf", "copy", cwd=here).stderr
    assert said(here / "copy")["eos_token_id"] == [4, 99]


def test_runs_of_older_versions_end_as_they_did(here):
    convert(here / "hf", here / "run", "run")
    assert said(here / "run") == {}
    model = tl.load(here / "run", "reference")
    assert (model.bos_token_id, model.eos_token_id) == (10, (10,))


# ---------------------------------------------------------------- training


def test_training_keeps_the_ends_and_adds_its_own(here):
    """Documents are divided by the tokenizer's token: a model that learns it stops there, too."""
    say(here / "hf", "config.json", bos_token_id=1, eos_token_id=[4, 5])
    (here / "text.txt").write_text("abc cab " * 20)
    options = {"engine": "reference", "samples": 1, "progress": False, "out": here / "run"}
    trained = tl.train(here / "text.txt", pretrained=here / "hf", steps=1, set={"window": 4}, **options)
    assert (trained.model.bos_token_id, trained.model.eos_token_id) == (1, (4, 5, 10))
    assert said(here / "run") == {"bos_token_id": 1, "eos_token_id": [4, 5, 10]}
    again = tl.train(resume=True, steps=2, **options)
    assert (again.model.bos_token_id, again.model.eos_token_id) == (1, (4, 5, 10))
    assert tl.load(here / "run", "reference").eos_token_id == (4, 5, 10)


def test_a_chip_stops_there_too(tmp_path):
    """Nor does it draw what the tokenizer does not have: six rows of the vocabulary."""
    needs("gcc")
    config = tl.presets["microgpt"].model.replace(vocab_size=17)
    model = tl.GPT(config, 1, "reference", dtype="float32", tokenizer=CharTokenizer("abcdefghij", bos=10))
    model.bos_token_id, model.eos_token_id = 3, [4, 9, 2]
    model.params["head"][:, 11:] += 3
    model.save(tmp_path / "run")
    settings = ("--set", "temperature=2", "--set", "samples=40", "--set", "max_tokens=8")
    folder = export(tmp_path / "run", *settings, out=tmp_path / "c")
    run("make", "-s", cwd=folder)
    texts = run("./tapeless", cwd=folder).splitlines()
    options = ("-n", 40, "--temperature", 2, "--max-tokens", 8, "--engine", "reference")
    expected = succeeds("sample", "run", *options, cwd=tmp_path).stdout.splitlines()
    assert texts == expected
    assert not set("".join(texts)) & set("ejc")
    assert len({len(text) for text in texts}) > 3
