"""Hyper-connections: several residual streams around a sublayer.

Gradients of scalars are sums over all rows and columns: each thread's own sums stand in its row of
`sums`, and the first thread adds them up.
"""

import numpy as np

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.share import meet

_f32 = np.float32


def sigmoid_matrix_forward(A, trace, mix):
    t = _f32(1) / (_f32(1) + np.exp(-mix[0]))
    A[0, 0] = t
    A[1, 1] = t
    A[0, 1] = _f32(1) - t
    A[1, 0] = _f32(1) - t


def sigmoid_matrix_backward(dmix, dA, A, trace, rows):
    if rows.me == 0:
        dmix[0] += A[0, 0] * A[0, 1] * ((dA[0, 0] - dA[0, 1]) + (dA[1, 1] - dA[1, 0]))


def sinkhorn_forward(A, trace, mix):
    S = A.shape[0]
    top = _f32(-np.inf)
    for i in range(S):
        for j in range(S):
            top = max(top, mix[i, j])
    for i in range(S):
        for j in range(S):
            trace[0, i, j] = np.exp(mix[i, j] - top)
    for k in range(1, trace.shape[0]):
        for i in range(S):
            total = _f32(0)
            for j in range(S):
                total += trace[k - 1, j, i] if k % 2 else trace[k - 1, i, j]
            for j in range(S):
                if k % 2:
                    trace[k, j, i] = trace[k - 1, j, i] / total
                else:
                    trace[k, i, j] = trace[k - 1, i, j] / total
    for i in range(S):
        for j in range(S):
            A[i, j] = trace[trace.shape[0] - 1, i, j]


def sinkhorn_backward(dmix, dA, A, trace, rows):
    if rows.me == 0:
        _sinkhorn_backward(dmix, dA, A, trace)


@jit
def _sinkhorn_backward(dmix, dA, A, trace):
    S = A.shape[0]
    for k in range(trace.shape[0] - 1, 0, -1):
        for i in range(S):
            total, along = _f32(0), _f32(0)
            for j in range(S):
                if k % 2:
                    total += trace[k - 1, j, i]
                    along += dA[j, i] * trace[k, j, i]
                else:
                    total += trace[k - 1, i, j]
                    along += dA[i, j] * trace[k, i, j]
            for j in range(S):
                if k % 2:
                    dA[j, i] = (dA[j, i] - along) / total
                else:
                    dA[i, j] = (dA[i, j] - along) / total
    for i in range(S):
        for j in range(S):
            dmix[i, j] += dA[i, j] * trace[0, i, j]


def mhc_expand_forward(x, emb, rows):
    for i in range(x.shape[0]):
        for t in range(rows.begin, rows.end):
            for c in range(emb.shape[1]):
                x[i, t, c] = emb[t, c]


def mhc_expand_backward(demb, dx, rows):
    for t in range(rows.begin, rows.end):
        for c in range(demb.shape[1]):
            total = _f32(0)
            for i in range(dx.shape[0]):
                total += dx[i, t, c]
            demb[t, c] = total


def mhc_mix_forward(y, inp, x, A, alpha, rows):
    S = x.shape[0]
    for t in range(rows.begin, rows.end):
        for c in range(inp.shape[1]):
            read = _f32(0)
            for i in range(S):
                mixed = x[0, t, c]
                for j in range(1, S):
                    mixed += A[i, j] * (x[j, t, c] - x[0, t, c])
                y[i, t, c] = mixed
                read += alpha[i] * mixed
            inp[t, c] = read


def mhc_mix_backward(dx, dA, dalpha, sums, dinp, x, A, alpha, rows):
    S, own = x.shape[0], sums[rows.me]
    for i in range(S):
        for t in range(rows.begin, rows.end):
            for c in range(dinp.shape[1]):
                dx[i, t, c] += alpha[i] * dinp[t, c]
    base = _f32(0)
    for t in range(rows.begin, rows.end):
        for c in range(dinp.shape[1]):
            base += x[0, t, c] * dinp[t, c]
    for i in range(S):
        own[i] = base
    for j in range(1, S):
        along = _f32(0)
        for t in range(rows.begin, rows.end):
            for c in range(dinp.shape[1]):
                along += (x[j, t, c] - x[0, t, c]) * dinp[t, c]
        for i in range(S):
            own[i] += A[i, j] * along
            total = _f32(0)
            for t in range(rows.begin, rows.end):
                for c in range(dinp.shape[1]):
                    total += dx[i, t, c] * (x[j, t, c] - x[0, t, c])
            own[j * S + i] = total
    meet(rows)
    if rows.me == 0:
        for i in range(S):
            dA[i, 0] = 0
            for thread in range(rows.threads):
                dalpha[i] += sums[thread, i]
            for j in range(1, S):
                dA[i, j] = 0
                for thread in range(rows.threads):
                    dA[i, j] += sums[thread, j * S + i]
    meet(rows)
    row = own[:S]
    for t in range(rows.begin, rows.end):
        for c in range(dinp.shape[1]):
            whole = _f32(0)
            for i in range(S):
                row[i] = dx[i, t, c]
                whole += row[i]
            for j in range(1, S):
                total = _f32(0)
                for i in range(S):
                    total += A[i, j] * row[i]
                dx[j, t, c] = total
                whole -= total
            dx[0, t, c] = whole


def mhc_distribute_forward(y, f, beta, rows):
    for i in range(y.shape[0]):
        for t in range(rows.begin, rows.end):
            for c in range(f.shape[1]):
                y[i, t, c] += beta[i] * f[t, c]


def mhc_distribute_backward(df, dbeta, sums, dy, f, beta, rows):
    for t in range(rows.begin, rows.end):
        for c in range(f.shape[1]):
            total = _f32(0)
            for i in range(dy.shape[0]):
                total += beta[i] * dy[i, t, c]
            df[t, c] = total
    for i in range(dy.shape[0]):
        total = _f32(0)
        for t in range(rows.begin, rows.end):
            for c in range(f.shape[1]):
                total += dy[i, t, c] * f[t, c]
        sums[rows.me, i] = total
    _add_up(dbeta, sums, rows)


def mhc_contract_forward(out, x, contract, rows):
    for t in range(rows.begin, rows.end):
        for c in range(out.shape[1]):
            total = _f32(0)
            for i in range(x.shape[0]):
                total += contract[i] * x[i, t, c]
            out[t, c] = total


def mhc_contract_backward(dx, dcontract, sums, dout, x, contract, rows):
    for i in range(x.shape[0]):
        total = _f32(0)
        for t in range(rows.begin, rows.end):
            for c in range(dout.shape[1]):
                dx[i, t, c] = contract[i] * dout[t, c]
                total += x[i, t, c] * dout[t, c]
        sums[rows.me, i] = total
    _add_up(dcontract, sums, rows)


@jit
def _add_up(total, sums, rows):
    """Add the first numbers of all threads' sums to `total`."""
    meet(rows)
    if rows.me == 0:
        for i in range(total.shape[0]):
            for thread in range(rows.threads):
                total[i] += sums[thread, i]
    meet(rows)
