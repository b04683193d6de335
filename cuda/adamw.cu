/* adamw.cu - the optimiser's step and the sum of squares of a gradient, each one pass: four elements a load where the arrays
 * allow it. */
#include "common.cuh"

namespace {

enum { PARTIAL = 1 << 15 }; /* elements of one partial sum of squares */

struct Update {
  void *weights;    /* of `type` */
  float *w, *m, *v; /* w: weights, or their master */
  const float *grad;
  int type;
  float lr, b1, b2, eps, decay, gscale, c1, c2; /* c: what takes the bias from m and v */

  __device__ void one(float &w, float &m, float &v, float g) const {
    g *= gscale;
    m = b1 * m + (1 - b1) * g, v = b2 * v + (1 - b2) * g * g;
    w -= lr * (m * c1 / (sqrtf(v * c2) + eps) + decay * w);
  }
};

__global__ void update(Update u, size_t n, size_t fours) {
  const size_t stride = (size_t)gridDim.x * blockDim.x, first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (size_t i = first; i < fours; i += stride) {
    float w[4], m[4], v[4], g[4];
    load_16(w, u.w + 4 * i);
    load_16(m, u.m + 4 * i);
    load_16(v, u.v + 4 * i);
    load_16(g, u.grad + 4 * i);
#pragma unroll
    for (int k = 0; k < 4; k++) u.one(w[k], m[k], v[k], g[k]);
    store_16(u.w + 4 * i, w);
    store_16(u.m + 4 * i, m);
    store_16(u.v + 4 * i, v);
    if (u.type != FLOAT32) ((uint2 *)u.weights)[i] = make_uint2(pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]));
  }
  for (size_t i = 4 * fours + first; i < n; i += stride) {
    u.one(u.w[i], u.m[i], u.v[i], u.grad[i]);
    if (u.type != FLOAT32) ((uint16_t *)u.weights)[i] = float_to_bf16(u.w[i]);
  }
}

__global__ void squares(double *part, const float *g, size_t n) {
  const size_t from = (size_t)blockIdx.x * PARTIAL, to = from + PARTIAL < n ? from + PARTIAL : n;
  const size_t cut = aligned_16(g) ? from + (to - from) / 4 * 4 : from;
  double sum = 0;
#pragma unroll 4
  for (size_t i = from + 4 * threadIdx.x; i < cut; i += 4 * blockDim.x) {
    float v[4];
    load_16(v, g + i);
    for (int k = 0; k < 4; k++) sum += (double)v[k] * v[k];
  }
  for (size_t i = cut + threadIdx.x; i < to; i += blockDim.x) sum += (double)g[i] * g[i];
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

void adamw(void *w, float *master, float *m, float *v, const float *grad, int type, float lr, float b1, float b2, float eps,
           float decay, float gscale, size_t step, size_t n) {
  const float c1 = (float)(1 / (1 - pow((double)b1, (double)step))), c2 = (float)(1 / (1 - pow((double)b2, (double)step)));
  const Update u = {w, type == FLOAT32 ? (float *)w : master, m, v, grad, type, lr, b1, b2, eps, decay, gscale, c1, c2};
  const size_t fours = all_aligned(w, u.w, m, v, grad) ? n / 4 : 0;
  LAUNCH(update, blocks_for(fours ? ceil_div(n, 4) : n, 256, 32 * multiprocessors()), 256, 0, u, n, fours);
}

double sum_squares(const float *g, size_t n) {
  const size_t blocks = ceil_div(n, PARTIAL);
  double sum = 0, *part = (double *)device_scratch((blocks + 1) * sizeof(double));
  if (!part || !n) return 0;
  LAUNCH(squares, (unsigned)blocks, 256, 0, part, g, n);
  LAUNCH(add_up, 1, 512, 0, part, blocks);
  device_pull(&sum, part, sizeof sum);
  return sum;
}
