/* attention_backward.cuh - what the two kinds of backward kernels share: s = q k^T or its transpose becomes p, dp = dout v^T
 * becomes ds. */
#ifndef MIL_ATTENTION_BACKWARD_CUH
#define MIL_ATTENTION_BACKWARD_CUH
#include "attention.cuh"

__device__ static inline const float2 *stats_of(const Attention &a, int b, int h, int t) {
  return a.stats + ((size_t)b * a.H + h) * a.stats_T + t;
}

/* ROWS tokens from t on of head h: rows of q and dout */
template <class Layout, int ROWS, int THREADS>
__device__ static inline void load_heads(real *q_tile, real *d_tile, const Attention &a, int b, int t, int h) {
  const real *from = a.q + query_at(a, b, t, h);
  load_tile<Layout, ROWS, THREADS>(q_tile, Beside{d_tile, distance(a.dout, a.q)}, a.q, a.P, a.whole, 0, a.T - t,
                                   [&](int row) { return from + row * (a.H * a.P); });
}
/* ROWS tokens from t on of group g: rows of k and v */
template <class Layout, int ROWS, int THREADS>
__device__ static inline void load_groups(real *k_tile, real *v_tile, const Attention &a, int b, int t, int g) {
  const real *from = a.k + key_at(a, b, t, g);
  load_tile<Layout, ROWS, THREADS>(k_tile, Beside{v_tile, distance(a.v, a.k)}, a.k, a.P, a.whole, 0, a.T - t,
                                   [&](int row) { return from + row * (a.G * a.P); });
}

/* How many tiles of QUERIES, from token `first` on, see any of KEYS keys: what is seen first never falls. All threads call. */
template <int KEYS, int QUERIES, int THREADS>
__device__ static inline int tiles_that_see(const Attention &a, int b, int first) {
  int tiles = 0;
  for (int some = THREADS; some == THREADS; tiles += some) {
    const int t = first + (tiles + (int)threadIdx.x) * QUERIES;
    some = __syncthreads_count(t < a.T && first_seen(a, b, 0, t) < first + KEYS);
  }
  return tiles;
}

/* A warp's 16 keys from `key` on, 8 N queries from `now` on with their stats: s becomes p, then dp becomes ds. */
template <int N>
__device__ static inline void weights_of_keys(float (&s)[1][N][4], const float2 *stats, const Attention &a, int b, int key,
                                              int now) {
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const bool hides = now < key + 15 || ((a.starts || a.window) && first_seen(a, b, 0, min(now + 8 * N, a.T) - 1) > key);
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float4 two = *(const float4 *)(stats + 8 * n + 2 * j); /* queries 2j, 2j+1 */
#pragma unroll
    for (int c = 0; c < 4; c++) {
      s[0][n][c] = exp2_approx(s[0][n][c] * a.scale - (c % 2 ? two.z : two.x));
      if (hides) {
        const int query = now + 8 * n + 2 * j + c % 2, e = key + g + c / 2 * 8;
        if (e > query || e < first_seen(a, b, 0, query)) s[0][n][c] = 0;
      }
    }
  }
}
template <int N>
__device__ static inline void slopes_of_keys(float (&dp)[1][N][4], const float (&p)[1][N][4], const float2 *stats) {
  const int j = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const float4 two = *(const float4 *)(stats + 8 * n + 2 * j);
#pragma unroll
    for (int c = 0; c < 4; c++) dp[0][n][c] = p[0][n][c] * (dp[0][n][c] - (c % 2 ? two.w : two.y));
  }
}

/* The same of a warp's 16 MT queries from warp_first on and 8 N keys from e on; from warp_full on all the queries see. */
template <int MT, int N>
__device__ static inline void weights_of_queries(float (&s)[MT][N][4], const float2 (&stats)[MT][2], const Attention &a, int b,
                                                 int warp_first, int warp_full, int e) {
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  const bool hides = e + 8 * N > warp_first + 1 || e < warp_full;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = warp_first + 16 * m + 8 * i + g;
      const int from = hides ? first_seen(a, b, 0, t) - e : 0, to = hides ? t + 1 - e : 8 * N;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 2 * i; c < 2 * i + 2; c++) {
          const int at = 8 * n + 2 * j + c % 2;
          s[m][n][c] = at < from || at >= to ? 0 : exp2_approx(s[m][n][c] * a.scale - stats[m][i].x);
        }
    }
}
template <int MT, int N>
__device__ static inline void slopes_of_queries(float (&dp)[MT][N][4], const float (&p)[MT][N][4],
                                                const float2 (&stats)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) dp[m][n][c] = p[m][n][c] * (dp[m][n][c] - stats[m][c / 2].y);
}
template <int MT>
__device__ static inline void load_stats(float2 (&stats)[MT][2], const Attention &a, int b, int h, int warp_first) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) stats[m][i] = *stats_of(a, b, h, warp_first + 16 * m + 8 * i + (int)threadIdx.x % 32 / 4);
}
/* A warp's sums of MT blocks of 16 rows, times factor, to x as rows from t on; find: row of token t. */
template <int COLS, int MT, class Find>
__device__ static inline void store_gradient(const float (&c)[MT][COLS / 8][4], float factor, real *tile, int first,
                                             const Attention &a, int t, Find find) {
  float factors[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++) factors[m][0] = factors[m][1] = factor;
  store_sums<COLS>(c, factors, tile, first, a.P, a.whole,
                   [&](int row) { return t + row < a.T ? find(t + row) : (real *)nullptr; });
}
#endif
