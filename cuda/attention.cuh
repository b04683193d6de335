/* attention.cuh - what forward and backward share: tiles in shared memory, products of tiles, what a token sees.
 *
 * A warp computes 16-row blocks of c = a b with the fragments of mma.m16n8k16 (ptx.cuh): lane = 4 g + j holds rows g, g+8 and
 * columns 2j, 2j+1 of every 8 columns. With bf16 the product is mma over ldmatrix; with float the same lane computes the same
 * elements by FFMA, so every kernel is written once. */
#ifndef MIL_ATTENTION_CUH
#define MIL_ATTENTION_CUH
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common.cuh"

constexpr int STEPS = sizeof(real) == 2 ? 16 : 1; /* of a product to unroll: fragments of float take many registers */
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

/* f(width) with the head dimension padded to a width that kernels are made for; false: too large. */
template <class F> static bool padded(size_t P, F f) {
  if (P > 256) return false;
  if (P <= 32) f(std::integral_constant<int, 32>());
  else if (P <= 64) f(std::integral_constant<int, 64>());
  else if (P <= 128) f(std::integral_constant<int, 128>());
  else f(std::integral_constant<int, 256>());
  return true;
}

/* ---- tiles in shared memory: rows of COLS reals and 16 unused bytes, so that eight rows' units fall into different banks ------------ */

template <int COLS> constexpr int PITCH = COLS + REALS_16;
template <int COLS> __device__ static inline int at(int row, int col) { return row * PITCH<COLS> + col; }

/* Two bf16 in a word by one instruction. */
__device__ static inline unsigned pack(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  unsigned word;
  memcpy(&word, &two, 4);
  return word;
}
__device__ static inline void put(__nv_bfloat16 *to, float a, float b) {
  const unsigned word = pack(a, b);
  memcpy(to, &word, 4);
}
__device__ static inline void put(float *to, float a, float b) { *(float2 *)to = make_float2(a, b); }

/* ROWS rows of P <= COLS reals by THREADS threads: rows from .. to stand at find(row), the others and columns from P on are zero. whole:
 * the rows are 16-byte aligned; then the copies are asynchronous, and the caller commits and waits. `any`: some device address. */
template <int COLS, int ROWS, int THREADS, int UNROLL = 4, class Find>
__device__ static inline void load_tile(real *tile, const real *any, int P, bool whole, int from, int to, Find find) {
  constexpr int UNITS = COLS / REALS_16;
  const unsigned count = max(to - from, 0);
  if (!whole) {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
      const int row = i / COLS, col = i % COLS;
      tile[at<COLS>(row, col)] = (unsigned)(row - from) < count && col < P ? find(row)[col] : float_to_real(0.0f);
    }
    return;
  }
#pragma unroll UNROLL
  for (int i = 0; i < (ROWS * UNITS + THREADS - 1) / THREADS; i++) {
    const int unit = i * THREADS + (int)threadIdx.x, row = unit / UNITS, col = unit % UNITS * REALS_16;
    if (ROWS * UNITS % THREADS && row >= ROWS) break;
    const bool some = (unsigned)(row - from) < count && col < P;
    cp_async_16(tile + at<COLS>(row, col), some ? find(row) + col : any, some ? 16 : 0);
  }
}

/* A warp's ROWS rows of a tile to global memory; find(row): where to, NULL: nowhere. */
template <int COLS, int ROWS, class Find> __device__ static inline void store_rows(const real *tile, int first, int P, bool whole, Find find) {
  constexpr int UNITS = COLS / REALS_16;
  for (int i = threadIdx.x % 32; i < ROWS * UNITS; i += 32) {
    const int row = i / UNITS, col = i % UNITS * REALS_16;
    real *to = find(row);
    const real *from = tile + at<COLS>(first + row, col);
    if (!to || col >= P) continue;
    if (whole)
      *(uint4 *)(to + col) = *(const uint4 *)from;
    else
      for (int k = 0; k < REALS_16 && col + k < P; k++) to[col + k] = from[k];
  }
}

/* Accumulators (MT blocks of 16 rows) times factor[row] through the warp's own rows of a tile to global memory. */
template <int COLS, int MT, class Find>
__device__ static inline void store_sums(const float (&c)[MT][COLS / 8][4], const float (&factor)[MT][2], real *tile, int first, int P,
                                         bool whole, Find find) {
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < COLS / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        put(tile + at<COLS>(first + 16 * m + 8 * i + g, 8 * n + 2 * j), c[m][n][2 * i] * factor[m][i], c[m][n][2 * i + 1] * factor[m][i]);
  __syncwarp();
  store_rows<COLS, 16 * MT>(tile, first, P, whole, find);
}

/* ---- operands: Left is 16 x 16, Right 16 x 16 (two blocks of 8 columns) ------------------------------------------------------------ */

template <class E> struct Left;
template <class E> struct Right;
template <> struct Left<__nv_bfloat16> { unsigned r[4]; };
template <> struct Right<__nv_bfloat16> { unsigned r[2][2]; };
template <> struct Left<float> { float v[2][16]; };   /* rows g, g+8 */
template <> struct Right<float> { float v[16][4]; };  /* columns 2j, 2j+1, and 8 further */

/* The row of a 16 x 16 block that this lane names to ldmatrix. */
template <int COLS> __device__ static inline int lane_at() { return at<COLS>(threadIdx.x % 16, threadIdx.x % 32 / 16 * 8); }
/* a = tile[row .. row+16, 16 k .. 16 k+16] */
template <int COLS> __device__ static inline void load_left(Left<__nv_bfloat16> &a, const __nv_bfloat16 *tile, int row, int k) {
  ldmatrix_x4(a.r, tile + lane_at<COLS>() + at<COLS>(row, 16 * k));
}
/* b = tile[row .. row+16, 16 k .. 16 k+16]^T */
template <int COLS> __device__ static inline void load_rows(Right<__nv_bfloat16> &b, const __nv_bfloat16 *tile, int row, int k) {
  unsigned r[4];
  ldmatrix_x4(r, tile + lane_at<COLS>() + at<COLS>(row, 16 * k));
  b.r[0][0] = r[0], b.r[0][1] = r[2], b.r[1][0] = r[1], b.r[1][1] = r[3];
}
/* b = tile[row .. row+16, 16 n .. 16 n+16] */
template <int COLS> __device__ static inline void load_columns(Right<__nv_bfloat16> &b, const __nv_bfloat16 *tile, int row, int n) {
  unsigned r[4];
  ldmatrix_x4_trans(r, tile + lane_at<COLS>() + at<COLS>(row, 16 * n));
  b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
}
/* a = 16 x 16 of sums, two blocks of 8 columns, rounded to bf16 */
__device__ static inline void as_left(Left<__nv_bfloat16> &a, const float (&c)[4], const float (&d)[4]) {
  a.r[0] = pack(c[0], c[1]), a.r[1] = pack(c[2], c[3]), a.r[2] = pack(d[0], d[1]), a.r[3] = pack(d[2], d[3]);
}
/* (c | d) += a b */
__device__ static inline void multiply(float (&c)[4], float (&d)[4], const Left<__nv_bfloat16> &a, const Right<__nv_bfloat16> &b) {
  mma_bf16(c, a.r, b.r[0]);
  mma_bf16(d, a.r, b.r[1]);
}

template <int COLS> __device__ static inline void load_left(Left<float> &a, const float *tile, int row, int k) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int u = 0; u < 16; u += 4) {
      float x[4];
      load_16(x, tile + at<COLS>(row + 8 * i + g, 16 * k + u));
      for (int l = 0; l < 4; l++) a.v[i][u + l] = x[l];
    }
}
template <int COLS> __device__ static inline void load_rows(Right<float> &b, const float *tile, int row, int k) {
  const int j = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int u = 0; u < 16; u += 4) {
      float x[4];
      load_16(x, tile + at<COLS>(row + n / 2 * 8 + 2 * j + n % 2, 16 * k + u));
      for (int l = 0; l < 4; l++) b.v[u + l][n] = x[l];
    }
}
template <int COLS> __device__ static inline void load_columns(Right<float> &b, const float *tile, int row, int n) {
  const int j = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < 16; k++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 x = *(const float2 *)(tile + at<COLS>(row + k, 16 * n + 8 * i + 2 * j));
      b.v[k][2 * i] = x.x, b.v[k][2 * i + 1] = x.y;
    }
}
__device__ static inline void as_left(Left<float> &a, const float (&c)[4], const float (&d)[4]) {
  const int first = (int)threadIdx.x % 32 & ~3;
#pragma unroll
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a.v[i][k] = __shfl_sync(0xffffffffu, c[2 * i + k % 2], first + k / 2);
      a.v[i][8 + k] = __shfl_sync(0xffffffffu, d[2 * i + k % 2], first + k / 2);
    }
}
__device__ static inline void multiply(float (&c)[4], float (&d)[4], const Left<float> &a, const Right<float> &b) {
#pragma unroll
  for (int k = 0; k < 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      c[i] += a.v[i / 2][k] * b.v[k][i % 2];
      d[i] += a.v[i / 2][k] * b.v[k][2 + i % 2];
    }
}

/* s (16 MT rows, 8 N columns) = a b^T: rows a_row .. of tile a, rows b_row .. of tile b, over their COLS columns */
template <int COLS, int MT, int N>
__device__ static inline void score(float (&s)[MT][N][4], const real *a, int a_row, const real *b, int b_row) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < N; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll STEPS
  for (int k = 0; k < COLS / 16; k++) {
    Left<real> left[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) load_left<COLS>(left[m], a, a_row + 16 * m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      Right<real> right;
      load_rows<COLS>(right, b, b_row + 8 * n, k);
#pragma unroll
      for (int m = 0; m < MT; m++) multiply(s[m][n], s[m][n + 1], left[m], right);
    }
  }
}
/* o (16 MT rows, COLS columns) += s (16 MT rows, 8 N columns) times rows row .. row+8N of tile v */
template <int COLS, int MT, int N>
__device__ static inline void weigh(float (&o)[MT][COLS / 8][4], const float (&s)[MT][N][4], const real *v, int row) {
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    Left<real> left[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) as_left(left[m], s[m][k], s[m][k + 1]);
#pragma unroll
    for (int n = 0; n < COLS / 8; n += 2) {
      Right<real> right;
      load_columns<COLS>(right, v, row + 8 * k, n / 2);
#pragma unroll
      for (int m = 0; m < MT; m++) multiply(o[m][n], o[m][n + 1], left[m], right);
    }
  }
}

/* Over the four lanes that share a row. */
__device__ static inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ static inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

/* ---- what a token sees -------------------------------------------------------------------------------------------------------------- */

struct Attention {
  real *o, *dq, *dk, *dv, *kcache, *vcache;
  float *lse; /* (B,H,T) */
  const real *q, *k, *v, *dout;
  Rows rows;
  const int32_t *starts; /* (B,T): where the token's document starts; NULL: 0 */
  float2 *stats;         /* backward: (B,H,padded T) of lse log2(e), delta */
  float scale;
  int window, B, T, H, G, P, K, rep, stats_T;
  bool whole; /* rows of P are 16-byte aligned */
};

/* Depth of the first token of this call; where row b is in the caches. */
__device__ static inline int slot_of(const Attention &a, int b) { return a.rows.slot ? a.rows.slot[b] : b; }
__device__ static inline int base_of(const Attention &a, int b) { return a.kcache && a.rows.pos ? a.rows.pos[slot_of(a, b)] : 0; }

/* The first depth that token t of a chain sees, itself at depth base + t. Of the cache the last K entries are there. */
__device__ static inline int first_seen(const Attention &a, int b, int base, int t) {
  int from = a.starts ? a.starts[(size_t)b * a.T + t] : max(base - a.K, 0);
  return a.window ? max(from, base + t + 1 - a.window) : from;
}

__device__ static inline size_t query_at(const Attention &a, int b, int t, int h) { return (((size_t)b * a.T + t) * a.H + h) * a.P; }
__device__ static inline size_t key_at(const Attention &a, int b, int t, int g) { return (((size_t)b * a.T + t) * a.G + g) * a.P; }

/* attention.cu: the documents' starts into `starts` (B,T). */
void find_starts(int32_t *starts, const int32_t *prev, size_t B, size_t T);

static inline bool all_aligned(std::initializer_list<const void *> pointers) {
  uintptr_t bits = 0;
  for (const void *p : pointers) bits |= (uintptr_t)p;
  return !(bits & 15);
}
static inline size_t round_16(size_t bytes) { return (bytes + 15) & ~(size_t)15; }
#endif
