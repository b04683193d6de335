/* model.h - Config, Model, State: a decoder of L layers, each norm, mixer (attention, mamba1, mamba2, window, identity), norm, SwiGLU. */
#ifndef MIL_MODEL_H
#define MIL_MODEL_H
#include <setjmp.h>

#include "device.h"
#include "ops.h"

/* WINDOW is attention to the last window[l] tokens and the first `sinks`; IDENTITY adds nothing. */
enum { ATTENTION, MAMBA1, MAMBA2, WINDOW, IDENTITY, MIXERS };
enum { SCAN_STATE = 16, CONV = 4 }; /* Mamba-1's N; the width of every conv */

#define CONFIG_SIZES(X) \
  X(vocab) X(width) X(layers) X(heads) X(kv_heads) X(head_dim) X(mlp) X(tied) X(qkv_bias) X(o_bias) X(mlp_bias) X(qk_norm) \
  X(dt_bias_twice) X(sinks)
#define CONFIG_FLOATS(X) X(eps) X(norm_eps) X(rope_scale)
typedef struct {
#define X(name) size_t name;
  CONFIG_SIZES(X)
#undef X
#define X(name) float name;
  CONFIG_FLOATS(X)
#undef X
} Config;

/* The one list of parameters: id, which mixers have it (ALL: every layer, TOP: once a model, ATTENDS), when it exists, name, shape.
 * MATRIX (a,b) carries the model's dtype; VECTOR (a), TABLE (a,b) and FILTER (a,1,b) are float.
 * C width  D = heads*head_dim  E = kv_heads*head_dim  H heads  P head_dim  F mlp  V vocab  N SCAN_STATE  R dt rank  W CONV */
#define PARAMS(X)                                                                               \
  X(EMBED, TOP, 1, "model.embed_tokens.weight", MATRIX, V, C)                                   \
  X(NORM, TOP, 1, "model.norm.weight", VECTOR, C, 1)                                            \
  X(HEAD, TOP, !c->tied, "lm_head.weight", MATRIX, V, C)                                        \
  X(NORM1, ALL, 1, "input_layernorm.weight", VECTOR, C, 1)                                      \
  X(WQ, ATTENDS, 1, "self_attn.q_proj.weight", MATRIX, D, C)                                    \
  X(WK, ATTENDS, 1, "self_attn.k_proj.weight", MATRIX, E, C)                                    \
  X(WV, ATTENDS, 1, "self_attn.v_proj.weight", MATRIX, E, C)                                    \
  X(WO, ATTENDS, 1, "self_attn.o_proj.weight", MATRIX, C, D)                                    \
  X(BQ, ATTENDS, c->qkv_bias, "self_attn.q_proj.bias", VECTOR, D, 1)                            \
  X(BK, ATTENDS, c->qkv_bias, "self_attn.k_proj.bias", VECTOR, E, 1)                            \
  X(BV, ATTENDS, c->qkv_bias, "self_attn.v_proj.bias", VECTOR, E, 1)                            \
  X(BO, ATTENDS, c->o_bias, "self_attn.o_proj.bias", VECTOR, C, 1)                              \
  X(NORMQ, ATTENDS, c->qk_norm, "self_attn.q_norm.weight", VECTOR, P, 1)                        \
  X(NORMK, ATTENDS, c->qk_norm, "self_attn.k_norm.weight", VECTOR, P, 1)                        \
  X(M1X, 1 << MAMBA1, 1, "mamba.in_proj_x.weight", MATRIX, E, C)                                \
  X(M1Z, 1 << MAMBA1, 1, "mamba.in_proj_z.weight", MATRIX, D, C)                                \
  X(M1B, 1 << MAMBA1, 1, "mamba.B_proj.weight", MATRIX, E, C)                                   \
  X(M1C, 1 << MAMBA1, 1, "mamba.C_proj.weight", MATRIX, D, C)                                   \
  X(M1DOWN, 1 << MAMBA1, 1, "mamba.dt_proj_down.weight", MATRIX, R, C)                          \
  X(M1DT, 1 << MAMBA1, 1, "mamba.dt_proj.weight", MATRIX, D, R)                                 \
  X(M1DTB, 1 << MAMBA1, 1, "mamba.dt_proj.bias", VECTOR, D, 1)                                  \
  X(M1A, 1 << MAMBA1, 1, "mamba.A_log", TABLE, D, N)                                            \
  X(M1D, 1 << MAMBA1, 1, "mamba.D", VECTOR, D, 1)                                               \
  X(M1CONV, 1 << MAMBA1, 1, "mamba.conv1d.weight", FILTER, D, W)                                \
  X(M1CONVB, 1 << MAMBA1, 1, "mamba.conv1d.bias", VECTOR, D, 1)                                 \
  X(M1OUT, 1 << MAMBA1, 1, "mamba.out_proj.weight", MATRIX, C, D)                               \
  X(M2IN, 1 << MAMBA2, 1, "mamba.in_proj.weight", MATRIX, D + E + E + D + H, C) /* z x B C dt */ \
  X(M2DTB, 1 << MAMBA2, 1, "mamba.dt_bias", VECTOR, H, 1)                                       \
  X(M2A, 1 << MAMBA2, 1, "mamba.A_log", VECTOR, H, 1)                                           \
  X(M2D, 1 << MAMBA2, 1, "mamba.D", VECTOR, H, 1)                                               \
  X(M2CONV, 1 << MAMBA2, 1, "mamba.conv1d.weight", FILTER, E + E + D, W) /* x B C */            \
  X(M2CONVB, 1 << MAMBA2, 1, "mamba.conv1d.bias", VECTOR, E + E + D, 1)                         \
  X(M2NORM, 1 << MAMBA2, 1, "mamba.norm.weight", VECTOR, D, 1)                                  \
  X(M2OUT, 1 << MAMBA2, 1, "mamba.out_proj.weight", MATRIX, C, D)                               \
  X(NORM2, ALL, 1, "post_attention_layernorm.weight", VECTOR, C, 1)                             \
  X(GATE, ALL, 1, "mlp.gate_proj.weight", MATRIX, F, C)                                         \
  X(UP, ALL, 1, "mlp.up_proj.weight", MATRIX, F, C)                                             \
  X(DOWN, ALL, 1, "mlp.down_proj.weight", MATRIX, C, F)                                         \
  X(BGATE, ALL, c->mlp_bias, "mlp.gate_proj.bias", VECTOR, F, 1)                                \
  X(BUP, ALL, c->mlp_bias, "mlp.up_proj.bias", VECTOR, F, 1)                                    \
  X(BDOWN, ALL, c->mlp_bias, "mlp.down_proj.bias", VECTOR, C, 1)
enum { MATRIX, VECTOR, TABLE, FILTER };
enum { TOP = 0, ALL = (1 << MIXERS) - 1, ATTENDS = 1 << ATTENTION | 1 << WINDOW };
enum {
#define X(id, mixers, when, name, form, a, b) id,
  PARAMS(X)
#undef X
      PARAM_KINDS
};

typedef struct Buffer { /* refcounted: a student shares what it has not changed with its teacher, DLPack's consumers what they read */
  int refs;      /* atomic: a consumer may be any thread */
  void *data;
} Buffer;

typedef struct {
  const char *name; /* NULL: this model has no such parameter */
  int form, type;   /* type: FLOAT32 | BFLOAT16 */
  size_t a, b, n;
  Buffer *buffer;
  int trainable;
  size_t gradient;       /* offset among the gradients of its dtype */
  float *wide;           /* a bf16 gradient while kernels add to it (gradients_open) */
  int moments;           /* their type: FLOAT32 | BFLOAT16 */
  void *m, *v;           /* AdamW's moments. NULL before the first step */
  float *master;         /* float weights where the matrix is bf16; with the moments */
  size_t first, held;    /* which elements m, v and master are of */
} Param;

/* Bump allocator of activations: blocks while a call grows, one block of the peak from the next call on. */
typedef struct {
  struct Block *block;
  size_t used, peak;
  jmp_buf *out_of_memory;
} Arena;
typedef struct {
  struct Block *block;
  size_t used, total;
} Mark;

typedef struct {
  Config c;
  int type; /* of matrices */
  int *kind;
  size_t *window;
  float *inv_freq;      /* device, head_dim/2 */
  Param top[3];
  Param (*layer)[PARAM_KINDS];
  int half_gradients;   /* those of bf16 matrices are kept in bf16 */
  void *gradients;      /* of all trainable parameters, first the `halves` bf16 ones, then the `floats`; NULL before the first backward */
  size_t halves, floats; /* multiples of 16 ranks */
  size_t rank, ranks;    /* of a job that shares the optimiser out: this one's is the rank-th of equal parts of either */
  Arena arena;
  unsigned version; /* moves with every buffer: recorded calls point into them */
} Model;

/* One layer's memory of a slot: `rows` entries of row_bytes. turns > 0: an entry a position; the last `turns` entries are taken in turn
 * by the positions that are beyond those before. masked: what no position has written is never read, whatever it holds. */
typedef struct {
  void *data;
  size_t rows, row_bytes, turns;
  int masked;
} Cache;
enum { MOST_CACHES = 7 };

typedef struct {
  size_t slots, capacity, layers;
  int32_t *pos, *pending, *seen; /* host (slots): committed tokens, pending tokens, committed tokens when checkpoints were written */
  Cache (*layer)[MOST_CACHES];
  struct Recorded *recorded; /* calls of few tokens that a GPU replays (decode.c) */
} State;

/* One call: what its layers need to know. Pointers are on the device. */
typedef struct {
  const Model *m;
  State *s;
  size_t B, T, M;
  int few; /* few tokens with a State: products take their norm along, and nothing is kept for a backward */
  Rows rows;
  int32_t *ids;
  const int32_t *position, *target; /* (M) */
  const int32_t *wanted;            /* (B*last) rows whose logits are asked for */
} Call;
typedef struct Saved Saved;  /* what a layer keeps for its backward */

/* What a mixer keeps from forward for its backward. */
enum { MOST_ACTS = 12 };
typedef struct {
  real *x[MOST_ACTS];
  float *lse;
} Acts;

/* mixer.c. u (M,C) is the normed input, or, for few tokens, h itself; forward adds the mixer's output to h; backward: du =, parameter gradients +=. */
typedef struct {
  const char *name;
  void (*layout)(const Model *m, size_t layer, Arena *arena, Acts *acts, size_t M);
  void (*caches)(const Model *m, size_t layer, size_t capacity, Cache *cache);
  void (*forward)(const Call *call, size_t layer, Acts *acts, real *h, const real *u);
  void (*backward)(Call *call, size_t layer, const Acts *acts, real *du, const real *dh, const real *u, Arena *arena);
} Mixer;
extern const Mixer MIXER[MIXERS];

/* params.c */
void *take(Arena *arena, size_t bytes);           /* 64-byte aligned; longjmps when there is no memory */
Mark arena_mark(const Arena *arena);
void arena_release(Arena *arena, Mark m);              /* what was taken since the mark */
void arena_begin(Arena *arena, jmp_buf *out_of_memory); /* a call starts: everything taken before is free */
Matrix matrix(const Param *p, size_t row);       /* from a row on */
const float *vector(const Param *p);             /* NULL where the model has none */
int learns(const Model *m, const Param *p);      /* it has a gradient */
float *gradient(const Model *m, const Param *p); /* what kernels add to; NULL: frozen or absent */
int half_gradient(const Model *m, const Param *p); /* it is kept in bf16 */
void *stored_gradient(const Model *m, const Param *p);
size_t gradient_bytes(const Model *m);           /* of all */
/* Around a backward through n parameters: their bf16 gradients are float in the arena, and are rounded back. */
void gradients_open(Model *m, Param *p, size_t n);
void gradients_close(Model *m, Param *p, size_t n);
Param *param_at(Model *m, size_t i, size_t *layer); /* every parameter, absent ones included: i < param_count */
size_t param_count(const Model *m);

int model_init(Model *m); /* from c, type, kind, window; 0, or -1: out of memory */
int model_clone(Model *m, const Model *from); /* shares every buffer; -1: out of memory, model_free it */
void model_free(Model *m);
int model_set_kind(Model *m, size_t layer, int kind); /* the old mixer's parameters go, the new one's are allocated, unset */
void model_share_mixer(Model *m, size_t layer, const Model *from); /* the layer's mixer becomes the other model's, of the same sizes */
void param_share(Param *to, const Param *from);
void param_release(Param *p);
Buffer *buffer_new(size_t bytes); /* one reference; NULL: out of memory */
Buffer *buffer_share(Buffer *b);
void buffer_release(Buffer *b);
int param_own(Param *p);     /* copy on write: afterwards the buffer is this parameter's alone; -1: out of memory */
/* The elements of a trainable parameter that lie in a rank's part of the arena; of a frozen one, all. */
typedef struct {
  size_t first, n;
} Range;
Range part_of(const Model *m, const Param *p, size_t rank);
/* Allocates m and v (zero) of type `moments` of this rank's part, if there are none or other ones, and master (the weights), if there is
 * none of that part; -1: out of memory. */
int param_moments(const Model *m, Param *p, int moments);
void param_master(Param *p); /* master is the weights again */
size_t param_bytes(const Param *p);
void param_set_trainable(Model *m, Param *p, int trainable);
void model_half_gradients(Model *m, int half); /* drops the gradients if they are kept otherwise */
int model_gradients(Model *m); /* lays out and zeroes the arena if the trainable set changed */
void model_share(Model *m, size_t rank, size_t ranks); /* drops moments and gradients if it is another part */
double model_squares(Model *m); /* sum of the squares of this rank's part of the gradients */
int model_step(Model *m, int moments, float lr, float b1, float b2, float eps, float decay, float gscale, size_t step); /* this rank's part */
/* After a step, through the arena, whose gradients are lost: out, this rank's part of the trainable weights, as they are stored, goes to
 * rank * n bytes of it; not out, those of the other ranks come from there. -> n, the same on every rank. */
size_t model_exchange(Model *m, int out);

/* model.c. losses: ce, then kl, of each position (2,M) host. Weights (M) host; gradient of sum wce ce + wkl kl when backward. KL to teacher, or to
 * what `top` has of one (ids, log_probs, tail, on the host), or neither (NULL, ids NULL). */
int model_loss(Model *m, Model *teacher, Teacher top, float *losses, const int32_t *ids, const int32_t *target, const float *wce,
               const float *wkl, const int32_t *prev, float tau, int kind, int backward, int recompute, size_t B, size_t T);

/* The residual stream (n,M,C) host: what goes into the layers `layer` (n, rising; `layers` is what comes out of the last), or with `mid`
 * what stands between their mixers and their MLPs. */
int model_hidden(Model *m, float *out, const int32_t *ids, const int32_t *layer, size_t n, int mid, const int32_t *prev, size_t B, size_t T);
/* Layer by layer, student m and teacher on the same input: errors (n,M) host, squared distances of what their mixers add to it, or with
 * `hidden` of what the layers do, in the layers `layer` (n, rising). The input is the teacher's own, or with `own` the student's. weight
 * (n,M) host: the gradient of sum weight errors goes to these layers of m, through nothing but the layer itself; NULL: none. */
int model_align(Model *m, Model *teacher, float *errors, const int32_t *ids, const int32_t *layer, size_t n, const float *weight, int hidden,
                int own, const int32_t *prev, size_t B, size_t T);
/* What a cache has of the model (ops.h, top_log_probs): ids, log_probs (M,J), tail (M), all on the host. */
int model_top(Model *m, int32_t *top, float *log_probs, float *tail, const int32_t *ids, const int32_t *prev, float tau, size_t J, size_t B,
              size_t T);

real *reals(Arena *arena, size_t n);
Call begin_call(Model *m, State *s, const int32_t *ids, const Rows *rows, int extend, const int32_t *target, size_t last, size_t B, size_t T);
real *run_layers(Model *m, const Call *k, Saved *saved, int recompute);
Param *head(const Model *m);

/* decode.c */
/* logits (B,n,V) host: of the last n of keep[b] tokens when last, else of all T. ids, keep, prev, slot on the host, as in Rows.
 * extend: the tokens follow the pending ones. 0, or -1 with device_error set. */
int model_logits(Model *m, State *s, float *logits, const int32_t *ids, const Rows *rows, int extend, int last, size_t n, size_t B,
                 size_t T);
/* One round of decoding for B rows: the draft (NULL: K = 0) proposes K tokens, the model reads the row's last token and these in one
 * call, accepts and draws one more (ops.h, verify), and both States commit. Everything is on the host. */
typedef struct {
  size_t B, K, U;
  const int32_t *slot, *last;          /* (B) the State's rows; the token that the model has not read yet */
  const int32_t *unread, *keep;        /* (B,U), (B) tokens that the draft has not read yet, `last` being the last of them */
  const int32_t *index, *at, *count;   /* (B) prompt, position of the round's first token, proposals that count */
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k, *seed;         /* seed (B,2): its low and high word */
} Round;
/* proposed (B,K)  accepted, token (B)  logits (B,K+1,V) or NULL */
int model_round(Model *m, State *s, Model *draft, State *draft_state, const Round *r, int32_t *proposed, int32_t *accepted, int32_t *token,
                float *logits);

int state_init(State *s, const Model *m);
void state_free(State *s);
void state_reset(State *s, size_t slot);
size_t state_read(const State *s, const Cache *c, size_t slot); /* how many of the slot's entries, the first ones, may be read */
void state_copy(State *s, size_t to, size_t from);
void state_commit(State *s, size_t slot, size_t n, const int32_t *path); /* path NULL: the first n pending */

/* transfer.c: a layer of `student` (attention) becomes `mixer`; init 1: from the attention's projections, 0: all fresh. WINDOW keeps the
 * attention's parameters; window and sinks are for it alone. */
int model_convert(Model *student, size_t layer, int mixer, int init, uint64_t seed, size_t window, size_t sinks);
void model_randomize(Model *m, uint64_t seed, float std);
#endif
