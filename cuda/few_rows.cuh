/* few_rows.cuh - y = x W^T for calls of few tokens in bf16: W passes once, at the speed of memory, and a row of x gets the
 * same bits whatever rows stand beside it.
 *
 * K is cut into units of 64; part p of PARTS = 8 has the units p, p + 8, p + 16, … A part is one chain of mma.m16n8k16 from
 * zero, unit after unit, W the operand a (16 outputs), x the operand b (8 rows); y is the sum of the parts from 0 on, in
 * order. Nothing but K enters this: few_rows here (at most 16 rows) and row_tiles (row_tiles.cuh, more), in all their shapes,
 * give a row the same bits. few_rows gives each part a warp, so that a tile of 8 to 32 outputs has the whole block's loads in
 * flight.
 *
 * A lane 4g+j takes the 16 bytes k = 8j … 8j+7 of a slab of 32 k of row g: fragments of two products, k permuted alike in W
 * and x.
 *
 * few_rows copies W through shared memory as if that were more registers: a lane reads back what it copied itself, so its
 * ring needs no barrier, and 112 KiB a multiprocessor are always under way. The next launch may start at once: its blocks find room
 * where blocks of this one end, and fill their rings while others still compute. */
#ifndef MIL_FEW_ROWS_CUH
#define MIL_FEW_ROWS_CUH
#include "common.cuh"

typedef __nv_bfloat16 bf16;
enum { ADD = 1, FLOATS = 2 }; /* `how`: y +=; y is float (and =) */
constexpr int PARTS = 8, UNIT = 64, THREADS = 32 * PARTS, MOST_PRODUCTS = 5;

__device__ static inline unsigned units_of_part(size_t K, int part) {
  return (unsigned)(((K + UNIT - 1) / UNIT + PARTS - 1 - part) / PARTS);
}

/* c (16 outputs x 8 rows) += a slab: rows g (low) and g + 8 (high) of W, row g of x */
__device__ static inline void add_slab(float (&c)[4], uint4 low, uint4 high, uint4 x) {
  const unsigned a[4] = {low.x, high.x, low.y, high.y}, b[2] = {x.x, x.y};
  mma_bf16(c, a, b);
  const unsigned d[4] = {low.z, high.z, low.w, high.w}, e[2] = {x.z, x.w};
  mma_bf16(c, d, e);
}

/* Elements k … k+7 of a row of K to shared memory, zeros from K on. ALIGNED: rows start at 16 bytes, K is a multiple of 8. */
template <bool ALIGNED> __device__ static inline void fetch(uint4 *to, const bf16 *row, size_t k, size_t K) {
  if constexpr (ALIGNED) {
    cp_async_16_ahead(to, k < K ? row + k : row, k < K ? 16 : 0);
  } else {
    unsigned word[4];
    for (int i = 0; i < 4; i++) {
      const unsigned low = k + 2 * i < K ? __bfloat16_as_ushort(row[k + 2 * i]) : 0;
      word[i] = low | (k + 2 * i + 1 < K ? (unsigned)__bfloat16_as_ushort(row[k + 2 * i + 1]) << 16 : 0);
    }
    *to = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

__device__ static inline void put(real *y, size_t i, float v, int how) {
  if (how & FLOATS)
    ((float *)(void *)y)[i] = v;
  else
    store(y + i, v);
}

/* ---- rmsnorm of rows, by a block --------------------------------------------------------------------------------------------
 *
 * Thread t squares the chunks t, t + THREADS, … of 8 elements in order; then its warp, then the warps. */

__device__ static inline float add_squares(float sum, const float (&v)[8]) {
  for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
  return sum;
}
__device__ static inline float inverse_rms(const float *sum_of_warp, float eps, size_t K) {
  float sum = 0;
  for (int i = 0; i < PARTS; i++) sum += sum_of_warp[i];
  return 1.0f / sqrtf(sum / (float)K + eps);
}

/* 8 elements of a row from k on, zeros from K on. whole: 16 bytes of bf16. */
__device__ static inline void read_chunk(float (&v)[8], const real *row, size_t k, size_t K, bool whole) {
  if (whole) return load_16(v, (const bf16 *)(const void *)(row + k));
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = k + i < K ? load(row + k + i) : 0;
}

/* y = rmsnorm(x) w.   x, y (M,K) */
static __global__ void __launch_bounds__(THREADS)
    norm_rows(real *y, const real *x, const float *w, float eps, size_t M, size_t K) {
  __shared__ float sums[PARTS];
  const bool whole = sizeof(real) == 2 && K % 8 == 0 && aligned_16(x) && aligned_16(y);
  let_next_kernel_start(); /* it has weights to fetch while this one and the one before end */
  wait_for_previous_kernel();
  for (size_t m = blockIdx.x; m < M; m += gridDim.x) {
    const real *row = x + m * K;
    float sum = 0, v[8];
    for (size_t k = 8 * threadIdx.x; k < K; k += 8 * THREADS) {
      read_chunk(v, row, k, K, whole);
      sum = add_squares(sum, v);
    }
    sum = warp_sum(sum);
    __syncthreads(); /* the row before may still read sums */
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    const float scale = inverse_rms(sums, eps, K);
    for (size_t k = 8 * threadIdx.x; k < K; k += 8 * THREADS) {
      read_chunk(v, row, k, K, whole);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = k + i < K ? v[i] * scale * w[k + i] : 0;
      if (whole)
        store_16((bf16 *)(void *)(y + m * K + k), v);
      else
        for (int i = 0; i < 8 && k + i < K; i++) store(y + m * K + k + i, v[i]);
    }
  }
}

/* ---- at most 16 rows: a warp a part -------------------------------------------------------------------------------------- */

struct Few {
  Product p[MOST_PRODUCTS];      /* gated: gate and up, y in the first */
  unsigned first[MOST_PRODUCTS + 1]; /* a product's first unit of 8 outputs (of both, gated); behind the last: how many there are */
  unsigned M;
  int n, how;
  const real *x;
  const float *norm;
  float eps;
  size_t K;
};

/* Shared memory: the warps' rings of W, the parts' sums, then x: staged, that is all its rows, 64 bytes between them so that
 * two rows' slabs fill the banks, and the norm's sums; else rings as for W. A stage is 1 or 2 slabs of GROUPS * 8 rows of W. */
constexpr int slabs_of(int groups) { return groups > 2 ? 1 : 2; }
constexpr size_t ring_bytes(int depth, int slabs, int groups) { return (size_t)PARTS * depth * slabs * groups * 512; }
constexpr size_t part_bytes(int groups, int cols) { return (size_t)PARTS * 8 * cols * (8 * groups + 4) * sizeof(float); }
constexpr size_t row_chunks(size_t K) { return (K + UNIT - 1) / UNIT * UNIT / 8 + 4; }
constexpr size_t few_shared(int groups, int cols, int depth, bool staged, size_t M, size_t K) {
  return ring_bytes(depth, slabs_of(groups), groups) + part_bytes(groups, cols) +
         (staged ? M * (row_chunks(K) * 16 + (PARTS + 1) * sizeof(float)) : ring_bytes(depth, slabs_of(groups), cols));
}

/* Blocks share the units evenly, a run each; a tile is up to SIDE of them, of one product. */
__device__ static inline unsigned run_begin(const Few &c, unsigned block) {
  return (unsigned)((unsigned long long)c.first[c.n] * block / gridDim.x);
}
__device__ static inline int product_of(const Few &c, unsigned unit) {
  int product = 0;
  for (int i = 1; i < c.n; i++)
    if (unit >= c.first[i]) product = i;
  return product;
}

/* Where a warp stands: a stage of a tile, and its rows of W there. A product's last unit reads its last row for outputs that are not. */
template <int GROUPS, bool GATED> struct Cursor {
  static constexpr int SIDE = GATED ? GROUPS / 2 : GROUPS; /* groups of 8 outputs of one product */
  const bf16 *row[GROUPS];
  unsigned unit, end, stage, stages;
  int count, product; /* units of the tile, at most SIDE */

  __device__ Cursor(const Few &c, unsigned stages, int g) : unit(run_begin(c, blockIdx.x)), end(run_begin(c, blockIdx.x + 1)), stage(0), stages(stages) {
    find_rows(c, g);
  }
  __device__ bool done() const { return unit >= end || !stages; }
  __device__ void find_rows(const Few &c, int g) {
    product = GATED ? 0 : product_of(c, unit);
    const unsigned limit = min(end, c.first[product + 1]);
    count = (int)min(limit - unit, (unsigned)SIDE);
#pragma unroll
    for (int h = 0; h < GROUPS; h++) {
      const Product &p = c.p[GATED ? h / SIDE : product];
      const size_t o = ((size_t)(unit - c.first[product]) + h % SIDE) * 8 + g;
      row[h] = (const bf16 *)p.w.data + (o < p.O ? o : p.O - 1) * c.K;
    }
  }
  __device__ void advance(const Few &c, int g) {
    if (++stage < stages) return;
    stage = 0, unit += count;
    if (unit < end) find_rows(c, g);
  }
};

/* x's rows as bf16, 16 bytes a chunk; with norm they are normalised where they stand. A thread meets only its own chunks. */
__device__ static void stage_rows(uint4 *to, float *sums, const Few &c) {
  const unsigned width = row_chunks(c.K), chunks = width - 4, t = threadIdx.x;
  for (unsigned m = t < chunks ? 0 : c.M, at = t; m < c.M;) {
    uint4 v[8];
    unsigned place[8];
#pragma unroll
    for (int u = 0; u < 8; u++) { /* eight loads under way */
      v[u] = make_uint4(0, 0, 0, 0), place[u] = m < c.M ? m * width + at : ~0u;
      if (m < c.M && 8 * at < c.K) v[u] = __ldcg((const uint4 *)(const void *)(c.x + m * c.K + 8 * at));
      at += THREADS;
      if (at >= chunks) at = t, m++;
    }
#pragma unroll
    for (int u = 0; u < 8; u++)
      if (place[u] != ~0u) to[place[u]] = v[u];
  }
  if (c.norm) {
    float *scale = sums + c.M * PARTS, v[8];
    for (unsigned m = 0; m < c.M; m++) {
      float sum = 0;
      for (unsigned at = t; at < chunks; at += THREADS) {
        unpack_16(v, to[m * width + at]);
        sum = add_squares(sum, v);
      }
      sum = warp_sum(sum);
      if (t % 32 == 0) sums[m * PARTS + t / 32] = sum;
    }
    __syncthreads();
    if (t < c.M) scale[t] = inverse_rms(sums + t * PARTS, c.eps, c.K);
    __syncthreads();
#pragma unroll 2
    for (unsigned at = t; 8 * at < c.K; at += THREADS) {
      float w[8];
#pragma unroll
      for (int i = 0; i < 8; i++) w[i] = c.norm[8 * at + i];
      for (unsigned m = 0; m < c.M; m++) {
        unpack_16(v, to[m * width + at]);
        for (int i = 0; i < 8; i++) v[i] = v[i] * scale[m] * w[i];
        store_16((bf16 *)(to + m * width + at), v);
      }
    }
  }
  __syncthreads();
}

/* What a thread stores of a tile: the biases and what stands in y are read ahead of the sums.
 * part: (PARTS, 8 COLS rows, outputs, those of up behind those of gate), rows STRIDE apart. */
template <int GROUPS, int COLS, bool GATED> struct Outputs {
  static constexpr int OUTS = 8 * Cursor<GROUPS, GATED>::SIDE, STRIDE = 8 * GROUPS + 4;
  static constexpr int EACH = (OUTS * 8 * COLS + THREADS - 1) / THREADS;
  float old[EACH], bias[EACH], bias_up[EACH];
  real *y;
  size_t first, O;
  unsigned here; /* outputs of the tile */

  __device__ bool place(const Few &c, int e, unsigned *m, unsigned *o) const {
    const unsigned i = threadIdx.x + e * THREADS;
    *m = i / OUTS, *o = i % OUTS;
    return *m < c.M && *o < here && first + *o < O;
  }
  __device__ void read(const Few &c, unsigned unit, int count, int product) {
    const float *from = c.p[product].bias, *up = GATED ? c.p[1].bias : nullptr;
    y = c.p[product].y, O = c.p[product].O, first = (size_t)(unit - c.first[product]) * 8, here = 8 * count;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      unsigned m, o;
      const bool mine = place(c, e, &m, &o);
      bias[e] = mine && from ? from[first + o] : 0;
      bias_up[e] = mine && up ? up[first + o] : 0;
      old[e] = mine && c.how & ADD ? real_to_float(__ldcg(y + m * O + first + o)) : 0;
    }
  }
  __device__ static float sum(const float *part) {
    float s = 0;
    for (int p = 0; p < PARTS; p++) s += part[p * 8 * COLS * STRIDE];
    return s;
  }
  __device__ void write(const Few &c, const float *part) const {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      unsigned m, o;
      if (!place(c, e, &m, &o)) continue;
      const float *from = part + m * STRIDE + o;
      float v = sum(from) + bias[e];
      if (GATED) {
        const float gate = real_to_float(float_to_real(v)), up = real_to_float(float_to_real(sum(from + OUTS) + bias_up[e]));
        v = gate * sigmoid(gate) * up;
      } else {
        v += old[e];
      }
      put(y, m * O + first + o, v, c.how);
    }
  }
};

/* A warp's sums to part, and all parts' sums to y. */
template <int GROUPS, int COLS, bool GATED, int MMAS>
__device__ static void finish_tile(const float (&acc)[MMAS][COLS][4], float *part, const Outputs<GROUPS, COLS, GATED> &out,
                                   const Few &c) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
#pragma unroll
  for (int i = 0; i < MMAS; i++)
#pragma unroll
    for (int n = 0; n < COLS; n++)
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (2 * i + q / 2 < GROUPS)
          part[((warp * COLS + n) * 8 + 2 * j + q % 2) * out.STRIDE + (2 * i + q / 2) * 8 + g] = acc[i][n][q];
  __syncthreads();
  out.write(c, part);
  __syncthreads(); /* before part is written again */
}

template <int GROUPS, int COLS, int DEPTH, bool STAGED, bool GATED>
static __global__ void __launch_bounds__(THREADS, 1) few_rows(const __grid_constant__ Few c) {
  constexpr int SLABS = slabs_of(GROUPS), MMAS = (GROUPS + 1) / 2, W_STAGE = SLABS * GROUPS * 32, X_STAGE = SLABS * COLS * 32;
  DYNAMIC_SHARED(unsigned char, memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
  uint4 *const ring = (uint4 *)memory + warp * DEPTH * W_STAGE + lane;
  float *const part = (float *)(memory + ring_bytes(DEPTH, SLABS, GROUPS));
  uint4 *const xs = (uint4 *)((unsigned char *)part + part_bytes(GROUPS, COLS));
  uint4 *const x_ring = xs + warp * DEPTH * X_STAGE + lane;
  auto k_of = [&](unsigned stage) {
    return (size_t)(stage * SLABS / 2 * PARTS + warp) * UNIT + (SLABS == 1 ? stage % 2 * 32 : 0) + 8 * j;
  };

  /* W does not come from the kernel before: fill the rings. */
  Cursor<GROUPS, GATED> w(c, units_of_part(c.K, warp) * 2 / SLABS, g);
  auto fetch_w = [&](unsigned slot) {
    if (w.done()) return;
    const size_t k = k_of(w.stage);
#pragma unroll
    for (int s = 0; s < SLABS; s++)
#pragma unroll
      for (int h = 0; h < GROUPS; h++)
        fetch<true>(ring + slot * W_STAGE + (s * GROUPS + h) * 32, w.row[h], h % w.SIDE < w.count ? k + 32 * s : c.K, c.K);
    w.advance(c, g);
  };
  for (int i = 0; i < DEPTH - 1; i++) {
    fetch_w(i);
    cp_async_commit();
  }
  if (c.norm)
    for (size_t k = 8 * threadIdx.x; k < c.K; k += 8 * THREADS) prefetch_l2(c.norm + k);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Cursor<GROUPS, GATED> here(c, 1, g); /* the tile that is computed */

  /* Rows of x that do not exist are the last one: what comes of them is not stored. */
  const uint4 *staged[COLS];
  const bf16 *x_row[COLS];
  unsigned x_stage = 0;
#pragma unroll
  for (int n = 0; n < COLS; n++) {
    const unsigned row = 8 * n + g, m = row < c.M ? row : c.M - 1;
    staged[n] = xs + m * row_chunks(c.K);
    x_row[n] = (const bf16 *)(const void *)c.x + m * c.K;
  }
  auto fetch_x = [&](unsigned slot) {
    const size_t k = k_of(x_stage);
#pragma unroll
    for (int s = 0; s < SLABS; s++)
#pragma unroll
      for (int n = 0; n < COLS; n++) fetch<true>(x_ring + slot * X_STAGE + (s * COLS + n) * 32, x_row[n], k + 32 * s, c.K);
    x_stage = x_stage + 1 < w.stages ? x_stage + 1 : 0;
  };
  if (STAGED)
    stage_rows(xs, (float *)(xs + c.M * row_chunks(c.K)), c);
  else
    for (int i = 0; i < DEPTH - 1; i++) {
      fetch_x(i);
      cp_async_commit();
    }

  unsigned slot = 0;
  for (; !here.done(); here.advance(c, g)) {
    Outputs<GROUPS, COLS, GATED> out;
    out.read(c, here.unit, here.count, here.product);
    float acc[MMAS][COLS][4] = {};
    for (unsigned stage = 0; stage < w.stages; stage++) {
      const unsigned free = slot ? slot - 1 : DEPTH - 1;
      fetch_w(free);
      if (!STAGED) fetch_x(free);
      cp_async_commit();
      cp_async_wait<DEPTH - 1>();
#pragma unroll
      for (int s = 0; s < SLABS; s++) {
        uint4 a[2 * MMAS] = {}, b[COLS];
#pragma unroll
        for (int h = 0; h < GROUPS; h++) a[h] = ring[slot * W_STAGE + (s * GROUPS + h) * 32];
#pragma unroll
        for (int n = 0; n < COLS; n++)
          b[n] = STAGED ? staged[n][k_of(stage) / 8 + 4 * s] : x_ring[slot * X_STAGE + (s * COLS + n) * 32];
#pragma unroll
        for (int i = 0; i < MMAS; i++)
#pragma unroll
          for (int n = 0; n < COLS; n++) add_slab(acc[i][n], a[2 * i], a[2 * i + 1], b[n]);
      }
      slot = slot + 1 < DEPTH ? slot + 1 : 0;
    }
    finish_tile(acc, part, out, c);
  }
  cp_async_wait<0>();
}

/* ---- float: plain FFMA --------------------------------------------------------------------------------------------------- */

/* Elements k … k+3 of a row, zeros from K on. whole: 16 bytes of float, 8 of bf16, at once. */
__device__ static inline void load_4(float (&v)[4], const float *p) { load_16(v, p); }
__device__ static inline void load_4(float (&v)[4], const bf16 *p) {
  const uint2 q = *(const uint2 *)p;
  v[0] = low_bf16(q.x), v[1] = high_bf16(q.x), v[2] = low_bf16(q.y), v[3] = high_bf16(q.y);
}
template <class T> __device__ static inline void load_4(float (&v)[4], const T *row, size_t k, size_t K, bool whole) {
  if (whole) return load_4(v, row + k);
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = k + i < K ? load(row + k + i) : 0;
}

/* y (= | add: +=) x w^T + bias: a warp has 4 outputs and ROWS rows, a lane every 32nd run of 4 k, in order; then the lanes
 * are added. */
template <class W, int ROWS>
static __global__ void few_floats(real *y, const real *x, const W *w, const float *bias, int how, size_t M, size_t K, size_t O,
                                  bool whole) {
  constexpr int OUTS = 4;
  const int lane = threadIdx.x % 32;
  const size_t o = ((size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * OUTS;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (o >= O) return;
  for (size_t m = (size_t)blockIdx.y * ROWS; m < M; m += (size_t)gridDim.y * ROWS) {
    float acc[OUTS][ROWS] = {}, mine = 0;
#pragma unroll 2
    for (size_t k = 4 * lane; k < K; k += 128) {
      float a[OUTS][4], b[ROWS][4];
#pragma unroll
      for (int u = 0; u < OUTS; u++) load_4(a[u], w + (o + u < O ? o + u : O - 1) * K, k, K, whole);
#pragma unroll
      for (int r = 0; r < ROWS; r++) load_4(b[r], x + (m + r < M ? m + r : M - 1) * K, k, K, whole);
#pragma unroll
      for (int u = 0; u < OUTS; u++)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[u][r] = fmaf(a[u][i], b[r][i], acc[u][r]);
    }
#pragma unroll
    for (int u = 0; u < OUTS; u++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const float sum = warp_sum(acc[u][r]);
        if (lane == r * OUTS + u) mine = sum;
      }
    const size_t at = o + lane % OUTS, row = m + lane / OUTS;
    if (lane < OUTS * ROWS && at < O && row < M)
      put(y, row * O + at, mine + (bias ? bias[at] : 0) + (how & ADD ? load(y + row * O + at) : 0), how);
  }
}
#endif
