/* scan.c - Mamba-1's selective scan.
 *
 * Lanes run over channels: the N channels of a block share B and C, so LANES of them step together with S[n][lane], n looped,
 * B[n] and C[n] broadcast, and y needs no horizontal sum. `advance` is the only code that computes a state: prefill, fold,
 * replay, trees and backward's recomputation all call it, so that equal pasts have equal bits. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

enum {
  CHUNK = 16, /* tokens staged at a time, and from one of backward's checkpoints to the next */
  TILE = 4    /* groups of lanes that go through time side by side: one alone would read a cache line of every row */
};
static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

typedef struct {
  real *y;
  float *state;
  Ring ring;
  const real *x, *dt;
  const float *A_log;
  const real *Bm, *C;
  const float *Dskip, *dt_bias;
  const real *z;
  Rows rows;
  size_t B, T, D, N, J;
  float *scratch;
  size_t share, each; /* floats of scratch that a worker has, and of these a group */
  /* backward */
  real *dx, *ddt, *dB, *dC, *dz;
  float *dA_log, *dD, *ddt_bias, *dstate;
  const real *dy;
  float *part_A, *part_D, *part_bias; /* (B,D,N), (B,D), (B,D): parameter gradients by row of the batch */
} Scan;

/* LANES channels of a block, c .. c+width; lanes past width hold 0. */
typedef struct {
  size_t k, c, width;
  float *A, *S, *dS, *dA, *checkpoints;        /* (N,LANES); A = -exp(A_log) log2(e): the decay is 2^(d A) */
  float *B, *C;                                /* the staged tokens: (CHUNK,N) */
  float *x, *v, *d, *u, *y, *z, *dy, *du, *dd; /* and (CHUNK,LANES) */
  float bias[LANES], skip[LANES], dbias[LANES], dskip[LANES];
} Group;
/* Neighbouring groups of row b. */
typedef struct {
  size_t b, groups, size;        /* size = N*LANES */
  float *zero, *states, *decays; /* 1, PENDING and CHUNK of (N,LANES), for one group after the other */
  Group g[TILE];
} Tile;

static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t max(size_t a, size_t b) { return a > b ? a : b; }

/* 2^x for x <= 0: 2^round(x) times a minimax polynomial of the rest (relative error 1e-7). 2^-125 below -125, NaN through. */
static inline float exp2_decay(float x) {
  float c = x < -125.0f ? -125.0f : x;
  float m = c + 12582912.0f;
  float r = c - (m - 12582912.0f);
  float p = 1.53533504e-4f;
  p = p * r + 1.33988739e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(m) << 23)); /* m's low bits are round(x) */
}

/* ---- tiles ---------------------------------------------------------------------------------------------------------- */

/* out[n] = sum_lane rows[n][lane], n < N */
static void row_sums(float *out, const float *rows, size_t N) {
  size_t n = 0;
  for (; n + LANES <= N; n += LANES) {
    vec v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = vec_load(rows + (n + i) * LANES);
    vec_store(out + n, sum_lanes(v));
  }
  for (; n < N; n++) out[n] = vec_sum(vec_load(rows + n * LANES));
}

static void load_lanes(float *to, const float *from, size_t width) {
  if (width == LANES)
    memcpy(to, from, LANES * sizeof *to);
  else
    for (size_t l = 0; l < LANES; l++) to[l] = l < width ? from[l] : 0.0f;
}
static void store_lanes(float *to, const float *from, size_t width) {
  if (width == LANES)
    memcpy(to, from, LANES * sizeof *to);
  else
    for (size_t l = 0; l < width; l++) to[l] = from[l];
}

/* n rows of (.,D) to the groups' rows of LANES, `lanes` being group 0's; and back. */
static void load_rows(const Tile *m, const Scan *s, float *lanes, const float *rows, size_t n) {
  for (size_t i = 0; i < n; i++)
    for (size_t q = 0; q < m->groups; q++)
      load_lanes(lanes + q * s->each + i * LANES, rows + i * s->D + m->g[q].c, m->g[q].width);
}
static void store_rows(const Tile *m, const Scan *s, float *rows, const float *lanes, size_t n) {
  for (size_t i = 0; i < n; i++)
    for (size_t q = 0; q < m->groups; q++)
      store_lanes(rows + i * s->D + m->g[q].c, lanes + q * s->each + i * LANES, m->g[q].width);
}

/* (D,N) to the group's (N,LANES), and back. */
static void load_matrix(float *to, const float *from, const Group *g, size_t N) {
  if (g->width < LANES) memset(to, 0, N * LANES * sizeof *to);
  transpose(to, LANES, from + g->c * N, N, g->width, N);
}
static void store_matrix(float *to, const float *from, const Group *g, size_t N) {
  transpose(to + g->c * N, N, from, LANES, N, g->width);
}

static size_t lane_groups(size_t N) { return (N + LANES - 1) / LANES; } /* of a block */

static void size_scratch(Scan *s, size_t checkpoints) {
  s->each = ((4 + checkpoints) * s->N * LANES + CHUNK * (2 * s->N + 9 * LANES) + 15) / 16 * 16;
  s->share = TILE * s->each + (1 + PENDING + CHUNK) * s->N * LANES;
}

static void tile_memory(Tile *m, const Scan *s, size_t worker) {
  float *p = s->scratch + worker * s->share;
  const size_t size = s->N * LANES, lanes = CHUNK * LANES;
  m->size = size;
  for (size_t q = 0; q < TILE; q++, p += s->each) {
    Group *g = m->g + q;
    g->A = p, g->S = p + size, g->dS = p + 2 * size, g->dA = p + 3 * size, g->x = p + 4 * size;
    g->v = g->x + lanes, g->d = g->v + lanes, g->u = g->d + lanes, g->y = g->u + lanes, g->z = g->y + lanes;
    g->dy = g->z + lanes, g->du = g->dy + lanes, g->dd = g->du + lanes, g->B = g->dd + lanes;
    g->C = g->B + CHUNK * s->N, g->checkpoints = g->C + CHUNK * s->N;
  }
  m->zero = p, m->states = p + size, m->decays = m->states + PENDING * size;
  memset(m->zero, 0, size * sizeof(float));
}

/* Points the tile at groups first .. of row b, and loads what holds for all tokens; S from `state` at its slot, or zero. */
static void tile_begin(Tile *m, const Scan *s, size_t b, size_t first, size_t groups, size_t slot) {
  const size_t N = s->N, lanes = lane_groups(N);
  m->b = b, m->groups = groups;
  for (size_t q = 0; q < groups; q++) {
    Group *g = m->g + q;
    const size_t lane = (first + q) % lanes * LANES;
    g->k = (first + q) / lanes, g->c = g->k * N + lane, g->width = min(LANES, N - lane);
    load_matrix(g->A, s->A_log, g, N);
    for (size_t i = 0; i < m->size; i++) g->A[i] = -LOG2E * exp_(g->A[i]);
    if (s->state)
      load_matrix(g->S, s->state + slot * s->D * N, g, N);
    else
      memset(g->S, 0, m->size * sizeof(float));
    load_lanes(g->bias, s->dt_bias ? s->dt_bias + g->c : m->zero, g->width);
    load_lanes(g->skip, s->Dskip ? s->Dskip + g->c : m->zero, g->width);
  }
}

/* Tokens t .. t+n of the call: x, d = softplus(v = dt + dt_bias), u = d x, B, C, z. */
static void stage_call(Tile *m, const Scan *s, size_t t, size_t n) {
  const size_t D = s->D, N = s->N, J = s->J, row = m->b * s->T + t, rep = D / N / J;
  load_rows(m, s, m->g->x, s->x + row * D, n);
  load_rows(m, s, m->g->v, s->dt + row * D, n);
  if (s->z) load_rows(m, s, m->g->z, s->z + row * D, n);
  for (size_t i = 0; i < n; i++)
    for (size_t q = 0; q < m->groups; q++) {
      Group *g = m->g + q;
      const float *B = s->Bm + ((row + i) * J + g->k / rep) * N, *C = s->C + (row + i) * D + g->k * N;
      for (size_t l = 0; l < N; l++) g->B[i * N + l] = B[l];
      for (size_t l = 0; l < N; l++) g->C[i * N + l] = C[l];
    }
  for (size_t q = 0; q < m->groups; q++) {
    Group *g = m->g + q;
    for (size_t i = 0; i < n; i++)
      for (size_t l = 0; l < LANES; l++) g->v[i * LANES + l] += g->bias[l];
    for (size_t i = 0; i < n * LANES; i++) g->d[i] = softplus(g->v[i]);
    for (size_t i = 0; i < n * LANES; i++) g->u[i] = g->d[i] * g->x[i];
  }
}

/* S'[n] = 2^(d A[n]) S[n] + u B[n];  y = sum_n C[n] S'[n].   y, d, u (LANES)  to = S', from = S, A, decay (N,LANES)
 * to may be from; decay holds the powers afterwards. One body, never inlined: its rounding is the same for every caller. */
static __attribute__((noinline)) void advance(float *y, float *to, float *restrict decay, const float *from, const float *A,
                                              const float *d, const float *u, const float *B, const float *C, size_t N) {
  for (size_t n = 0; n < N; n++)
    for (size_t l = 0; l < LANES; l++) decay[n * LANES + l] = exp2_decay(d[l] * A[n * LANES + l]);
  vec du = vec_load(u), sum = {0};
  for (size_t n = 0; n < N; n++) {
    vec state = vec_load(decay + n * LANES) * vec_load(from + n * LANES) + B[n] * du;
    vec_store(to + n * LANES, state);
    sum += C[n] * state;
  }
  vec_store(y, sum);
}

/* ---- forward -------------------------------------------------------------------------------------------------------- */

/* What a call runs for one row: positions begin .. pos from the ring, then its own pos .. pos+T; `state` is left at mark. */
typedef struct {
  size_t slot, begin, pos, mark;
  const int32_t *prev;
  int ring, tree; /* tree: tokens branch, so that each keeps its state */
} Past;

static Past past_of(const Scan *s, size_t b) {
  const Rows *r = &s->rows;
  Past p = {.slot = r->slot ? (size_t)r->slot[b] : b, .ring = s->state && s->ring.x};
  size_t keep = r->keep ? (size_t)r->keep[b] : s->T, R = SCAN_RING;
  size_t committed = r->committed ? (size_t)r->committed[p.slot] : 0, seen = r->seen ? (size_t)r->seen[p.slot] : 0;
  p.prev = r->prev ? r->prev + b * s->T : NULL;
  p.pos = r->pos ? (size_t)r->pos[p.slot] : 0;
  p.begin = p.ring ? seen / R * R : p.pos;
  p.mark = !p.ring ? p.pos + keep : s->T > PENDING ? (p.pos + keep) / R * R : committed / R * R;
  for (size_t t = 0; p.prev && s->T <= PENDING && t < s->T; t++) p.tree |= p.prev[t] != (int32_t)t - 1 && p.prev[t] != -2;
  return p;
}

static size_t ring_row(const Past *p, size_t position) {
  return p->slot * (SCAN_RING + PENDING) + position % (SCAN_RING + PENDING);
}
/* The call's tokens that the ring takes: first .. last, positions. */
static size_t ring_first(const Past *p) { return max(p->mark, p->pos); }
static size_t ring_last(const Past *p, size_t T) { return min(p->pos + T, p->mark + SCAN_RING + PENDING); }

static void stage_ring(Tile *m, const Scan *s, const Past *p, size_t at, size_t n) {
  const size_t D = s->D, N = s->N, J = s->J, rep = D / N / J;
  for (size_t i = 0; i < n; i++)
    for (size_t q = 0; q < m->groups; q++) {
      Group *g = m->g + q;
      const size_t row = ring_row(p, at + i);
      const float *B = s->ring.B + (row * J + g->k / rep) * N;
      load_lanes(g->x + i * LANES, s->ring.x + row * D + g->c, g->width);
      load_lanes(g->d + i * LANES, s->ring.dt + row * D + g->c, g->width);
      for (size_t l = 0; l < LANES; l++) g->u[i * LANES + l] = g->d[i * LANES + l] * g->x[i * LANES + l];
      for (size_t l = 0; l < N; l++) g->C[i * N + l] = g->B[i * N + l] = B[l]; /* C: nobody reads the y of these */
    }
}

/* y = (sum + D x) silu(z) of tokens t .. t+n, and their x and d to the ring. */
static void finish(Tile *m, const Scan *s, const Past *p, size_t t, size_t n) {
  for (size_t q = 0; q < m->groups; q++) {
    Group *g = m->g + q;
    for (size_t i = 0; i < n; i++)
      for (size_t l = 0; l < LANES; l++) g->y[i * LANES + l] += g->skip[l] * g->x[i * LANES + l];
    for (size_t i = 0; s->z && i < n * LANES; i++) g->y[i] *= silu(g->z[i]);
  }
  store_rows(m, s, s->y + (m->b * s->T + t) * s->D, m->g->y, n);
  for (size_t i = 0; p->ring && i < n; i++) {
    const size_t at = p->pos + t + i, row = ring_row(p, at) * s->D;
    if (at < ring_first(p) || at >= ring_last(p, s->T)) continue;
    store_rows(m, s, s->ring.x + row, m->g->x + i * LANES, 1);
    store_rows(m, s, s->ring.dt + row, m->g->d + i * LANES, 1);
  }
}

/* Positions at .. at+n, all on one side of pos and of mark. A tree keeps a state a token, so its tiles are single groups. */
static void forward_chunk(Tile *m, const Scan *s, const Past *p, size_t at, size_t n) {
  const int mine = at >= p->pos; /* the call's tokens t .. t+n, not the ring's */
  const size_t t = mine ? at - p->pos : 0, N = s->N, size = m->size;
  if (mine)
    stage_call(m, s, t, n);
  else
    stage_ring(m, s, p, at, n);
  for (size_t q = 0; q < m->groups; q++) {
    const Group *g = m->g + q;
    float *to = g->S;
    for (size_t i = 0; i < n; i++) {
      const int32_t before = mine && p->prev ? p->prev[t + i] : -1;
      const float *from = before == -2 ? m->zero : p->tree && before >= 0 ? m->states + before * size : g->S;
      if (mine && p->tree) to = m->states + (t + i) * size;
      advance(g->y + i * LANES, to, m->decays, from, g->A, g->d + i * LANES, g->u + i * LANES, g->B + i * N, g->C + i * N, N);
    }
    if (s->state && at + n == p->mark) store_matrix(s->state + p->slot * s->D * N, to, g, N);
  }
  if (mine) finish(m, s, p, t, n);
}

static void forward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, group) */
  const Scan *s = arg;
  const size_t row = s->D / s->N * lane_groups(s->N);
  Tile m;
  tile_memory(&m, s, worker);
  for (size_t item = begin; item < end; item += m.groups) {
    const Past p = past_of(s, item / row);
    const size_t left = min(end, (item / row + 1) * row) - item;
    tile_begin(&m, s, item / row, item % row, p.tree ? 1 : min(TILE, left), p.slot);
    for (size_t at = p.begin, n; at < p.pos + s->T; at += n) {
      const size_t stop = at < p.pos ? p.pos : p.pos + s->T;
      n = min(CHUNK, (at < p.mark ? min(stop, p.mark) : stop) - at);
      forward_chunk(&m, s, &p, at, n);
    }
  }
}

/* The ring's B, which the rep blocks of a kv block share: after all of them have read. */
static void ring_B(void *arg, size_t begin, size_t end, size_t worker) {
  (void)worker;
  const Scan *s = arg;
  const size_t row = s->J * s->N;
  for (size_t b = begin; b < end; b++) {
    Past p = past_of(s, b);
    for (size_t at = ring_first(&p); at < ring_last(&p, s->T); at++)
      memcpy(s->ring.B + ring_row(&p, at) * row, s->Bm + (b * s->T + at - p.pos) * row, row * sizeof(real));
  }
}

void selective_scan_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm,
                            const real *C, const float *Dskip, const float *dt_bias, const real *z, Rows rows, size_t B,
                            size_t T, size_t D, size_t N, size_t J) {
  Scan s = {.y = y, .state = state, .ring = ring, .x = x, .dt = dt, .A_log = A_log, .Bm = Bm, .C = C, .Dskip = Dskip,
            .dt_bias = dt_bias, .z = z, .rows = rows, .B = B, .T = T, .D = D, .N = N, .J = J};
  if (!B || !T || !D || !N || !J) return;
  size_scratch(&s, 0);
  s.scratch = device_scratch(workers() * s.share * sizeof(float));
  if (!s.scratch) return;
  parallel(forward_range, &s, B * (D / N) * lane_groups(N), 20.0 * (T + 2) * N * min(N, LANES));
  if (state && ring.x) parallel(ring_B, &s, B, (double)min(T, PENDING) * J * N);
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

/* y = sum_n C[n] S'[n], S'[n] = a[n] S[n] + u B[n], a[n] = 2^(d A[n]), against g = dy and dS, the cotangent of S' from later:
 * dS += g C;  dC = sum_lanes g S';  dB = sum_lanes dS u;  du = sum_n dS B;  dd = ln 2 sum_n A (dS a S);  dA += d (dS a S);
 * dS becomes S's.   g, d, u, du, dd (LANES)  the rest (N,LANES); before = S; after: in S', out g S'; decay: in a, out dS u */
static void retreat(float *du, float *dd, float *dS, float *dA, float *after, float *decay, const float *before, const float *A,
                    const float *g, const float *d, const float *u, const float *B, const float *C, size_t N) {
  vec vg = vec_load(g), vd = vec_load(d), vu = vec_load(u), sum_u = {0}, sum_d = {0};
  for (size_t n = 0; n < N; n++) {
    size_t i = n * LANES;
    vec ds = vec_load(dS + i) + C[n] * vg, back = ds * vec_load(decay + i), power = back * vec_load(before + i);
    vec_store(dS + i, back);
    vec_store(dA + i, vec_load(dA + i) + power * vd);
    vec_store(after + i, vec_load(after + i) * vg);
    vec_store(decay + i, ds * vu);
    sum_u += B[n] * ds;
    sum_d += vec_load(A + i) * power;
  }
  vec_store(du, sum_u);
  vec_store(dd, sum_d * LN2);
}

/* y = (sum + D x) silu(z): z becomes dz, dy the cotangent of the sum; dD. */
static void finish_backward(Group *g, const Scan *s, size_t n) {
  for (size_t i = 0; i < n; i++)
    for (size_t l = 0; l < LANES; l++) g->y[i * LANES + l] += g->skip[l] * g->x[i * LANES + l];
  for (size_t i = 0; s->z && i < n * LANES; i++) {
    const float dy = g->dy[i], z = g->z[i];
    g->dy[i] = dy * silu(z);
    g->z[i] = dy * g->y[i] * dsilu(z);
  }
  for (size_t i = 0; i < n; i++)
    for (size_t l = 0; l < LANES; l++) g->dskip[l] += g->dy[i * LANES + l] * g->x[i * LANES + l];
}

/* Tokens t .. t+n of one group: forward from `before`, the state before them, then back.
 * du becomes dx, dd ddt, z dz, B dB, C dC (the lanes' part of the last two). */
static void backward_group(const Tile *m, Group *g, const Scan *s, const int32_t *prev, const float *before, size_t t,
                           size_t n) {
  const size_t N = s->N, size = m->size;
  const float *from[CHUNK];
  for (size_t i = 0; i < n; i++) { /* states[i] is the state after token t+i */
    from[i] = prev && prev[t + i] == -2 ? m->zero : i ? m->states + (i - 1) * size : before;
    advance(g->y + i * LANES, m->states + i * size, m->decays + i * size, from[i], g->A, g->d + i * LANES, g->u + i * LANES,
            g->B + i * N, g->C + i * N, N);
  }
  finish_backward(g, s, n);
  for (size_t i = n; i-- > 0;) {
    retreat(g->du + i * LANES, g->dd + i * LANES, g->dS, g->dA, m->states + i * size, m->decays + i * size, from[i], g->A,
            g->dy + i * LANES, g->d + i * LANES, g->u + i * LANES, g->B + i * N, g->C + i * N, N);
    if (from[i] == m->zero) memset(g->dS, 0, size * sizeof(float));
  }
  row_sums(g->C, m->states, n * N);
  row_sums(g->B, m->decays, n * N);
  for (size_t i = 0; i < n; i++) /* u = d x, y has D x, d = softplus(v) */
    for (size_t l = 0; l < LANES; l++) {
      const size_t e = i * LANES + l;
      g->dd[e] = (g->dd[e] + g->x[e] * g->du[e]) * sigmoid(g->v[e]);
      g->du[e] = g->d[e] * g->du[e] + g->skip[l] * g->dy[e];
      g->dbias[l] += g->dd[e];
    }
}

/* to[n] (= | add: +=) from[n] */
static void put(float *to, const float *from, size_t N, int add) {
  for (size_t n = 0; n < N; n++) to[n] = (add ? to[n] : 0.0f) + from[n];
}

static void backward_chunk(Tile *m, const Scan *s, const int32_t *prev, size_t t, size_t n) {
  const size_t D = s->D, N = s->N, J = s->J, rep = D / N / J, row = m->b * s->T + t;
  stage_call(m, s, t, n);
  load_rows(m, s, m->g->dy, s->dy + row * D, n);
  for (size_t q = 0; q < m->groups; q++)
    backward_group(m, m->g + q, s, prev, m->g[q].checkpoints + t / CHUNK * m->size, t, n);
  store_rows(m, s, s->dx + row * D, m->g->du, n);
  store_rows(m, s, s->ddt + row * D, m->g->dd, n);
  if (s->z) store_rows(m, s, s->dz + row * D, m->g->z, n);
  for (size_t i = 0; i < n; i++)
    for (size_t q = 0; q < m->groups; q++) { /* a block's groups share dC, a kv block's dB: the first writes, the others add */
      const Group *g = m->g + q;
      put(s->dC + (row + i) * D + g->k * N, g->C + i * N, N, g->c != g->k * N);
      put(s->dB + ((row + i) * J + g->k / rep) * N, g->B + i * N, N, g->c != g->k / rep * rep * N);
    }
}

/* All tokens of a tile: forward, leaving a checkpoint before every chunk, then chunk by chunk back. */
static void backward_tile(Tile *m, const Scan *s) {
  const size_t N = s->N, T = s->T, bytes = m->size * sizeof(float), row = m->b * s->D;
  const int32_t *prev = s->rows.prev ? s->rows.prev + m->b * T : NULL;
  for (size_t t = 0; t < T; t += CHUNK) {
    if (t + CHUNK < T) stage_call(m, s, t, CHUNK);
    for (size_t q = 0; q < m->groups; q++) {
      Group *g = m->g + q;
      memcpy(g->checkpoints + t / CHUNK * m->size, g->S, bytes);
      for (size_t i = 0; t + CHUNK < T && i < CHUNK; i++)
        advance(g->y, g->S, m->decays, prev && prev[t + i] == -2 ? m->zero : g->S, g->A, g->d + i * LANES, g->u + i * LANES,
                g->B + i * N, g->C + i * N, N);
    }
  }
  for (size_t q = 0; q < m->groups; q++) {
    Group *g = m->g + q;
    memset(g->dS, 0, bytes);
    memset(g->dA, 0, bytes);
    memset(g->dskip, 0, sizeof g->dskip);
    memset(g->dbias, 0, sizeof g->dbias);
    if (s->dstate) load_matrix(g->dS, s->dstate + row * N, g, N);
  }
  for (size_t chunks = (T + CHUNK - 1) / CHUNK; chunks-- > 0;)
    backward_chunk(m, s, prev, chunks * CHUNK, min(CHUNK, T - chunks * CHUNK));
  for (size_t q = 0; q < m->groups; q++) {
    Group *g = m->g + q;
    for (size_t i = 0; i < m->size; i++) g->dA[i] *= LN2 * g->A[i]; /* dA_log = -exp(A_log) sum d (dS a S) */
    store_matrix(s->part_A + row * N, g->dA, g, N);
    store_lanes(s->part_D + row + g->c, g->dskip, g->width);
    store_lanes(s->part_bias + row + g->c, g->dbias, g->width);
    if (s->dstate) store_matrix(s->dstate + row * N, g->dS, g, N);
  }
}

static void backward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, kv block) */
  const Scan *s = arg;
  const size_t part = s->D / s->N / s->J * lane_groups(s->N), row = part * s->J; /* groups of a kv block, of a row */
  Tile m;
  tile_memory(&m, s, worker);
  for (size_t group = begin * part; group < end * part; group += m.groups) {
    const size_t left = min(end * part, (group / row + 1) * row) - group;
    tile_begin(&m, s, group / row, group % row, min(TILE, left), group / row);
    backward_tile(&m, s);
  }
}

/* out[i] += sum_b part[b,i], begin <= i < end.   part (B,n) */
static void add_rows(float *out, const float *part, size_t B, size_t n, size_t begin, size_t end) {
  for (size_t b = 0; out && b < B; b++)
    for (size_t i = begin; i < end; i++) out[i] += part[b * n + i];
}
static void parameter_gradients(void *arg, size_t c, size_t end, size_t worker) {
  (void)worker;
  const Scan *s = arg;
  add_rows(s->dA_log, s->part_A, s->B, s->D * s->N, c * s->N, end * s->N);
  add_rows(s->dD, s->part_D, s->B, s->D, c, end);
  add_rows(s->ddt_bias, s->part_bias, s->B, s->D, c, end);
}

void selective_scan_backward(real *dx, real *ddt, float *dA_log, real *dB, real *dC, float *dD, float *ddt_bias, real *dz,
                             float *dstate, const real *dy, const float *state, const real *x, const real *dt,
                             const float *A_log, const real *Bm, const real *C, const float *Dskip, const float *dt_bias,
                             const real *z, Rows rows, size_t B, size_t T, size_t D, size_t N, size_t J) {
  Scan s = {.state = (float *)state, .x = x, .dt = dt, .A_log = A_log, .Bm = Bm, .C = C, .Dskip = Dskip, .dt_bias = dt_bias,
            .z = z, .rows = rows, .B = B, .T = T, .D = D, .N = N, .J = J,
            .dx = dx, .ddt = ddt, .dB = dB, .dC = dC, .dz = dz, .dA_log = dA_log, .dD = dD, .ddt_bias = ddt_bias,
            .dstate = dstate, .dy = dy};
  if (!B || !T || !D || !N || !J) return;
  size_scratch(&s, (T + CHUNK - 1) / CHUNK);
  s.scratch = device_scratch((workers() * s.share + B * D * (N + 2)) * sizeof(float));
  if (!s.scratch) return;
  s.part_A = s.scratch + workers() * s.share;
  s.part_D = s.part_A + B * D * N;
  s.part_bias = s.part_D + B * D;
  parallel(backward_range, &s, B * J, 60.0 * T * N * N * (D / N / J));
  parallel(parameter_gradients, &s, D, (double)B * (N + 2));
}
