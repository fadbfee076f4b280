"""The CPU engine against the reference, on the same weights and batches; generation against the
full forward pass; sampling against a sort."""

import hashlib
import importlib
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import tapeless as tl
from helpers import PRESETS, lengths_of, random_batch, random_model, relative
from tapeless.config import GPTConfig
from tapeless.ops import reference
from tapeless.ops.cpu import loss as cpu_loss

# Each config compiles for some seconds, so these few cover every branch of the schedule between
# them, and widths that fill vectors as well as ones that leave a rest.
CONFIGS = {
    "microgpt": PRESETS["microgpt"],
    "esp32gpt-rms": PRESETS["esp32gpt-rms"],
    "flashmicrogpt": PRESETS["flashmicrogpt"],
    "flash-four-streams": GPTConfig(
        vocab_size=13,
        block_size=7,
        n_layer=2,
        n_head=2,
        n_embd=12,
        norm_gain=True,
        norm_embed=True,
        attention="flash",
        attention_tile=3,
        residual="mhc",
        n_streams=4,
    ),
    "no-norm": GPTConfig(
        vocab_size=11,
        block_size=6,
        n_layer=1,
        n_head=2,
        n_embd=6,
        n_hidden=10,
        norm="none",
        norm_attn=False,
        norm_mlp=False,
        bias=True,
    ),
    "rms-gain": GPTConfig(
        vocab_size=33,
        block_size=20,
        n_layer=3,
        n_head=3,
        n_embd=33,
        n_hidden=70,
        norm="rms",
        norm_gain=True,
        norm_final=True,
        activation="gelu",
    ),
    "layer-bias": GPTConfig(
        vocab_size=19,
        block_size=5,
        n_layer=3,
        n_head=4,
        n_embd=32,
        norm="layer",
        norm_gain=True,
        norm_bias=True,
        norm_embed=True,
        norm_final=True,
        activation="gelu",
        bias=True,
        tied=True,
    ),
}


@pytest.fixture(scope="module")
def pair():
    """The same weights on both engines."""
    made = {}

    def get(name):
        if name not in made:
            cpu = random_model(CONFIGS[name], "cpu")
            exact = tl.GPT(CONFIGS[name], None, "reference")
            exact.engine.params[:] = cpu.engine.params
            made[name] = cpu, exact
        return made[name]

    return get


# ---------------------------------------------------------------- loss, logits, gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_logits_and_gradients(pair, name):
    cpu, exact = pair(name)

    @given(lengths_of(cpu.config, 8), st.integers(0, 9999), st.booleans())
    @settings(max_examples=50)
    def check(lengths, seed, weighted):
        batch = random_batch(cpu.config, lengths, seed, weighted)
        assert abs(cpu.loss_and_grad(*batch) - exact.loss_and_grad(*batch)) <= 1e-5
        n = sum(lengths)
        np.testing.assert_allclose(cpu.engine.a.logits[:n], exact.engine.a.logits[:n], rtol=0, atol=1e-4)
        # Where a relu's input is zero to rounding, float32 may rightly see it on the other side.
        if cpu.config.activation == "relu" and np.abs(exact.engine.a.u[:, :n]).min() < 1e-5:
            return
        compared.append(1)
        # Where the terms of a gradient cancel (a scale before a norm), float32 leaves their rounding:
        # NumPy in float32 comes to 2.4e-7 of the whole here.
        noise = 5e-7 * np.linalg.norm(exact.engine.grads)
        for tensor, g in cpu.grads.items():
            apart = np.linalg.norm(g - exact.grads[tensor])
            assert apart <= 1e-4 * np.linalg.norm(exact.grads[tensor]) + noise, tensor

    compared = []
    check()
    assert len(compared) >= 30


def test_buffers_keep_room_for_the_largest_of_each():
    """Of tokens and of documents: otherwise batches that take turns would allocate every time."""
    engine = tl.GPT(PRESETS["microgpt"], None, "reference").engine
    engine.reserve(64, 2)
    engine.reserve(16, 8)
    logits = engine.a.logits
    assert logits.shape[0] == 64
    engine.reserve(64, 8)
    assert engine.a.logits is logits


def test_small_batches_after_large_ones(pair):
    """Buffers keep what an earlier, larger batch left in them; none of it may count."""
    cpu, _ = pair("no-norm")
    small = random_batch(cpu.config, [3, 1], 0)
    fresh = random_model(cpu.config, "cpu")
    loss = fresh.loss_and_grad(*small)
    cpu.loss_and_grad(*random_batch(cpu.config, [6] * 8, 1))
    assert cpu.loss_and_grad(*small) == loss
    assert np.array_equal(cpu.engine.grads, fresh.engine.grads)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_queries_and_keys_of_single_tokens_have_zero_gradient(name, engine):
    """A softmax over one key is constant. Adam divides a gradient by its own size, so rounding noise in
    place of this zero would become a full step: it must be zero to the last bit."""
    config = CONFIGS[name]
    model = random_model(config, engine, "float32")
    C = config.n_embd
    model.loss_and_grad(*random_batch(config, [1] * 9, 0, weighted=True))
    assert not model.grads["wqkv"][:, :, : 2 * C].any()
    assert model.grads["wqkv"][:, :, 2 * C :].all()
    if config.bias:
        assert not model.grads["bqkv"][:, : 2 * C].any()
    # The first query of a longer document has one key too.
    batch = random_batch(config, [4, 1, 5], 0)
    model.loss_and_grad(*batch)
    assert not model.engine.d.qkv[batch.starts[:-1], :C].any()
    assert model.engine.d.qkv[[1, 2, 3, 6, 7, 8, 9], :C].any(axis=1).all()


# ---------------------------------------------------------------- training


def training_data(config, steps=60, batch_size=3):
    rng = np.random.default_rng(0)
    stream = rng.integers(0, config.vocab, 500, dtype=np.int32)
    lengths = rng.integers(1, config.block_size + 1, (steps, batch_size))
    spans = np.stack([rng.integers(0, 480, (steps, batch_size)), lengths], axis=2)
    return stream, spans.astype(np.int64), np.linspace(0.01, 0.001, steps)


def trained(engine, pieces=(), config=PRESETS["microgpt"]):
    """Losses and parameters after training in pieces that end at these steps."""
    e = random_model(config, engine).engine
    e.optimiser.constants[:3] = 0.85, 0.99, 1e-8
    stream, spans, lrs = training_data(config)
    cuts = [0, *pieces, len(lrs)]
    losses = [e.train(stream, spans[a:b], lrs[a:b]).losses for a, b in itertools.pairwise(cuts) if a < b]
    return np.concatenate(losses), e.params


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("pieces", [(), (1,), (1, 2, 3, 40), tuple(range(60))], ids=len)
def test_training_in_pieces_repeats_bit_for_bit(engine, pieces):
    losses, params = trained(engine)
    losses_again, params_again = trained(engine, pieces)
    assert losses_again.tobytes() == losses.tobytes()
    assert params_again.tobytes() == params.tobytes()


def test_training_on_batches_agrees():
    cpu, exact = trained("cpu"), trained("reference")
    np.testing.assert_allclose(cpu[0], exact[0], rtol=0, atol=1e-4)
    assert relative(cpu[1], exact[1]) <= 1e-4


def test_the_clock_changes_no_result(monkeypatch):
    """Training goes in chunks whose size follows the clock."""
    results = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(importlib.import_module("tapeless.train"), "CHUNK_SECONDS", seconds)
        run = tl.train("names", steps=100, samples=5, progress=False)
        results.append((run.losses.tobytes(), run.model.engine.params.tobytes(), run.samples))
    assert results[0] == results[1]


TRAIN_A_LITTLE = """
import hashlib, tapeless as tl
run = tl.train("names", steps=50, samples=3, seed=7, progress=False)
print(hashlib.sha256(run.losses.tobytes() + run.model.engine.params.tobytes()).hexdigest(), run.samples)
"""


def test_two_processes_train_alike(child):
    run = tl.train("names", steps=50, samples=3, seed=7, progress=False)
    digest = hashlib.sha256(run.losses.tobytes() + run.model.engine.params.tobytes()).hexdigest()
    assert child(TRAIN_A_LITTLE) == f"{digest} {run.samples}"
    other = tl.train("names", steps=50, samples=3, seed=8, progress=False)
    assert not np.array_equal(other.losses, run.losses)


# ---------------------------------------------------------------- decoding


def last_logits(engine, prompt):
    """Logits after the prompt, by decoding it token by token from cached keys and values."""
    engine.generate(prompt, 1, 1, np.array([0.5]))
    return engine._decoding[0][0].logits[0]


@pytest.mark.parametrize("name", ["microgpt", "no-norm", "layer-bias"])
def test_decoding_is_the_full_forward_pass(pair, name):
    cpu, exact = pair(name)
    T = cpu.config.block_size

    @given(st.integers(1, 2 * T + 1), st.integers(0, 9999))
    @settings(max_examples=30)
    def check(length, seed):
        prompt = np.random.default_rng(seed).integers(0, cpu.config.vocab, length)
        # Positions end at the block: after that the last T tokens are a document of their own.
        full = exact.logits(prompt[-T:])[-1]
        np.testing.assert_allclose(last_logits(exact.engine, prompt), full, rtol=0, atol=1e-12)
        np.testing.assert_allclose(last_logits(cpu.engine, prompt), full, rtol=0, atol=1e-5)

    check()


def allowed(logits, temperature, top_k, top_p):
    """Probabilities of the tokens that may be drawn, by sorting: the definition, spelled out."""
    z = np.asarray(logits, np.float64)
    probs = np.exp((z - z.max()) / temperature)
    if 0 < top_k < len(z):
        probs[z < sorted(z)[-top_k]] = 0
    if top_p < 1:
        ranked = sorted(probs, reverse=True)
        reached, border = 0.0, 0.0
        for border in ranked:
            reached += border
            if reached >= top_p * sum(ranked):
                break
        probs[probs < border] = 0
    return probs


def generate_slowly(model, prompt, n, max_tokens, uniforms, eos, drawn, temperature, top_k, top_p):
    """What `Engine.generate` should give, with a full forward pass for each token; and how near any
    choice came to going the other way."""
    T = model.config.block_size
    rows, used, margin = [], 0, np.inf
    for _ in range(n):
        row = list(prompt)
        while len(row) < len(prompt) + max_tokens:
            logits = model.logits(np.array(row[-T:]))[-1][:drawn]
            if temperature == 0:
                token = int(np.argmax(logits))
                margin = min(margin, np.subtract(*np.sort(logits)[[-1, -2]]))
            else:
                probs = allowed(logits, temperature, top_k, top_p)
                edges = np.cumsum(probs) / probs.sum()
                token = int(np.searchsorted(edges, uniforms[used], side="right"))
                margin = min(margin, np.abs(edges - uniforms[used]).min())
                if top_p < 1:
                    everything = allowed(logits, temperature, top_k, 1)
                    reached = np.cumsum(np.sort(everything)[::-1]) / everything.sum()
                    margin = min(margin, np.abs(reached - top_p).min())
            used += 1
            if token in eos:
                break
            row.append(token)
        rows.append(row[len(prompt) :])
    return rows, used, margin


@pytest.mark.parametrize("name", ["microgpt", "no-norm", "layer-bias"])
def test_generation_is_the_full_forward_pass_token_by_token(pair, name):
    """Several samples from one prompt share its cache; they stop at each token that ends a text, draw only
    what may be drawn, run beyond the block, and use one uniform number for each token."""
    cpu, exact = pair(name)
    V, T = cpu.config.vocab, cpu.config.block_size

    @given(
        prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=T + 2),
        seed=st.integers(0, 9999),
        eos=st.sampled_from([[], [0], [V - 1], [1, V - 2, 0]]),
        drawn=st.sampled_from([None, 2, V - 1, V]),
        temperature=st.sampled_from([0, 0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 3]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
    )
    @settings(max_examples=25)
    def check(prompt, seed, **options):
        n, max_tokens = 3, T + 2
        uniforms = np.random.default_rng(seed).random(n * max_tokens)
        options["uniforms"] = uniforms
        rows, used, margin = generate_slowly(exact, prompt, n, max_tokens, **options)
        assume(margin > 1e-5)  # nearer than that, float32 may rightly choose the neighbour
        for model in (exact, cpu):
            got, got_used = model.engine.generate(prompt, n, max_tokens, **options)
            assert [list(row) for row in got] == rows
            assert got_used == used

    check()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [4, 3], ids=["whole-vectors", "odd"])
def test_long_prompts_are_read_in_pieces(heads, threads):
    """Of 64 tokens, and whatever is left but the last; up to the block, and beyond it."""
    config = PRESETS["microgpt"].replace(n_layer=2, n_head=heads, n_embd=8 * heads, block_size=140)
    exact = random_model(config)
    cpu = tl.GPT(config, None, threads=threads)
    cpu.engine.params[:] = exact.engine.params
    rng = np.random.default_rng(heads)
    for length in (1, 2, 9, 64, 65, 66, 67, 129, 130, 138, 140, 150):
        prompt, uniforms = rng.integers(0, config.vocab, length).tolist(), rng.random(6)
        options = {
            "eos": [],
            "drawn": None,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "uniforms": uniforms,
        }
        rows, used, margin = generate_slowly(exact, prompt, 2, 3, **options)
        assert margin > 1e-5, "another seed, please: float32 may choose the neighbour here"
        for model in (exact, cpu):
            got, got_used = model.engine.generate(prompt, 2, 3, **options)
            assert ([row.tolist() for row in got], got_used) == (rows, used)


# ---------------------------------------------------------------- sampling


@st.composite
def some_logits(draw):
    """Logits in float32, some of them with ties.

    In steps of 2⁻¹⁶, as the compiled sampler finds its border by halving the range 64 times and takes
    logits nearer than 2⁻⁶⁴ of it, like 0 and 1e-22, for ties; their probabilities do not differ.
    """
    size = draw(st.integers(1, 40))
    values = st.integers(-20 * 2**16, 20 * 2**16).map(lambda i: i / 2**16) | st.integers(-3, 3)
    return draw(arrays(np.float32, size, elements=values.map(np.float32)))


SAMPLERS = {"reference": reference.sample_token, "cpu": cpu_loss.sample_token}
temperatures = st.floats(0.05, 5)
top_ks = st.integers(0, 45)
top_ps = st.integers(1, 1000).map(lambda i: i / 1000)
uniforms = st.floats(0, 1)  # 1 too: u32 / 2³² rounds up to it in float32


@given(some_logits(), st.just(0) | temperatures, top_ks, top_ps, uniforms)
@settings(max_examples=500)
def test_both_engines_choose_the_same_token(logits, temperature, top_k, top_p, uniform):
    a, b = (f(np.empty(len(logits)), logits, temperature, top_k, top_p, uniform) for f in SAMPLERS.values())
    assert a == b


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
@given(logits=some_logits(), temperature=temperatures, top_k=top_ks, top_p=top_ps, uniform=uniforms)
@settings(max_examples=150)
def test_greedy_and_top_1_are_argmax(sample, logits, temperature, top_k, top_p, uniform):
    scratch = np.empty(len(logits))
    assert sample(scratch, logits, 0, top_k, top_p, uniform) == np.argmax(logits)
    # Ties stay in, so that top_k = 1 may draw any of several largest logits.
    chosen = sample(scratch, logits, temperature, 1, top_p, uniform)
    assert logits[chosen] == logits.max()
    if np.sum(logits == logits.max()) == 1:
        assert chosen == np.argmax(logits)


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
@given(logits=some_logits(), temperature=temperatures, top_k=top_ks, top_p=top_ps)
@settings(max_examples=150)
def test_exactly_the_allowed_tokens_can_be_drawn(sample, logits, temperature, top_k, top_p):
    """A uniform number in the middle of each allowed token's interval draws that token, so the kept set
    is right and so are the shares; a token outside the set has no interval."""
    probs = allowed(logits, temperature, top_k, top_p)
    everything = allowed(logits, temperature, top_k, 1)
    reached = np.cumsum(np.sort(everything)[::-1]) / everything.sum()
    # Where a sum meets top_p up to rounding, the order of additions decides.
    assume(top_p == 1 or np.abs(reached - top_p).min() > 1e-12)
    edges = np.concatenate([[0], np.cumsum(probs) / probs.sum()])
    for v in np.flatnonzero(np.diff(edges) > 1e-12):
        middle = (edges[v] + edges[v + 1]) / 2
        assert sample(np.empty(len(logits)), logits, temperature, top_k, top_p, middle) == v
    for uniform in (0.0, np.nextafter(1.0, 0.0), 1.0):
        assert probs[sample(np.empty(len(logits)), logits, temperature, top_k, top_p, uniform)] > 0


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_an_interval_has_its_lower_end_but_not_its_upper(sample):
    """As random.choices has it: of four equal tokens, 0.25 is the second's."""
    logits = np.zeros(4, np.float32)
    chosen = [sample(np.empty(4), logits, 1, 0, 1, u) for u in (0, 0.25, 0.5, 0.75, 1)]
    assert chosen == [0, 1, 2, 3, 3]
