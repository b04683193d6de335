/* attention.cu - RoPE and causal GQA attention of many tokens, by FlashAttention-2 (Dao 2023): a block owns rows of queries and
 * runs over the keys that they see, from the cache and from this call, with online softmax. attention_few.cu has few tokens
 * with a State. */
#include "attention.cuh"

/* ---- RoPE ---------------------------------------------------------------------------------------------------------------- */

/* A block a token. units: of 16 bytes in half a head; 0: element by element. Shared: cos, then sin, of P/2 angles. */
static __global__ void rope(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, float sign,
                            int H, int P, int units) {
  DYNAMIC_SHARED(float, cosine);
  const int half = P / 2, width = units ? REALS_16 : 1, per_head = half / width, n = H * per_head;
  float *sine = cosine + half;
  const size_t row = (size_t)blockIdx.x * H * P;
  let_next_kernel_start();
  wait_for_previous_kernel();
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
    rope_angle(cosine[k], sine[k], position[blockIdx.x], inv_freq[k], scale);
    sine[k] *= sign;
  }
  __syncthreads();
  while (i < n) {
    const float *c = cosine + i % per_head * width, *s = sine + i % per_head * width;
    real *p = y + place(i);
#pragma unroll
    for (int k = 0; k < REALS_16; k++) {
      if (k >= width) break;
      rotate(u[k], v[k], c[k], s[k]);
    }
    if (units)
      store_16(p, u), store_16(p + half, v);
    else
      store(p, u[0]), store(p + half, v[0]);
    i += blockDim.x;
    if (i < n) load_pair(i);
  }
}

static void run_rope(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, float sign, size_t M,
                     size_t H, size_t P) {
  if (!H || !P) return;
  const int units = P / 2 % REALS_16 || !all_aligned({x, y}) ? 0 : (int)(P / 2 / REALS_16);
  const unsigned threads = H * (units ? (size_t)units : P / 2) > 128 ? 256 : 128;
  LAUNCH_EARLY(rope, M, threads, P * sizeof(float), y, x, position, inv_freq, scale, sign, H, P, units);
}

void rope_forward(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                  size_t P) {
  run_rope(y, x, position, inv_freq, scale, 1, M, H, P);
}
/* y = scale R(a) x: dx = scale R(-a) dy */
void rope_backward(real *dx, const real *dy, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                   size_t P) {
  run_rope(dx, dy, position, inv_freq, scale, -1, M, H, P);
}

/* ---- documents ----------------------------------------------------------------------------------------------------------- */

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

/* ---- many tokens --------------------------------------------------------------------------------------------------------- */

/* Grid (H, tiles of queries, B), the longest first; a warp has 16 MT rows. Keys and values come KEYS at a time, one ahead. */
template <int PD, int MT, int WARPS, int KEYS, int BLOCKS>
static __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attend_many(Attention a) {
  constexpr int ROWS = 16 * MT * WARPS, THREADS = 32 * WARPS, N = KEYS / 8;
  DYNAMIC_SHARED(real, q_tile);
  real *const k_tile = q_tile + at<PD>(ROWS, 0), *const v_tile = k_tile + at<PD>(2 * KEYS, 0);
  const int h = blockIdx.x, b = a.begin + blockIdx.z;
  const int first = (int)(gridDim.y - 1 - blockIdx.y) * ROWS, last = min(first + ROWS, a.T) - 1;
  const int mine = threadIdx.x / 32 * 16 * MT, warp_first = first + mine;
  const int base = base_of(a, b), low = first_seen(a, b, base, first), begin = (base + low) / KEYS * KEYS - base;
  const Keys keys = keys_of(a, b, h / a.rep, base);
  auto fetch = [&](int e, int to) {
    load_keys<Padded<PD>, KEYS, THREADS, true>(k_tile + at<PD>(to * KEYS, 0), v_tile + at<PD>(to * KEYS, 0), a, keys, a.kcache,
                                               a.k, e, low, last + 1);
    cp_async_commit();
  };

  const real *q = a.q + query_at(a, b, first, h);
  load_tile<Padded<PD>, ROWS, THREADS>(q_tile, Alone(), q, a.P, a.whole, 0, a.T - first,
                                       [&](int row) { return q + row * (a.H * a.P); });
  float o[MT][PD / 8][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = NO_SCORE;
  int e = begin, buffer = 0;
  fetch(e, 0);
  for (; e <= last; e += KEYS, buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (e + KEYS <= last) fetch(e + KEYS, buffer ^ 1);
    /* Above the diagonal, or before everything that the warp's rows see. */
    if (e >= warp_first + 16 * MT || e + KEYS <= first_seen(a, b, base, warp_first)) continue;
    float s[MT][N][4];
    score<PD>(s, q_tile, mine, k_tile, buffer * KEYS);
    hide_unseen(s, a, b, base, warp_first, e);
    float shrink[MT][2];
    if (online_softmax(s, top, sum, shrink, a.scale)) rescale(o, shrink);
    weigh<PD>(o, s, v_tile, buffer * KEYS);
  }

  store_attended<PD>(o, top, sum, q_tile, mine, a, b, h, warp_first);
}

template <int PD, int MT, int WARPS, int KEYS>
constexpr size_t MANY_SHARED = (16 * MT * WARPS + 4 * KEYS) * PITCH<PD> * sizeof(real);

template <int PD, int MT, int WARPS, int KEYS, int BLOCKS> static bool run_many(const Attention &a) {
  constexpr size_t SHARED = MANY_SHARED<PD, MT, WARPS, KEYS>;
  if (!fits(SHARED)) return false;
  in_parts(a, [](const Attention &a, unsigned count) {
    LAUNCH((attend_many<PD, MT, WARPS, KEYS, BLOCKS>), dim3(a.H, ceil_div(a.T, 16 * MT * WARPS), count), 32 * WARPS, SHARED, a);
  });
  return true;
}

/* Tiles by the bytes of a row, and smaller ones for cards with less shared memory. */
template <int PD> static bool run_many_of(const Attention &a) {
  constexpr int BYTES = PD * sizeof(real), MT = sizeof(real) == 2 && PD <= 128 ? 2 : 1;
  constexpr int KEYS = BYTES <= 256 ? 64 : 16384 / BYTES;
  if (run_many<PD, MT, 4, KEYS, BYTES <= 512 ? 2 : 1>(a)) return true;
  if constexpr (MANY_SHARED<PD, MT, 4, KEYS> > LEAST_SHARED) return run_many<PD, 1, 4, 16, 1>(a);
  return false;
}

/* ---- any head dimension, any scale: a block a query, plain loops --------------------------------------------------------- */

/* Grid (T, H, B), 128 threads; shared: o (P). */
static __global__ void attend_plain(Attention a) {
  DYNAMIC_SHARED(float, o);
  __shared__ Seen seen;
  __shared__ float weight[128];
  const int t = blockIdx.x, h = blockIdx.y, b = a.begin + blockIdx.z, i = threadIdx.x, base = base_of(a, b);
  int from = first_seen(a, b, base, t), to = t + 1;
  Keys keys = keys_of(a, b, h / a.rep, base);
  if (a.kcache && a.rows.prev && a.T <= PENDING) {
    find_seen(seen, a, b, base, max(base - a.K, 0), t);
    keys.path = seen.path, from = seen.from[t] - base, to = seen.to[t] - base;
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

/* ---- the op -------------------------------------------------------------------------------------------------------------- */

/* Grid (min(T,K), 1, B): sinks, and the last of the other tokens that may still be asked for. */
static __global__ void write_caches(Attention a) {
  const int b = a.begin + blockIdx.z, end = a.rows.keep ? min(a.T, a.rows.keep[b] + PENDING) : a.T, base = base_of(a, b);
  const int sinks = max(min(a.sinks - base, end), 0), nth = blockIdx.x;
  const int t = nth < sinks ? nth : max(end - a.turns, sinks) + nth - sinks;
  if (t >= end) return;
  const int width = a.G * a.P;
  const size_t to = ((size_t)slot_of(a, b) * a.K + entry_at(a, base + t)) * width, from = key_at(a, b, t, 0);
  const int whole = a.whole ? width / REALS_16 : 0;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    ((uint4 *)(a.kcache + to))[i] = ((const uint4 *)(a.k + from))[i];
    ((uint4 *)(a.vcache + to))[i] = ((const uint4 *)(a.v + from))[i];
  }
  for (int i = whole * REALS_16 + threadIdx.x; i < width; i += blockDim.x)
    a.kcache[to + i] = a.k[from + i], a.vcache[to + i] = a.v[from + i];
}

void attention_forward(real *o, float *lse, real *kcache, real *vcache, real *q, real *k, const real *v, Rows rows, Rope rope,
                       float scale, size_t window, size_t sinks, size_t B, size_t T, size_t H, size_t G, size_t P, size_t K) {
  if (!B || !T || !H || !G) return;
  Attention a = {};
  a.o = o, a.lse = lse, a.kcache = kcache, a.vcache = vcache, a.q = q, a.k = k, a.v = v, a.rows = rows;
  a.scale = scale * LOG2E, a.window = clamp(window), a.sinks = window ? clamp(sinks) : 0;
  a.B = B, a.T = T, a.H = H, a.G = G, a.P = P, a.K = kcache ? K : 0, a.turns = a.K - a.sinks, a.rep = H / G;
  a.whole = P % REALS_16 == 0 && all_aligned({o, kcache, vcache, q, k, v});
  a.rope = rope;
  auto rotate = [&] {
    if (!a.rope.inv_freq) return;
    rope_forward(q, q, rope.position, rope.inv_freq, rope.scale, B * T, H, P);
    rope_forward(k, k, rope.position, rope.inv_freq, rope.scale, B * T, G, P);
    a.rope.inv_freq = nullptr;
  };
  if (a.sinks) rotate(); /* few tokens are read again */
  if (kcache && T <= PENDING && attend_few_tokens(a)) return attend_sinks(a);
  rotate();
  if (rows.prev && !kcache) {
    /* 128 more: tiles may look behind T, at nothing that counts. */
    int32_t *starts = (int32_t *)device_scratch((B * T + 128) * sizeof *starts);
    if (!starts) return;
    find_starts(starts, rows.prev, B, T);
    a.starts = starts;
  }
  if (!(scale > 0 && (attend_on_hopper(a) || padded(P, [&](auto width) { return run_many_of<width>(a); }))))
    in_parts(a, [](const Attention &a, unsigned count) {
      LAUNCH(attend_plain, dim3(a.T, a.H, count), 128, a.P * sizeof(float), a);
    });
  attend_sinks(a);
  if (kcache)
    in_parts(a, [](const Attention &a, unsigned count) {
      LAUNCH(write_caches, dim3(std::min(a.T, a.K), 1, count), 128, 0, a);
    });
}
