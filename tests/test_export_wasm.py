"""`tapeless export --to wasm`: the page, compiled, opened from its file and used in a browser."""

from __future__ import annotations

import json
import os
import shutil
import stat

import numpy as np
import pytest

import tapeless as tl
from browser import chromium
from commands import SMALL, contents, environment, succeeds
from firmware import export, needs, run

STEPS, TEXTS, EVERY = 60, 20, 25
SETTINGS = ("--steps", STEPS, "--set", f"sample_every={EVERY}")
FILES = {".tapeless-export", "Makefile", "README.md", "page.html"} | {
    f"tapeless_{name}" for name in ("data.c", "model.c", "model.h", "ops.c", "ops.h", "run.c", "run.h")
}
PARAMETERS = {"microgpt": 4192, "esp32gpt": 4192}
COMPILER = ("make", "clang", "wasm-ld")
READY = "typeof program === 'object' && !$('again').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    needs("chromium", *COMPILER)
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose documents are HTML."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data.txt").write_text("<script>bad()</script>\n<b>&amp;\n" * 20, encoding="utf-8")
    succeeds(
        "train", folder / "data.txt", *SMALL, "--set", "block_size=24", "--out", folder / "run", cwd=folder
    )
    return folder / "run"


def export_page(*arguments, out):
    return export(*arguments, "--to", "wasm", out=out)


def opened(browser, folder, **how):
    page = browser.open(folder / "index.html", **how)
    page.wait(READY)
    return page


def reference(preset, folder):
    """What the Python reference gives: losses, texts in between, texts afterwards."""
    result = tl.train(
        preset=preset, engine="reference", dtype="float32", steps=STEPS, samples=2 * TEXTS,
        set={"sample_every": EVERY}, out=folder, progress=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    between = {row["step"]: row["samples"] for row in rows if row["step"] < STEPS}
    return result.losses, between, result.samples


def listed(page):
    """The texts on a page, newest first, each list with its heading."""
    return page.value(
        "[...document.querySelectorAll('#texts > li')].map((row) => [row.querySelector('p')?.textContent,"
        " [...row.querySelectorAll('ul > li')].map((e) => e.textContent)])"
    )


# ---------------------------------------------------------------- training in a tab


@pytest.mark.parametrize("preset", PARAMETERS)  # documents shuffled, and drawn one by one
def test_a_page_trains_and_generates_as_the_reference_does(preset, browser, tmp_path):
    losses, between, texts = reference(preset, tmp_path / "run")
    page = opened(browser, export_page(preset, *SETTINGS, out=tmp_path / "page"))
    assert page.text("h1") == preset
    assert f"A GPT of {PARAMETERS[preset]:,} parameters" in page.text("header")
    assert page.text("#status") == f"Ready to train {STEPS} steps."
    page.click("#train")
    page.wait("!busy()")
    assert page.text("#status") == f"Done: all {STEPS} steps."
    assert page.text("#step") == str(STEPS)
    np.testing.assert_allclose(page.value("losses"), losses, rtol=0, atol=1e-4)
    assert page.text("#loss") == f"{page.value('losses.at(-1)'):.4f}"
    assert page.value("$('train').disabled")
    page.click("#generate")
    page.wait("!busy()")
    assert listed(page) == [
        [f"After step {STEPS}", texts[TEXTS:]],
        [f"After step {STEPS}", texts[:TEXTS]],
        *([f"After step {step}", between[step]] for step in sorted(between, reverse=True)),
    ]


def test_pauses_and_texts_on_demand_change_nothing(browser, tmp_path):
    # At a step a frame there is time to do all that, and no texts in between that nobody asked for
    settings = ("--steps", 900, "--set", "sample_every=900")
    page = opened(browser, export_page("esp32gpt", *settings, out=tmp_path / "page"))
    page.click("#generate")  # before training
    page.wait("!busy()")
    page.click("#slowly")
    page.click("#train")
    page.wait("losses.length > 5")
    page.click("#generate")  # while training
    assert page.text("#train") == "Pause"
    page.wait("losses.length > 10")
    page.click("#train")
    paused = page.value("losses.length")
    assert page.text("#status") == f"Paused after step {paused}."
    for _ in range(2):  # while it rests
        page.click("#generate")
        page.wait("!busy()")
    assert paused == page.value("losses.length") < 900
    first, second, while_training, before = (texts for _, texts in listed(page))
    assert [len(texts) for texts in (first, second, while_training, before)] == [TEXTS] * 4
    assert first != second
    page.click("#slowly")
    page.click("#train")
    page.wait("!busy()")
    disturbed, texts = page.value("losses"), listed(page)[0][1]

    page.click("#again")  # and now without all that
    page.wait("losses.length === STEPS && !busy()")
    assert page.value("losses") == disturbed
    assert listed(page)[0][1] == texts

    page.type("#seed", "7")
    page.click("#again")
    page.wait("losses.length === STEPS && !busy()")
    other = page.value("losses")
    assert np.isfinite(other).all()
    assert other[0] != disturbed[0]
    page.type("#seed", "-1")
    page.click("#again")
    assert page.value("losses") == other, "a seed that is none is refused"


def test_a_page_may_only_train(browser, tmp_path):
    page = opened(browser, export_page("microgpt", "--mode", "train", "--steps", 5, out=tmp_path / "page"))
    page.click("#train")
    page.wait("!busy()")
    assert len(page.value("losses")) == 5
    assert page.value("[$('generate'), $('texts')]") == [None, None]


def test_a_loss_that_is_no_number_ends_training(browser, tmp_path):
    page = opened(browser, export_page("esp32gpt", "--set", "lr=9e5", out=tmp_path / "page"))
    page.click("#train")
    page.wait("!busy()")
    assert "no longer a finite number" in page.text("#status")


# ---------------------------------------------------------------- a trained model


def test_a_trained_model_writes_text_that_stays_text(browser, trained, tmp_path):
    page = opened(browser, export_page(trained, "--set", f"samples={TEXTS}", out=tmp_path / "page"))
    assert page.value("[$('train'), $('curve')]") == [None, None]
    page.click("#generate")
    page.wait("!busy()")
    ((_, texts),) = listed(page)
    expected = succeeds("sample", trained, "--engine", "reference", "--max-tokens", 16, cwd=tmp_path).stdout
    assert texts == expected.splitlines()
    assert any("<" in text for text in texts)
    assert page.value("document.querySelectorAll('#texts ul > li *').length") == 0

    page.type("#seed", "7")
    page.click("#again")
    page.wait("!busy()")
    ((_, others),) = listed(page)
    assert len(others) == TEXTS
    assert others != texts


# ---------------------------------------------------------------- what a page is


def test_a_page_needs_nothing_but_itself(browser, tmp_path):
    folder = export_page("microgpt", *SETTINGS, out=tmp_path / "page")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "index.html", alone)
    page = opened(browser, alone)
    code = "Uint8Array.from(atob($('program').textContent), (c) => c.charCodeAt(0))"
    module = f"new WebAssembly.Module({code})"
    assert page.value(f"WebAssembly.Module.imports({module})") == []
    names = page.value(f"WebAssembly.Module.exports({module}).map((e) => e.name)")
    assert sorted(names) == ["memory", "tl_begin", "tl_generate", "tl_train"]
    assert page.value("performance.getEntriesByType('resource').map((e) => e.name)") == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_a_phone(dark, browser, tmp_path):
    page = opened(browser, export_page("microgpt", *SETTINGS, out=tmp_path / "page"), width=360, dark=dark)
    page.click("#train")
    page.wait("!busy()")
    assert page.value("document.documentElement.scrollWidth") == 360
    assert page.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(246, 245, 242)"
    )


# ---------------------------------------------------------------- compiling


def test_exporting_compiles_what_make_compiles_without_a_warning(tmp_path):
    needs(*COMPILER)
    result = succeeds("export", "microgpt", "--to", "wasm", "--out", tmp_path / "page", cwd=tmp_path)
    assert result.stderr.splitlines()[-1] == f"Open {tmp_path / 'page/index.html'} in a browser."
    compiled = contents(tmp_path / "page")
    assert compiled.keys() == FILES | {"index.html", "tapeless.wasm"}
    run("make", "clean", cwd=tmp_path / "page")
    assert contents(tmp_path / "page").keys() == FILES
    run("make", "CFLAGS=-O2 -Werror", cwd=tmp_path / "page")
    assert contents(tmp_path / "page") == compiled


def test_without_a_compiler_the_folder_is_whole_and_says_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page").mkdir()
    for old in ("index.html", "tapeless.wasm"):
        (tmp_path / "page" / old).write_text("an older model's")
    result = succeeds(
        "export", "microgpt", "--to", "wasm", "--out", tmp_path / "page", "--overwrite",
        cwd=tmp_path, env=environment(PATH=str(tmp_path / "empty")),
    )  # fmt: skip
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Not compiled, for want of make and clang and wasm-ld: make in ")
    assert "wasi-libc" in last
    assert contents(tmp_path / "page").keys() == FILES


def test_a_page_without_its_program_says_so(browser, tmp_path):
    folder = export_page("microgpt", *SETTINGS, out=tmp_path / "page")
    page = browser.open(folder / "page.html")
    page.wait("$('status').textContent.includes('make puts it there')")
    assert page.value("$('train').disabled")


def test_a_compiler_that_fails_is_told_of_in_one_line(tmp_path):
    needs("make", "wasm-ld")
    clang = tmp_path / "bin" / "clang"
    clang.parent.mkdir()
    clang.write_text(
        "#!/bin/sh\necho 'In file included from x.c:1:' >&2\necho 'x.c:2: error: no math.h' >&2\nexit 1\n"
    )
    clang.chmod(clang.stat().st_mode | stat.S_IXUSR)
    result = succeeds(
        "export", "microgpt", "--to", "wasm", "--out", tmp_path / "page",
        cwd=tmp_path, env=environment(PATH=f"{clang.parent}{os.pathsep}{os.environ['PATH']}"),
    )  # fmt: skip
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Not compiled (x.c:2: error: no math.h): make in ")
    assert contents(tmp_path / "page").keys() == FILES
