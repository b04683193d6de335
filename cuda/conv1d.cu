/* conv1d.cu - causal depthwise convolution along prev, then SiLU.
 *
 * It moves memory: a thread takes V neighbouring output channels (16 bytes) through a run of tokens, the last three inputs and
 * the filter of four taps in registers. Mamba-1's repeat is an index: rep output blocks read the same inputs, from cache but
 * once. Trees and other widths gather their taps token by token. Every way adds bias, then the taps from the oldest on, by
 * fmaf: a token's bits depend on nothing else. */
#include "common.cuh"

constexpr int WIDTH = 4, BATCH = 4; /* the taps of the fast kernels; tokens whose loads are under way together */

struct Conv {
  real *y, *cache;
  const real *x;
  const float *w, *bias;
  Rows rows;
  int silu;
  size_t B, T, X, D, N, W, K;
  size_t rep, run; /* D/X; tokens a thread takes */
  /* backward */
  real *dx;
  const real *dy;
  float *part; /* (B*runs,WIDTH+1,D) shares of dw and dbias */
};

/* ---- shared by all ways -------------------------------------------------------------------------------------------------- */

/* V channels as they lie in memory: nothing waits for them until they are unpacked. */
template <int V> struct alignas(V * sizeof(real)) Packed {
  real v[V];
  __device__ void unpack(float (&to)[V]) const {
#pragma unroll
    for (int e = 0; e < V; e++) to[e] = load(v + e);
  }
};
template <int V> __device__ static inline Packed<V> load_channels(const real *p) {
  Packed<V> q;
  if constexpr (V * sizeof(real) == 16)
    *(uint4 *)&q = *(const uint4 *)p;
  else if constexpr (V * sizeof(real) == 8)
    *(uint2 *)&q = *(const uint2 *)p;
  else
    q = *(const Packed<V> *)p;
  return q;
}
template <int V> __device__ static inline void store_channels(real *p, const Packed<V> &q) {
  if constexpr (V * sizeof(real) == 16)
    *(uint4 *)p = *(const uint4 *)&q;
  else if constexpr (V * sizeof(real) == 8)
    *(uint2 *)p = *(const uint2 *)&q;
  else
    *(Packed<V> *)p = q;
}
template <int V> __device__ static inline void store_channels(real *p, const float (&v)[V]) {
  Packed<V> q;
#pragma unroll
  for (int e = 0; e < V; e++) store(q.v + e, v[e]);
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
__device__ static inline size_t input_of(const Conv &s, size_t c) { return s.rep == 1 ? c : c / s.N / s.rep * s.N + c % s.N; }
__device__ static inline bool first_output(const Conv &s, size_t c) { return s.rep == 1 || c / s.N % s.rep == 0; }

struct Slot {
  size_t slot, pos;
};
__device__ static inline Slot slot_of(const Conv &s, size_t b) {
  const size_t slot = s.rows.slot ? (size_t)s.rows.slot[b] : b;
  return {slot, s.rows.pos ? (size_t)s.rows.pos[slot] : 0};
}
__device__ static inline bool starts_document(const Conv &s, size_t b, ptrdiff_t t) {
  return s.rows.prev && t >= 0 && s.rows.prev[b * s.T + t] == -2;
}
/* Inputs of the token at t, where -1 is the one before the call; NULL: zeros. */
__device__ static inline const real *input_at(const Conv &s, const Slot &at, size_t b, ptrdiff_t t) {
  if (t >= 0) return s.x + (b * s.T + t) * s.X;
  return s.cache && (ptrdiff_t)at.pos + t >= 0 ? s.cache + (at.slot * s.K + (at.pos + t) % s.K) * s.X : nullptr;
}

template <int V> struct Filter {
  float w[V][WIDTH], bias[V];
  __device__ Filter(const Conv &s, size_t c) {
#pragma unroll
    for (int e = 0; e < V; e++) {
#pragma unroll
      for (int i = 0; i < WIDTH; i++) w[e][i] = s.w[(c + e) * WIDTH + i];
      bias[e] = s.bias ? s.bias[c + e] : 0.0f;
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
  /* What stands before token t of channel m. */
  __device__ void begin(const Conv &s, const Slot &at, size_t b, ptrdiff_t t, size_t m) {
    clear();
#pragma unroll
    for (int i = WIDTH - 1; i > 0; i--) {
      const real *p = input_at(s, at, b, t - i);
      float now[V] = {};
      if (p) load_channels<V>(p + m).unpack(now);
      if (starts_document(s, b, t - i)) clear();
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

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

/* Where a thread stands in its chain: token t of row b, channels m of x and c of y. */
template <int V> struct Walk {
  Filter<V> filter;
  Window<V> window;
  Slot at;
  size_t b, m;
  const real *x;
  real *y;
  bool caches;
  __device__ Walk(const Conv &s, size_t c) : filter(s, c) {}
  /* Tokens t .. t+n. PLAIN: one document, and the cache is left alone. */
  template <int n, bool PLAIN> __device__ void step(const Conv &s, int t) {
    Packed<V> raw[n];
#pragma unroll
    for (int k = 0; k < n; k++, x += s.X) raw[k] = load_channels<V>(x);
#pragma unroll
    for (int k = 0; k < n; k++, y += s.D) {
      float now[V], out[V];
      raw[k].unpack(now);
      if (!PLAIN && starts_document(s, b, t + k)) window.clear();
#pragma unroll
      for (int e = 0; e < V; e++) out[e] = activate(window.sum(filter, now, e), s.silu);
      store_channels(y, out);
      if (!PLAIN && caches) store_channels(s.cache + (at.slot * s.K + (at.pos + t + k) % s.K) * s.X + m, raw[k]);
      window.push(now);
    }
  }
};

/* Chains of width 4. Blocks: (row, run, group of channels), channels first. caches: this call's inputs go to the cache. */
template <int V, bool PLAIN> static __global__ void __launch_bounds__(128, 4) slide(const Conv s, bool caches) {
  const unsigned groups = (unsigned)((s.D / V + 127) / 128), runs = (unsigned)((s.T + s.run - 1) / s.run);
  const size_t b = blockIdx.x / groups / runs, c = ((size_t)(blockIdx.x % groups) * 128 + threadIdx.x) * V;
  const int first = (int)(blockIdx.x / groups % runs * s.run), last = min(first + (int)s.run, (int)s.T);
  if (c >= s.D) return;
  Walk<V> walk(s, c);
  wait_for_previous_kernel();
  let_next_kernel_start();
  walk.at = s.cache ? slot_of(s, b) : Slot{b, 0}, walk.b = b, walk.m = input_of(s, c),
  walk.caches = caches && first_output(s, c);
  walk.x = s.x + (b * s.T + first) * s.X + walk.m, walk.y = s.y + (b * s.T + first) * s.D + c;
  walk.window.begin(s, walk.at, b, first, walk.m);
  int t = first;
  for (; t + BATCH <= last; t += BATCH) walk.template step<BATCH, PLAIN>(s, t);
  for (; t < last; t++) walk.template step<1, PLAIN>(s, t);
}

/* The inputs under tap i of token t: W-1-i steps back along prev. */
__device__ static const real *tap(const Conv &s, const Slot &at, size_t b, ptrdiff_t t, size_t i) {
  for (size_t left = s.W - 1 - i; left; left--) {
    if (t >= 0 && s.rows.prev) {
      const int before = s.rows.prev[b * s.T + t];
      if (before == -2) return nullptr;
      t = before;
    } else {
      t--;
    }
  }
  return input_at(s, at, b, t);
}
__device__ static float gathered(const Conv &s, const Slot &at, size_t b, size_t t, size_t c) {
  const size_t m = input_of(s, c);
  float sum = s.bias ? s.bias[c] : 0.0f;
  for (size_t i = 0; i < s.W; i++) {
    const real *p = tap(s, at, b, (ptrdiff_t)t, i);
    sum = fmaf(s.w[c * s.W + i], p ? load(p + m) : 0.0f, sum);
  }
  return sum;
}
/* An output a thread. */
static __global__ void gather(const Conv s, bool caches) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = e / s.D, c = e % s.D;
  if (row >= s.B * s.T) return;
  const size_t b = row / s.T, t = row % s.T;
  const Slot at = s.cache ? slot_of(s, b) : Slot{b, 0};
  store(s.y + e, activate(gathered(s, at, b, t, c), s.silu));
  if (caches && first_output(s, c))
    s.cache[(at.slot * s.K + (at.pos + t) % s.K) * s.X + input_of(s, c)] = s.x[row * s.X + input_of(s, c)];
}

/* After a call whose inputs may take the places of those it reads: the last K of its first keep + PENDING. A block to a row of
 * them. */
static __global__ void fill_cache(const Conv s) {
  const size_t b = blockIdx.x / s.K, keep = s.rows.keep ? (size_t)s.rows.keep[b] : s.T, last = min(s.T, keep + PENDING);
  const size_t t = (last > s.K ? last - s.K : 0) + blockIdx.x % s.K;
  if (t >= last) return;
  const Slot at = slot_of(s, b);
  for (size_t m = threadIdx.x; m < s.X; m += blockDim.x)
    s.cache[(at.slot * s.K + (at.pos + t) % s.K) * s.X + m] = s.x[(b * s.T + t) * s.X + m];
}

static Conv conv_of(const real *x, const float *w, const float *bias, Rows rows, int silu, size_t B, size_t T, size_t X,
                    size_t D, size_t N, size_t W, size_t K) {
  Conv s = {};
  s.x = x, s.w = w, s.bias = bias, s.rows = rows, s.silu = silu, s.B = B, s.T = T, s.X = X, s.D = D, s.N = X == D ? D : N,
  s.W = W, s.K = K;
  s.rep = X ? D / X : 0;
  return s;
}
/* Whether V channels stand together in inputs and outputs, and these arrays can be read V at a time. */
static bool together(const Conv &s, size_t V, const void *p, const void *q, const void *r) {
  return !(((uintptr_t)p | (uintptr_t)q | (uintptr_t)r | (uintptr_t)s.x) % (V * sizeof(real))) && s.X % V == 0 &&
         (s.rep == 1 || s.N % V == 0);
}
/* Tokens a thread takes: the more the fewer inputs are read twice, but there must be threads enough. */
static size_t run_of(const Conv &s, size_t vectors, size_t most) {
  const size_t run = s.B * s.T * vectors / (2048 * (size_t)multiprocessors()) / BATCH * BATCH;
  return min(max(run, (size_t)BATCH), most);
}

template <int V> static void launch_slide(Conv &s, bool caches) {
  s.run = run_of(s, s.D / V, 32);
  const size_t blocks = s.B * ceil_div(s.T, s.run) * ceil_div(s.D / V, 128);
  if (caches || s.rows.prev)
    LAUNCH_EARLY((slide<V, false>), blocks, 128, 0, s, caches);
  else
    LAUNCH_EARLY((slide<V, true>), blocks, 128, 0, s, caches);
}

void conv1d_forward(real *y, real *cache, const real *x, const float *w, const float *bias, Rows rows, int silu, size_t B,
                    size_t T, size_t X, size_t D, size_t N, size_t W, size_t K) {
  Conv s = conv_of(x, w, bias, rows, silu, B, T, X, D, N, W, K);
  s.y = y, s.cache = cache;
  if (!B || !T || !X || !D) return;
  const bool caches = cache && T <= PENDING;
  if (W != WIDTH || (rows.prev && T <= PENDING))
    LAUNCH(gather, blocks_for(B * T * D, 128), 128, 0, s, caches);
  else if (together(s, REALS_16, y, cache, nullptr))
    launch_slide<REALS_16>(s, caches);
  else
    launch_slide<1>(s, caches);
  if (cache && !caches) LAUNCH(fill_cache, B * K, 256, 0, s);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

/* y = f(sum): with dsum = dy f'(sum), dx[t] = sum over outputs r and steps j of w[W-1-j] dsum[t+j], dw[i] = sum_t dsum[t] x
 * under tap i. Thread (x,r) takes V inputs and their r-th outputs through a run of tokens, and the three after it that reach
 * back into it. The rep parts of dx meet in shared memory. Width 4. */
template <int V, bool PLAIN, bool REPEAT> static __global__ void __launch_bounds__(V == 1 ? 1024 : 256)
    slide_back(const Conv s) {
  const unsigned lanes = blockDim.x, groups = (unsigned)((s.X / V + lanes - 1) / lanes),
                 runs = (unsigned)((s.T + s.run - 1) / s.run);
  const size_t rows = blockIdx.x / groups, b = rows / runs, m = ((size_t)(blockIdx.x % groups) * lanes + threadIdx.x) * V;
  const int first = (int)(rows % runs * s.run), T = (int)s.T, last = min(first + (int)s.run, T), end = min(last + WIDTH - 1, T);
  const int r = REPEAT ? threadIdx.y : 0, rep = REPEAT ? blockDim.y : 1, width = (int)lanes * V;
  const bool mine = m < s.X;
  const size_t c = !mine ? 0 : REPEAT ? (m / s.N * rep + r) * s.N + m % s.N : m;
  DYNAMIC_SHARED(float, shares); /* (2,BATCH,rep,lanes*V) */
  const Filter<V> filter(s, c);
  Window<V> window;
  float dx[WIDTH][V] = {}, dw[WIDTH][V] = {}, dbias[V] = {}; /* dx[j]: of the token j before this one */
  int reach = PLAIN ? WIDTH - 1 : 0; /* how many tokens before this one are of its document, as far as that matters */
  window.clear();
  if (mine) window.begin(s, {b, 0}, b, first, m);
  const real *x = s.x + (b * s.T + first) * s.X + m, *dy = s.dy + (b * s.T + first) * s.D + c;
  real *to = s.dx + (b * s.T + first) * s.X + m - (WIDTH - 1) * (ptrdiff_t)s.X; /* of the token that is done after this one */
  for (int t = first; t < last + WIDTH - 1; t += BATCH) {
    Packed<V> raw_x[BATCH] = {}, raw_dy[BATCH] = {};
#pragma unroll
    for (int k = 0; k < BATCH; k++, x += s.X, dy += s.D)
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
        store_channels(to + (ptrdiff_t)k * s.X, dx[WIDTH - 1]);
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
        if (mine && done >= first && done < last) store_channels(to + (ptrdiff_t)k * s.X, sum);
      }
    }
    to += BATCH * s.X;
  }
  if (!mine) return;
  float *part = s.part + rows * (WIDTH + 1) * s.D + c;
#pragma unroll
  for (int e = 0; e < V; e++) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) part[i * s.D + e] = dw[i][e];
    part[WIDTH * s.D + e] = dbias[e];
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
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = e / s.D;
  if (row < s.B * s.T) dsum[e] = load(s.dy + e) * slope(gathered(s, {row / s.T, 0}, row / s.T, row % s.T, e % s.D), s.silu);
}
static __global__ void any_dx(const Conv s, const float *dsum) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = e / s.X, m = e % s.X, b = row / s.T;
  if (row >= s.B * s.T) return;
  float sum = 0;
  for (size_t r = 0; r < s.rep; r++) {
    const size_t c = s.rep == 1 ? m : (m / s.N * s.rep + r) * s.N + m % s.N;
    for (size_t j = 0; j < s.W && row + j < (b + 1) * s.T; j++) {
      if (j && starts_document(s, b, (ptrdiff_t)(row % s.T + j))) break;
      sum = fmaf(s.w[c * s.W + s.W - 1 - j], dsum[(row + j) * s.D + c], sum);
    }
  }
  store(s.dx + e, sum);
}
static __global__ void any_dw(const Conv s, const float *dsum, float *dw, float *dbias) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, i = e / s.D, c = e % s.D, m = input_of(s, c);
  if (i > s.W || !(i == s.W ? dbias : dw)) return;
  float sum = 0;
  for (size_t row = 0; row < s.B * s.T; row++) {
    const real *p = i < s.W ? tap(s, {row / s.T, 0}, row / s.T, (ptrdiff_t)(row % s.T), i) : nullptr;
    sum = fmaf(dsum[row * s.D + c], i == s.W ? 1.0f : p ? load(p + m) : 0.0f, sum);
  }
  *(i == s.W ? dbias + c : dw + c * s.W + i) += sum;
}

template <int V> static void launch_back(Conv &s, float *dw, float *dbias) {
  const size_t lanes = max((size_t)32, 128 / s.rep / 32 * 32), groups = ceil_div(s.X / V, lanes);
  s.run = run_of(s, s.D / V, 128);
  const size_t rows = s.B * ceil_div(s.T, s.run), shared = 2 * BATCH * s.rep * lanes * V * sizeof(float);
  s.part = (float *)device_scratch(rows * (WIDTH + 1) * s.D * sizeof(float));
  if (!s.part) return;
  const dim3 block(lanes, s.rep);
  if (s.rows.prev || s.rep > 1) /* rarely both, so one kernel for either */
    LAUNCH((slide_back<V, false, true>), rows * groups, block, shared, s);
  else
    LAUNCH((slide_back<V, true, false>), rows * groups, block, shared, s);
  LAUNCH(sum_filters, blocks_for(s.D * (WIDTH + 1), 64), 64, 0, dw, dbias, s.part, rows, s.D);
}

void conv1d_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, const float *w, const float *bias,
                     Rows rows, int silu, size_t B, size_t T, size_t X, size_t D, size_t N, size_t W) {
  Conv s = conv_of(x, w, bias, {}, silu, B, T, X, D, N, W, 0);
  s.rows.prev = rows.prev, s.dx = dx, s.dy = dy;
  if (!B || !T || !X || !D) return;
  if (W == WIDTH && s.rep <= 8 && together(s, 4, dx, dy, nullptr)) {
    launch_back<4>(s, dw, dbias);
  } else if (W == WIDTH && s.rep <= 32) {
    launch_back<1>(s, dw, dbias);
  } else {
    float *dsum = (float *)device_scratch(B * T * D * sizeof(float));
    if (!dsum) return;
    LAUNCH(any_dsum, blocks_for(B * T * D, 128), 128, 0, s, dsum);
    LAUNCH(any_dx, blocks_for(B * T * X, 128), 128, 0, s, dsum);
    LAUNCH(any_dw, blocks_for(D * (W + 1), 64), 64, 0, s, dsum, dw, dbias);
  }
}
