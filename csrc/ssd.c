/* ssd.c - Mamba-2's recurrence in its dual, quadratic form within chunks (Dao & Gu 2024, arXiv 2405.21060).
 *
 * Per head, with la_t = log a_t = -d_t exp(A_log), cum_t its sum from the chunk's start, S0 and S1 the state before and after:
 *   e_t = exp(cum_t)   w_s = exp(cum_last - cum_s)   L[t,s] = exp(cum_t - cum_s) for s <= t, else 0
 *   y_t = e_t S0 C_t + sum_s L[t,s] (C_t.B_s) d_s x_s + D x_t      S1 = e_last S0 + sum_s w_s d_s x_s B_s^T
 * A document that starts at t has a_t = 0: e and L vanish across it, and so does w before it.
 *
 * Many tokens run through chunks with the state transposed (N,P), so that every product has gemm.h's form. Few tokens with a
 * State are replayed: a token sees the state at the last multiple of R on its path and its run, the tokens from there on (at
 * most R), whether these stand in the ring or in this call, and whether that state is the checkpoint or is first folded in
 * scratch. So its bits depend on its path alone. A document's start is kept in the ring as the sign of dt. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

enum { CHUNK = 16, RING = SSD_RING + PENDING, PAST = RING + PENDING };
static const float NEVER = -1e4f; /* a logarithm of 0 */

typedef struct {
  real *y, *dx, *ddt, *dB, *dC;
  float *state, *dA_log, *dD, *ddt_bias, *dstate;
  Ring ring;
  const real *dy, *x, *dt, *Bm, *C;
  const float *A_log, *Dskip, *dt_bias;
  Rows rows;
  size_t B, T, H, G, P, N;
  float *scratch, *partial;
  size_t each; /* floats of scratch a worker */
  int apart;   /* few tokens, and none of the ring's entries that they read is where a new one goes */
} Ssd;

static size_t min_(size_t a, size_t b) { return a < b ? a : b; }
static size_t round_up(size_t n) { return (n + 15) / 16 * 16; }

/* Absolute positions: `state` stands at begin, this call's first token at pos, and the checkpoint goes to `checkpoint`. */
typedef struct {
  size_t slot, begin, pos, checkpoint;
} Span;

static Span span(const Ssd *s, size_t b) {
  const Rows *r = &s->rows;
  Span p = {.slot = r->slot ? (size_t)r->slot[b] : b};
  size_t keep = r->keep ? (size_t)r->keep[b] : s->T;
  if (!s->ring.x) {
    p.checkpoint = keep;
    return p;
  }
  p.pos = r->pos ? (size_t)r->pos[p.slot] : 0;
  size_t committed = r->committed ? (size_t)r->committed[p.slot] : 0, seen = r->seen ? (size_t)r->seen[p.slot] : 0;
  p.begin = seen / SSD_RING * SSD_RING;
  p.checkpoint = (s->T > PENDING ? p.pos + keep : committed) / SSD_RING * SSD_RING;
  return p;
}

static int starts(const Ssd *s, size_t b, size_t t) { return s->rows.prev && s->rows.prev[b * s->T + t] == -2; }

/* One body for every caller, so that a token gets the same d wherever it is computed. */
static __attribute__((noinline)) void softplus_chunk(float *v) {
  for (int i = 0; i < CHUNK; i++) v[i] = softplus(v[i]);
}
static __attribute__((noinline)) void exp_chunk(float *v) {
  for (int i = 0; i < CHUNK; i++) v[i] = exp_(v[i]);
}

/* d[i] = softplus(dt[t0+i, h] + dt_bias[h]), i < n <= CHUNK; all CHUNK are written. */
static void load_d(float *d, const Ssd *s, size_t b, size_t h, size_t t0, size_t n) {
  const real *dt = s->dt + (b * s->T + t0) * s->H + h;
  float bias = s->dt_bias ? s->dt_bias[h] : 0;
  for (size_t i = 0; i < CHUNK; i++) d[i] = i < n ? dt[i * s->H] + bias : 0;
  softplus_chunk(d);
}

/* The same for heads h0 .. h0+CHUNK of token t. */
static void load_d_heads(float *d, const Ssd *s, size_t b, size_t h0, size_t t) {
  const real *dt = s->dt + (b * s->T + t) * s->H;
  for (size_t h = h0; h < h0 + CHUNK; h++) d[h - h0] = h < s->H ? dt[h] + (s->dt_bias ? s->dt_bias[h] : 0) : 0;
  softplus_chunk(d);
}

/* v[q] = row[q] * c summed over N's whole vectors, q < 4: rows one after the other, as they stand in memory. */
static inline __attribute__((always_inline)) void dot_rows(vec *v, const float *const *row, const float *c, size_t N) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; q++) v[q] = (vec){0};
  for (size_t n = 0; n + LANES <= N; n += LANES) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) v[q] += vec_load(c + n) * vec_load(row[q] + n);
  }
}

/* out[r] = row[r] . c over N, r < m; out and row have room up to a multiple of LANES. The additions of a dot have one order. */
static __attribute__((noinline)) void dots(float *out, const float **row, size_t m, const float *c, size_t N) {
  for (size_t r = m; r % LANES; r++) row[r] = row[0];
  for (size_t r = 0; r < m; r += LANES) {
    vec v[LANES] = {0};
    dot_rows(v, row + r, c, N);
    if (LANES > 4 && m - r > 4) dot_rows(v + 4, row + r + 4, c, N);
    if (LANES > 8 && m - r > 8) dot_rows(v + 8, row + r + 8, c, N);
    if (LANES > 8 && m - r > 12) dot_rows(v + 12, row + r + 12, c, N);
    vec sum = sum_lanes(v);
    for (size_t n = N / LANES * LANES; n < N; n++) {
      float product[LANES];
      for (int q = 0; q < LANES; q++) product[q] = c[n] * row[r + q][n];
      sum += vec_load(product);
    }
    vec_store(out + r, sum);
  }
}

/* ---- chunks ------------------------------------------------------------------------------------------------------- */

typedef struct {
  float d[CHUNK], la[CHUNK], e[CHUNK], w[CHUNK], last; /* last = e of the last token */
  float L[CHUNK * CHUNK];
  int start[CHUNK];
} Decay;

/* d and start of this call's tokens t0 .. t0+n, and of the ring's rows row .. row+n; the rest of CHUNK is finite. */
static void load_chunk(Decay *k, const Ssd *s, size_t b, size_t h, size_t t0, size_t n) {
  load_d(k->d, s, b, h, t0, n);
  memset(k->start, 0, sizeof k->start);
  for (size_t i = 0; s->rows.prev && i < n; i++) k->start[i] = starts(s, b, t0 + i);
}
static void load_ring(Decay *k, const Ssd *s, size_t row, size_t h, size_t n) {
  for (size_t i = 0; i < CHUNK; i++) {
    float d = i < n ? s->ring.dt[(row + i) * s->H + h] : 0;
    k->d[i] = fabsf(d);
    k->start[i] = signbit(d) != 0;
  }
}

/* la, e, w, L of n tokens from d and start; what belongs to tokens after n is finite */
static void decay(Decay *k, float A, size_t n) {
  float a[CHUNK], cum = 0;
  for (size_t t = 0; t < CHUNK; t++) {
    k->la[t] = -k->d[t] * A;
    a[t] = k->start[t] ? NEVER : k->la[t];
  }
  for (size_t t = 0; t < CHUNK; t++) k->e[t] = cum += a[t];
  exp_chunk(a);
  exp_chunk(k->e);
  for (size_t t = 0; t < n; t++)
    for (size_t i = 0; i < CHUNK; i++) {
      float above = t ? k->L[(t - 1) * CHUNK + i] * a[t] : 0;
      k->L[t * CHUNK + i] = i == t ? 1 : above;
    }
  memcpy(k->w, k->L + (n - 1) * CHUNK, sizeof k->w);
  k->last = k->e[n - 1];
}

/* Lane i*J + j: a[i] . b[j] over N, i < 4, j < J */
static inline __attribute__((always_inline)) vec dot_block(const float *const *a, const float *const *b, size_t N) {
  enum { J = LANES / 4 };
  vec acc[LANES];
  size_t n = 0;
#pragma GCC unroll 16
  for (int q = 0; q < LANES; q++) acc[q] = (vec){0};
  for (; n + LANES <= N; n += LANES) {
#pragma GCC unroll 16
    for (int q = 0; q < LANES; q++) acc[q] += vec_load(a[q / J] + n) * vec_load(b[q % J] + n);
  }
  vec sum = sum_lanes(acc);
  for (; n < N; n++) {
    float product[LANES];
    for (int q = 0; q < LANES; q++) product[q] = a[q / J][n] * b[q % J][n];
    sum += vec_load(product);
  }
  return sum;
}

/* out[t,s] = a_t . b_s for s <= t < n, over K; above the diagonal finite or 0.   out (CHUNK,CHUNK) */
static __attribute__((noinline)) void causal_dots(float *out, const float *a, size_t lda, const float *b, size_t ldb, size_t n,
                                                  size_t K) {
  enum { I = 4, J = LANES / I };
  memset(out, 0, CHUNK * CHUNK * sizeof *out);
  for (size_t t = 0; t < n; t += I)
    for (size_t s = 0; s < min_(t + I, n); s += J) {
      const float *at[I], *bs[J];
      float q[LANES];
      for (size_t i = 0; i < I; i++) at[i] = a + min_(t + i, n - 1) * lda;
      for (size_t j = 0; j < J; j++) bs[j] = b + min_(s + j, n - 1) * ldb;
      vec_store(q, dot_block(at, bs, K));
      for (size_t i = 0; i < I; i++) memcpy(out + (t + i) * CHUNK + s, q + i * J, J * sizeof *q);
    }
}

/* y of one chunk; S (N,P) NULL: zero. */
static void chunk_output(const Ssd *s, const Decay *k, real *y, const real *x, const real *Bm, const real *C, const float *S,
                         float D, size_t n) {
  size_t ldx = s->G * s->P, ldB = s->G * s->N, ldC = s->H * s->N, ldy = s->H * s->P;
  float M[CHUNK * CHUNK];
  causal_dots(M, C, ldC, Bm, ldB, n, s->N);
  for (size_t t = 0; t < n; t++) {
    for (size_t i = 0; i < CHUNK; i++) M[t * CHUNK + i] *= k->L[t * CHUNK + i] * k->d[i];
    M[t * CHUNK + t] += D;
  }
  for (size_t t = 0; t < n; t += TILE_ROWS) {
    size_t m = min_(TILE_ROWS, n - t);
    if (S) gemm(y + t * ldy, ldy, C + t * ldC, ldC, 1, S, s->P, m, s->P, s->N, 0);
    gemm_scaled(y + t * ldy, ldy, S ? k->e + t : NULL, 1, M + t * CHUNK, CHUNK, 1, x, ldx, m, s->P, t + m); /* then zeros */
  }
}

/* S (N,P) = last S + sum_s w_s d_s B_s x_s^T; live 0: S counts as zero.   wx (CHUNK,P) */
static void chunk_state(const Ssd *s, const Decay *k, float *S, int live, const real *x, const real *Bm, float *wx, size_t n,
                        Ahead *ahead) {
  for (size_t t = 0; t < n; t++)
    for (size_t p = 0; p < s->P; p++) wx[t * s->P + p] = k->w[t] * k->d[t] * x[t * s->G * s->P + p];
  gemm_ahead(S, s->P, live ? &k->last : NULL, 0, Bm, 1, s->G * s->N, wx, s->P, s->N, s->P, n, ahead);
}

/* A head's tokens from the state's position on: those in the ring, then this call's. */
static void sequence(const Ssd *s, size_t b, size_t h, float *scratch) {
  Span p = span(s, b);
  size_t P = s->P, N = s->N, g = h / (s->H / s->G), end = p.pos + s->T, n;
  float A = exp_(s->A_log[h]), D = s->Dskip ? s->Dskip[h] : 0;
  float *S = scratch, *wx = S + round_up(N * P), *state = s->state ? s->state + (p.slot * s->H + h) * P * N : NULL;
  int live = state != NULL;
  if (live) transpose(S, P, state, N, P, N);
  for (size_t q = p.begin; q < end; q += n) {
    int old = q < p.pos;
    size_t stop = old ? min_(p.pos, q + SSD_RING) : min_(end, q + CHUNK), t = q - p.pos;
    if (q < p.checkpoint) stop = min_(stop, p.checkpoint);
    n = stop - q;
    size_t row = old ? p.slot * RING + q % RING : b * s->T + t;
    const real *x = (old ? s->ring.x : s->x) + (row * s->G + g) * P, *Bm = (old ? s->ring.B : s->Bm) + (row * s->G + g) * N;
    Decay k;
    if (old) load_ring(&k, s, row, h, n);
    else load_chunk(&k, s, b, h, t, n);
    decay(&k, A, n);
    Ahead next = {0};
    if (!old) {
      real *y = s->y + (row * s->H + h) * P;
      const real *C = s->C + (row * s->H + h) * N;
      chunk_output(s, &k, y, x, Bm, C, live ? S : NULL, D, n);
      next = (Ahead){{C + n * s->H * N, Bm + n * s->G * N, x + n * s->G * P, y + n * s->H * P}, {N, N, P, P},
                     {s->H * N, s->G * N, s->G * P, s->H * P}, min_(CHUNK, end - stop)};
    }
    if (stop < end || (state && stop == p.checkpoint)) chunk_state(s, &k, S, live, x, Bm, wx, n, &next);
    live = 1;
    if (state && stop == p.checkpoint) transpose(state, N, S, P, N, P);
  }
}

static void sequence_range(void *arg, size_t begin, size_t end, size_t worker) {
  const Ssd *s = arg;
  for (size_t i = begin; i < end; i++) sequence(s, i / s->H, i % s->H, s->scratch + worker * s->each);
}

/* ---- replay ------------------------------------------------------------------------------------------------------- */

/* The tokens that matter to one row: the ring's from `begin` on, then this call's. parent: an index here, -1 the state, -2
 * nothing. list, length: a token's run, what precedes it, itself included, back to a multiple of R; base: what is before. */
typedef struct {
  Span span;
  int ring;
  size_t run;
  int parent[PAST], base[PENDING], length[PENDING], list[PENDING][SSD_RING];
  size_t position[PAST];
  const real *x[PAST], *B[PAST];
  const float *ring_dt[RING];
} Past;

/* The run that ends with token i, oldest first: returns its length. */
static int run_of(const Past *p, int i, int *list, int *base) {
  int n = 0, back[SSD_RING];
  for (;; i = *base) {
    back[n++] = i;
    *base = p->parent[i];
    if (*base < 0 || p->position[i] % p->run == 0) break;
  }
  for (int j = 0; j < n; j++) list[j] = back[n - 1 - j];
  return n;
}

static void make_past(Past *p, const Ssd *s, size_t b) {
  size_t T = s->T;
  p->span = span(s, b);
  p->ring = (int)min_(p->span.pos - p->span.begin, RING);
  p->run = s->ring.x ? SSD_RING : 1;
  for (int i = 0; i < p->ring; i++) {
    p->position[i] = p->span.begin + (size_t)i;
    size_t row = p->span.slot * RING + p->position[i] % RING;
    p->x[i] = s->ring.x + row * s->G * s->P;
    p->B[i] = s->ring.B + row * s->G * s->N;
    p->ring_dt[i] = s->ring.dt + row * s->H;
    p->parent[i] = signbit(p->ring_dt[i][0]) ? -2 : i - 1;
  }
  for (size_t t = 0; t < T; t++) {
    int i = p->ring + (int)t, prev = s->rows.prev ? s->rows.prev[b * T + t] : (int)t - 1;
    int parent = p->parent[i] = prev == -2 ? -2 : p->ring + prev;
    p->position[i] = parent == -2 ? p->span.pos + t : parent == -1 ? p->span.begin : p->position[parent] + 1;
    p->x[i] = s->x + (b * T + t) * s->G * s->P;
    p->B[i] = s->Bm + (b * T + t) * s->G * s->N;
    p->length[t] = run_of(p, i, p->list[t], &p->base[t]);
  }
}

/* One row's heads, CHUNK of them at a time where only decays are concerned: lane h % CHUNK. */
typedef struct {
  const Ssd *s;
  const Past *past;
  size_t b, h, g;
  float *checkpoint, *local, *wx, *B, *inter;
  int checkpoint_at; /* the token after which the checkpoint stands; -1: as found */
  int folded;        /* the run whose decays fold_w and fold_e hold: its last token */
  float fold_e[CHUNK], fold_w[SSD_RING][CHUNK];
  float A[CHUNK], d[PAST][CHUNK], e[PENDING][CHUNK], w[PENDING][SSD_RING][CHUNK];
} Replay;

/* Seen from the end of a run: w[j] = exp(cum_last - cum_j) d_j, e = exp(cum_last).   w (n,CHUNK)  e (CHUNK) */
static __attribute__((noinline)) void run_decay(const Replay *r, float (*w)[CHUNK], float *e, const int *list, int n) {
  for (int i = 0; i < CHUNK; i++) e[i] = 0;
  for (int j = 0; j < n; j++)
    for (int i = 0; i < CHUNK; i++) w[j][i] = e[i] -= r->d[list[j]][i] * r->A[i];
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < CHUNK; i++) w[j][i] = e[i] - w[j][i];
    exp_chunk(w[j]);
    for (int i = 0; i < CHUNK; i++) w[j][i] *= r->d[list[j]][i];
  }
  exp_chunk(e);
}

/* A, d, and every token's decays for the heads from h0 on */
static void load_heads(Replay *r, size_t h0) {
  const Ssd *s = r->s;
  const Past *p = r->past;
  size_t H = min_(CHUNK, s->H - h0);
  for (size_t i = 0; i < CHUNK; i++) r->A[i] = i < H ? s->A_log[h0 + i] : 0;
  exp_chunk(r->A);
  r->folded = -1;
  for (int j = 0; j < p->ring; j++)
    for (size_t i = 0; i < CHUNK; i++) r->d[j][i] = i < H ? fabsf(p->ring_dt[j][h0 + i]) : 0;
  for (size_t t = 0; t < s->T; t++) load_d_heads(r->d[(size_t)p->ring + t], s, r->b, h0, t);
  for (size_t t = 0; t < s->T; t++) run_decay(r, r->w[t], r->e[t], p->list[t], p->length[t]);
}

/* S (P,N) = e S + sum_j w_j x_j B_j^T, the one way in which a run enters a state; live 0: S counts as zero. */
static void fold(Replay *r, float *S, const int *list, int n, int live) {
  size_t P = r->s->P, N = r->s->N, lane = r->h % CHUNK;
  if (r->folded != list[n - 1]) run_decay(r, r->fold_w, r->fold_e, list, n);
  r->folded = list[n - 1];
  for (int j = 0; j < n; j++) {
    const real *x = r->past->x[list[j]] + r->g * P;
    for (size_t p = 0; p < P; p++) r->wx[(size_t)j * P + p] = r->fold_w[j][lane] * x[p];
    memcpy(r->B + (size_t)j * N, r->past->B[list[j]] + r->g * N, N * sizeof(float));
  }
  gemm_scaled(S, N, live ? r->fold_e + lane : NULL, 0, r->wx, 1, P, r->B, N, P, N, (size_t)n);
}

/* Moves a state on to stand after token `target`: run by run along its path, from where it stands or from the checkpoint. */
static void advance(Replay *r, float *S, int *at, int target) {
  int list[SSD_RING], base;
  if (*at == target) return;
  if (target == r->checkpoint_at) {
    memcpy(S, r->checkpoint, r->s->P * r->s->N * sizeof(float));
  } else {
    int n = run_of(r->past, target, list, &base);
    if (base != -2) advance(r, S, at, base);
    fold(r, S, list, n, base != -2);
  }
  *at = target;
}

/* U vectors of y at p: e inter + sum_j k_j x_j */
static inline __attribute__((always_inline)) void weigh(const int U, float *y, float e, const float *inter, const float *k,
                                                        const real *const *x, int n, size_t p) {
  vec v[4];
#pragma GCC unroll 4
  for (int q = 0; q < U; q++) v[q] = inter ? e * vec_load(inter + p + q * LANES) : (vec){0};
  for (int j = 0; j < n; j++) {
#pragma GCC unroll 4
    for (int q = 0; q < U; q++) v[q] += k[j] * vec_load(x[j] + p + q * LANES);
  }
#pragma GCC unroll 4
  for (int q = 0; q < U; q++) vec_store(y + p + q * LANES, v[q]);
}

/* y_t = e inter + sum_j w_j (C_t.B_j) x_j + D x_t over t's run; inter (P) = S C_t, or NULL. */
static void replay_token(const Replay *r, size_t t, const float *inter) {
  const Ssd *s = r->s;
  const int *list = r->past->list[t], n = r->past->length[t];
  size_t P = s->P, N = s->N, row = (r->b * s->T + t) * s->H + r->h, p = 0;
  const real *x[SSD_RING], *Bm[CHUNK];
  real *y = s->y + row * P;
  float k[CHUNK], e = r->e[t][r->h % CHUNK];
  for (int j = 0; j < n; j++) {
    x[j] = r->past->x[list[j]] + r->g * P;
    Bm[j] = r->past->B[list[j]] + r->g * N;
  }
  dots(k, Bm, (size_t)n, s->C + row * N, N);
  for (int j = 0; j < n; j++) k[j] *= r->w[t][j][r->h % CHUNK];
  if (s->Dskip) k[n - 1] += s->Dskip[r->h];
  for (; p + 4 * LANES <= P; p += 4 * LANES) weigh(4, y, e, inter, k, x, n, p);
  for (; p + LANES <= P; p += LANES) weigh(1, y, e, inter, k, x, n, p);
  for (; p < P; p++) {
    float v = inter ? e * inter[p] : 0;
    for (int j = 0; j < n; j++) v += k[j] * x[j][p];
    y[p] = v;
  }
}

/* All tokens of one base, from t on: the state is read once. */
static void replay_base(const Replay *r, const float *S, int base, size_t t) {
  const Ssd *s = r->s;
  size_t P = s->P, N = s->N, width = round_up(P);
  for (size_t p = 0; S && p < P; p += LANES) {
    const float *row[LANES];
    size_t m = min_(LANES, P - p);
    for (size_t i = 0; i < m; i++) row[i] = S + (p + i) * N;
    for (size_t u = t; u < s->T; u++)
      if (r->past->base[u] == base) dots(r->inter + u * width + p, row, m, s->C + ((r->b * s->T + u) * s->H + r->h) * N, N);
  }
  for (size_t u = t; u < s->T; u++)
    if (r->past->base[u] == base) replay_token(r, u, S ? r->inter + u * width : NULL);
}

static void replay_head(Replay *r) {
  const Ssd *s = r->s;
  const Past *p = r->past;
  int at = -1, local_at = -3, target = (int)(p->span.checkpoint - p->span.begin) - 1;
  r->checkpoint_at = -1;
  if (s->ring.x) {
    advance(r, r->checkpoint, &at, target);
    r->checkpoint_at = at;
  }
  for (size_t t = 0; t < s->T; t++) {
    int base = p->base[t], done = 0;
    for (size_t u = 0; u < t; u++) done |= p->base[u] == base;
    if (done) continue;
    float *S = base == -2 ? NULL : base == r->checkpoint_at ? r->checkpoint : r->local;
    if (S == r->local) advance(r, S, &local_at, base);
    replay_base(r, S, base, t);
  }
  if (!s->ring.x && target >= 0) advance(r, r->checkpoint, &at, target);
}

/* Token t's new entry in the ring: what is head h's own, and its group's if it is the first there. */
static void remember(const Ssd *s, const Span *p, size_t b, size_t h, size_t t, float d) {
  size_t position = p->pos + t, rep = s->H / s->G, P = s->P, N = s->N;
  size_t from = (b * s->T + t) * s->G + h / rep, to = p->slot * RING + position % RING;
  if (position < p->checkpoint || position >= p->checkpoint + RING) return;
  s->ring.dt[to * s->H + h] = starts(s, b, t) ? -d : d;
  if (h % rep) return;
  to = to * s->G + h / rep;
  memcpy(s->ring.x + to * P, s->x + from * P, P * sizeof(real));
  memcpy(s->ring.B + to * N, s->Bm + from * N, N * sizeof(real));
}

static void remember_range(void *arg, size_t begin, size_t end, size_t worker) {
  const Ssd *s = arg;
  float d[CHUNK];
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    size_t b = i / s->H, h = i % s->H, n;
    Span p = span(s, b);
    for (size_t t = p.checkpoint - min_(p.checkpoint, p.pos); t < s->T; t += n) {
      n = min_(CHUNK, s->T - t);
      load_d(d, s, b, h, t, n);
      for (size_t j = 0; j < n; j++) remember(s, &p, b, h, t + j, d[j]);
    }
  }
}

static void replay_range(void *arg, size_t begin, size_t end, size_t worker) {
  const Ssd *s = arg;
  size_t PN = s->P * s->N;
  float *scratch = s->scratch + worker * s->each;
  Past past;
  Replay r;
  r.s = s, r.past = &past, r.local = scratch;
  r.wx = r.local + round_up(PN);
  r.B = r.wx + CHUNK * round_up(s->P);
  r.inter = r.B + CHUNK * round_up(s->N);
  for (size_t i = begin; i < end; i++) {
    if (i == begin || i % s->H == 0) make_past(&past, s, i / s->H);
    r.b = i / s->H, r.h = i % s->H, r.g = r.h / (s->H / s->G);
    if (i == begin || r.h % CHUNK == 0) load_heads(&r, r.h / CHUNK * CHUNK);
    r.checkpoint = s->state + (past.span.slot * s->H + r.h) * PN;
    replay_head(&r);
    for (size_t t = 0; s->apart && t < s->T; t++) remember(s, &past.span, r.b, r.h, t, r.d[(size_t)past.ring + t][r.h % CHUNK]);
  }
}

void ssd_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm,
                 const real *C, const float *Dskip, const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G,
                 size_t P, size_t N) {
  Ssd s = {.y = y, .state = state, .x = x, .dt = dt, .Bm = Bm, .C = C, .A_log = A_log, .Dskip = Dskip, .dt_bias = dt_bias,
           .rows = rows, .B = B, .T = T, .H = H, .G = G, .P = P, .N = N};
  if (!B || !T || !H) return;
  if (state) s.ring = ring;
  s.each = round_up(P * N) + CHUNK * (round_up(P) + round_up(N)) + PENDING * round_up(P);
  s.scratch = device_scratch(workers() * s.each * sizeof(float));
  if (!s.scratch) return;
  s.apart = s.ring.x && T <= PENDING;
  for (size_t b = 0; s.apart && b < B; b++) {
    Span p = span(&s, b);
    s.apart = p.pos + T - p.begin <= RING;
  }
  parallel(state && T <= PENDING ? replay_range : sequence_range, &s, B * H, 4.0 * (double)(T * P * N));
  if (s.ring.x && !s.apart) parallel(remember_range, &s, B * H, (double)(min_(T, RING) * (P + N))); /* once all have read */
}

/* ---- backward ----------------------------------------------------------------------------------------------------- */

enum { D_A_LOG, D_D, D_BIAS, PARTIALS }; /* a head's parameter gradients in one row */

static float dot(const float *a, const float *b, size_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* dst rows (CHUNK,n) of K columns: transposed, (K,CHUNK), rows after n zero */
static void transpose_chunk(float *dst, const float *src, size_t lds, size_t n, size_t K) {
  if (n < CHUNK) memset(dst, 0, K * CHUNK * sizeof *dst);
  transpose(dst, CHUNK, src, lds, n, K);
}

/* Chunk c of a row: both sides of `stop`, where the final state is taken, start anew. */
static size_t chunk_count(size_t T, size_t stop) { return (stop + CHUNK - 1) / CHUNK + (T - stop + CHUNK - 1) / CHUNK; }
static size_t chunk_at(size_t T, size_t stop, size_t c, size_t *n) {
  size_t before = (stop + CHUNK - 1) / CHUNK, t = c < before ? c * CHUNK : stop + (c - before) * CHUNK;
  *n = min_(CHUNK, (c < before ? stop : T) - t);
  return t;
}

/* Where a chunk's rows start, and the scratch of its backward. */
typedef struct {
  const Ssd *s;
  size_t b, h, g, t0, n, stop;
  float A, D;
  Decay k;
  float *states, *dS, *across, *down, *rows, *extra; /* (chunks+1,N,P) (N,P) (P,CHUNK) (N,CHUNK) (CHUNK,N) (CHUNK,P) */
  double partial[PARTIALS];
} Back;

static void take_chunk(Back *r, size_t c) {
  r->t0 = chunk_at(r->s->T, r->stop, c, &r->n);
  load_chunk(&r->k, r->s, r->b, r->h, r->t0, r->n);
  decay(&r->k, r->A, r->n);
}

/* One chunk in reverse. S the state before it; dS in: the cotangent of the state after it, out: before it.
 *   G = C B^T   W = dy x^T   V = L W
 *   dC_t = e_t S^T dy_t + sum_s V[t,s] d_s B_s                 dB_s = w_s d_s dS x_s + sum_t V[t,s] d_s C_t
 *   du_s = w_s dS^T B_s + sum_t L[t,s] G[t,s] dy_t (u = d x)   dx_s = d_s du_s + D dy_s   dd_s = du_s.x_s - A dla_s
 *   dla_r = sum of what passes r: pairs s < r <= t of V G d, e_t C_t.(S^T dy_t) of t >= r, w_s d_s B_s.(dS x_s) of s < r,
 *           and e_last <dS,S>
 *   dS = e_last dS + sum_t e_t C_t dy_t^T */
static void chunk_backward(Back *r, const float *S, int first) {
  const Ssd *s = r->s;
  const Decay *k = &r->k;
  size_t P = s->P, N = s->N, n = r->n, kv = (r->b * s->T + r->t0) * s->G + r->g, q = (r->b * s->T + r->t0) * s->H + r->h;
  size_t ldx = s->G * P, ldB = s->G * N, ldC = s->H * N, ldy = s->H * P;
  const real *x = s->x + kv * P, *Bm = s->Bm + kv * N, *C = s->C + q * N, *dy = s->dy + q * P;
  real *dx = s->dx + kv * P, *dB = s->dB + kv * N, *dC = s->dC + q * N;
  float G[CHUNK * CHUNK], V[CHUNK * CHUNK], dd[CHUNK] = {0}, wd[CHUNK], past[CHUNK], future[CHUNK] = {0};
  causal_dots(G, C, ldC, Bm, ldB, n, N);
  causal_dots(V, dy, ldy, x, ldx, n, P);
  for (size_t t = 0; t < n; t++) {
    r->partial[D_D] += V[t * CHUNK + t];
    for (size_t i = 0; i < CHUNK; i++) {
      size_t ti = t * CHUNK + i;
      float z = V[ti] * k->L[ti] * G[ti], across = i < t ? z * k->d[i] : 0;
      dd[i] += z;
      future[t] += across, future[i] -= across;
      V[ti] *= k->L[ti] * k->d[i];
      G[ti] *= k->L[ti];
    }
  }
  transpose_chunk(r->across, dy, ldy, n, P);
  gemm(r->down, CHUNK, S, P, 1, r->across, CHUNK, N, CHUNK, P, 0);
  transpose(dC, ldC, r->down, CHUNK, N, n);
  for (size_t t = 0; t < n; t++) future[t] += k->e[t] * dot(C + t * ldC, dC + t * ldC, N);
  gemm_scaled(dC, ldC, k->e, 1, V, CHUNK, 1, Bm, ldB, n, N, n);

  transpose_chunk(r->across, x, ldx, n, P);
  gemm(r->down, CHUNK, r->dS, P, 1, r->across, CHUNK, N, CHUNK, P, 0);
  transpose(r->rows, N, r->down, CHUNK, N, n);
  for (size_t t = 0; t < n; t++) {
    float u = k->w[t] * dot(Bm + t * ldB, r->rows + t * N, N);
    wd[t] = k->w[t] * k->d[t];
    dd[t] += u;
    past[t] = u * k->d[t];
  }
  gemm_scaled(r->rows, N, wd, 1, V, 1, CHUNK, C, ldC, n, N, n);
  for (size_t t = 0; t < n; t++)
    for (size_t i = 0; i < N; i++) dB[t * ldB + i] = (first ? 0 : dB[t * ldB + i]) + r->rows[t * N + i];

  gemm(r->extra, P, Bm, ldB, 1, r->dS, P, n, P, N, 0);
  gemm_scaled(r->extra, P, k->w, 1, G, 1, CHUNK, dy, ldy, n, P, n);
  for (size_t t = 0; t < n; t++)
    for (size_t p = 0; p < P; p++) {
      dx[t * ldx + p] = (first ? 0 : dx[t * ldx + p]) + k->d[t] * r->extra[t * P + p] + r->D * dy[t * ldy + p];
      r->extra[t * P + p] = k->e[t] * dy[t * ldy + p];
    }

  float whole = k->last * dot(r->dS, S, N * P), after = 0, before = 0, dla[CHUNK];
  gemm_scaled(r->dS, P, &k->last, 0, C, 1, ldC, r->extra, P, N, P, n);
  for (size_t t = n; t-- > 0;) dla[t] = after += future[t];
  for (size_t t = 0; t < n; t++) {
    dla[t] = k->start[t] ? 0 : dla[t] + before + whole;
    before += past[t];
    size_t at = (r->b * s->T + r->t0 + t) * s->H + r->h;
    float ddt = (dd[t] - r->A * dla[t]) * sigmoid(s->dt[at] + (s->dt_bias ? s->dt_bias[r->h] : 0));
    s->ddt[at] = ddt;
    r->partial[D_A_LOG] += dla[t] * k->la[t];
    r->partial[D_BIAS] += ddt;
  }
}

static void head_backward(Back *r, int first) {
  const Ssd *s = r->s;
  size_t P = s->P, N = s->N, PN = P * N, count = chunk_count(s->T, r->stop);
  size_t slot = s->rows.slot ? (size_t)s->rows.slot[r->b] : r->b, head = (slot * s->H + r->h) * PN;
  float *spare = r->states + count * PN;
  memset(r->states, 0, PN * sizeof(float));
  memset(r->dS, 0, PN * sizeof(float));
  memset(r->partial, 0, sizeof r->partial);
  if (s->state) transpose(r->states, P, s->state + head, N, P, N);
  for (size_t c = 0; c + 1 < count; c++) {
    take_chunk(r, c);
    size_t kv = (r->b * s->T + r->t0) * s->G + r->g;
    float *S = r->states + (c + 1) * PN;
    memcpy(S, S - PN, PN * sizeof(float));
    chunk_state(s, &r->k, S, 1, s->x + kv * P, s->Bm + kv * N, r->extra, r->n, NULL);
  }
  if (s->dstate) transpose(spare, P, s->dstate + head, N, P, N);
  for (size_t c = count; c-- > 0;) {
    take_chunk(r, c);
    for (size_t i = 0; s->dstate && r->t0 + r->n == r->stop && i < PN; i++) r->dS[i] += spare[i];
    chunk_backward(r, r->states + c * PN, first);
  }
  for (size_t i = 0; s->dstate && !r->stop && i < PN; i++) r->dS[i] += spare[i];
  if (s->dstate) transpose(s->dstate + head, N, r->dS, P, N, P);
}

/* One owner a group: its heads one after the other, so dx and dB are plain sums. */
static void backward_range(void *arg, size_t begin, size_t end, size_t worker) {
  const Ssd *s = arg;
  size_t rep = s->H / s->G, PN = s->P * s->N;
  for (size_t i = begin; i < end; i++) {
    Back r = {.s = s, .b = i / s->G, .g = i % s->G, .dS = s->scratch + worker * s->each};
    r.stop = min_(span(s, r.b).checkpoint, s->T);
    r.across = r.dS + round_up(PN);
    r.extra = r.across + CHUNK * round_up(s->P);
    r.down = r.extra + CHUNK * round_up(s->P);
    r.rows = r.down + CHUNK * round_up(s->N);
    r.states = r.rows + CHUNK * round_up(s->N);
    for (r.h = r.g * rep; r.h < (r.g + 1) * rep; r.h++) {
      r.A = exp_(s->A_log[r.h]);
      r.D = s->Dskip ? s->Dskip[r.h] : 0;
      head_backward(&r, r.h == r.g * rep);
      for (int j = 0; j < PARTIALS; j++) s->partial[(r.b * s->H + r.h) * PARTIALS + (size_t)j] = (float)r.partial[j];
    }
  }
}

void ssd_backward(real *dx, real *ddt, float *dA_log, real *dB, real *dC, float *dD, float *ddt_bias, float *dstate,
                  const real *dy, const float *state, const real *x, const real *dt, const float *A_log, const real *Bm,
                  const real *C, const float *Dskip, const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G,
                  size_t P, size_t N) {
  Ssd s = {.dx = dx, .ddt = ddt, .dB = dB, .dC = dC, .dstate = dstate, .dy = dy, .state = (float *)state, .x = x, .dt = dt,
           .Bm = Bm, .C = C, .A_log = A_log, .Dskip = Dskip, .dt_bias = dt_bias, .rows = rows, .B = B, .T = T, .H = H, .G = G,
           .P = P, .N = N};
  float *parameter[PARTIALS] = {[D_A_LOG] = dA_log, [D_D] = dD, [D_BIAS] = ddt_bias};
  if (!B || !T || !H) return;
  size_t states = (T + CHUNK - 1) / CHUNK + 2; /* keep may cut one chunk in two, and one is spare */
  s.each = round_up(P * N) + CHUNK * 2 * (round_up(P) + round_up(N)) + round_up(states * P * N);
  s.partial = device_scratch((workers() * s.each + round_up(B * H * PARTIALS)) * sizeof(float));
  if (!s.partial) return;
  s.scratch = s.partial + round_up(B * H * PARTIALS);
  parallel(backward_range, &s, B * G, 12.0 * (double)(T * (H / G) * P * N));
  for (int j = 0; j < PARTIALS; j++)
    for (size_t b = 0; b < B && parameter[j]; b++)
      for (size_t h = 0; h < H; h++) parameter[j][h] += s.partial[(b * H + h) * PARTIALS + (size_t)j];
}
