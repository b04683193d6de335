/* loss.cu - lm_head, softmax, cross-entropy, KL to a teacher and their gradient, over chunks of rows.
 *
 * A chunk's logits are floats; its gradient, of type `real`, goes into the student's logits where that is the same type. A block takes
 * a row: once through it for the sums, once for KL, once for the gradient. */
#include "common.cuh"

namespace {

enum { THREADS = 512, MAX_ROWS = 1024 };
const size_t MAX_LOGITS = (size_t)1 << 27; /* of a chunk */

struct Chunk {
  float *ce, *kl; /* (n), as target, wce and wkl: from the chunk's first row on */
  const float *z, *u; /* (n,V); u NULL: no teacher */
  real *dz;           /* (n,V) or NULL; may be z */
  const int32_t *target;
  const float *wce, *wkl;
  float tau;
  int kind;
  size_t V;
};

struct Softmax {
  float max, sum; /* max x, sum exp((x - max) beta) */
};

/* f(x's elements, u's, count) over a row, four at a time where rows begin at 16 bytes; u may be NULL. Thread t takes the pieces t, t +
 * THREADS, …, in order. */
template <class F> __device__ void each_4(const float *x, const float *u, size_t V, F f) {
  const bool whole = !(((uintptr_t)x | (uintptr_t)u) & 15);
  const size_t cut = whole ? V / 4 * 4 : 0;
#pragma unroll 2
  for (size_t i = 4 * threadIdx.x; i < cut; i += 4 * THREADS) {
    float a[4], b[4] = {};
    load_16(a, x + i);
    if (u) load_16(b, u + i);
    f(a, b, 4, i);
  }
  for (size_t i = cut + threadIdx.x; i < V; i += THREADS) {
    const float a[4] = {x[i]}, b[4] = {u ? u[i] : 0};
    f(a, b, 1, i);
  }
}

/* Of the row, in every thread. */
__device__ Softmax softmax(const float *x, float beta, size_t V) {
  float max = -INFINITY, sum = 0;
  each_4(x, nullptr, V, [&](const float *a, const float *, int n, size_t) {
    for (int k = 0; k < n; k++) max = fmaxf(max, a[k]);
  });
  max = block_max(max);
  each_4(x, nullptr, V, [&](const float *a, const float *, int n, size_t) {
    float part = 0;
    for (int k = 0; k < n; k++) part += exp_((a[k] - max) * beta);
    sum += part;
  });
  return {max, block_sum(sum)};
}

__device__ float weight_of(const float *w, const int32_t *target, size_t i) { return w ? w[i] : target[i] >= 0 ? 1.0f : 0.0f; }

/* d = log t - log s of a logit, s = softmax(z beta), t = softmax(u beta); shift = log t.sum - log s.sum */
__device__ float log_ratio(float u, float z, Softmax t, Softmax s, float beta, float shift) { return ((u - t.max) - (z - s.max)) * beta - shift; }

__global__ void loss_rows(Chunk r) {
  const size_t i = blockIdx.x, V = r.V;
  const float *z = r.z + i * V, *u = r.u ? r.u + i * V : nullptr;
  const int32_t target = r.target[i];
  const float wce = weight_of(r.wce, r.target, i), wkl = u ? weight_of(r.wkl, r.target, i) : 0, beta = 1 / r.tau;
  real *dz = r.dz ? r.dz + i * V : nullptr;
  if (wce == 0 && wkl == 0) { /* not asked for */
    if (threadIdx.x == 0) r.ce[i] = r.kl[i] = 0;
    for (size_t k = threadIdx.x; dz && k < V; k += THREADS) store(dz + k, 0);
    return;
  }
  const Softmax p = softmax(z, 1, V);
  Softmax s = {0, 1}, t = {0, 1};
  float shift = 0, kl = 0;
  if (u) {
    s = r.tau == 1 ? p : softmax(z, beta, V), t = softmax(u, beta, V);
    const double exact = log((double)t.sum) - log((double)s.sum);
    shift = (float)exact;
    double sum = 0;
    each_4(z, u, V, [&](const float *a, const float *b, int n, size_t) {
      float part = 0;
      for (int k = 0; k < n; k++) {
        const float d = log_ratio(b[k], a[k], t, s, beta, shift);
        part += r.kind ? -exp_((a[k] - s.max) * beta) * d : exp_((b[k] - t.max) * beta) * d;
      }
      sum += part;
    });
    kl = (float)(block_sum(sum) / (r.kind ? s.sum : t.sum) + (r.kind ? -1 : 1) * (shift - exact));
  }
  if (threadIdx.x == 0) {
    r.ce[i] = target < 0 ? 0 : (float)(log((double)p.sum) + ((double)p.max - z[target]));
    r.kl[i] = u ? fmaxf(kl, 0) * r.tau * r.tau : 0;
  }
  if (!dz) return;
  __syncthreads(); /* dz may be z */
  const float a = target < 0 ? 0 : wce / p.sum, b = u ? wkl * r.tau / s.sum : 0, c = u ? wkl * r.tau / t.sum : 0;
  each_4(z, u, V, [&](const float *x, const float *y, int n, size_t at) {
    for (int k = 0; k < n; k++) {
      float g = a * exp_(x[k] - p.max);
      if (u && r.kind) g += b * exp_((x[k] - s.max) * beta) * (-log_ratio(y[k], x[k], t, s, beta, shift) - kl);
      if (u && !r.kind) g += b * exp_((x[k] - s.max) * beta) - c * exp_((y[k] - t.max) * beta);
      if ((int64_t)(at + k) == target) g -= wce;
      store(dz + at + k, g);
    }
  });
}

/* z (n,V) float = h (n,C) w^T */
void logits(float *z, const real *h, Matrix w, size_t n, size_t C, size_t V) { logits_forward(z, h, w, 1, n, C, V); }

/* dh NULL: the losses alone */
void lm_loss(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, const real *th, Matrix tw, const float *wce,
             const float *wkl, float tau, int kind, size_t M, size_t C, size_t V, size_t K) {
  if (!M || !V) return;
  size_t rows = MAX_LOGITS / V + 1;
  rows = rows < MAX_ROWS ? rows : MAX_ROWS;
  rows = rows < M ? rows : M;
  const bool apart = dh && sizeof(real) != sizeof(float);
  float *z = (float *)device_alloc(rows * V * sizeof(float)), *u = th ? (float *)device_alloc(rows * V * sizeof(float)) : nullptr;
  real *dz = apart ? (real *)device_alloc(rows * V * sizeof(real)) : dh ? (real *)z : nullptr;
  for (size_t m = 0; m < M && z && (u || !th) && (dz || !dh); m += rows) {
    const size_t n = rows < M - m ? rows : M - m;
    logits(z, h + m * C, w, n, C, V);
    if (u) logits(u, th + m * K, tw, n, K, V);
    const Chunk chunk = {ce + m, kl + m, z, u, dz, target + m, wce ? wce + m : nullptr, wkl ? wkl + m : nullptr, tau, kind, V};
    LAUNCH(loss_rows, (unsigned)n, THREADS, 0, chunk);
    if (dh) linear_backward(dh + m * C, dw, nullptr, dz, h + m * C, w, 0, n, C, V);
  }
  if (apart) device_free(dz);
  device_free(u);
  device_free(z);
}

}  // namespace

void lm_loss_forward(float *ce, float *kl, const real *h, Matrix w, const int32_t *target, const real *th, Matrix tw, const float *wce,
                     const float *wkl, float tau, int kind, size_t M, size_t C, size_t V, size_t K) {
  lm_loss(ce, kl, nullptr, nullptr, h, w, target, th, tw, wce, wkl, tau, kind, M, C, V, K);
}
void lm_loss_backward(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, const real *th, Matrix tw,
                      const float *wce, const float *wkl, float tau, int kind, size_t M, size_t C, size_t V, size_t K) {
  lm_loss(ce, kl, dh, dw, h, w, target, th, tw, wce, wkl, tau, kind, M, C, V, K);
}
