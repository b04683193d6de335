/* scan.c - Mamba-1's selective scan.
 *
 * Lanes run over channels: the N channels of a block share B and C, so LANES of them step together with S[n][lane], n looped,
 * B[n] and C[n] broadcast, and y needs no horizontal sum. `advance` is the only code that computes a state: prefill, fold,
 * replay, trees and backward's recomputation all call it, so that equal pasts have equal bits. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

enum {
  CHUNK = 8, /* tokens staged at a time, and from one of backward's checkpoints to the next */
  TILE = 8   /* groups that go through time side by side, so that a chunk reads its rows by more than a cache line */
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
  size_t share; /* floats of scratch a worker has */
  /* backward */
  real *dx, *ddt, *dB, *dC, *dz;
  float *dA_log, *dD, *ddt_bias, *dstate;
  const real *dy;
  float *part_A, *part_D, *part_bias; /* (B,D,N), (B,D), (B,D): parameter gradients by row of the batch */
} Scan;

/* Channels c .. c+width of block k, row b: what holds for all tokens. Staged tokens are rows of LANES; lanes past width hold 0. */
typedef struct {
  size_t b, k, c, width, size;                  /* size = N*LANES, one matrix */
  float *A, *S;                                 /* A = -exp(A_log) log2(e), so that the decay is 2^(d A) */
  float *zero, *dS, *dA;                        /* from here on shared by the groups of a tile */
  float *states, *decays, *checkpoints, *B, *C; /* PENDING, CHUNK, any number of matrices; CHUNK rows of N */
  float *x, *v, *d, *u, *y, *z;                 /* CHUNK rows */
  float bias[LANES], skip[LANES];
} Group;

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

/* ---- lanes ---------------------------------------------------------------------------------------------------------- */

/* out[n] (= | add: +=) sum_lane rows[n][lane], n < N */
static void row_sums(float *out, const float *rows, size_t N, int add) {
  size_t n = 0;
  for (; n + LANES <= N; n += LANES) {
    vec v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = vec_load(rows + (n + i) * LANES);
    vec sum = sum_lanes(v);
    vec_store(out + n, add ? vec_load(out + n) + sum : sum);
  }
  for (; n < N; n++) out[n] = (add ? out[n] : 0.0f) + vec_sum(vec_load(rows + n * LANES));
}

/* n rows of `width` floats, `stride` apart, to rows of LANES; and back. */
static void load_lanes(float *to, const float *from, size_t stride, size_t n, size_t width) {
  for (size_t i = 0; i < n; i++)
    if (width == LANES)
      memcpy(to + i * LANES, from + i * stride, LANES * sizeof *to);
    else
      for (size_t l = 0; l < LANES; l++) to[i * LANES + l] = l < width ? from[i * stride + l] : 0.0f;
}
static void store_lanes(float *to, const float *from, size_t stride, size_t n, size_t width) {
  for (size_t i = 0; i < n; i++)
    if (width == LANES)
      memcpy(to + i * stride, from + i * LANES, LANES * sizeof *to);
    else
      for (size_t l = 0; l < width; l++) to[i * stride + l] = from[i * LANES + l];
}

/* ---- groups --------------------------------------------------------------------------------------------------------- */

static size_t share_of(size_t N, size_t checkpoints) {
  return ((2 * TILE + 3 + PENDING + CHUNK + checkpoints) * N * LANES + CHUNK * (6 * LANES + 2 * N) + 15) / 16 * 16;
}

static void group_memory(Group *g, const Scan *s, size_t worker) {
  float *p = s->scratch + worker * s->share;
  const size_t size = s->N * LANES, row = CHUNK * LANES;
  *g = (Group){.size = size, .zero = p, .dS = p + size, .dA = p + 2 * size, .states = p + 3 * size};
  g->decays = g->states + PENDING * size;
  g->A = g->decays + CHUNK * size, g->S = g->A + TILE * size, p = g->S + TILE * size;
  g->x = p, g->v = p + row, g->d = p + 2 * row, g->u = p + 3 * row, g->y = p + 4 * row, g->z = p + 5 * row, p += 6 * row;
  g->B = p, g->C = p + CHUNK * s->N, g->checkpoints = p + 2 * CHUNK * s->N;
  memset(g->zero, 0, size * sizeof(float));
}

static void load_matrix(float *to, const float *from, size_t c, const Group *g, size_t N) { /* (D,N) from row c on */
  if (g->width < LANES) memset(to, 0, g->size * sizeof *to);
  transpose(to, LANES, from + c * N, N, g->width, N);
}

/* Points the group at lanes c .. of block k and loads what holds for all its tokens; S from `state` at its slot, or zero. */
static void group_begin(Group *g, const Scan *s, size_t b, size_t k, size_t lane, const float *state, size_t slot) {
  const size_t N = s->N;
  g->b = b, g->k = k, g->c = k * N + lane, g->width = min(LANES, N - lane);
  load_matrix(g->A, s->A_log, g->c, g, N);
  for (size_t i = 0; i < g->size; i++) g->A[i] = -LOG2E * exp_(g->A[i]);
  memset(g->bias, 0, sizeof g->bias);
  memset(g->skip, 0, sizeof g->skip);
  if (s->dt_bias) load_lanes(g->bias, s->dt_bias + g->c, 0, 1, g->width);
  if (s->Dskip) load_lanes(g->skip, s->Dskip + g->c, 0, 1, g->width);
  if (state)
    load_matrix(g->S, state, slot * s->D + g->c, g, N);
  else
    memset(g->S, 0, g->size * sizeof(float));
}

/* Tokens t .. t+n of the call: x, d = softplus(v = dt + dt_bias), u = d x, B, C, z. */
static void stage_call(Group *g, const Scan *s, size_t t, size_t n) {
  const size_t D = s->D, N = s->N, J = s->J, row = g->b * s->T + t, j = g->k / (D / N / J);
  load_lanes(g->x, s->x + row * D + g->c, D, n, g->width);
  load_lanes(g->v, s->dt + row * D + g->c, D, n, g->width);
  if (s->z) load_lanes(g->z, s->z + row * D + g->c, D, n, g->width);
  for (size_t i = 0; i < n; i++) {
    for (size_t m = 0; m < N; m++) g->B[i * N + m] = s->Bm[((row + i) * J + j) * N + m];
    for (size_t m = 0; m < N; m++) g->C[i * N + m] = s->C[(row + i) * D + g->k * N + m];
    for (size_t l = 0; l < LANES; l++) g->v[i * LANES + l] += g->bias[l];
  }
  for (size_t i = 0; i < n * LANES; i++) g->d[i] = softplus(g->v[i]);
  for (size_t i = 0; i < n * LANES; i++) g->u[i] = g->d[i] * g->x[i];
}

/* Rows of one group lie D apart, too far for the hardware to foresee: ask for token t's while an earlier chunk computes. */
static void prefetch_call(const Group *g, const Scan *s, size_t t) {
  if (t >= s->T) return;
  const size_t at = (g->b * s->T + t) * s->D + g->c;
  __builtin_prefetch(s->x + at);
  __builtin_prefetch(s->dt + at);
  __builtin_prefetch(s->C + at);
  if (s->z) __builtin_prefetch(s->z + at);
  if (s->y) __builtin_prefetch(s->y + at, 1);
  if (s->dy) __builtin_prefetch(s->dy + at);
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

static void stage_ring(Group *g, const Scan *s, const Past *p, size_t at, size_t n) {
  const size_t D = s->D, N = s->N, J = s->J, j = g->k / (D / N / J);
  for (size_t i = 0; i < n; i++) {
    size_t row = ring_row(p, at + i);
    load_lanes(g->x + i * LANES, s->ring.x + row * D + g->c, 0, 1, g->width);
    load_lanes(g->d + i * LANES, s->ring.dt + row * D + g->c, 0, 1, g->width);
    for (size_t m = 0; m < N; m++) g->C[i * N + m] = g->B[i * N + m] = s->ring.B[(row * J + j) * N + m]; /* C: y is unused */
  }
  for (size_t i = 0; i < n * LANES; i++) g->u[i] = g->d[i] * g->x[i];
}

/* y = (sum + D x) silu(z) of tokens t .. t+n, and their x and d to the ring. */
static void finish(Group *g, const Scan *s, const Past *p, size_t t, size_t n) {
  for (size_t i = 0; i < n; i++)
    for (size_t l = 0; l < LANES; l++) g->y[i * LANES + l] += g->skip[l] * g->x[i * LANES + l];
  for (size_t i = 0; s->z && i < n * LANES; i++) g->y[i] *= silu(g->z[i]);
  store_lanes(s->y + (g->b * s->T + t) * s->D + g->c, g->y, s->D, n, g->width);
  for (size_t i = 0; p->ring && i < n; i++) {
    size_t at = p->pos + t + i, row = ring_row(p, at);
    if (at < ring_first(p) || at >= ring_last(p, s->T)) continue;
    store_lanes(s->ring.x + row * s->D + g->c, g->x + i * LANES, 0, 1, g->width);
    store_lanes(s->ring.dt + row * s->D + g->c, g->d + i * LANES, 0, 1, g->width);
  }
}

/* The positions at .. at+n, which lie on one side of pos and of mark. */
static void forward_chunk(Group *g, const Scan *s, const Past *p, size_t at, size_t n) {
  const int mine = at >= p->pos; /* the call's tokens t .. t+n, not the ring's */
  const size_t t = mine ? at - p->pos : 0, N = s->N;
  const float *last = g->S;
  if (mine)
    stage_call(g, s, t, n);
  else
    stage_ring(g, s, p, at, n);
  for (size_t i = 0; i < n; i++) {
    const int32_t before = mine && p->prev ? p->prev[t + i] : -1;
    const float *from = before == -2 ? g->zero : p->tree && before >= 0 ? g->states + before * g->size : g->S;
    float *to = mine && p->tree ? g->states + (t + i) * g->size : g->S;
    if (mine) prefetch_call(g, s, t + CHUNK + i);
    advance(g->y + i * LANES, to, g->decays, from, g->A, g->d + i * LANES, g->u + i * LANES, g->B + i * N, g->C + i * N, N);
    last = to;
  }
  if (mine) finish(g, s, p, t, n);
  if (s->state && at + n == p->mark) transpose(s->state + (p->slot * s->D + g->c) * N, N, last, LANES, N, g->width);
}

static void forward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, block, lane group) */
  const Scan *s = arg;
  const size_t lanes = (s->N + LANES - 1) / LANES, row = s->D / s->N * lanes;
  Group g[TILE];
  group_memory(g, s, worker);
  for (size_t q = 1; q < TILE; q++) g[q] = g[0], g[q].A += q * g->size, g[q].S += q * g->size;
  for (size_t item = begin, groups; item < end; item += groups) {
    const Past p = past_of(s, item / row);
    groups = p.tree ? 1 : min(TILE, min(end, (item / row + 1) * row) - item);
    for (size_t q = 0, i = item % row; q < groups; q++, i++)
      group_begin(g + q, s, item / row, i / lanes, i % lanes * LANES, s->state, p.slot);
    for (size_t at = p.begin, n; at < p.pos + s->T; at += n) {
      const size_t stop = at < p.pos ? p.pos : p.pos + s->T;
      n = min(CHUNK, (at < p.mark ? min(stop, p.mark) : stop) - at);
      for (size_t q = 0; q < groups; q++) forward_chunk(g + q, s, &p, at, n);
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
  Scan s = {y, state, ring, x, dt, A_log, Bm, C, Dskip, dt_bias, z, rows, B, T, D, N, J, .share = share_of(N, 0)};
  if (!B || !T || !D || !N || !J) return;
  s.scratch = device_scratch(workers() * s.share * sizeof(float));
  if (!s.scratch) return;
  parallel(forward_range, &s, B * (D / N) * ((N + LANES - 1) / LANES), 20.0 * (T + 2) * N * min(N, LANES));
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

/* The cotangents that a group hands from chunk to chunk, and one chunk's. */
typedef struct {
  float dy[CHUNK * LANES], du[CHUNK * LANES], dd[CHUNK * LANES], skip[LANES], bias[LANES];
} __attribute__((aligned(64))) Cotangents;

/* y = (sum + D x) silu(z): dz, dD; dy becomes the sum's. */
static void finish_backward(Group *g, Cotangents *o, const Scan *s, size_t t, size_t n) {
  const size_t D = s->D, at = (g->b * s->T + t) * D + g->c;
  load_lanes(o->dy, s->dy + at, D, n, g->width);
  if (s->z) {
    for (size_t i = 0; i < n; i++)
      for (size_t l = 0; l < LANES; l++) {
        size_t e = i * LANES + l;
        float sum = g->y[e] + g->skip[l] * g->x[e], dy = o->dy[e];
        o->dy[e] = dy * silu(g->z[e]);
        g->z[e] = dy * sum * dsilu(g->z[e]);
      }
    store_lanes(s->dz + at, g->z, D, n, g->width);
  }
  for (size_t i = 0; i < n; i++)
    for (size_t l = 0; l < LANES; l++) o->skip[l] += o->dy[i * LANES + l] * g->x[i * LANES + l];
}

static void backward_chunk(Group *g, Cotangents *o, const Scan *s, const int32_t *prev, size_t t, size_t n, int first) {
  const size_t N = s->N, D = s->D, J = s->J, K = D / N, size = g->size, at = g->b * s->T + t, j = g->k / (K / J);
  stage_call(g, s, t, n);
  for (size_t i = 0; i < n; i++) { /* states[i+1] is the state after token t+i */
    const float *from = prev && prev[t + i] == -2 ? g->zero : g->states + i * size;
    advance(g->y + i * LANES, g->states + (i + 1) * size, g->decays + i * size, from, g->A, g->d + i * LANES, g->u + i * LANES,
            g->B + i * N, g->C + i * N, N);
  }
  finish_backward(g, o, s, t, n);
  for (size_t i = n; i-- > 0;) {
    const int starts = prev && prev[t + i] == -2;
    const float *from = starts ? g->zero : g->states + i * size;
    retreat(o->du + i * LANES, o->dd + i * LANES, g->dS, g->dA, g->states + (i + 1) * size, g->decays + i * size, from, g->A,
            o->dy + i * LANES, g->d + i * LANES, g->u + i * LANES, g->B + i * N, g->C + i * N, N);
    if (starts) memset(g->dS, 0, size * sizeof(float));
  }
  for (size_t i = 0; i < n; i++) { /* the lane groups of a block share dC, the blocks of a kv block dB */
    row_sums(s->dC + (at + i) * D + g->k * N, g->states + (i + 1) * size, N, g->c != g->k * N);
    row_sums(s->dB + ((at + i) * J + j) * N, g->decays + i * size, N, !first);
  }
  for (size_t i = 0; i < n; i++) /* u = d x, y has D x, d = softplus(v) */
    for (size_t l = 0; l < LANES; l++) {
      size_t e = i * LANES + l;
      o->dd[e] = (o->dd[e] + g->x[e] * o->du[e]) * sigmoid(g->v[e]);
      o->du[e] = g->d[e] * o->du[e] + g->skip[l] * o->dy[e];
      o->bias[l] += o->dd[e];
    }
  store_lanes(s->dx + at * D + g->c, o->du, D, n, g->width);
  store_lanes(s->ddt + at * D + g->c, o->dd, D, n, g->width);
}

/* All tokens of a group: forward to a checkpoint a chunk, then chunk by chunk back. `first` of its kv block: dB =, else +=. */
static void backward_group(Group *g, Cotangents *o, const Scan *s, int first) {
  const size_t N = s->N, T = s->T, size = g->size, bytes = size * sizeof(float), row = g->b * s->D + g->c;
  const int32_t *prev = s->rows.prev ? s->rows.prev + g->b * T : NULL;
  float *checkpoint = g->checkpoints;
  for (size_t t = 0;; t += CHUNK, checkpoint += size) {
    memcpy(checkpoint, g->S, bytes);
    if (t + CHUNK >= T) break;
    stage_call(g, s, t, CHUNK);
    for (size_t i = 0; i < CHUNK; i++)
      advance(g->y, g->S, g->decays, prev && prev[t + i] == -2 ? g->zero : g->S, g->A, g->d + i * LANES, g->u + i * LANES,
              g->B + i * N, g->C + i * N, N);
  }
  if (s->dstate)
    load_matrix(g->dS, s->dstate, row, g, N);
  else
    memset(g->dS, 0, bytes);
  memset(g->dA, 0, bytes);
  memset(o->skip, 0, sizeof o->skip);
  memset(o->bias, 0, sizeof o->bias);
  for (size_t t = (T - 1) / CHUNK * CHUNK;; t -= CHUNK, checkpoint -= size) {
    memcpy(g->states, checkpoint, bytes);
    backward_chunk(g, o, s, prev, t, min(CHUNK, T - t), first);
    if (!t) break;
  }
  if (s->dstate) transpose(s->dstate + row * N, N, g->dS, LANES, N, g->width);
  for (size_t i = 0; i < size; i++) g->dA[i] *= LN2 * g->A[i]; /* dA_log = -exp(A_log) sum d (dS a S) */
  transpose(s->part_A + row * N, N, g->dA, LANES, N, g->width);
  store_lanes(s->part_D + row, o->skip, 0, 1, g->width);
  store_lanes(s->part_bias + row, o->bias, 0, 1, g->width);
}

static void backward_range(void *arg, size_t begin, size_t end, size_t worker) { /* items (b, kv block) */
  const Scan *s = arg;
  const size_t rep = s->D / s->N / s->J;
  Group g;
  Cotangents o;
  group_memory(&g, s, worker);
  for (size_t item = begin; item < end; item++)
    for (size_t r = 0; r < rep; r++)
      for (size_t lane = 0; lane < s->N; lane += LANES) {
        group_begin(&g, s, item / s->J, item % s->J * rep + r, lane, s->state, item / s->J);
        backward_group(&g, &o, s, r == 0 && lane == 0);
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
            .z = z, .rows = rows, .B = B, .T = T, .D = D, .N = N, .J = J, .share = share_of(N, (T + CHUNK - 1) / CHUNK),
            .dx = dx, .ddt = ddt, .dB = dB, .dC = dC, .dz = dz, .dA_log = dA_log, .dD = dD, .ddt_bias = ddt_bias,
            .dstate = dstate, .dy = dy};
  if (!B || !T || !D || !N || !J) return;
  s.scratch = device_scratch((workers() * s.share + B * D * (N + 2)) * sizeof(float));
  if (!s.scratch) return;
  s.part_A = s.scratch + workers() * s.share;
  s.part_D = s.part_A + B * D * N;
  s.part_bias = s.part_D + B * D;
  parallel(backward_range, &s, B * J, 60.0 * T * N * N * (D / N / J));
  parallel(parameter_gradients, &s, D, (double)B * (N + 2));
}
