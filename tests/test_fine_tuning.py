"""Fine-tuning and evaluating against PyTorch: Hugging Face's GPT-2 on the same windows."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tapeless as tl
from commands import succeeds
from helpers import relative
from shard_files import write_shard

torch = pytest.importorskip("torch", reason="the oracles need PyTorch")
transformers = pytest.importorskip("transformers", reason="the oracles need transformers")
pytestmark = pytest.mark.oracle

V, T, B = 211, 24, 4
SHAPES = {"small": {"vocab_size": V, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 3}, "124M": {}}


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """Their model, in a folder; and shards with something to learn."""
    here = tmp_path_factory.mktemp("fine-tuning")
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES[request.param])).eval()
    model.save_pretrained(here / "hf")
    rng = np.random.default_rng(6)
    tokens = np.minimum(rng.geometric(0.03, 3000) - 1, V - 1)
    write_shard(here / "t_train.bin", tokens[:2500].tolist())
    write_shard(here / "t_val.bin", tokens[2500:].tolist())
    return model, here, tokens


def test_ten_steps_of_adamw(saved, tmp_path):
    """The command as llm.c's session has it, against torch.optim.AdamW with llm.c's constants."""
    model, here, tokens = saved
    succeeds(
        "train", here, "--pretrained", here / "hf", "--batch-size", B, "--block-size", T, "--steps", "10",
        "--eval-every", "5", "--set", "eval_batches=3", "--samples", "0", "--out", "run",
        cwd=tmp_path,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def loss_of(first):
        ids = torch.tensor(tokens[first : first + B * T + 1])
        logits = model(ids[:-1].view(B, T)).logits
        return torch.nn.functional.cross_entropy(logits.view(B * T, -1), ids[1:])

    def held_out():
        with torch.no_grad():
            return np.mean([loss_of(2500 + k * B * T).item() for k in range(3)])

    theirs, held = [], {0: held_out()}
    for step in range(10):
        optimiser.zero_grad()
        loss = loss_of(step * B * T)
        loss.backward()
        optimiser.step()
        theirs.append(loss.item())
        if step + 1 in (5, 10):
            held[step + 1] = held_out()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    mine = [row["loss"] for row in rows if row["step"]]
    val = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    print(f"losses {relative(mine, theirs):.1e}, from {theirs[0]:.4f} to {theirs[-1]:.4f}")
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert list(val) == [0, 5, 10]
    np.testing.assert_allclose(list(val.values()), list(held.values()), rtol=1e-5)
    after = tl.load(tmp_path / "run").params["wte"]
    assert relative(after, model.transformer.wte.weight.detach().numpy()) < 1e-5


@pytest.mark.parametrize("stride", [20, 7, 1])
def test_the_sliding_window(saved, stride, tmp_path):
    """Perplexity as their documentation computes it: labels of tokens that were scored before are −100.
    Their windows of 48 tokens predict 47."""
    model, _, tokens = saved
    model.eval().save_pretrained(tmp_path)
    text = tokens[2500 : 2620 if stride == 1 else 3000]
    ids, size = torch.tensor(text)[None], 48
    total, scored, before = 0.0, 0, 0
    for begin in range(0, len(text), stride):
        end = min(begin + size, len(text))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : before - end] = -100
        with torch.no_grad():
            mean = model(window, labels=labels).loss.item()
        count = int((labels[:, 1:] != -100).sum())  # the first of a window has nothing before it
        total, scored, before = total + mean * count, scored + count, end
        if end == len(text):
            break
    result = tl.evaluate(tl.load(tmp_path), text, stride, block_size=size - 1)
    assert result.tokens == scored == len(text) - 1
    assert result.loss == pytest.approx(total / scored, rel=1e-5)
