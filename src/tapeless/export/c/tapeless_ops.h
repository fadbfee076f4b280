/* The ops of tapeless in C99, float32: the same mathematics as ops/reference.py, where each formula stands
 * with its source. Buffers come from the caller; nothing is allocated, nothing calls itself.
 *
 * As there, a backward op overwrites gradients of activations and adds to gradients of parameters; the
 * backward of a norm adds to dx as well. A bias or gain that a model does not have is NULL.
 *
 * n rows (tokens of one document), of buffers with room for N; V vocabulary, C embedding width,
 * T block size, H heads, S residual streams; I and O what goes into a linear layer and out of it.
 */
#ifndef TAPELESS_OPS_H
#define TAPELESS_OPS_H

#include "tapeless_model.h" /* tl_token */

#include <limits.h>
#if INT_MAX < 0x7fffffff
#error "tapeless needs int to have 32 bits"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* x[t] = wte[tokens[t]] + wpe[first + t] */
void tl_embed_forward(float *x, const float *wte, const float *wpe, const tl_token *tokens, int first, int n,
                      int C);
void tl_embed_backward(float *dwte, float *dwpe, const float *dx, const tl_token *tokens, int first, int n,
                       int C);

/* y = w x r,  r = (mean x^2 + eps)^-1/2 of each row */
void tl_rmsnorm_forward(float *y, float *rstd, const float *x, const float *w, int n, int C, float eps);
/* With g = w dy:  dw += sum_t dy x r,  dx += r (g - x r mean(g x r)) */
void tl_rmsnorm_backward(float *dx, float *dw, const float *dy, const float *x, const float *rstd,
                         const float *w, int n, int C);

/* y = x w + b + residual, where there is one, which y must not lie on;  x [n, I], w [I, O], y [n, O] */
void tl_linear_forward(float *y, const float *residual, const float *x, const float *w, const float *b,
                       int n, int I, int O);
/* dx = dy w^T (dx += where `add`),  dw += x^T dy,  db += sum_t dy */
void tl_linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x, const float *w,
                        int n, int I, int O, int add);
/* logits = x wte^T;  x [n, C], wte [V, C] */
void tl_tied_head_forward(float *logits, const float *x, const float *wte, int n, int V, int C);
/* dx = dlogits wte,  dwte += dlogits^T x */
void tl_tied_head_backward(float *dx, float *dwte, const float *dlogits, const float *x, const float *wte,
                           int n, int V, int C);

/* v = max(u, 0).  v may be u: the backward op asks only where it is above 0. */
void tl_relu_forward(float *v, const float *u, int n, int F);
void tl_relu_backward(float *du, const float *dv, const float *u, int n, int F);
/* v = u/2 (1 + tanh s),  s = sqrt(2/pi) (u + 0.044715 u^3) */
void tl_gelu_forward(float *v, const float *u, int n, int F);
void tl_gelu_backward(float *du, const float *dv, const float *u, int n, int F);

/* Causal attention of one document. qkv [n, 3C] = q | k | v;  out [n, C].
 * "full" keeps the probabilities [N, H, T], "flash" only their log-sum-exp [N, H].
 * scratch: T numbers for "full" backward, `tile` for "flash" forward. */
void tl_attention_forward(float *out, float *probs, const float *qkv, int n, int H, int T, int C);
void tl_attention_backward(float *dqkv, float *scratch, const float *dout, const float *probs,
                           const float *qkv, int n, int H, int T, int C);
void tl_flash_attention_forward(float *out, float *lse, float *scratch, const float *qkv, int n, int H, int C,
                                int tile);
void tl_flash_attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                                 const float *qkv, int n, int H, int C);
/* The token at `position` alone, against the keys and values so far: cache [T, 2, C]. scratch: T numbers. */
void tl_attention_decode(float *out, float *cache, float *scratch, const float *qkv, int position, int H, int C);

/* Two residual streams: A = [[t, 1-t], [1-t, t]],  t = 1 / (1 + exp(-mix)) */
void tl_sigmoid_matrix_forward(float *A, const float *mix);
void tl_sigmoid_matrix_backward(float *dmix, const float *dA, const float *A);
/* Streams x, y [S, N, C]:  x_i = emb,  demb = sum_i dx_i */
void tl_mhc_expand_forward(float *x, const float *emb, int n, int S, int N, int C);
void tl_mhc_expand_backward(float *demb, const float *dx, int n, int S, int N, int C);
/* y_i = x_0 + sum_j A_ij (x_j - x_0),  inp = sum_i alpha_i y_i;  dx: the gradient of y comes in, of x leaves */
void tl_mhc_mix_forward(float *y, float *inp, const float *x, const float *A, const float *alpha, int n, int S,
                        int N, int C);
void tl_mhc_mix_backward(float *dx, float *dA, float *dalpha, const float *dinp, const float *x,
                         const float *A, const float *alpha, int n, int S, int N, int C);
/* y_i += beta_i f;  df = sum_i beta_i dy_i,  dbeta_i += sum dy_i f */
void tl_mhc_distribute_forward(float *y, const float *f, const float *beta, int n, int S, int N, int C);
void tl_mhc_distribute_backward(float *df, float *dbeta, const float *dy, const float *f, const float *beta,
                                int n, int S, int N, int C);
/* out = sum_i contract_i x_i;  dx_i = contract_i dout,  dcontract_i += sum x_i dout */
void tl_mhc_contract_forward(float *out, const float *x, const float *contract, int n, int S, int N, int C);
void tl_mhc_contract_backward(float *dx, float *dcontract, const float *dout, const float *x,
                              const float *contract, int n, int S, int N, int C);

/* Returns sum_t weight (log sum_v exp logits - logits[target]);
 * dlogits = weight (softmax(logits) - [v = target]), which may take the place of the logits. */
float tl_cross_entropy(float *dlogits, const float *logits, const tl_token *targets, float weight, int n,
                       int V);

void tl_zero(float *x, int count);
void tl_add(float *y, const float *x, int count); /* y += x */

/* The optimisers clear the gradients as they go. A parameter's step uses scale times its gradient.
 * Without momentum, m is NULL. */
float tl_global_norm(const float *grads, int count);
void tl_sgd(float *params, float *grads, float *m, int count, float lr, float momentum, float scale);
/* rest1, rest2: 1 - beta1^t, 1 - beta2^t at step t, from 1 */
void tl_adam(float *params, float *grads, float *m, float *v, int count, float lr, float beta1, float beta2,
             float rest1, float rest2, float eps, float weight_decay, float scale);

/* The token at `uniform` (0 to 1) of the cumulative softmax(logits / temperature); the likeliest at 0.
 * Overwrites the logits. */
int tl_sample(float *logits, float temperature, float uniform, int V);

/* With weights in int8, w = scale[i] q[i, o], for one token: */
void tl_embed_int8(float *x, const int8_t *wte, const float *wte_scale, const int8_t *wpe,
                   const float *wpe_scale, int token, int position, int C);
void tl_linear_int8(float *y, const float *residual, const float *x, const int8_t *q, const float *scale,
                    const float *b, int I, int O);
void tl_tied_head_int8(float *logits, const float *x, const int8_t *q, const float *scale, int V, int C);

#ifdef __cplusplus
}
#endif
#endif
