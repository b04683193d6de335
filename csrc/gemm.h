/* gemm.h - the register-tiled product under ssd.c and attention.c, and linear.c's fallback where SciPy's BLAS is not found.
 *
 * gemm: c[i*ldc + j] (= | add: +=) sum_k a[i*ra + k*ka] * b[k*ldb + j],  i < m, j < n, k < K.
 * a is read by broadcast (any strides), b and c by vectors along j. Every element sums over k in order, one accumulator.
 * gemm_scaled: the same, from scale[i*si] * c[i*ldc + j]; scale NULL: from 0, c is not read.
 * gemm_ahead: gemm_scaled, which meanwhile fetches rows that the caller is to read next, one with each tile and the rest at last.
 * sum_lanes: LANES vectors' sums, lane i that of v[i]; transpose: dst[j*ldd + i] = src[i*lds + j]. */
#ifndef MIL_GEMM_H
#define MIL_GEMM_H
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 6, TILE_VECS = 4 };
#define VEC_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define VEC_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 6, TILE_VECS = 2 };
#define VEC_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define VEC_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
enum { LANES = 4, TILE_ROWS = 6, TILE_VECS = 2 };
#define VEC_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5) /* the lanes of a and b in turn, lower halves */
#define VEC_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7) /* and upper halves */
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_u __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vec vec_load(const float *p) { return *(const vec_u *)p; }
static inline void vec_store(float *p, vec v) { *(vec_u *)p = v; }
static inline vec vec_set(float x) { return x - (vec){0}; }
static inline float vec_sum(vec v) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

/* Rounds halve the vectors and what a lane still has to add; the order of addition is that of no row's place. Step q of LANES - 1
 * (one loop, see gemm_tile) stands 2 half - 1 - q before its round's end. */
static inline __attribute__((always_inline)) vec sum_lanes(vec *v) {
#pragma GCC unroll 16
  for (int q = LANES - 1; q; q--) {
    const int half = 1 << (31 - __builtin_clz((unsigned)q)), i = 2 * half - 1 - q;
    v[i] = VEC_LOW(v[i], v[i + half]) + VEC_HIGH(v[i], v[i + half]);
  }
  return v[0];
}

static __attribute__((noinline, unused)) void transpose(float *dst, size_t ldd, const float *src, size_t lds, size_t rows,
                                                        size_t cols) {
  size_t i = 0;
  for (; i + LANES <= rows; i += LANES) {
    size_t j = 0;
    for (; j + LANES <= cols; j += LANES) { /* log2(LANES) perfect shuffles of the block's rows */
      vec v[LANES], w[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) v[r] = vec_load(src + (i + r) * lds + j);
#pragma GCC unroll 4
      for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < LANES / 2; r++) {
          w[2 * r] = VEC_LOW(v[r], v[r + LANES / 2]);
          w[2 * r + 1] = VEC_HIGH(v[r], v[r + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) v[r] = w[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < LANES; r++) vec_store(dst + (j + r) * ldd + i, v[r]);
    }
    for (; j < cols; j++)
      for (int r = 0; r < LANES; r++) dst[j * ldd + i + r] = src[(i + r) * lds + j];
  }
  for (; i < rows; i++)
    for (size_t j = 0; j < cols; j++) dst[j * ldd + i] = src[i * lds + j];
}

/* What is to be in the second cache soon: `left` rows of `width` floats at each of four places. Fetching them in one go would stall:
 * a core waits for some two dozen lines at a time. */
typedef struct {
  const float *at[4];
  size_t width[4], step[4], left;
} Ahead;

static inline void fetch_row(Ahead *a) {
  if (!a || !a->left) return;
  a->left--;
  for (int i = 0; i < 4; i++) {
    for (size_t j = 0; j < a->width[i]; j += 16) __builtin_prefetch(a->at[i] + j, 0, 2);
    a->at[i] += a->step[i];
  }
}

/* One tile of R rows and U vectors; R, U are constants at every call so that the accumulators stay in registers: GCC takes
 * arrays apart after it has unrolled single loops, not nests. */
static inline __attribute__((always_inline)) void gemm_tile(const int R, const int U, float *c, size_t ldc, const float *a,
                                                            size_t ra, size_t ka, const float *b, size_t ldb, size_t K,
                                                            const float *scale, size_t si) {
  vec acc[TILE_ROWS * TILE_VECS];
#pragma GCC unroll 32
  for (int q = 0; q < R * U; q++)
    acc[q] = scale ? scale[q / U * si] * vec_load(c + q / U * ldc + q % U * LANES) : (vec){0};
  if (scale) { /* the next tile's c */
#pragma GCC unroll 32
    for (int q = 0; q < R * U; q++) __builtin_prefetch(c + (R + q / U) * ldc + q % U * LANES);
  }
  for (size_t k = 0; k < K; k++) {
#pragma GCC unroll 32
    for (int q = 0; q < R * U; q++) acc[q] += a[q / U * ra + k * ka] * vec_load(b + k * ldb + q % U * LANES);
  }
#pragma GCC unroll 32
  for (int q = 0; q < R * U; q++) vec_store(c + q / U * ldc + q % U * LANES, acc[q]);
}

/* All rows of one column strip of U vectors. */
static inline __attribute__((always_inline)) void gemm_strip(const int U, float *c, size_t ldc, const float *a, size_t ra,
                                                             size_t ka, const float *b, size_t ldb, size_t m, size_t K,
                                                             const float *scale, size_t si, Ahead *ahead) {
#define GEMM_ROWS(R)                                                                                     \
  for (; i + R <= m; i += R) {                                                                           \
    fetch_row(ahead);                                                                                    \
    gemm_tile(R, U, c + i * ldc, ldc, a + i * ra, ra, ka, b, ldb, K, scale ? scale + i * si : NULL, si); \
  }
  size_t i = 0;
  GEMM_ROWS(TILE_ROWS);
  GEMM_ROWS(4);
  GEMM_ROWS(2);
  GEMM_ROWS(1);
#undef GEMM_ROWS
}

static __attribute__((noinline, unused)) void gemm_ahead(float *c, size_t ldc, const float *scale, size_t si, const float *a,
                                                         size_t ra, size_t ka, const float *b, size_t ldb, size_t m, size_t n,
                                                         size_t K, Ahead *ahead) {
  size_t j = 0;
  for (; j + TILE_VECS * LANES <= n; j += TILE_VECS * LANES)
    gemm_strip(TILE_VECS, c + j, ldc, a, ra, ka, b + j, ldb, m, K, scale, si, ahead);
  for (; j + LANES <= n; j += LANES) gemm_strip(1, c + j, ldc, a, ra, ka, b + j, ldb, m, K, scale, si, ahead);
  for (; j < n; j++)
    for (size_t i = 0; i < m; i++) {
      float s = scale ? scale[i * si] * c[i * ldc + j] : 0;
      for (size_t k = 0; k < K; k++) s += a[i * ra + k * ka] * b[k * ldb + j];
      c[i * ldc + j] = s;
    }
  while (ahead && ahead->left) fetch_row(ahead);
}

static inline void gemm_scaled(float *c, size_t ldc, const float *scale, size_t si, const float *a, size_t ra, size_t ka,
                               const float *b, size_t ldb, size_t m, size_t n, size_t K) {
  gemm_ahead(c, ldc, scale, si, a, ra, ka, b, ldb, m, n, K, NULL);
}

static inline void gemm(float *c, size_t ldc, const float *a, size_t ra, size_t ka, const float *b, size_t ldb, size_t m,
                        size_t n, size_t K, int add) {
  static const float one = 1;
  gemm_scaled(c, ldc, add ? &one : NULL, 0, a, ra, ka, b, ldb, m, n, K);
}
#endif
