/* loss.cu - lm_head, softmax, cross-entropy, KL to a teacher and their gradient, over chunks of rows; and the squared distance of two
 * layers' outputs.
 *
 * A chunk's logits are floats; its gradient, of type `real`, goes into the student's logits where that is the same type. A
 * block takes a row: once through it for maxima and sums, once for KL and the gradient, once more where that needs KL. */
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

/* f(z's elements, u's, count, where) over a row, four at a time where rows begin at 16 bytes; u may be NULL. Thread t takes the
 * pieces t, t + THREADS, …, in order. */
template <class F> __device__ void each_4(const float *z, const float *u, size_t V, F f) {
  const bool whole = !(((uintptr_t)z | (uintptr_t)u) & 15);
  const size_t cut = whole ? V / 4 * 4 : 0;
#pragma unroll 2
  for (size_t i = 4 * threadIdx.x; i < cut; i += 4 * THREADS) {
    float a[4], b[4] = {};
    load_16(a, z + i);
    if (u) load_16(b, u + i);
    f(a, b, Int<4>(), i);
  }
  for (size_t i = cut + threadIdx.x; i < V; i += THREADS) {
    const float a[4] = {z[i]}, b[4] = {u ? u[i] : 0};
    f(a, b, Int<1>(), i);
  }
}

__device__ float exp_of(float x) { return exp2_approx(1.44269504f * x); }

/* A thread's part of a softmax, about the largest that it has met. */
struct Part {
  Softmax s = {-INFINITY, 0};
  template <int N> __device__ void add(const float (&x)[4], Int<N>, float beta) {
    float top = x[0], part = 0;
#pragma unroll
    for (int k = 1; k < N; k++) top = fmaxf(top, x[k]);
    if (top > s.max) s.sum *= exp_of((s.max - top) * beta), s.max = top;
#pragma unroll
    for (int k = 0; k < N; k++) part += exp_of((x[k] - s.max) * beta);
    s.sum += part;
  }
  __device__ Softmax of_block(float beta) const {
    const float max = block_max(s.max);
    return {max, block_sum(s.sum * exp_of((s.max - max) * beta))};
  }
};

__device__ void store_4(real *p, const float (&v)[4]) {
  if constexpr (sizeof(real) == sizeof(float))
    *(float4 *)(void *)p = make_float4(v[0], v[1], v[2], v[3]);
  else
    *(uint2 *)(void *)p = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

__device__ float weight_of(const float *w, const int32_t *target, size_t i) { return w ? w[i] : target[i] >= 0 ? 1.0f : 0.0f; }

struct Row {
  const float *z, *u; /* (V); u NULL: no teacher */
  real *dz;           /* (V); may be z */
  Softmax p, s, t;    /* of z, z beta, u beta */
  float beta, shift;  /* shift = log t.sum - log s.sum */
  float wce, wkl, tau;
  int64_t target;
  int kind;
  size_t V;
};

/* log 2 - log(1 + e^d): log s over the mean of s and t where d = log t - log s */
__device__ float to_mean(float d) { return 0.693147181f - softplus(d); }

/* Once through a row. KL: the sum that is KL but for the division by the sum of exponentials (Jensen-Shannon: divided), and there
 * too own, the student's part of it; GRADIENT: dz, which needs `mean`, KL or own, unless the kind is forward. */
template <bool JS, bool KL, bool GRADIENT> __device__ double through(const Row &r, float mean, double *own) {
  const float a = r.target < 0 ? 0 : r.wce / r.p.sum, w = r.u ? r.wkl * r.tau : 0, b = w / r.s.sum, c = r.u ? w / r.t.sum : 0;
  const float to_s = r.u ? 1 / r.s.sum : 0, to_t = r.u ? 1 / r.t.sum : 0;
  double sum = 0, mine = 0;
  each_4(r.z, r.u, r.V, [&](const float(&z)[4], const float(&u)[4], auto N, size_t at) {
    float g[4], part = 0, ours = 0;
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float es = r.u ? exp_of((z[k] - r.s.max) * r.beta) : 0;
      const float et = r.u && (JS || !r.kind) ? exp_of((u[k] - r.t.max) * r.beta) : 0;
      const float d = ((u[k] - r.t.max) - (z[k] - r.s.max)) * r.beta - r.shift; /* log t - log s */
      if (KL && JS)
        ours += es * to_s * to_mean(d), part += 0.5f * (es * to_s * to_mean(d) + et * to_t * to_mean(-d));
      else if (KL)
        part += r.kind ? -es * d : et * d;
      if (!GRADIENT) continue;
      g[k] = a * (r.u && r.tau == 1 ? es : exp_of(z[k] - r.p.max));
      if (r.u && JS)
        g[k] += 0.5f * b * es * (to_mean(d) - mean);
      else if (r.u)
        g[k] += r.kind ? b * es * (-d - mean) : b * es - c * et;
      if ((int64_t)(at + k) == r.target) g[k] -= r.wce;
      if (N == 1) store(r.dz + at, g[k]);
    }
    if constexpr (GRADIENT && N == 4) store_4(r.dz + at, g);
    sum += part, mine += ours;
  });
  if (KL && JS) *own = block_sum(mine);
  return KL ? block_sum(sum) : 0;
}

/* JS: the kind is Jensen-Shannon, which takes more registers. */
template <bool JS> __global__ void __launch_bounds__(THREADS) loss_rows(Chunk c) {
  const size_t i = blockIdx.x, V = c.V;
  Row r = {c.z + i * V, c.u ? c.u + i * V : nullptr, c.dz ? c.dz + i * V : nullptr};
  r.target = c.target[i], r.tau = c.tau, r.beta = 1 / c.tau, r.kind = c.kind, r.V = V;
  r.wce = weight_of(c.wce, c.target, i), r.wkl = r.u ? weight_of(c.wkl, c.target, i) : 0;
  if (r.wce == 0 && r.wkl == 0) { /* not asked for */
    if (threadIdx.x == 0) c.ce[i] = c.kl[i] = 0;
    for (size_t k = threadIdx.x; r.dz && k < V; k += THREADS) store(r.dz + k, 0);
    return;
  }
  Part p, s, t;
  const bool warm = r.u && r.tau != 1;
  each_4(r.z, r.u, V, [&](const float(&z)[4], const float(&u)[4], auto N, size_t) {
    p.add(z, N, 1);
    if (warm) s.add(z, N, r.beta);
    if (r.u) t.add(u, N, r.beta);
  });
  r.p = p.of_block(1), r.s = warm ? s.of_block(r.beta) : r.p;
  double exact = 0, sum = 0, own = 0;
  if (r.u) {
    r.t = t.of_block(r.beta);
    exact = log((double)r.t.sum) - log((double)r.s.sum);
    r.shift = (float)exact;
  }
  if (threadIdx.x == 0) c.ce[i] = r.target < 0 ? 0 : (float)(log((double)r.p.sum) + ((double)r.p.max - r.z[r.target]));
  __syncthreads(); /* dz may be z */
  const bool apart = r.u && (r.kind || !r.dz);
  if (apart) sum = through<JS, true, false>(r, 0, &own);
  auto kl = [&] {
    if (JS) return (float)sum;
    return (float)(sum / (r.kind ? r.s.sum : r.t.sum) + (r.kind ? -1 : 1) * (r.shift - exact));
  };
  if (r.dz && r.u && !apart) sum = through<JS, true, true>(r, 0, &own);
  if (r.dz && (!r.u || apart)) through<JS, false, true>(r, JS ? (float)own : kl(), nullptr);
  if (threadIdx.x == 0) c.kl[i] = r.u ? fmaxf(kl(), 0) * r.tau * r.tau : 0;
}

/* u as expand in csrc/loss.c makes it */
__global__ void __launch_bounds__(THREADS) expand_rows(float *u, const float *z, const int32_t *id, const float *log_p, const float *tail,
                                                       float tau, size_t V, size_t J) {
  const size_t row = blockIdx.x;
  const float beta = 1 / tau;
  u += row * V, z += row * V, id += row * J, log_p += row * J;
  for (size_t i = threadIdx.x; i < V; i += THREADS) u[i] = z[i];
  __syncthreads();
  if (J < V) {
    float max = -INFINITY, sum = 0;
    for (size_t i = threadIdx.x; i < J; i += THREADS) u[id[i]] = -INFINITY;
    __syncthreads();
    for (size_t i = threadIdx.x; i < V; i += THREADS) max = fmaxf(max, u[i]);
    max = block_max(max);
    for (size_t i = threadIdx.x; i < V; i += THREADS) sum += exp_of((u[i] - max) * beta);
    sum = block_sum(sum);
    const float shift = tau * (fmaxf(tail[row], LEAST_LOG_PROB) - logf(sum)) - max;
    for (size_t i = threadIdx.x; i < V; i += THREADS) u[i] += shift;
    __syncthreads();
  }
  for (size_t i = threadIdx.x; i < J; i += THREADS) u[id[i]] = tau * fmaxf(log_p[i], LEAST_LOG_PROB);
}

/* A block takes a row. Keys differ, so the J-th largest, found by eight bits at a time, parts what stays from the rest; of what stays a
 * token's place is how many keys are larger. kept (n,J) */
__global__ void __launch_bounds__(THREADS) top_rows(int32_t *id, float *log_p, float *tail, Key *kept, const float *z, float tau, size_t V,
                                                    size_t J) {
  __shared__ unsigned bins[256], filled;
  __shared__ Key prefix;
  __shared__ size_t left;
  const size_t row = blockIdx.x;
  const float beta = 1 / tau;
  z += row * V, id += row * J, log_p += row * J, kept += row * J;
  if (threadIdx.x == 0) prefix = 0, left = J, filled = 0;
  for (int shift = 56; shift >= 0 && J; shift -= 8) {
    for (int b = threadIdx.x; b < 256; b += THREADS) bins[b] = 0;
    __syncthreads();
    for (size_t i = threadIdx.x; i < V; i += THREADS) {
      const Key key = key_of(z[i], i);
      if (shift == 56 || key >> (shift + 8) == prefix) atomicAdd(bins + (key >> shift & 255), 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned b = 255;
      while (bins[b] < left) left -= bins[b--];
      prefix = prefix << 8 | b;
    }
    __syncthreads();
  }
  const Key last = J ? prefix : ~(Key)0;
  float most = -INFINITY, max = -INFINITY, sum = 0, rest = 0;
  for (size_t i = threadIdx.x; i < V; i += THREADS) {
    const Key key = key_of(z[i], i);
    if (key >= last)
      kept[atomicAdd(&filled, 1u)] = key, most = fmaxf(most, z[i]);
    else
      max = fmaxf(max, z[i]);
  }
  max = block_max(max), most = fmaxf(block_max(most), max);
  for (size_t i = threadIdx.x; i < V; i += THREADS)
    (key_of(z[i], i) >= last ? sum : rest) += exp_of((z[i] - (key_of(z[i], i) >= last ? most : max)) * beta);
  const double all = block_sum((double)sum), others = block_sum((double)rest), log_rest = (double)(max - most) * beta + log(others);
  const double log_sum = log(all + exp(log_rest));
  for (size_t i = threadIdx.x; i < J; i += THREADS) {
    size_t place = 0;
    for (size_t j = 0; j < J; j++) place += kept[j] > kept[i];
    const float x = logit_of(kept[i]);
    id[place] = (int32_t)index_of(kept[i]), log_p[place] = (float)((double)(x - most) * beta - log_sum);
  }
  if (threadIdx.x == 0) tail[row] = J < V ? (float)(log_rest - log_sum) : -INFINITY;
}

/* z (n,V) float = h (n,C) w^T */
void logits(float *z, const real *h, Matrix w, size_t n, size_t C, size_t V) { logits_forward(z, h, w, 1, n, C, V); }

/* of a chunk */
size_t rows_of(size_t M, size_t V) {
  const size_t rows = MAX_LOGITS / V + 1 < MAX_ROWS ? MAX_LOGITS / V + 1 : MAX_ROWS;
  return rows < M ? rows : M;
}

/* dh NULL: the losses alone */
void lm_loss(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, Teacher t, const float *wce,
             const float *wkl, float tau, int kind, size_t M, size_t C, size_t V) {
  if (!M || !V) return;
  const size_t rows = rows_of(M, V);
  const bool apart = dh && sizeof(real) != sizeof(float), teacher = t.h || t.ids;
  float *z = (float *)device_alloc(rows * V * sizeof(float));
  float *u = teacher ? (float *)device_alloc(rows * V * sizeof(float)) : nullptr;
  real *dz = apart ? (real *)device_alloc(rows * V * sizeof(real)) : dh ? (real *)z : nullptr;
  for (size_t m = 0; m < M && z && (u || !teacher) && (dz || !dh); m += rows) {
    const size_t n = rows < M - m ? rows : M - m;
    logits(z, h + m * C, w, n, C, V);
    if (t.ids)
      LAUNCH(expand_rows, (unsigned)n, THREADS, 0, u, z, t.ids + m * t.J, t.log_probs + m * t.J, t.tail + m, tau, V, t.J);
    else if (t.h)
      logits(u, t.h + m * t.K, t.w, n, t.K, V);
    const Chunk chunk = {ce + m, kl + m, z, u, dz, target + m, wce ? wce + m : nullptr, wkl ? wkl + m : nullptr, tau, kind, V};
    LAUNCH((kind == JENSEN_SHANNON ? loss_rows<true> : loss_rows<false>), (unsigned)n, THREADS, 0, chunk);
    if (dh) linear_backward(dh + m * C, dw, nullptr, dz, h + m * C, w, 0, n, C, V);
  }
  if (apart) device_free(dz);
  device_free(u);
  device_free(z);
}

/* A warp a row. da NULL: y = the row's sum of squares; else da = 2 dy (a - b). */
__global__ void squared_error(float *y, real *da, const float *dy, const real *a, const real *b, size_t M, size_t C, bool whole) {
  const int lane = threadIdx.x % 32;
  const size_t warps = blockDim.x / 32, stride = gridDim.x * warps;
  for (size_t m = blockIdx.x * warps + threadIdx.x / 32; m < M; m += stride) {
    const real *p = a + m * C, *q = b + m * C;
    const float scale = da ? 2 * dy[m] : 0;
    float sum = 0;
    each_piece(C, whole, lane, 32, [&](auto N, size_t c) {
      float v[N], w[N];
      load_piece(v, p + c);
      load_piece(w, q + c);
#pragma unroll
      for (int k = 0; k < N; k++) v[k] -= w[k], sum += v[k] * v[k], v[k] *= scale;
      if (da) store_piece(da + m * C + c, v);
    });
    sum = warp_sum(sum);
    if (!da && lane == 0) y[m] = sum;
  }
}

void run_squared_error(float *y, real *da, const float *dy, const real *a, const real *b, size_t M, size_t C) {
  const bool whole = C % REALS_16 == 0 && all_aligned(da, a, b);
  LAUNCH(squared_error, blocks_for(M, 256 / 32, 16 * multiprocessors()), 256, 0, y, da, dy, a, b, M, C, whole);
}

}  // namespace

void lm_loss_forward(float *ce, float *kl, const real *h, Matrix w, const int32_t *target, Teacher t, const float *wce, const float *wkl,
                     float tau, int kind, size_t M, size_t C, size_t V) {
  lm_loss(ce, kl, nullptr, nullptr, h, w, target, t, wce, wkl, tau, kind, M, C, V);
}
void lm_loss_backward(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, Teacher t,
                      const float *wce, const float *wkl, float tau, int kind, size_t M, size_t C, size_t V) {
  lm_loss(ce, kl, dh, dw, h, w, target, t, wce, wkl, tau, kind, M, C, V);
}

void top_log_probs(int32_t *ids, float *log_probs, float *tail, const real *h, Matrix w, float tau, size_t M, size_t C, size_t V,
                   size_t J) {
  if (!M || !V) return;
  const size_t rows = rows_of(M, V);
  float *z = (float *)device_alloc(rows * V * sizeof(float));
  Key *kept = (Key *)device_alloc(rows * J * sizeof(Key));
  for (size_t m = 0; m < M && z && kept; m += rows) {
    const size_t n = rows < M - m ? rows : M - m;
    logits(z, h + m * C, w, n, C, V);
    LAUNCH(top_rows, (unsigned)n, THREADS, 0, ids + m * J, log_probs + m * J, tail + m, kept, z, tau, V, J);
  }
  device_free(kept);
  device_free(z);
}
void squared_error_forward(float *y, const real *a, const real *b, size_t M, size_t C) {
  run_squared_error(y, nullptr, nullptr, a, b, M, C);
}
void squared_error_backward(real *da, const float *dy, const real *a, const real *b, size_t M, size_t C) {
  run_squared_error(nullptr, da, dy, a, b, M, C);
}
