"""Every op's mathematics, in NumPy: one pair `X_forward` / `X_backward` after the other.

Conventions of all ops:

* Buffers come from the caller; an op writes into its first arguments and reads the others.
  Only the first `n` rows (the tokens of this batch) are read or written.
* `dX` is the gradient of the loss with respect to `X`. A backward op **overwrites** gradients of
  activations and **adds to** gradients of parameters. (The backward of a norm adds to `dx` as well:
  it sits beside a residual connection, whose gradient is there already.)
* An absent bias or gain is an array of size zero.

Shapes: N tokens, V vocabulary, C embedding width, T block size, H heads, K = C/H head width.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

# ---------------------------------------------------------------- moving numbers


def pack(batch, stream, spans, weight):
    """Fill `batch` from spans [B, 2] of the token stream, packed end to end.

    Span s = (start, length) has inputs `stream[start : start+length]` and targets one further.
    Positions restart at 0 in each. `weight` is one token's: 1 over the tokens of the whole step, of which
    this may be a part, so that losses of all its parts add up to the mean over tokens.
    """
    n = 0
    for s, (start, length) in enumerate(spans):
        here = slice(n, n + length)
        batch.tokens[here] = stream[start : start + length]
        batch.targets[here] = stream[start + 1 : start + length + 1]
        batch.positions[here] = np.arange(length)
        batch.starts[s] = n
        n += length
    batch.weights[:n] = weight
    batch.starts[len(spans)] = n
    batch.sizes[:] = n, len(spans)


def rows(batch):
    """How many rows the batch has. Here one thread does them all."""
    return batch.sizes[0]


def documents(batch):
    """(first, end) of each document of the batch."""
    return [(batch.starts[s], batch.starts[s + 1]) for s in range(batch.sizes[1])]


def take(batch, n):
    """Let the batch have its first n rows."""
    batch.sizes[0] = n


def meet(rows):
    """Wait until all threads are here. Here there is one."""


def zero(x, n):
    """x[:n] = 0"""
    x[:n] = 0


def accumulate(y, x, n):
    """y += x"""
    y[:n] += x[:n]


def add_forward(y, x, f, n):
    """Residual connection: y = x + f, all [N, C]. Backward is the identity twice: dx = df = dy,
    so the schedule hands the same buffer to both branches and there is no op for it."""
    y[:n] = x[:n] + f[:n]


# ---------------------------------------------------------------- embedding


def embed_forward(x, wte, wpe, tokens, positions, n):
    """x[t] = wte[token_t] + wpe[position_t];  x [N, C], wte [V, C], wpe [T, C]."""
    x[:n] = wte[tokens[:n]] + wpe[positions[:n]]


def embed_backward(dwte, dwpe, dx, tokens, positions, n):
    """Each row of dx flows back to the two rows it was the sum of; rows used more than once collect.

    dwte[token_t] += dx[t];  dwpe[position_t] += dx[t]
    """
    np.add.at(dwte, tokens[:n], dx[:n])
    np.add.at(dwpe, positions[:n], dx[:n])


# ---------------------------------------------------------------- norms


def rmsnorm_forward(y, mean, rstd, x, w, b, n, eps):
    """y = w · x · r with r = (mean_c x² + ε)^-½, per row;  x, y [N, C], r = rstd [N], gain w [C] or none.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.
    `mean` and `b` belong to LayerNorm, which has the same signature; they are not used here.
    """
    rstd[:n] = (np.mean(x[:n] ** 2, axis=-1) + eps) ** -0.5
    y[:n] = x[:n] * rstd[:n, None]
    if w.size:
        y[:n] *= w


def rmsnorm_backward(dx, dw, db, dy, x, mean, rstd, w, n):
    """With x̂ = x·r and g = w·dy:  dw += Σ_t dy·x̂,  dx += r · (g − x̂ · mean_c(g·x̂)).

    r depends on every x_c: ∂r/∂x_c = −r³·x_c/C; that is the second term.
    """
    r = rstd[:n, None]
    xhat = x[:n] * r
    g = dy[:n] * w if w.size else dy[:n]
    if w.size:
        dw += np.sum(dy[:n] * xhat, axis=0)
    dx[:n] += r * (g - xhat * np.mean(g * xhat, axis=-1, keepdims=True))


def layernorm_forward(y, mean, rstd, x, w, b, n, eps):
    """y = w · x̂ + b with x̂ = (x − μ)·r, μ = mean_c x, r = (mean_c (x−μ)² + ε)^-½, per row.

    x, y [N, C]; mean, rstd [N]; gain w and bias b [C] or none.
    Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv:1607.06450, eq. 4.
    """
    mean[:n] = np.mean(x[:n], axis=-1)
    centred = x[:n] - mean[:n, None]
    rstd[:n] = (np.mean(centred**2, axis=-1) + eps) ** -0.5
    y[:n] = centred * rstd[:n, None]
    if w.size:
        y[:n] *= w
    if b.size:
        y[:n] += b


def layernorm_backward(dx, dw, db, dy, x, mean, rstd, w, n):
    """With g = w·dy:  dw += Σ_t dy·x̂,  db += Σ_t dy,  dx += r · (g − mean_c g − x̂ · mean_c(g·x̂)).

    μ and r both depend on every x_c: the two means are those two paths.
    """
    r = rstd[:n, None]
    xhat = (x[:n] - mean[:n, None]) * r
    g = dy[:n] * w if w.size else dy[:n]
    if w.size:
        dw += np.sum(dy[:n] * xhat, axis=0)
    if db.size:
        db += np.sum(dy[:n], axis=0)
    along_mean = np.mean(g, axis=-1, keepdims=True)
    along_x = np.mean(g * xhat, axis=-1, keepdims=True)
    dx[:n] += r * (g - along_mean - xhat * along_x)


# ---------------------------------------------------------------- linear layers


def linear_forward(y, x, w, b, n):
    """y = x·w + b;  x [N, I], w [I, O], b [O] or none, y [N, O]."""
    np.matmul(x[:n], w, out=y[:n])
    if b.size:
        y[:n] += b


def linear_backward(dx, dw, db, dy, x, w, n):
    """dx = dy·wᵀ,  dw += xᵀ·dy,  db += Σ_t dy.

    y_to = Σ_i x_ti w_io: each w_io meets every row, so its gradient is a sum over rows.
    """
    np.matmul(dy[:n], w.T, out=dx[:n])
    dw += x[:n].T @ dy[:n]
    if db.size:
        db += np.sum(dy[:n], axis=0)


def tied_head_forward(logits, x, wte, n):
    """logits = x·wteᵀ: the token embedding read the other way;  x [N, C], wte [V, C], logits [N, V].

    Press and Wolf 2017, "Using the Output Embedding to Improve Language Models", arXiv:1608.05859.
    """
    np.matmul(x[:n], wte.T, out=logits[:n])


def tied_head_backward(dx, dwte, dlogits, x, wte, n):
    """dx = dlogits·wte,  dwte += dlogitsᵀ·x. `embed_backward` adds the other use's gradient later."""
    np.matmul(dlogits[:n], wte, out=dx[:n])
    dwte += dlogits[:n].T @ x[:n]


# ---------------------------------------------------------------- linear layers in bfloat16


def as_bfloat16(x):
    """The nearest bfloat16s, of two as near the even one, in x's own type; zero for numbers below 2⁻¹²⁶."""
    import ml_dtypes

    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are what they should be
        single = x.astype(np.float32)
        near = single.astype(ml_dtypes.bfloat16).astype(x.dtype)
    return np.where(np.abs(single) < np.finfo(np.float32).tiny, np.copysign(0, x), near)


def in_bfloat16():
    """All ops, those of linear layers and the head with both operands of each product rounded to bfloat16.

    That is y = ⌊x⌉·⌊w⌉ + b;  dx = ⌊dy⌉·⌊w⌉ᵀ,  dw += ⌊x⌉ᵀ·⌊dy⌉,  db += Σ_t dy. Rounding counts as if its
    derivative were 1 (the straight-through estimator: Bengio, Léonard and Courville 2013, arXiv:1308.3432).
    """
    near = as_bfloat16

    def linear(y, x, w, b, n):
        linear_forward(y, near(x[:n]), near(w), b, n)

    def linear_grads(dx, dw, db, dy, x, w, n):
        linear_backward(dx, dw, db[:0], near(dy[:n]), near(x[:n]), near(w), n)
        if db.size:
            db += np.sum(dy[:n], axis=0)

    def head(logits, x, wte, n):
        tied_head_forward(logits, near(x[:n]), near(wte), n)

    def head_grads(dx, dwte, dlogits, x, wte, n):
        tied_head_backward(dx, dwte, near(dlogits[:n]), near(x[:n]), near(wte), n)

    rounded = {
        "linear_forward": linear,
        "linear_backward": linear_grads,
        "tied_head_forward": head,
        "tied_head_backward": head_grads,
    }
    return SimpleNamespace(**globals() | rounded)


# ---------------------------------------------------------------- activations


def relu_forward(v, u, n):
    """v = max(u, 0);  u, v [N, F]."""
    np.maximum(u[:n], 0, out=v[:n])


def relu_backward(du, dv, u, n):
    """du = dv where u > 0, else 0. (At u = 0 either one-sided derivative would do; we take 0.)"""
    np.multiply(dv[:n], u[:n] > 0, out=du[:n])


GELU_SCALE = (2 / np.pi) ** 0.5
GELU_CUBIC = 0.044715


def gelu_forward(v, u, n):
    """v = ½u(1 + tanh s) with s = √(2/π)·(u + 0.044715·u³);  u, v [N, F].

    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415, section 2.
    """
    z = u[:n]
    v[:n] = 0.5 * z * (1 + np.tanh(GELU_SCALE * (z + GELU_CUBIC * z**3)))


def gelu_backward(du, dv, u, n):
    """du = dv · (½(1 + tanh s) + ½u(1 − tanh² s)·s') with s' = √(2/π)·(1 + 3·0.044715·u²)."""
    z = u[:n]
    tanh = np.tanh(GELU_SCALE * (z + GELU_CUBIC * z**3))
    slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * z**2)
    du[:n] = dv[:n] * (0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * slope)


# ---------------------------------------------------------------- attention


def split_heads(x, n_head):
    """[n, H·K] as [H, n, K] (a view)."""
    return x.reshape(len(x), n_head, -1).transpose(1, 0, 2)


def attention_forward(out, probs, qkv, docs):
    """Causal multi-head attention inside each document; keeps the probabilities.

    Per head:  S = q·kᵀ/√K,  P = softmax over s ≤ t,  out = P·v.
    qkv [N, 3C] = q | k | v;  out [N, C];  probs [N, H, T]: probs[t, h, j] is the weight of the j-th
    token of t's document.  Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, eq. 1.
    """
    H = probs.shape[1]
    for first, end in docs:
        length = end - first
        q, k, v = (split_heads(part, H) for part in np.split(qkv[first:end], 3, axis=1))
        scores = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        P = np.exp(scores - scores.max(-1, keepdims=True))
        P /= P.sum(-1, keepdims=True)
        probs[first:end, :, :length] = P.transpose(1, 0, 2)
        out[first:end] = (P @ v).transpose(1, 0, 2).reshape(length, -1)


def attention_backward(dqkv, dout, probs, qkv, docs):
    """dv = Pᵀ·dout,  dP = dout·vᵀ,  dS = P∘(dP − Σ_s P∘dP),  dq = dS·k/√K,  dk = dSᵀ·q/√K.

    A key and a value are read by every later position of the document, so dk and dv are sums over
    those (the transposed products). The softmax Jacobian is diag(P) − P·Pᵀ; with one key P = 1 and
    dS is exactly zero.
    """
    H = probs.shape[1]
    for first, end in docs:
        length = end - first
        q, k, v = (split_heads(part, H) for part in np.split(qkv[first:end], 3, axis=1))
        dq, dk, dv = (split_heads(part, H) for part in np.split(dqkv[first:end], 3, axis=1))
        scale = q.shape[-1] ** -0.5
        P = probs[first:end, :, :length].transpose(1, 0, 2)
        do = split_heads(dout[first:end], H)
        dv[:] = P.transpose(0, 2, 1) @ do
        dP = do @ v.transpose(0, 2, 1)
        dS = P * (dP - np.sum(P * dP, axis=-1, keepdims=True)) * scale
        dq[:] = dS @ k
        dk[:] = dS.transpose(0, 2, 1) @ q


def flash_attention_forward(out, lse, scratch, qkv, docs, tile):
    """The same attention, tile by tile; keeps only the log-sum-exp of each query's scores.

    For tiles of queries, over tiles of keys, with a running maximum m, sum l and result o:

        m' = max(m, max_s S_s),  l' = l·e^(m−m') + Σ_s e^(S_s−m'),  o' = o·e^(m−m') + Σ_s e^(S_s−m')·v_s

    At the end out = o/l and lse = m + log l.  lse [N, H]; other shapes as in `attention_forward`;
    `scratch` is for engines that transpose keys (not used here).
    Dao et al. 2022, "FlashAttention", arXiv:2205.14135, algorithm 1; lse: Dao 2023, arXiv:2307.08691.
    """
    H = lse.shape[1]
    for first, end in docs:
        q, k, v = (split_heads(part, H) for part in np.split(qkv[first:end], 3, axis=1))
        length = end - first
        for i in range(0, length, tile):
            queries = slice(i, min(i + tile, length))
            qi = q[:, queries]
            m = np.full(qi.shape[:2], -np.inf, qi.dtype)
            l, o = np.zeros_like(m), np.zeros_like(qi)
            for j in range(0, queries.stop, tile):
                keys = slice(j, min(j + tile, length))
                S = masked_scores(qi, k[:, keys], queries, keys)
                m_new = np.maximum(m, S.max(-1))
                P = np.exp(S - m_new[..., None])
                shrink = np.exp(m - m_new)
                l = l * shrink + P.sum(-1)
                o = o * shrink[..., None] + P @ v[:, keys]
                m = m_new
            rows = slice(first + queries.start, first + queries.stop)
            out[rows] = (o / l[..., None]).transpose(1, 0, 2).reshape(-1, out.shape[1])
            lse[rows] = (m + np.log(l)).T


def flash_attention_backward(dqkv, scratch, dout, out, lse, qkv, docs, tile):
    """Recomputes P = exp(S − lse) tile by tile, then as in `attention_backward`.

    The sum in the softmax Jacobian needs no P: Σ_s P_s·dP_s = Σ_s P_s·(dout·v_s) = dout·out (= D
    below). The first token of a document has one key, so its dS is zero: set, not computed, since
    dP and D are rounded differently and the optimiser would make full-size steps of the difference.
    """
    H = lse.shape[1]
    for first, end in docs:
        q, k, v = (split_heads(part, H) for part in np.split(qkv[first:end], 3, axis=1))
        dq, dk, dv = (split_heads(part, H) for part in np.split(dqkv[first:end], 3, axis=1))
        do = split_heads(dout[first:end], H)
        D = np.sum(do * split_heads(out[first:end], H), axis=-1, keepdims=True)
        length, scale = end - first, q.shape[-1] ** -0.5
        dqkv[first:end] = 0
        for j in range(0, length, tile):
            keys = slice(j, min(j + tile, length))
            for i in range(j, length, tile):
                queries = slice(i, min(i + tile, length))
                S = masked_scores(q[:, queries], k[:, keys], queries, keys)
                P = np.exp(S - lse[first + queries.start : first + queries.stop].T[..., None])
                dv[:, keys] += P.transpose(0, 2, 1) @ do[:, queries]
                dP = do[:, queries] @ v[:, keys].transpose(0, 2, 1)
                dS = P * (dP - D[:, queries]) * scale
                if i == 0:
                    dS[:, 0] = 0
                dq[:, queries] += dS @ k[:, keys]
                dk[:, keys] += dS.transpose(0, 2, 1) @ q[:, queries]


def masked_scores(q, k, queries, keys):
    """q·kᵀ/√K of a tile, −∞ where the key comes after the query."""
    S = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
    later = np.arange(keys.start, keys.stop) > np.arange(queries.start, queries.stop)[:, None]
    S[:, later] = -np.inf
    return S


def attention_decode(out, cache, scratch, qkv, positions, n):
    """n queries, each against the keys and values up to its own, which are stored first.

    cache [T, 2, H, K]: keys and values of positions 0 … t;  qkv [n, 3C], of positions t−n+1 … t;  out [n, C].
    """
    first = positions[0]
    new = qkv[:n].reshape(n, 3, *cache.shape[2:])
    cache[first : first + n] = new[:, 1:]
    q, k, v = (np.moveaxis(x, 1, 0) for x in (new[:, 0], *np.moveaxis(cache[: first + n], 1, 0)))
    scores = masked_scores(q, k, slice(first, first + n), slice(0, first + n))
    P = np.exp(scores - scores.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    out[:n] = np.moveaxis(P @ v, 0, 1).reshape(n, -1)


# ---------------------------------------------------------------- hyper-connections
#
# The residual is S streams x_i, each [N, C]. Around a sublayer F:
#
#     mixed_i = Σ_j A_ij x_j,    input = Σ_i α_i mixed_i,    x'_i = mixed_i + β_i F(input)
#
# A is doubly stochastic, so mixing neither grows nor shrinks the streams. With α = 1/S, β = 1 and
# equal streams this is the plain residual x + F(x). Xie et al. 2025, "mHC: Manifold-Constrained
# Hyper-Connections", arXiv:2512.24880; Zhu et al. 2024, "Hyper-Connections", arXiv:2409.19606.


def sigmoid_matrix_forward(A, trace, mix):
    """For two streams: A = [[t, 1−t], [1−t, t]] with t = σ(mix); mix [1], A [2, 2]."""
    t = 1 / (1 + np.exp(-mix[0]))
    A[0, 0] = A[1, 1] = t
    A[0, 1] = A[1, 0] = 1 - t


def sigmoid_matrix_backward(dmix, dA, A, trace, n):
    """dmix += t(1−t)·(dA₀₀ + dA₁₁ − dA₀₁ − dA₁₀)."""
    dmix[0] += A[0, 0] * A[0, 1] * ((dA[0, 0] - dA[0, 1]) + (dA[1, 1] - dA[1, 0]))


def sinkhorn_forward(A, trace, mix):
    """For more streams: from M = exp(mix − max mix), divide columns by their sums, then rows, again
    and again; A is the last M.  mix, A [S, S]; trace [2·iterations + 1, S, S] keeps every M.

    Ends with rows, so that they sum to one to rounding. Sinkhorn and Knopp 1967.
    """
    trace[0] = np.exp(mix - mix.max())
    for i in range(1, len(trace)):
        trace[i] = trace[i - 1] / trace[i - 1].sum(axis=(i + 1) % 2, keepdims=True)
    A[:] = trace[-1]


def sinkhorn_backward(dmix, dA, A, trace, n):
    """Each division y = x/r with r = Σx gives dx = (dy − Σ dy·y)/r, along the axis of that sum;
    through all of them in reverse, then dmix += dM·M for the exponential.

    (The maximum taken out cancels in the first division, so it has no gradient.)
    """
    d = dA.copy()
    for i in range(len(trace) - 1, 0, -1):
        axis = (i + 1) % 2
        r = trace[i - 1].sum(axis=axis, keepdims=True)
        d = (d - np.sum(d * trace[i], axis=axis, keepdims=True)) / r
    dmix += d * trace[0]


def mhc_expand_forward(x, emb, n):
    """Every stream starts as a copy: x_i = emb;  x [S, N, C], emb [N, C]."""
    x[:, :n] = emb[:n]


def mhc_expand_backward(demb, dx, n):
    """demb = Σ_i dx_i."""
    demb[:n] = np.sum(dx[:, :n], axis=0)


def mhc_mix_forward(y, inp, x, A, alpha, n):
    """y_i = Σ_j A_ij x_j, computed as x_0 + Σ_{j>0} A_ij (x_j − x_0), which is the same since the
    rows of A sum to one, and keeps equal streams equal to the last bit;  inp = Σ_i α_i y_i.

    x, y [S, N, C], inp [N, C], A [S, S], alpha [S]. `mhc_distribute` adds to y later.
    """
    base, apart = x[0, :n], x[1:, :n] - x[0, :n]
    y[:, :n] = base + np.tensordot(A[:, 1:], apart, axes=1)
    inp[:n] = np.tensordot(alpha, y[:, :n], axes=1)


def mhc_mix_backward(dx, dA, dalpha, sums, dinp, x, A, alpha, n):
    """With e_i = dy_i + α_i·dinp the whole gradient of mixed_i (dy comes in `dx` and leaves as dx):

    dA_ij = Σ_tc e_i·(x_j − x_0),  dx_j = Σ_i A_ij e_i (j > 0),  dx_0 = Σ_i e_i − Σ_{j>0} dx_j,
    dα_i += Σ_tc dinp·mixed_i.

    Overwrites dA. Streams that are equal give dA = 0 exactly. `sums` is scratch (not used here).
    """
    apart = x[:, :n] - x[0, :n]
    along = np.tensordot(apart, dinp[:n], axes=2)
    dalpha += np.sum(x[0, :n] * dinp[:n]) + A @ along
    e = dx[:, :n] + alpha[:, None, None] * dinp[:n]
    dA[:] = np.tensordot(e, apart, axes=([1, 2], [1, 2]))
    dx[1:, :n] = np.tensordot(A[:, 1:].T, e, axes=1)
    dx[0, :n] = np.sum(e, axis=0) - np.sum(dx[1:, :n], axis=0)


def mhc_distribute_forward(y, f, beta, n):
    """y_i += β_i·f;  y [S, N, C], f [N, C], beta [S]."""
    y[:, :n] += beta[:, None, None] * f[:n]


def mhc_distribute_backward(df, dbeta, sums, dy, f, beta, n):
    """df = Σ_i β_i dy_i,  dβ_i += Σ_tc dy_i·f; the streams' own gradient dy passes through."""
    df[:n] = np.tensordot(beta, dy[:, :n], axes=1)
    dbeta += np.tensordot(dy[:, :n], f[:n], axes=2)


def mhc_contract_forward(out, x, contract, n):
    """The streams become one: out = Σ_i contract_i·x_i;  x [S, N, C], out [N, C]."""
    out[:n] = np.tensordot(contract, x[:, :n], axes=1)


def mhc_contract_backward(dx, dcontract, sums, dout, x, contract, n):
    """dx_i = contract_i·dout,  dcontract_i += Σ_tc x_i·dout."""
    dx[:, :n] = contract[:, None, None] * dout[:n]
    dcontract += np.tensordot(x[:, :n], dout[:n], axes=2)


# ---------------------------------------------------------------- loss


def cross_entropy_forward(loss, stats, logits, targets, weights, n):
    """loss_t = log Σ_v exp logits_tv − logits[t, target_t]; returns Σ_t weight_t·loss_t.

    logits [N, V]; loss, weights [N]. The largest logit of a row is taken out before exp, so that
    nothing overflows; `stats` [N, 2] keeps it, and the sum of what is left.
    """
    z = logits[:n]
    top = z.max(-1)
    total = np.sum(np.exp(z - top[:, None]), axis=-1)
    stats[:n, 0], stats[:n, 1] = top, total
    loss[:n] = top + np.log(total) - z[np.arange(n), targets[:n]]
    return np.sum(weights[:n] * loss[:n])


def cross_entropy_backward(dlogits, logits, stats, targets, weights, n):
    """dlogits_tv = weight_t · (softmax_tv − [v = target_t])."""
    dlogits[:n] = np.exp(logits[:n] - stats[:n, :1]) / stats[:n, 1:]
    dlogits[np.arange(n), targets[:n]] -= 1
    dlogits[:n] *= weights[:n, None]


# ---------------------------------------------------------------- sampling


def sample_token(probs, logits, temperature, top_k, top_p, uniform):
    """The token at `uniform` of the cumulative softmax(logits / temperature); logits [V].

    temperature 0 takes the largest logit. top_k > 0 keeps the k likeliest tokens; top_p < 1 then
    keeps the fewest likeliest whose sum reaches top_p (Holtzman et al. 2020, arXiv:1904.09751);
    ties at the border stay. `probs` [V] is scratch.
    """
    if temperature == 0:
        return np.argmax(logits)
    z = logits.astype(np.float64)
    probs[:] = np.exp((z - z.max()) / temperature)
    if 0 < top_k < len(z):
        probs[z < np.sort(z)[-int(top_k)]] = 0
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        enough = np.searchsorted(np.cumsum(probs[order]), top_p * probs.sum())
        probs[probs < probs[order[min(enough, len(z) - 1)]]] = 0
    cumulative = np.cumsum(probs)
    chosen = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return min(chosen, np.flatnonzero(probs)[-1])


# ---------------------------------------------------------------- optimisers
#
# Over flat buffers. `scale` multiplies every gradient first: it is where clipping happens.


def global_norm(grads):
    """√(Σ g²) over all parameters. Clipping to c scales by min(1, c / (norm + 1e-6)), as PyTorch
    does. Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063, algorithm 1."""
    return np.sqrt(np.sum(np.square(grads, dtype=np.float64)))


def sgd(params, grads, m, lr, momentum, scale):
    """m = μm + g,  p −= lr·m: gradient descent with momentum (Polyak 1964). Without (μ = 0) m is g, and is
    not kept: an array of size zero."""
    if m.size:
        m[:] = momentum * m + scale * grads
        params -= lr * m
    else:
        params -= lr * (scale * grads)


def adamw(params, grads, m, v, powers, segments, lr, beta1, beta2, eps, weight_decay, scale):
    """One AdamW step; with weight_decay = 0, of Adam.

        p −= lr·λ·p                                      (matrices only)
        m = β₁m + (1−β₁)g,  v = β₂v + (1−β₂)g²
        p −= lr · (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)

    `powers` holds β₁ᵗ and β₂ᵗ, kept as running products. `segments` [R, 3] divides the buffer into
    runs (first, end, 1 where weights decay).
    Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    powers[0] *= beta1
    powers[1] *= beta2
    for first, end, decays in segments:
        run = slice(first, end)
        g = scale * grads[run]
        m[run] = beta1 * m[run] + (1 - beta1) * g
        v[run] = beta2 * v[run] + (1 - beta2) * g**2
        step = (m[run] / (1 - powers[0])) / (np.sqrt(v[run] / (1 - powers[1])) + eps)
        params[run] -= lr * (weight_decay * decays * params[run] + step)
