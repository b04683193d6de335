/* attention.cu - RoPE, and the forward of causal GQA attention in two regimes.
 *
 * Many tokens: FlashAttention-2 (Dao 2023): a block owns rows of queries and runs over the keys that they see, online softmax.
 * Few tokens with a State: the keys are cut into chunks at absolute depths, blocks compute (max, sum, o) of every query on their
 * chunks, and a second kernel adds the chunks in the order of depth. A key's place depends on its depth alone and hidden keys weigh
 * exactly 0, so a token's bits depend on what it sees, not on what runs beside it or how tokens came into the cache. */
#include "attention.cuh"

/* ---- RoPE ----------------------------------------------------------------------------------------------------------------------- */

/* A block a token. units: of 16 bytes in half a head; 0: element by element. Shared: cos, then sin, of P/2 angles. */
static __global__ void rope(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, float sign, int H, int P,
                            int units) {
  DYNAMIC_SHARED(float, cosine);
  const int half = P / 2, width = units ? REALS_16 : 1, per_head = half / width, n = H * per_head;
  float *sine = cosine + half;
  const size_t row = (size_t)blockIdx.x * H * P;
  wait_for_previous_kernel();
  let_next_kernel_start();
  float u[REALS_16], v[REALS_16];
  auto place = [&](int i) { return row + (size_t)(i / per_head) * P + i % per_head * width; };
  auto load_pair = [&](int i) {
    const real *p = x + place(i);
    if (units)
      load_16(u, p), load_16(v, p + half);
    else
      u[0] = load(p), v[0] = load(p + half);
  };
  int i = threadIdx.x;
  if (i < n) load_pair(i);
  for (int k = threadIdx.x; k < half; k += blockDim.x) {
    float s, c;
    sincosf(__fmul_rn((float)position[blockIdx.x], inv_freq[k]), &s, &c);
    cosine[k] = scale * c, sine[k] = sign * scale * s;
  }
  __syncthreads();
  while (i < n) {
    const float *c = cosine + i % per_head * width, *s = sine + i % per_head * width;
    real *p = y + place(i);
#pragma unroll
    for (int k = 0; k < REALS_16; k++) {
      if (k >= width) break;
      const float a = u[k] * c[k] - v[k] * s[k];
      v[k] = v[k] * c[k] + u[k] * s[k];
      u[k] = a;
    }
    if (units)
      store_16(p, u), store_16(p + half, v);
    else
      store(p, u[0]), store(p + half, v[0]);
    i += blockDim.x;
    if (i < n) load_pair(i);
  }
}

static void run_rope(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, float sign, size_t M, size_t H,
                     size_t P) {
  if (!H || !P) return;
  const int units = P / 2 % REALS_16 || !all_aligned({x, y}) ? 0 : (int)(P / 2 / REALS_16);
  const unsigned threads = H * (units ? (size_t)units : P / 2) > 128 ? 256 : 128;
  LAUNCH_EARLY(rope, M, threads, P * sizeof(float), y, x, position, inv_freq, scale, sign, H, P, units);
}

void rope_forward(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H, size_t P) {
  run_rope(y, x, position, inv_freq, scale, 1, M, H, P);
}
/* y = scale R(a) x: dx = scale R(-a) dy */
void rope_backward(real *dx, const real *dy, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H, size_t P) {
  run_rope(dx, dy, position, inv_freq, scale, -1, M, H, P);
}

/* ---- documents -------------------------------------------------------------------------------------------------------------------- */

/* A block a row: the running maximum of the t at which documents start. */
static __global__ void scan_starts(int32_t *starts, const int32_t *prev, int T) {
  __shared__ int last[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int before = 0;
  for (int begin = 0; begin < T; begin += blockDim.x) {
    const int t = begin + threadIdx.x;
    const size_t i = (size_t)blockIdx.x * T + t;
    int v = max(before, t < T && prev[i] == -2 ? t : 0);
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, v, d);
      if (lane >= d) v = max(v, other);
    }
    if (lane == 31) last[warp] = v;
    __syncthreads();
    for (int w = 0; w < warp; w++) v = max(v, last[w]);
    if (t < T) starts[i] = v;
    for (int w = 0; w < warps; w++) before = max(before, last[w]);
    __syncthreads();
  }
}

void find_starts(int32_t *starts, const int32_t *prev, size_t B, size_t T) {
  LAUNCH(scan_starts, B, T < 256 ? 256 : 1024, 0, starts, prev, T);
}

/* ---- where keys are ------------------------------------------------------------------------------------------------------------------ */

/* Keys of one row and group: depth e < base is entry e % K of the cache, from there on token path[e - base] (NULL: e - base). */
struct Keys {
  size_t cached, own; /* where they begin in the cache, in k and v */
  const int *path;
  int base;
};

__device__ static inline Keys keys_of(const Attention &a, int b, int g, int base) {
  return {a.kcache ? ((size_t)slot_of(a, b) * a.K * a.G + g) * a.P : 0, key_at(a, b, 0, g), nullptr, base};
}
/* Depth e; cache and own are both of k or both of v. */
__device__ static inline const real *key_of(const Attention &a, const Keys &keys, const real *cache, const real *own, int e) {
  const int t = e - keys.base, row = a.G * a.P;
  return e < keys.base ? cache + keys.cached + (long long)(e % a.K) * row : own + keys.own + (long long)(keys.path ? keys.path[t] : t) * row;
}

/* The tile of depths e .. e+ROWS, zero outside low .. high: most are rows in a row. */
template <int COLS, int ROWS, int THREADS>
__device__ static inline void load_keys(real *tile, const Attention &a, const Keys &keys, const real *cache, const real *own, int e, int low,
                                        int high) {
  const int stride = a.G * a.P, entry = e < keys.base ? e % a.K : 0;
  const real *run = nullptr;
  if (e >= keys.base && !keys.path) run = own + keys.own + (long long)(e - keys.base) * stride;
  if (e + ROWS <= keys.base && entry + ROWS <= a.K) run = cache + keys.cached + (long long)entry * stride;
  if (run)
    load_tile<COLS, ROWS, THREADS>(tile, own, a.P, a.whole, low - e, high - e, [&](int row) { return run + row * stride; });
  else
    load_tile<COLS, ROWS, THREADS, 1>(tile, own, a.P, a.whole, low - e, high - e,
                                      [&](int row) { return key_of(a, keys, cache, own, e + row); });
}

/* ---- many tokens ----------------------------------------------------------------------------------------------------------------------- */

/* Rows m, m+8 of a warp's tile: running maximum (in powers of 2) and this lane's part of the sum. */
template <int MT, int N, int D>
__device__ static inline void online_softmax(float (&s)[MT][N][4], float (&o)[MT][D][4], float (&top)[MT][2], float (&sum)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
      most = fmaxf(top[m][i], quad_max(most));
      const float level = most == -INFINITY ? 0 : most, shrink = exp2_approx(top[m][i] - level);
      top[m][i] = most;
      sum[m][i] *= shrink;
#pragma unroll
      for (int d = 0; d < D; d++) o[m][d][2 * i] *= shrink, o[m][d][2 * i + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 2 * i; c < 2 * i + 2; c++) {
          s[m][n][c] = exp2_approx(s[m][n][c] - level);
          sum[m][i] += s[m][n][c];
        }
    }
}

/* A block (b, h, rows of queries), the longest first; a warp has 16 MT rows. Keys and values come KEYS at a time, one tile ahead. */
template <int PD, int MT, int WARPS, int KEYS, int BLOCKS>
static __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attend_many(Attention a) {
  constexpr int ROWS = 16 * MT * WARPS, THREADS = 32 * WARPS, N = KEYS / 8;
  DYNAMIC_SHARED(real, q_tile);
  real *const k_tile = q_tile + at<PD>(ROWS, 0), *const v_tile = k_tile + at<PD>(2 * KEYS, 0);
  const int h = blockIdx.x % a.H, b = blockIdx.x / a.H, first = (int)(gridDim.y - 1 - blockIdx.y) * ROWS, last = min(first + ROWS, a.T) - 1;
  const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4, mine = threadIdx.x / 32 * 16 * MT; /* the warp's rows of the tile */
  const int base = base_of(a, b), low = first_seen(a, b, base, first), high = base + last + 1;
  const int warp_low = first_seen(a, b, base, min(first + mine, last)), warp_full = first_seen(a, b, base, min(first + mine + 16 * MT - 1, last));
  const int warp_first = base + first + mine;
  const Keys keys = keys_of(a, b, h / a.rep, base);
  auto fetch = [&](int e, int to) {
    load_keys<PD, KEYS, THREADS>(k_tile + at<PD>(to * KEYS, 0), a, keys, a.kcache, a.k, e, low, high);
    load_keys<PD, KEYS, THREADS>(v_tile + at<PD>(to * KEYS, 0), a, keys, a.vcache, a.v, e, low, high);
    cp_async_commit();
  };

  const real *q = a.q + query_at(a, b, first, h);
  load_tile<PD, ROWS, THREADS>(q_tile, q, a.P, a.whole, 0, a.T - first, [&](int row) { return q + row * (a.H * a.P); });
  float o[MT][PD / 8][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = -INFINITY;
  int e = low / KEYS * KEYS, buffer = 0;
  fetch(e, 0);
  for (; e < high; e += KEYS, buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (e + KEYS < high) fetch(e + KEYS, buffer ^ 1);
    if (e >= warp_first + 16 * MT || e + KEYS <= warp_low) continue; /* above the diagonal, or nobody's any more */
    float s[MT][N][4];
    score<PD>(s, q_tile, mine, k_tile, buffer * KEYS);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[m][n][c] *= a.scale;
    if (e + KEYS > warp_first + 1 || e < warp_full) {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int t = first + mine + 16 * m + 8 * i + g, from = first_seen(a, b, base, t) - e, to = base + t + 1 - e;
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int c = 0; c < 2; c++)
              if (8 * n + 2 * j + c < from || 8 * n + 2 * j + c >= to) s[m][n][2 * i + c] = -INFINITY;
        }
    }
    online_softmax(s, o, top, sum);
    weigh<PD>(o, s, v_tile, buffer * KEYS);
  }

  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = first + mine + 16 * m + 8 * i + g;
      const float total = quad_sum(sum[m][i]);
      factor[m][i] = 1 / total;
      if (a.lse && j == 0 && t < a.T) a.lse[((size_t)b * a.H + h) * a.T + t] = top[m][i] * LN2 + logf(total);
    }
  real *out = a.o + query_at(a, b, first + mine, h);
  store_sums<PD>(o, factor, q_tile, mine, a.P, a.whole,
                 [&](int row) { return first + mine + row < a.T ? out + row * (a.H * a.P) : (real *)nullptr; });
}

template <int PD, int MT, int WARPS, int KEYS, int BLOCKS> static void run_many(const Attention &a) {
  constexpr int ROWS = 16 * MT * WARPS;
  LAUNCH((attend_many<PD, MT, WARPS, KEYS, BLOCKS>), dim3(a.B * a.H, ceil_div(a.T, ROWS)), 32 * WARPS,
         (ROWS + 4 * KEYS) * PITCH<PD> * sizeof(real), a);
}

/* ---- few tokens with a State -------------------------------------------------------------------------------------------------------------
 *
 * Chunks wholly in the cache serve all queries of a group. The chunk that holds depth `base` and the one behind it, if this call's
 * tokens reach it, are `own`: one item for a chain, one a token for a tree, where each goes its own path. An item of the others is `n`
 * chunks that are folded as they come, n = 1 or SPAN. A row's partials: `slots` of items, then two of own chunks; each PD floats o,
 * then max (in powers of 2) and sum. */

constexpr int SPAN = 8, CLASSES = 16; /* chunks of a span; spans are added in CLASSES chains, spans of class i = those i modulo CLASSES */

struct Partials {
  float *data; /* (rows of b, G, T*rep, slots+2, PD+4) */
  int4 *seen;  /* (B,T): first depth, end, base, first chunk of the row */
  int n, slots, begin; /* begin: the first b of this launch */
};
template <int PD> __device__ static inline float *partial(const Attention &a, const Partials &p, int b, int g, int r, int slot) {
  return p.data + ((((size_t)(b - p.begin) * a.G + g) * a.T * a.rep + r) * (p.slots + 2) + slot) * (PD + 4);
}

/* A running (max, sum, o) takes up another with maximum x: sum and o become old a + new b. false: there is nothing in it. */
__device__ static inline bool take_up(float &top, float x, float &a, float &b) {
  if (x == -INFINITY) return false;
  const float most = fmaxf(top, x);
  a = exp2_approx(top - most), b = exp2_approx(x - most), top = most;
  return true;
}
__device__ static inline float add_up(float old, float a, float x, float b) { return __fmaf_rn(old, a, __fmul_rn(x, b)); }

/* What tokens see: for threads t < T from[t], to[t]; and the path of `token` (one of a tree) among this call's. All threads call. */
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

/* 16 queries' scores on this warp's part of a chunk become weights in p_tile (16 x CHUNK); the chunk's maxima and sums in top, sum. */
template <int CHUNK, int N>
__device__ static inline void chunk_softmax(float (&s)[1][N][4], real *p_tile, float (&top)[2], float (&sum)[2], float (*tops)[16], float (*sums)[16]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[0][n][2 * i], s[0][n][2 * i + 1]));
    most = quad_max(most);
    if (j == 0) tops[warp][8 * i + g] = most;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float part = 0;
    top[i] = fmaxf(fmaxf(tops[0][8 * i + g], tops[1][8 * i + g]), fmaxf(tops[2][8 * i + g], tops[3][8 * i + g]));
    const float level = top[i] == -INFINITY ? 0 : top[i];
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float x = exp2_approx(s[0][n][2 * i] - level), y = exp2_approx(s[0][n][2 * i + 1] - level);
      part += x + y;
      put(p_tile + at<CHUNK>(8 * i + g, 8 * (warp * N + n) + 2 * j), x, y);
    }
    part = quad_sum(part);
    if (j == 0) sums[warp][8 * i + g] = part;
  }
  cp_async_wait<0>(); /* the values */
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) sum[i] = sums[0][8 * i + g] + sums[1][8 * i + g] + sums[2][8 * i + g] + sums[3][8 * i + g];
}

/* Grid (own + items, G, B): four warps share a chunk's keys for the scores, its columns for the values; 16 queries at a time. */
template <int PD, int CHUNK, int BLOCKS> static __global__ void __launch_bounds__(128, BLOCKS) attend_few(Attention a, Partials p) {
  constexpr int N = CHUNK / 32, D = PD / 32; /* blocks of 8 keys, of 8 columns, of a warp */
  __shared__ Seen seen;
  __shared__ float tops[4][16], sums[4][16];
  DYNAMIC_SHARED(real, k_tile);
  real *const v_tile = k_tile + at<PD>(CHUNK, 0), *const q_tile = v_tile + at<PD>(CHUNK, 0), *const p_tile = q_tile; /* one after the other */
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i0 = lane / 4, j = lane % 4;
  const int b = p.begin + blockIdx.z, group = blockIdx.y, own = a.rows.prev ? a.T : 1;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int base = base_of(a, b), low = max(max(base - a.K, 0), a.window ? base + 1 - a.window : 0);
  const int cached = base / CHUNK, first = low / CHUNK, skipped = first / p.n;
  const int items = own + (cached > first ? (cached + p.n - 1) / p.n - skipped : 0);
  int item = blockIdx.x;
  if (item >= items) return;
  const int token = a.rows.prev && item < own ? item : -1;
  find_seen(seen, a, b, base, low, token);
  if (blockIdx.x == 0 && group == 0 && (int)threadIdx.x < a.T)
    p.seen[(size_t)b * a.T + threadIdx.x] = make_int4(seen.from[threadIdx.x], seen.to[threadIdx.x], base, first);
  Keys keys = keys_of(a, b, group, base);
  if (token >= 0) keys.path = seen.path;
  const int high = token >= 0 ? seen.to[token] : base + a.T;
  const int begin = max(token, 0) * a.rep, end = token >= 0 ? begin + a.rep : a.T * a.rep;

  for (; item < items; item += item < own ? items : gridDim.x - own) {
    const int unit = skipped + item - own;
    const int from = item < own ? cached : max(first, unit * p.n), to = item < own ? (high - 1) / CHUNK + 1 : min((unit + 1) * p.n, cached);
    for (int chunk = from; chunk < to; chunk++) {
      const int e = chunk * CHUNK, slot = item < own ? p.slots + chunk - cached : item - own;
      const bool fresh = item < own || chunk == from;
      auto load_queries = [&](int r) {
        load_tile<PD, 16, 128>(q_tile, a.q, a.P, a.whole, 0, end - r, [&](int row) {
          return a.q + query_at(a, b, (r + row) / a.rep, group * a.rep + (r + row) % a.rep);
        });
        cp_async_commit();
      };
      load_keys<PD, CHUNK, 128>(k_tile, a, keys, a.kcache, a.k, e, low, high);
      load_queries(begin);
      load_keys<PD, CHUNK, 128>(v_tile, a, keys, a.vcache, a.v, e, low, high);
      cp_async_commit();
      for (int r = begin; r < end; r += 16) {
        float old_top[2] = {}, old_sum[2] = {}, top[2], sum[2], *out[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          out[i] = r + 8 * i + i0 < end ? partial<PD>(a, p, b, group, r + 8 * i + i0, slot) : nullptr;
          if (out[i] && !fresh) old_top[i] = out[i][PD], old_sum[i] = out[i][PD + 1];
        }
        if (r > begin) load_queries(r), cp_async_wait<0>();
        else cp_async_wait<1>();
        __syncthreads();
        float s[1][N][4], o[1][D][4] = {};
        score<PD>(s, q_tile, 0, k_tile, warp * (CHUNK / 4));
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int t = min((r + 8 * i + i0) / a.rep, a.T - 1), see = seen.from[t] - e, end_of = seen.to[t] - e;
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
              const int key = 8 * (warp * N + n) + 2 * j + c;
              s[0][n][2 * i + c] = key < see || key >= end_of ? -INFINITY : s[0][n][2 * i + c] * a.scale;
            }
        }
        chunk_softmax<CHUNK>(s, p_tile, top, sum, tops, sums);
#pragma unroll STEPS
        for (int k = 0; k < CHUNK / 16; k++) {
          Left<real> left;
          load_left<CHUNK>(left, p_tile, 0, k);
#pragma unroll
          for (int n = 0; n < D; n += 2) {
            Right<real> right;
            load_columns<PD>(right, v_tile, 16 * k, (warp * D + n) / 2);
            multiply(o[0][n], o[0][n + 1], left, right);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float shrink = 0, grow = 1, most = fresh ? -INFINITY : old_top[i];
          const bool some = take_up(most, top[i], shrink, grow);
          if (!out[i] || (!some && !fresh)) continue;
#pragma unroll
          for (int n = 0; n < D; n++) {
            float2 *to = (float2 *)(out[i] + 8 * (warp * D + n) + 2 * j);
            const float2 old = fresh ? make_float2(0, 0) : *to;
            *to = make_float2(add_up(old.x, shrink, o[0][n][2 * i], grow), add_up(old.y, shrink, o[0][n][2 * i + 1], grow));
          }
          if (warp == 0 && j == 0) out[i][PD] = most, out[i][PD + 1] = add_up(old_sum[i], shrink, sum[i], grow);
        }
        __syncthreads();
      }
    }
  }
}

/* Grid (T*rep, G, B): one query's partials in the order of depth. Within a span one by one, then each class's spans, then the classes.
 * Block r writes token r/rep to the caches: everything that reads them is over. */
template <int PD, int CHUNK> static __global__ void combine(Attention a, Partials p) {
  constexpr int V = PD / 128 ? PD / 128 : 1; /* groups of 4 columns of a lane */
  __shared__ __align__(16) float total[CLASSES][PD + 4];
  struct State {
    float top, sum, o[V][4];
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int r = blockIdx.x, group = blockIdx.y, b = p.begin + blockIdx.z, t = r / a.rep, h = group * a.rep + r % a.rep;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int4 seen = p.seen[(size_t)b * a.T + t];
  const int cached = seen.z / CHUNK, units = SPAN / p.n, skipped = seen.w / p.n, end = (cached + p.n - 1) / p.n;
  const int from = seen.x / CHUNK / SPAN, to = (seen.y - 1) / CHUNK / SPAN;
  const float *row = partial<PD>(a, p, b, group, r, 0);
  auto empty = [](State &x) {
    x.top = -INFINITY, x.sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int c = 0; c < 4; c++) x.o[v][c] = 0;
  };
  auto load_state = [&](State &x, const float *from) {
    const float2 scalars = *(const float2 *)(from + PD);
    x.top = scalars.x, x.sum = scalars.y;
#pragma unroll
    for (int v = 0; v < V; v++)
      if (128 * v + 4 * lane < PD) load_16(x.o[v], from + 128 * v + 4 * lane);
  };
  auto fold = [](State &x, const State &y) {
    float shrink, grow;
    if (!take_up(x.top, y.top, shrink, grow)) return;
    x.sum = add_up(x.sum, shrink, y.sum, grow);
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int c = 0; c < 4; c++) x.o[v][c] = add_up(x.o[v][c], shrink, y.o[v][c], grow);
  };
  for (int i = warp; i < CLASSES; i += warps) {
    State all;
    empty(all);
    for (int span = from + (i - from % CLASSES + CLASSES) % CLASSES; span <= to; span += CLASSES) {
      State inner, parts[SPAN];
      empty(inner);
#pragma unroll
      for (int k = 0; k < SPAN; k++) {
        const int unit = span * units + k;
        empty(parts[k]);
        if (k < units && unit >= skipped && unit < end && seen.w < cached) load_state(parts[k], row + (size_t)(unit - skipped) * (PD + 4));
      }
#pragma unroll
      for (int k = 0; k < SPAN; k++) fold(inner, parts[k]);
      for (int k = 0; k < 2; k++)
        if ((cached + k) / SPAN == span && (cached + k) * CHUNK < seen.y) {
          load_state(parts[0], row + (size_t)(p.slots + k) * (PD + 4));
          fold(inner, parts[0]);
        }
      fold(all, inner);
    }
#pragma unroll
    for (int v = 0; v < V; v++)
      if (128 * v + 4 * lane < PD) store_16(total[i] + 128 * v + 4 * lane, all.o[v]);
    if (lane == 0) total[i][PD] = all.top, total[i][PD + 1] = all.sum;
  }
  __syncthreads();
  const size_t to_o = query_at(a, b, t, h);
  for (int c = threadIdx.x; c < a.P; c += blockDim.x) {
    float top = -INFINITY, sum = 0, o = 0, shrink, grow;
#pragma unroll
    for (int i = 0; i < CLASSES; i++) {
      if (!take_up(top, total[i][PD], shrink, grow)) continue;
      sum = add_up(sum, shrink, total[i][PD + 1], grow);
      o = add_up(o, shrink, total[i][c], grow);
    }
    store(a.o + to_o + c, o / sum);
    if (a.lse && c == 0) a.lse[((size_t)b * a.H + h) * a.T + t] = top * LN2 + logf(sum);
  }
  if (r % a.rep) return;
  const size_t entry = (((size_t)slot_of(a, b) * a.K + (seen.z + t) % a.K) * a.G + group) * a.P, mine = key_at(a, b, t, group);
  for (int c = threadIdx.x; c < a.P; c += blockDim.x) a.kcache[entry + c] = a.k[mine + c], a.vcache[entry + c] = a.v[mine + c];
}

/* n: chunks of an item; 0: as suits the size. */
template <int PD, int CHUNK> static void run_few(const Attention &a, int n = 0) {
  constexpr size_t TILES = (2 * CHUNK * PITCH<PD> + 16 * std::max(PITCH<PD>, PITCH<CHUNK>)) * sizeof(real);
  constexpr int BLOCKS = TILES <= 74 << 10 ? 3 : 1;
  const size_t groups = (size_t)a.B * a.G, spans = ceil_div(a.K, CHUNK * SPAN);
  Partials p = {};
  p.n = n ? n : groups * spans >= 2048 ? SPAN : 1;
  p.slots = (int)ceil_div(a.K, CHUNK * p.n) + 2;
  const size_t row = (size_t)a.G * a.T * a.rep * (p.slots + 2) * (PD + 4) * sizeof(float), seen = a.B * a.T * sizeof(int4);
  const int rows = (int)std::min<size_t>(std::min(a.B, 65535), std::max<size_t>(1, ((size_t)1 << 27) / row)); /* b in parts: bounds scratch */
  p.seen = (int4 *)device_scratch(seen + rows * row);
  if (!p.seen) return;
  p.data = (float *)(p.seen + a.B * a.T);
  const size_t own = a.rows.prev ? a.T : 1, items = std::min<size_t>(p.slots, std::max<size_t>(1, 4096 / (rows * (size_t)a.G)));
  const unsigned warps = spans >= 8 ? 16 : spans >= 4 ? 8 : 4;
  for (p.begin = 0; p.begin < a.B; p.begin += rows) {
    const unsigned count = std::min(rows, a.B - p.begin);
    LAUNCH_EARLY((attend_few<PD, CHUNK, BLOCKS>), dim3(own + items, a.G, count), 128, TILES, a, p);
    LAUNCH_EARLY((combine<PD, CHUNK>), dim3(a.T * a.rep, a.G, count), 32 * warps, 0, a, p);
  }
}

/* ---- any head dimension: a block a query, plain loops ---------------------------------------------------------------------------------- */

/* Grid (T, H, B), 128 threads; shared: o (P). */
static __global__ void attend_plain(Attention a) {
  DYNAMIC_SHARED(float, o);
  __shared__ Seen seen;
  __shared__ float weight[128];
  const int t = blockIdx.x, h = blockIdx.y, b = blockIdx.z, i = threadIdx.x, base = base_of(a, b);
  int from = first_seen(a, b, base, t), to = base + t + 1;
  Keys keys = keys_of(a, b, h / a.rep, base);
  if (a.kcache && a.rows.prev && a.T <= PENDING) {
    find_seen(seen, a, b, base, max(base - a.K, 0), t);
    keys.path = seen.path, from = seen.from[t], to = seen.to[t];
  }
  const real *q = a.q + query_at(a, b, t, h);
  float top = -INFINITY, sum = 0;
  for (int c = i; c < a.P; c += 128) o[c] = 0;
  for (int e = from; e < to; e += 128) {
    const int n = min(128, to - e);
    float s = -INFINITY;
    if (i < n) {
      const real *k = key_of(a, keys, a.kcache, a.k, e + i);
      s = 0;
      for (int c = 0; c < a.P; c++) s += load(q + c) * load(k + c);
      s *= a.scale;
    }
    const float most = fmaxf(top, block_max(s)), shrink = exp2f(top - most), w = exp2f(s - most);
    weight[i] = w;
    sum = sum * shrink + block_sum(w); /* a barrier: weights are there */
    for (int c = i; c < a.P; c += 128) {
      float x = o[c] * shrink;
      for (int m = 0; m < n; m++) x += weight[m] * load(key_of(a, keys, a.vcache, a.v, e + m) + c);
      o[c] = x;
    }
    top = most;
    __syncthreads();
  }
  for (int c = i; c < a.P; c += 128) store(a.o + query_at(a, b, t, h) + c, o[c] / sum);
  if (a.lse && i == 0) a.lse[((size_t)b * a.H + h) * a.T + t] = top * LN2 + logf(sum);
}

/* ---- the op ------------------------------------------------------------------------------------------------------------------------------- */

/* Grid (min(T,K), B): the last K of the tokens that may still be asked for. */
static __global__ void write_caches(Attention a) {
  const int b = blockIdx.y, end = a.rows.keep ? min(a.T, a.rows.keep[b] + PENDING) : a.T, t = max(end - a.K, 0) + (int)blockIdx.x;
  if (t >= end) return;
  const int width = a.G * a.P;
  const size_t to = ((size_t)slot_of(a, b) * a.K + (base_of(a, b) + t) % a.K) * width, from = key_at(a, b, t, 0);
  const int whole = a.whole ? width / REALS_16 : 0;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    ((uint4 *)(a.kcache + to))[i] = ((const uint4 *)(a.k + from))[i];
    ((uint4 *)(a.vcache + to))[i] = ((const uint4 *)(a.v + from))[i];
  }
  for (int i = whole * REALS_16 + threadIdx.x; i < width; i += blockDim.x) a.kcache[to + i] = a.k[from + i], a.vcache[to + i] = a.v[from + i];
}

/* Tiles for many tokens, by the bytes of a row. */
template <int PD> static void run_many_of(const Attention &a) {
  constexpr int BYTES = PD * sizeof(real), MT = sizeof(real) == 2 && PD <= 128 ? 2 : 1, KEYS = BYTES <= 256 ? 64 : 16384 / BYTES;
  run_many<PD, MT, 4, KEYS, BYTES <= 512 ? 2 : 1>(a);
}

void attention_forward(real *o, float *lse, real *kcache, real *vcache, const real *q, const real *k, const real *v, Rows rows, float scale,
                       size_t window, size_t B, size_t T, size_t H, size_t G, size_t P, size_t K) {
  if (!B || !T || !H || !G) return;
  Attention a = {};
  a.o = o, a.lse = lse, a.kcache = kcache, a.vcache = vcache, a.q = q, a.k = k, a.v = v, a.rows = rows, a.scale = scale * LOG2E;
  a.window = (int)std::min<size_t>(window, 1 << 30), a.B = B, a.T = T, a.H = H, a.G = G, a.P = P, a.K = kcache ? K : 0, a.rep = H / G;
  a.whole = P % REALS_16 == 0 && all_aligned({o, kcache, vcache, q, k, v});
  const bool few = kcache && T <= PENDING;
  if (few && P <= 256) {
    padded(P, [&](auto width) {
      constexpr int PD = width < 64 ? 64 : width;
      run_few<PD, PD <= 128 ? 128 : 64>(a);
    });
    return;
  }
  if (rows.prev && !kcache) {
    int32_t *starts = (int32_t *)device_scratch((B * T + 128) * sizeof *starts); /* tiles may look behind T, at nothing that counts */
    if (!starts) return;
    find_starts(starts, rows.prev, B, T);
    a.starts = starts;
  }
  if (!padded(P, [&](auto width) { run_many_of<width>(a); })) LAUNCH(attend_plain, dim3(T, H, B), 128, P * sizeof(float), a);
  if (kcache) LAUNCH(write_caches, dim3(std::min(T, K), B), 128, 0, a);
}
