"""Checkpoints against transformers: its models loaded here and converted, ours loaded there."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import golden
import tapeless as tl
from commands import succeeds
from helpers import relative
from tapeless.convert import convert
from tapeless.data.tokenizers import CharTokenizer
from tapeless.io import huggingface

torch = pytest.importorskip("torch", reason="the oracles need PyTorch")
transformers = pytest.importorskip("transformers", reason="the oracles need transformers")
pytestmark = pytest.mark.oracle

SHAPES = {
    "small": {"vocab_size": 211, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 3},
    "124M": {},
}
FIRST = 0x10000  # characters that stand for tokens, from here on


@pytest.fixture(scope="module", params=SHAPES)
def theirs(request):
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES[request.param])).eval()
    with torch.no_grad():  # as after training: nothing is exactly one or zero, and words are told apart
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    """Their model in a folder, and what it becomes: llm.c's format, and a folder once more."""
    here = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(here / "hf")
    convert(here / "hf", here / "model.bin")
    convert(here / "model.bin", here / "back")
    return here


def ours(path) -> tl.GPT:
    model = tl.load(path)
    model.tokenizer = CharTokenizer("".join(chr(FIRST + i) for i in range(model.config.vocab)), bos=None)
    return model


def texts(vocab: int, B: int = 2, T: int = 24):
    stream = np.random.default_rng(1).integers(0, vocab, B * T + 1)
    return stream[:-1].reshape(B, T), stream[1:].reshape(B, T)


@pytest.mark.parametrize("name", ["hf", "model.bin", "back"])
def test_logits_gradients_and_greedy_text(name, theirs, saved):
    model = ours(saved / name)
    tokens, targets = texts(model.config.vocab)
    B, T = tokens.shape
    theirs.zero_grad()
    logits = theirs(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()

    starts = range(0, B * T + 1, T)
    mine = model.logits(tokens.ravel(), starts)
    expected = logits.detach().flatten(0, 1).numpy()
    print(f"logits {np.abs(mine - expected).max():.1e}", end=" ")
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4)
    assert model.loss_and_grad(tokens.ravel(), targets.ravel(), starts) == pytest.approx(
        loss.item(), abs=1e-4
    )
    grads = {name.removeprefix("transformer."): p.grad.numpy() for name, p in theirs.named_parameters()}
    figures = {}
    for part, name_here in golden.OURS.items():
        layers = range(model.config.n_layer) if golden.layered(part) else [None]
        rows = [grads[part if l is None else f"h.{l}.{part}"] for l in layers]
        figures[name_here] = relative(model.grads[name_here], np.stack(rows) if layers != [None] else rows[0])
    print(f"gradients {max(figures.values()):.1e}")
    assert {name: f for name, f in figures.items() if not f <= 1e-4} == {}

    prompt = tokens[0, :5].tolist()
    text = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    (mine,) = model.generate(prompt, n=1, temperature=0, max_tokens=20)
    assert [ord(c) - FIRST for c in mine] == text
    assert len(set(text)) > 5


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_head_of_its_own(engine, tmp_path):
    """Untied models of transformers, loaded here and converted there and back: logits and gradients."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(**SHAPES["small"], tie_word_embeddings=False, initializer_range=0.3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "back")
    tokens, targets = texts(config.vocab_size)
    logits = theirs(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    starts = range(0, tokens.size + 1, tokens.shape[1])
    for name in ("hf", "run", "back"):
        model = tl.load(tmp_path / name, engine, dtype="float32")
        assert model.n_params == theirs.num_parameters()
        np.testing.assert_allclose(
            model.logits(tokens.ravel(), starts), logits.detach().flatten(0, 1).numpy(), rtol=0, atol=1e-4
        )
        model.loss_and_grad(tokens.ravel(), targets.ravel(), starts)
        assert relative(model.grads["head"], theirs.lm_head.weight.grad.numpy().T) < 1e-5
        assert relative(model.grads["wte"], theirs.transformer.wte.weight.grad.numpy()) < 1e-5
    back, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Another value for every setting of GPT2Config than it has by default; and some of any model's.
OTHERWISE = {
    "n_inner": 50, "activation_function": "gelu", "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3,
    "layer_norm_epsilon": 0.1, "initializer_range": 0.1, "summary_type": "mean", "summary_use_proj": False,
    "summary_activation": "tanh", "summary_proj_to_labels": False, "summary_first_dropout": 0.3,
    "scale_attn_weights": False, "use_cache": False, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5,
    "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "add_cross_attention": True,
    "tie_word_embeddings": False, "vocab_size": 200, "n_positions": 40, "n_embd": 24, "n_layer": 2,
    "n_head": 4, "is_causal": False, "is_decoder": True, "chunk_size_feed_forward": 2,
    "is_encoder_decoder": True, "output_hidden_states": True, "problem_type": "regression",
}  # fmt: skip


def test_every_setting_is_known():
    names = set(transformers.GPT2Config.__annotations__) - {"attribute_map", "model_type"}
    assert names <= OTHERWISE.keys()
    assert set(transformers.GPT2Config.attribute_map) == set(huggingface.ALIASES.values())
    assert {v: k for k, v in huggingface.ALIASES.items()} == transformers.GPT2Config.attribute_map


@pytest.mark.parametrize("name", OTHERWISE)
def test_every_setting_is_honoured_or_refused(name, tmp_path):
    """The model of a config with one setting changed gives their logits, or is not loaded."""
    torch.manual_seed(7)
    shape = SHAPES["small"] | {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | {name: OTHERWISE[name]})).eval()
    theirs.save_pretrained(tmp_path / "hf")
    about = json.loads((tmp_path / "hf/config.json").read_text())
    assert about[name] == OTHERWISE[name]  # and so it is in the file
    tokens = np.arange(24) * 5 % 190
    logits = theirs(torch.tensor(tokens[None])).logits[0].detach().numpy()
    changes = ("activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    if name in (*changes, "add_cross_attention", "is_causal"):
        with pytest.raises(tl.TapelessError, match=f"{name} is"):
            tl.load(tmp_path / "hf")
    else:
        model = tl.load(tmp_path / "hf", "reference")
        np.testing.assert_allclose(model.logits(tokens), logits, rtol=0, atol=1e-4)


def test_activations_of_the_same_formula():
    """Of all GELUs that transformers knows, those that differ by rounding are accepted."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    functions = transformers.activations.ACT2FN
    gelus = {name: functions[name](x) for name in functions if "gelu" in name}
    assert len(gelus) > 6
    same = {name for name, y in gelus.items() if torch.allclose(y, gelus["gelu_new"], rtol=0, atol=1e-11)}
    assert same == set(huggingface.SETTINGS["activation_function"])


def test_what_comes_back_is_what_was_saved(theirs, saved):
    back, info = transformers.GPT2LMHeadModel.from_pretrained(saved / "back", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert back.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype, theirs, tmp_path):
    half = copy.deepcopy(theirs).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "hf")
    wte = tl.load(tmp_path / "hf", "reference", dtype="float32").params["wte"]
    assert np.array_equal(wte, half.transformer.wte.weight.detach().float().numpy())
    convert(tmp_path / "hf", tmp_path / "bf16", dtype="bf16")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert back.dtype == torch.bfloat16
    expected = half.transformer.wte.weight.detach().to(torch.bfloat16)
    assert torch.equal(back.transformer.wte.weight.detach(), expected)


def test_shards_and_models_without_a_head(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size=theirs.num_parameters())
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    theirs.transformer.save_pretrained(tmp_path / "bare")
    for name in ("shards", "bare"):
        model = tl.load(tmp_path / name, "reference", dtype="float32")
        for part, name_here in golden.OURS.items():
            if not golden.layered(part):
                expected = theirs.transformer.get_parameter(part).detach().numpy()
                assert np.array_equal(model.params[name_here], expected)
        last = theirs.transformer.h[-1].mlp.c_proj.weight.detach().numpy()
        assert np.array_equal(model.params["w2"][-1], last)


def test_debug_states(theirs, saved):
    """A state with PyTorch's numbers agrees with the model that was converted."""
    V, L = theirs.config.vocab_size, theirs.config.n_layer
    tokens, targets = texts(V)
    theirs.zero_grad()
    logits = theirs(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    grads = {name.removeprefix("transformer."): p.grad.numpy() for name, p in theirs.named_parameters()}
    with open(saved / "state.bin", "wb") as file:
        file.write(golden.header(20240327, 2, *tokens.shape))
        file.write(tokens.astype("<i4").tobytes() + targets.astype("<i4").tobytes())
        file.write(golden.float32(logits.detach().numpy()) + golden.float32(np.array([loss.item()])))
        for part in golden.SHAPES:
            for name in [f"h.{l}.{part}" for l in range(L)] if golden.layered(part) else [part]:
                value = grads[name]
                file.write(golden.float32(value.T if golden.is_linear(part) else value))
            if part == "wte.weight":
                file.write(bytes(4 * (-V % 128) * value.shape[1]))
    succeeds("check", "model.bin", "--state", "state.bin", cwd=saved)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_texts_end_where_theirs_do(where, tmp_path):
    """At any of several tokens, whichever file names them; a list with ids beyond the vocabulary too."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(**SHAPES["small"])
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    prompts = torch.randint(0, 200, (12, 4)).tolist()

    def theirs(prompt, **options):
        ids = torch.tensor([prompt])
        options |= {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()

    common = {token for prompt in prompts for token in theirs(prompt, eos_token_id=None)[9:12]}
    ends = [*sorted(common)[:5], 50256]
    model.config.eos_token_id = ends if where == "config.json" else 0
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path)
    if where == "config.json":
        (tmp_path / "generation_config.json").unlink()
    mine, lengths = tl.load(tmp_path, "reference", dtype="float32"), set()
    assert mine.eos_token_id == tuple(ends[:-1])
    for prompt in prompts:
        expected = theirs(prompt)
        lengths.add(len(expected))
        (text,) = mine.generate(prompt, n=1, temperature=0, max_tokens=20)
        assert list(map(int, text.split())) == expected[: -1 if expected[-1] in ends else None]
    assert len(lengths) > 1


def test_a_padded_vocabulary_costs_what_theirs_does(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES["small"] | {"vocab_size": 16}))
    model.eval().save_pretrained(tmp_path)
    golden.tokenizer(tmp_path)
    mine = tl.load(tmp_path, "reference")
    assert mine.tokenizer.vocab_size == 11
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)("ab cab abc", return_tensors="pt")[
        "input_ids"
    ]
    (tmp_path / "text.txt").write_text("ab cab abc")
    expected = model(tokens, labels=tokens).loss.item()
    assert tl.evaluate(mine, tmp_path / "text.txt").loss == pytest.approx(expected, abs=1e-5)
