/* transfer.c - attention to other mixers: what is copied from where, and what starts fresh. Host work, once a conversion. */
#include "model.h"

/* What a Mamba layer takes from attention: v -> x, k -> B, q -> C, o -> out. `to` is the first row, in units below. */
enum { AT_0, AT_D, AT_DE, AT_DEE };
static const struct {
  int mixer, dst, to, src;
} COPIES[] = {
    {MAMBA1, M1X, AT_0, WV},    {MAMBA1, M1B, AT_0, WK},   {MAMBA1, M1C, AT_0, WQ},   {MAMBA1, M1OUT, AT_0, WO},
    {MAMBA2, M2IN, AT_D, WV},   {MAMBA2, M2IN, AT_DE, WK}, {MAMBA2, M2IN, AT_DEE, WQ}, {MAMBA2, M2OUT, AT_0, WO},
};

/* What starts fresh (jxiw/MambaInLlama, hybrid_wrapper.py). FAN_IN: U(-b^-1/2, b^-1/2), b the columns. */
enum { FAN_IN = 100 };
static const struct {
  int param, how;
  float a, b;
} FRESH[] = {
    {M1X, FAN_IN, 0, 0},       {M1Z, FAN_IN, 0, 0},          {M1B, FAN_IN, 0, 0},
    {M1C, FAN_IN, 0, 0},       {M1DOWN, FAN_IN, 0, 0},       {M1DT, FAN_IN, 0, 0},
    {M1OUT, FAN_IN, 0, 0},     {M1DTB, FILL_DT, 1e-3f, 0.1f}, {M1A, FILL_LOG_INDEX, 0, SCAN_STATE},
    {M1D, FILL_CONSTANT, 1, 0}, {M1CONV, FAN_IN, 0, 0},      {M1CONVB, FILL_UNIFORM, -0.5f, 0.5f},
    {M2IN, FAN_IN, 0, 0},      {M2OUT, FAN_IN, 0, 0},        {M2DTB, FILL_DT, 1e-3f, 0.1f},
    {M2A, FILL_LOG_UNIFORM, 1, 16}, {M2D, FILL_CONSTANT, 1, 0}, {M2NORM, FILL_CONSTANT, 1, 0},
    {M2CONV, FAN_IN, 0, 0},    {M2CONVB, FILL_UNIFORM, -0.5f, 0.5f},
};

static void fill_fresh(Param *p, size_t layer, uint64_t seed) {
  for (size_t i = 0; i < sizeof FRESH / sizeof *FRESH; i++) {
    Param *q = p + FRESH[i].param;
    if (!q->name) continue;
    float bound = 1 / sqrtf((float)q->b);
    int fan = FRESH[i].how == FAN_IN;
    fill(q->buffer->data, q->type, fan ? FILL_UNIFORM : FRESH[i].how, fan ? -bound : FRESH[i].a, fan ? bound : FRESH[i].b, seed,
         (uint32_t)(layer * PARAM_KINDS + (size_t)FRESH[i].param), q->n);
  }
}

int model_convert(Model *m, size_t layer, int mixer, int init, uint64_t seed, size_t window, size_t sinks) {
  const size_t D = m->c.heads * m->c.head_dim, E = m->c.kv_heads * m->c.head_dim, first[] = {0, D, D + E, D + 2 * E};
  Param *p = m->layer[layer], old[4] = {{0}};
  for (int i = 0; i < 4; i++) { /* WQ WK WV WO: held while the attention goes */
    old[i] = (Param){.type = p[WQ + i].type, .b = p[WQ + i].b, .a = p[WQ + i].a};
    param_share(old + i, p + WQ + i);
  }
  int failed = model_set_kind(m, layer, mixer);
  if (!failed) fill_fresh(p, layer, seed);
  if (mixer == WINDOW) m->window[layer] = window, m->c.sinks = sinks;
  for (size_t i = 0; i < sizeof COPIES / sizeof *COPIES && !failed && init; i++) {
    if (COPIES[i].mixer != mixer) continue;
    Param *dst = p + COPIES[i].dst, *src = old + (COPIES[i].src - WQ);
    if (dst->a == src->a && dst->type == src->type)
      param_share(dst, src); /* the whole matrix: the teacher's own buffer, until it is written */
    else
      copy_rows(dst->buffer->data, dst->type, first[COPIES[i].to], matrix(src, 0), 0, src->a, src->b);
  }
  for (int i = 0; i < 4; i++) param_release(old + i);
  return failed;
}

void model_randomize(Model *m, uint64_t seed, float std) {
  size_t layer;
  for (size_t i = 0; i < param_count(m); i++) {
    Param *p = param_at(m, i, &layer);
    if (!p->name) continue;
    int how = p->form == MATRIX ? FILL_NORMAL : FILL_CONSTANT, bias = strstr(p->name, "bias") != NULL;
    fill(p->buffer->data, p->type, how, how == FILL_NORMAL || bias ? 0 : 1, std, seed, (uint32_t)(i + 0x10000000), p->n);
  }
  for (size_t l = 0; l < m->c.layers; l++) fill_fresh(m->layer[l], l, seed);
}
