"""The published figures: microgpt's and esp32gpt's losses and samples, digit for digit."""

import random
from pathlib import Path

import autograd
import autograd.numpy as anp
import numpy as np
import pytest

import tapeless as tl

MICROGPT_LOSSES = {1: 3.3660, 2: 3.4243, 3: 3.1778, 100: 3.3669, 500: 2.0645, 1000: 2.6497}
MICROGPT_SAMPLES = (
    "kamon, ann, karai, jaire, vialan, karia, yeran, anna, areli, kaina, "
    "konna, keylen, liole, alerin, earan, lenne, kana, lara, alela, anton"
)
ESP32GPT_LOSSES = {0: 3.3071, 100: 2.4193, 500: 1.9888, 999: 2.0980}
ESP32GPT_SAMPLES = {"arishel", "arona", "raeli", "cealin", "mosile", "malie", "sunaya"}
# Of its later change, RMSNorm before q, k and v, at temperature 0.5.
ESP32GPT_RMS_SAMPLES = ["arelo", "feaay", "barema"]


@pytest.fixture(scope="module")
def run(names):
    """Each run of a thousand steps, made once."""
    done = {}

    def get(preset, engine, **options):
        if (preset, engine) not in done:
            done[preset, engine] = tl.train(names, preset=preset, engine=engine, progress=False, **options)
        return done[preset, engine]

    return get


def test_microgpt_on_the_reference(run):
    result = run("microgpt", "reference")
    assert len(result.losses) == 1000
    for step, loss in MICROGPT_LOSSES.items():
        assert f"{result.losses[step - 1]:.4f}" == f"{loss:.4f}", f"step {step}"
    assert ", ".join(result.samples) == MICROGPT_SAMPLES


def test_microgpt_on_the_cpu(run):
    result = run("microgpt", "cpu")
    assert np.abs(result.losses - run("microgpt", "reference").losses).max() <= 1e-5
    assert ", ".join(result.samples) == MICROGPT_SAMPLES


def test_esp32gpt_on_the_reference(run):
    result = run("esp32gpt", "reference")
    assert len(result.losses) == 1000
    for step, loss in ESP32GPT_LOSSES.items():
        assert f"{result.losses[step]:.4f}" == f"{loss:.4f}", f"step {step}"
    assert len(result.samples) == 20
    assert set(result.samples) >= ESP32GPT_SAMPLES


def test_esp32gpt_on_the_cpu(run):
    result = run("esp32gpt", "cpu")
    assert np.abs(result.losses - run("esp32gpt", "reference").losses).max() <= 2e-4
    assert len(result.samples) == 20
    assert set(result.samples) >= ESP32GPT_SAMPLES


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_esp32gpt_rms_generates_its_names(run, engine):
    result = run("esp32gpt-rms", engine, temperature=0.5)
    assert len(result.samples) == 20
    assert result.samples[:3] == ESP32GPT_RMS_SAMPLES


# ---------------------------------------------------------------- an oracle that shares no code


class Oracle:
    """microgpt from its description alone: the forward pass token by token, `[out][in]` matrices as
    it has them, gradients by tracing (HIPS autograd), random numbers from Python's module."""

    C, H, L, T = 16, 4, 1, 16

    def __init__(self, path, seed):
        random.seed(seed)
        self.docs = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        random.shuffle(self.docs)
        self.chars = sorted(set("".join(self.docs)))
        self.bos = len(self.chars)
        C, V = self.C, len(self.chars) + 1
        shapes = {"wte": (V, C), "wpe": (self.T, C), "lm_head": (V, C)}
        for l in range(self.L):
            shapes |= {f"{l}.{w}": (C, C) for w in ("wq", "wk", "wv", "wo")}
            shapes |= {f"{l}.fc1": (4 * C, C), f"{l}.fc2": (C, 4 * C)}
        self.p = {
            name: np.array([[random.gauss(0, 0.08) for _ in range(columns)] for _ in range(rows)])
            for name, (rows, columns) in shapes.items()
        }

    def loss(self, p, doc):
        def rmsnorm(x):
            return x * (anp.mean(x * x) + 1e-5) ** -0.5

        tokens = [self.bos, *map(self.chars.index, doc), self.bos]
        n = min(self.T, len(tokens) - 1)
        keys, values = [[] for _ in range(self.L)], [[] for _ in range(self.L)]
        K = self.C // self.H
        total = 0.0
        for t in range(n):
            x = rmsnorm(p["wte"][tokens[t]] + p["wpe"][t])
            for l in range(self.L):
                h = rmsnorm(x)
                q = p[f"{l}.wq"] @ h
                keys[l].append(p[f"{l}.wk"] @ h)
                values[l].append(p[f"{l}.wv"] @ h)
                heads = []
                for head in range(self.H):
                    part = slice(head * K, (head + 1) * K)
                    scores = anp.array([q[part] @ key[part] / K**0.5 for key in keys[l]])
                    weights = anp.exp(scores - anp.max(scores))
                    weights = weights / anp.sum(weights)
                    heads.append(sum(w * value[part] for w, value in zip(weights, values[l], strict=True)))
                x = x + p[f"{l}.wo"] @ anp.concatenate(heads)
                x = x + p[f"{l}.fc2"] @ anp.maximum(p[f"{l}.fc1"] @ rmsnorm(x), 0)
            logits = p["lm_head"] @ x
            total = total + anp.log(anp.sum(anp.exp(logits))) - logits[tokens[t + 1]]
        return total / n

    def document(self, step):
        return self.docs[step % len(self.docs)]

    def train(self, steps, of):
        m = {name: np.zeros_like(w) for name, w in self.p.items()}
        v = {name: np.zeros_like(w) for name, w in self.p.items()}
        loss_and_grad = autograd.value_and_grad(self.loss)
        losses = []
        for i in range(steps):
            loss, g = loss_and_grad(self.p, self.document(i))
            losses.append(loss)
            for name in self.p:
                m[name] = 0.85 * m[name] + 0.15 * g[name]
                v[name] = 0.99 * v[name] + 0.01 * g[name] ** 2
                m_hat, v_hat = m[name] / (1 - 0.85 ** (i + 1)), v[name] / (1 - 0.99 ** (i + 1))
                self.p[name] -= 0.01 * (1 - i / of) * m_hat / (v_hat**0.5 + 1e-8)
        return losses


def test_microgpt_against_the_oracle(names, run):
    losses = Oracle(names, seed=42).train(20, of=1000)
    np.testing.assert_allclose(run("microgpt", "reference").losses[:20], losses, rtol=0, atol=1e-9)


class Esp32Oracle:
    """esp32gpt with RMSNorm from its description alone: xorshift32, Box-Muller in float32, matrices
    `[in][out]` in one draw after the other; the norm feeds q, k and v, and the residual keeps the raw
    embedding."""

    C, H, T, V = 16, 4, 16, 27

    def __init__(self, path, seed):
        self.docs = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        self.state, self.spare = seed, None
        C, F = self.C, 4 * self.C
        shapes = {"wte": (self.V, C), "wpe": (self.T, C)} | dict.fromkeys(("wq", "wk", "wv", "wo"), (C, C))
        shapes |= {"w1": (C, F), "w2": (F, C), "wout": (C, self.V)}
        self.p = {
            name: np.array([[self.gauss() for _ in range(columns)] for _ in range(rows)])
            for name, (rows, columns) in shapes.items()
        }

    def next(self):
        x = self.state
        x ^= x << 13 & 0xFFFFFFFF
        x ^= x >> 17
        x ^= x << 5 & 0xFFFFFFFF
        self.state = x
        return x

    def gauss(self):
        if self.spare is not None:
            g, self.spare = self.spare, None
        else:
            while (u := np.float32(self.next()) / np.float32(2**32)) <= 1e-10:
                pass
            angle = np.float32(2 * np.pi) * (np.float32(self.next()) / np.float32(2**32))
            radius = np.sqrt(np.float32(-2) * np.log(u))
            g, self.spare = radius * np.cos(angle), radius * np.sin(angle)
        return 0.1 * float(g)

    def loss(self, p, doc):
        ids = [0, *(ord(c) - ord("a") + 1 for c in doc), 0]
        tokens, targets = np.array(ids[:-1]), np.array(ids[1:])
        n, K = len(tokens), self.C // self.H
        x = p["wte"][tokens] + p["wpe"][:n]
        h = x * (anp.mean(x * x, axis=1, keepdims=True) + 1e-5) ** -0.5
        q, k, v = h @ p["wq"], h @ p["wk"], h @ p["wv"]
        later = np.where(np.tril(np.ones((n, n))) > 0, 0, -np.inf)
        heads = []
        for i in range(self.H):
            part = slice(i * K, (i + 1) * K)
            scores = anp.exp(q[:, part] @ k[:, part].T / K**0.5 + later)
            heads.append(scores / anp.sum(scores, axis=1, keepdims=True) @ v[:, part])
        x = x + anp.concatenate(heads, axis=1) @ p["wo"]
        x = x + anp.maximum(x @ p["w1"], 0) @ p["w2"]
        logits = x @ p["wout"]
        return anp.mean(anp.log(anp.sum(anp.exp(logits), axis=1)) - logits[np.arange(n), targets])

    def document(self, step):
        while len(doc := self.docs[self.next() % len(self.docs)]) >= self.T:
            pass
        return doc

    train = Oracle.train


@pytest.fixture(scope="module")
def esp32_losses():
    """A thousand of them, on the built-in names."""
    return Esp32Oracle(Path(tl.__file__).parent / "data/names.txt", seed=42).train(1000, of=1000)


@pytest.mark.parametrize(("engine", "tolerance"), [("reference", 1e-6), ("cpu", 1e-5)])
def test_esp32gpt_rms_against_the_oracle(engine, tolerance, esp32_losses):
    losses = tl.train("names", preset="esp32gpt-rms", engine=engine, samples=0, progress=False).losses
    np.testing.assert_allclose(losses, esp32_losses, rtol=0, atol=tolerance)
