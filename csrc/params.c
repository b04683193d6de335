/* params.c - a model's memory: activations, parameters, their gradients and moments, the optimiser's step. */
#include "model.h"

#include <stdlib.h>

/* ---- arena ---------------------------------------------------------------------------------------------------------------- */

typedef struct Block {
  struct Block *below;
  size_t size, used;
  char *data;
} Block;
static void pop(Arena *a) {
  Block *b = a->block;
  a->block = b->below;
  device_free(b->data);
  free(b);
}

static int push(Arena *a, size_t size) {
  Block *b = malloc(sizeof *b);
  char *data = b ? device_alloc(size) : NULL;
  if (!data) {
    device_fail("out of memory for activations");
    free(b);
    return -1;
  }
  *b = (Block){a->block, size, 0, data};
  a->block = b;
  return 0;
}

void *take(Arena *a, size_t bytes) {
  bytes = (bytes + 63) & ~(size_t)63;
  if (!a->block || a->block->size - a->block->used < bytes)
    if (push(a, bytes > (1 << 20) ? bytes : 1 << 20)) longjmp(*a->out_of_memory, 1);
  void *p = a->block->data + a->block->used;
  a->block->used += bytes;
  a->used += bytes;
  if (a->used > a->peak) a->peak = a->used;
  return p;
}

Mark arena_mark(const Arena *a) { return (Mark){a->block, a->block ? a->block->used : 0, a->used}; }

void arena_release(Arena *a, Mark m) {
  while (a->block != m.block) pop(a);
  if (a->block) a->block->used = m.used;
  a->used = m.total;
}

/* A call starts: what grew in pieces before becomes one block. */
void arena_begin(Arena *a, jmp_buf *out_of_memory) {
  a->out_of_memory = out_of_memory;
  a->used = 0;
  if (a->block && !a->block->below && a->block->size >= a->peak) {
    a->block->used = 0;
    return;
  }
  while (a->block) pop(a);
  if (a->peak && push(a, a->peak)) longjmp(*out_of_memory, 1);
}

static void arena_free(Arena *a) {
  while (a->block) pop(a);
  a->used = a->peak = 0;
}

/* ---- parameters ------------------------------------------------------------------------------------------------------------- */

size_t param_bytes(const Param *p) { return p->n * (p->type == FLOAT32 ? 4 : 2); }

static void *at(const Param *p, size_t element) { return (char *)p->buffer->data + element * (p->type == FLOAT32 ? 4 : 2); }

Matrix matrix(const Param *p, size_t row) { return (Matrix){at(p, row * p->b), p->type}; }

const float *vector(const Param *p) { return p->name ? p->buffer->data : NULL; }

int learns(const Model *m, const Param *p) { return p->name && p->trainable && m->gradients; }

int half_gradient(const Model *m, const Param *p) { return m->half_gradients && p->type == BFLOAT16; }

void *stored_gradient(const Model *m, const Param *p) {
  return (char *)m->gradients + (half_gradient(m, p) ? 2 * p->gradient : 2 * m->halves + 4 * p->gradient);
}

float *gradient(const Model *m, const Param *p) {
  if (!learns(m, p)) return NULL;
  return half_gradient(m, p) ? p->wide : stored_gradient(m, p);
}

void gradients_open(Model *m, Param *p, size_t n) {
  for (Param *end = p + n; p < end; p++)
    if (learns(m, p) && half_gradient(m, p)) {
      p->wide = take(&m->arena, p->n * sizeof(float));
      copy_rows(p->wide, FLOAT32, 0, (Matrix){stored_gradient(m, p), BFLOAT16}, 0, 1, p->n);
    }
}

void gradients_close(Model *m, Param *p, size_t n) {
  for (Param *end = p + n; p < end; p++)
    if (learns(m, p) && half_gradient(m, p)) {
      copy_rows(stored_gradient(m, p), BFLOAT16, 0, (Matrix){p->wide, FLOAT32}, 0, 1, p->n);
      p->wide = NULL;
    }
}

size_t param_count(const Model *m) { return 3 + m->c.layers * PARAM_KINDS; }

Param *param_at(Model *m, size_t i, size_t *layer) {
  *layer = i < 3 ? 0 : (i - 3) / PARAM_KINDS;
  return i < 3 ? m->top + i : &m->layer[*layer][(i - 3) % PARAM_KINDS];
}

void buffer_release(Buffer *b) {
  if (!b || __atomic_sub_fetch(&b->refs, 1, __ATOMIC_ACQ_REL)) return;
  device_free(b->data);
  free(b);
}

static void drop_moments(Param *p) {
  device_free(p->m);
  device_free(p->v);
  device_free(p->master);
  p->m = p->v = NULL;
  p->master = NULL;
}

void param_release(Param *p) {
  buffer_release(p->buffer);
  drop_moments(p);
  *p = (Param){0};
}

Buffer *buffer_share(Buffer *b) {
  __atomic_add_fetch(&b->refs, 1, __ATOMIC_RELAXED);
  return b;
}

Buffer *buffer_new(size_t bytes) {
  Buffer *b = malloc(sizeof *b);
  void *data = b ? device_alloc(bytes) : NULL;
  if (!data) {
    device_fail("out of memory for parameters");
    free(b);
    return NULL;
  }
  *b = (Buffer){1, data};
  return b;
}

void param_share(Param *to, const Param *from) {
  if (to->buffer == from->buffer) return;
  buffer_release(to->buffer);
  to->buffer = buffer_share(from->buffer);
}

/* Copy on write. */
int param_own(Param *p) {
  if (__atomic_load_n(&p->buffer->refs, __ATOMIC_ACQUIRE) == 1) return 0;
  Buffer *b = buffer_new(param_bytes(p));
  if (!b) return -1;
  device_copy(b->data, p->buffer->data, param_bytes(p));
  buffer_release(p->buffer);
  p->buffer = b;
  return 0;
}

static const int MIXERS_OF[] = {
#define X(id, mixers, when, name, form, a, b) mixers,
    PARAMS(X)
#undef X
};

static int make_params(Model *m, Param *param, int mixers, int type) {
  const Config *c = &m->c;
  const size_t C_ = c->width, D_ = c->heads * c->head_dim, E_ = c->kv_heads * c->head_dim, H_ = c->heads, P_ = c->head_dim;
  const size_t F_ = c->mlp, V_ = c->vocab, N_ = SCAN_STATE, R_ = (c->width + 15) / 16, W_ = CONV;
#define C C_
#define D D_
#define E E_
#define H H_
#define P P_
#define F F_
#define V V_
#define N N_
#define R R_
#define W W_
#define X(id, whose, when, text, shape, rows, cols)                                     \
  if (((whose) == TOP ? mixers == TOP : (whose) & mixers) && (when) && !param[id].name) \
    param[id] = (Param){.name = text, .form = shape, .type = shape == MATRIX ? type : FLOAT32, .a = rows, .b = cols, .n = (rows) * (cols), .trainable = 1};
  PARAMS(X)
#undef X
#undef C
#undef D
#undef E
#undef H
#undef P
#undef F
#undef V
#undef N
#undef R
#undef W
  for (int i = 0; i < (mixers == TOP ? 3 : PARAM_KINDS); i++)
    if (param[i].name && !param[i].buffer) {
      if (!(param[i].buffer = buffer_new(param_bytes(param + i)))) return -1;
      device_zero(param[i].buffer->data, param_bytes(param + i));
    }
  return 0;
}

int model_init(Model *m) {
  m->layer = calloc(m->c.layers ? m->c.layers : 1, sizeof *m->layer);
  if (!m->layer || make_params(m, m->top, TOP, m->type)) return -1;
  for (size_t l = 0; l < m->c.layers; l++)
    if (make_params(m, m->layer[l], 1 << m->kind[l], m->type)) return -1;
  return 0;
}

/* An unused Param becomes what another is, over the same buffer, trainable. */
static void same_param(Param *p, const Param *from) {
  if (!from->name) return;
  *p = (Param){.name = from->name, .form = from->form, .type = from->type, .a = from->a, .b = from->b, .n = from->n, .trainable = 1};
  param_share(p, from);
}

/* The same model over the same buffers, all trainable. */
int model_clone(Model *m, const Model *from) {
  const size_t L = from->c.layers, P = from->c.head_dim / 2;
  *m = (Model){.c = from->c, .type = from->type, .ranks = 1};
  m->layer = calloc(L ? L : 1, sizeof *m->layer);
  m->kind = malloc(L * sizeof *m->kind + 1);
  m->window = malloc(L * sizeof *m->window + 1);
  m->inv_freq = device_alloc(P * sizeof *m->inv_freq);
  if (!m->layer || !m->kind || !m->window || !m->inv_freq) return -1;
  memcpy(m->kind, from->kind, L * sizeof *m->kind);
  memcpy(m->window, from->window, L * sizeof *m->window);
  device_copy(m->inv_freq, from->inv_freq, P * sizeof *m->inv_freq);
  size_t layer;
  for (size_t i = 0; i < param_count(m); i++) {
    Param *p = param_at(m, i, &layer);
    same_param(p, param_at((Model *)from, i, &layer));
  }
  return 0;
}

static void drop_gradients(Model *m) {
  device_free(m->gradients);
  m->gradients = NULL;
}

void model_free(Model *m) {
  size_t layer;
  if (m->layer)
    for (size_t i = 0; i < param_count(m); i++) param_release(param_at(m, i, &layer));
  drop_gradients(m);
  arena_free(&m->arena);
  device_free(m->inv_freq);
  free(m->layer);
  free(m->kind);
  free(m->window);
}

/* The parameters of other mixers go; what both have (norms, MLP, of a window attention's all) stays. */
int model_set_kind(Model *m, size_t l, int kind) {
  for (int i = 0; i < PARAM_KINDS; i++)
    if (!(MIXERS_OF[i] & 1 << kind)) param_release(m->layer[l] + i);
  m->kind[l] = kind;
  m->version++;
  drop_gradients(m);
  return make_params(m, m->layer[l], 1 << kind, m->type);
}

void model_share_mixer(Model *m, size_t l, const Model *from) {
  for (int i = 0; i < PARAM_KINDS; i++)
    if (MIXERS_OF[i] != ALL) {
      param_release(m->layer[l] + i);
      same_param(m->layer[l] + i, from->layer[l] + i);
    }
  m->kind[l] = from->kind[l];
  m->window[l] = from->window[l];
  m->version++;
  drop_gradients(m);
}

void param_set_trainable(Model *m, Param *p, int trainable) {
  if (p->trainable == trainable) return;
  p->trainable = trainable;
  if (!trainable) drop_moments(p);
  drop_gradients(m);
}

void model_half_gradients(Model *m, int half) {
  if (m->half_gradients == half) return;
  m->half_gradients = half;
  drop_gradients(m);
}

size_t gradient_bytes(const Model *m) { return 2 * m->halves + 4 * m->floats; }

int model_gradients(Model *m) {
  if (m->gradients) return 0;
  size_t layer, n[2] = {0}, unit = 16 * m->ranks;
  for (size_t i = 0; i < param_count(m); i++) {
    Param *p = param_at(m, i, &layer);
    if (!p->name || !p->trainable) continue;
    size_t *used = n + half_gradient(m, p);
    p->gradient = *used, p->wide = NULL;
    *used += (p->n + 15) & ~(size_t)15;
  }
  m->floats = (n[0] + unit - 1) / unit * unit, m->halves = (n[1] + unit - 1) / unit * unit;
  if (!(m->gradients = device_alloc(gradient_bytes(m)))) return -1;
  device_zero(m->gradients, gradient_bytes(m));
  return 0;
}

void model_share(Model *m, size_t rank, size_t ranks) {
  size_t layer;
  if (m->rank == rank && m->ranks == ranks) return;
  m->rank = rank, m->ranks = ranks;
  for (size_t i = 0; i < param_count(m); i++) drop_moments(param_at(m, i, &layer));
  drop_gradients(m);
}

Range part_of(const Model *m, const Param *p, size_t rank) {
  const size_t part = (half_gradient(m, p) ? m->halves : m->floats) / m->ranks, begin = rank * part, end = begin + part;
  if (!learns(m, p)) return (Range){0, p->n};
  const size_t from = p->gradient > begin ? p->gradient : begin, to = p->gradient + p->n < end ? p->gradient + p->n : end;
  return from < to ? (Range){from - p->gradient, to - from} : (Range){0, 0};
}

double model_squares(Model *m) {
  const size_t part = m->floats / m->ranks, half = m->halves / m->ranks;
  if (!m->gradients) return 0;
  return sum_squares((Matrix){(float *)m->gradients + m->halves / 2 + m->rank * part, FLOAT32}, part) +
         sum_squares((Matrix){(uint16_t *)m->gradients + m->rank * half, BFLOAT16}, half);
}

size_t model_exchange(Model *m, int out) {
  size_t layer, most = 0;
  for (int copying = 0; copying < 2; copying++)
    for (size_t rank = 0; rank < m->ranks; rank++) {
      size_t used = 0;
      for (size_t i = 0; i < param_count(m); i++) {
        Param *p = param_at(m, i, &layer);
        if (!learns(m, p)) continue;
        const Range part = part_of(m, p, rank);
        const size_t size = p->type == FLOAT32 ? 4 : 2;
        char *weights = at(p, part.first), *piece = (char *)m->gradients + rank * most + used;
        if (copying && part.n && (rank == m->rank) == out) device_copy(out ? piece : weights, out ? weights : piece, part.n * size);
        used += ((part.n + 15) & ~(size_t)15) * size;
      }
      if (used > most) most = used;
    }
  return most;
}

int model_step(Model *m, int moments, float lr, float b1, float b2, float eps, float decay, float gscale, size_t step) {
  size_t layer;
  m->version++;
  for (size_t i = 0; i < param_count(m); i++) {
    Param *p = param_at(m, i, &layer);
    if (!learns(m, p)) continue;
    if (param_own(p) || param_moments(m, p, moments)) return -1;
    const int half = half_gradient(m, p);
    const Matrix grad = {(char *)stored_gradient(m, p) + p->first * (half ? 2 : 4), half ? BFLOAT16 : FLOAT32};
    adamw(at(p, p->first), p->master, p->m, p->v, grad, p->type, moments, lr, b1, b2, eps, decay, gscale, step, i, p->first, p->held);
  }
  return 0;
}

int param_moments(const Model *m, Param *p, int moments) {
  const Range own = part_of(m, p, m->rank);
  const size_t bytes = own.n * (moments == FLOAT32 ? 4 : 2);
  if (p->m && (p->first != own.first || p->held != own.n)) drop_moments(p);
  if (p->m && p->moments == moments) return 0;
  device_free(p->m);
  device_free(p->v);
  p->moments = moments, p->first = own.first, p->held = own.n;
  p->m = device_alloc(bytes);
  p->v = device_alloc(bytes);
  const int fresh = p->type == BFLOAT16 && !p->master;
  if (fresh) p->master = device_alloc(own.n * sizeof(float));
  if (!p->m || !p->v || (fresh && !p->master)) {
    drop_moments(p);
    return -1;
  }
  device_zero(p->m, bytes);
  device_zero(p->v, bytes);
  if (fresh) param_master(p);
  return 0;
}

void param_master(Param *p) {
  if (p->master && p->held) copy_rows(p->master, FLOAT32, 0, (Matrix){at(p, p->first), p->type}, 0, 1, p->held);
}
