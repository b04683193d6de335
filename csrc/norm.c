/* norm.c - RMSNorm, and Mamba-2's gated one per head. */
#include "device.h"
#include "gemm.h"
#include "ops.h"

typedef struct {
  real *y, *dx, *dz;
  const real *dy, *x, *z;
  const float *w;
  float *part;
  float eps;
  int add;
  size_t C, H;
} Norm;

/* By vectors, in an order that neither neighbours nor addresses can change. */
static float inverse_rms(const real *x, float eps, size_t C) {
  vec sum = {0};
  size_t c = 0;
  for (; c + LANES <= C; c += LANES) sum += vec_load(x + c) * vec_load(x + c);
  float s = vec_sum(sum);
  for (; c < C; c++) s += x[c] * x[c];
  return 1.0f / sqrtf(s / (float)C + eps);
}

static void norm_rows(void *arg, size_t m, size_t end, size_t worker) {
  (void)worker;
  const Norm *n = arg;
  const size_t C = n->C;
  for (; m < end; m++) {
    float r = inverse_rms(n->x + m * C, n->eps, C);
    for (size_t c = 0; c < C; c++) n->y[m * C + c] = n->x[m * C + c] * r * n->w[c];
  }
}

void rmsnorm_forward(real *y, const real *x, const float *w, float eps, size_t M, size_t C) {
  Norm n = {.y = y, .x = x, .w = w, .eps = eps, .C = C};
  parallel(norm_rows, &n, M, 4.0 * C);
}

/* y = x r w, r = rsqrt(mean x^2 + eps): dx = r (dy w - x r^2 mean(dy w x)), dw += dy x r; dx, dw may be NULL */
static void gradient_row(real *dx, float *dw, const real *dy, const real *x, const float *w, float eps, int add, size_t C) {
  float r = inverse_rms(x, eps, C), s = 0;
#pragma omp simd reduction(+ : s)
  for (size_t c = 0; c < C; c++) s += dy[c] * w[c] * x[c];
  s *= r * r / (float)C;
  for (size_t c = 0; dw && c < C; c++) dw[c] += dy[c] * x[c] * r;
  for (size_t c = 0; dx && c < C; c++) {
    float g = r * (dy[c] * w[c] - x[c] * s);
    dx[c] = add ? dx[c] + g : g;
  }
}

static void gradient_rows(void *arg, size_t m, size_t end, size_t worker) {
  const Norm *n = arg;
  const size_t C = n->C;
  for (; m < end; m++)
    gradient_row(n->dx ? n->dx + m * C : NULL, n->part ? n->part + worker * C : NULL, n->dy + m * C, n->x + m * C, n->w,
                 n->eps, n->add, C);
}

static void add_parts(float *dw, const float *part, size_t C) {
  for (size_t i = 0; i < workers(); i++)
    for (size_t c = 0; c < C; c++) dw[c] += part[i * C + c];
}

void rmsnorm_backward(real *dx, float *dw, const real *dy, const real *x, const float *w, float eps, int add, size_t M,
                      size_t C) {
  Norm n = {.dx = dx, .dy = dy, .x = x, .w = w, .eps = eps, .add = add, .C = C};
  if (dw) {
    if (!(n.part = device_scratch(workers() * C * sizeof(float)))) return;
    memset(n.part, 0, workers() * C * sizeof(float));
  }
  parallel(gradient_rows, &n, M, 8.0 * C);
  if (dw) add_parts(dw, n.part, C);
}

static void gated_rows(void *arg, size_t m, size_t end, size_t worker) {
  (void)worker;
  const Norm *n = arg;
  const size_t P = n->C;
  for (m *= n->H, end *= n->H; m < end; m++) {
    const real *x = n->x + m * P, *z = n->z + m * P;
    real *y = n->y + m * P;
    for (size_t p = 0; p < P; p++) y[p] = x[p] * silu(z[p]);
    float r = inverse_rms(y, n->eps, P);
    const float *w = n->w + m % n->H * P;
    for (size_t p = 0; p < P; p++) y[p] *= r * w[p];
  }
}

void gated_rmsnorm_forward(real *y, const real *x, const real *z, const float *w, float eps, size_t M, size_t H, size_t P) {
  Norm n = {.y = y, .x = x, .z = z, .w = w, .eps = eps, .C = P, .H = H};
  parallel(gated_rows, &n, M, 20.0 * H * P);
}

static void gated_gradient(void *arg, size_t m, size_t end, size_t worker) {
  const Norm *n = arg;
  const size_t P = n->C, D = n->H * P;
  float *part = n->part + worker * (D + 2 * P), *g = part + D, *dg = g + P;
  for (m *= n->H, end *= n->H; m < end; m++) {
    const real *x = n->x + m * P, *z = n->z + m * P;
    const size_t h = m % n->H * P;
    for (size_t p = 0; p < P; p++) g[p] = x[p] * silu(z[p]);
    gradient_row(dg, part + h, n->dy + m * P, g, n->w + h, n->eps, 0, P);
    for (size_t p = 0; p < P; p++) { /* g = x silu(z) */
      n->dx[m * P + p] = dg[p] * silu(z[p]);
      n->dz[m * P + p] = dg[p] * x[p] * dsilu(z[p]);
    }
  }
}

void gated_rmsnorm_backward(real *dx, real *dz, float *dw, const real *dy, const real *x, const real *z, const float *w,
                            float eps, size_t M, size_t H, size_t P) {
  const size_t D = H * P, share = D + 2 * P;
  Norm n = {.dx = dx, .dz = dz, .dy = dy, .x = x, .z = z, .w = w, .eps = eps, .C = P, .H = H};
  if (!(n.part = device_scratch(workers() * share * sizeof(float)))) return;
  memset(n.part, 0, workers() * share * sizeof(float));
  parallel(gated_gradient, &n, M, 60.0 * D);
  for (size_t i = 0; dw && i < workers(); i++)
    for (size_t c = 0; c < D; c++) dw[c] += n.part[i * share + c];
}
