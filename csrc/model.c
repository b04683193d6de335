/* model.c - forward, backward, loss, alignment. params.c has the parameters and the optimiser's step, decode.c the State. */
#include "model.h"

#include <stdlib.h>

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
  Mark before = arena_mark(&m->arena);
  const real *u = s->in; /* few tokens: the mixer's products take the norm along */
  if (!k->few) {
    real *normed = reals(&m->arena, k->M * m->c.width);
    rmsnorm_forward(normed, s->in, vector(m->layer[l] + NORM1), m->c.eps, k->M, m->c.width);
    u = normed;
  }
  MIXER[m->kind[l]].forward(k, l, &s->acts, to, u);
  arena_release(&m->arena, before);
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
  Mark before = arena_mark(&m->arena);
  real *u = reals(&m->arena, M * C);
  rmsnorm_forward(u, s->mid, vector(p + NORM2), m->c.eps, M, C);
  linear_forward(s->gate, u, matrix(p + GATE, 0), vector(p + BGATE), 0, k->B, k->T, C, F);
  linear_forward(s->up, u, matrix(p + UP, 0), vector(p + BUP), 0, k->B, k->T, C, F);
  if (to) {
    real *act = to == s->mid ? s->gate : reals(&m->arena, M * F); /* nothing is kept where all is one array */
    swiglu_forward(act, s->gate, s->up, M * F);
    linear_forward(to, act, matrix(p + DOWN, 0), vector(p + BDOWN), 1, k->B, k->T, F, C);
  }
  arena_release(&m->arena, before);
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
  Mark before = arena_mark(&m->arena);
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
  arena_release(&m->arena, before);
}

/* dh: in the gradient of mid, out that of in; `through` 0: only the parameters' gradients are wanted, dh is spent. */
static void mix_backward(Model *m, Call *k, size_t l, const Saved *s, real *dh, int through) {
  const Param *norm = m->layer[l] + NORM1;
  const size_t C = m->c.width, M = k->M;
  Mark before = arena_mark(&m->arena);
  real *u = reals(&m->arena, M * C), *du = through || gradient(m, norm) ? reals(&m->arena, M * C) : NULL;
  rmsnorm_forward(u, s->in, vector(norm), m->c.eps, M, C);
  MIXER[m->kind[l]].backward(k, l, &s->acts, du, dh, u, &m->arena);
  if (du) rmsnorm_backward(through ? dh : NULL, gradient(m, norm), du, s->in, vector(norm), m->c.eps, 1, M, C);
  arena_release(&m->arena, before);
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
    Mark before = arena_mark(&m->arena);
    if (saved && recompute) s->mid = out;
    layer_layout(m, l, s, k->M);
    layer_forward(m, k, l, s, out);
    if (!saved || recompute) arena_release(&m->arena, before);
    h = out;
  }
  return h;
}

static size_t first_trained(const Model *m) {
  if (learns(m, m->top + EMBED)) return 0;
  for (size_t l = 0; l < m->c.layers; l++)
    for (int i = 0; i < PARAM_KINDS; i++)
      if (learns(m, &m->layer[l][i])) return l;
  return m->c.layers;
}

static void layers_backward(Model *m, Call *k, Saved *saved, real *dh, int recompute) {
  for (size_t l = m->c.layers, end = first_trained(m); l-- > end;) {
    Mark before = arena_mark(&m->arena);
    if (recompute) {
      saved[l].mid = reals(&m->arena, k->M * m->c.width);
      layer_layout(m, l, saved + l, k->M);
      layer_forward(m, k, l, saved + l, NULL);
    }
    gradients_open(m, m->layer[l], PARAM_KINDS);
    mlp_backward(m, k, l, saved + l, dh);
    mix_backward(m, k, l, saved + l, dh, 1);
    gradients_close(m, m->layer[l], PARAM_KINDS);
    arena_release(&m->arena, before);
  }
  Param *embed = m->top + EMBED;
  Mark before = arena_mark(&m->arena);
  gradients_open(m, embed, 1);
  if (learns(m, embed)) embedding_backward(gradient(m, embed), dh, k->ids, k->M, m->c.width);
  gradients_close(m, embed, 1);
  arena_release(&m->arena, before);
}

Param *head(const Model *m) { return (Param *)m->top + (m->c.tied ? EMBED : HEAD); }

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
    Param *out_of = head(m);
    Mark before = arena_mark(a);
    gradients_open(m, out_of, 1);
    lm_loss_backward(losses, losses + M, dnormed, gradient(m, out_of), normed, w, device_target, t, weight, weight + M, tau, kind, M, C, V);
    gradients_close(m, out_of, 1);
    arena_release(a, before);
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
    Mark before = arena_mark(&m->arena);
    layer_layout(m, l, &s, k.M);
    mix_forward(m, &k, l, &s, h);
    if (mid && l == (size_t)layer[i]) pull_floats(out + i++ * size, h, size);
    mlp_forward(m, &k, l, &s, h);
    arena_release(&m->arena, before);
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
    const Mark before[] = {arena_mark(&m->arena), arena_mark(&teacher->arena)};
    for (int mlp = 0; mlp < 2; mlp++) {
      for (Side *a = side; a < side + 2; a++)
        if ((aligned && mlp <= hidden) || (a == lead && !last)) add_half(a, l, x, mlp);
      if (!aligned || mlp != hidden) continue;
      squared_error_forward(error + i * M, side[0].d, side[1].d, M, C);
      if (!w) continue;
      real *dh = reals(&m->arena, M * C);
      squared_error_backward(dh, w + i * M, side[0].d, side[1].d, M, C);
      gradients_open(m, m->layer[l], PARAM_KINDS);
      if (mlp) mlp_backward(m, &side->k, l, &side->s, dh);
      mix_backward(m, &side->k, l, &side->s, dh, 0);
      gradients_close(m, m->layer[l], PARAM_KINDS);
    }
    if (!last) accumulate(x, lead->d, M * C);
    for (int j = 0; j < 2; j++) arena_release(&side[j].m->arena, before[j]);
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
