/* norm.cu - RMSNorm, and Mamba-2's gated one per head.
 *
 * LANES threads share a row: a warp up to WARP_ROW elements, else the block. The choice depends on the row's length alone, and so do
 * a row's bits. Gradients of the weight: each block adds up its rows in shared memory, a second kernel adds the blocks in order. */
#include "common.cuh"

namespace {

enum { THREADS = 256, WARP_ROW = 1024, KEPT = 2 }; /* pieces of a row that a thread keeps in registers, if these are all */

template <int LANES> __device__ float row_sum(float v) { return LANES == 32 ? warp_sum(v) : block_sum(v); }

/* 1/rms of x, or of x silu(z). */
template <int LANES> __device__ float inverse_rms(const real *x, const real *z, float eps, size_t C, bool whole, int lane) {
  float sum = 0;
  each_piece(C, whole, lane, LANES, [&](auto N, size_t c) {
    float v[N], g[N];
    load_piece(v, x + c);
    if (z) load_piece(g, z + c);
    for (int i = 0; i < N; i++) {
      float a = z ? v[i] * silu(g[i]) : v[i];
      sum += a * a;
    }
  });
  return rsqrtf(row_sum<LANES>(sum) / (float)C + eps);
}

/* One row, read once; the sums in the order of inverse_rms. */
template <int LANES> __device__ void norm_kept(real *y, const real *x, const real *z, const float *w, float eps, size_t C, int lane) {
  float v[KEPT][REALS_16], g[REALS_16], sum = 0;
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const size_t c = (size_t)(lane + k * LANES) * REALS_16;
    if (c >= C) break;
    load_16(v[k], x + c);
    if (z) load_16(g, z + c);
#pragma unroll
    for (int i = 0; i < REALS_16; i++) {
      if (z) v[k][i] *= silu(g[i]);
      sum += v[k][i] * v[k][i];
    }
  }
  const float scale = rsqrtf(row_sum<LANES>(sum) / (float)C + eps);
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const size_t c = (size_t)(lane + k * LANES) * REALS_16;
    if (c >= C) break;
#pragma unroll
    for (int i = 0; i < REALS_16; i++) v[k][i] = v[k][i] * scale * w[c + i];
    store_16(y + c, v[k]);
  }
}

/* Rows r of M*H; row r's weight is w + r % H * C. z NULL: plain. */
template <int LANES> __global__ void norm_rows(real *y, const real *x, const real *z, const float *w, float eps, size_t rows, size_t H, size_t C, bool whole) {
  const int lane = threadIdx.x % LANES, groups = THREADS / LANES;
  const size_t first = (size_t)blockIdx.x * groups + threadIdx.x / LANES;
  for (size_t c = (size_t)lane * 32; first < rows && c < C; c += LANES * 32) prefetch_l2(w + first % H * C + c);
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (size_t r = first; r < rows; r += (size_t)gridDim.x * groups) {
    const real *row = x + r * C, *gate = z ? z + r * C : nullptr;
    const float *weight = w + r % H * C;
    if (whole && C <= (size_t)KEPT * LANES * REALS_16) {
      norm_kept<LANES>(y + r * C, row, gate, weight, eps, C, lane);
      continue;
    }
    const float scale = inverse_rms<LANES>(row, gate, eps, C, whole, lane);
    each_piece(C, whole, lane, LANES, [&](auto N, size_t c) {
      float v[N], g[N];
      load_piece(v, row + c);
      if (gate) load_piece(g, gate + c);
      for (int i = 0; i < N; i++) v[i] = (gate ? v[i] * silu(g[i]) : v[i]) * scale * weight[c + i];
      store_piece(y + r * C + c, v);
    });
  }
}

void run(real *y, const real *x, const real *z, const float *w, float eps, size_t rows, size_t H, size_t C) {
  const bool whole = all_aligned(x, y, z) && C % REALS_16 == 0;
  if (!C) return;
  if (C <= WARP_ROW)
    LAUNCH_EARLY(norm_rows<32>, blocks_for(rows, THREADS / 32, 32 * multiprocessors()), THREADS, 0, y, x, z, w, eps, rows, H, C, whole);
  else
    LAUNCH_EARLY(norm_rows<THREADS>, blocks_for(rows, 1, 32 * multiprocessors()), THREADS, 0, y, x, z, w, eps, rows, H, C, whole);
}

/* y = a r w, a = x or x silu(z), r = 1/rms(a): da = r (dy w - a r^2 mean(dy w a)), dw += dy a r; plain: dx (= | +=) da;
 * gated: dx = da silu(z), dz = da x silu'(z). */
template <int LANES> __device__ void row_backward(real *dx, real *dz, float *dw, const real *dy, const real *x, const real *z, const float *w, float eps,
                                                  int add, size_t C, bool whole, int lane) {
  const float r = inverse_rms<LANES>(x, z, eps, C, whole, lane);
  float s = 0;
  each_piece(C, whole, lane, LANES, [&](auto N, size_t c) {
    float v[N], g[N], d[N];
    load_piece(v, x + c);
    load_piece(d, dy + c);
    if (z) load_piece(g, z + c);
    for (int i = 0; i < N; i++) {
      const float a = z ? v[i] * silu(g[i]) : v[i];
      s += d[i] * w[c + i] * a;
      if (dw) dw[c + i] += d[i] * a * r;
    }
  });
  s = row_sum<LANES>(s) * r * r / (float)C;
  if (!dx) return;
  each_piece(C, whole, lane, LANES, [&](auto N, size_t c) {
    float v[N], g[N], d[N], before[N];
    load_piece(v, x + c);
    load_piece(d, dy + c);
    if (z) load_piece(g, z + c);
    if (add) load_piece(before, dx + c);
    for (int i = 0; i < N; i++) {
      const float a = z ? v[i] * silu(g[i]) : v[i], da = r * (d[i] * w[c + i] - a * s);
      if (z) {
        d[i] = da * silu(g[i]);
        g[i] = da * v[i] * dsilu(g[i]);
      } else {
        d[i] = add ? before[i] + da : da;
      }
    }
    store_piece(dx + c, d);
    if (z) store_piece(dz + c, g);
  });
}

/* A block takes rows m, each of H heads of C elements, in turn; a head is always the same group's. part (blocks, groups*C | H*C) */
template <int LANES> __global__ void norm_backward(real *dx, real *dz, float *part, const real *dy, const real *x, const real *z, const float *w, float eps,
                                                   int add, size_t M, size_t H, size_t C, bool whole) {
  DYNAMIC_SHARED(float, dw);
  const int groups = THREADS / LANES, group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const size_t size = z ? H * C : groups * C;
  for (size_t i = threadIdx.x; part && i < size; i += THREADS) dw[i] = 0;
  __syncthreads();
  if (z) {
    for (size_t m = blockIdx.x; m < M; m += gridDim.x)
      for (size_t h = group; h < H; h += groups) {
        const size_t at = (m * H + h) * C;
        row_backward<LANES>(dx + at, dz + at, part ? dw + h * C : nullptr, dy + at, x + at, z + at, w + h * C, eps, 0, C, whole, lane);
      }
  } else {
    for (size_t m = (size_t)blockIdx.x * groups + group; m < M; m += (size_t)gridDim.x * groups)
      row_backward<LANES>(dx ? dx + m * C : nullptr, nullptr, part ? dw + group * C : nullptr, dy + m * C, x + m * C, nullptr, w, eps, add, C, whole, lane);
  }
  __syncthreads();
  for (size_t i = threadIdx.x; part && i < (z ? size : C); i += THREADS) {
    float sum = dw[i];
    for (int g = 1; !z && g < groups; g++) sum += dw[g * C + i];
    part[blockIdx.x * (z ? size : C) + i] = sum;
  }
}

void run_backward(real *dx, real *dz, float *dw, const real *dy, const real *x, const real *z, const float *w, float eps, int add, size_t M, size_t H, size_t C) {
  if (!M || !C || !H) return;
  const bool warps = C <= WARP_ROW || z, whole = all_aligned(dx, dz, dy, x, z) && C % REALS_16 == 0;
  const int groups = warps ? THREADS / 32 : 1;
  const size_t shared = dw ? (z ? H * C : groups * C) * sizeof(float) : 0, n = z ? H * C : C;
  const unsigned blocks = blocks_for(M, z ? 1 : groups, 2 * multiprocessors());
  float *part = dw ? (float *)device_scratch(blocks * n * sizeof(float)) : nullptr;
  if (dw && !part) return;
  if (warps)
    LAUNCH(norm_backward<32>, blocks, THREADS, shared, dx, dz, part, dy, x, z, w, eps, add, M, H, C, whole);
  else
    LAUNCH(norm_backward<THREADS>, blocks, THREADS, shared, dx, dz, part, dy, x, z, w, eps, add, M, H, C, whole);
  if (dw) LAUNCH(add_partials, blocks_for(n, 256), 256, 0, dw, part, (size_t)blocks, n);
}

}  // namespace

void rmsnorm_forward(real *y, const real *x, const float *w, float eps, size_t M, size_t C) { run(y, x, nullptr, w, eps, M, 1, C); }
void rmsnorm_backward(real *dx, float *dw, const real *dy, const real *x, const float *w, float eps, int add, size_t M, size_t C) {
  run_backward(dx, nullptr, dw, dy, x, nullptr, w, eps, add, M, 1, C);
}
void gated_rmsnorm_forward(real *y, const real *x, const real *z, const float *w, float eps, size_t M, size_t H, size_t P) {
  run(y, x, z, w, eps, M * H, H, P);
}
void gated_rmsnorm_backward(real *dx, real *dz, float *dw, const real *dy, const real *x, const real *z, const float *w, float eps, size_t M, size_t H,
                            size_t P) {
  run_backward(dx, dz, dw, dy, x, z, w, eps, 0, M, H, P);
}
