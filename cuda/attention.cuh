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

/* f(width) with the head dimension padded to a width that kernels are made for; false: too large, or f cannot. */
template <class F> static bool padded(size_t P, F f) {
  if (P <= 32) return f(std::integral_constant<int, 32>());
  if (P <= 64) return f(std::integral_constant<int, 64>());
  if (P <= 128) return f(std::integral_constant<int, 128>());
  return P <= 256 && f(std::integral_constant<int, 256>());
}

/* ---- tiles in shared memory: rows of COLS reals and 16 unused bytes, so that eight rows' units fall into different banks - */

template <int COLS> constexpr int PITCH = COLS + REALS_16;
template <int COLS> __device__ static inline int at(int row, int col) { return row * PITCH<COLS> + col; }
template <int PD> struct Padded {
  static constexpr int COLS = PD;
  __device__ static int at(int row, int col) { return ::at<PD>(row, col); }
};

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

/* A second array, `far` bytes from the first, that goes to a second tile in the same way; Alone: there is none. */
struct Alone {
  __device__ void load(int, const real *, const real *, int) const {}
  __device__ void copy(int, const real *) const {}
};
struct Beside {
  real *tile;
  ptrdiff_t far;
  __device__ const real *there(const real *x) const { return (const real *)((const char *)x + far); }
  __device__ void load(int to, const real *x, const real *any, int bytes) const {
    cp_async_16(tile + to, bytes ? there(x) : any, bytes);
  }
  __device__ void copy(int to, const real *x) const { tile[to] = x ? *there(x) : float_to_real(0.0f); }
};
__device__ static inline ptrdiff_t distance(const real *to, const real *from) { return (const char *)to - (const char *)from; }

/* ROWS rows of P <= COLS reals by THREADS threads: rows from .. to stand at find(row), the others and columns from P on are
 * zero. Layout: where a row and column are in the tile. whole: the rows are 16-byte aligned; then the copies are asynchronous,
 * and the caller commits and waits. `any`: some device address. */
template <class Layout, int ROWS, int THREADS, int UNROLL = 4, class Second, class Find>
__device__ static inline void load_tile(real *tile, Second second, const real *any, int P, bool whole, int from, int to,
                                        Find find) {
  constexpr int COLS = Layout::COLS, UNITS = COLS / REALS_16, STEP = THREADS / UNITS; /* THREADS is a multiple of UNITS */
  if (!whole) {
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
      const int row = i / COLS, col = i % COLS;
      const real *x = row >= from && row < to && col < P ? find(row) + col : nullptr;
      tile[Layout::at(row, col)] = x ? *x : float_to_real(0.0f);
      second.copy(Layout::at(row, col), x);
    }
    return;
  }
  const int first = threadIdx.x / UNITS, col = threadIdx.x % UNITS * REALS_16, start = Layout::at(first, col);
  const unsigned count = col < P ? max(to - from, 0) : 0;
#pragma unroll UNROLL
  for (int i = 0; i < ROWS; i += STEP) {
    const int row = first + i, bytes = (unsigned)(row - from) < count ? 16 : 0;
    if (ROWS % STEP && row >= ROWS) break;
    const real *x = bytes ? find(row) + col : any;
    cp_async_16(tile + start + Layout::at(i, 0), x, bytes);
    second.load(start + Layout::at(i, 0), x, any, bytes);
  }
}

/* A warp's ROWS rows of a tile to global memory; find(row): where to, NULL: nowhere. */
template <int COLS, int ROWS, class Find>
__device__ static inline void store_rows(const real *tile, int first, int P, bool whole, Find find) {
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
__device__ static inline void store_sums(const float (&c)[MT][COLS / 8][4], const float (&factor)[MT][2], real *tile, int first,
                                         int P, bool whole, Find find) {
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < COLS / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        put(tile + at<COLS>(first + 16 * m + 8 * i + g, 8 * n + 2 * j), c[m][n][2 * i] * factor[m][i],
            c[m][n][2 * i + 1] * factor[m][i]);
  __syncwarp();
  store_rows<COLS, 16 * MT>(tile, first, P, whole, find);
}

/* ---- operands: Left is 16 x 16, Right 16 x 16 (two blocks of 8 columns) -------------------------------------------------- */

template <class E> struct Left;
template <class E> struct Right;
template <> struct Left<__nv_bfloat16> { unsigned r[4]; };
template <> struct Right<__nv_bfloat16> { unsigned r[2][2]; };
template <> struct Left<float> { float v[2][16]; };   /* rows g, g+8 */
template <> struct Right<float> { float v[16][4]; };  /* columns 2j, 2j+1, and 8 further */

/* The row of a 16 x 16 block that this lane names to ldmatrix: quarters in the order (0,0) (8,0) (0,8) (8,8), or transposed to
 * that. Registers come out in pairs as mma wants them. */
template <int COLS> __device__ static inline int lane_at() { return at<COLS>(threadIdx.x % 16, threadIdx.x % 32 / 16 * 8); }
template <int COLS> __device__ static inline int lane_at_transposed() {
  return at<COLS>(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x % 16 / 8 * 8);
}
/* a = tile[row .. row+16, 16 k .. 16 k+16] */
template <int COLS> __device__ static inline void load_left(Left<__nv_bfloat16> &a, const __nv_bfloat16 *tile, int row, int k) {
  ldmatrix_x4(a.r, tile + lane_at<COLS>() + at<COLS>(row, 16 * k));
}
/* b = tile[row .. row+16, 16 k .. 16 k+16]^T */
template <int COLS>
__device__ static inline void load_rows(Right<__nv_bfloat16> &b, const __nv_bfloat16 *tile, int row, int k) {
  unsigned r[4];
  ldmatrix_x4(r, tile + lane_at_transposed<COLS>() + at<COLS>(row, 16 * k));
  b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
}
/* b = tile[row .. row+16, 16 n .. 16 n+16] */
template <int COLS>
__device__ static inline void load_columns(Right<__nv_bfloat16> &b, const __nv_bfloat16 *tile, int row, int n) {
  unsigned r[4];
  ldmatrix_x4_trans(r, tile + lane_at<COLS>() + at<COLS>(row, 16 * n));
  b.r[0][0] = r[0], b.r[0][1] = r[1], b.r[1][0] = r[2], b.r[1][1] = r[3];
}
/* a = 16 x 16 of sums, two blocks of 8 columns, rounded to bf16 */
__device__ static inline void as_left(Left<__nv_bfloat16> &a, const float (&c)[4], const float (&d)[4]) {
  a.r[0] = pack(c[0], c[1]), a.r[1] = pack(c[2], c[3]), a.r[2] = pack(d[0], d[1]), a.r[3] = pack(d[2], d[3]);
}
/* (c | d) += a b */
__device__ static inline void multiply(float (&c)[4], float (&d)[4], const Left<__nv_bfloat16> &a,
                                       const Right<__nv_bfloat16> &b) {
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

/* ---- what a token sees --------------------------------------------------------------------------------------------------- */

struct Attention {
  real *o, *dq, *dk, *dv, *kcache, *vcache;
  float *lse; /* (B,H,T) */
  const real *q, *k, *v, *dout;
  Rows rows;
  Rope rope; /* inv_freq not NULL: to be done to q and k */
  const int32_t *starts; /* (B,T): where the token's document starts; NULL: 0 */
  float2 *stats;         /* backward: (B,H,padded T) of lse log2(e), delta */
  float *parts;          /* backward: (split,2,B,T,G,P), parts of dk and dv by parts of a group's heads */
  float scale;
  int window, B, T, H, G, P, K, rep, stats_T, split, begin; /* begin: the first b of a launch */
  bool whole; /* rows of P are 16-byte aligned */
  int sinks, turns; /* the first tokens, with entries of their own in the caches, and the other entries: K - sinks */
};

/* Where row b is in the caches; how many tokens stand before this call's. */
__device__ static inline int slot_of(const Attention &a, int b) { return a.rows.slot ? a.rows.slot[b] : b; }
__device__ static inline int base_of(const Attention &a, int b) {
  return a.kcache && a.rows.pos ? a.rows.pos[slot_of(a, b)] : 0;
}

/* The first token that token t of a chain sees, sinks apart (attention_sinks.cu): those before 0 stand in the cache, which has the last
 * K of them. */
__device__ static inline int first_seen(const Attention &a, int b, int base, int t) {
  const int from = a.starts ? a.starts[(size_t)b * a.T + t] : -min(base, a.K);
  return a.window ? max(from, t + 1 - a.window) : from;
}

__device__ static inline size_t query_at(const Attention &a, int b, int t, int h) {
  return (((size_t)b * a.T + t) * a.H + h) * a.P;
}
__device__ static inline size_t key_at(const Attention &a, int b, int t, int g) {
  return (((size_t)b * a.T + t) * a.G + g) * a.P;
}

/* What few tokens see, depths from[t] .. to[t], and token's path among this call's (token < 0: none). All threads call. */
struct Seen {
  int from[PENDING], to[PENDING], prev[PENDING], path[PENDING];
};
__device__ static inline void find_seen(Seen &seen, const Attention &a, int b, int base, int low, int token) {
  const int t = threadIdx.x;
  int to = base + t + 1;
  if (a.rows.prev && t < 32) {
    int parent = t < a.T ? a.rows.prev[(size_t)b * a.T + t] : -1, depth = 1;
    if (t < a.T) seen.prev[t] = parent;
    for (int i = 0; i < 5; i++) { /* parent is 2^i steps back */
      const int more = __shfl_sync(0xffffffffu, depth, max(parent, 0)), next = __shfl_sync(0xffffffffu, parent, max(parent, 0));
      if (parent >= 0) depth += more, parent = next;
    }
    to = base + depth;
  }
  if (t < a.T) seen.to[t] = to, seen.from[t] = a.window ? max(low, to - a.window) : low;
  __syncthreads();
  if (token >= 0 && t == 0)
    for (int i = seen.to[token] - base - 1; i >= 0; i--, token = seen.prev[token]) seen.path[i] = token;
  __syncthreads();
}

/* RoPE of a pair (u, v): cos and sin are scaled. */
__device__ static inline void rotate(float &u, float &v, float cosine, float sine) {
  const float a = __fmaf_rn(u, cosine, -__fmul_rn(v, sine));
  v = __fmaf_rn(v, cosine, __fmul_rn(u, sine));
  u = a;
}
__device__ static inline void rope_angle(float &cosine, float &sine, int position, float inv_freq, float scale) {
  sincosf(__fmul_rn((float)position, inv_freq), &sine, &cosine);
  cosine *= scale, sine *= scale;
}

/* launch(a, count) in parts that a grid's z can count. */
template <class F> static void in_parts(Attention a, F launch, int most = 65535) {
  for (a.begin = 0; a.begin < a.B; a.begin += most) launch(a, (unsigned)std::min(most, a.B - a.begin));
}

/* ---- where keys are ------------------------------------------------------------------------------------------------------ */

/* Keys of row b and group g: token t >= 0 is path[t] of this call (NULL: t), t < 0 stands in the cache. */
struct Keys {
  int b, g, base, slot;
  const int *path;
};

__device__ static inline Keys keys_of(const Attention &a, int b, int g, int base) {
  return {b, g, base, a.kcache ? slot_of(a, b) : 0, nullptr};
}
/* Where a position is in the cache. */
__device__ static inline int entry_at(const Attention &a, int position) {
  const int behind = position - a.sinks;
  return a.sinks + (behind < 0 ? behind : behind % a.turns);
}
/* An entry of the cache; a token of this call; token t: cache and own are both of k or both of v. */
__device__ static inline const real *entry_of(const Attention &a, const Keys &keys, const real *cache, int entry) {
  return cache + (((size_t)keys.slot * a.K + entry) * a.G + keys.g) * a.P;
}
__device__ static inline const real *token_of(const Attention &a, const Keys &keys, const real *own, int t) {
  return own + key_at(a, keys.b, t, keys.g);
}
__device__ static inline const real *key_of(const Attention &a, const Keys &keys, const real *cache, const real *own, int t) {
  return t < 0 ? entry_of(a, keys, cache, entry_at(a, keys.base + t)) : token_of(a, keys, own, keys.path ? keys.path[t] : t);
}

/* The tile of tokens t .. t+ROWS of an array that is partly in cache, partly own, zero outside low .. high: mostly rows in a
 * row. VALUES: the array is the keys', and the values of the same tokens go to a second tile. */
template <class Layout, int ROWS, int THREADS, bool VALUES>
__device__ static inline void load_keys(real *tile, real *values, const Attention &a, const Keys &keys, const real *cache,
                                        const real *own, int t, int low, int high) {
  const int stride = a.G * a.P, entry = t < 0 ? entry_at(a, keys.base + t) : 0, from = low - t, to = high - t;
  const bool cached = t + ROWS <= 0 && entry + ROWS <= a.K;
  if (cached || (t >= 0 && !keys.path)) {
    const real *run = cached ? entry_of(a, keys, cache, entry) : token_of(a, keys, own, t);
    auto find = [&](int row) { return run + row * stride; };
    if constexpr (VALUES)
      load_tile<Layout, ROWS, THREADS>(tile, Beside{values, cached ? distance(a.vcache, a.kcache) : distance(a.v, a.k)}, own,
                                       a.P, a.whole, from, to, find);
    else
      load_tile<Layout, ROWS, THREADS>(tile, Alone(), own, a.P, a.whole, from, to, find);
    return;
  }
  load_tile<Layout, ROWS, THREADS, 1>(tile, Alone(), own, a.P, a.whole, from, to,
                                    [&](int row) { return key_of(a, keys, cache, own, t + row); });
  if (VALUES)
    load_tile<Layout, ROWS, THREADS, 1>(values, Alone(), own, a.P, a.whole, from, to,
                                      [&](int row) { return key_of(a, keys, a.vcache, a.v, t + row); });
}

/* ---- softmax of a warp's scores s (16 MT queries, 8 N keys) -------------------------------------------------------------- */

constexpr float NO_SCORE = -1e30f; /* below any score, and differences from it are no NaN */

/* Queries from warp_first on, tokens from e on: what is not seen is -inf. */
template <int MT, int N>
__device__ static inline void hide_unseen(float (&s)[MT][N][4], const Attention &a, int b, int base, int warp_first, int e) {
  if (e + 8 * N <= warp_first + 1 && e >= first_seen(a, b, base, min(warp_first + 16 * MT, a.T) - 1)) return;
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = warp_first + 16 * m + 8 * i + g, from = first_seen(a, b, base, t) - e, to = t + 1 - e;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 2; c++)
          if (8 * n + 2 * j + c < from || 8 * n + 2 * j + c >= to) s[m][n][2 * i + c] = -INFINITY;
    }
}

/* Scores to weights. Of a row: its greatest score so far, and this lane's part of the sum of weights. scale > 0. True: what was
 * summed before must shrink. */
template <int MT, int N>
__device__ static inline bool online_softmax(float (&s)[MT][N][4], float (&top)[MT][2], float (&sum)[MT][2],
                                             float (&shrink)[MT][2], float scale) {
  bool rises = false;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
      most = fmaxf(top[m][i], quad_max(most));
      rises |= most != top[m][i];
      shrink[m][i] = exp2_approx((top[m][i] - most) * scale);
      top[m][i] = most, sum[m][i] *= shrink[m][i];
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 2 * i; c < 2 * i + 2; c++) {
          s[m][n][c] = exp2_approx(s[m][n][c] * scale - most * scale);
          sum[m][i] += s[m][n][c];
        }
    }
  return __any_sync(0xffffffffu, rises); /* seldom, after the first tiles */
}
template <int MT, int D> __device__ static inline void rescale(float (&o)[MT][D][4], const float (&shrink)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int d = 0; d < D; d++)
#pragma unroll
      for (int c = 0; c < 4; c++) o[m][d][c] *= shrink[m][c / 2];
}

/* The warp's o and lse to global memory, through its own rows of a tile. */
template <int COLS, int MT>
__device__ static inline void store_attended(const float (&o)[MT][COLS / 8][4], const float (&top)[MT][2],
                                             const float (&sum)[MT][2], real *tile, int first, const Attention &a, int b, int h,
                                             int warp_first) {
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = warp_first + 16 * m + 8 * i + g;
      const float total = quad_sum(sum[m][i]);
      factor[m][i] = 1 / total;
      if (a.lse && j == 0 && t < a.T) a.lse[((size_t)b * a.H + h) * a.T + t] = top[m][i] * a.scale * LN2 + logf(total);
    }
  real *out = a.o + query_at(a, b, warp_first, h);
  store_sums<COLS>(o, factor, tile, first, a.P, a.whole,
                   [&](int row) { return warp_first + row < a.T ? out + row * (a.H * a.P) : (real *)nullptr; });
}

/* ---- host ---------------------------------------------------------------------------------------------------------------- */

/* attention.cu: the documents' starts into `starts` (B,T). */
void find_starts(int32_t *starts, const int32_t *prev, size_t B, size_t T);
/* attention_few.cu: T <= PENDING with caches, which it writes; false: the head is too large. */
bool attend_few_tokens(const Attention &a);

/* attention_sinks.cu: o and lse of what the tokens' windows hold take up the sinks before them; likewise dq, dk, dv, given stats. Rows
 * of q and k are rotated. Without sinks nothing is done. */
void attend_sinks(const Attention &a);
void add_gradients_of_sinks(const Attention &a);

/* attention_hopper.cu: many tokens by products of warpgroups; false: not this card, type or shape. */
bool attend_on_hopper(const Attention &a);
/* The gradients likewise, given stats and parts. backward_split: in how many parts dk and dv come; 0: not here. */
int backward_split(const Attention &a);
void backward_on_hopper(const Attention &a);

/* A block's shared memory is bounded: 227 KB on Hopper, 99 KB on consumer cards. Do a kernel's tiles fit? */
constexpr size_t LEAST_SHARED = 99 << 10;
static inline bool fits(size_t shared) {
  static const size_t most = [] {
    int device = 0, bytes = 0;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return (size_t)bytes;
  }();
  return shared <= most;
}

static inline bool all_aligned(std::initializer_list<const void *> pointers) {
  uintptr_t bits = 0;
  for (const void *p : pointers) bits |= (uintptr_t)p;
  return !(bits & 15);
}
static inline int clamp(size_t tokens) { return (int)std::min<size_t>(tokens, 1 << 30); }
static inline size_t round_16(size_t bytes) { return (bytes + 15) & ~(size_t)15; }
#endif
