/* attention.c - RoPE and causal GQA attention: one body with online softmax for training, prefill, decode and trees.
 *
 * A token sees a contiguous range of depths of its path: below `base` they are cached positions, from there on this call's
 * tokens. Key blocks stand at multiples of KEYS of the depth, hidden keys weigh exactly 0, and every sum runs in the order of
 * depth; so a row's bits depend on its own range alone, however many rows share the tile. Few tokens read the cache where it is
 * (score): to turn keys into columns first pays from some ten rows on. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

enum { ROWS = 128, QUERIES = 32, KEYS = 64 }; /* rows of a forward tile, tokens of a backward one, keys of a block */
enum { FARTHEST = 1 << 30 };                  /* position */

static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t max(size_t a, size_t b) { return a > b ? a : b; }

/* ---- RoPE ----------------------------------------------------------------------------------------------------------- */

typedef struct {
  real *y;
  const real *x;
  const int32_t *position;
  const float *inv_freq;
  float scale, sign;
  size_t H, P;
  float *scratch;
} Rotation;

static void rope_range(void *arg, size_t m, size_t end, size_t worker) {
  const Rotation *r = arg;
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
#pragma omp simd
      for (size_t i = 0; i < half; i++) {
        float u = x[i], v = x[i + half];
        y[i] = u * cosine[i] - v * sine[i];
        y[i + half] = v * cosine[i] + u * sine[i];
      }
    }
  }
}

static void rope(Rotation r, size_t M) {
  if (!M || !r.H || !r.P) return;
  r.scratch = device_scratch(workers() * r.P * sizeof(float));
  if (r.scratch) parallel(rope_range, &r, M, 20.0 * r.P + 3.0 * r.H * r.P);
}

void rope_forward(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                  size_t P) {
  rope((Rotation){.y = y, .x = x, .position = position, .inv_freq = inv_freq, .scale = scale, .sign = 1, .H = H, .P = P}, M);
}

/* y = scale R(a) x: dx = scale R(-a) dy */
void rope_backward(real *dx, const real *dy, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H,
                   size_t P) {
  rope((Rotation){.y = dx, .x = dy, .position = position, .inv_freq = inv_freq, .scale = scale, .sign = -1, .H = H, .P = P}, M);
}

/* ---- what a token sees ------------------------------------------------------------------------------------------------ */

typedef struct {
  size_t start, from, to; /* depths: the document's start; what is seen is from .. to and the sinks from start on */
} Seen;

typedef struct {
  real *o, *dq, *dk, *dv;
  float *lse, *delta; /* (B,H,T) */
  const real *kcache, *vcache, *q, *k, *v, *dout;
  Rows rows;
  float scale;
  size_t window, sinks, T, H, G, P, K;
  size_t rep, wide;             /* H/G; P in whole vectors */
  size_t tokens, groups, tiles; /* of a tile, at most; of a tile, at most; tiles of a row's tokens */
  int few;                      /* few tokens on caches, heads of whole vectors: keys are read where they are */
  int tree;                     /* some token follows another than the one before it */
  Seen *seen;                   /* (B,T) */
  float *scratch;
  size_t share; /* floats of scratch a worker has */
} Attention;

static size_t slot_of(const Attention *a, size_t b) { return a->rows.slot ? (size_t)a->rows.slot[b] : b; }
static size_t base_of(const Attention *a, size_t b) {
  return a->kcache && a->rows.pos ? (size_t)a->rows.pos[slot_of(a, b)] : 0;
}

/* Depth counts the tokens before on the path. A document starting inside a call (there is no cache then) does not reset it. */
static void find_seen(const Attention *a, size_t B) {
  for (size_t b = 0; b < B; b++) {
    const int32_t *prev = a->rows.prev ? a->rows.prev + b * a->T : NULL;
    const size_t base = base_of(a, b);
    Seen *seen = a->seen + b * a->T;
    for (size_t t = 0, start = 0; t < a->T; t++) {
      const int32_t p = prev ? prev[t] : (int32_t)t - 1;
      if (p == -2) start = t;
      seen[t].to = a->tree ? (p < 0 ? base : seen[p].to) + 1 : base + t + 1;
      seen[t].from = a->window && seen[t].to > a->window ? max(start, seen[t].to - a->window) : start;
      seen[t].start = start;
    }
  }
}

/* What a token sees of the block of depths e .. e+n: its entries first .. sunk and from .. to, in this order. */
typedef struct {
  size_t first, sunk, from, to;
} Part;

static Part part_of(const Attention *a, const Seen *seen, size_t e, size_t n) {
  Part p;
  p.to = min(max(seen->to, e) - e, n);
  p.from = min(max(seen->from, e) - e, p.to);
  p.sunk = min(max(seen->start + a->sinks, e) - e, p.from);
  p.first = min(max(seen->start, e) - e, p.sunk);
  return p;
}
static int is_empty(const Part *p) { return p->first == p->sunk && p->from == p->to; }

static void hide(float *restrict s, const Part *p, float value) {
  for (size_t j = 0; j < p->first; j++) s[j] = value;
  for (size_t j = p->sunk; j < p->from; j++) s[j] = value;
  for (size_t j = p->to; j < KEYS; j++) s[j] = value;
}

/* The first block, e or behind it, that has sinks of seen's document or is not before depth low. */
static size_t block_from(const Attention *a, const Seen *seen, size_t low, size_t e) {
  return a->sinks && e < seen->start + a->sinks ? e : max(e, low / KEYS * KEYS);
}

/* This call's tokens on t's path, oldest first. */
static void find_path(size_t *path, const Attention *a, size_t b, size_t t) {
  for (size_t i = a->seen[b * a->T + t].to - base_of(a, b); i-- > 0; t = (size_t)a->rows.prev[b * a->T + t]) path[i] = t;
}

/* Keys of depths e .. e+n of row b and group g, in memory order where neighbours; path NULL: depth base+t is token t. */
typedef struct {
  size_t b, g, base;
  const size_t *path;
} Keys;

/* Where position e is in a cache. */
static size_t entry_at(const Attention *a, size_t e) { return e < a->sinks ? e : a->sinks + (e - a->sinks) % (a->K - a->sinks); }

/* The entry of depth e, and in *n how many from there on lie G*P apart. */
static const real *run_of(const Attention *a, const Keys *keys, const real *cache, const real *x, size_t e, size_t *n) {
  if (e < keys->base) {
    const size_t at = entry_at(a, e);
    *n = min(*n, min(keys->base - e, a->K - at)); /* behind the sinks' entries the others begin */
    return cache + ((slot_of(a, keys->b) * a->K + at) * a->G + keys->g) * a->P;
  }
  const size_t *path = keys->path ? keys->path + (e - keys->base) : NULL, t = path ? *path : e - keys->base;
  for (size_t i = 1; path && i < *n; i++)
    if (path[i] != t + i) *n = i;
  return x + ((keys->b * a->T + t) * a->G + keys->g) * a->P;
}

/* dst (n,wide) = the entries of depths e .. e+n, zero from P on; as columns: dst (P,KEYS), zero from n on */
static void load_rows(float *dst, const Attention *a, const Keys *keys, const real *cache, const real *x, size_t e, size_t n) {
  for (size_t j = 0, m; j < n; j += m) {
    m = n - j;
    const real *from = run_of(a, keys, cache, x, e + j, &m);
    for (size_t i = 0; i < m; i++) {
      memcpy(dst + (j + i) * a->wide, from + i * a->G * a->P, a->P * sizeof *dst);
      memset(dst + (j + i) * a->wide + a->P, 0, (a->wide - a->P) * sizeof *dst);
    }
  }
}
static void load_columns(float *dst, const Attention *a, const Keys *keys, const real *cache, const real *x, size_t e,
                         size_t n) {
  for (size_t j = 0, m; j < n; j += m) {
    m = n - j;
    const real *from = run_of(a, keys, cache, x, e + j, &m);
    transpose(dst + j, KEYS, from, a->G * a->P, m, a->P);
  }
  for (size_t p = 0; p < a->P && n < KEYS; p++) memset(dst + p * KEYS + n, 0, (KEYS - n) * sizeof *dst);
}

static size_t whole_vectors(size_t n) { return (n + LANES - 1) / LANES * LANES; }

/* ---- forward -------------------------------------------------------------------------------------------------------- */

/* Tokens t .. t+n of row b times the rep heads of each of the groups from g on: row (j*n + i)*rep + r is token t+i, head
 * (g+j)*rep + r. */
typedef struct {
  size_t b, g, groups, t, n;
  float *q, *o, *s, *k, *v, *top, *sum; /* (rows,P), (rows,wide), (rows,KEYS), (P,KEYS), (KEYS,wide), (rows) twice */
} Tile;

/* One row of one block: s (KEYS) scores in, weights out, only p is seen; o (wide) is rescaled. */
static void softmax_row(float *restrict s, float *restrict o, float *top, float *sum, const Part *p, size_t wide) {
  float m = *top;
  hide(s, p, -INFINITY);
#pragma omp simd reduction(max : m)
  for (size_t j = 0; j < KEYS; j++) m = s[j] > m ? s[j] : m;
  vec part = {0};
  for (size_t j = 0; j < KEYS; j++) s[j] = exp_(s[j] - m);
  for (size_t j = 0; j < KEYS; j += LANES) part += vec_load(s + j);
  const float shrink = exp_(*top - m);
  for (size_t c = 0; c < wide && shrink != 1; c++) o[c] *= shrink;
  *sum = *sum * shrink + vec_sum(part);
  *top = m;
}

/* s (R,KEYS) = q (R,P) with each of the keys of depths e .. e+n: a lane's products in order of p, then the lanes. */
static void score(float *s, const Attention *a, const Keys *keys, const float *q, size_t R, size_t e, size_t n) {
  const size_t P = a->P;
  const real *key[KEYS];
  for (size_t j = 0, m; j < n; j += m) {
    m = n - j;
    const real *from = run_of(a, keys, a->kcache, a->k, e + j, &m);
    for (size_t i = 0; i < m; i++) key[j + i] = from + i * a->G * P;
  }
  for (size_t j = n; j < whole_vectors(n); j++) key[j] = key[0]; /* hidden */
  for (size_t j = 0; j < n; j += LANES)
    for (size_t r = 0; r < R; r++) {
      vec sum[LANES] = {0};
      for (size_t p = 0; p < P; p += LANES) {
        const vec x = vec_load(q + r * P + p);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) sum[i] += x * vec_load(key[j + i] + p);
      }
      vec_store(s + r * KEYS + j, sum_lanes(sum));
    }
}

/* o (R,wide) += s (R,KEYS) times the values of entries j .. end of the block of depths e .. */
static void add_values(const Attention *a, const Tile *u, const Keys *keys, size_t r, size_t R, size_t e, size_t j, size_t end) {
  const size_t wide = a->wide;
  float *o = u->o + r * wide;
  if (!a->few) { /* many rows read them often: close together */
    if (j < end) gemm(o, wide, u->s + j, KEYS, 1, u->v + j * wide, wide, R, wide, end - j, 1);
    return;
  }
  for (size_t m; j < end; j += m) { /* the same sums */
    m = end - j;
    const real *v = run_of(a, keys, a->vcache, a->v, e + j, &m);
    gemm(o, wide, u->s + j, KEYS, 1, v, a->G * a->P, R, wide, m, 1);
  }
}

/* Rows r .. r+R meet the keys of depths e .. min(e+KEYS, high). What no row sees, sinks and window apart, may be a rejected token's,
 * even NaN, and is left out. */
static void attend_block(const Attention *a, const Tile *u, const Keys *keys, size_t r, size_t R, size_t e, size_t high) {
  const size_t P = a->P, wide = a->wide, count = min(KEYS, high - e);
  size_t sunk = 0, from = count;
  if (a->few) {
    score(u->s, a, keys, u->q + r * P, R, e, count);
  } else {
    load_columns(u->k, a, keys, a->kcache, a->k, e, count);
    gemm(u->s, KEYS, u->q + r * P, P, 1, u->k, KEYS, R, whole_vectors(count), P, 0);
  }
  for (size_t i = 0; i < R; i++) {
    const Part part = part_of(a, a->seen + u->b * a->T + u->t + (r + i) / a->rep % u->n, e, count);
    if (is_empty(&part)) {
      memset(u->s + i * KEYS, 0, KEYS * sizeof *u->s);
      continue;
    }
    softmax_row(u->s + i * KEYS, u->o + (r + i) * wide, u->top + r + i, u->sum + r + i, &part, wide);
    sunk = max(sunk, part.sunk), from = min(from, part.from);
  }
  if (!a->few) load_rows(u->v, a, keys, a->vcache, a->v, e, count);
  add_values(a, u, keys, r, R, e, 0, sunk);
  add_values(a, u, keys, r, R, e, max(sunk, from), count);
}

/* A chain's keys serve all rows of a group. A tree's serve them up to the last block that lies in the cache whole; from there
 * on each token goes its own path. Documents that start behind the first token do so within depths low .. shared. */
static void attend(const Attention *a, const Tile *u) {
  const Seen *seen = a->seen + u->b * a->T + u->t;
  Keys keys = {.b = u->b, .g = u->g, .base = base_of(a, u->b)};
  const size_t shared = a->tree ? keys.base / KEYS * KEYS : seen[u->n - 1].to, rows = u->n * a->rep;
  size_t low = shared, path[PENDING];
  for (size_t i = 0; i < u->n; i++) low = min(low, seen[i].from);
  for (size_t e = block_from(a, seen, low, seen->start / KEYS * KEYS); e < shared; e = block_from(a, seen, low, e + KEYS)) {
    for (size_t j = 0; j < u->groups; j++, keys.g++) attend_block(a, u, &keys, j * rows, rows, e, shared);
    keys.g = u->g;
  }
  for (size_t i = 0; a->tree && i < u->n; i++) {
    find_path(path, a, u->b, u->t + i);
    keys.path = path;
    for (size_t e = block_from(a, seen + i, seen[i].from, shared); e < seen[i].to; e = block_from(a, seen + i, seen[i].from, e + KEYS)) {
      for (size_t j = 0; j < u->groups; j++, keys.g++) attend_block(a, u, &keys, j * rows + i * a->rep, a->rep, e, seen[i].to);
      keys.g = u->g;
    }
  }
}

/* Where row r's query and output are. */
static size_t query_of(const Attention *a, const Tile *u, size_t r, size_t *t, size_t *h) {
  *t = u->t + r / a->rep % u->n;
  *h = (u->g + r / a->rep / u->n) * a->rep + r % a->rep;
  return ((u->b * a->T + *t) * a->H + *h) * a->P;
}

static void load_queries(const Attention *a, const Tile *u) {
  const size_t P = a->P, rows = u->groups * u->n * a->rep;
  for (size_t r = 0, t, h; r < rows; r++) {
    const real *q = a->q + query_of(a, u, r, &t, &h);
    for (size_t p = 0; p < P; p++) u->q[r * P + p] = q[p] * a->scale;
    u->top[r] = -INFINITY, u->sum[r] = 0;
  }
  memset(u->o, 0, rows * a->wide * sizeof *u->o);
}

static void store_outputs(const Attention *a, const Tile *u) {
  for (size_t r = 0, t, h; r < u->groups * u->n * a->rep; r++) {
    real *o = a->o + query_of(a, u, r, &t, &h);
    for (size_t p = 0; p < a->P; p++) o[p] = u->o[r * a->wide + p] / u->sum[r];
    if (a->lse) a->lse[(u->b * a->H + h) * a->T + t] = u->top[r] + logf(u->sum[r]);
  }
}

static void forward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, group, tile) */
  const Attention *a = arg;
  const size_t P = a->P, rows = a->groups * a->tokens * a->rep;
  Tile u = {.s = a->scratch + worker * a->share};
  u.k = u.s + a->tokens * a->rep * KEYS, u.v = u.k + P * KEYS, u.o = u.v + a->wide * KEYS, u.q = u.o + rows * a->wide;
  u.top = u.q + rows * P, u.sum = u.top + rows;
  for (size_t item = begin; item < end; item += u.groups) {
    const size_t i = item % a->tiles, tile = i % 2 ? a->tiles - 1 - i / 2 : i / 2; /* short and long rows in turn */
    u.g = item / a->tiles % a->G, u.b = item / a->tiles / a->G;
    u.groups = min(a->groups, min(a->G - u.g, end - item));
    u.t = tile * a->tokens, u.n = min(a->tokens, a->T - u.t);
    load_queries(a, &u);
    attend(a, &u);
    store_outputs(a, &u);
  }
}

/* Sinks, and the last of the other tokens that may still be asked for: padding behind what may stay pending must not push others
 * out. */
static void write_cache(real *cache, const real *x, const Attention *a, size_t B) {
  const size_t row = a->G * a->P;
  for (size_t b = 0; b < B; b++) {
    const size_t end = a->rows.keep ? min(a->T, (size_t)a->rows.keep[b] + PENDING) : a->T, base = base_of(a, b);
    for (size_t t = 0; t < end; t++)
      if (base + t < a->sinks || end - t <= a->K - a->sinks)
        memcpy(cache + (slot_of(a, b) * a->K + entry_at(a, base + t)) * row, x + (b * a->T + t) * row, row * sizeof *x);
  }
}

void attention_forward(real *o, float *lse, real *kcache, real *vcache, real *q, real *k, const real *v, Rows rows, Rope rope,
                       float scale, size_t window, size_t sinks, size_t B, size_t T, size_t H, size_t G, size_t P, size_t K) {
  if (!B || !T || !H || !G) return;
  if (rope.inv_freq) {
    rope_forward(q, q, rope.position, rope.inv_freq, rope.scale, B * T, H, P);
    rope_forward(k, k, rope.position, rope.inv_freq, rope.scale, B * T, G, P);
  }
  Attention a = {.o = o, .lse = lse, .kcache = kcache, .vcache = vcache, .q = q, .k = k, .v = v, .rows = rows, .scale = scale,
                 .window = window, .sinks = window ? min(sinks, FARTHEST) : 0, .T = T, .H = H, .G = G, .P = P, .K = K, .rep = H / G,
                 .wide = whole_vectors(P)};
  a.tokens = min(T, max(1, min(KEYS, ROWS / a.rep)));
  a.tiles = (T + a.tokens - 1) / a.tokens;
  a.groups = a.tiles == 1 ? min(G, max(1, ROWS / (a.tokens * a.rep))) : 1;
  for (size_t i = 0; kcache && T <= PENDING && rows.prev && i < B * T; i++) a.tree |= rows.prev[i] != (int32_t)(i % T) - 1;
  a.few = kcache && T <= PENDING && P % LANES == 0;
  a.share = whole_vectors(a.tokens * a.rep * (KEYS + a.groups * (P + a.wide + 2)) + (P + a.wide) * KEYS);
  a.scratch = device_scratch(workers() * a.share * sizeof(float) + B * T * sizeof(Seen));
  if (!a.scratch) return;
  a.seen = (Seen *)(a.scratch + workers() * a.share);
  find_seen(&a, B);
  size_t keys = 0;
  for (size_t i = 0; i < B * T; i++) keys += a.seen[i].to - a.seen[i].from + min(a.sinks, a.seen[i].from - a.seen[i].start);
  parallel(forward_range, &a, B * G * a.tiles, 4.0 * a.rep * P * keys / (B * a.tiles));
  if (kcache) write_cache(kcache, k, &a, B), write_cache(vcache, v, &a, B);
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

typedef struct {
  float *kt, *k, *vt, *s, *dp, *dk, *dv; /* (P,KEYS), (KEYS,wide), (P,KEYS), (QUERIES,KEYS) twice, (KEYS,P) twice */
} Tiles;

/* p = exp(scale q.k - lse), dp = dout.v, ds = scale p (dp - delta), of one token and head; of KEYS p is seen */
static void backward_row(float *restrict s, float *restrict dp, float scale, float lse, float delta, const Part *p) {
  for (size_t j = 0; j < KEYS; j++) {
    s[j] = exp_(s[j] * scale - lse);
    dp[j] = scale * s[j] * (dp[j] - delta);
  }
  hide(s, p, 0);
  hide(dp, p, 0);
}

/* Tokens t .. t+n of head h on keys e .. e+count, count <= KEYS: o = p v: dv += p^T dout;  dq += ds k;  dk += ds^T q. */
static void backward_tile(const Attention *a, const Tiles *w, size_t b, size_t h, size_t t, size_t n, size_t e, size_t count) {
  const size_t P = a->P, row = a->H * P, at = (b * a->T + t) * row + h * P;
  gemm(w->s, KEYS, a->q + at, row, 1, w->kt, KEYS, n, whole_vectors(count), P, 0);
  gemm(w->dp, KEYS, a->dout + at, row, 1, w->vt, KEYS, n, whole_vectors(count), P, 0);
  for (size_t i = 0; i < n; i++) {
    const Part part = part_of(a, a->seen + b * a->T + t + i, e, KEYS);
    const size_t of = (b * a->H + h) * a->T + t + i;
    backward_row(w->s + i * KEYS, w->dp + i * KEYS, a->scale, a->lse[of], a->delta[of], &part);
  }
  gemm(w->dv, P, w->s, 1, KEYS, a->dout + at, row, count, P, n, 1);
  gemm(w->dk, P, w->dp, 1, KEYS, a->q + at, row, count, P, n, 1);
  gemm(a->dq + at, row, w->dp, KEYS, 1, w->k, a->wide, n, P, count, 1);
}

static void backward_block(const Attention *a, const Tiles *w, const Keys *keys, size_t e, size_t count) {
  const size_t P = a->P, T = a->T, b = keys->b;
  load_columns(w->kt, a, keys, NULL, a->k, e, count);
  load_rows(w->k, a, keys, NULL, a->k, e, count);
  load_columns(w->vt, a, keys, NULL, a->v, e, count);
  memset(w->dk, 0, KEYS * P * sizeof(float));
  memset(w->dv, 0, KEYS * P * sizeof(float));
  for (size_t t = e; t < T; t += QUERIES) {
    const size_t n = min(QUERIES, T - t);
    const Part part = part_of(a, a->seen + b * T + t, e, count);
    if (is_empty(&part)) continue; /* its tile sees nothing here: what starts behind it sees no more than it */
    for (size_t r = 0; r < a->rep; r++) backward_tile(a, w, b, keys->g * a->rep + r, t, n, e, min(count, t + n - e));
  }
  for (size_t j = 0; j < count; j++) {
    const size_t at = ((b * T + e + j) * a->G + keys->g) * P;
    memcpy(a->dk + at, w->dk + j * P, P * sizeof(float));
    memcpy(a->dv + at, w->dv + j * P, P * sizeof(float));
  }
}

/* dq = 0 and delta = dout.o, of group g of row b: what sum_j p_j dp_j comes to. */
static void backward_begin(const Attention *a, size_t b, size_t g) {
  const size_t P = a->P;
  for (size_t t = 0; t < a->T; t++)
    for (size_t h = g * a->rep; h < (g + 1) * a->rep; h++) {
      const size_t at = ((b * a->T + t) * a->H + h) * P;
      float delta = 0;
#pragma omp simd reduction(+ : delta)
      for (size_t p = 0; p < P; p++) delta += a->dout[at + p] * a->o[at + p];
      a->delta[(b * a->H + h) * a->T + t] = delta;
      memset(a->dq + at, 0, P * sizeof(real));
    }
}

static void backward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, group) */
  const Attention *a = arg;
  const size_t block = KEYS * a->P, scores = QUERIES * KEYS;
  float *s = a->scratch + worker * a->share;
  Tiles w = {.s = s, .dp = s + scores, .kt = s + 2 * scores};
  w.vt = w.kt + block, w.dk = w.vt + block, w.dv = w.dk + block, w.k = w.dv + block;
  for (size_t item = begin; item < end; item++) {
    const Keys keys = {.b = item / a->G, .g = item % a->G};
    backward_begin(a, keys.b, keys.g);
    for (size_t e = 0; e < a->T; e += KEYS) backward_block(a, &w, &keys, e, min(KEYS, a->T - e));
  }
}

void attention_backward(real *dq, real *dk, real *dv, const real *dout, const real *q, const real *k, const real *v,
                        const real *o, const float *lse, Rows rows, float scale, size_t window, size_t sinks, size_t B, size_t T,
                        size_t H, size_t G, size_t P) {
  if (!B || !T || !H || !G) return;
  Attention a = {.o = (real *)o, .dq = dq, .dk = dk, .dv = dv, .lse = (float *)lse, .q = q, .k = k, .v = v, .dout = dout,
                 .rows = rows, .scale = scale, .window = window, .sinks = window ? min(sinks, FARTHEST) : 0, .T = T, .H = H, .G = G,
                 .P = P, .rep = H / G, .wide = whole_vectors(P)};
  a.share = whole_vectors(2 * QUERIES * KEYS + KEYS * (4 * P + a.wide));
  a.scratch = device_scratch(workers() * a.share * sizeof(float) + B * T * (sizeof(Seen) + H * sizeof(float)));
  if (!a.scratch) return;
  a.seen = (Seen *)(a.scratch + workers() * a.share);
  a.delta = (float *)(a.seen + B * T);
  find_seen(&a, B);
  parallel(backward_range, &a, B * G, 5.0 * a.rep * T * T * P);
}
