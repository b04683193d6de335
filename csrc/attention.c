/* attention.c - RoPE and causal GQA attention. */
#include "device.h"
#include "ops.h"

static void rope(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, float sign, size_t M, size_t H, size_t P) {
  for (size_t m = 0; m < M; m++)
    for (size_t i = 0; i < P / 2; i++) {
      float a = (float)position[m] * inv_freq[i], c = scale * cosf(a), s = scale * sign * sinf(a);
      for (size_t h = 0; h < H; h++) {
        size_t at = (m * H + h) * P + i;
        float u = x[at], v = x[at + P / 2];
        y[at] = u * c - v * s;
        y[at + P / 2] = v * c + u * s;
      }
    }
}
void rope_forward(real *y, const real *x, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H, size_t P) {
  rope(y, x, position, inv_freq, scale, 1, M, H, P);
}
void rope_backward(real *dx, const real *dy, const int32_t *position, const float *inv_freq, float scale, size_t M, size_t H, size_t P) {
  rope(dx, dy, position, inv_freq, scale, -1, M, H, P);
}

typedef struct {
  real *o, *dq, *dk, *dv;
  float *lse, *scratch;
  real *kcache, *vcache;
  const real *q, *k, *v, *dout;
  const float *flse;
  const real *fo;
  Rows rows;
  float scale;
  size_t window, T, H, G, P, K, list;
} Att;

/* the path to t, oldest first: entries < pos are cached positions, pos + j is this call's j */
static size_t path(const Att *a, size_t b, size_t t, size_t pos, size_t *out) {
  size_t n = 0;
  long j = (long)t;
  size_t *back = out + a->list;
  size_t nb = 0;
  for (;;) {
    back[nb++] = pos + (size_t)j;
    long p = a->rows.prev ? a->rows.prev[b * a->T + (size_t)j] : j - 1;
    if (p < 0) { j = p; break; }
    j = p;
  }
  size_t cached = j == -1 ? pos : 0, total = cached + nb, skip = a->window && total > a->window ? total - a->window : 0;
  for (size_t i = skip; i < cached; i++) out[n++] = i;
  for (size_t i = nb; i-- > 0;)
    if (cached + (nb - 1 - i) >= skip) out[n++] = back[i];
  return n;
}
static const real *row(const Att *a, const real *cache, const real *x, size_t s, size_t b, size_t g, size_t pos, size_t e) {
  return e < pos ? cache + ((s * a->K + e % a->K) * a->G + g) * a->P : x + ((b * a->T + e - pos) * a->G + g) * a->P;
}
static void heads(void *arg, size_t i, size_t end, size_t worker) {
  Att *a = arg;
  for (; i < end; i++) {
    size_t b = i / a->H, h = i % a->H, g = h / (a->H / a->G), s = a->rows.slot ? (size_t)a->rows.slot[b] : b;
    size_t pos = a->rows.pos ? (size_t)a->rows.pos[s] : 0;
    size_t *list = (size_t *)(a->scratch + worker * a->list * 5);
    float *w = a->scratch + worker * a->list * 5 + 4 * a->list;
    for (size_t t = 0; t < a->T; t++) {
      size_t n = path(a, b, t, pos, list);
      const real *q = a->q + ((b * a->T + t) * a->H + h) * a->P;
      real *o = a->o + ((b * a->T + t) * a->H + h) * a->P;
      float max = -INFINITY, sum = 0;
      for (size_t j = 0; j < n; j++) {
        const real *k = row(a, a->kcache, a->k, s, b, g, pos, list[j]);
        float d = 0;
#pragma omp simd reduction(+ : d)
        for (size_t p = 0; p < a->P; p++) d += q[p] * k[p];
        w[j] = d * a->scale;
        max = w[j] > max ? w[j] : max;
      }
      memset(o, 0, a->P * sizeof *o);
      for (size_t j = 0; j < n; j++) {
        const real *v = row(a, a->vcache, a->v, s, b, g, pos, list[j]);
        float e = exp_(w[j] - max);
        sum += e;
        for (size_t p = 0; p < a->P; p++) o[p] += e * v[p];
      }
      for (size_t p = 0; p < a->P; p++) o[p] /= sum;
      if (a->lse) a->lse[(b * a->H + h) * a->T + t] = max + logf(sum);
    }
  }
}
void attention_forward(real *o, float *lse, real *kcache, real *vcache, const real *q, const real *k, const real *v, Rows rows,
                       float scale, size_t window, size_t B, size_t T, size_t H, size_t G, size_t P, size_t K) {
  size_t most = 0;
  for (size_t b = 0; rows.pos && b < B; b++) {
    size_t p = (size_t)rows.pos[rows.slot ? rows.slot[b] : (int32_t)b];
    most = p > most ? p : most;
  }
  Att a = {.o = o, .lse = lse, .kcache = kcache, .vcache = vcache, .q = q, .k = k, .v = v, .rows = rows, .scale = scale, .window = window, .T = T, .H = H, .G = G, .P = P, .K = K, .list = most + T + 16};
  a.scratch = device_scratch(workers() * a.list * 5 * sizeof(float) + 64);
  if (!a.scratch) return;
  parallel(heads, &a, B * H, 1e6);
  for (size_t b = 0; kcache && b < B; b++) {
    size_t s = rows.slot ? (size_t)rows.slot[b] : b, pos = rows.pos ? (size_t)rows.pos[s] : 0;
    for (size_t t = T > K ? T - K : 0; t < T; t++) {
      memcpy(kcache + (s * K + (pos + t) % K) * G * P, k + (b * T + t) * G * P, G * P * sizeof *k);
      memcpy(vcache + (s * K + (pos + t) % K) * G * P, v + (b * T + t) * G * P, G * P * sizeof *k);
    }
  }
}
static void back_heads(void *arg, size_t i, size_t end, size_t worker) {
  Att *a = arg;
  for (; i < end; i++) {
    size_t b = i / a->G, g = i % a->G, rep = a->H / a->G;
    size_t *list = (size_t *)(a->scratch + worker * a->list * 5);
    for (size_t h = g * rep; h < (g + 1) * rep; h++)
      for (size_t t = 0; t < a->T; t++) {
        size_t n = path(a, b, t, 0, list), at = ((b * a->T + t) * a->H + h) * a->P;
        const real *q = a->q + at, *d = a->dout + at, *o = a->fo + at;
        real *dq = a->dq + at;
        float delta = 0, lse = a->flse[(b * a->H + h) * a->T + t];
        for (size_t p = 0; p < a->P; p++) delta += d[p] * o[p];
        for (size_t j = 0; j < n; j++) {
          size_t kat = ((b * a->T + list[j]) * a->G + g) * a->P;
          float s = 0, dp = 0;
#pragma omp simd reduction(+ : s, dp)
          for (size_t p = 0; p < a->P; p++) s += q[p] * a->k[kat + p], dp += d[p] * a->v[kat + p];
          float w = exp_(s * a->scale - lse), ds = w * (dp - delta) * a->scale;
          for (size_t p = 0; p < a->P; p++) {
            dq[p] += ds * a->k[kat + p];
            a->dk[kat + p] += ds * q[p];
            a->dv[kat + p] += w * d[p];
          }
        }
      }
  }
}
void attention_backward(real *dq, real *dk, real *dv, const real *dout, const real *q, const real *k, const real *v, const real *o,
                        const float *lse, Rows rows, float scale, size_t window, size_t B, size_t T, size_t H, size_t G, size_t P) {
  Att a = {.dq = dq, .dk = dk, .dv = dv, .dout = dout, .q = q, .k = k, .v = v, .fo = o, .flse = lse, .rows = rows, .scale = scale, .window = window, .T = T, .H = H, .G = G, .P = P, .list = T + 16};
  memset(dq, 0, B * T * H * P * sizeof *dq);
  memset(dk, 0, B * T * G * P * sizeof *dq);
  memset(dv, 0, B * T * G * P * sizeof *dq);
  a.scratch = device_scratch(workers() * a.list * 5 * sizeof(float) + 64);
  if (!a.scratch) return;
  parallel(back_heads, &a, B * G, 1e6);
}
