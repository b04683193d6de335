/* act.cu - SwiGLU, and a sum. */
#include "common.cuh"

/* dgate, dup NULL: forward, y = silu(gate) up; else backward from dy. 16 bytes a thread where the arrays allow it. */
static __device__ void swiglu_one(float &a, float &b, float gate, float up, const float *dy) {
  const float s = 1.0f / (1.0f + __expf(-gate));
  if (!dy) {
    a = gate * s * up;
    return;
  }
  a = *dy * up * s * (1.0f + gate * (1.0f - s));
  b = *dy * gate * s;
}

static __global__ void swiglu(real *y, real *dup, const real *dy, const real *gate, const real *up, size_t n, size_t vectors) {
  const size_t stride = (size_t)gridDim.x * blockDim.x, first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (size_t i = first; i < vectors; i += 2 * stride) { /* two vectors' loads are under way together */
    float g[2][REALS_16], u[2][REALS_16], d[2][REALS_16], a[REALS_16], b[REALS_16];
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const size_t at = i + q * stride < vectors ? i + q * stride : i;
      load_16(g[q], gate + at * REALS_16);
      load_16(u[q], up + at * REALS_16);
      if (dy) load_16(d[q], dy + at * REALS_16);
    }
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const size_t at = i + q * stride;
      if (at >= vectors) break;
#pragma unroll
      for (int k = 0; k < REALS_16; k++) swiglu_one(a[k], b[k], g[q][k], u[q][k], dy ? d[q] + k : nullptr);
      store_16(y + at * REALS_16, a);
      if (dy) store_16(dup + at * REALS_16, b);
    }
  }
  for (size_t i = vectors * REALS_16 + first; i < n; i += stride) {
    float a, b, d = dy ? load(dy + i) : 0;
    swiglu_one(a, b, load(gate + i), load(up + i), dy ? &d : nullptr);
    store(y + i, a);
    if (dy) store(dup + i, b);
  }
}

static void run(real *y, real *dup, const real *dy, const real *gate, const real *up, size_t n) {
  const bool whole = !(((uintptr_t)y | (uintptr_t)dup | (uintptr_t)dy | (uintptr_t)gate | (uintptr_t)up) & 15);
  const size_t vectors = whole ? n / REALS_16 : 0;
  LAUNCH(swiglu, blocks_for(whole ? ceil_div(n, REALS_16) : n, 256, 16 * multiprocessors()), 256, 0, y, dup, dy, gate, up, n, vectors);
}

void swiglu_forward(real *y, const real *gate, const real *up, size_t n) { run(y, nullptr, nullptr, gate, up, n); }
void swiglu_backward(real *dgate, real *dup, const real *dy, const real *gate, const real *up, size_t n) { run(dgate, dup, dy, gate, up, n); }

static __global__ void add(real *y, const real *x, size_t n, bool whole) {
  const size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  each_piece(n, whole, (int)first, (int)(gridDim.x * blockDim.x), [&](auto N, size_t i) {
    float a[N], b[N];
    load_piece(a, y + i);
    load_piece(b, x + i);
#pragma unroll
    for (int k = 0; k < N; k++) a[k] += b[k];
    store_piece(y + i, a);
  });
}

void accumulate(real *y, const real *x, size_t n) {
  const bool whole = all_aligned(y, x);
  LAUNCH(add, blocks_for(whole ? ceil_div(n, REALS_16) : n, 256, 16 * multiprocessors()), 256, 0, y, x, n, whole);
}
