/* adamw.cu - the optimiser's step and the sum of squares of a gradient, each one pass. */
#include "common.cuh"

namespace {

enum { PARTIAL = 1 << 15 }; /* elements of one partial sum of squares */

__global__ void update(void *weights, float *master, float *m, float *v, const float *grad, int type, float lr, float b1, float b2, float eps,
                       float decay, float gscale, float c1, float c2, size_t n) {
  float *w = type == FLOAT32 ? (float *)weights : master;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    const float g = gscale * grad[i], mi = b1 * m[i] + (1 - b1) * g, vi = b2 * v[i] + (1 - b2) * g * g;
    const float wi = w[i] - lr * (mi * c1 / (sqrtf(vi * c2) + eps) + decay * w[i]);
    m[i] = mi, v[i] = vi, w[i] = wi;
    if (type != FLOAT32) ((uint16_t *)weights)[i] = float_to_bf16(wi);
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

void adamw(void *w, float *master, float *m, float *v, const float *grad, int type, float lr, float b1, float b2, float eps, float decay,
           float gscale, size_t step, size_t n) {
  const float c1 = (float)(1 / (1 - pow((double)b1, (double)step))), c2 = (float)(1 / (1 - pow((double)b2, (double)step)));
  LAUNCH(update, blocks_for(n, 256, 32 * multiprocessors()), 256, 0, w, master, m, v, grad, type, lr, b1, b2, eps, decay, gscale, c1, c2, n);
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
