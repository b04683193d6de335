/* loss.c - lm_head, softmax, cross-entropy, KL to a teacher and their gradient, fused over chunks of the rows that count; and the
 * squared distance of two layers' outputs.
 *
 * A chunk's buffers come from device_alloc: linear_forward and linear_backward use device_scratch in between. */
#include "device.h"
#include "ops.h"

#define LN2 0.693147181f
enum { BLOCK = 256, MAX_ROWS = 256, MAX_LOGITS = 1 << 23 }; /* floats summed before double; rows, logits of a chunk */

/* A chunk: z (n,V) the student's logits, then d loss / dz if `gradient`; u (n,V) the teacher's, or NULL; row (n) which m. */
typedef struct {
  float *ce, *kl, *z, *u;
  const size_t *row;
  const int32_t *target;
  const Teacher *t;
  const float *wce, *wkl;
  float tau;
  int kind, gradient;
  size_t V;
} Chunk;

/* softmax_i = exp((x_i - max) beta) / sum */
typedef struct {
  float max;
  double sum;
} Softmax;

static float ce_weight(const float *wce, const int32_t *target, size_t m) { return wce ? wce[m] : target[m] >= 0; }
static float kl_weight(const float *wkl, const int32_t *target, size_t m) { return wkl ? wkl[m] : target[m] >= 0; }
static size_t min(size_t a, size_t b) { return a < b ? a : b; }

static Softmax softmax(const float *x, float beta, size_t n) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (size_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
  double sum = 0;
  for (size_t i = 0; i < n; i += BLOCK) {
    float s = 0;
    size_t end = min(i + BLOCK, n);
#pragma omp simd reduction(+ : s)
    for (size_t j = i; j < end; j++) s += exp_((x[j] - max) * beta);
    sum += s;
  }
  return (Softmax){max, sum};
}

/* u (V) = logits of a teacher of whom J tokens are known, its others sharing the tail as z's do. For them log t - log s is one number, so
 * every divergence from z is that over J+1 outcomes. So is its gradient by z: of all teachers with this tail it is the nearest to z, and
 * that u moves along with z does not count. */
static void expand(float *restrict u, const float *restrict z, const Teacher *t, size_t m, float tau, size_t V) {
  const int32_t *id = t->ids + m * t->J;
  memcpy(u, z, V * sizeof *u);
  if (t->J < V) {
    for (size_t i = 0; i < t->J; i++) u[id[i]] = -INFINITY;
    const Softmax rest = softmax(u, 1 / tau, V);
    const float shift = tau * (fmaxf(t->tail[m], LEAST_LOG_PROB) - (float)log(rest.sum)) - rest.max;
    for (size_t i = 0; i < V; i++) u[i] += shift;
  }
  for (size_t i = 0; i < t->J; i++) u[id[i]] = tau * fmaxf(t->log_probs[m * t->J + i], LEAST_LOG_PROB);
}

/* d = log t - log s of one logit, s = softmax(z beta), t = softmax(u beta), shift = log t.sum - log s.sum */
#define D(u, z) ((((u) - t.max) - ((z) - s.max)) * beta - shift)

/* sum_i exp((x_i - max) beta) f(d_i), x either z or u: f(d) = d for to_mean 0; else log 2 - log(1 + e^(to_mean d)), which with 1 is log of
 * s over the mean of s and t, with -1 of t */
static inline double divergence(int to_mean, const float *x, float max, const float *z, const float *u, Softmax s, Softmax t, float beta,
                                float shift, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i += BLOCK) {
    float part = 0;
    size_t end = min(i + BLOCK, n);
#pragma omp simd reduction(+ : part)
    for (size_t j = i; j < end; j++) {
      const float d = D(u[j], z[j]);
      part += exp_((x[j] - max) * beta) * (to_mean ? LN2 - softplus((float)to_mean * d) : d);
    }
    sum += part;
  }
  return sum;
}

/* Returns tau^2 sum t d (forward), tau^2 sum s (-d) (reverse) or tau^2 times half of sum s l + sum t l' (Jensen-Shannon; l, l' as in
 * divergence) of one row, beta = 1/tau. If gradient, u = weight times its derivative by z: forward tau (s - t), reverse
 * tau s (-d - sum s (-d)), Jensen-Shannon tau s (l - sum s l) / 2. */
static double row_kl(float *restrict u, const float *restrict z, const Chunk *c, float weight) {
  const size_t V = c->V;
  const float beta = 1 / c->tau;
  const Softmax s = softmax(z, beta, V), t = softmax(u, beta, V);
  const double exact = log(t.sum) - log(s.sum);
  const float shift = (float)exact;
  double own = 0, kl;
  if (c->kind == JENSEN_SHANNON) {
    own = divergence(1, z, s.max, z, u, s, t, beta, shift, V) / s.sum;
    kl = (own + divergence(-1, u, t.max, z, u, s, t, beta, shift, V) / t.sum) / 2;
  } else if (c->kind == REVERSE) {
    own = kl = -divergence(0, z, s.max, z, u, s, t, beta, shift, V) / s.sum - (shift - exact);
  } else {
    kl = divergence(0, u, t.max, z, u, s, t, beta, shift, V) / t.sum + (shift - exact);
  }
  if (c->gradient) {
    const float a = (float)(weight * c->tau / s.sum), b = (float)(weight * c->tau / t.sum), mean = (float)own;
    if (c->kind == JENSEN_SHANNON)
      for (size_t i = 0; i < V; i++) u[i] = a * exp_((z[i] - s.max) * beta) * (LN2 - softplus(D(u[i], z[i])) - mean) / 2;
    else if (c->kind == REVERSE)
      for (size_t i = 0; i < V; i++) u[i] = a * exp_((z[i] - s.max) * beta) * (-D(u[i], z[i]) - mean);
    else
      for (size_t i = 0; i < V; i++) u[i] = a * exp_((z[i] - s.max) * beta) - b * exp_((u[i] - t.max) * beta);
  }
  return (kl < 0 ? 0 : kl) * c->tau * c->tau;
}

/* Returns log sum exp z - z[target] (0 where target < 0). If gradient, z = weight (softmax(z) - onehot(target)) + add. */
static double row_ce(float *restrict z, const float *restrict add, const Chunk *c, int32_t target, float weight) {
  if (!c->gradient && target < 0) return 0;
  Softmax p = softmax(z, 1, c->V);
  double ce = target < 0 ? 0 : log(p.sum) + ((double)p.max - z[target]);
  if (c->gradient) {
    const float a = target < 0 ? 0 : (float)(weight / p.sum);
    if (add)
      for (size_t i = 0; i < c->V; i++) z[i] = a * exp_(z[i] - p.max) + add[i];
    else
      for (size_t i = 0; i < c->V; i++) z[i] = a * exp_(z[i] - p.max);
    if (target >= 0) z[target] -= weight;
  }
  return ce;
}

static void chunk_rows(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const Chunk *c = arg;
  for (; i < end; i++) {
    const size_t m = c->row[i];
    float *z = c->z + i * c->V, *u = c->u ? c->u + i * c->V : NULL;
    if (c->t->ids) expand(u, z, c->t, m, c->tau, c->V);
    if (u) c->kl[m] = (float)row_kl(u, z, c, kl_weight(c->wkl, c->target, m));
    c->ce[m] = (float)row_ce(z, u, c, c->target[m], ce_weight(c->wce, c->target, m));
  }
}

static void gather(real *dst, const real *src, const size_t *row, size_t n, size_t C) {
  for (size_t i = 0; i < n; i++) memcpy(dst + i * C, src + row[i] * C, C * sizeof *dst);
}

/* dh NULL: the losses alone */
static void lm_loss(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, Teacher t,
                    const float *wce, const float *wkl, float tau, int kind, size_t M, size_t C, size_t V) {
  memset(ce, 0, M * sizeof *ce);
  memset(kl, 0, M * sizeof *kl);
  if (dh) memset(dh, 0, M * C * sizeof *dh);
  if (!M || !V) return;
  const size_t rows = min(M, min(MAX_ROWS, MAX_LOGITS / V + 1)), teacher = t.h || t.ids, gradient = dh ? 1 : 0;
  const size_t K = t.ids ? 0 : t.K;
  float *z = device_alloc(rows * ((1 + teacher) * V + (1 + gradient) * C + teacher * K) * sizeof *z + rows * sizeof(size_t));
  if (!z) return;
  size_t *row = (size_t *)z;
  z = (float *)(row + rows);
  float *u = teacher ? z + rows * V : NULL;
  real *x = z + (1 + teacher) * rows * V, *dx = x + rows * C, *tx = x + (1 + gradient) * rows * C;
  Chunk c = {ce, kl, z, u, row, target, &t, wce, wkl, tau, kind, dh != NULL, V};
  for (size_t m = 0; m < M;) {
    size_t n = 0;
    for (; m < M && n < rows; m++)
      if (ce_weight(wce, target, m) != 0 || (teacher && kl_weight(wkl, target, m) != 0)) row[n++] = m;
    gather(x, h, row, n, C);
    linear_forward(z, x, w, NULL, 0, 1, n, C, V);
    if (teacher && !t.ids) {
      gather(tx, t.h, row, n, K);
      linear_forward(u, tx, t.w, NULL, 0, 1, n, K, V);
    }
    parallel(chunk_rows, &c, n, 50.0 * (1 + teacher) * V);
    if (!dh) continue;
    linear_backward(dx, dw, NULL, z, x, w, 0, n, C, V);
    for (size_t i = 0; i < n; i++) memcpy(dh + row[i] * C, dx + i * C, C * sizeof *dh);
  }
  device_free(row);
}

void lm_loss_forward(float *ce, float *kl, const real *h, Matrix w, const int32_t *target, Teacher t, const float *wce, const float *wkl,
                     float tau, int kind, size_t M, size_t C, size_t V) {
  lm_loss(ce, kl, NULL, NULL, h, w, target, t, wce, wkl, tau, kind, M, C, V);
}

void lm_loss_backward(float *ce, float *kl, real *dh, float *dw, const real *h, Matrix w, const int32_t *target, Teacher t,
                      const float *wce, const float *wkl, float tau, int kind, size_t M, size_t C, size_t V) {
  lm_loss(ce, kl, dh, dw, h, w, target, t, wce, wkl, tau, kind, M, C, V);
}

/* ---- what a cache keeps of a teacher --------------------------------------------------------------------------------- */

typedef struct {
  int32_t *ids;
  float *log_probs, *tail, *z;
  float tau;
  size_t V, J;
} Top;

/* Whether the logit x of token i comes after y of token j. */
static int after(float x, int32_t i, float y, int32_t j) { return x < y || (x == y && i > j); }

/* The heap's place i, whose children are heaps, takes (x, token): the last of a heap is its first. */
static void sink(float *x_of, int32_t *token_of, size_t i, size_t n, float x, int32_t token) {
  for (size_t child; (child = 2 * i + 1) < n; i = child) {
    child += child + 1 < n && after(x_of[child + 1], token_of[child + 1], x_of[child], token_of[child]);
    if (!after(x_of[child], token_of[child], x, token)) break;
    x_of[i] = x_of[child], token_of[i] = token_of[child];
  }
  x_of[i] = x, token_of[i] = token;
}

/* A heap of the J first so far, sorted in the end; z is used up. */
static void top_row(int32_t *id, float *log_p, float *tail, float *z, float tau, size_t V, size_t J) {
  for (size_t i = 0; i < J; i++) log_p[i] = z[i], id[i] = (int32_t)i;
  for (size_t i = J / 2; i--;) sink(log_p, id, i, J, log_p[i], id[i]);
  for (size_t i = J; i < V && J; i++)
    if (z[i] > log_p[0]) sink(log_p, id, 0, J, z[i], (int32_t)i);
  for (size_t n = J; n-- > 1;) {
    const float x = log_p[n];
    const int32_t token = id[n];
    log_p[n] = log_p[0], id[n] = id[0];
    sink(log_p, id, 0, n, x, token);
  }
  for (size_t i = 0; i < J; i++) z[id[i]] = -INFINITY;
  const Softmax rest = J < V ? softmax(z, 1 / tau, V) : (Softmax){-INFINITY, 1};
  const double most = J ? log_p[0] : rest.max, beta = 1 / tau, log_rest = (rest.max - most) * beta + log(rest.sum);
  double sum = exp(log_rest);
  for (size_t i = 0; i < J; i++) sum += exp((log_p[i] - most) * beta);
  for (size_t i = 0; i < J; i++) log_p[i] = (float)((log_p[i] - most) * beta - log(sum));
  *tail = (float)(log_rest - log(sum));
}

static void top_rows(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const Top *c = arg;
  for (; i < end; i++) top_row(c->ids + i * c->J, c->log_probs + i * c->J, c->tail + i, c->z + i * c->V, c->tau, c->V, c->J);
}

void top_log_probs(int32_t *ids, float *log_probs, float *tail, const real *h, Matrix w, float tau, size_t M, size_t C, size_t V,
                   size_t J) {
  const size_t rows = min(M, min(MAX_ROWS, MAX_LOGITS / V + 1));
  float *z = device_alloc(rows * V * sizeof *z);
  for (size_t m = 0; m < M && z; m += rows) {
    const size_t n = min(rows, M - m);
    linear_forward(z, h + m * C, w, NULL, 0, 1, n, C, V);
    Top c = {ids + m * J, log_probs + m * J, tail + m, z, tau, V, J};
    parallel(top_rows, &c, n, 10.0 * V);
  }
  device_free(z);
}

/* ---- squared error -------------------------------------------------------------------------------------------------------- */

typedef struct {
  float *y;
  real *da;
  const float *dy;
  const real *a, *b;
  size_t C;
} SquaredError;

static void squared_error_rows(void *arg, size_t m, size_t end, size_t worker) {
  (void)worker;
  const SquaredError *s = arg;
  for (; m < end; m++) {
    const real *a = s->a + m * s->C, *b = s->b + m * s->C;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < s->C; c++) sum += (a[c] - b[c]) * (a[c] - b[c]);
    s->y[m] = sum;
  }
}

static void squared_error_gradient(void *arg, size_t m, size_t end, size_t worker) {
  (void)worker;
  const SquaredError *s = arg;
  for (; m < end; m++) {
    const float scale = 2 * s->dy[m];
    for (size_t i = m * s->C; i < (m + 1) * s->C; i++) s->da[i] = scale * (s->a[i] - s->b[i]);
  }
}

void squared_error_forward(float *y, const real *a, const real *b, size_t M, size_t C) {
  SquaredError s = {.y = y, .a = a, .b = b, .C = C};
  parallel(squared_error_rows, &s, M, 3.0 * C);
}

void squared_error_backward(real *da, const float *dy, const real *a, const real *b, size_t M, size_t C) {
  SquaredError s = {.da = da, .dy = dy, .a = a, .b = b, .C = C};
  parallel(squared_error_gradient, &s, M, 2.0 * C);
}
