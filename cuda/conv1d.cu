/* conv1d.cu - causal depthwise convolution along prev, then SiLU.
 *
 * It moves memory: a thread takes V neighbouring output channels through a run of
 * tokens, the last three inputs and the filter of four taps in registers, the next tokens' loads under way. Mamba-1's repeat is
 * an index: rep output blocks read the same inputs, from cache but once. Trees and other widths gather their taps token by
 * token. Every way adds bias, then the taps from the oldest on, by fmaf: a token's bits depend on nothing else. What a State
 * keeps is older than the kernel before this one, and is read before that has ended. */
#include "common.cuh"

constexpr int WIDTH = 4, BATCH = 4; /* the taps of the fast kernels; tokens whose loads are under way together */
constexpr int MANY = 4, LITTLE = 2; /* channels of a thread where there is much to do, and where there is little */

/* One of the convolutions of a launch; forward has up to CONV_PARTS, backward one. */
struct Part {
  real *y, *cache;
  const real *x;
  const float *w, *bias;
  unsigned X, D, rep; /* rep = D/X */
};
struct Conv {
  Part part[CONV_PARTS];
  unsigned first[CONV_PARTS + 1]; /* the blocks of channels of each part, counted through */
  Rows rows;
  int n, silu;
  size_t B, T, W;
  unsigned N, K, run; /* run: tokens a thread takes */
  /* backward */
  real *dx;
  const real *dy;
  float *share; /* (B*runs,WIDTH+1,D) shares of dw and dbias */
};

/* ---- shared by all ways -------------------------------------------------------------------------------------------------- */

/* V channels as they lie in memory, in words: nothing waits for them until they are unpacked. */
template <int V> struct Packed {
  static constexpr int WORDS = V * sizeof(real) / 4;
  unsigned w[WORDS];
  __device__ void unpack(float (&to)[V]) const {
#pragma unroll
    for (int e = 0; e < V; e++)
      to[e] = sizeof(real) == 4 ? __uint_as_float(w[e]) : e % 2 ? high_bf16(w[e * WORDS / V]) : low_bf16(w[e * WORDS / V]);
  }
  __device__ void pack(const float (&from)[V]) {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      w[i] = sizeof(real) == 4 ? __float_as_uint(from[i]) : pack_bf16(from[i * V / WORDS], from[i * V / WORDS + 1]);
  }
};
template <> struct Packed<1> {
  real v;
  __device__ void unpack(float (&to)[1]) const { to[0] = load(&v); }
  __device__ void pack(const float (&from)[1]) { store(&v, from[0]); }
};
template <int V>
using Line = std::conditional_t<V * sizeof(real) == 16, uint4, std::conditional_t<V * sizeof(real) == 8, uint2, Packed<V>>>;
template <int V> __device__ static inline Packed<V> load_channels(const real *p) {
  const Line<V> line = *(const Line<V> *)p;
  Packed<V> q;
  memcpy(&q, &line, sizeof q);
  return q;
}
template <int V> __device__ static inline void store_channels(real *p, const Packed<V> &q) {
  Line<V> line;
  memcpy(&line, &q, sizeof q);
  *(Line<V> *)p = line;
}
template <int V> __device__ static inline void store_channels(real *p, const float (&v)[V]) {
  Packed<V> q;
  q.pack(v);
  store_channels(p, q);
}
__device__ static inline float logistic(float v) {
  return reciprocal_approx(__fadd_rn(1.0f, exp2_approx(__fmul_rn(v, -1.44269504f))));
}
__device__ static inline float activate(float v, int silu) { return silu ? __fmul_rn(v, logistic(v)) : v; }
__device__ static inline float slope(float v, int silu) {
  const float s = logistic(v);
  return silu ? s * fmaf(v, 1.0f - s, 1.0f) : 1.0f;
}
/* Output channel c reads input map(c); of the rep outputs of an input this is the r-th. */
__device__ static inline unsigned input_of(const Conv &s, const Part &p, unsigned c) {
  return p.rep == 1 ? c : c / s.N / p.rep * s.N + c % s.N;
}
__device__ static inline bool first_output(const Conv &s, const Part &p, unsigned c) {
  return p.rep == 1 || c / s.N % p.rep == 0;
}

struct Slot {
  size_t slot;
  int pos, place; /* place: where pos stands in the cache */
};
__device__ static inline Slot slot_of(const Conv &s, size_t b) {
  const size_t slot = s.rows.slot ? (size_t)s.rows.slot[b] : b;
  const int pos = s.rows.pos ? s.rows.pos[slot] : 0;
  return {slot, pos, s.K ? (int)((unsigned)pos % s.K) : 0};
}
__device__ static inline bool starts_document(const Conv &s, size_t b, ptrdiff_t t) {
  return s.rows.prev && t >= 0 && s.rows.prev[b * s.T + t] == -2;
}
/* The cache's row of the token at t, where -1 is the one before the call; -K <= t < K. */
__device__ static inline real *cached(const Conv &s, const Part &p, const Slot &at, int t) {
  const int row = at.place + t, K = (int)s.K;
  return p.cache + (at.slot * s.K + (row < 0 ? row + K : row >= K ? row - K : row)) * p.X;
}
/* Inputs of the token at t; NULL: zeros. */
__device__ static inline const real *input_at(const Conv &s, const Part &p, const Slot &at, size_t b, int t) {
  if (t >= 0) return p.x + (b * s.T + t) * p.X;
  return p.cache && at.pos + t >= 0 ? cached(s, p, at, t) : nullptr;
}

template <int V> struct Filter {
  float w[V][WIDTH], bias[V];
  __device__ Filter(const Part &p, unsigned c) {
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float *from = p.w + (size_t)(c + e) * WIDTH;
      if constexpr (V > 1) {
        const float4 q = *(const float4 *)from;
        w[e][0] = q.x, w[e][1] = q.y, w[e][2] = q.z, w[e][3] = q.w;
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) w[e][i] = from[i];
      }
      bias[e] = p.bias ? p.bias[c + e] : 0.0f;
    }
  }
};
/* The last inputs along a chain: x[i] those under the taps i < WIDTH-1. */
template <int V> struct Window {
  float x[WIDTH - 1][V];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < WIDTH - 1; i++)
#pragma unroll
      for (int e = 0; e < V; e++) x[i][e] = 0;
  }
  __device__ void push(const float (&now)[V]) {
#pragma unroll
    for (int e = 0; e < V; e++) {
#pragma unroll
      for (int i = 0; i + 2 < WIDTH; i++) x[i][e] = x[i + 1][e];
      x[WIDTH - 2][e] = now[e];
    }
  }
  /* From the raw inputs before token t. */
  __device__ void begin(const Conv &s, size_t b, int t, const Packed<V> (&past)[WIDTH - 1]) {
    clear();
#pragma unroll
    for (int i = 0; i < WIDTH - 1; i++) {
      float now[V];
      past[i].unpack(now);
      if (starts_document(s, b, t - (WIDTH - 1) + i)) clear();
      push(now);
    }
  }
  __device__ float sum(const Filter<V> &f, const float (&now)[V], int e) const {
    float sum = f.bias[e];
#pragma unroll
    for (int i = 0; i < WIDTH - 1; i++) sum = fmaf(f.w[e][i], x[i][e], sum);
    return fmaf(f.w[e][WIDTH - 1], now[e], sum);
  }
};
/* Those inputs of channel m on that are in the call (CALL), or in the cache. */
template <int V, bool CALL>
__device__ static inline void load_past(Packed<V> (&past)[WIDTH - 1], const Conv &s, const Part &p, const Slot &at, size_t b,
                                        int t, size_t m) {
#pragma unroll
  for (int i = 0; i < WIDTH - 1; i++) {
    const int u = t - (WIDTH - 1) + i;
    if (CALL != (u >= 0)) continue;
    const real *from = input_at(s, p, at, b, u);
    past[i] = from ? load_channels<V>(from + m) : Packed<V>{};
  }
}

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

/* The next BATCH tokens, of which n are there. */
template <int V> __device__ static inline void load_batch(Packed<V> (&raw)[BATCH], const real *x, size_t X, int n) {
#pragma unroll
  for (int k = 0; k < BATCH; k++, x += X)
    if (k < n) raw[k] = load_channels<V>(x);
}

/* A thread's chain: channels m of x and c of y. */
template <int V> struct Walk {
  const Filter<V> filter;
  Window<V> window;
  Slot at;
  size_t b, m;
  real *y;
  bool caches;
  /* n tokens (WHOLE: BATCH) from t on. PLAIN: one document, and the cache is left alone. */
  template <bool PLAIN, bool WHOLE>
  __device__ void step(const Conv &s, const Part &p, const Packed<V> (&raw)[BATCH], int t, int n) {
#pragma unroll
    for (int k = 0; k < BATCH; k++, y += p.D) {
      if (!WHOLE && k >= n) return;
      float now[V], out[V];
      raw[k].unpack(now);
      if (!PLAIN && starts_document(s, b, t + k)) window.clear();
#pragma unroll
      for (int e = 0; e < V; e++) out[e] = activate(window.sum(filter, now, e), s.silu);
      store_channels(y, out);
      if (!PLAIN && caches) store_channels(cached(s, p, at, t + k) + m, raw[k]);
      window.push(now);
    }
  }
};

template <int V> constexpr int slides = V * sizeof(real) > 8 ? 4 : V > 2 ? 6 : 8; /* blocks of a multiprocessor */
/* Chains of width 4. Blocks: (row, run, group of channels), channels first. caches: this call's inputs go to the cache. */
template <int V, bool PLAIN>
static __global__ void __launch_bounds__(128, slides<V>) slide(const __grid_constant__ Conv s, bool caches) {
  const unsigned groups = s.first[s.n], runs = ((unsigned)s.T + s.run - 1) / s.run, group = blockIdx.x % groups,
                 i = blockIdx.x / groups;
  const int of = (s.n > 1 && group >= s.first[1]) + (s.n > 2 && group >= s.first[2]);
  const Part p = s.part[of];
  const unsigned c = ((group - s.first[of]) * blockDim.x + threadIdx.x) * V;
  if (c >= p.D) return;
  const size_t b = i / runs, m = input_of(s, p, c);
  const int first = (int)(i % runs * s.run), last = min(first + (int)s.run, (int)s.T);
  const Slot at = p.cache ? slot_of(s, b) : Slot{};
  Packed<V> raw[BATCH], next[BATCH], past[WIDTH - 1];
  load_past<V, false>(past, s, p, at, b, first, m);
  Walk<V> walk = {Filter<V>(p, c), {}, at, b, m, p.y + (b * s.T + first) * p.D + c, caches && first_output(s, p, c)};
  const real *x = p.x + (b * s.T + first) * p.X + m;
  wait_for_previous_kernel();
  let_next_kernel_start();
  load_batch(raw, x, p.X, last - first);
  load_past<V, true>(past, s, p, at, b, first, m);
  walk.window.begin(s, b, first, past);
  int t = first;
#pragma unroll 2
  for (; t + BATCH <= last; t += BATCH) {
    x += BATCH * p.X;
    load_batch(next, x, p.X, last - t - BATCH);
    walk.template step<PLAIN, true>(s, p, raw, t, BATCH);
#pragma unroll
    for (int k = 0; k < BATCH; k++) raw[k] = next[k];
  }
  walk.template step<PLAIN, false>(s, p, raw, t, last - t);
}

/* The inputs under tap i of token t: W-1-i steps back along prev. */
__device__ static const real *tap(const Conv &s, const Part &p, const Slot &at, size_t b, int t, size_t i) {
  for (size_t left = s.W - 1 - i; left; left--) {
    if (t >= 0 && s.rows.prev) {
      t = s.rows.prev[b * s.T + t];
      if (t == -2) return nullptr;
    } else {
      t--;
    }
  }
  return input_at(s, p, at, b, t);
}
__device__ static float gathered(const Conv &s, const Part &p, const Slot &at, size_t b, int t, unsigned c) {
  const unsigned m = input_of(s, p, c);
  float sum = p.bias ? p.bias[c] : 0.0f;
  for (size_t i = 0; i < s.W; i++) {
    const real *from = tap(s, p, at, b, t, i);
    sum = fmaf(p.w[c * s.W + i], from ? load(from + m) : 0.0f, sum);
  }
  return sum;
}
/* An output a thread; blockIdx.y: the part. */
static __global__ void gather(const __grid_constant__ Conv s, bool caches) {
  const Part p = s.part[blockIdx.y];
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = e / p.D;
  if (row >= s.B * s.T) return;
  const size_t b = row / s.T;
  const unsigned c = e % p.D;
  const int t = (int)(row % s.T);
  const Slot at = p.cache ? slot_of(s, b) : Slot{};
  store(p.y + e, activate(gathered(s, p, at, b, t, c), s.silu));
  if (caches && first_output(s, p, c)) cached(s, p, at, t)[input_of(s, p, c)] = p.x[row * p.X + input_of(s, p, c)];
}

/* After a call whose inputs may take the places of those it reads: the last K of its first keep + PENDING. A block to a row of
 * them; blockIdx.y: the part. */
static __global__ void fill_cache(const __grid_constant__ Conv s) {
  const Part p = s.part[blockIdx.y];
  const size_t b = blockIdx.x / s.K, keep = s.rows.keep ? (size_t)s.rows.keep[b] : s.T, last = min(s.T, keep + PENDING);
  const size_t t = (last > s.K ? last - s.K : 0) + blockIdx.x % s.K;
  if (t >= last) return;
  const Slot at = slot_of(s, b);
  for (size_t m = threadIdx.x; m < p.X; m += blockDim.x)
    p.cache[(at.slot * s.K + (at.pos + t) % s.K) * p.X + m] = p.x[(b * s.T + t) * p.X + m];
}

static Conv conv_of(const ConvPart *part, int n, Rows rows, int silu, size_t B, size_t T, size_t N, size_t W, size_t K) {
  Conv s = {};
  for (int i = 0; i < n; i++) {
    const ConvPart &a = part[i];
    if (!a.X || !a.D) continue;
    s.part[s.n++] = {a.y, a.cache, a.x, a.w, a.bias, (unsigned)a.X, (unsigned)a.D, (unsigned)(a.D / a.X)};
  }
  s.rows = rows, s.silu = silu, s.B = B, s.T = T, s.W = W, s.N = (unsigned)N, s.K = (unsigned)K;
  return s;
}
/* Whether V channels stand together in inputs and outputs, and these arrays and the filters can be read V at a time. */
static bool together(const Conv &s, const Part &p, unsigned V, const void *a, const void *b) {
  return !(((uintptr_t)a | (uintptr_t)b | (uintptr_t)p.x) % (V * sizeof(real))) && !((uintptr_t)p.w % 16) && p.X % V == 0 &&
         (p.rep == 1 || s.N % V == 0);
}
/* Tokens a thread takes: the more the fewer inputs are read twice, but there must be threads enough. */
static unsigned run_of(const Conv &s, size_t vectors, size_t most) {
  const size_t run = s.B * s.T * vectors / (2048 * (size_t)multiprocessors()) / BATCH * BATCH;
  return (unsigned)min(max(run, (size_t)BATCH), most);
}

template <int V> static void launch_slide(Conv &s, size_t D, unsigned threads, bool caches) {
  s.run = run_of(s, D / V, 32);
  for (int i = 0; i < s.n; i++) s.first[i + 1] = s.first[i] + (unsigned)ceil_div(s.part[i].D / V, threads);
  const size_t blocks = s.B * ceil_div(s.T, s.run) * s.first[s.n];
  if (caches || s.rows.prev)
    LAUNCH_EARLY((slide<V, false>), blocks, threads, 0, s, caches);
  else
    LAUNCH_EARLY((slide<V, true>), blocks, threads, 0, s, caches);
}

/* Where latency is all, few channels a thread and few threads a block: more of the card takes part. */
static void slide_all(Conv &s, bool caches) {
  size_t D = 0;
  bool wide = true, pairs = true;
  for (int i = 0; i < s.n; i++) {
    const Part &p = s.part[i];
    D += p.D, wide &= together(s, p, MANY, p.y, p.cache), pairs &= together(s, p, LITTLE, p.y, p.cache);
  }
  if (pairs && (!wide || s.B * ceil_div(s.T, BATCH) * (D / MANY) < 512 * (size_t)multiprocessors()))
    launch_slide<LITTLE>(s, D, 64, caches);
  else if (wide)
    launch_slide<MANY>(s, D, 128, caches);
  else
    launch_slide<1>(s, D, 128, caches);
}

void conv1d_forward(const ConvPart *part, int n, Rows rows, int silu, size_t B, size_t T, size_t N, size_t W, size_t K) {
  Conv s = conv_of(part, n, rows, silu, B, T, N, W, K);
  if (!B || !T || !s.n) return;
  const bool cache = s.part[0].cache, caches = cache && T <= PENDING;
  size_t D = 0;
  for (int i = 0; i < s.n; i++) D = max(D, (size_t)s.part[i].D);
  if (W != WIDTH || (rows.prev && T <= PENDING))
    LAUNCH(gather, dim3(blocks_for(B * T * D, 128), s.n), 128, 0, s, caches);
  else
    slide_all(s, caches);
  if (cache && !caches) LAUNCH(fill_cache, dim3((unsigned)(B * K), s.n), 256, 0, s);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

/* y = f(sum): with dsum = dy f'(sum), dx[t] = sum over outputs r and steps j of w[W-1-j] dsum[t+j], dw[i] = sum_t dsum[t] x
 * under tap i. Thread (x,r) takes V inputs and their r-th outputs through a run of tokens, and the three after it that reach
 * back into it. The rep parts of dx meet in shared memory. Width 4. */
template <int V, bool PLAIN, bool REPEAT>
static __global__ void __launch_bounds__(V == 1 ? 1024 : 256) slide_back(const Conv s) {
  const Part &p = s.part[0];
  const size_t X = p.X, D = p.D;
  const unsigned lanes = blockDim.x, groups = (p.X / V + lanes - 1) / lanes, runs = ((unsigned)s.T + s.run - 1) / s.run;
  const size_t rows = blockIdx.x / groups, b = rows / runs, m = ((size_t)(blockIdx.x % groups) * lanes + threadIdx.x) * V;
  const int first = (int)(rows % runs * s.run), T = (int)s.T, last = min(first + (int)s.run, T), end = min(last + WIDTH - 1, T);
  const int r = REPEAT ? threadIdx.y : 0, rep = REPEAT ? blockDim.y : 1, width = (int)lanes * V;
  const bool mine = m < X;
  const size_t c = !mine ? 0 : REPEAT ? (m / s.N * rep + r) * s.N + m % s.N : m;
  DYNAMIC_SHARED(float, shares); /* (2,BATCH,rep,lanes*V) */
  const Filter<V> filter(p, (unsigned)c);
  Window<V> window;
  Packed<V> past[WIDTH - 1] = {};
  float dx[WIDTH][V] = {}, dw[WIDTH][V] = {}, dbias[V] = {}; /* dx[j]: of the token j before this one */
  int reach = PLAIN ? WIDTH - 1 : 0; /* how many tokens before this one are of its document, as far as that matters */
  if (mine) load_past<V, true>(past, s, p, Slot{}, b, first, m);
  window.begin(s, b, first, past);
  const real *x = p.x + (b * s.T + first) * X + m, *dy = s.dy + (b * s.T + first) * D + c;
  real *to = s.dx + (b * s.T + first) * X + m - (WIDTH - 1) * (ptrdiff_t)X; /* of the token that is done after this one */
  for (int t = first; t < last + WIDTH - 1; t += BATCH) {
    Packed<V> raw_x[BATCH] = {}, raw_dy[BATCH] = {};
#pragma unroll
    for (int k = 0; k < BATCH; k++, x += X, dy += D)
      if (mine && t + k < end) raw_x[k] = load_channels<V>(x), raw_dy[k] = load_channels<V>(dy);
    float *const share = shares + (t - first) / BATCH % 2 * BATCH * rep * width;
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
      const float counts = t + k < last ? 1.0f : 0.0f;
      const int done = t + k - (WIDTH - 1);
      float now[V], dout[V];
      raw_x[k].unpack(now), raw_dy[k].unpack(dout);
      if (!PLAIN && t + k < T && starts_document(s, b, t + k)) window.clear(), reach = 0;
#pragma unroll
      for (int e = 0; e < V; e++) {
        const float dsum = dout[e] * slope(window.sum(filter, now, e), s.silu), own = dsum * counts;
#pragma unroll
        for (int j = WIDTH - 1; j > 0; j--)
          dx[j][e] = fmaf(filter.w[e][WIDTH - 1 - j], PLAIN || reach >= j ? dsum : 0.0f, dx[j - 1][e]);
        dx[0][e] = filter.w[e][WIDTH - 1] * dsum;
#pragma unroll
        for (int i = 0; i < WIDTH - 1; i++) dw[i][e] = fmaf(own, window.x[i][e], dw[i][e]);
        dw[WIDTH - 1][e] = fmaf(own, now[e], dw[WIDTH - 1][e]);
        dbias[e] += own;
      }
      window.push(now);
      reach = min(reach + 1, WIDTH - 1);
      if (REPEAT) {
#pragma unroll
        for (int e = 0; e < V; e++) share[(k * rep + r) * width + threadIdx.x * V + e] = dx[WIDTH - 1][e];
      } else if (mine && done >= first && done < last) {
        store_channels(to + (ptrdiff_t)k * X, dx[WIDTH - 1]);
      }
    }
    if (REPEAT) {
      __syncthreads();
      for (int k = r; k < BATCH; k += rep) {
        const int done = t + k - (WIDTH - 1);
        float sum[V] = {};
        for (int q = 0; q < rep; q++)
#pragma unroll
          for (int e = 0; e < V; e++) sum[e] += share[(k * rep + q) * width + threadIdx.x * V + e];
        if (mine && done >= first && done < last) store_channels(to + (ptrdiff_t)k * X, sum);
      }
    }
    to += BATCH * X;
  }
  if (!mine) return;
  float *share_of_w = s.share + rows * (WIDTH + 1) * D + c;
#pragma unroll
  for (int e = 0; e < V; e++) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) share_of_w[i * D + e] = dw[i][e];
    share_of_w[WIDTH * D + e] = dbias[e];
  }
}

/* dw (D,WIDTH), dbias (D) += sum over `shares` of part (shares,WIDTH+1,D), in their order. */
static __global__ void sum_filters(float *dw, float *dbias, const float *part, size_t shares, size_t D) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, i = e / D, c = e % D;
  if (i > WIDTH) return;
  float *to = i == WIDTH ? (dbias ? dbias + c : nullptr) : dw ? dw + c * WIDTH + i : nullptr;
  if (!to) return;
  float sum = 0;
#pragma unroll 8
  for (size_t k = 0; k < shares; k++) sum += part[k * (WIDTH + 1) * D + e];
  *to += sum;
}

/* Any width: dsum (B,T,D) first; then an element a thread. */
static __global__ void any_dsum(const Conv s, float *dsum) {
  const Part &p = s.part[0];
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = e / p.D;
  if (row < s.B * s.T) dsum[e] = load(s.dy + e) * slope(gathered(s, p, Slot{}, row / s.T, (int)(row % s.T), e % p.D), s.silu);
}
static __global__ void any_dx(const Conv s, const float *dsum) {
  const Part &p = s.part[0];
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = e / p.X, m = e % p.X, b = row / s.T;
  if (row >= s.B * s.T) return;
  float sum = 0;
  for (size_t r = 0; r < p.rep; r++) {
    const size_t c = p.rep == 1 ? m : (m / s.N * p.rep + r) * s.N + m % s.N;
    for (size_t j = 0; j < s.W && row + j < (b + 1) * s.T; j++) {
      if (j && starts_document(s, b, (ptrdiff_t)(row % s.T + j))) break;
      sum = fmaf(p.w[c * s.W + s.W - 1 - j], dsum[(row + j) * p.D + c], sum);
    }
  }
  store(s.dx + e, sum);
}
static __global__ void any_dw(const Conv s, const float *dsum, float *dw, float *dbias) {
  const Part &p = s.part[0];
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, i = e / p.D, c = e % p.D, m = input_of(s, p, (unsigned)c);
  if (i > s.W || !(i == s.W ? dbias : dw)) return;
  float sum = 0;
  for (size_t row = 0; row < s.B * s.T; row++) {
    const real *from = i < s.W ? tap(s, p, Slot{}, row / s.T, (int)(row % s.T), i) : nullptr;
    sum = fmaf(dsum[row * p.D + c], i == s.W ? 1.0f : from ? load(from + m) : 0.0f, sum);
  }
  *(i == s.W ? dbias + c : dw + c * s.W + i) += sum;
}

template <int V> static void launch_back(Conv &s, float *dw, float *dbias) {
  const Part &p = s.part[0];
  const size_t lanes = max((size_t)32, (size_t)128 / p.rep / 32 * 32), groups = ceil_div(p.X / V, lanes);
  s.run = run_of(s, p.D / V, 128);
  const size_t rows = s.B * ceil_div(s.T, s.run), shared = 2 * BATCH * p.rep * lanes * V * sizeof(float);
  s.share = (float *)device_scratch(rows * (WIDTH + 1) * p.D * sizeof(float));
  if (!s.share) return;
  const dim3 block(lanes, p.rep);
  if (s.rows.prev || p.rep > 1) /* rarely both, so one kernel for either */
    LAUNCH((slide_back<V, false, true>), rows * groups, block, shared, s);
  else
    LAUNCH((slide_back<V, true, false>), rows * groups, block, shared, s);
  LAUNCH(sum_filters, blocks_for((size_t)p.D * (WIDTH + 1), 64), 64, 0, dw, dbias, s.share, rows, (size_t)p.D);
}

void conv1d_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, const float *w, const float *bias,
                     Rows rows, int silu, size_t B, size_t T, size_t X, size_t D, size_t N, size_t W) {
  const ConvPart part = {nullptr, nullptr, x, w, bias, X, D};
  Conv s = conv_of(&part, 1, {}, silu, B, T, N, W, 0);
  s.rows.prev = rows.prev, s.dx = dx, s.dy = dy;
  if (!B || !T || !s.n) return;
  const unsigned rep = s.part[0].rep;
  if (W == WIDTH && rep <= 8 && together(s, s.part[0], MANY, dx, dy)) {
    launch_back<MANY>(s, dw, dbias);
  } else if (W == WIDTH && rep <= 32) {
    launch_back<1>(s, dw, dbias);
  } else {
    float *dsum = (float *)device_scratch(B * T * D * sizeof(float));
    if (!dsum) return;
    LAUNCH(any_dsum, blocks_for(B * T * D, 128), 128, 0, s, dsum);
    LAUNCH(any_dx, blocks_for(B * T * X, 128), 128, 0, s, dsum);
    LAUNCH(any_dw, blocks_for(D * (W + 1), 64), 64, 0, s, dsum, dw, dbias);
  }
}
