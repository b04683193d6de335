/* conv1d.c - causal depthwise convolution along prev, then SiLU.
 *
 * A tile is TOKENS tokens by CHANNELS neighbouring inputs, for one of the rep outputs that each input has. Vectors run along
 * channels, and an output adds its taps in the order of i, so that its bits depend on them alone. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

enum { CHANNELS = 128, TOKENS = 16 };

typedef struct {
  real *y, *cache;
  const real *x;
  const float *w, *bias;
  Rows rows;
  int silu;
  size_t B, T, X, D, N, W, K;
  size_t rep, chunks; /* D/X; of CHANNELS inputs */
  float *scratch;
  size_t share; /* floats of scratch a worker has */
  /* backward */
  real *dx;
  float *dw, *dbias;
  const real *dy;
  float *part; /* (B,W+1,D): dw and dbias by row of the batch */
} Conv;

/* Inputs m .. m+n with their output r; rows of CHANNELS. */
typedef struct {
  size_t b, m, n, r;
  const float **tap; /* (W) the inputs under the filter, oldest first; zero: before the start */
  float *w, *dw;     /* (W+1,CHANNELS): the filter and, last, the bias; their gradients */
  float zero[CHANNELS], sum[CHANNELS];
} __attribute__((aligned(64))) Tile;

static size_t min(size_t a, size_t b) { return a < b ? a : b; }

static Conv conv_of(const real *x, const float *w, const float *bias, Rows rows, int silu, size_t B, size_t T, size_t X,
                    size_t D, size_t N, size_t W, size_t K) {
  return (Conv){.x = x, .w = w, .bias = bias, .rows = rows, .silu = silu, .B = B, .T = T, .X = X, .D = D, .N = X == D ? D : N,
                .W = W, .K = K, .rep = X ? D / X : 0, .chunks = (X + CHANNELS - 1) / CHANNELS,
                .share = (2 * W + 2 * (W + 1) * CHANNELS + 15) / 16 * 16};
}

static void tile_memory(Tile *a, const Conv *s, size_t worker) {
  float *p = s->scratch + worker * s->share;
  a->w = p, a->dw = p + (s->W + 1) * CHANNELS;
  a->tap = (const float **)(a->dw + (s->W + 1) * CHANNELS);
  memset(a->zero, 0, sizeof a->zero);
}

/* Outputs lie in runs: input m's r-th is (m/N * rep + r)*N + m%N, and the run goes on to the end of its block of N. */
static size_t output_of(const Conv *s, size_t m, size_t r) { return (m / s->N * s->rep + r) * s->N + m % s->N; }
static size_t run_of(const Conv *s, const Tile *a, size_t o) { return min(s->N - (a->m + o) % s->N, a->n - o); }

static inline __attribute__((always_inline)) void load_run(float *to, const float *w, size_t n, const size_t W) {
  for (size_t c = 0; c < n; c++)
    for (size_t i = 0; i < W; i++) to[i * CHANNELS + c] = w[c * W + i];
}

static void load_filter(Tile *a, const Conv *s) {
  float *bias = a->w + s->W * CHANNELS;
  for (size_t o = 0, n; o < a->n; o += n) {
    const size_t c = output_of(s, a->m + o, a->r);
    n = run_of(s, a, o);
    if (s->W == 4)
      load_run(a->w + o, s->w + c * 4, n, 4);
    else
      load_run(a->w + o, s->w + c * s->W, n, s->W);
    for (size_t i = 0; i < n; i++) bias[o + i] = s->bias ? s->bias[c + i] : 0.0f;
  }
}

static void find_taps(Tile *a, const Conv *s, size_t t) {
  const int32_t *prev = s->rows.prev ? s->rows.prev + a->b * s->T : NULL;
  const size_t slot = s->rows.slot ? (size_t)s->rows.slot[a->b] : a->b;
  const ptrdiff_t pos = s->rows.pos ? s->rows.pos[slot] : 0;
  ptrdiff_t at = (ptrdiff_t)t; /* negative: that many before pos */
  int inside = 1;
  for (size_t i = s->W; i-- > 0;) {
    a->tap[i] = a->zero;
    if (inside && at >= 0)
      a->tap[i] = s->x + (a->b * s->T + (size_t)at) * s->X + a->m;
    else if (inside && s->cache && pos + at >= 0)
      a->tap[i] = s->cache + (slot * s->K + (size_t)(pos + at) % s->K) * s->X + a->m;
    if (prev && at >= 0) {
      inside &= prev[at] != -2;
      at = prev[at];
    } else {
      at--;
    }
  }
}

/* sum[c] = bias[c] + sum_i w[c,i] tap[i][c] */
static void sum_taps(Tile *a, size_t W) {
  const float *w = a->w, *bias = w + W * CHANNELS;
  size_t c = 0;
  for (; c + LANES <= a->n; c += LANES) {
    vec sum = vec_load(bias + c);
    for (size_t i = 0; i < W; i++) sum += vec_load(w + i * CHANNELS + c) * vec_load(a->tap[i] + c);
    vec_store(a->sum + c, sum);
  }
  for (; c < a->n; c++) {
    float sum = bias[c];
    for (size_t i = 0; i < W; i++) sum += w[i * CHANNELS + c] * a->tap[i][c];
    a->sum[c] = sum;
  }
}

static void forward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, tokens, chunk, r) */
  const Conv *s = arg;
  const size_t spans = (s->T + TOKENS - 1) / TOKENS;
  Tile a;
  tile_memory(&a, s, worker);
  for (size_t item = begin; item < end; item++) {
    const size_t chunk = item / s->rep % s->chunks, span = item / s->rep / s->chunks;
    a.r = item % s->rep, a.m = chunk * CHANNELS, a.n = min(CHANNELS, s->X - a.m), a.b = span / spans;
    load_filter(&a, s);
    for (size_t t = span % spans * TOKENS, last = min(t + TOKENS, s->T); t < last; t++) {
      find_taps(&a, s, t);
      sum_taps(&a, s->W);
      for (size_t o = 0, n; o < a.n; o += n) {
        real *y = s->y + (a.b * s->T + t) * s->D + output_of(s, a.m + o, a.r);
        n = run_of(s, &a, o);
        if (s->silu)
          for (size_t i = 0; i < n; i++) y[i] = silu(a.sum[o + i]);
        else
          for (size_t i = 0; i < n; i++) y[i] = a.sum[o + i];
      }
    }
  }
}

/* The inputs that later calls may look back to. What lies PENDING tokens or more behind keep is padding and must not push
 * committed inputs out. */
static void cache_range(void *arg, size_t begin, size_t end, size_t worker) {
  (void)worker;
  const Conv *s = arg;
  for (size_t b = begin; b < end; b++) {
    const size_t slot = s->rows.slot ? (size_t)s->rows.slot[b] : b, pos = s->rows.pos ? (size_t)s->rows.pos[slot] : 0;
    const size_t keep = s->rows.keep ? (size_t)s->rows.keep[b] : s->T;
    const size_t last = s->T <= PENDING ? s->T : min(s->T, keep + PENDING);
    for (size_t t = last > s->K ? last - s->K : 0; t < last; t++)
      memcpy(s->cache + (slot * s->K + (pos + t) % s->K) * s->X, s->x + (b * s->T + t) * s->X, s->X * sizeof(real));
  }
}

static void forward_part(const ConvPart *p, Rows rows, int silu, size_t B, size_t T, size_t N, size_t W, size_t K) {
  Conv s = conv_of(p->x, p->w, p->bias, rows, silu, B, T, p->X, p->D, N, W, K);
  s.y = p->y, s.cache = p->cache;
  if (!B || !T || !s.X || !s.D) return;
  s.scratch = device_scratch(workers() * s.share * sizeof(float));
  if (!s.scratch) return;
  parallel(forward_range, &s, B * ((T + TOKENS - 1) / TOKENS) * s.chunks * s.rep,
           min(T, TOKENS) * min(s.X, CHANNELS) * (2.0 * W + 30));
  if (s.cache) parallel(cache_range, &s, B, (double)min(T, K) * s.X);
}

void conv1d_forward(const ConvPart *part, int n, Rows rows, int silu, size_t B, size_t T, size_t N, size_t W, size_t K) {
  for (int i = 0; i < n; i++) forward_part(part + i, rows, silu, B, T, N, W, K);
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

/* y = f(sum), sum = bias + sum_i w[i] tap[i]: dx at tap[i] += w[i] dsum;  dw[i] += dsum tap[i];  dbias += dsum.
 * Row t of dx is cleared when its own token comes, before any tap adds to it. */
static void backward_token(Tile *a, const Conv *s, size_t t) {
  const size_t W = s->W, at = a->b * s->T + t;
  float *dsum = a->sum, *dbias = a->dw + W * CHANNELS;
  if (a->r == 0) memset(s->dx + at * s->X + a->m, 0, a->n * sizeof(real));
  find_taps(a, s, t);
  if (s->silu) sum_taps(a, W);
  for (size_t o = 0, n; o < a->n; o += n) {
    const real *dy = s->dy + at * s->D + output_of(s, a->m + o, a->r);
    n = run_of(s, a, o);
    for (size_t i = 0; i < n; i++) dsum[o + i] = s->silu ? dy[i] * dsilu(dsum[o + i]) : dy[i];
  }
  for (size_t c = 0; c < a->n; c++) dbias[c] += dsum[c];
  for (size_t i = 0; i < W; i++) {
    if (a->tap[i] == a->zero) continue;
    const float *tap = a->tap[i], *w = a->w + i * CHANNELS;
    float *restrict dx = s->dx + (tap - s->x), *restrict dw = a->dw + i * CHANNELS;
    for (size_t c = 0; c < a->n; c++) {
      dx[c] += w[c] * dsum[c];
      dw[c] += tap[c] * dsum[c];
    }
  }
}

static void backward_tile(Tile *a, const Conv *s, size_t t, size_t last) {
  load_filter(a, s);
  memset(a->dw, 0, (s->W + 1) * CHANNELS * sizeof(float));
  for (; t < last; t++) backward_token(a, s, t);
  for (size_t i = 0; i <= s->W; i++)
    for (size_t o = 0, n; o < a->n; o += n) {
      float *part = s->part + (a->b * (s->W + 1) + i) * s->D + output_of(s, a->m + o, a->r);
      n = run_of(s, a, o);
      for (size_t k = 0; k < n; k++) part[k] += a->dw[i * CHANNELS + o + k];
    }
}

static void backward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, chunk) */
  const Conv *s = arg;
  Tile a;
  tile_memory(&a, s, worker);
  for (size_t item = begin, last; item < end; item = last) { /* one b: TOKENS at a time through its chunks */
    a.b = item / s->chunks;
    last = min(end, (a.b + 1) * s->chunks);
    for (size_t t = 0; t < s->T; t += TOKENS)
      for (size_t i = item; i < last; i++)
        for (a.r = 0; a.r < s->rep; a.r++) {
          a.m = i % s->chunks * CHANNELS, a.n = min(CHANNELS, s->X - a.m);
          backward_tile(&a, s, t, min(t + TOKENS, s->T));
        }
  }
}

static void parameter_gradients(void *arg, size_t begin, size_t end, size_t worker) {
  (void)worker;
  const Conv *s = arg;
  for (size_t b = 0; b < s->B; b++) {
    const float *part = s->part + b * (s->W + 1) * s->D;
    for (size_t c = begin; c < end; c++) {
      for (size_t i = 0; s->dw && i < s->W; i++) s->dw[c * s->W + i] += part[i * s->D + c];
      if (s->dbias) s->dbias[c] += part[s->W * s->D + c];
    }
  }
}

void conv1d_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, const float *w, const float *bias,
                     Rows rows, int silu, size_t B, size_t T, size_t X, size_t D, size_t N, size_t W) {
  Conv s = conv_of(x, w, bias, rows, silu, B, T, X, D, N, W, 0);
  s.dx = dx, s.dw = dw, s.dbias = dbias, s.dy = dy;
  if (!B || !T || !X || !D) return;
  s.scratch = device_scratch((workers() * s.share + B * (W + 1) * D) * sizeof(float));
  if (!s.scratch) return;
  s.part = s.scratch + workers() * s.share;
  memset(s.part, 0, B * (W + 1) * D * sizeof(float));
  parallel(backward_range, &s, B * s.chunks, (double)T * CHANNELS * s.rep * (6.0 * W + 40));
  parallel(parameter_gradients, &s, D, (double)B * (W + 1));
}
