/* model.c - parameters, forward, backward, loss, alignment, optimiser step. decode.c has the State. */
#include "model.h"

#include <stdlib.h>

/* ---- arena ---------------------------------------------------------------------------------------------------------------- */

typedef struct Block {
  struct Block *below;
  size_t size, used;
  char *data;
} Block;
typedef struct {
  Block *block;
  size_t used, total;
} Mark;

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

static Mark mark(const Arena *a) { return (Mark){a->block, a->block ? a->block->used : 0, a->used}; }

static void release(Arena *a, Mark m) {
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

float *gradient(const Model *m, const Param *p) {
  return p->name && p->trainable && m->gradients ? m->gradients + p->gradient : NULL;
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

int model_gradients(Model *m) {
  if (m->gradients) return 0;
  size_t layer, n = 0;
  for (size_t i = 0; i < param_count(m); i++) {
    Param *p = param_at(m, i, &layer);
    if (!p->name || !p->trainable) continue;
    p->gradient = n;
    n += (p->n + 15) & ~(size_t)15;
  }
  n = (n + 16 * m->ranks - 1) / (16 * m->ranks) * (16 * m->ranks);
  m->gradient_count = n;
  m->gradients = device_alloc(n * sizeof(float));
  if (!m->gradients) return -1;
  device_zero(m->gradients, n * sizeof(float));
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
  const size_t part = m->gradient_count / m->ranks, begin = rank * part, end = begin + part;
  if (!gradient(m, p)) return (Range){0, p->n};
  const size_t from = p->gradient > begin ? p->gradient : begin, to = p->gradient + p->n < end ? p->gradient + p->n : end;
  return from < to ? (Range){from - p->gradient, to - from} : (Range){0, 0};
}

double model_squares(Model *m) {
  const size_t part = m->gradient_count / m->ranks;
  return m->gradients ? sum_squares(m->gradients + m->rank * part, part) : 0;
}

size_t model_exchange(Model *m, int out) {
  size_t layer, most = 0;
  for (int copying = 0; copying < 2; copying++)
    for (size_t rank = 0; rank < m->ranks; rank++) {
      size_t used = 0;
      for (size_t i = 0; i < param_count(m); i++) {
        Param *p = param_at(m, i, &layer);
        if (!gradient(m, p)) continue;
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
    if (!gradient(m, p)) continue;
    if (param_own(p) || param_moments(m, p, moments)) return -1;
    adamw(at(p, p->first), p->master, p->m, p->v, gradient(m, p) + p->first, p->type, moments, lr, b1, b2, eps, decay, gscale, step, i, p->first,
          p->held);
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

/* ---- forward -------------------------------------------------------------------------------------------------------------------- */

struct Saved { /* of one layer: input, after the mixer, MLP's halves; M rows each */
  real *in, *mid, *gate, *up;
  Acts acts;
};

real *reals(Arena *a, size_t n) { return take(a, n * sizeof(real)); }

static void layer_layout(Model *m, size_t l, Saved *s, size_t M) {
  s->gate = reals(&m->arena, M * m->c.mlp);
  s->up = reals(&m->arena, M * m->c.mlp);
  MIXER[m->kind[l]].layout(m, l, &m->arena, &s->acts, M);
}

/* A layer is mid = in + mixer(rmsnorm(in)), out = mid + mlp(rmsnorm(mid)); without gradients all three are one array. Its first half:
 * to += mixer(rmsnorm(in)). */
static void mix_forward(Model *m, const Call *k, size_t l, Saved *s, real *to) {
  Mark before = mark(&m->arena);
  const real *u = s->in; /* few tokens: the mixer's products take the norm along */
  if (!k->few) {
    real *normed = reals(&m->arena, k->M * m->c.width);
    rmsnorm_forward(normed, s->in, vector(m->layer[l] + NORM1), m->c.eps, k->M, m->c.width);
    u = normed;
  }
  MIXER[m->kind[l]].forward(k, l, &s->acts, to, u);
  release(&m->arena, before);
}

/* to += mlp(rmsnorm(mid)). to NULL: recomputation, which needs gate and up alone. */
static void mlp_forward(Model *m, const Call *k, size_t l, Saved *s, real *to) {
  const Param *p = m->layer[l];
  const size_t C = m->c.width, F = m->c.mlp, M = k->M;
  if (k->few) {
    swiglu_linear_forward(s->gate, s->mid, vector(p + NORM2), m->c.eps, matrix(p + GATE, 0), vector(p + BGATE), matrix(p + UP, 0), vector(p + BUP),
                          k->B, k->T, C, F);
    linear_forward(to, s->gate, matrix(p + DOWN, 0), vector(p + BDOWN), 1, k->B, k->T, F, C);
    return;
  }
  Mark before = mark(&m->arena);
  real *u = reals(&m->arena, M * C);
  rmsnorm_forward(u, s->mid, vector(p + NORM2), m->c.eps, M, C);
  linear_forward(s->gate, u, matrix(p + GATE, 0), vector(p + BGATE), 0, k->B, k->T, C, F);
  linear_forward(s->up, u, matrix(p + UP, 0), vector(p + BUP), 0, k->B, k->T, C, F);
  if (to) {
    real *act = to == s->mid ? s->gate : reals(&m->arena, M * F); /* nothing is kept where all is one array */
    swiglu_forward(act, s->gate, s->up, M * F);
    linear_forward(to, act, matrix(p + DOWN, 0), vector(p + BDOWN), 1, k->B, k->T, F, C);
  }
  release(&m->arena, before);
}

/* in -> mid -> out; out NULL: recomputation. */
static void layer_forward(Model *m, const Call *k, size_t l, Saved *s, real *out) {
  const size_t bytes = k->M * m->c.width * sizeof(real);
  if (s->mid != s->in) device_copy(s->mid, s->in, bytes);
  mix_forward(m, k, l, s, s->mid);
  if (out && out != s->mid) device_copy(out, s->mid, bytes);
  mlp_forward(m, k, l, s, out);
}

/* dh: in the gradient of out, out that of mid. */
static void mlp_backward(Model *m, Call *k, size_t l, const Saved *s, real *dh) {
  const Param *p = m->layer[l];
  const size_t C = m->c.width, F = m->c.mlp, M = k->M;
  Mark before = mark(&m->arena);
  real *u = reals(&m->arena, M * C), *du = reals(&m->arena, M * C), *act = reals(&m->arena, M * F), *dact = reals(&m->arena, M * F);
  /* out = mid + down(act), act = silu(gate) * up, gate and up from u = rmsnorm(mid) */
  rmsnorm_forward(u, s->mid, vector(p + NORM2), m->c.eps, M, C);
  swiglu_forward(act, s->gate, s->up, M * F);
  linear_backward(dact, gradient(m, p + DOWN), gradient(m, p + BDOWN), dh, act, matrix(p + DOWN, 0), 0, M, F, C);
  real *dgate = s->gate, *dup = s->up; /* each gate and up is needed once */
  swiglu_backward(dgate, dup, dact, s->gate, s->up, M * F);
  linear_backward(du, gradient(m, p + GATE), gradient(m, p + BGATE), dgate, u, matrix(p + GATE, 0), 0, M, C, F);
  linear_backward(du, gradient(m, p + UP), gradient(m, p + BUP), dup, u, matrix(p + UP, 0), 1, M, C, F);
  rmsnorm_backward(dh, gradient(m, p + NORM2), du, s->mid, vector(p + NORM2), m->c.eps, 1, M, C);
  release(&m->arena, before);
}

/* dh: in the gradient of mid, out that of in; `through` 0: only the parameters' gradients are wanted, dh is spent. */
static void mix_backward(Model *m, Call *k, size_t l, const Saved *s, real *dh, int through) {
  const Param *norm = m->layer[l] + NORM1;
  const size_t C = m->c.width, M = k->M;
  Mark before = mark(&m->arena);
  real *u = reals(&m->arena, M * C), *du = through || gradient(m, norm) ? reals(&m->arena, M * C) : NULL;
  rmsnorm_forward(u, s->in, vector(norm), m->c.eps, M, C);
  MIXER[m->kind[l]].backward(k, l, &s->acts, du, dh, u, &m->arena);
  if (du) rmsnorm_backward(through ? dh : NULL, gradient(m, norm), du, s->in, vector(norm), m->c.eps, 1, M, C);
  release(&m->arena, before);
}

/* The hidden states after the last layer, before the final norm (M,C). saved NULL: nothing is kept; else (layers), and with
 * `recompute` only each layer's input is. */
real *run_layers(Model *m, const Call *k, Saved *saved, int recompute) {
  const size_t n = k->M * m->c.width;
  real *h = reals(&m->arena, n);
  embedding_forward(h, matrix(m->top + EMBED, 0), k->ids, k->M, m->c.width);
  for (size_t l = 0; l < m->c.layers; l++) {
    Saved local = {.in = h, .mid = h}, *s = saved ? saved + l : &local;
    real *out = h;
    if (saved) {
      out = reals(&m->arena, n);
      s->in = h;
      if (!recompute) s->mid = reals(&m->arena, n);
    }
    Mark before = mark(&m->arena);
    if (saved && recompute) s->mid = out;
    layer_layout(m, l, s, k->M);
    layer_forward(m, k, l, s, out);
    if (!saved || recompute) release(&m->arena, before);
    h = out;
  }
  return h;
}

static size_t first_trained(const Model *m) {
  if (gradient(m, m->top + EMBED)) return 0;
  for (size_t l = 0; l < m->c.layers; l++)
    for (int i = 0; i < PARAM_KINDS; i++)
      if (gradient(m, &m->layer[l][i])) return l;
  return m->c.layers;
}

static void layers_backward(Model *m, Call *k, Saved *saved, real *dh, int recompute) {
  for (size_t l = m->c.layers, end = first_trained(m); l-- > end;) {
    Mark before = mark(&m->arena);
    if (recompute) {
      saved[l].mid = reals(&m->arena, k->M * m->c.width);
      layer_layout(m, l, saved + l, k->M);
      layer_forward(m, k, l, saved + l, NULL);
    }
    mlp_backward(m, k, l, saved + l, dh);
    mix_backward(m, k, l, saved + l, dh, 1);
    release(&m->arena, before);
  }
  if (gradient(m, m->top + EMBED)) embedding_backward(gradient(m, m->top + EMBED), dh, k->ids, k->M, m->c.width);
}

const Param *head(const Model *m) { return m->top + (m->c.tied ? EMBED : HEAD); }

/* ---- a call: host arrays to the device, positions from prev ------------------------------------------------------------------------ */

/* RoPE positions: start + depth along prev, from 0 at a document's start. */
static void positions(int32_t *position, const int32_t *prev, int32_t start, size_t T) {
  for (size_t t = 0; t < T; t++) {
    int32_t p = prev ? prev[t] : (int32_t)t - 1;
    position[t] = p == -2 ? 0 : p == -1 ? start : position[p] + 1;
  }
}

/* All of a call's integers in one piece. ids NULL: room for them, which the caller fills on the device. target (M) or NULL.
 * last: k.wanted are the rows of the last `last` tokens that each row keeps. */
Call begin_call(Model *m, State *s, const int32_t *ids, const Rows *rows, int extend, const int32_t *target, size_t last, size_t B, size_t T) {
  const size_t M = B * T, S = s ? s->slots : 0;
  enum { IDS, POSITION, PREV, SLOT, KEEP, POS, COMMITTED, SEEN, TARGET, WANTED, PARTS };
  const int32_t *given[PARTS] = {[IDS] = ids, [PREV] = rows->prev, [TARGET] = target};
  size_t size[PARTS] = {M, M, M, B, B, S, S, S, M, B * last}, at[PARTS], n = 0;
  if (s) given[SLOT] = rows->slot, given[KEEP] = rows->keep, given[COMMITTED] = s->pos, given[SEEN] = s->seen;
  for (int i = 0; i < PARTS; i++) {
    if (!given[i] && i != IDS && i != POSITION && i != POS && i != WANTED) size[i] = 0;
    at[i] = n, n += size[i];
  }
  int32_t *device = take(&m->arena, (n + 1) * sizeof *device), *host = malloc((n + 1) * sizeof *host);
  if (!host) longjmp(*m->arena.out_of_memory, 1);
  for (int i = 0; i < PARTS; i++)
    if (given[i]) memcpy(host + at[i], given[i], size[i] * sizeof *host);
  for (size_t i = 0; i < S; i++) host[at[POS] + i] = s->pos[i] + (extend ? s->pending[i] : 0);
  for (size_t b = 0; b < B; b++) {
    const size_t keep = rows->keep ? (size_t)rows->keep[b] : T;
    const int32_t start = s ? host[at[POS] + (rows->slot ? (size_t)rows->slot[b] : b)] : 0;
    positions(host + at[POSITION] + b * T, rows->prev ? rows->prev + b * T : NULL, start, T);
    for (size_t i = 0; i < last; i++) host[at[WANTED] + b * last + i] = (int32_t)(b * T + keep - last + i);
  }
  const size_t skip = ids ? 0 : M;
  device_push(device + skip, host + skip, (n - skip) * sizeof *host);
  free(host);
#define PART(i) (size[i] ? device + at[i] : NULL)
  Call k = {.m = m, .s = s, .B = B, .T = T, .M = M, .few = s && T <= FEW, .ids = device, .position = device + at[POSITION], .target = PART(TARGET), .wanted = PART(WANTED)};
  k.rows = (Rows){.prev = PART(PREV), .slot = PART(SLOT), .keep = PART(KEEP), .pos = PART(POS), .committed = PART(COMMITTED), .seen = PART(SEEN)};
#undef PART
  return k;
}

/* ---- loss ------------------------------------------------------------------------------------------------------------------------------ */

static real *final_hidden(Model *m, const Call *k, const real *h) {
  real *normed = reals(&m->arena, k->M * m->c.width);
  rmsnorm_forward(normed, h, vector(m->top + NORM), m->c.eps, k->M, m->c.width);
  return normed;
}

static void *pushed(Arena *a, const void *host, size_t bytes) {
  void *device = take(a, bytes);
  device_push(device, host, bytes);
  return device;
}

int model_loss(Model *m, Model *teacher, Teacher top, float *out, const int32_t *ids, const int32_t *target, const float *wce,
               const float *wkl, const int32_t *prev, float tau, int kind, int backward, int recompute, size_t B, size_t T) {
  const size_t M = B * T, C = m->c.width, V = m->c.vocab;
  Saved *volatile saved = NULL;
  jmp_buf out_of_memory;
  if (setjmp(out_of_memory)) {
    free(saved);
    return -1;
  }
  Rows rows = {.prev = prev};
  Teacher t = top;
  if (teacher) {
    arena_begin(&teacher->arena, &out_of_memory);
    Call k = begin_call(teacher, NULL, ids, &rows, 0, NULL, 0, B, T);
    real *h = run_layers(teacher, &k, NULL, 0);
    t = (Teacher){.h = final_hidden(teacher, &k, h), .w = matrix(head(teacher), 0), .K = teacher->c.width};
  }
  Arena *a = &m->arena;
  arena_begin(a, &out_of_memory);
  if (backward && model_gradients(m)) return -1;
  saved = backward ? calloc(m->c.layers + 1, sizeof *saved) : NULL;
  if (backward && !saved) longjmp(out_of_memory, 1);
  Call k = begin_call(m, NULL, ids, &rows, 0, target, 0, B, T);
  const int32_t *device_target = k.target;
  real *h = run_layers(m, &k, saved, recompute);
  if (top.ids) {
    t.ids = pushed(a, top.ids, M * t.J * sizeof *t.ids);
    t.log_probs = pushed(a, top.log_probs, M * t.J * sizeof *t.log_probs);
    t.tail = pushed(a, top.tail, M * sizeof *t.tail);
  }
  float *losses = take(a, 2 * M * sizeof *losses), *weight = take(a, 2 * M * sizeof *weight);
  device_push(weight, wce, M * sizeof *weight);
  device_push(weight + M, wkl, M * sizeof *weight);
  real *normed = final_hidden(m, &k, h);
  Matrix w = matrix(head(m), 0);
  if (backward) {
    real *dnormed = reals(a, M * C), *dh = reals(a, M * C);
    lm_loss_backward(losses, losses + M, dnormed, gradient(m, head(m)), normed, w, device_target, t, weight, weight + M, tau, kind, M, C,
                     V);
    rmsnorm_backward(dh, gradient(m, m->top + NORM), dnormed, h, vector(m->top + NORM), m->c.eps, 0, M, C);
    layers_backward(m, &k, saved, dh, recompute);
  } else {
    lm_loss_forward(losses, losses + M, normed, w, device_target, t, weight, weight + M, tau, kind, M, C, V);
  }
  device_pull(out, losses, 2 * M * sizeof *out);
  free(saved);
  return 0;
}

/* ---- hidden states and alignment ----------------------------------------------------------------------------------------------------- */

int model_hidden(Model *m, float *out, const int32_t *ids, const int32_t *layer, size_t n, int mid, const int32_t *prev, size_t B, size_t T) {
  const size_t size = B * T * m->c.width;
  jmp_buf out_of_memory;
  if (setjmp(out_of_memory)) return -1;
  arena_begin(&m->arena, &out_of_memory);
  Rows rows = {.prev = prev};
  Call k = begin_call(m, NULL, ids, &rows, 0, NULL, 0, B, T);
  real *h = reals(&m->arena, size);
  embedding_forward(h, matrix(m->top + EMBED, 0), k.ids, k.M, m->c.width);
  for (size_t l = 0, i = 0;; l++) {
    if (!mid && i < n && l == (size_t)layer[i]) pull_floats(out + i++ * size, h, size);
    if (i == n) return 0;
    Saved s = {.in = h, .mid = h};
    Mark before = mark(&m->arena);
    layer_layout(m, l, &s, k.M);
    mix_forward(m, &k, l, &s, h);
    if (mid && l == (size_t)layer[i]) pull_floats(out + i++ * size, h, size);
    mlp_forward(m, &k, l, &s, h);
    release(&m->arena, before);
  }
}

typedef struct {
  Model *m;
  Call k;
  Saved s;
  real *d; /* what the layer has added to its input so far: the stream itself is rounded more coarsely */
} Side;

/* Adds to d what a half of layer l, its mixer or then its MLP, adds to x. */
static void add_half(Side *a, size_t l, real *x, int mlp) {
  Arena *arena = &a->m->arena;
  const size_t n = a->k.M * a->m->c.width;
  if (mlp) {
    device_copy(a->s.mid, x, n * sizeof *x);
    accumulate(a->s.mid, a->d, n);
    mlp_forward(a->m, &a->k, l, &a->s, a->d);
    return;
  }
  a->d = reals(arena, n);
  device_zero(a->d, n * sizeof *x);
  a->s = (Saved){.in = x, .mid = reals(arena, n)};
  layer_layout(a->m, l, &a->s, a->k.M);
  mix_forward(a->m, &a->k, l, &a->s, a->d);
}

int model_align(Model *m, Model *teacher, float *errors, const int32_t *ids, const int32_t *layer, size_t n, const float *weight, int hidden,
                int own, const int32_t *prev, size_t B, size_t T) {
  const size_t M = B * T, C = m->c.width;
  jmp_buf out_of_memory;
  if (setjmp(out_of_memory)) return -1;
  if (weight && model_gradients(m)) return -1;
  arena_begin(&m->arena, &out_of_memory);
  arena_begin(&teacher->arena, &out_of_memory);
  Rows rows = {.prev = prev};
  Call k = begin_call(m, NULL, ids, &rows, 0, NULL, 0, B, T);
  Side side[] = {{.m = m, .k = k}, {.m = teacher, .k = k}}, *lead = own ? side : side + 1;
  side[1].k.m = teacher;
  float *error = take(&m->arena, n * M * sizeof *error), *w = weight ? take(&m->arena, n * M * sizeof *w) : NULL;
  if (w) device_push(w, weight, n * M * sizeof *w);
  real *x = reals(&m->arena, M * C);
  embedding_forward(x, matrix(lead->m->top + EMBED, 0), k.ids, M, C);
  for (size_t l = 0, i = 0; i < n; l++) {
    const int aligned = l == (size_t)layer[i], last = aligned && i + 1 == n;
    const Mark before[] = {mark(&m->arena), mark(&teacher->arena)};
    for (int mlp = 0; mlp < 2; mlp++) {
      for (Side *a = side; a < side + 2; a++)
        if ((aligned && mlp <= hidden) || (a == lead && !last)) add_half(a, l, x, mlp);
      if (!aligned || mlp != hidden) continue;
      squared_error_forward(error + i * M, side[0].d, side[1].d, M, C);
      if (!w) continue;
      real *dh = reals(&m->arena, M * C);
      squared_error_backward(dh, w + i * M, side[0].d, side[1].d, M, C);
      if (mlp) mlp_backward(m, &side->k, l, &side->s, dh);
      mix_backward(m, &side->k, l, &side->s, dh, 0);
    }
    if (!last) accumulate(x, lead->d, M * C);
    for (int j = 0; j < 2; j++) release(&side[j].m->arena, before[j]);
    i += aligned;
  }
  device_pull(errors, error, n * M * sizeof *errors);
  return 0;
}

int model_top(Model *m, int32_t *top, float *log_probs, float *tail, const int32_t *ids, const int32_t *prev, float tau, size_t J, size_t B,
              size_t T) {
  const size_t M = B * T;
  jmp_buf out_of_memory;
  if (setjmp(out_of_memory)) return -1;
  Rows rows = {.prev = prev};
  Arena *a = &m->arena;
  arena_begin(a, &out_of_memory);
  Call k = begin_call(m, NULL, ids, &rows, 0, NULL, 0, B, T);
  real *h = run_layers(m, &k, NULL, 0), *normed = final_hidden(m, &k, h);
  int32_t *device_top = take(a, M * J * sizeof *top);
  float *device_probs = take(a, M * J * sizeof *log_probs), *device_tail = take(a, M * sizeof *tail);
  top_log_probs(device_top, device_probs, device_tail, normed, matrix(head(m), 0), tau, M, m->c.width, m->c.vocab, J);
  device_pull(top, device_top, M * J * sizeof *top);
  device_pull(log_probs, device_probs, M * J * sizeof *log_probs);
  device_pull(tail, device_tail, M * sizeof *tail);
  return 0;
}
