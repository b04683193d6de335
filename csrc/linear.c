/* linear.c - y = x W^T and its backward; embedding. The only CPU file that looks at a matrix's dtype while computing. */
#include <pthread.h>

#include "blas.h"
#include "device.h"
#include "gemm.h"
#include "ops.h"

Sgemm *blas_sgemm;
int (*blas_get_threads)(void);
void (*blas_set_threads)(int);

enum { PANEL = 256, PACK = 64 }; /* rows of W widened at a time for BLAS; rows of W transposed at a time for gemm */

typedef struct {
  float *y;
  const float *x;
  Matrix w;
  const float *bias;
  int add;
  size_t B, M, K, O;
  float *scratch, *dw, *dbias;
} Linear;

static size_t min(size_t a, size_t b) { return a < b ? a : b; }

static const void *row_of(Matrix w, size_t row, size_t K) {
  return w.type == FLOAT32 ? (const void *)((const float *)w.data + row * K) : (const void *)((const uint16_t *)w.data + row * K);
}

/* BLAS at one thread while any of our products runs; the caller's setting comes back with the last. */
static pthread_mutex_t blas_lock = PTHREAD_MUTEX_INITIALIZER;
static int blas_users, blas_before;

static void blas_begin(void) {
  if (!blas_set_threads) return;
  pthread_mutex_lock(&blas_lock);
  if (!blas_users++) {
    blas_before = blas_get_threads();
    if (blas_before != 1) blas_set_threads(1);
  }
  pthread_mutex_unlock(&blas_lock);
}

static void blas_end(void) {
  if (!blas_set_threads) return;
  pthread_mutex_lock(&blas_lock);
  if (!--blas_users && blas_before != 1) blas_set_threads(blas_before);
  pthread_mutex_unlock(&blas_lock);
}

/* Column-major C (m x n) = op(A) B^T? + beta C; without BLAS, gemm on the transposed view, which needs A plain. */
static void product(char ta, char tb, size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b, size_t ldb,
                    float beta, float *c, size_t ldc) {
  if (!m || !n) return;
  if (blas_sgemm) {
    int im = (int)m, in = (int)n, ik = (int)k, ia = (int)lda, ib = (int)ldb, ic = (int)ldc;
    float one = 1;
    blas_sgemm(&ta, &tb, &im, &in, &ik, &one, (float *)a, &ia, (float *)b, &ib, &beta, c, &ic);
  } else {
    gemm(c, ldc, b, tb == 'T' ? 1 : ldb, tb == 'T' ? ldb : 1, a, lda, n, m, k, beta != 0);
  }
}

/* ---- few tokens: one accumulator a (row, output), over k in order; tiles only share loads -----------------------------
 *
 * K goes by PAIR = 2 LANES: the halves of a block in order for float weights, even and odd places for bf16, where a word's shift and
 * mask are the two. x is packed in that order, a tile of rows after the other: rows of a power of two would share cache sets. */

enum { PAIR = 2 * LANES, ROWS = 4, OUTPUTS = TILE_VECS };

static inline void load_pair(vec pair[2], const void *w, int type, size_t k) {
  typedef uint32_t words __attribute__((vector_size(LANES * 4)));
  typedef uint32_t words_u __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
  if (type == FLOAT32) {
    pair[0] = vec_load((const float *)w + k);
    pair[1] = vec_load((const float *)w + k + LANES);
  } else {
    words both = *(const words_u *)((const uint16_t *)w + k);
    pair[0] = (vec)(both << 16);
    pair[1] = (vec)(both & 0xffff0000u);
  }
}
/* Its lines, to the second cache: four rows of a page or two are more streams than the processor foresees. */
static inline void fetch_pair(const void *w, int type, size_t k) {
  const size_t size = type == FLOAT32 ? 4 : 2;
  if (PAIR * size >= 64 || k * size % 64 == 0) __builtin_prefetch((const char *)w + k * size, 0, 2);
  if (PAIR * size > 64) __builtin_prefetch((const char *)w + k * size + 64, 0, 2);
}
static inline float weight_at(const void *w, int type, size_t i) {
  return type == FLOAT32 ? ((const float *)w)[i] : bf16_to_float(((const uint16_t *)w)[i]);
}

static size_t whole_pairs(size_t K) { return K / PAIR * PAIR; }

/* Rows m .. m+R of x to where their tile stands: (K/PAIR, R, PAIR) */
static void pack_rows(float *dst, const real *x, int type, size_t R, size_t K) {
  for (size_t k = 0; k + PAIR <= K; k += PAIR)
    for (size_t r = 0; r < R; r++, dst += PAIR) {
      const real *from = x + r * K + k;
      if (type == FLOAT32)
        memcpy(dst, from, PAIR * sizeof *dst);
      else
        for (size_t i = 0; i < LANES; i++) dst[i] = from[2 * i], dst[LANES + i] = from[2 * i + 1];
    }
}

static inline __attribute__((always_inline)) void few_tile(const int R, const int U, const int type, const Linear *l, size_t m,
                                                           size_t o) {
  vec acc[R][U];
  const size_t K = l->K, whole = whole_pairs(K);
  const float *x = l->scratch + m * whole;
  const void *w[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) w[u] = row_of((Matrix){l->w.data, type}, o + u, K);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) acc[r][u] = (vec){0};
  for (size_t k = 0; k < whole; k += PAIR, x += R * PAIR)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      vec pair[2];
      load_pair(pair, w[u], type, k);
      if (U == 4 && m == 0) fetch_pair(row_of((Matrix){w[u], type}, U, K), type, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        acc[r][u] += vec_load(x + r * PAIR) * pair[0];
        acc[r][u] += vec_load(x + r * PAIR + LANES) * pair[1];
      }
    }
  float sum[LANES];
  const int at_once = R * U == LANES; /* the same additions */
  if (at_once) vec_store(sum, sum_lanes(acc[0]));
  for (int r = 0; r < R; r++)
    for (int u = 0; u < U; u++) {
      float s = at_once ? sum[r * U + u] : vec_sum(acc[r][u]);
      for (size_t i = whole; i < K; i++) s += l->x[(m + r) * K + i] * weight_at(w[u], type, i);
      if (l->bias) s += l->bias[o + u];
      float *y = l->y + (m + r) * l->O + o + u;
      *y = l->add ? *y + s : s;
    }
}

static inline __attribute__((always_inline)) void few_strip(const int U, const int type, const Linear *l, size_t o) {
  size_t m = 0;
  for (; m + ROWS <= l->M; m += ROWS) few_tile(ROWS, U, type, l, m, o);
  switch (l->M - m) {
    case 1: few_tile(1, U, type, l, m, o); break;
    case 2: few_tile(2, U, type, l, m, o); break;
    case 3: few_tile(3, U, type, l, m, o); break;
  }
}

static inline __attribute__((always_inline)) void few_range(const int type, const Linear *l, size_t o, size_t end) {
  if (l->M == 1) /* two outputs' accumulators would each wait for their last addition */
    for (; o + 4 <= end; o += 4) few_tile(1, 4, type, l, 0, o);
  for (; o + OUTPUTS <= end; o += OUTPUTS) few_strip(OUTPUTS, type, l, o);
  for (; o < end; o++) few_strip(1, type, l, o);
}

static void few_rows(void *arg, size_t o, size_t end, size_t worker) {
  (void)worker;
  const Linear *l = arg;
  if (l->w.type == FLOAT32)
    few_range(FLOAT32, l, o, end);
  else
    few_range(BFLOAT16, l, o, end);
}

/* ---- many rows: BLAS ------------------------------------------------------------------------------------------------ */

static void many_rows(const Linear *l, size_t m, size_t m_end, size_t o, size_t end, float *scratch) {
  const size_t K = l->K, O = l->O, rows = m_end - m;
  for (size_t i = m; l->bias && i < m_end; i++)
    for (size_t j = o; j < end; j++) l->y[i * O + j] = l->add ? l->y[i * O + j] + l->bias[j] : l->bias[j];
  int add = l->add || l->bias;
  for (size_t step; o < end; o += step) {
    if (!blas_sgemm) { /* W's rows transposed, so that vectors run along outputs */
      step = min(PACK, end - o);
      const void *w = row_of(l->w, o, K);
      for (size_t j = 0; j < step; j++)
        for (size_t k = 0; k < K; k++) scratch[k * PACK + j] = weight_at(w, l->w.type, j * K + k);
      gemm(l->y + m * O + o, O, l->x + m * K, K, 1, scratch, PACK, rows, step, K, add);
      continue;
    }
    const float *w = row_of(l->w, o, K);
    step = end - o;
    if (l->w.type == BFLOAT16) {
      step = min(PANEL, step);
      bf16_to_floats(scratch, row_of(l->w, o, K), step * K);
      w = scratch;
    }
    product('T', 'N', step, rows, K, w, K, l->x + m * K, K, add, l->y + m * O + o, O);
  }
}

static void many_by_output(void *arg, size_t o, size_t end, size_t worker) {
  const Linear *l = arg;
  many_rows(l, 0, l->M, o, end, l->scratch + worker * PANEL * l->K);
}
static void many_by_row(void *arg, size_t m, size_t end, size_t worker) {
  const Linear *l = arg;
  many_rows(l, m, end, 0, l->O, l->scratch + worker * PANEL * l->K);
}

/* Floats of scratch that a product needs: x packed, or W widened. */
static size_t product_room(size_t M, size_t T, size_t K) {
  return T <= FEW ? M * whole_pairs(K) + LANES : workers() * PANEL * K;
}

static void product_forward(Linear l, size_t T) {
  const size_t K = l.K, O = l.O, whole = whole_pairs(K);
  if (!l.M || !O) return;
  if (T <= FEW) {
    for (size_t m = 0; m < l.M; m += ROWS) pack_rows(l.scratch + m * whole, l.x + m * K, l.w.type, min(ROWS, l.M - m), K);
    parallel(few_rows, &l, O, 2.0 * l.M * K);
    return;
  }
  blas_begin();
  if (O >= l.M || l.w.type == BFLOAT16)
    parallel(many_by_output, &l, O, 2.0 * l.M * K);
  else
    parallel(many_by_row, &l, l.M, 2.0 * O * K);
  blas_end();
}

void linears_forward(const Product *p, int n, const real *x, const float *norm, float eps, int add, size_t B, size_t T, size_t K) {
  const size_t M = B * T, room = product_room(M, T, K);
  float *scratch = device_scratch((room + (norm ? M * K : 0)) * sizeof(float));
  if (!scratch) return;
  if (norm) {
    rmsnorm_forward(scratch + room, x, norm, eps, M, K);
    x = scratch + room;
  }
  for (int i = 0; i < n; i++) {
    Linear l = {.y = p[i].y, .x = x, .w = p[i].w, .bias = p[i].bias, .add = add, .M = M, .K = K, .O = p[i].O, .scratch = scratch};
    product_forward(l, T);
  }
}

void linear_forward(real *y, const real *x, Matrix w, const float *bias, int add, size_t B, size_t T, size_t K, size_t O) {
  linears_forward(&(Product){y, w, bias, O}, 1, x, NULL, 0, add, B, T, K);
}

void swiglu_linear_forward(real *y, const real *x, const float *norm, float eps, Matrix wg, const float *bg, Matrix wu,
                           const float *bu, size_t B, size_t T, size_t K, size_t F) {
  const size_t M = B * T, room = product_room(M, T, K);
  float *scratch = device_scratch((room + (norm ? M * K : 0) + M * F) * sizeof(float)), *up = scratch + room;
  if (!scratch) return;
  if (norm) {
    rmsnorm_forward(scratch + room, x, norm, eps, M, K);
    x = scratch + room;
    up += M * K;
  }
  Linear l = {.y = y, .x = x, .w = wg, .bias = bg, .M = M, .K = K, .O = F, .scratch = scratch};
  product_forward(l, T);
  l.y = up, l.w = wu, l.bias = bu;
  product_forward(l, T);
  swiglu_forward(y, y, up, M * F);
}

void logits_forward(float *y, const real *x, Matrix w, size_t B, size_t T, size_t K, size_t O) { linear_forward(y, x, w, NULL, 0, B, T, K, O); }

/* ---- backward: dx = dy W, dW += dy^T x, dbias += sum_m dy -------------------------------------------------------------- */

static void input_gradient(void *arg, size_t k, size_t end, size_t worker) { /* y is dx, x is dy; columns k .. end */
  const Linear *l = arg;
  const size_t K = l->K, O = l->O, n = end - k;
  float *panel = l->scratch + worker * PANEL * K;
  if (l->w.type == FLOAT32) {
    product('N', 'N', n, l->M, O, (const float *)l->w.data + k, K, l->x, O, l->add, l->y + k, K);
    return;
  }
  for (size_t o = 0, step; o < O; o += step) {
    step = min(PANEL, O - o);
    for (size_t i = 0; i < step; i++) bf16_to_floats(panel + i * n, (const uint16_t *)row_of(l->w, o + i, K) + k, n);
    product('N', 'N', n, l->M, step, panel, n, l->x + o, O, l->add || o, l->y + k, K);
  }
}

static void weight_gradient(void *arg, size_t o, size_t end, size_t worker) { /* y is dy; rows o .. end of dW */
  (void)worker;
  const Linear *l = arg;
  if (l->dw) product('N', 'T', l->K, end - o, l->M, l->x, l->K, l->y + o, l->O, 1, l->dw + o * l->K, l->K);
  for (size_t m = 0; l->dbias && m < l->M; m++)
    for (size_t j = o; j < end; j++) l->dbias[j] += l->y[m * l->O + j];
}

void linear_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, Matrix w, int add, size_t M, size_t K,
                     size_t O) {
  if (dx && !O && !add) memset(dx, 0, M * K * sizeof *dx);
  if (!M || !O) return;
  blas_begin();
  Linear in = {.y = dx, .x = dy, .w = w, .add = add, .M = M, .K = K, .O = O};
  in.scratch = device_scratch(workers() * PANEL * K * sizeof(float));
  if (dx && in.scratch) parallel(input_gradient, &in, K, 2.0 * M * O);
  Linear out = {.y = (float *)dy, .x = x, .M = M, .K = K, .O = O, .dw = dw, .dbias = dbias};
  if (dw || dbias) parallel(weight_gradient, &out, O, 2.0 * M * K);
  blas_end();
}

/* ---- embedding -------------------------------------------------------------------------------------------------------- */

void embedding_forward(real *y, Matrix w, const int32_t *ids, size_t M, size_t C) {
  for (size_t m = 0; m < M; m++)
    if (w.type == FLOAT32)
      memcpy(y + m * C, row_of(w, (size_t)ids[m], C), C * sizeof *y);
    else
      bf16_to_floats(y + m * C, row_of(w, (size_t)ids[m], C), C);
}

void embedding_backward(float *dw, const real *dy, const int32_t *ids, size_t M, size_t C) {
  for (size_t m = 0; m < M; m++)
    for (size_t c = 0; c < C; c++) dw[(size_t)ids[m] * C + c] += dy[m * C + c];
}
