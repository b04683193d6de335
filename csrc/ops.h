/* ops.h - THE contract: every op's prototype, formula, and what is = and what is +=.
 *
 * csrc/<op>.c defines these symbols for the CPU, cuda/<op>.cu defines the same symbols for the GPU; the linker chooses.
 *
 * Order of arguments: outputs, in-place state, inputs, optional inputs (NULL when absent), scalars, dims.
 * Gradients are d<name>: activation gradients are = unless `add` says +=; parameter gradients are always +=, and NULL means
 * not wanted (frozen). Arrays are contiguous; the comment gives the shape, letters as everywhere:
 *   B batch  T time  C model width  H heads  G kv groups  P head dim  N state size  W conv width  F mlp width  V vocabulary
 *   M = B*T rows   S slots of a State   J blocks of N channels that carry B (Mamba-1)   D inner width
 * Any size works. Ops never allocate (scratch is device_scratch), never check, never exit: shapes are checked once, in
 * module.c. Small parameters (norms, conv, A_log, D, biases) are float; only matrices carry a dtype. */
#ifndef MIL_OPS_H
#define MIL_OPS_H
#include "real.h"

/* Calls of at most FEW tokens (T, whatever B) are row-invariant: a row gets the same bits whatever runs beside it. */
/* A call with a State of T <= PENDING may leave its tokens uncommitted; prev may then be any tree. */
enum { FEW = 16, PENDING = 32 };

enum { FLOAT32 = 0, BFLOAT16 = 1 };
typedef struct {
  const void *data; /* row-major */
  int type;         /* FLOAT32 | BFLOAT16 */
} Matrix;

/* How the rows of a batch relate to the past. Every member may be NULL.
 *   slot (B)     the State row that batch row b continues; NULL: b
 *   keep (B)     how many of this call's tokens are committed; NULL: all T
 *   prev (B,T)   the token before t: t-1 (NULL: always), -1 the incoming state, -2 nothing (a document starts; not with caches
 *                or a ring: what comes after the call could not know of it)
 *   pos (S)      where this call's first token stands in slot s (tokens before it, the pending ones that it extends included)
 *   committed (S), seen (S)   committed tokens now, and when the checkpoint was last written
 * Caches are addressed by absolute position modulo their length: the entry of token t of row b is (pos[slot]+t) % length (attention
 * with sinks: below).
 *
 * Recurrent checkpoints (scan, ssd): `state` holds the state after floor(seen/R)*R tokens, the ring the inputs of the tokens
 * from there up to pos. T <= PENDING: fold whole runs of R tokens until the checkpoint stands at floor(committed/R)*R, then
 * replay the ring and run the T tokens without touching the checkpoint; write their inputs to the ring.
 * T > PENDING: tokens run from pos; the checkpoint is left at floor((pos+keep)/R)*R, and the ring holds the inputs from there
 * on, at most R + PENDING of them. Without a ring (ring pointers NULL) `state` is simply initial state in, state after keep
 * tokens out. Without a state (NULL) everything starts from zero. */
typedef struct {
  const int32_t *slot, *keep, *prev, *pos, *committed, *seen;
} Rows;
/* One slot's ring: x (S,R+PENDING,...) and B (S,R+PENDING,...) after the conv, dt (S,R+PENDING,...) after the softplus. */
typedef struct {
  real *x, *B;
  float *dt;
} Ring;

/* ---- linear.c ----------------------------------------------------------------------------------------------------- */

/* y[m,o] (= | add: +=) sum_k x[m,k] w[o,k] + bias[o].   y (B,T,O)  x (B,T,K)  w (O,K)  bias (O) or NULL
 * T <= FEW: one fixed order over k, rows tiled, so a row's bits depend on nothing but that row. T > FEW: BLAS. */
void linear_forward(real *y, const real *x, Matrix w, const float *bias, int add, size_t B, size_t T, size_t K, size_t O);
/* Products that share x:  y_i (B,T,O_i) (= | add: +=) u w_i^T + bias_i for i < n <= 5, with u = x, or rmsnorm(x) with the weights
 * `norm` (K) where that is not NULL, rounded to real as rmsnorm_forward stores it. Row-invariant as linear_forward, to which it is equal
 * within rounding; on a GPU few tokens are one launch. With norm and T > FEW, u takes scratch. */
typedef struct {
  real *y;
  Matrix w; /* (O,K) */
  const float *bias;
  size_t O;
} Product;
void linears_forward(const Product *p, int n, const real *x, const float *norm, float eps, int add, size_t B, size_t T, size_t K);
/* y = silu(u wg^T + bg) * (u wu^T + bu), the halves rounded to real in between; u as above.   y (B,T,F)  wg, wu (F,K)  bg, bu (F) or
 * NULL. T > FEW: up takes scratch. */
void swiglu_linear_forward(real *y, const real *x, const float *norm, float eps, Matrix wg, const float *bg, Matrix wu,
                           const float *bu, size_t B, size_t T, size_t K, size_t F);
/* The same without bias, y in float: what softmax and sampling read.   y (B,T,O) float */
void logits_forward(float *y, const real *x, Matrix w, size_t B, size_t T, size_t K, size_t O);
/* dx[m,k] (= | add: +=) sum_o dy[m,o] w[o,k];  dw[o,k] += sum_m dy[m,o] x[m,k];  dbias[o] += sum_m dy[m,o].
 * dx, dw (float, O x K), dbias may be NULL. */
void linear_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, Matrix w, int add, size_t M, size_t K,
                     size_t O);
/* y[m,:] = w[ids[m],:].   y (M,C)  w (V,C)  ids (M) */
void embedding_forward(real *y, Matrix w, const int32_t *ids, size_t M, size_t C);
/* dw[ids[m],:] += dy[m,:] in the order of m */
void embedding_backward(float *dw, const real *dy, const int32_t *ids, size_t M, size_t C);

/* ---- norm.c ------------------------------------------------------------------------------------------------------- */

/* y = x * rsqrt(mean(x^2) + eps) * w, statistics in float.   x, y (M,C)  w (C) */
void rmsnorm_forward(real *y, const real *x, const float *w, float eps, size_t M, size_t C);
/* dx (= | add: +=), dw += ; dx, dw may be NULL */
void rmsnorm_backward(real *dx, float *dw, const real *dy, const real *x, const float *w, float eps, int add, size_t M,
                      size_t C);
/* Mamba-2's norm: per head, y = w * rmsnorm(x * silu(z)).   x, z, y (M,H,P)  w (H,P) */
void gated_rmsnorm_forward(real *y, const real *x, const real *z, const float *w, float eps, size_t M, size_t H, size_t P);
void gated_rmsnorm_backward(real *dx, real *dz, float *dw, const real *dy, const real *x, const real *z, const float *w,
                            float eps, size_t M, size_t H, size_t P);

/* ---- act.c -------------------------------------------------------------------------------------------------------- */

/* y = silu(gate) * up, elementwise over n. y may alias gate or up. */
void swiglu_forward(real *y, const real *gate, const real *up, size_t n);
/* dgate = dy * up * silu'(gate); dup = dy * silu(gate). dgate, dup may alias gate, up. */
void swiglu_backward(real *dgate, real *dup, const real *dy, const real *gate, const real *up, size_t n);
/* y += x, elementwise over n */
void accumulate(real *y, const real *x, size_t n);

/* ---- attention.c -------------------------------------------------------------------------------------------------- */

/* RoPE, half-rotation layout: with a = position * inv_freq[i], (y[i], y[i+P/2]) = scale * (x[i] cos a - x[i+P/2] sin a,
 * x[i+P/2] cos a + x[i] sin a). The angle is position * inv_freq rounded to float, as transformers does.
 * x, y (M,H,P), y may alias x   position (M)   inv_freq (P/2) */
void rope_forward(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                  size_t P);
/* The rotation's transpose: dx = scale * R(-a) dy. dx may alias dy. */
void rope_backward(real *dx, const real *dy, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                   size_t P);
/* Causal GQA attention, head h reads kv group h / (H/G); o[t] = sum_j softmax_j(scale * q[t].k[j]) v[j] over the tokens j on
 * t's path through prev, itself included, and, where the path reaches the incoming state, the tokens before pos in the cache;
 * window > 0: at most the last `window` tokens of that path and the first `sinks` tokens of its document, each once, at the positions
 * that they have (Xiao et al. 2023, StreamingLLM, gives them positions within the cache instead). Softmax in float, keys in path order
 * in blocks that stand at absolute depths, so that T <= PENDING with a State is row-invariant. Never materialises T x T.
 * o, q (B,T,H,P)  k, v (B,T,G,P)  lse (B,H,T) = log sum exp, or NULL (not with sinks)  kcache, vcache (S,K,G,P) or NULL
 * With a cache this call's k and v are written to it after they have been read (the last K of pos .. pos+min(T, keep+PENDING)).
 * With sinks, K > sinks + PENDING or no less than all tokens: entries 0 .. sinks are those of the first tokens, the other K - sinks
 * take turns: position p >= sinks stands at sinks + (p - sinks) % (K - sinks).
 * rope.inv_freq not NULL, T <= FEW with a cache: q and k come as they are before rope_forward, which is done to them on the way (on a GPU
 * in the same launch); they hold anything afterwards.   position (B,T)  inv_freq (P/2) */
typedef struct {
  const int32_t *position;
  const float *inv_freq;
  float scale;
} Rope;
void attention_forward(real *o, float *lse, real *kcache, real *vcache, real *q, real *k, const real *v, Rows rows, Rope rope,
                       float scale, size_t window, size_t sinks, size_t B, size_t T, size_t H, size_t G, size_t P, size_t K);
/* Without a cache; prev[t] in {t-1, -2}. p = exp(scale * q.k - lse); dq, dk, dv =. */
void attention_backward(real *dq, real *dk, real *dv, const real *dout, const real *q, const real *k, const real *v,
                        const real *o, const float *lse, Rows rows, float scale, size_t window, size_t sinks, size_t B, size_t T,
                        size_t H, size_t G, size_t P);

/* ---- conv1d.c ----------------------------------------------------------------------------------------------------- */

/* Causal depthwise convolution along prev, then SiLU if silu:
 *   y[t,c] = f(bias[c] + sum_{i<W} w[c,i] x[t-(W-1-i), map(c)])     t-j: j steps back along prev, 0 before a document's start
 *   map(c) = (c/N / rep)*N + c%N, rep = D/X: Mamba-1's repeat of blocks of N channels. X = D: map(c) = c, any N.
 * for each of n <= CONV_PARTS parts that share rows. With a cache (all parts or none), K >= W-1+PENDING, tokens before pos come from
 * it, and this call's x is written to it after it has been read (the last K of min(T, keep+PENDING)). One fixed order over i, so
 * row-invariant; on a GPU the parts are one launch. */
enum { CONV_PARTS = 3 };
typedef struct {
  real *y, *cache;       /* (B,T,D)  (S,K,X) of raw inputs or NULL */
  const real *x;         /* (B,T,X) */
  const float *w, *bias; /* (D,W)  (D) or NULL */
  size_t X, D;
} ConvPart;
void conv1d_forward(const ConvPart *part, int n, Rows rows, int silu, size_t B, size_t T, size_t N, size_t W, size_t K);
/* Without a cache; prev[t] in {t-1, -2}. dx =, dw +=, dbias +=. */
void conv1d_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, const float *w, const float *bias,
                     Rows rows, int silu, size_t B, size_t T, size_t X, size_t D, size_t N, size_t W);

/* ---- scan.c: Mamba-1 ----------------------------------------------------------------------------------------------- */

/* d = softplus(dt[c] + dt_bias[c]);  S[c,n] = exp(-d exp(A_log[c,n])) S[c,n] + d B[j(c),n] x[c];
 * y[c] = (sum_n C[c/N,n] S[c,n] + D[c] x[c]) * silu(z[c]),  j(c) = (c/N) / (D/N/J).  dt_bias, z, D may be NULL (0, no gate, 0).
 * y, x, dt, z (B,T,D)  A_log (D,N)  Bm (B,T,J,N)  C (B,T,D/N,N)  state (S,D,N) float or NULL
 * ring: x (S,R+PENDING,D)  dt (same)  B (S,R+PENDING,J,N), R = SCAN_RING; members NULL: none */
void selective_scan_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm,
                            const real *C, const float *Dskip, const float *dt_bias, const real *z, Rows rows, size_t B,
                            size_t T, size_t D, size_t N, size_t J);
/* From zero or from `state` (S,D,N: the initial state of row b, read only); prev[t] in {t-1, -2}. dx, ddt, dB, dC, dz =;
 * dA_log, dD, ddt_bias +=; dstate (S,D,N): in the cotangent of the final state, out that of the initial one; NULL: zero. */
void selective_scan_backward(real *dx, real *ddt, float *dA_log, real *dB, real *dC, float *dD, float *ddt_bias, real *dz,
                             float *dstate, const real *dy, const float *state, const real *x, const real *dt,
                             const float *A_log, const real *Bm, const real *C, const float *Dskip, const float *dt_bias,
                             const real *z, Rows rows, size_t B, size_t T, size_t D, size_t N, size_t J);

/* ---- ssd.c: Mamba-2 ------------------------------------------------------------------------------------------------ */

/* d = softplus(dt[h] + dt_bias[h]);  a = exp(-d exp(A_log[h]));  S[h] = a S[h] + d x[g] Bm[g]^T;  y[h] = S[h] C[h] + D[h] x[g],
 * g = h / (H/G).  dt_bias, D may be NULL.
 * y (B,T,H,P)  x (B,T,G,P)  dt (B,T,H)  A_log, Dskip, dt_bias (H)  Bm (B,T,G,N)  C (B,T,H,N)  state (S,H,P,N) float or NULL
 * ring: x (S,R+PENDING,G,P)  dt (S,R+PENDING,H)  B (S,R+PENDING,G,N), R = SSD_RING; members NULL: none */
void ssd_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm,
                 const real *C, const float *Dskip, const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G,
                 size_t P, size_t N);
/* As selective_scan_backward; state, dstate (S,H,P,N). */
void ssd_backward(real *dx, real *ddt, float *dA_log, real *dB, real *dC, float *dD, float *ddt_bias, float *dstate,
                  const real *dy, const float *state, const real *x, const real *dt, const float *A_log, const real *Bm,
                  const real *C, const float *Dskip, const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G,
                  size_t P, size_t N);

/* ---- loss.c -------------------------------------------------------------------------------------------------------- */

enum { FORWARD, REVERSE, JENSEN_SHANNON }; /* kind */
/* What the student is held to: a model's hidden states h (M,K) and lm_head w (V,K); or, if ids is not NULL, what a cache has of it: J
 * different tokens, ids (M,J), their log-probabilities (M,J) at temperature tau, and the log-mass of all others, tail (M); or nothing.
 * What lies below LEAST_LOG_PROB, -inf too, counts as that. */
typedef struct {
  const real *h;
  Matrix w;
  size_t K;
  const int32_t *ids;
  const float *log_probs, *tail;
  size_t J;
} Teacher;
#define LEAST_LOG_PROB -1e4f /* e to it is 0, and yet 0 times it is no NaN */
/* Per row m, with z = h[m] w^T (student) and u = t.h[m] t.w^T (teacher), both never held for more than a chunk of
 * rows:  ce[m] = -log softmax(z)[target[m]]   (0 where target < 0)
 *        kl[m] = tau^2 KL(softmax(u/tau) || softmax(z/tau))      kind 0, forward
 *                tau^2 KL(softmax(z/tau) || softmax(u/tau))      kind 1, reverse
 *                half of either KL to the mean of both             kind 2, Jensen-Shannon, times tau^2
 * Of a cache both distributions are taken over J+1 outcomes, the J tokens and "any other". That is a lower bound of what the whole
 * teacher gives (data-processing inequality), and equal to it for J = V.
 * What is not asked for (weights both 0) is skipped and reads 0. wce NULL: 1 where target >= 0, else 0; wkl NULL: the same if
 * there is a teacher. A weighted sequence log-probability (DPO) is -sum ce with wce as its weights.
 * ce, kl, wce, wkl (M)  h (M,C)  w (V,C)  target (M) */
void lm_loss_forward(float *ce, float *kl, const real *h, Matrix w, const int32_t *target, Teacher t, const float *wce, const float *wkl,
                     float tau, int kind, size_t M, size_t C, size_t V);
/* The same losses, and the gradient of sum_m wce[m] ce[m] + wkl[m] kl[m]: dh =, dw += (float (V,C), NULL: frozen). */
void lm_loss_backward(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, Teacher t,
                      const float *wce, const float *wkl, float tau, int kind, size_t M, size_t C, size_t V);
/* What a cache has of a row's p = softmax(h[m] w^T / tau): the J <= V likeliest tokens, downwards, of equal ones the lower id first;
 * log p of these; and tail = the log of what all others have together, about their own largest, so that it is -inf for J = V alone.
 * ids, log_probs (M,J)  tail (M)  h (M,C)  w (V,C) */
void top_log_probs(int32_t *ids, float *log_probs, float *tail, const real *h, Matrix w, float tau, size_t M, size_t C, size_t V, size_t J);

/* y[m] = sum_c (a[m,c] - b[m,c])^2, in float.   y (M) float  a, b (M,C) */
void squared_error_forward(float *y, const real *a, const real *b, size_t M, size_t C);
/* da[m,c] = 2 dy[m] (a[m,c] - b[m,c]).   dy (M) float */
void squared_error_backward(real *da, const float *dy, const real *a, const real *b, size_t M, size_t C);

/* ---- adamw.c ------------------------------------------------------------------------------------------------------- */

/* Decoupled weight decay (Loshchilov & Hutter 2019): g' = gscale g;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
 * w -= lr (mhat / (sqrt(vhat) + eps) + decay w), mhat = m/(1-b1^step), vhat = v/(1-b2^step), step >= 1.
 * w is float (type FLOAT32), or bf16 with float master weights in `master`, of which w is the rounding. m and v are float, or bf16
 * (`moments`): then they are rounded, after w has moved, up or down at random with their values as the means: v would stand still
 * where 1-b2 is below half a bit. The random bits are Philox's of (key, first + i, step), so a run repeats, and so does a part of it: the
 * arrays may be elements first … first + n of larger ones, first a multiple of 4.   all (n) */
void adamw(void *w, float *master, void *m, void *v, Matrix grad, int type, int moments, float lr, float b1, float b2, float eps,
           float decay, float gscale, size_t step, uint64_t key, size_t first, size_t n);
/* sum g^2 in double, a fixed order for a thread count */
double sum_squares(Matrix g, size_t n);

/* ---- sample.c ------------------------------------------------------------------------------------------------------ */

/* The distribution that sampling uses, in this order: temperature; top_k largest (0: all); the smallest set of mass >= top_p
 * (1: all); those with p >= min_p * max p; renormalised. temperature 0: all mass on the first largest logit.
 * Ties: the lower index first. All per row: temperature, top_p, min_p (B) float, top_k (B).
 *
 * token[b]: inverse CDF in index order at u[b] in [0,1).   token, u (B)  logits (B,V) */
void sample(int32_t *token, const float *logits, const float *temperature, const int32_t *top_k, const float *top_p,
            const float *min_p, const float *u, size_t B, size_t V);
/* Speculative acceptance (Leviathan et al. 2023): with p_i, q_i the target's and draft's distributions as above, draft token i
 * is accepted while u_accept[b,i] * q_i(token) < p_i(token) (temperature 0: while it is the target's argmax); accepted[b] is
 * how many; then token[b] is drawn at u_sample[b,accepted] from max(p - q, 0) renormalised, or from p_K when all are accepted.
 * count (B) or NULL: row b drafted only count[b] <= K tokens.
 * accepted, token (B)  logits (B,K+1,V)  draft (B,K)  draft_logits (B,K,V)  u_accept (B,K)  u_sample (B,K+1) */
void verify(int32_t *accepted, int32_t *token, const float *logits, const int32_t *draft, const float *draft_logits,
            const int32_t *count, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p,
            const float *u_accept, const float *u_sample, size_t B, size_t K, size_t V);
/* u[b] in [0,1): the first word of Philox4x32-10 (Salmon et al. 2011), key = (low, high), the seed's words, counter = (index, position,
 * use, 0). */
void uniform(float *u, const int32_t *index, const int32_t *position, const int32_t *use, const int32_t *low, const int32_t *high,
             size_t B);

/* ---- transfer.c ---------------------------------------------------------------------------------------------------- */

/* Row copies, byte-exact: dst[to .. to+n, :] = src[from .. from+n, :], both (.,K) of one type; a type that differs is converted. */
void copy_rows(void *dst, int dst_type, size_t to, Matrix src, size_t from, size_t n, size_t K);
/* What starts fresh: w (n) of `type` from Philox(seed, stream, i).
 * FILL_UNIFORM: U(a,b). FILL_NORMAL: N(a, b^2). FILL_CONSTANT: a. FILL_LOG_UNIFORM: log U(a,b). FILL_DT: inverse softplus of
 * max(exp(U(log a, log b)), 1e-4). FILL_LOG_INDEX: log(i % b + 1) (Mamba-1's A_log). */
enum { FILL_UNIFORM, FILL_NORMAL, FILL_CONSTANT, FILL_LOG_UNIFORM, FILL_DT, FILL_LOG_INDEX };
void fill(void *w, int type, int how, float a, float b, uint64_t seed, uint32_t stream, size_t n);
#endif
