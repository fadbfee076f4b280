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

import numpy as np

# ---------------------------------------------------------------- moving numbers


def pack(batch, stream, spans):
    """Fill `batch` from spans of the token stream, packed end to end.

    Span s = (start, length) has inputs `stream[start : start+length]` and targets one further.
    Positions restart at 0 in each; weights are 1/n, so that the loss is the mean over tokens.
    """
    n = 0
    batch.starts[0] = 0
    for s in range(len(spans)):
        start, length = spans[s, 0], spans[s, 1]
        for i in range(length):
            batch.tokens[n + i] = stream[start + i]
            batch.targets[n + i] = stream[start + i + 1]
            batch.positions[n + i] = i
        n += length
        batch.starts[s + 1] = n
    for i in range(n):
        batch.weights[i] = 1 / n
    batch.sizes[0] = n
    batch.sizes[1] = len(spans)


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


def attention_forward(out, probs, qkv, starts, sizes):
    """Causal multi-head attention inside each document; keeps the probabilities.

    Per head:  S = q·kᵀ/√K,  P = softmax over s ≤ t,  out = P·v.
    qkv [N, 3C] = q | k | v;  out [N, C];  probs [N, H, T]: probs[t, h, j] is the weight of the j-th
    token of t's document.  Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, eq. 1.
    """
    H = probs.shape[1]
    for first, end in documents(starts, sizes):
        length = end - first
        q, k, v = (split_heads(part, H) for part in np.split(qkv[first:end], 3, axis=1))
        scores = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        P = np.exp(scores - scores.max(-1, keepdims=True))
        P /= P.sum(-1, keepdims=True)
        probs[first:end, :, :length] = P.transpose(1, 0, 2)
        out[first:end] = (P @ v).transpose(1, 0, 2).reshape(length, -1)


def attention_backward(dqkv, row, dout, probs, qkv, starts, sizes):
    """dv = Pᵀ·dout,  dP = dout·vᵀ,  dS = P∘(dP − Σ_s P∘dP),  dq = dS·k/√K,  dk = dSᵀ·q/√K.

    A key and a value are read by every later position of the document, so dk and dv are sums over
    those (the transposed products). The softmax Jacobian is diag(P) − P·Pᵀ; with one key P = 1 and
    dS is exactly zero. `row` [T] is scratch for engines that go query by query (not used here).
    """
    H = probs.shape[1]
    for first, end in documents(starts, sizes):
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


def attention_decode(out, cache, qkv, positions):
    """One query against the keys and values so far; stores its own first.

    cache [T, 2, H, K]: keys and values of positions 0 … t;  qkv [1, 3C];  out [1, C].
    """
    t = positions[0]
    q, cache[t, 0], cache[t, 1] = qkv[0].reshape(3, *cache.shape[2:])
    k, v = cache[: t + 1, 0], cache[: t + 1, 1]
    scores = np.einsum("hk,thk->ht", q, k) * q.shape[-1] ** -0.5
    P = np.exp(scores - scores.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    out[0] = np.einsum("ht,thk->hk", P, v).ravel()


def documents(starts, sizes):
    """(first, end) of each document of the batch."""
    return [(starts[s], starts[s + 1]) for s in range(sizes[1])]


# ---------------------------------------------------------------- loss


def cross_entropy_forward(loss, lse, logits, targets, weights, n):
    """loss_t = lse_t − logits[t, target_t] with lse = log Σ_v exp logits; returns Σ_t weight_t·loss_t.

    logits [N, V]; loss, lse, weights [N]. The largest logit is taken out before exp, so that nothing
    overflows.
    """
    z = logits[:n]
    top = z.max(-1)
    lse[:n] = top + np.log(np.sum(np.exp(z - top[:, None]), axis=-1))
    loss[:n] = lse[:n] - z[np.arange(n), targets[:n]]
    return np.sum(weights[:n] * loss[:n])


def cross_entropy_backward(dlogits, logits, lse, targets, weights, n):
    """dlogits_tv = weight_t · (softmax_tv − [v = target_t])."""
    dlogits[:n] = np.exp(logits[:n] - lse[:n, None])
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


# ---------------------------------------------------------------- optimiser


def adam(params, grads, m, v, powers, lr, beta1, beta2, eps):
    """One Adam step over flat buffers.

    m = β₁m + (1−β₁)g,  v = β₂v + (1−β₂)g²,  p −= lr · (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)

    `powers` holds β₁ᵗ and β₂ᵗ, kept as running products.
    Kingma and Ba 2015, "Adam", arXiv:1412.6980, algorithm 1.
    """
    powers[0] *= beta1
    powers[1] *= beta2
    m[:] = beta1 * m + (1 - beta1) * grads
    v[:] = beta2 * v + (1 - beta2) * grads**2
    params -= lr * (m / (1 - powers[0])) / (np.sqrt(v / (1 - powers[1])) + eps)
