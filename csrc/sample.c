/* sample.c - sampling, speculative acceptance and the uniforms that they consume. */
#include <float.h>

#include "device.h"
#include "ops.h"
#include "philox.h"

enum { BLOCK = 256, BINS = 2048 }; /* probabilities summed at a time; bins of a radix pass (11 bits) */

/* What sampling obeys, a row each. */
typedef struct {
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k;
} Settings;

typedef struct {
  int32_t *accepted, *token;
  const float *logits, *draft_logits, *u_accept, *u;
  const int32_t *draft, *count;
  Settings settings;
  float *scratch;
  size_t K, V;
} Rounds;

static size_t min(size_t a, size_t b) { return a < b ? a : b; }

/* NaN counts as -inf */
static float maximum(const float *x, size_t V) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (size_t i = 0; i < V; i++) max = x[i] > max ? x[i] : max;
  return max;
}

/* The first largest; 0 when nothing is above -inf */
static int32_t argmax(const float *x, size_t V) {
  float max = maximum(x, V);
  size_t i = 0;
  while (max > -INFINITY && x[i] != max) i++;
  return (int32_t)i;
}

static double block_sum(const float *p, size_t from, size_t V) {
  double s = 0;
  size_t end = min(from + BLOCK, V);
#pragma omp simd reduction(+ : s)
  for (size_t i = from; i < end; i++) s += p[i];
  return s;
}

static double total(const float *p, size_t V) {
  double s = 0;
  for (size_t i = 0; i < V; i += BLOCK) s += block_sum(p, i, V);
  return s;
}

/* Keeps the shortest prefix of the tokens, ordered by logit downwards and then by index, whose mass (or count) reaches
 * limit > 0; the rest of p becomes 0. Radix selection, by 11, 11 and 10 bits of its rank, of the last logit to stay. */
static void keep_prefix(float *p, const float *x, double limit, int by_mass, size_t V) {
  uint32_t last = 0, known = 0;
  for (int shift = 21; shift >= 0; shift -= shift > 10 ? 11 : 10) {
    const uint32_t digit = shift ? BINS - 1 : BINS / 2 - 1;
    double bins[BINS] = {0}, sum = 0, above = 0;
    for (size_t i = 0; i < V; i++)
      if (p[i] > 0 && (rank(x[i]) & known) == last) bins[rank(x[i]) >> shift & digit] += by_mass ? p[i] : 1;
    uint32_t chosen = 0;
    for (uint32_t b = BINS; b-- && sum < limit;)
      if (bins[b] > 0) chosen = b, above = sum, sum += bins[b];
    limit -= above;
    last |= chosen << shift;
    known |= digit << shift;
  }
  for (size_t i = 0; i < V; i++) p[i] = rank(x[i]) >= last ? p[i] : 0;
  for (size_t i = 0; i < V; i++)
    if (rank(x[i]) == last) {
      p[i] = limit > 0 ? p[i] : 0;
      limit -= by_mass ? p[i] : 1;
    }
}

/* p (V) = the distribution of row b of the settings over x (V), temperature above 0, not normalised: its largest is 1.
 * Nothing above -inf: all mass on token 0. */
static void distribution(float *restrict p, const float *restrict x, const Settings *s, size_t b, size_t V) {
  const float max = maximum(x, V), beta = 1 / s->temperature[b], min_p = s->min_p[b];
  for (size_t i = 0; i < V; i++) p[i] = x[i] == max ? 1 : x[i] >= -FLT_MAX ? exp_((x[i] - max) * beta) : 0;
  if (max == -INFINITY) {
    memset(p, 0, V * sizeof *p);
    p[0] = 1;
    return;
  }
  if (s->top_k[b] > 0 && (size_t)s->top_k[b] < V) keep_prefix(p, x, s->top_k[b], 0, V);
  if (s->top_p[b] < 1) keep_prefix(p, x, fmax(s->top_p[b] * total(p, V), DBL_MIN), 1, V);
  if (min_p > 0)
    for (size_t i = 0; i < V; i++) p[i] = p[i] >= min_p || p[i] == 1 ? p[i] : 0;
}

static void normalise(float *p, size_t V) {
  const float scale = (float)(1 / total(p, V));
  for (size_t i = 0; i < V; i++) p[i] *= scale;
}

/* The first token whose cumulative mass exceeds u times the whole; its own is never 0. */
static int32_t draw(const float *p, float u, size_t V) {
  const double goal = u * total(p, V);
  double below = 0, s;
  size_t i = 0, last = 0;
  for (; i + BLOCK < V && below + (s = block_sum(p, i, V)) <= goal; i += BLOCK) below += s;
  for (; i < V; i++)
    if (p[i] > 0) {
      below += p[last = i];
      if (below > goal) break;
    }
  return (int32_t)last;
}

static void sample_rows(void *arg, size_t b, size_t end, size_t worker) {
  const Rounds *a = arg;
  const size_t V = a->V;
  float *p = a->scratch + worker * V;
  for (; b < end; b++) {
    const float *x = a->logits + b * V;
    if (a->settings.temperature[b] > 0) {
      distribution(p, x, &a->settings, b, V);
      a->token[b] = draw(p, a->u[b], V);
    } else {
      a->token[b] = argmax(x, V);
    }
  }
}

void sample(int32_t *token, const float *logits, const float *temperature, const int32_t *top_k, const float *top_p,
            const float *min_p, const float *u, size_t B, size_t V) {
  Rounds a = {.token = token, .logits = logits, .u = u, .settings = {temperature, top_p, min_p, top_k}, .V = V};
  a.scratch = device_scratch(workers() * V * sizeof(float));
  if (!a.scratch || !V) return;
  parallel(sample_rows, &a, B, 50.0 * V);
}

static void verify_greedy(const Rounds *a, size_t b, size_t count) {
  const float *x = a->logits + b * (a->K + 1) * a->V;
  const int32_t *draft = a->draft + b * a->K;
  size_t i = 0;
  int32_t best = argmax(x, a->V);
  while (i < count && draft[i] == best) best = argmax(x + ++i * a->V, a->V);
  a->accepted[b] = (int32_t)i;
  a->token[b] = best;
}

static void verify_sampled(const Rounds *a, size_t b, size_t count, float *p, float *q) {
  const size_t V = a->V, K = a->K;
  size_t i = 0;
  for (;; i++) {
    distribution(p, a->logits + (b * (K + 1) + i) * V, &a->settings, b, V);
    if (i == count) break;
    distribution(q, a->draft_logits + (b * K + i) * V, &a->settings, b, V);
    normalise(p, V);
    normalise(q, V);
    const size_t d = (size_t)a->draft[b * K + i];
    if (a->u_accept[b * K + i] * q[d] < p[d]) continue;
    for (size_t j = 0; j < V; j++) q[j] = p[j] > q[j] ? p[j] - q[j] : 0;
    if (total(q, V) > 0) p = q;
    break;
  }
  a->accepted[b] = (int32_t)i;
  a->token[b] = draw(p, a->u[b * (K + 1) + i], V);
}

static void verify_rows(void *arg, size_t b, size_t end, size_t worker) {
  const Rounds *a = arg;
  float *p = a->scratch + worker * 2 * a->V;
  for (; b < end; b++) {
    size_t count = a->count ? (size_t)a->count[b] : a->K;
    if (a->settings.temperature[b] > 0)
      verify_sampled(a, b, count, p, p + a->V);
    else
      verify_greedy(a, b, count);
  }
}

void verify(int32_t *accepted, int32_t *token, const float *logits, const int32_t *draft, const float *draft_logits,
            const int32_t *count, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p,
            const float *u_accept, const float *u_sample, size_t B, size_t K, size_t V) {
  Rounds a = {accepted, token, logits, draft_logits, u_accept, u_sample, draft, count, {temperature, top_p, min_p, top_k},
              NULL, K, V};
  a.scratch = device_scratch(workers() * 2 * V * sizeof(float));
  if (!a.scratch || !V) return;
  parallel(verify_rows, &a, B, 50.0 * (K + 1) * V);
}

void uniform(float *u, const int32_t *index, const int32_t *position, const int32_t *use, const int32_t *low, const int32_t *high, size_t B) {
  for (size_t b = 0; b < B; b++) {
    uint32_t word[4] = {(uint32_t)index[b], (uint32_t)position[b], (uint32_t)use[b], 0};
    philox(word, word, (uint64_t)(uint32_t)high[b] << 32 | (uint32_t)low[b]);
    u[b] = (float)(word[0] >> 8) * 0x1p-24f;
  }
}
