/* mixer.c - attention | mamba1 | mamba2 | window | identity: what each keeps, its caches, forward (with a State: decode), backward. */
#include "model.h"

#define ACTS(i, width) acts->x[i] = take(arena, M * (width) * sizeof(real))

typedef struct {
  size_t C, D, E, H, G, P, R;
} Dims;

static Dims dims(const Model *m) {
  const Config *c = &m->c;
  return (Dims){c->width,   c->heads * c->head_dim, c->kv_heads * c->head_dim, c->heads,
                c->kv_heads, c->head_dim,           (c->width + 15) / 16};
}

/* y (= | +=) x W[row .. row+O]^T + b */
static void project(const Call *k, real *y, const real *x, const Param *w, size_t row, size_t O, const Param *b, int add) {
  linear_forward(y, x, matrix(w, row), b ? vector(b) : NULL, add, k->B, k->T, w->b, O);
}
/* What the mixer reads of its input. */
static void project_input(const Call *k, size_t l, const Product *p, int n, const real *u) {
  const Model *m = k->m;
  linears_forward(p, n, u, k->few ? vector(m->layer[l] + NORM1) : NULL, m->c.eps, 0, k->B, k->T, m->c.width);
}
static void project_backward(const Call *k, real *dx, const real *dy, const real *x, const Param *w, size_t row, size_t O,
                             const Param *b, int add) {
  float *dw = gradient(k->m, w);
  linear_backward(dx, dw ? dw + row * w->b : NULL, b ? gradient(k->m, b) : NULL, dy, x, matrix(w, row), add, k->M, w->b, O);
}

/* ---- attention, and the same with a window and sinks ---------------------------------------------------------------------- */

enum { Q, K, V, O, RAW_Q, RAW_K };

static size_t sinks_of(const Model *m, size_t l) { return m->kind[l] == WINDOW ? m->c.sinks : 0; }

static void attention_layout(const Model *m, size_t l, Arena *arena, Acts *acts, size_t M) {
  (void)l;
  Dims d = dims(m);
  ACTS(Q, d.D), ACTS(K, d.E), ACTS(V, d.E), ACTS(O, d.D);
  acts->lse = take(arena, M * d.H * sizeof(float));
  if (m->c.qk_norm)
    ACTS(RAW_Q, d.D), ACTS(RAW_K, d.E);
  else
    acts->x[RAW_Q] = acts->x[Q], acts->x[RAW_K] = acts->x[K];
}

static void attention_caches(const Model *m, size_t l, size_t capacity, Cache *cache) {
  size_t rows = capacity, sinks = sinks_of(m, l), seen = sinks + m->window[l] + PENDING;
  if (m->window[l] && seen < rows) rows = seen;
  cache[0] = cache[1] = (Cache){NULL, rows, dims(m).E * sizeof(real), rows > sinks ? rows - sinks : 1, 1};
}

static void mix_attention(const Call *k, size_t l, Acts *acts, real *h, const real *u) {
  const Model *m = k->m;
  const Param *p = m->layer[l];
  Dims d = dims(m);
  real **x = acts->x;
  const Product in[] = {{x[RAW_Q], matrix(p + WQ, 0), vector(p + BQ), d.D},
                        {x[RAW_K], matrix(p + WK, 0), vector(p + BK), d.E},
                        {x[V], matrix(p + WV, 0), vector(p + BV), d.E}};
  project_input(k, l, in, 3, u);
  if (m->c.qk_norm) {
    rmsnorm_forward(x[Q], x[RAW_Q], vector(p + NORMQ), m->c.eps, k->M * d.H, d.P);
    rmsnorm_forward(x[K], x[RAW_K], vector(p + NORMK), m->c.eps, k->M * d.G, d.P);
  }
  Rope rope = {k->position, m->inv_freq, m->c.rope_scale};
  if (!k->few) {
    rope_forward(x[Q], x[Q], rope.position, rope.inv_freq, rope.scale, k->M, d.H, d.P);
    rope_forward(x[K], x[K], rope.position, rope.inv_freq, rope.scale, k->M, d.G, d.P);
    rope.inv_freq = NULL;
  }
  Cache *cache = k->s ? k->s->layer[l] : NULL;
  attention_forward(x[O], acts->lse, cache ? cache[0].data : NULL, cache ? cache[1].data : NULL, x[Q], x[K], x[V], k->rows, rope,
                    1 / sqrtf((float)d.P), m->window[l], sinks_of(m, l), k->B, k->T, d.H, d.G, d.P, cache ? cache->rows : 0);
  project(k, h, x[O], p + WO, 0, d.C, p + BO, 1);
}

static void mix_attention_backward(Call *k, size_t l, const Acts *acts, real *du, const real *dh, const real *u, Arena *arena) {
  const Model *m = k->m;
  const Param *p = m->layer[l];
  Dims d = dims(m);
  real *const *x = acts->x;
  real *dout = take(arena, k->M * d.D * sizeof(real)), *dq = take(arena, k->M * d.D * sizeof(real));
  real *dk = take(arena, k->M * d.E * sizeof(real)), *dv = take(arena, k->M * d.E * sizeof(real));
  project_backward(k, dout, dh, x[O], p + WO, 0, d.C, p + BO, 0); /* h += o Wo^T + bo */
  attention_backward(dq, dk, dv, dout, x[Q], x[K], x[V], x[O], acts->lse, k->rows, 1 / sqrtf((float)d.P), m->window[l],
                     sinks_of(m, l), k->B, k->T, d.H, d.G, d.P);
  rope_backward(dq, dq, k->position, m->inv_freq, m->c.rope_scale, k->M, d.H, d.P);
  rope_backward(dk, dk, k->position, m->inv_freq, m->c.rope_scale, k->M, d.G, d.P);
  if (m->c.qk_norm) {
    real *raw = take(arena, k->M * d.D * sizeof(real)), *raw_k = take(arena, k->M * d.E * sizeof(real));
    rmsnorm_backward(raw, gradient(m, p + NORMQ), dq, x[RAW_Q], vector(p + NORMQ), m->c.eps, 0, k->M * d.H, d.P);
    rmsnorm_backward(raw_k, gradient(m, p + NORMK), dk, x[RAW_K], vector(p + NORMK), m->c.eps, 0, k->M * d.G, d.P);
    dq = raw, dk = raw_k;
  }
  project_backward(k, du, dq, u, p + WQ, 0, d.D, p + BQ, 0);
  project_backward(k, du, dk, u, p + WK, 0, d.E, p + BK, 1);
  project_backward(k, du, dv, u, p + WV, 0, d.E, p + BV, 1);
}

/* ---- Mamba-1: formats.md's maths, in order ------------------------------------------------------------------------------- */

enum { X1, Z1, B1, C1, LOW, DT1, XC1, Y1 };

static void mamba1_layout(const Model *m, size_t l, Arena *arena, Acts *acts, size_t M) {
  (void)l;
  Dims d = dims(m);
  ACTS(X1, d.E), ACTS(Z1, d.D), ACTS(B1, d.E), ACTS(C1, d.D), ACTS(LOW, d.R), ACTS(DT1, d.D), ACTS(XC1, d.D), ACTS(Y1, d.D);
}

static void mamba1_caches(const Model *m, size_t l, size_t capacity, Cache *cache) {
  (void)l;
  (void)capacity;
  Dims d = dims(m);
  size_t ring = SCAN_RING + PENDING, conv = CONV - 1 + PENDING;
  cache[0] = (Cache){NULL, conv, d.E * sizeof(real), conv, 0};
  cache[1] = (Cache){NULL, 1, d.D * SCAN_STATE * sizeof(float), 0, 0};
  cache[2] = (Cache){NULL, ring, d.D * sizeof(real), ring, 0};
  cache[3] = (Cache){NULL, ring, d.D * sizeof(float), ring, 0};
  cache[4] = (Cache){NULL, ring, d.E * sizeof(real), ring, 0};
}

static void mix_mamba1(const Call *k, size_t l, Acts *acts, real *h, const real *u) {
  const Model *m = k->m;
  const Param *p = m->layer[l];
  Dims d = dims(m);
  real **x = acts->x;
  const Product in[] = {{x[X1], matrix(p + M1X, 0), NULL, d.E},
                        {x[Z1], matrix(p + M1Z, 0), NULL, d.D},
                        {x[B1], matrix(p + M1B, 0), NULL, d.E},
                        {x[C1], matrix(p + M1C, 0), NULL, d.D},
                        {x[LOW], matrix(p + M1DOWN, 0), NULL, d.R}};
  project_input(k, l, in, 5, u);
  project(k, x[DT1], x[LOW], p + M1DT, 0, d.D, m->c.dt_bias_twice ? p + M1DTB : NULL, 0);
  Cache *cache = k->s ? k->s->layer[l] : NULL;
  Ring ring = {0};
  if (cache) ring = (Ring){cache[2].data, cache[4].data, cache[3].data};
  const ConvPart conv = {x[XC1], cache ? cache[0].data : NULL, x[X1], vector(p + M1CONV), vector(p + M1CONVB), d.E, d.D};
  conv1d_forward(&conv, 1, k->rows, 1, k->B, k->T, SCAN_STATE, CONV, cache ? cache[0].rows : 0);
  selective_scan_forward(x[Y1], cache ? cache[1].data : NULL, ring, x[XC1], x[DT1], vector(p + M1A), x[B1], x[C1],
                         vector(p + M1D), vector(p + M1DTB), x[Z1], k->rows, k->B, k->T, d.D, SCAN_STATE, d.E / SCAN_STATE);
  project(k, h, x[Y1], p + M1OUT, 0, d.C, NULL, 1);
}

static void mix_mamba1_backward(Call *k, size_t l, const Acts *acts, real *du, const real *dh, const real *u, Arena *arena) {
  const Model *m = k->m;
  const Param *p = m->layer[l];
  Dims d = dims(m);
  real *const *x = acts->x;
  size_t wide = k->M * d.D * sizeof(real), narrow = k->M * d.E * sizeof(real);
  real *dy = take(arena, wide), *dxc = take(arena, wide), *ddt = take(arena, wide), *dC = take(arena, wide);
  real *dz = take(arena, wide), *dB = take(arena, narrow), *dx = take(arena, narrow);
  real *dlow = take(arena, k->M * d.R * sizeof(real));
  project_backward(k, dy, dh, x[Y1], p + M1OUT, 0, d.C, NULL, 0);
  selective_scan_backward(dxc, ddt, gradient(m, p + M1A), dB, dC, gradient(m, p + M1D), gradient(m, p + M1DTB), dz, NULL, dy,
                          NULL, x[XC1], x[DT1], vector(p + M1A), x[B1], x[C1], vector(p + M1D), vector(p + M1DTB), x[Z1],
                          k->rows, k->B, k->T, d.D, SCAN_STATE, d.E / SCAN_STATE);
  conv1d_backward(dx, gradient(m, p + M1CONV), gradient(m, p + M1CONVB), dxc, x[X1], vector(p + M1CONV), vector(p + M1CONVB),
                  k->rows, 1, k->B, k->T, d.E, d.D, SCAN_STATE, CONV);
  project_backward(k, dlow, ddt, x[LOW], p + M1DT, 0, d.D, m->c.dt_bias_twice ? p + M1DTB : NULL, 0);
  project_backward(k, du, dx, u, p + M1X, 0, d.E, NULL, 0);
  project_backward(k, du, dz, u, p + M1Z, 0, d.D, NULL, 1);
  project_backward(k, du, dB, u, p + M1B, 0, d.E, NULL, 1);
  project_backward(k, du, dC, u, p + M1C, 0, d.D, NULL, 1);
  project_backward(k, du, dlow, u, p + M1DOWN, 0, d.R, NULL, 1);
}

/* ---- Mamba-2: in_proj's rows are z x B C dt; x, B and C are convolved before the repeat ------------------------------------- */

enum { Z2, X2, B2, C2, DT2, XC2, BC2, CC2, Y2, G2 };

static void mamba2_layout(const Model *m, size_t l, Arena *arena, Acts *acts, size_t M) {
  (void)l;
  Dims d = dims(m);
  ACTS(Z2, d.D), ACTS(X2, d.E), ACTS(B2, d.E), ACTS(C2, d.D), ACTS(DT2, d.H);
  ACTS(XC2, d.E), ACTS(BC2, d.E), ACTS(CC2, d.D), ACTS(Y2, d.D), ACTS(G2, d.D);
}

static void mamba2_caches(const Model *m, size_t l, size_t capacity, Cache *cache) {
  (void)l;
  (void)capacity;
  Dims d = dims(m);
  size_t ring = SSD_RING + PENDING, conv = CONV - 1 + PENDING;
  cache[0] = (Cache){NULL, conv, d.E * sizeof(real), conv, 0};
  cache[1] = (Cache){NULL, conv, d.E * sizeof(real), conv, 0};
  cache[2] = (Cache){NULL, conv, d.D * sizeof(real), conv, 0};
  cache[3] = (Cache){NULL, 1, d.D * d.P * sizeof(float), 0, 0};
  cache[4] = (Cache){NULL, ring, d.E * sizeof(real), ring, 0};
  cache[5] = (Cache){NULL, ring, d.H * sizeof(float), ring, 0};
  cache[6] = (Cache){NULL, ring, d.E * sizeof(real), ring, 0};
}

/* The three parts of the convolution: input and output act, first channel, width. */
typedef struct {
  int in, out;
  size_t first, width;
} Part;
#define PARTS(d) {{X2, XC2, 0, (d).E}, {B2, BC2, (d).E, (d).E}, {C2, CC2, 2 * (d).E, (d).D}}

static void mix_mamba2(const Call *k, size_t l, Acts *acts, real *h, const real *u) {
  const Model *m = k->m;
  const Param *p = m->layer[l];
  Dims d = dims(m);
  real **x = acts->x;
  const Part part[3] = PARTS(d);
  const Product in[] = {{x[Z2], matrix(p + M2IN, 0), NULL, d.D},
                        {x[X2], matrix(p + M2IN, d.D), NULL, d.E},
                        {x[B2], matrix(p + M2IN, d.D + d.E), NULL, d.E},
                        {x[C2], matrix(p + M2IN, d.D + 2 * d.E), NULL, d.D},
                        {x[DT2], matrix(p + M2IN, 2 * (d.D + d.E)), NULL, d.H}};
  project_input(k, l, in, 5, u);
  Cache *cache = k->s ? k->s->layer[l] : NULL;
  Ring ring = {0};
  if (cache) ring = (Ring){cache[4].data, cache[6].data, cache[5].data};
  ConvPart conv[3];
  for (int i = 0; i < 3; i++)
    conv[i] = (ConvPart){x[part[i].out], cache ? cache[i].data : NULL, x[part[i].in], vector(p + M2CONV) + part[i].first * CONV,
                         vector(p + M2CONVB) + part[i].first, part[i].width, part[i].width};
  conv1d_forward(conv, 3, k->rows, 1, k->B, k->T, 1, CONV, cache ? cache[0].rows : 0);
  ssd_forward(x[Y2], cache ? cache[3].data : NULL, ring, x[XC2], x[DT2], vector(p + M2A), x[BC2], x[CC2], vector(p + M2D),
              vector(p + M2DTB), k->rows, k->B, k->T, d.H, d.G, d.P, d.P);
  gated_rmsnorm_forward(x[G2], x[Y2], x[Z2], vector(p + M2NORM), m->c.norm_eps, k->M, d.H, d.P);
  project(k, h, x[G2], p + M2OUT, 0, d.C, NULL, 1);
}

static void mix_mamba2_backward(Call *k, size_t l, const Acts *acts, real *du, const real *dh, const real *u, Arena *arena) {
  const Model *m = k->m;
  const Param *p = m->layer[l];
  Dims d = dims(m);
  real *const *x = acts->x;
  const Part part[3] = PARTS(d);
  size_t wide = k->M * d.D * sizeof(real), narrow = k->M * d.E * sizeof(real);
  real *dg = take(arena, wide), *dy = take(arena, wide), *dz = take(arena, wide), *ddt = take(arena, k->M * d.H * sizeof(real));
  real *dout[3] = {take(arena, narrow), take(arena, narrow), take(arena, wide)}; /* of the convolved x, B, C */
  real *din = dg;                                                                 /* reused once dg is spent */
  float *dw = gradient(m, p + M2CONV), *db = gradient(m, p + M2CONVB);
  project_backward(k, dg, dh, x[G2], p + M2OUT, 0, d.C, NULL, 0);
  gated_rmsnorm_backward(dy, dz, gradient(m, p + M2NORM), dg, x[Y2], x[Z2], vector(p + M2NORM), m->c.norm_eps, k->M, d.H, d.P);
  ssd_backward(dout[0], ddt, gradient(m, p + M2A), dout[1], dout[2], gradient(m, p + M2D), gradient(m, p + M2DTB), NULL, dy, NULL,
               x[XC2], x[DT2], vector(p + M2A), x[BC2], x[CC2], vector(p + M2D), vector(p + M2DTB), k->rows, k->B, k->T, d.H, d.G,
               d.P, d.P);
  project_backward(k, du, dz, u, p + M2IN, 0, d.D, NULL, 0);
  for (int i = 0; i < 3; i++) {
    size_t first = part[i].first;
    conv1d_backward(din, dw ? dw + first * CONV : NULL, db ? db + first : NULL, dout[i], x[part[i].in],
                    vector(p + M2CONV) + first * CONV, vector(p + M2CONVB) + first, k->rows, 1, k->B, k->T, part[i].width,
                    part[i].width, 1, CONV);
    project_backward(k, du, din, u, p + M2IN, d.D + first, part[i].width, NULL, 1);
  }
  project_backward(k, du, ddt, u, p + M2IN, 2 * (d.D + d.E), d.H, NULL, 1);
}

/* ---- identity: adds nothing ----------------------------------------------------------------------------------------------------- */

static void identity_layout(const Model *m, size_t l, Arena *arena, Acts *acts, size_t M) {
  (void)m, (void)l, (void)arena, (void)acts, (void)M;
}
static void identity_caches(const Model *m, size_t l, size_t capacity, Cache *cache) { (void)m, (void)l, (void)capacity, (void)cache; }
static void mix_identity(const Call *k, size_t l, Acts *acts, real *h, const real *u) { (void)k, (void)l, (void)acts, (void)h, (void)u; }
static void mix_identity_backward(Call *k, size_t l, const Acts *acts, real *du, const real *dh, const real *u, Arena *arena) {
  (void)l, (void)acts, (void)dh, (void)u, (void)arena;
  if (du) device_zero(du, k->M * k->m->c.width * sizeof(real));
}

const Mixer MIXER[MIXERS] = {
    {"attention", attention_layout, attention_caches, mix_attention, mix_attention_backward},
    {"mamba1", mamba1_layout, mamba1_caches, mix_mamba1, mix_mamba1_backward},
    {"mamba2", mamba2_layout, mamba2_caches, mix_mamba2, mix_mamba2_backward},
    {"window", attention_layout, attention_caches, mix_attention, mix_attention_backward},
    {"identity", identity_layout, identity_caches, mix_identity, mix_identity_backward},
};
