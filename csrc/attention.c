/* attention.c - RoPE and causal GQA attention: one tile body with online softmax serves training, prefill, decode and trees.
 *
 * A token sees a contiguous range of depths: below `base` they are cached positions, from there on this call's tokens. Key blocks
 * stand at multiples of KEYS of the depth, hidden entries weigh exactly 0, and every sum runs over a whole block in one order; so a
 * row's bits depend on nothing but its own range, however many rows share the tile. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

enum { QUERIES = 32, KEYS = 64 };

static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t max(size_t a, size_t b) { return a > b ? a : b; }

/* ---- RoPE --------------------------------------------------------------------------------------------------------------- */

typedef struct {
  real *y;
  const real *x;
  const int32_t *position;
  const float *inv_freq;
  float scale, sign;
  float *scratch;
  size_t H, P;
} Rope;

static void rope_rows(void *arg, size_t m, size_t end, size_t worker) {
  const Rope *r = arg;
  const size_t half = r->P / 2;
  float *cosine = r->scratch + worker * r->P, *sine = cosine + half;
  for (; m < end; m++) {
    for (size_t i = 0; i < half; i++) {
      float angle = (float)r->position[m] * r->inv_freq[i];
      cosine[i] = r->scale * cosf(angle);
      sine[i] = r->sign * r->scale * sinf(angle);
    }
    for (size_t h = 0; h < r->H; h++) {
      const real *x = r->x + (m * r->H + h) * r->P;
      real *y = r->y + (m * r->H + h) * r->P;
      for (size_t i = 0; i < half; i++) {
        float u = x[i], v = x[i + half];
        y[i] = u * cosine[i] - v * sine[i];
        y[i + half] = v * cosine[i] + u * sine[i];
      }
    }
  }
}

static void rope(Rope r, size_t M) {
  r.scratch = device_scratch(workers() * r.P * sizeof(float));
  if (r.scratch) parallel(rope_rows, &r, M, 20.0 * r.P + 4.0 * r.H * r.P);
}

void rope_forward(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                  size_t P) {
  rope((Rope){y, x, position, inv_freq, scale, 1, NULL, H, P}, M);
}

void rope_backward(real *dx, const real *dy, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                   size_t P) {
  rope((Rope){dx, dy, position, inv_freq, scale, -1, NULL, H, P}, M);
}

/* ---- forward ------------------------------------------------------------------------------------------------------------ */

typedef struct {
  real *o, *dq, *dk, *dv;
  float *lse;
  const real *kcache, *vcache, *q, *k, *v, *dout;
  Rows rows;
  float scale;
  size_t window, T, H, G, P, K, rep, units; /* units: tiles of queries a (b, kv group) */
  int trees;                                /* a unit a token */
  size_t *low;                              /* (B,T): the first depth that each token of a chain sees */
  float *scratch;
  size_t share; /* floats of scratch a worker has */
} Attention;

/* Tokens t .. end of row b share one tile: depth e < base is cached position e, else token path[e-base], or e-base itself. */
typedef struct {
  size_t b, g, t, end, base;
  const size_t *path;
  size_t path_length;
} Unit;

static const real *key_row(const Attention *a, const Unit *u, const real *cache, const real *x, size_t e) {
  if (e < u->base) {
    size_t slot = a->rows.slot ? (size_t)a->rows.slot[u->b] : u->b;
    return cache + ((slot * a->K + e % a->K) * a->G + u->g) * a->P;
  }
  size_t t = u->path ? u->path[e - u->base] : e - u->base;
  return x + ((u->b * a->T + t) * a->G + u->g) * a->P;
}

/* dst (P,KEYS) = the rows' transpose, or (KEYS,P) the rows; from n on zero */
static void pack(float *dst, int transpose, const Attention *a, const Unit *u, const real *cache, const real *x, size_t e, size_t n) {
  const size_t P = a->P;
  const real *row[KEYS];
  for (size_t j = 0; j < n; j++) row[j] = key_row(a, u, cache, x, e + j);
  if (!transpose) {
    for (size_t j = 0; j < n; j++) memcpy(dst + j * P, row[j], P * sizeof *dst);
    memset(dst + n * P, 0, (KEYS - n) * P * sizeof *dst);
    return;
  }
  for (size_t p = 0; p < P; p++) {
    for (size_t j = 0; j < n; j++) dst[p * KEYS + j] = row[j][p];
    for (size_t j = n; j < KEYS; j++) dst[p * KEYS + j] = 0;
  }
}

/* One row of one key block: s (KEYS) scores in, weights out, seen only from..to; o is rescaled. */
static void softmax_row(float *s, float *o, float *top, float *sum, size_t from, size_t to, size_t P) {
  float m = *top;
  for (size_t j = from; j < to; j++) m = s[j] > m ? s[j] : m;
  float shrink = exp_(*top - m), part = 0;
  for (size_t j = 0; j < KEYS; j++) s[j] = exp_(s[j] - m);
  for (size_t j = 0; j < from; j++) s[j] = 0;
  for (size_t j = to; j < KEYS; j++) s[j] = 0;
#pragma omp simd reduction(+ : part)
  for (size_t j = 0; j < KEYS; j++) part += s[j];
  if (shrink != 1)
    for (size_t p = 0; p < P; p++) o[p] *= shrink;
  *sum = *sum * shrink + part;
  *top = m;
}

static void attend(const Attention *a, const Unit *u, float *scratch) {
  const size_t P = a->P, n = u->end - u->t, R = a->rep * n;
  float *q = scratch, *o = q + R * P, *s = o + R * P, *k = s + R * KEYS, *v = k + P * KEYS, *top = v + P * KEYS, *sum = top + R;
  size_t low = u->path ? 0 : a->low[u->b * a->T + u->t], high = u->base + (u->path ? u->path_length : u->end);
  if (u->path && a->window && high > a->window) low = high - a->window;
  for (size_t r = 0; r < R; r++) { /* row r: head r / n of the group, token r % n */
    const real *from = a->q + ((u->b * a->T + u->t + r % n) * a->H + u->g * a->rep + r / n) * P;
    for (size_t p = 0; p < P; p++) q[r * P + p] = from[p] * a->scale;
    top[r] = -INFINITY, sum[r] = 0;
  }
  memset(o, 0, R * P * sizeof *o);
  for (size_t e = low / KEYS * KEYS; e < high; e += KEYS) {
    size_t count = min(KEYS, high - e);
    pack(k, 1, a, u, a->kcache, a->k, e, count);
    pack(v, 0, a, u, a->vcache, a->v, e, count);
    gemm(s, KEYS, q, P, 1, k, KEYS, R, KEYS, P, 0);
    for (size_t r = 0; r < R; r++) {
      size_t t = u->t + r % n, first = u->path ? low : a->low[u->b * a->T + t], last = u->path ? high : u->base + t + 1;
      size_t from = first > e ? min(first - e, KEYS) : 0, to = last > e ? min(last - e, KEYS) : 0;
      if (from < to)
        softmax_row(s + r * KEYS, o + r * P, top + r, sum + r, from, to, P);
      else
        memset(s + r * KEYS, 0, KEYS * sizeof *s);
    }
    gemm(o, P, s, KEYS, 1, v, P, R, P, KEYS, 1);
  }
  for (size_t r = 0; r < R; r++) {
    size_t t = u->t + r % n, h = u->g * a->rep + r / n;
    real *y = a->o + ((u->b * a->T + t) * a->H + h) * P;
    for (size_t p = 0; p < P; p++) y[p] = o[r * P + p] / sum[r];
    if (a->lse) a->lse[(u->b * a->H + h) * a->T + t] = top[r] + logf(sum[r]);
  }
}

static size_t position_of(const Attention *a, size_t b) {
  return a->kcache && a->rows.pos ? (size_t)a->rows.pos[a->rows.slot ? (size_t)a->rows.slot[b] : b] : 0;
}

/* The tokens of this call on t's path, oldest first; base: the cached tokens before them. */
static size_t find_path(const Attention *a, size_t b, size_t t, size_t *path, size_t *base) {
  const int32_t *prev = a->rows.prev + b * a->T;
  size_t n = 1;
  int32_t p = prev[t];
  for (; p >= 0; p = prev[p]) n++;
  *base = p == -1 ? position_of(a, b) : 0;
  for (size_t i = n; i-- > 0; t = (size_t)prev[t]) path[i] = t;
  return n;
}

static void forward_units(void *arg, size_t i, size_t end, size_t worker) {
  const Attention *a = arg;
  for (; i < end; i++) {
    size_t group = i / a->units, tile = i % a->units, path[PENDING];
    Unit u = {.b = group / a->G, .g = group % a->G};
    if (a->trees) {
      u.t = tile, u.end = tile + 1, u.path = path;
      u.path_length = find_path(a, u.b, tile, path, &u.base);
    } else {
      u.t = tile * QUERIES, u.end = min(u.t + QUERIES, a->T), u.base = position_of(a, u.b);
    }
    attend(a, &u, a->scratch + worker * a->share);
  }
}

/* low (B,T) of chains: a document's start, or 0, and the window. Depths count from the incoming state's base. */
static void find_low(const Attention *a, size_t B) {
  for (size_t b = 0; b < B; b++) {
    size_t base = position_of(a, b), start = 0;
    for (size_t t = 0; t < a->T; t++) {
      if (a->rows.prev && a->rows.prev[b * a->T + t] == -2) start = base + t;
      size_t depth = base + t + 1;
      a->low[b * a->T + t] = a->window && depth > a->window ? max(start, depth - a->window) : start;
    }
  }
}

/* The last K of the tokens that may still be asked for: padding behind what may stay pending must not push others out. */
static void write_cache(real *cache, const real *x, const Attention *a, size_t B) {
  const size_t row = a->G * a->P;
  for (size_t b = 0; b < B; b++) {
    size_t slot = a->rows.slot ? (size_t)a->rows.slot[b] : b, pos = a->rows.pos ? (size_t)a->rows.pos[slot] : 0;
    size_t end = a->rows.keep ? min(a->T, (size_t)a->rows.keep[b] + PENDING) : a->T;
    for (size_t t = end > a->K ? end - a->K : 0; t < end; t++)
      memcpy(cache + (slot * a->K + (pos + t) % a->K) * row, x + (b * a->T + t) * row, row * sizeof *x);
  }
}

void attention_forward(real *o, float *lse, real *kcache, real *vcache, const real *q, const real *k, const real *v, Rows rows,
                       float scale, size_t window, size_t B, size_t T, size_t H, size_t G, size_t P, size_t K) {
  Attention a = {.o = o, .lse = lse, .kcache = kcache, .vcache = vcache, .q = q, .k = k, .v = v, .rows = rows, .scale = scale,
                 .window = window, .T = T, .H = H, .G = G, .P = P, .K = K, .rep = H / G};
  for (size_t i = 0; kcache && T <= PENDING && rows.prev && i < B * T; i++) a.trees |= rows.prev[i] != (int32_t)(i % T) - 1;
  const size_t tile = min(T, QUERIES);
  a.units = a.trees ? T : (T + QUERIES - 1) / QUERIES;
  a.share = (a.rep * tile * (2 * P + KEYS + 2) + 2 * P * KEYS + 15) & ~(size_t)15;
  a.scratch = device_scratch(workers() * a.share * sizeof(float) + B * T * sizeof(size_t));
  if (!a.scratch) return;
  a.low = (size_t *)(a.scratch + workers() * a.share);
  find_low(&a, B);
  size_t keys = T / 2;
  for (size_t b = 0; b < B; b++) keys = max(keys, position_of(&a, b));
  parallel(forward_units, &a, B * G * a.units, 4.0 * a.rep * (a.trees ? 1 : tile) * P * (keys + 1));
  if (kcache) write_cache(kcache, k, &a, B), write_cache(vcache, v, &a, B);
}

/* ---- backward: p = exp(scale q.k - lse), dp = dout.v, ds = p (dp - dout.o) scale; dq += ds k, dk += ds q, dv += p dout ------- */

typedef struct {
  float *kt, *k, *vt, *s, *dp, *dk, *dv, *delta;
} Tiles;

static void backward_block(const Attention *a, const Unit *u, const Tiles *w, size_t e, size_t count) {
  const size_t P = a->P, step = a->H * P;
  pack(w->kt, 1, a, u, NULL, a->k, e, count);
  pack(w->k, 0, a, u, NULL, a->k, e, count);
  pack(w->vt, 1, a, u, NULL, a->v, e, count);
  memset(w->dk, 0, 2 * KEYS * P * sizeof(float));
  for (size_t t0 = e; t0 < a->T && a->low[u->b * a->T + t0] < e + count; t0 += QUERIES)
    for (size_t r = 0; r < a->rep; r++) {
      const size_t n = min(QUERIES, a->T - t0), h = u->g * a->rep + r, at = (u->b * a->T + t0) * step + h * P;
      gemm(w->s, KEYS, a->q + at, step, 1, w->kt, KEYS, n, KEYS, P, 0);
      gemm(w->dp, KEYS, a->dout + at, step, 1, w->vt, KEYS, n, KEYS, P, 0);
      for (size_t i = 0; i < n; i++) {
        const size_t t = t0 + i, low = a->low[u->b * a->T + t];
        const size_t from = low > e ? min(low - e, KEYS) : 0, to = min(t + 1 - e, KEYS);
        const float lse = a->lse[(u->b * a->H + h) * a->T + t], delta = w->delta[r * a->T + t];
        float *s = w->s + i * KEYS, *dp = w->dp + i * KEYS;
        for (size_t j = 0; j < KEYS; j++) {
          float p = j >= from && j < to ? exp_(s[j] * a->scale - lse) : 0;
          s[j] = p;
          dp[j] = p * (dp[j] - delta) * a->scale;
        }
      }
      gemm(w->dv, P, w->s, 1, KEYS, a->dout + at, step, count, P, n, 1);
      gemm(w->dk, P, w->dp, 1, KEYS, a->q + at, step, count, P, n, 1);
      gemm(a->dq + at, step, w->dp, KEYS, 1, w->k, P, n, P, KEYS, 1);
    }
  for (size_t j = 0; j < count; j++) {
    size_t at = ((u->b * a->T + e + j) * a->G + u->g) * P;
    memcpy(a->dk + at, w->dk + j * P, P * sizeof(float));
    memcpy(a->dv + at, w->dv + j * P, P * sizeof(float));
  }
}

static void backward_groups(void *arg, size_t i, size_t end, size_t worker) {
  const Attention *a = arg;
  const size_t P = a->P, T = a->T;
  float *s = a->scratch + worker * a->share;
  Tiles w = {.kt = s, .k = s + KEYS * P, .vt = s + 2 * KEYS * P, .dk = s + 3 * KEYS * P, .dv = s + 4 * KEYS * P,
             .s = s + 5 * KEYS * P, .dp = s + 5 * KEYS * P + QUERIES * KEYS, .delta = s + 5 * KEYS * P + 2 * QUERIES * KEYS};
  for (; i < end; i++) {
    Unit u = {.b = i / a->G, .g = i % a->G, .end = T};
    for (size_t r = 0; r < a->rep; r++)
      for (size_t t = 0; t < T; t++) {
        size_t at = ((u.b * T + t) * a->H + u.g * a->rep + r) * P;
        float delta = 0;
#pragma omp simd reduction(+ : delta)
        for (size_t p = 0; p < P; p++) delta += a->dout[at + p] * a->o[at + p];
        w.delta[r * T + t] = delta;
        memset(a->dq + at, 0, P * sizeof(real));
      }
    for (size_t e = 0; e < T; e += KEYS) backward_block(a, &u, &w, e, min(KEYS, T - e));
  }
}

void attention_backward(real *dq, real *dk, real *dv, const real *dout, const real *q, const real *k, const real *v,
                        const real *o, const float *lse, Rows rows, float scale, size_t window, size_t B, size_t T, size_t H,
                        size_t G, size_t P) {
  Attention a = {.o = (real *)o, .dq = dq, .dk = dk, .dv = dv, .lse = (float *)lse, .q = q, .k = k, .v = v, .dout = dout,
                 .rows = rows, .scale = scale, .window = window, .T = T, .H = H, .G = G, .P = P, .rep = H / G};
  a.share = (5 * KEYS * P + 2 * QUERIES * KEYS + a.rep * T + 15) & ~(size_t)15;
  a.scratch = device_scratch(workers() * a.share * sizeof(float) + B * T * sizeof(size_t));
  if (!a.scratch) return;
  a.low = (size_t *)(a.scratch + workers() * a.share);
  find_low(&a, B);
  parallel(backward_groups, &a, B * G, 5.0 * a.rep * T * T * P);
}
