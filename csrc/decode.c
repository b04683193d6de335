/* decode.c - calls with a State: logits, a round of speculative decoding, and the State itself.
 *
 * A call of few tokens is the same work on the same addresses each time, so a GPU records it at its second occurrence and replays it. */
#include <stdlib.h>

#include "model.h"

/* pos moves here and in state_commit, nowhere else. Many tokens: checkpoints now stand at what was kept (ops.h). */
static void end_call(State *s, const Rows *rows, int extend, size_t B, size_t T) {
  for (size_t b = 0; b < B; b++) {
    size_t i = rows->slot ? (size_t)rows->slot[b] : b, kept = rows->keep ? (size_t)rows->keep[b] : T, left = T - kept;
    int32_t before = s->pos[i];
    s->pos[i] += (int32_t)kept;
    s->seen[i] = T > PENDING ? s->pos[i] : before;
    s->pending[i] = (int32_t)(left < PENDING ? left : PENDING) + (extend ? s->pending[i] : 0);
  }
}

/* ---- recorded calls --------------------------------------------------------------------------------------------------------------- */

typedef struct Recorded {
  struct Recorded *next;
  size_t B, T, n;
  int last, given; /* which of slot, keep, prev there are */
  const void *base; /* where the arena stood */
  unsigned version;
  int met;
  Recording *recording;
} Recorded;

static void forget_calls(State *s) {
  for (Recorded *r = s->recorded, *next; r; r = next) {
    next = r->next;
    recording_free(r->recording);
    free(r);
  }
  s->recorded = NULL;
}

/* The entry of a call of this form; NULL: no memory for one. Another base or version than that of the entries there: they are stale. */
static Recorded *recorded_call(State *s, Recorded form) {
  if (s->recorded && (s->recorded->base != form.base || s->recorded->version != form.version)) forget_calls(s);
  for (Recorded *r = s->recorded; r; r = r->next)
    if (r->B == form.B && r->T == form.T && r->n == form.n && r->last == form.last && r->given == form.given) return r;
  Recorded *r = malloc(sizeof *r);
  if (!r) return NULL;
  *r = form;
  r->recording = recording_new();
  r->next = s->recorded;
  return s->recorded = r;
}

/* ---- logits -------------------------------------------------------------------------------------------------------------------------- */

enum { LOGIT_BYTES = 64 << 20 };

/* The normed hidden states of the wanted tokens (rows,C). */
static real *wanted_hidden(Model *m, const Call *k, int last, size_t rows) {
  const size_t C = m->c.width;
  real *h = run_layers(m, k, NULL, 0), *normed = reals(&m->arena, rows * C);
  if (last) {
    real *wanted = reals(&m->arena, rows * C);
    embedding_forward(wanted, (Matrix){h, sizeof(real) == 2 ? BFLOAT16 : FLOAT32}, k->wanted, rows, C);
    h = wanted;
  }
  if (rows) rmsnorm_forward(normed, h, vector(m->top + NORM), m->c.eps, rows, C);
  return normed;
}

/* A call of few tokens with a State: its logits (B,n,V) on the device. ids on the host, or on the device (from_device). */
static float *few_logits(Model *m, State *s, const int32_t *ids, int from_device, const Rows *rows, int extend, int last, size_t n,
                         size_t B, size_t T) {
  const size_t C = m->c.width, V = m->c.vocab;
  Call k = begin_call(m, s, from_device ? NULL : ids, rows, extend, NULL, last ? n : 0, B, T);
  if (from_device) device_copy(k.ids, ids, B * T * sizeof *ids);
  float *logits = take(&m->arena, B * n * V * sizeof *logits);
  const int given = (rows->slot ? 1 : 0) | (rows->keep ? 2 : 0) | (rows->prev ? 4 : 0);
  Recorded *r = recorded_call(s, (Recorded){.B = B, .T = T, .n = n, .last = last, .given = given, .base = k.ids, .version = m->version});
  if (!r || !recording_play(r->recording)) {
    const int record = r && r->met++;
    if (record) recording_begin();
    real *h = wanted_hidden(m, &k, last, B * n);
    logits_forward(logits, h, matrix(head(m), 0), B * n, 1, C, V);
    if (record) recording_end(r->recording);
    if (record) recording_play(r->recording);
  }
  end_call(s, rows, extend, B, T);
  return logits;
}

int model_logits(Model *m, State *s, float *logits, const int32_t *ids, const Rows *rows, int extend, int last, size_t n, size_t B,
                 size_t T) {
  const size_t C = m->c.width, V = m->c.vocab, total = B * n;
  jmp_buf out_of_memory;
  if (setjmp(out_of_memory)) return -1;
  arena_begin(&m->arena, &out_of_memory);
  if (s && n && T <= FEW) {
    device_pull(logits, few_logits(m, s, ids, 0, rows, extend, last, n, B, T), total * V * sizeof *logits);
    return 0;
  }
  Call k = begin_call(m, s, ids, rows, extend, NULL, last ? n : 0, B, T);
  real *h = wanted_hidden(m, &k, last, total);
  size_t chunk = LOGIT_BYTES / (V * sizeof *logits) + FEW + 1;
  if (chunk > total) chunk = total;
  float *out = take(&m->arena, chunk * V * sizeof *out);
  for (size_t i = 0; i < total; i += chunk) {
    size_t rest = total - i < chunk ? total - i : chunk;
    int few = n <= FEW; /* few tokens a row stay row-invariant, however many rows */
    logits_forward(out, h + i * C, matrix(head(m), 0), few ? rest : 1, few ? 1 : rest, C, V);
    device_pull(logits + i * V, out, rest * V * sizeof *out);
  }
  if (s) end_call(s, rows, extend, B, T);
  return 0;
}

/* ---- a round ----------------------------------------------------------------------------------------------------------------------------- */

enum { SAMPLE, PROPOSE, ACCEPT }; /* what a uniform is used for */

/* The round's own memory on the device. What the host gives is in front: keys (5,U) of the U = B (3K+1) uniforms, settings, ids; of
 * ids (B,K+1) only the first column. Then proposed (B,K), accepted, token: what the host gets; then chosen (B), u_propose (K,B),
 * u_accept (B,K), u_sample (B,K+1), and the draft's logits (B,K,V). */
typedef struct {
  void *data;
  int32_t *keys, *count, *top_k, *ids, *proposed, *accepted, *token, *chosen;
  float *temperature, *top_p, *min_p, *u_propose, *u_accept, *u_sample, *logits;
} Buffers;

static int round_begin(Buffers *d, const Round *r, size_t V) {
  const size_t B = r->B, K = r->K, U = B * (3 * K + 1), words = 5 * U + 5 * B + B * (K + 1);
  int32_t *host = calloc(words, sizeof *host);
  d->data = host ? device_alloc((words + B * K + 3 * B + U + B * K * V) * sizeof *host) : NULL;
  if (!d->data) {
    free(host);
    return -1;
  }
  for (size_t i = 0; i < U; i++) { /* as they stand in u_propose, u_accept, u_sample */
    const int use = i < B * K ? PROPOSE : i < 2 * B * K ? ACCEPT : SAMPLE;
    const size_t j = i - (use == PROPOSE ? 0 : use == ACCEPT ? B * K : 2 * B * K), width = use == SAMPLE ? K + 1 : K;
    const size_t b = use == PROPOSE ? j % B : j / width, t = use == PROPOSE ? j / B : j % width;
    host[i] = r->index[b], host[U + i] = r->at[b] + (int32_t)t, host[2 * U + i] = use;
    host[3 * U + i] = r->seed[2 * b], host[4 * U + i] = r->seed[2 * b + 1];
  }
  const void *from[] = {r->count, r->top_k, r->temperature, r->top_p, r->min_p};
  for (size_t i = 0; i < 5; i++) memcpy(host + 5 * U + i * B, from[i], B * sizeof *host);
  for (size_t b = 0; b < B; b++) host[5 * U + 5 * B + b * (K + 1)] = r->last[b];
  device_push(d->data, host, words * sizeof *host);
  free(host);
  d->keys = d->data, d->count = d->keys + 5 * U, d->top_k = d->count + B;
  d->temperature = (float *)(d->top_k + B), d->top_p = d->temperature + B, d->min_p = d->top_p + B;
  d->ids = (int32_t *)(d->min_p + B), d->proposed = d->ids + B * (K + 1), d->accepted = d->proposed + B * K;
  d->token = d->accepted + B, d->chosen = d->token + B;
  d->u_propose = (float *)(d->chosen + B), d->u_accept = d->u_propose + B * K, d->u_sample = d->u_accept + B * K, d->logits = d->u_propose + U;
  uniform(d->u_propose, d->keys, d->keys + U, d->keys + 2 * U, d->keys + 3 * U, d->keys + 4 * U, U);
  return 0;
}

/* The draft's first call commits what it has not read yet, the others leave proposals pending, one behind the other. */
static void propose(Model *draft, State *s, const Round *r, const Buffers *d, const int32_t *none, jmp_buf *out_of_memory) {
  const size_t B = r->B, K = r->K, V = draft->c.vocab, word = sizeof(int32_t), row = V * sizeof(float);
  for (size_t k = 0; k < K; k++) {
    Rows rows = {.slot = r->slot, .keep = k ? none : r->keep};
    arena_begin(&draft->arena, out_of_memory);
    const float *z = few_logits(draft, s, k ? d->chosen : r->unread, k > 0, &rows, k > 1, !k, 1, B, k ? 1 : r->U);
    sample(d->chosen, z, d->temperature, d->top_k, d->top_p, d->min_p, d->u_propose + k * B, B, V);
    device_copy_rows(d->logits + k * V, K * row, z, row, row, B);
    device_copy_rows(d->ids + k + 1, (K + 1) * word, d->chosen, word, word, B);
    device_copy_rows(d->proposed + k, K * word, d->chosen, word, word, B);
  }
}

int model_round(Model *m, State *s, Model *draft, State *draft_state, const Round *r, int32_t *proposed, int32_t *accepted, int32_t *token,
                float *logits) {
  const size_t B = r->B, K = r->K, V = m->c.vocab;
  Buffers d = {0};
  if (round_begin(&d, r, V)) return -1;
  int32_t *none = calloc(B * (K + 3) + 1, sizeof *none), *got = none + B;
  jmp_buf out_of_memory;
  if (!none || setjmp(out_of_memory)) {
    free(none);
    device_free(d.data);
    return -1;
  }
  if (K) propose(draft, draft_state, r, &d, none, &out_of_memory);
  Rows rows = {.slot = r->slot, .keep = none};
  arena_begin(&m->arena, &out_of_memory);
  const float *z = few_logits(m, s, d.ids, 1, &rows, 0, 0, K + 1, B, K + 1);
  verify(d.accepted, d.token, z, d.proposed, d.logits, d.count, d.temperature, d.top_k, d.top_p, d.min_p, d.u_accept, d.u_sample, B, K, V);
  device_pull(got, d.proposed, B * (K + 2) * sizeof *got);
  if (logits) device_pull(logits, z, B * (K + 1) * V * sizeof *logits);
  memcpy(proposed, got, B * K * sizeof *got);
  memcpy(accepted, got + B * K, B * sizeof *got);
  memcpy(token, got + B * (K + 1), B * sizeof *got);
  for (size_t b = 0; b < B; b++) {
    const size_t slot = (size_t)r->slot[b], n = (size_t)accepted[b];
    state_commit(s, slot, n + 1, NULL);
    if (K > 1) state_commit(draft_state, slot, n < K - 1 ? n : K - 1, NULL); /* the draft has read all proposals but the last */
  }
  free(none);
  device_free(d.data);
  return 0;
}

/* ---- State ---------------------------------------------------------------------------------------------------------------------------- */

int state_init(State *s, const Model *m) {
  s->layers = m->c.layers;
  s->pos = calloc(s->slots + 1, sizeof *s->pos);
  s->pending = calloc(s->slots + 1, sizeof *s->pending);
  s->seen = calloc(s->slots + 1, sizeof *s->seen);
  s->layer = calloc(s->layers + 1, sizeof *s->layer);
  if (!s->pos || !s->pending || !s->seen || !s->layer) return -1;
  for (size_t l = 0; l < s->layers; l++) {
    MIXER[m->kind[l]].caches(m, l, s->capacity, s->layer[l]);
    for (int i = 0; i < MOST_CACHES && s->layer[l][i].row_bytes; i++) {
      Cache *c = &s->layer[l][i];
      size_t bytes;
      if (__builtin_mul_overflow(s->slots, c->rows * c->row_bytes, &bytes) || !(c->data = device_alloc(bytes))) return -1;
      device_zero(c->data, bytes);
    }
  }
  return 0;
}

#define FOR_CACHES(s, c)                                                            \
  for (Cache *c = (s)->layer[0], *c##_end = c + (s)->layers * MOST_CACHES; c < c##_end; c++) \
    if (c->data)

void state_free(State *s) {
  forget_calls(s);
  if (s->layer) FOR_CACHES(s, c) device_free(c->data);
  free(s->layer);
  free(s->pos);
  free(s->pending);
  free(s->seen);
}

static char *slot_data(const Cache *c, size_t slot) { return (char *)c->data + slot * c->rows * c->row_bytes; }

void state_reset(State *s, size_t slot) {
  FOR_CACHES(s, c) if (!c->masked) device_zero(slot_data(c, slot), c->rows * c->row_bytes);
  s->pos[slot] = s->pending[slot] = s->seen[slot] = 0;
}

size_t state_read(const State *s, const Cache *c, size_t slot) {
  const size_t n = (size_t)(s->pos[slot] + s->pending[slot]);
  return c->masked && n < c->rows ? n : c->rows;
}

void state_copy(State *s, size_t to, size_t from) {
  if (to == from) return;
  FOR_CACHES(s, c) device_copy(slot_data(c, to), slot_data(c, from), state_read(s, c, from) * c->row_bytes);
  s->pos[to] = s->pos[from];
  s->pending[to] = s->pending[from];
  s->seen[to] = s->seen[from];
}

static char *entry_at(const Cache *c, size_t slot, size_t position) {
  const size_t first = c->rows - c->turns, row = position < first ? position : first + (position - first) % c->turns;
  return slot_data(c, slot) + row * c->row_bytes;
}

/* Parents come before their children, so path[i] >= i and rows move down in order. */
void state_commit(State *s, size_t slot, size_t n, const int32_t *path) {
  size_t pos = (size_t)s->pos[slot];
  for (size_t i = 0; path && i < n; i++)
    if ((size_t)path[i] != i) FOR_CACHES(s, c) if (c->turns)
      device_copy(entry_at(c, slot, pos + i), entry_at(c, slot, pos + (size_t)path[i]), c->row_bytes);
  s->pos[slot] += (int32_t)n;
  s->pending[slot] = path ? 0 : s->pending[slot] - (int32_t)n;
}
