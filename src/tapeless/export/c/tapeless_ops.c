/* See tapeless_ops.h. */
#include "tapeless_ops.h"

#include <float.h>
#include <math.h>
#include <stddef.h>

/* ------------------------------------------------------------ sums of products */

/* y[o] += sum_k a[k da] b[k db + o] for o < count. Eight sums at a time stay in registers. */
static void add_product(float *y, int count, const float *a, int da, const float *b, int db, int terms)
{
    int o = 0;
    for (; o + 8 <= count; o += 8) {
        const float *ak = a, *bk = b + o;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
        for (int k = 0; k < terms; k++, ak += da, bk += db) {
            const float c = *ak;
            s0 += c * bk[0];
            s1 += c * bk[1];
            s2 += c * bk[2];
            s3 += c * bk[3];
            s4 += c * bk[4];
            s5 += c * bk[5];
            s6 += c * bk[6];
            s7 += c * bk[7];
        }
        y[o] += s0;
        y[o + 1] += s1;
        y[o + 2] += s2;
        y[o + 3] += s3;
        y[o + 4] += s4;
        y[o + 5] += s5;
        y[o + 6] += s6;
        y[o + 7] += s7;
    }
    for (; o < count; o++) {
        const float *ak = a, *bk = b + o;
        float s = 0;
        for (int k = 0; k < terms; k++, ak += da, bk += db)
            s += *ak * *bk;
        y[o] += s;
    }
}

static float dot(const float *a, const float *b, int terms)
{
    float s = 0;
    for (int k = 0; k < terms; k++)
        s += a[k] * b[k];
    return s;
}

/* y[i] (+)= sum_k a[k] b[i, k] for i < count: four rows of b at a time. */
static void dots(float *y, int count, const float *a, const float *b, int terms, int add)
{
    int i = 0;
    for (; i + 4 <= count; i += 4, b += 4 * terms) {
        const float *b0 = b, *b1 = b + terms, *b2 = b1 + terms, *b3 = b2 + terms;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int k = 0; k < terms; k++) {
            const float c = a[k];
            s0 += c * b0[k];
            s1 += c * b1[k];
            s2 += c * b2[k];
            s3 += c * b3[k];
        }
        y[i] = add ? y[i] + s0 : s0;
        y[i + 1] = add ? y[i + 1] + s1 : s1;
        y[i + 2] = add ? y[i + 2] + s2 : s2;
        y[i + 3] = add ? y[i + 3] + s3 : s3;
    }
    for (; i < count; i++, b += terms) {
        const float s = dot(a, b, terms);
        y[i] = add ? y[i] + s : s;
    }
}

/* y = b, where there is one, or 0 */
static void begin_sum(float *y, const float *b, int count)
{
    for (int o = 0; o < count; o++)
        y[o] = b ? b[o] : 0.0f;
}

/* ------------------------------------------------------------ moving numbers */

void tl_zero(float *x, int count)
{
    for (int i = 0; i < count; i++)
        x[i] = 0;
}

void tl_add(float *y, const float *x, int count)
{
    for (int i = 0; i < count; i++)
        y[i] += x[i];
}

/* ------------------------------------------------------------ embedding */

void tl_embed_forward(float *x, const float *wte, const float *wpe, const tl_token *tokens, int first, int n,
                      int C)
{
    for (int t = 0; t < n; t++)
        for (int c = 0; c < C; c++)
            x[t * C + c] = wte[tokens[t] * C + c] + wpe[(first + t) * C + c];
}

void tl_embed_backward(float *dwte, float *dwpe, const float *dx, const tl_token *tokens, int first, int n,
                       int C)
{
    for (int t = 0; t < n; t++)
        tl_add(dwte + tokens[t] * C, dx + t * C, C);
    tl_add(dwpe + first * C, dx, n * C);
}

/* ------------------------------------------------------------ norms */

void tl_rmsnorm_forward(float *y, float *rstd, const float *x, const float *w, int n, int C, float eps)
{
    for (int t = 0; t < n; t++, x += C, y += C) {
        const float r = 1.0f / sqrtf(dot(x, x, C) / (float)C + eps);
        for (int c = 0; c < C; c++)
            y[c] = w ? x[c] * r * w[c] : x[c] * r;
        rstd[t] = r;
    }
}

void tl_rmsnorm_backward(float *dx, float *dw, const float *dy, const float *x, const float *rstd,
                         const float *w, int n, int C)
{
    for (int t = 0; t < n; t++, x += C, dx += C, dy += C) {
        const float r = rstd[t];
        float along = 0;
        for (int c = 0; c < C; c++)
            along += (w ? w[c] * dy[c] : dy[c]) * x[c];
        along *= r * r / (float)C;
        for (int c = 0; c < C; c++)
            dx[c] += r * ((w ? w[c] * dy[c] : dy[c]) - x[c] * along);
        if (w)
            for (int c = 0; c < C; c++)
                dw[c] += dy[c] * x[c] * r;
    }
}

/* ------------------------------------------------------------ linear layers */

void tl_linear_forward(float *y, const float *residual, const float *x, const float *w, const float *b,
                       int n, int I, int O)
{
    for (int t = 0; t < n; t++, x += I, y += O) {
        begin_sum(y, b, O);
        add_product(y, O, x, 1, w, O, I);
        if (residual)
            tl_add(y, residual + t * O, O);
    }
}

void tl_linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x, const float *w,
                        int n, int I, int O, int add)
{
    for (int t = 0; t < n; t++)
        dots(dx + t * I, I, dy + t * O, w, O, add);
    for (int i = 0; i < I; i++)
        add_product(dw + i * O, O, x + i, I, dy, O, n);
    if (db)
        for (int t = 0; t < n; t++)
            tl_add(db, dy + t * O, O);
}

void tl_tied_head_forward(float *logits, const float *x, const float *wte, int n, int V, int C)
{
    for (int t = 0; t < n; t++)
        dots(logits + t * V, V, x + t * C, wte, C, 0);
}

void tl_tied_head_backward(float *dx, float *dwte, const float *dlogits, const float *x, const float *wte,
                           int n, int V, int C)
{
    tl_zero(dx, n * C);
    for (int t = 0; t < n; t++)
        add_product(dx + t * C, C, dlogits + t * V, 1, wte, C, V);
    for (int v = 0; v < V; v++)
        add_product(dwte + v * C, C, dlogits + v, V, x, C, n);
}

/* ------------------------------------------------------------ activations */

void tl_relu_forward(float *v, const float *u, int n, int F)
{
    for (int i = 0; i < n * F; i++)
        v[i] = u[i] > 0 ? u[i] : 0;
}

void tl_relu_backward(float *du, const float *dv, const float *u, int n, int F)
{
    for (int i = 0; i < n * F; i++)
        du[i] = u[i] > 0 ? dv[i] : 0;
}

#define GELU_SCALE 0.79788456f /* sqrt(2/pi) */
#define GELU_CUBIC 0.044715f

/* tanh s = 1 - 2 / (exp(2s) + 1): exp overflows to infinity, and that gives 1. */
static float gelu_tanh(float u)
{
    return 1.0f - 2.0f / (expf(2.0f * GELU_SCALE * (u + GELU_CUBIC * u * u * u)) + 1.0f);
}

void tl_gelu_forward(float *v, const float *u, int n, int F)
{
    for (int i = 0; i < n * F; i++)
        v[i] = 0.5f * u[i] * (1.0f + gelu_tanh(u[i]));
}

void tl_gelu_backward(float *du, const float *dv, const float *u, int n, int F)
{
    for (int i = 0; i < n * F; i++) {
        const float z = u[i], th = gelu_tanh(z);
        const float slope = GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * z * z);
        du[i] = dv[i] * (0.5f * (1.0f + th) + 0.5f * z * (1.0f - th * th) * slope);
    }
}

/* ------------------------------------------------------------ attention */

/* p = softmax of (q k_j / sqrt K) over `keys` keys, whose rows are `stride` apart */
static void softmax_row(float *p, const float *q, const float *k, int stride, int keys, int K)
{
    const float scale = 1.0f / sqrtf((float)K);
    float top = -FLT_MAX, total = 0;
    for (int j = 0; j < keys; j++) {
        p[j] = dot(q, k + j * stride, K) * scale;
        if (p[j] > top)
            top = p[j];
    }
    for (int j = 0; j < keys; j++) {
        p[j] = expf(p[j] - top);
        total += p[j];
    }
    total = 1.0f / total;
    for (int j = 0; j < keys; j++)
        p[j] *= total;
}

void tl_attention_forward(float *out, float *probs, const float *qkv, int n, int H, int T, int C)
{
    const int K = C / H;
    for (int t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            float *p = probs + (t * H + h) * T, *o = out + t * C + h * K;
            const float *head = qkv + h * K;
            softmax_row(p, head + t * 3 * C, head + C, 3 * C, t + 1, K);
            tl_zero(o, K);
            add_product(o, K, p, 1, head + 2 * C, 3 * C, t + 1);
        }
}

/* With ds the gradient of a score before its scale:  dq += ds k,  dk += ds q */
static void score_backward(float *dq, float *dk, float ds, const float *q, const float *k, int K)
{
    for (int c = 0; c < K; c++) {
        dq[c] += ds * k[c];
        dk[c] += ds * q[c];
    }
}

void tl_attention_backward(float *dqkv, float *scratch, const float *dout, const float *probs,
                           const float *qkv, int n, int H, int T, int C)
{
    const int K = C / H, row = 3 * C;
    const float scale = 1.0f / sqrtf((float)K);
    tl_zero(dqkv, n * row);
    for (int t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            const float *p = probs + (t * H + h) * T, *d = dout + t * C + h * K;
            const float *head = qkv + h * K, *k = head + C, *v = head + 2 * C;
            float *dhead = dqkv + h * K, *dk = dhead + C, *dv = dhead + 2 * C;
            float sum = 0; /* of P dP: with one key dP - sum is exactly zero */
            for (int j = 0; j <= t; j++) {
                for (int c = 0; c < K; c++)
                    dv[j * row + c] += p[j] * d[c];
                scratch[j] = dot(d, v + j * row, K);
                sum += p[j] * scratch[j];
            }
            for (int j = 0; j <= t; j++)
                score_backward(dhead + t * row, dk + j * row, p[j] * (scratch[j] - sum) * scale,
                               head + t * row, k + j * row, K);
        }
}

void tl_flash_attention_forward(float *out, float *lse, float *scratch, const float *qkv, int n, int H, int C,
                                int tile)
{
    const int K = C / H, row = 3 * C;
    const float scale = 1.0f / sqrtf((float)K);
    for (int t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            const float *q = qkv + t * row + h * K;
            float *o = out + t * C + h * K, top = -FLT_MAX, total = 0;
            tl_zero(o, K);
            for (int first = 0; first <= t; first += tile) {
                const float *k = qkv + first * row + C + h * K;
                const int keys = t + 1 - first < tile ? t + 1 - first : tile;
                float new_top = top, shrink;
                for (int j = 0; j < keys; j++) {
                    scratch[j] = dot(q, k + j * row, K) * scale;
                    if (scratch[j] > new_top)
                        new_top = scratch[j];
                }
                /* What is summed up so far was relative to the old maximum. */
                shrink = first ? expf(top - new_top) : 0.0f;
                top = new_top;
                total *= shrink;
                for (int c = 0; c < K; c++)
                    o[c] *= shrink;
                for (int j = 0; j < keys; j++) {
                    scratch[j] = expf(scratch[j] - top);
                    total += scratch[j];
                }
                add_product(o, K, scratch, 1, k + C, row, keys);
            }
            lse[t * H + h] = top + logf(total);
            total = 1.0f / total;
            for (int c = 0; c < K; c++)
                o[c] *= total;
        }
}

void tl_flash_attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                                 const float *qkv, int n, int H, int C)
{
    const int K = C / H, row = 3 * C;
    const float scale = 1.0f / sqrtf((float)K);
    tl_zero(dqkv, n * row);
    for (int t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            const float *d = dout + t * C + h * K, *q = qkv + t * row + h * K;
            const float sum = dot(d, out + t * C + h * K, K);
            float *dq = dqkv + t * row + h * K;
            for (int j = 0; j <= t; j++) {
                const float *k = qkv + j * row + C + h * K;
                float *dk = dqkv + j * row + C + h * K;
                const float p = expf(dot(q, k, K) * scale - lse[t * H + h]);
                for (int c = 0; c < K; c++)
                    dk[C + c] += p * d[c]; /* the values stand C after the keys */
                /* With one key the gradient is zero: not computed, since it would be rounding noise. */
                if (t > 0)
                    score_backward(dq, dk, p * (dot(d, k + C, K) - sum) * scale, q, k, K);
            }
        }
}

void tl_attention_decode(float *out, float *cache, float *scratch, const float *qkv, int position, int H, int C)
{
    const int K = C / H;
    float *new_row = cache + position * 2 * C;
    for (int c = 0; c < 2 * C; c++)
        new_row[c] = qkv[C + c];
    tl_zero(out, C);
    for (int h = 0; h < H; h++) {
        softmax_row(scratch, qkv + h * K, cache + h * K, 2 * C, position + 1, K);
        add_product(out + h * K, K, scratch, 1, cache + C + h * K, 2 * C, position + 1);
    }
}

/* ------------------------------------------------------------ hyper-connections */

#define MAX_STREAMS 16

void tl_sigmoid_matrix_forward(float *A, const float *mix)
{
    const float t = 1.0f / (1.0f + expf(-mix[0]));
    A[0] = A[3] = t;
    A[1] = A[2] = 1.0f - t;
}

void tl_sigmoid_matrix_backward(float *dmix, const float *dA, const float *A)
{
    dmix[0] += A[0] * A[1] * ((dA[0] - dA[1]) + (dA[3] - dA[2]));
}

void tl_mhc_expand_forward(float *x, const float *emb, int n, int S, int N, int C)
{
    for (int i = 0; i < S; i++)
        for (int c = 0; c < n * C; c++)
            x[i * N * C + c] = emb[c];
}

void tl_mhc_expand_backward(float *demb, const float *dx, int n, int S, int N, int C)
{
    tl_zero(demb, n * C);
    for (int i = 0; i < S; i++)
        tl_add(demb, dx + i * N * C, n * C);
}

void tl_mhc_mix_forward(float *y, float *inp, const float *x, const float *A, const float *alpha, int n, int S,
                        int N, int C)
{
    for (int c = 0; c < n * C; c++) {
        float input = 0;
        for (int i = 0; i < S; i++) {
            float mixed = x[c];
            for (int j = 1; j < S; j++)
                mixed += A[i * S + j] * (x[j * N * C + c] - x[c]);
            y[i * N * C + c] = mixed;
            input += alpha[i] * mixed;
        }
        inp[c] = input;
    }
}

void tl_mhc_mix_backward(float *dx, float *dA, float *dalpha, const float *dinp, const float *x,
                         const float *A, const float *alpha, int n, int S, int N, int C)
{
    const int stream = N * C;
    float e[MAX_STREAMS]; /* e_i = dy_i + alpha_i dinp, the whole gradient of mixed_i */
    tl_zero(dA, S * S);
    for (int c = 0; c < n * C; c++) {
        float first = 0;
        for (int i = 0; i < S; i++) {
            float mixed = x[c];
            for (int j = 1; j < S; j++)
                mixed += A[i * S + j] * (x[j * stream + c] - x[c]);
            dalpha[i] += dinp[c] * mixed;
            e[i] = dx[i * stream + c] + alpha[i] * dinp[c];
            first += e[i];
        }
        for (int j = 1; j < S; j++) {
            float sum = 0;
            for (int i = 0; i < S; i++) {
                dA[i * S + j] += e[i] * (x[j * stream + c] - x[c]);
                sum += A[i * S + j] * e[i];
            }
            dx[j * stream + c] = sum;
            first -= sum; /* what the others leave is the first stream's */
        }
        dx[c] = first;
    }
}

void tl_mhc_distribute_forward(float *y, const float *f, const float *beta, int n, int S, int N, int C)
{
    for (int i = 0; i < S; i++)
        for (int c = 0; c < n * C; c++)
            y[i * N * C + c] += beta[i] * f[c];
}

void tl_mhc_distribute_backward(float *df, float *dbeta, const float *dy, const float *f, const float *beta,
                                int n, int S, int N, int C)
{
    tl_zero(df, n * C);
    for (int i = 0; i < S; i++) {
        dbeta[i] += dot(dy + i * N * C, f, n * C);
        for (int c = 0; c < n * C; c++)
            df[c] += beta[i] * dy[i * N * C + c];
    }
}

void tl_mhc_contract_forward(float *out, const float *x, const float *contract, int n, int S, int N, int C)
{
    tl_zero(out, n * C);
    for (int i = 0; i < S; i++)
        for (int c = 0; c < n * C; c++)
            out[c] += contract[i] * x[i * N * C + c];
}

void tl_mhc_contract_backward(float *dx, float *dcontract, const float *dout, const float *x,
                              const float *contract, int n, int S, int N, int C)
{
    for (int i = 0; i < S; i++) {
        dcontract[i] += dot(x + i * N * C, dout, n * C);
        for (int c = 0; c < n * C; c++)
            dx[i * N * C + c] = contract[i] * dout[c];
    }
}

/* ------------------------------------------------------------ loss */

float tl_cross_entropy(float *dlogits, const float *logits, const tl_token *targets, float weight, int n,
                       int V)
{
    float loss = 0;
    for (int t = 0; t < n; t++, logits += V, dlogits += V) {
        const float at_target = logits[targets[t]];
        float top = logits[0], total = 0;
        for (int v = 1; v < V; v++)
            if (logits[v] > top)
                top = logits[v];
        for (int v = 0; v < V; v++) {
            dlogits[v] = expf(logits[v] - top);
            total += dlogits[v];
        }
        loss += top + logf(total) - at_target;
        total = weight / total;
        for (int v = 0; v < V; v++)
            dlogits[v] *= total;
        dlogits[targets[t]] -= weight;
    }
    return weight * loss;
}

/* ------------------------------------------------------------ optimisers */

float tl_global_norm(const float *grads, int count)
{
    return sqrtf(dot(grads, grads, count));
}

void tl_sgd(float *params, float *grads, float *m, int count, float lr, float momentum, float scale)
{
    for (int i = 0; i < count; i++) {
        float g = scale * grads[i];
        if (m)
            m[i] = g += momentum * m[i];
        params[i] -= lr * g;
        grads[i] = 0;
    }
}

void tl_adam(float *params, float *grads, float *m, float *v, int count, float lr, float beta1, float beta2,
             float rest1, float rest2, float eps, float weight_decay, float scale)
{
    /* m / rest1 over sqrt(v / rest2) + eps, with what is the same for all taken out of it */
    const float root = sqrtf(rest2), rate = root * lr / rest1, keep = 1.0f - lr * weight_decay;
    const float least = eps * root > FLT_MIN ? eps * root : FLT_MIN;
    const float new1 = (1.0f - beta1) * scale, new2 = (1.0f - beta2) * scale * scale;
    for (int i = 0; i < count; i++) {
        const float g = grads[i];
        const float mi = beta1 * m[i] + new1 * g, vi = beta2 * v[i] + new2 * g * g;
        m[i] = mi;
        v[i] = vi;
        params[i] = keep * params[i] - rate * (mi / (sqrtf(vi) + least));
        grads[i] = 0;
    }
}

/* ------------------------------------------------------------ sampling */

int tl_sample(float *logits, float temperature, float uniform, int V)
{
    int best = 0, token = 0;
    float total = 0, sum = 0, top;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best])
            best = v;
    if (temperature <= 0)
        return best;
    top = logits[best];
    for (int v = 0; v < V; v++) {
        logits[v] = expf((logits[v] - top) / temperature);
        total += logits[v];
    }
    uniform *= total;
    for (int v = 0; v < V; v++)
        if (logits[v] > 0) { /* the last of these where rounding lets the sum stay below */
            token = v;
            sum += logits[v];
            if (uniform < sum)
                break;
        }
    return token;
}

/* ------------------------------------------------------------ int8 weights, one token */

void tl_embed_int8(float *x, const int8_t *wte, const float *wte_scale, const int8_t *wpe,
                   const float *wpe_scale, int token, int position, int C)
{
    for (int c = 0; c < C; c++)
        x[c] = wte_scale[token] * (float)wte[token * C + c] + wpe_scale[position] * (float)wpe[position * C + c];
}

void tl_linear_int8(float *y, const float *residual, const float *x, const int8_t *q, const float *scale,
                    const float *b, int I, int O)
{
    begin_sum(y, b, O);
    for (int i = 0; i < I; i++) {
        const float c = x[i] * scale[i];
        for (int o = 0; o < O; o++)
            y[o] += c * (float)q[i * O + o];
    }
    if (residual)
        tl_add(y, residual, O);
}

void tl_tied_head_int8(float *logits, const float *x, const int8_t *q, const float *scale, int V, int C)
{
    for (int v = 0; v < V; v++) {
        float s = 0;
        for (int c = 0; c < C; c++)
            s += x[c] * (float)q[v * C + c];
        logits[v] = scale[v] * s;
    }
}
