/* adamw.cu - the optimiser's step and the sum of squares of a gradient, each one pass. */
#include "common.cuh"
#include "philox.h"

namespace {

enum { PARTIAL = 1 << 15 }; /* elements of one partial sum of squares */

/* Four elements at p, of which `count` exist; p is aligned for four. */
__device__ void load_4(float (&x)[4], const float *p, int count) {
  if (count == 4) return load_16(x, p);
  for (int k = 0; k < 4; k++) x[k] = k < count ? p[k] : 0;
}
__device__ void load_4(float (&x)[4], const uint16_t *p, int count) {
  if (count == 4) {
    const uint2 q = *(const uint2 *)p;
    x[0] = low_bf16(q.x), x[1] = high_bf16(q.x), x[2] = low_bf16(q.y), x[3] = high_bf16(q.y);
    return;
  }
  for (int k = 0; k < 4; k++) x[k] = k < count ? bf16_to_float(p[k]) : 0;
}
__device__ void store_4(float *p, const float (&x)[4], int count) {
  if (count == 4) return store_16(p, x);
  for (int k = 0; k < count; k++) p[k] = x[k];
}
__device__ void store_4(uint16_t *p, const uint16_t (&x)[4], int count) {
  if (count == 4)
    *(uint2 *)p = make_uint2(x[0] | (unsigned)x[1] << 16, x[2] | (unsigned)x[3] << 16);
  else
    for (int k = 0; k < count; k++) p[k] = x[k];
}

struct AdamW {
  void *weights;
  float *master; /* where the weights are bf16 */
  const float *grad;
  int type;
  float lr, b1, b2, eps, decay, gscale, c1, c2;
  size_t step, n;
  uint64_t key;
};

/* S: float or uint16_t, the moments' type. */
template <class S> __global__ void update(AdamW a, S *m, S *v) {
  float *weights = a.type == FLOAT32 ? (float *)a.weights : a.master;
  for (size_t j = (size_t)blockIdx.x * blockDim.x + threadIdx.x; 4 * j < a.n; j += (size_t)gridDim.x * blockDim.x) {
    const size_t i = 4 * j;
    const int count = a.n - i < 4 ? (int)(a.n - i) : 4;
    float w[4], mi[4], vi[4], g[4];
    load_4(w, weights + i, count), load_4(mi, m + i, count), load_4(vi, v + i, count), load_4(g, a.grad + i, count);
    for (int k = 0; k < 4; k++) {
      g[k] *= a.gscale;
      mi[k] = a.b1 * mi[k] + (1 - a.b1) * g[k];
      vi[k] = a.b2 * vi[k] + (1 - a.b2) * g[k] * g[k];
      w[k] -= a.lr * (mi[k] * a.c1 / (sqrtf(vi[k] * a.c2) + a.eps) + a.decay * w[k]);
    }
    store_4(weights + i, w, count);
    if (a.type != FLOAT32) {
      const uint16_t rounded[4] = {float_to_bf16(w[0]), float_to_bf16(w[1]), float_to_bf16(w[2]), float_to_bf16(w[3])};
      store_4((uint16_t *)a.weights + i, rounded, count);
    }
    if constexpr (sizeof(S) == sizeof(float)) {
      store_4(m + i, mi, count), store_4(v + i, vi, count);
    } else {
      uint32_t word[4];
      uint16_t low[4], high[4];
      moment_bits(word, a.key, j, a.step);
      for (int k = 0; k < 4; k++)
        low[k] = round_at_random(mi[k], word[k] & 0xffff), high[k] = round_at_random(vi[k], word[k] >> 16);
      store_4(m + i, low, count), store_4(v + i, high, count);
    }
  }
}

__global__ void squares(double *part, const float *g, size_t n) {
  const size_t from = (size_t)blockIdx.x * PARTIAL, to = from + PARTIAL < n ? from + PARTIAL : n;
  double sum = 0;
  for (size_t i = from + threadIdx.x; i < to; i += blockDim.x) sum += (double)g[i] * g[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

__global__ void add_up(double *part, size_t n) {
  double sum = 0;
  for (size_t i = threadIdx.x; i < n; i += blockDim.x) sum += part[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) part[0] = sum;
}

}  // namespace

void adamw(void *w, float *master, void *m, void *v, const float *grad, int type, int moments, float lr, float b1, float b2, float eps,
           float decay, float gscale, size_t step, uint64_t key, size_t n) {
  const float c1 = (float)(1 / (1 - pow((double)b1, (double)step))), c2 = (float)(1 / (1 - pow((double)b2, (double)step)));
  const AdamW a = {w, master, grad, type, lr, b1, b2, eps, decay, gscale, c1, c2, step, n, key};
  const unsigned blocks = blocks_for(ceil_div(n, 4), 256, 32 * multiprocessors());
  if (moments == FLOAT32)
    LAUNCH(update<float>, blocks, 256, 0, a, (float *)m, (float *)v);
  else
    LAUNCH(update<uint16_t>, blocks, 256, 0, a, (uint16_t *)m, (uint16_t *)v);
}

double sum_squares(const float *g, size_t n) {
  const size_t blocks = ceil_div(n, PARTIAL);
  double sum = 0, *part = (double *)device_scratch((blocks + 1) * sizeof(double));
  if (!part || !n) return 0;
  LAUNCH(squares, (unsigned)blocks, 512, 0, part, g, n);
  LAUNCH(add_up, 1, 512, 0, part, blocks);
  device_pull(&sum, part, sizeof sum);
  return sum;
}
