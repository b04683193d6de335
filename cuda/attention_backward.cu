/* attention_backward.cu - attention's gradients (Dao 2023) in two passes, each block adding up what it owns in a fixed order:
 * blocks of keys run over the queries that see them (dk, dv), blocks of queries over their keys (dq). Both recompute p.
 *
 *   o = p v, p = exp(s - lse):   dv = p^T dout     dp = dout v^T     ds = p (dp - delta), delta = dout . o
 *   s = scale q k^T:             dq = scale ds k   dk = scale ds^T q */
#include "attention_backward.cuh"

/* stats (B,H,stats_T) = lse log2(e), delta; behind T: p comes out 0. Eight lanes a row (b,t,h). */
static __global__ void find_stats(Attention a) {
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 8;
  const int lane = threadIdx.x % 8, h = i % a.H, t = i / a.H % a.stats_T, b = i / a.H / a.stats_T;
  if (b >= a.B) return;
  float delta = 0;
  if (t < a.T) {
    const real *x = a.dout + query_at(a, b, t, h), *y = a.o + query_at(a, b, t, h);
    const int whole = a.whole ? a.P / REALS_16 : 0;
    for (int u = lane; u < whole; u += 8) {
      float p[REALS_16], q[REALS_16];
      load_16(p, x + u * REALS_16);
      load_16(q, y + u * REALS_16);
      for (int k = 0; k < REALS_16; k++) delta += p[k] * q[k];
    }
    for (int c = whole * REALS_16 + lane; c < a.P; c += 8) delta += load(x + c) * load(y + c);
  }
  for (int d = 4; d; d /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, d, 8);
  if (lane == 0)
    a.stats[((size_t)b * a.H + h) * a.stats_T + t] =
        t < a.T ? make_float2(a.lse[((size_t)b * a.H + h) * a.T + t] * LOG2E, delta) : make_float2(INFINITY, 0);
}
/* ---- dk, dv -------------------------------------------------------------------------------------------------------------- */

/* Grid (B G, tiles of 16 WARPS keys), the longest first; a warp has 16 keys. Tiles of QUERIES tokens of the group's heads in
 * turn, one ahead. DK, DV: which of the two, where registers do not hold both. */
template <int PD, int WARPS, int QUERIES, bool DK, bool DV>
static __global__ void __launch_bounds__(32 * WARPS, 1) backward_keys(Attention a) {
  constexpr int KEYS = 16 * WARPS, THREADS = 32 * WARPS, N = QUERIES / 8;
  DYNAMIC_SHARED(real, k_tile);
  real *const v_tile = k_tile + at<PD>(KEYS, 0), *const q_tile = v_tile + at<PD>(KEYS, 0),
              *const d_tile = q_tile + at<PD>(2 * QUERIES, 0);
  float2 *const stats = (float2 *)(d_tile + at<PD>(2 * QUERIES, 0));
  const int group = blockIdx.x % a.G, b = blockIdx.x / a.G, first = blockIdx.y * KEYS, mine = threadIdx.x / 32 * 16;
  const int key = first + mine;
  const int tiles = tiles_that_see<KEYS, QUERIES, THREADS>(a, b, first);
  auto fetch = [&](int step, int to) {
    const int h = group * a.rep + step / tiles, t = first + step % tiles * QUERIES;
    load_heads<Padded<PD>, QUERIES, THREADS>(q_tile + at<PD>(to * QUERIES, 0), d_tile + at<PD>(to * QUERIES, 0), a, b, t, h);
    if (threadIdx.x < QUERIES / 2) cp_async_16(stats + to * QUERIES + 2 * threadIdx.x, stats_of(a, b, h, t + 2 * threadIdx.x));
    cp_async_commit();
  };

  load_groups<Padded<PD>, KEYS, THREADS>(k_tile, v_tile, a, b, first, group);
  float dk[1][DK ? PD / 8 : 1][4] = {}, dv[1][DV ? PD / 8 : 1][4] = {};
  fetch(0, 0);
  for (int step = 0; step < tiles * a.rep; step++) {
    cp_async_wait<0>();
    __syncthreads();
    const int row = step % 2 * QUERIES, now = first + step % tiles * QUERIES;
    if (step + 1 < tiles * a.rep) fetch(step + 1, (step + 1) % 2);
    if (now + QUERIES <= key) continue; /* all of them before the keys */
    float s[1][N][4], dp[1][N][4];
    score<PD>(s, k_tile, mine, q_tile, row);
    if (DK) score<PD>(dp, v_tile, mine, d_tile, row);
    weights_of_keys(s, stats + row, a, b, key, now);
    if (DK) slopes_of_keys(dp, s, stats + row);
    if constexpr (DV) weigh<PD>(dv, s, d_tile, row);
    if constexpr (DK) weigh<PD>(dk, dp, q_tile, row);
  }
  __syncthreads();
  if constexpr (DK)
    store_gradient<PD>(dk, a.scale * LN2, k_tile, mine, a, key, [&](int t) { return a.dk + key_at(a, b, t, group); });
  if constexpr (DV) store_gradient<PD>(dv, 1, k_tile, mine, a, key, [&](int t) { return a.dv + key_at(a, b, t, group); });
}

template <int PD, int WARPS, int QUERIES>
constexpr size_t KEYS_SHARED = (32 * WARPS + 4 * QUERIES) * PITCH<PD> * sizeof(real) + 2 * QUERIES * sizeof(float2);

template <int PD, int WARPS, int QUERIES, bool DK, bool DV> static bool run_keys(const Attention &a) {
  constexpr size_t SHARED = KEYS_SHARED<PD, WARPS, QUERIES>;
  if (!fits(SHARED)) return false;
  LAUNCH((backward_keys<PD, WARPS, QUERIES, DK, DV>), dim3(a.B * a.G, ceil_div(a.T, 16 * WARPS)), 32 * WARPS, SHARED, a);
  return true;
}
/* Both, in one kernel where registers hold the sums. */
template <int PD, int WARPS, int QUERIES> static bool run_keys_twice(const Attention &a) {
  if constexpr (PD <= (sizeof(real) == 2 ? 128 : 64))
    return run_keys<PD, WARPS, QUERIES, true, true>(a);
  else
    return run_keys<PD, WARPS, QUERIES, true, false>(a) && run_keys<PD, WARPS, QUERIES, false, true>(a);
}

/* ---- dq ------------------------------------------------------------------------------------------------------------------ */

/* Grid (H, tiles of queries, B), the longest first; a warp has 16 MT rows. Keys and values come KEYS at a time, one ahead. */
template <int PD, int MT, int WARPS, int KEYS, int BLOCKS>
static __global__ void __launch_bounds__(32 * WARPS, BLOCKS) backward_queries(Attention a) {
  constexpr int ROWS = 16 * MT * WARPS, THREADS = 32 * WARPS, N = KEYS / 8;
  DYNAMIC_SHARED(real, q_tile);
  real *const d_tile = q_tile + at<PD>(ROWS, 0), *const k_tile = d_tile + at<PD>(ROWS, 0),
              *const v_tile = k_tile + at<PD>(2 * KEYS, 0);
  const int h = blockIdx.x, b = a.begin + blockIdx.z;
  const int first = (int)(gridDim.y - 1 - blockIdx.y) * ROWS, last = min(first + ROWS, a.T) - 1;
  const int mine = threadIdx.x / 32 * 16 * MT, warp_first = first + mine;
  const int warp_full = first_seen(a, b, 0, min(warp_first + 16 * MT - 1, last)); /* from here on all its rows see */
  auto fetch = [&](int e, int to) {
    load_groups<Padded<PD>, KEYS, THREADS>(k_tile + at<PD>(to * KEYS, 0), v_tile + at<PD>(to * KEYS, 0), a, b, e, h / a.rep);
    cp_async_commit();
  };

  load_heads<Padded<PD>, ROWS, THREADS>(q_tile, d_tile, a, b, first, h);
  float2 stats[MT][2];
  load_stats(stats, a, b, h, warp_first);
  float dq[MT][PD / 8][4] = {};
  int e = first_seen(a, b, 0, first) / KEYS * KEYS, buffer = 0;
  fetch(e, 0);
  for (; e <= last; e += KEYS, buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (e + KEYS <= last) fetch(e + KEYS, buffer ^ 1);
    if (e >= warp_first + 16 * MT) continue; /* above the diagonal */
    float s[MT][N][4], dp[MT][N][4];
    score<PD>(s, q_tile, mine, k_tile, buffer * KEYS);
    score<PD>(dp, d_tile, mine, v_tile, buffer * KEYS);
    weights_of_queries(s, stats, a, b, warp_first, warp_full, e);
    slopes_of_queries(dp, s, stats);
    weigh<PD>(dq, dp, k_tile, buffer * KEYS);
  }
  real *out = a.dq + query_at(a, b, warp_first, h);
  store_gradient<PD>(dq, a.scale * LN2, q_tile, mine, a, warp_first,
                     [&](int t) { return out + (t - warp_first) * (a.H * a.P); });
}

template <int PD, int MT, int WARPS, int KEYS>
constexpr size_t QUERIES_SHARED = (32 * MT * WARPS + 4 * KEYS) * PITCH<PD> * sizeof(real);

template <int PD, int MT, int WARPS, int KEYS, int BLOCKS> static bool run_queries(const Attention &a) {
  constexpr size_t SHARED = QUERIES_SHARED<PD, MT, WARPS, KEYS>;
  if (!fits(SHARED)) return false;
  in_parts(a, [](const Attention &a, unsigned count) {
    LAUNCH((backward_queries<PD, MT, WARPS, KEYS, BLOCKS>), dim3(a.H, ceil_div(a.T, 16 * MT * WARPS), count), 32 * WARPS,
           SHARED, a);
  });
  return true;
}

/* ---- any head dimension: a block a token, plain loops -------------------------------------------------------------------- */

/* Grid (T, G or H, B), 128 threads. KEYS: dk, dv of a key over the queries that see it; else dq of a query over its keys.
 * Shared: the sums (P, or 2 P). */
template <bool KEYS> static __global__ void backward_plain(Attention a) {
  DYNAMIC_SHARED(float, sums);
  __shared__ float weight[128], slope[128];
  const int x = blockIdx.x, b = a.begin + blockIdx.z, i = threadIdx.x, heads = KEYS ? a.rep : 1;
  for (int c = i; c < (KEYS ? 2 : 1) * a.P; c += 128) sums[c] = 0;
  for (int h = blockIdx.y * heads; h < (int)(blockIdx.y + 1) * heads; h++) {
    const int from = KEYS ? x : first_seen(a, b, 0, x), to = KEYS ? a.T : x + 1;
    for (int first = from; first < to; first += 128) {
      const int y = first + i, t = KEYS ? y : x, e = KEYS ? x : y, n = min(128, to - first);
      float s = 0, dp = 0, p = 0, delta = 0;
      if (i < n && e >= first_seen(a, b, 0, t)) {
        const real *q = a.q + query_at(a, b, t, h), *k = a.k + key_at(a, b, e, h / a.rep);
        const real *dout = a.dout + query_at(a, b, t, h), *v = a.v + key_at(a, b, e, h / a.rep);
        for (int c = 0; c < a.P; c++) s += load(q + c) * load(k + c), dp += load(dout + c) * load(v + c);
        const float2 stats = *stats_of(a, b, h, t);
        p = exp2f(s * a.scale - stats.x), delta = stats.y;
      }
      __syncthreads();
      weight[i] = p, slope[i] = p * (dp - delta) * a.scale * LN2;
      __syncthreads();
      for (int c = i; c < a.P; c += 128)
        for (int m = 0; m < n; m++) {
          if (KEYS) sums[a.P + c] += weight[m] * load(a.dout + query_at(a, b, first + m, h) + c);
          const real *other = KEYS ? a.q + query_at(a, b, first + m, h) : a.k + key_at(a, b, first + m, h / a.rep);
          sums[c] += slope[m] * load(other + c);
        }
    }
  }
  for (int c = i; c < a.P; c += 128) {
    if (KEYS) store(a.dv + key_at(a, b, x, blockIdx.y) + c, sums[a.P + c]);
    store((KEYS ? a.dk + key_at(a, b, x, blockIdx.y) : a.dq + query_at(a, b, x, blockIdx.y)) + c, sums[c]);
  }
}

/* ---- the op -------------------------------------------------------------------------------------------------------------- */

/* Tiles by the bytes of a row, and smaller ones for cards with less shared memory. */
template <int PD> static bool run_backward(const Attention &a) {
  constexpr int BYTES = PD * sizeof(real), WARPS = BYTES <= 256 ? 8 : 4, QUERIES = BYTES <= 256 ? 64 : 16384 / BYTES;
  constexpr int MT = sizeof(real) == 2 && PD <= 128 ? 2 : 1, KEYS = BYTES <= 512 ? 32 : 16;
  if (run_keys_twice<PD, WARPS, QUERIES>(a)) return run_queries<PD, MT, 4, KEYS, BYTES <= 256 ? 2 : 1>(a);
  if constexpr (KEYS_SHARED<PD, WARPS, QUERIES> > LEAST_SHARED)
    return run_keys_twice<PD, 2, 16>(a) && run_queries<PD, 1, 2, 16, 1>(a);
  return false;
}

void attention_backward(real *dq, real *dk, real *dv, const real *dout, const real *q, const real *k, const real *v,
                        const real *o, const float *lse, Rows rows, float scale, size_t window, size_t sinks, size_t B, size_t T,
                        size_t H, size_t G, size_t P) {
  if (!B || !T || !H || !G) return;
  Attention a = {};
  a.o = (real *)o, a.dq = dq, a.dk = dk, a.dv = dv, a.lse = (float *)lse, a.q = q, a.k = k, a.v = v, a.dout = dout;
  a.rows = rows, a.scale = scale * LOG2E, a.window = clamp(window), a.sinks = window ? clamp(sinks) : 0;
  a.B = B, a.T = T, a.H = H, a.G = G, a.P = P, a.rep = H / G;
  a.whole = P % REALS_16 == 0 && all_aligned({dq, dk, dv, dout, q, k, v, o});
  a.stats_T = (int)ceil_div(T, 128) * 128;
  /* stats stand behind starts: tiles may look there for tokens behind T, where p is 0 anyway. */
  const size_t rows_of_stats = B * H * a.stats_T;
  const size_t starts = rows.prev ? round_16(B * T * sizeof *a.starts) : 0;
  a.split = backward_split(a);
  const size_t parts = a.split > 1 ? 2 * a.split * B * T * G * P * sizeof *a.parts : 0;
  char *scratch = (char *)device_scratch(starts + rows_of_stats * sizeof *a.stats + parts);
  if (!scratch) return;
  a.stats = (float2 *)(scratch + starts);
  a.parts = (float *)(a.stats + rows_of_stats);
  if (rows.prev) {
    find_starts((int32_t *)scratch, rows.prev, B, T);
    a.starts = (int32_t *)scratch;
  }
  LAUNCH(find_stats, ceil_div(rows_of_stats * 8, 256), 256, 0, a);
  if (a.split)
    backward_on_hopper(a);
  else if (!padded(P, [&](auto width) { return run_backward<width>(a); }))
    in_parts(a, [](const Attention &a, unsigned count) {
      LAUNCH(backward_plain<true>, dim3(a.T, a.G, count), 128, 2 * a.P * sizeof(float), a);
      LAUNCH(backward_plain<false>, dim3(a.T, a.H, count), 128, a.P * sizeof(float), a);
    });
  add_gradients_of_sinks(a);
}
