/* adamw.cu - the optimiser's step and the sum of squares of a gradient, each one pass: four elements a load where the arrays
 * allow it. */
#include "common.cuh"
#include "philox.h"

namespace {

enum { PARTIAL = 1 << 15 }; /* elements of one partial sum of squares */

struct Update {
  void *weights;     /* of `type` */
  float *w;          /* weights, or their master */
  int type;
  float lr, b1, b2, eps, decay, gscale, c1, c2; /* c: what takes the bias from m and v */
  size_t step, first; /* first: in fours */
  uint64_t key;

  __device__ void one(float &w, float &m, float &v, float g) const {
    g *= gscale;
    m = b1 * m + (1 - b1) * g, v = b2 * v + (1 - b2) * g * g;
    w -= lr * (m * c1 / (sqrtf(v * c2) + eps) + decay * w);
  }
};

/* Moments and gradients, float or bf16. `random`: 16 bits each. */
__device__ void load_4(float (&x)[4], const float *p) { load_16(x, p); }
__device__ void load_4(float (&x)[4], const uint16_t *p) {
  const uint2 q = *(const uint2 *)p;
  x[0] = low_bf16(q.x), x[1] = high_bf16(q.x), x[2] = low_bf16(q.y), x[3] = high_bf16(q.y);
}
__device__ void store_4(uint16_t *p, const float (&x)[4], const uint32_t (&random)[4]) {
  unsigned h[4];
  for (int k = 0; k < 4; k++) h[k] = round_at_random(x[k], random[k]);
  *(uint2 *)p = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
}
__device__ float widen(float x) { return x; }
__device__ float widen(uint16_t x) { return bf16_to_float(x); }

/* S, G: float or uint16_t, what the moments and the gradient are kept in. */
template <class S, class G> __global__ void update(Update u, S *ms, S *vs, const G *grad, size_t n, size_t fours) {
  const size_t stride = (size_t)gridDim.x * blockDim.x, first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  constexpr bool HALF = sizeof(S) == 2;
  for (size_t i = first; i < fours; i += stride) {
    float w[4], m[4], v[4], g[4];
    load_16(w, u.w + 4 * i);
    load_4(m, ms + 4 * i);
    load_4(v, vs + 4 * i);
    load_4(g, grad + 4 * i);
#pragma unroll
    for (int k = 0; k < 4; k++) u.one(w[k], m[k], v[k], g[k]);
    store_16(u.w + 4 * i, w);
    if constexpr (HALF) {
      uint32_t word[4], low[4], high[4];
      moment_bits(word, u.key, u.first + i, u.step);
      for (int k = 0; k < 4; k++) low[k] = word[k] & 0xffff, high[k] = word[k] >> 16;
      store_4(ms + 4 * i, m, low);
      store_4(vs + 4 * i, v, high);
    } else {
      store_16(ms + 4 * i, m);
      store_16(vs + 4 * i, v);
    }
    if (u.type != FLOAT32) ((uint2 *)u.weights)[i] = make_uint2(pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]));
  }
  for (size_t i = 4 * fours + first; i < n; i += stride) {
    float m = widen(ms[i]), v = widen(vs[i]);
    u.one(u.w[i], m, v, widen(grad[i]));
    if constexpr (HALF) {
      uint32_t word[4];
      moment_bits(word, u.key, u.first + i / 4, u.step);
      const uint32_t mine = i % 4 == 0 ? word[0] : i % 4 == 1 ? word[1] : i % 4 == 2 ? word[2] : word[3];
      ms[i] = round_at_random(m, mine & 0xffff), vs[i] = round_at_random(v, mine >> 16);
    } else {
      ms[i] = m, vs[i] = v;
    }
    if (u.type != FLOAT32) ((uint16_t *)u.weights)[i] = float_to_bf16(u.w[i]);
  }
}

template <class G> __global__ void squares(double *part, const G *g, size_t n) {
  const size_t from = (size_t)blockIdx.x * PARTIAL, to = from + PARTIAL < n ? from + PARTIAL : n;
  const size_t cut = aligned_16(g) ? from + (to - from) / 4 * 4 : from;
  double sum = 0;
#pragma unroll 4
  for (size_t i = from + 4 * threadIdx.x; i < cut; i += 4 * blockDim.x) {
    float v[4];
    load_4(v, g + i);
    for (int k = 0; k < 4; k++) sum += (double)v[k] * v[k];
  }
  for (size_t i = cut + threadIdx.x; i < to; i += blockDim.x) sum += (double)widen(g[i]) * widen(g[i]);
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

void adamw(void *w, float *master, void *m, void *v, Matrix grad, int type, int moments, float lr, float b1, float b2, float eps,
           float decay, float gscale, size_t step, uint64_t key, size_t first, size_t n) {
  const float c1 = (float)(1 / (1 - pow((double)b1, (double)step))), c2 = (float)(1 / (1 - pow((double)b2, (double)step)));
  const Update u = {w, type == FLOAT32 ? (float *)w : master, type, lr, b1, b2, eps, decay, gscale, c1, c2, step, first / 4, key};
  const size_t fours = all_aligned(w, u.w, m, v, grad.data) ? n / 4 : 0;
  const unsigned blocks = blocks_for(fours ? ceil_div(n, 4) : n, 256, 32 * multiprocessors());
  auto kept = [&](auto *ms, auto *vs) {
    using S = std::remove_pointer_t<decltype(ms)>;
    if (grad.type == FLOAT32)
      LAUNCH((update<S, float>), blocks, 256, 0, u, ms, vs, (const float *)grad.data, n, fours);
    else
      LAUNCH((update<S, uint16_t>), blocks, 256, 0, u, ms, vs, (const uint16_t *)grad.data, n, fours);
  };
  moments == FLOAT32 ? kept((float *)m, (float *)v) : kept((uint16_t *)m, (uint16_t *)v);
}

double sum_squares(Matrix g, size_t n) {
  const size_t blocks = ceil_div(n, PARTIAL);
  double sum = 0, *part = (double *)device_scratch((blocks + 1) * sizeof(double));
  if (!part || !n) return 0;
  if (g.type == FLOAT32)
    LAUNCH(squares<float>, (unsigned)blocks, 256, 0, part, (const float *)g.data, n);
  else
    LAUNCH(squares<uint16_t>, (unsigned)blocks, 256, 0, part, (const uint16_t *)g.data, n);
  LAUNCH(add_up, 1, 512, 0, part, blocks);
  device_pull(&sum, part, sizeof sum);
  return sum;
}
