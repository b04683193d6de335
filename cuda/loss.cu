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

/* max x and sum exp((x - max) beta), so far. */
struct Softmax {
  float max, sum;
};
__device__ Softmax join(Softmax a, Softmax b, float beta) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return a;
  return {max, a.sum * exp_((a.max - max) * beta) + b.sum * exp_((b.max - max) * beta)};
}

/* Of the row, in every thread; an order fixed by the thread's number. */
__device__ Softmax softmax(const float *x, float beta, size_t V) {
  __shared__ Softmax part[32];
  Softmax mine = {-INFINITY, 0};
  for (size_t i = threadIdx.x; i < V; i += THREADS) {
    const float v = x[i];
    if (v > mine.max) {
      mine.sum = mine.sum * exp_((mine.max - v) * beta) + 1;
      mine.max = v;
    } else if (v > -INFINITY) {
      mine.sum += exp_((v - mine.max) * beta);
    }
  }
  for (int d = 16; d; d /= 2) {
    const Softmax other = {__shfl_xor_sync(0xffffffffu, mine.max, d), __shfl_xor_sync(0xffffffffu, mine.sum, d)};
    mine = threadIdx.x & d ? join(other, mine, beta) : join(mine, other, beta);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
  __syncthreads();
  Softmax all = part[0];
  for (int w = 1; w < THREADS / 32; w++) all = join(all, part[w], beta);
  return all;
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
    for (size_t k = threadIdx.x; k < V; k += THREADS) {
      const float d = log_ratio(u[k], z[k], t, s, beta, shift);
      sum += r.kind ? -exp_((z[k] - s.max) * beta) * d : exp_((u[k] - t.max) * beta) * d;
    }
    kl = (float)(block_sum(sum) / (r.kind ? s.sum : t.sum) + (r.kind ? -1 : 1) * (shift - exact));
  }
  if (threadIdx.x == 0) {
    r.ce[i] = target < 0 ? 0 : (float)(log((double)p.sum) + ((double)p.max - z[target]));
    r.kl[i] = u ? fmaxf(kl, 0) * r.tau * r.tau : 0;
  }
  if (!dz) return;
  __syncthreads(); /* dz may be z */
  const float a = target < 0 ? 0 : wce / p.sum, b = u ? wkl * r.tau / s.sum : 0, c = u ? wkl * r.tau / t.sum : 0;
  for (size_t k = threadIdx.x; k < V; k += THREADS) {
    const float zk = z[k];
    float g = a * exp_(zk - p.max);
    if (u && r.kind) g += b * exp_((zk - s.max) * beta) * (-log_ratio(u[k], zk, t, s, beta, shift) - kl);
    if (u && !r.kind) g += b * exp_((zk - s.max) * beta) - c * exp_((u[k] - t.max) * beta);
    if ((int64_t)k == target) g -= wce;
    store(dz + k, g);
  }
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
