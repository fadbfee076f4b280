"""GPT-2 and the optimisers against PyTorch: Hugging Face's `GPT2LMHeadModel` with the same weights, and
`torch.optim` on the same model, batches and learning rates."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

from helpers import Batch, random_batch, relative
from tapeless.config import GPTConfig
from tapeless.layout import DECAYED, param_views
from tapeless.model import GPT
from tapeless.optim import learning_rates
from tapeless.presets import presets
from tapeless.settings import Training

torch = pytest.importorskip("torch", reason="the oracles need PyTorch")
transformers = pytest.importorskip("transformers", reason="the oracles need transformers")
pytestmark = pytest.mark.oracle

GPT2 = presets["gpt2"].model
SMALL = GPT2.replace(vocab_size=50, block_size=16, n_layer=3, n_head=4, n_embd=32, attention_tile=5)
WIDE = GPT2.replace(block_size=64, n_layer=2)  # 768 wide, 12 heads, 50,257 tokens
ENGINES = [("reference", "float64"), ("reference", "float32"), ("cpu", "float32")]
# Relative norms. A float32 sum of n numbers is off by up to n·6e-8 of their size, in practice by √n.
AGREE = {"float64": 1e-12, "float32": 1e-5}

# Where tapeless keeps what Hugging Face calls by these names. A Conv1D there is [in, out] as well.
WHOLE = {
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    "normf_w": "transformer.ln_f.weight",
    "normf_b": "transformer.ln_f.bias",
}
IN_LAYERS = {
    "norm1_w": "ln_1.weight",
    "norm1_b": "ln_1.bias",
    "wqkv": "attn.c_attn.weight",
    "bqkv": "attn.c_attn.bias",
    "wo": "attn.c_proj.weight",
    "bo": "attn.c_proj.bias",
    "norm2_w": "ln_2.weight",
    "norm2_b": "ln_2.bias",
    "w1": "mlp.c_fc.weight",
    "b1": "mlp.c_fc.bias",
    "w2": "mlp.c_proj.weight",
    "b2": "mlp.c_proj.bias",
}


def random_weights(config: GPTConfig, std: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that float32 holds exactly, so that every engine has the same: gains away from 1 and
    biases away from 0, else a mistake in them would not show."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, value in GPT(config, None).params.items():
        gain = name.startswith("norm") and name.endswith("_w")
        matrix = name in DECAYED
        weights[name] = rng.normal(1.0 if gain else 0.0, std if matrix else 0.2, value.shape)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def tapeless_gpt2(config: GPTConfig, weights: Any, engine: str, dtype: str) -> GPT:
    model = GPT(config, None, engine, dtype=dtype)
    for name, value in weights.items():
        model.params[name][...] = value
    return model


class HuggingFace:
    """GPT2LMHeadModel with given weights, without dropout."""

    def __init__(self, config: GPTConfig, weights: Any, dtype: str):
        self.config = config
        self.model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_inner=config.n_hidden,
                activation_function="gelu_new",
                layer_norm_epsilon=config.norm_eps,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                attn_implementation="eager",
            )
        )
        self.model.to(getattr(torch, dtype)).eval()
        mine = dict(self.model.named_parameters())  # the tied head once, as wte
        assert len(mine) == len(WHOLE) + config.n_layer * len(IN_LAYERS)
        self.parts: dict[str, list[Any]] = {name: [mine[theirs]] for name, theirs in WHOLE.items()}
        for name, theirs in IN_LAYERS.items():
            self.parts[name] = [mine[f"transformer.h.{l}.{theirs}"] for l in range(config.n_layer)]
        with torch.no_grad():
            for name, value in weights.items():
                layers = value if name in IN_LAYERS else [value]
                for parameter, part in zip(self.parts[name], layers, strict=True):
                    parameter.copy_(torch.tensor(part))

    def logits_and_loss(self, batch: Batch) -> tuple[Any, Any]:
        """Every document by itself, its positions from 0; the mean over all tokens."""
        rows, total = [], torch.zeros(())
        weights = np.ones(len(batch.tokens)) if batch.weights is None else batch.weights
        for s in range(len(batch.starts) - 1):
            span = slice(batch.starts[s], batch.starts[s + 1])
            logits = self.model(input_ids=torch.tensor(batch.tokens[span])[None]).logits[0]
            targets = torch.tensor(batch.targets[span])
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total = total + (losses * torch.tensor(weights[span] / weights.sum(), dtype=losses.dtype)).sum()
            rows.append(logits)
        return torch.cat(rows), total

    def _gather(self, name: str, parts: list[Any]) -> np.ndarray:
        arrays = [part.detach().numpy().copy() for part in parts]
        return np.stack(arrays) if name in IN_LAYERS else arrays[0]

    def params(self) -> dict[str, np.ndarray]:
        return {name: self._gather(name, parts) for name, parts in self.parts.items()}

    def grads(self) -> dict[str, np.ndarray]:
        return {name: self._gather(name, [p.grad for p in parts]) for name, parts in self.parts.items()}


class Answer(NamedTuple):
    """What Hugging Face computes in float64 for a model and batch."""

    config: GPTConfig
    weights: dict[str, np.ndarray]
    batch: Batch
    logits: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]


def answer(config: GPTConfig, std: float, lengths: list[int], weighted: bool) -> Answer:
    weights = random_weights(config, std)
    batch = random_batch(config, lengths, seed=1, weighted=weighted)
    theirs = HuggingFace(config, weights, "float64")
    logits, loss = theirs.logits_and_loss(batch)
    loss.backward()
    return Answer(config, weights, batch, logits.detach().numpy(), loss.item(), theirs.grads())


def compare(name: str, right: Answer, attention: str, engine: str, dtype: str) -> None:
    config = right.config.replace(attention=attention)
    model = tapeless_gpt2(config, right.weights, engine, dtype)
    limit = AGREE[dtype]
    loss = model.loss_and_grad(*right.batch)
    figures = {name: relative(g, right.grads[name]) for name, g in model.grads.items()}
    assert figures.keys() == right.grads.keys()
    # The loss and gradients above were of the same forward pass as these.
    logits = model.engine.a.logits[: len(right.batch.tokens)]
    figures["logits"] = relative(logits, right.logits)
    figures["loss"] = abs(loss - right.loss) / right.loss
    worst = max(figures, key=figures.__getitem__)
    print(f"{name}, {attention}, {engine} {dtype}: worst {worst} {figures[worst]:.1e}")
    assert all(np.linalg.norm(g) > 1e-4 for g in right.grads.values()), "nothing to compare"
    assert {name: f for name, f in figures.items() if not f <= limit} == {}


# ---------------------------------------------------------------- forward and backward

BATCHES = {
    "one document of a whole block": ([16], False),
    "packed documents": ([5, 1, 16, 9], False),
    "weighted tokens": ([7, 16, 1], True),
}


@pytest.fixture(scope="module", params=BATCHES)
def small(request):
    lengths, weighted = BATCHES[request.param]
    return answer(SMALL, 0.3, lengths, weighted)


@pytest.fixture(scope="module")
def wide():
    return answer(WIDE, 0.05, [64], weighted=False)


@pytest.mark.parametrize("attention", ["full", "flash"])
@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_gpt2_equals_hugging_face(small, attention, engine, dtype):
    compare("small", small, attention, engine, dtype)


@pytest.mark.parametrize(
    ("attention", "engine", "dtype"),
    [("full", "cpu", "float32"), ("flash", "cpu", "float32"), ("flash", "reference", "float64")],
)
def test_full_width_gpt2_equals_hugging_face(wide, attention, engine, dtype):
    compare("wide", wide, attention, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_the_loss_is_the_one_hugging_face_reports(engine, dtype):
    weights = random_weights(SMALL, 0.3)
    text = np.random.default_rng(2).integers(0, SMALL.vocab, SMALL.block_size)
    ids = torch.tensor(text)[None]
    theirs = HuggingFace(SMALL, weights, "float64").model(input_ids=ids, labels=ids).loss.item()
    mine = tapeless_gpt2(SMALL, weights, engine, dtype).loss(text[:-1], text[1:])
    # Hugging Face casts logits to float32 for its own loss, whatever the model's type.
    assert mine == pytest.approx(theirs, rel=1e-6)


# ---------------------------------------------------------------- optimisers

STEPS = 20
TRAINING = Training(
    steps=STEPS,
    lr=3e-3,
    min_lr=3e-4,
    schedule="cosine",
    warmup_steps=5,
    optimiser="adamw",
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    grad_clip=1.0,
)


def texts(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """A stream of tokens with something to learn, and spans of it: three documents a step."""
    rng = np.random.default_rng(3)
    stream = np.minimum(rng.geometric(0.2, 2000) - 1, vocab - 1).astype(np.int32)
    lengths = rng.integers(1, SMALL.block_size + 1, (STEPS, 3))
    first = rng.integers(0, len(stream) - SMALL.block_size - 1, (STEPS, 3))
    return stream, np.stack([first, lengths], axis=-1)


def batch_of(stream: np.ndarray, spans: np.ndarray) -> Batch:
    places = np.concatenate([np.arange(first, first + length) for first, length in spans])
    starts = np.concatenate([[0], np.cumsum(spans[:, 1])])
    return Batch(stream[places].astype(np.int64), stream[places + 1].astype(np.int64), starts)


def set_constants(model: GPT, t: Training) -> None:
    model.engine.optimiser.constants[:] = t.beta1, t.beta2, t.eps, t.weight_decay, t.momentum, t.grad_clip


def torch_optimiser(t: Training, decayed: list[Any], others: list[Any]) -> Any:
    groups = [{"params": decayed, "weight_decay": t.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if t.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=t.lr, momentum=t.momentum)
    if t.optimiser == "adam":
        return torch.optim.Adam(groups, lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps)
    return torch.optim.AdamW(groups, lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps)


def torch_step(t: Training, optimiser: Any, rate: float) -> float:
    """One step on the gradients that are there; the norm before clipping."""
    every = [p for group in optimiser.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(every, t.grad_clip or float("inf"))
    for group in optimiser.param_groups:
        group["lr"] = float(rate)
    optimiser.step()
    return float(norm)


# Relative to how far each tensor has moved in 20 steps, so that it would show if it had not.
MOVED = {"float64": 1e-12, "float32": 1e-4}
LOSSES = {"float64": 1e-13, "float32": 1e-6}


@pytest.mark.parametrize("clip", [1.0, 2.0])  # every step is clipped; some are and some are not
@pytest.mark.parametrize("attention", ["full", "flash"])
@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_training_equals_torch(attention, engine, dtype, clip):
    """AdamW from the gradients that each side computes by itself, with clipping, warm-up and cosine."""
    config, t = SMALL.replace(attention=attention), dataclasses.replace(TRAINING, grad_clip=clip)
    weights = random_weights(config, 0.05)
    stream, spans = texts(config.vocab)
    rates = learning_rates(t, 0, STEPS)

    theirs = HuggingFace(config, weights, dtype)
    decayed = [p for name, parts in theirs.parts.items() if name in DECAYED for p in parts]
    others = [p for name, parts in theirs.parts.items() if name not in DECAYED for p in parts]
    optimiser = torch_optimiser(t, decayed, others)
    losses, norms = [], []
    for rate, documents in zip(rates, spans, strict=True):
        optimiser.zero_grad()
        _, loss = theirs.logits_and_loss(batch_of(stream, documents))
        loss.backward()
        losses.append(loss.item())
        norms.append(torch_step(t, optimiser, rate))
    clipped = sum(norm > clip for norm in norms)
    assert clipped == STEPS if clip == 1 else 5 <= clipped <= STEPS - 5

    model = tapeless_gpt2(config, weights, engine, dtype)
    set_constants(model, t)
    mine = model.engine.train(stream, spans, rates, "adamw").losses
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(mine, losses, rtol=LOSSES[dtype])

    figures = {}
    for name, after in theirs.params().items():
        moved, expected = model.params[name] - weights[name], after - weights[name]
        if name == "bqkv":
            # A softmax ignores what a key's bias adds to all scores, so its gradient is zero but
            # for rounding, which Adam divides by its own size: no two programs agree on it. What
            # becomes of it is compared below, where both sides are given one gradient.
            C = config.n_embd
            moved, expected = (np.delete(x, np.s_[C : 2 * C], axis=1) for x in (moved, expected))
        figures[name] = relative(moved, expected)
    worst = max(figures, key=figures.__getitem__)
    print(
        f"training, clip {clip}, {attention}, {engine} {dtype}: worst {worst} {figures[worst]:.1e}", end=", "
    )
    print(f"losses {np.abs(mine / losses - 1).max():.1e}, norms {min(norms):.2f} to {max(norms):.2f}")
    assert {name: f for name, f in figures.items() if not f <= MOVED[dtype]} == {}


RULES = {
    "adamw": TRAINING,
    "adamw with strong decay": Training(
        steps=STEPS, lr=0.1, schedule="constant", optimiser="adamw", weight_decay=2.0
    ),
    "adam": Training(steps=STEPS, lr=0.01, schedule="linear", optimiser="adam", beta1=0.85, beta2=0.99),
    "adam with a large eps": Training(steps=STEPS, lr=0.1, optimiser="adam", eps=0.1, grad_clip=0.5),
    "sgd": Training(steps=STEPS, lr=0.5, schedule="constant", optimiser="sgd"),
    "sgd with momentum": Training(
        steps=STEPS, lr=0.1, warmup_steps=3, optimiser="sgd", momentum=0.9, grad_clip=1.0
    ),
}
# Both sides round at every step, so 20 steps leave a few times float32's 6e-8.
RULE = {"float64": 1e-13, "float32": 1e-6}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_update_rules_equal_torch(rule, engine, dtype):
    """Each optimiser on the very gradients that tapeless computed: every entry, after every step."""
    t = RULES[rule]
    weights = random_weights(SMALL, 0.05)
    stream, spans = texts(SMALL.vocab)
    rates = learning_rates(t, 0, STEPS)
    model = tapeless_gpt2(SMALL, weights, engine, dtype)
    set_constants(model, t)
    name_of = "sgd" if t.optimiser == "sgd" else "adamw"

    theirs = {name: torch.nn.Parameter(torch.tensor(value.copy())) for name, value in model.params.items()}
    optimiser = torch_optimiser(
        t,
        [p for name, p in theirs.items() if name in DECAYED],
        [p for name, p in theirs.items() if name not in DECAYED],
    )
    worst = 0.0
    gradients = param_views(model.config, model.engine.g)
    for k in range(STEPS):
        model.engine.train(stream, spans[k : k + 1], rates[k : k + 1], name_of)
        for name, p in theirs.items():
            p.grad = torch.tensor(gradients[name].copy())
        torch_step(t, optimiser, rates[k])
        for name, p in theirs.items():
            moved = p.detach().numpy() - weights[name]
            scale = max(np.abs(moved).max(), np.abs(weights[name]).max())
            worst = max(worst, float(np.abs(model.params[name] - p.detach().numpy()).max() / scale))
    moved = {name: relative(model.params[name], weights[name]) for name in theirs}
    print(f"{rule}, {engine} {dtype}: worst entry {worst:.1e}, least moved {min(moved.values()):.1e}")
    assert min(moved.values()) > 1e-3
    assert worst <= RULE[dtype]


# ---------------------------------------------------------------- learning rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_equal_torch_schedulers(schedule, warmup):
    steps, lr, low = 50, 3e-3, 2e-4
    t = Training(steps=steps, lr=lr, min_lr=low, schedule=schedule, warmup_steps=warmup)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    s = torch.optim.lr_scheduler
    falling = {
        "constant": lambda: s.ConstantLR(optimiser, factor=1.0),
        "linear": lambda: s.LinearLR(optimiser, 1.0, low / lr, total_iters=steps - warmup),
        "cosine": lambda: s.CosineAnnealingLR(optimiser, T_max=steps - warmup, eta_min=low),
    }[schedule]
    if warmup:
        rising = s.LambdaLR(optimiser, lambda i: min((i + 1) / warmup, 1.0))
        scheduler = s.SequentialLR(optimiser, [rising, falling()], milestones=[warmup])
    else:
        scheduler = falling()
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    np.testing.assert_allclose(learning_rates(t, 0, steps), rates, rtol=1e-10)
