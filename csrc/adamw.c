/* adamw.c - the optimiser's step and the sum of squares of a gradient, each one pass over the arena. */
#include "device.h"
#include "ops.h"
#include "philox.h"

/* Elements updated before they are rounded to bf16 (a multiple of 4); elements a partial sum. Work is shared out in whole ones. */
enum { UPDATE = 2048, PARTIAL = 1 << 15 };

typedef struct {
  float *w;
  void *m, *v;
  Matrix grad;
  uint16_t *rounded; /* of w, or NULL */
  int halves;        /* m and v are bf16 */
  float lr, b1, b2, eps, decay, gscale, c1, c2;
  size_t step, first, n;
  uint64_t key;
} AdamW;

static size_t min(size_t a, size_t b) { return a < b ? a : b; }

static void narrow(const AdamW *a, const float *m, const float *v, size_t from, size_t n) {
  uint16_t *to_m = (uint16_t *)a->m + from, *to_v = (uint16_t *)a->v + from;
  uint32_t word[4];
  for (size_t i = 0; i < n; i++) {
    if (i % 4 == 0) moment_bits(word, a->key, (a->first + from + i) / 4, a->step);
    to_m[i] = round_at_random(m[i], word[i % 4] & 0xffff);
    to_v[i] = round_at_random(v[i], word[i % 4] >> 16);
  }
}

static void update(const AdamW *a, size_t from, size_t n) {
  float wide[3][UPDATE];
  float *restrict w = a->w + from, *restrict m = a->halves ? wide[0] : (float *)a->m + from;
  float *restrict v = a->halves ? wide[1] : (float *)a->v + from;
  const float *restrict grad = a->grad.type == FLOAT32 ? (const float *)a->grad.data + from : wide[2];
  const float lr = a->lr, b1 = a->b1, b2 = a->b2, eps = a->eps, decay = a->decay, gscale = a->gscale, c1 = a->c1, c2 = a->c2;
  if (a->halves) {
    bf16_to_floats(m, (const uint16_t *)a->m + from, n);
    bf16_to_floats(v, (const uint16_t *)a->v + from, n);
  }
  if (a->grad.type != FLOAT32) bf16_to_floats(wide[2], (const uint16_t *)a->grad.data + from, n);
  for (size_t i = 0; i < n; i++) {
    float g = gscale * grad[i];
    m[i] = b1 * m[i] + (1 - b1) * g;
    v[i] = b2 * v[i] + (1 - b2) * g * g;
    w[i] -= lr * (m[i] * c1 / (sqrtf(v[i] * c2) + eps) + decay * w[i]);
  }
  if (a->rounded) floats_to_bf16(a->rounded + from, w, n);
  if (a->halves) narrow(a, m, v, from, n);
}

static void updates(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const AdamW *a = arg;
  for (; i < end; i++) update(a, i * UPDATE, min(UPDATE, a->n - i * UPDATE));
}

void adamw(void *w, float *master, void *m, void *v, Matrix grad, int type, int moments, float lr, float b1, float b2, float eps,
           float decay, float gscale, size_t step, uint64_t key, size_t first, size_t n) {
  AdamW a = {.w = type == FLOAT32 ? w : master, .m = m, .v = v, .grad = grad, .rounded = type == FLOAT32 ? NULL : w,
             .halves = moments == BFLOAT16, .lr = lr, .b1 = b1, .b2 = b2, .eps = eps, .decay = decay, .gscale = gscale,
             .step = step, .first = first, .n = n, .key = key};
  a.c1 = (float)(1 / (1 - pow(b1, (double)step)));
  a.c2 = (float)(1 / (1 - pow(b2, (double)step)));
  parallel(updates, &a, (n + UPDATE - 1) / UPDATE, 20.0 * UPDATE);
}

typedef struct {
  double *partial;
  Matrix g;
  size_t n;
} Squares;

static void squares(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const Squares *a = arg;
  for (; i < end; i++) {
    const float *g = (const float *)a->g.data + i * PARTIAL;
    const uint16_t *half = (const uint16_t *)a->g.data + i * PARTIAL;
    double s = 0;
    size_t n = min(PARTIAL, a->n - i * PARTIAL);
    if (a->g.type == FLOAT32)
#pragma omp simd reduction(+ : s)
      for (size_t j = 0; j < n; j++) s += (double)g[j] * g[j];
    else
#pragma omp simd reduction(+ : s)
      for (size_t j = 0; j < n; j++) s += (double)bf16_to_float(half[j]) * bf16_to_float(half[j]);
    a->partial[i] = s;
  }
}

double sum_squares(Matrix g, size_t n) {
  const size_t parts = (n + PARTIAL - 1) / PARTIAL;
  Squares a = {device_scratch(parts * sizeof(double)), g, n};
  if (!a.partial) return 0;
  parallel(squares, &a, parts, 2.0 * PARTIAL);
  double s = 0;
  for (size_t i = 0; i < parts; i++) s += a.partial[i];
  return s;
}
