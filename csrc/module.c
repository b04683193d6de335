/* module.c - the extension's face: the generic op caller over optable.h, module set-up.
 *
 * Everything that comes from Python is checked here, once, and named in one sentence; below this file nobody checks. */
#define MODULE_MAIN
#include "module.h"

#include <stdio.h>
#include <time.h>

#include "blas.h"

/* ---- the op table --------------------------------------------------------------------------------------------------- */

enum { MOST_PARAMS = 24, MOST_DIMS = 4 };

typedef struct {
  void *data; /* NULL: absent. The array's own memory until lend_all, then what the op works on */
  void *host;
  size_t n;
  int type; /* a matrix's: FLOAT32 | BFLOAT16 */
  int given;
  double number;
  uint64_t integer; /* an @ scalar, exactly */
  PyObject *owner;  /* of memory that is not the caller's array: released when the call is over */
} Arg;

typedef struct {
  char name[16];
  char type; /* 0 real, % @ # */
  int in_place, optional, scalar, output, dims;
  char letter[MOST_DIMS + 1];
} Param;

typedef struct {
  const char *name, *spec, *rules;
  int ring;
  const char *doc;
  void (*thunk)(Arg *a, const size_t *n, Rows rows);
  int params, inputs;
  Param param[MOST_PARAMS];
} Op;

#define r(i) ((real *)a[i].data)
#define f(i) ((float *)a[i].data)
#define i32(i) ((int32_t *)a[i].data)
#define mat(i) ((Matrix){a[i].data, a[i].type})
#define num(i, otherwise) (a[i].given ? a[i].number : (otherwise))
#define whole(i, otherwise) (a[i].given ? a[i].integer : (otherwise))
#define ring(i) ((Ring){r(i), r(i + 2), f(i + 1)})
#define ROW(name, spec, rules, ring_rows, doc, call)         \
  static void call_##name(Arg *a, const size_t *n, Rows rows) { \
    (void)rows;                                              \
    (void)n;                                                 \
    call;                                                    \
  }
#include "optable.h"
#undef ROW
#define ROW(op, spec_, rules_, ring_, doc_, call) \
  {.name = #op, .spec = spec_, .rules = rules_, .ring = ring_, .doc = doc_, .thunk = call_##op},
static Op OPS[] = {
#include "optable.h"
};
#undef ROW
#undef r
#undef f
#undef i32
#undef mat
#undef num
#undef whole
#undef ring
enum { OP_COUNT = sizeof OPS / sizeof *OPS };

/* `name` marks `:letters` ... -> outputs. The specs are ours: no errors to report. */
static void parse_spec(Op *op) {
  const char *s = op->spec;
  int output = 0;
  op->params = op->inputs = 0;
  while (*s) {
    if (*s == ' ') {
      s++;
    } else if (s[0] == '-' && s[1] == '>') {
      output = 1;
      s += 2;
    } else {
      Param p = {.output = output};
      for (int i = 0; *s != ':'; s++) {
        if (*s == '%' || *s == '@' || *s == '#')
          p.type = *s;
        else if (*s == '!')
          p.in_place = 1;
        else if (*s == '?')
          p.optional = 1;
        else
          p.name[i++] = *s;
      }
      for (s++; *s && *s != ' '; s++)
        if (*s == '1')
          p.scalar = 1;
        else
          p.letter[p.dims++] = *s;
      op->inputs += !output;
      op->param[op->params++] = p;
    }
  }
}

static int find_param(const Op *op, const char *name) {
  for (int i = 0; i < op->params; i++)
    if (op->param[i].name[0] == *name && !strcmp(op->param[i].name, name)) return i;
  return -1;
}

/* ---- checks: each returns 0, or -1 with a sentence set ----------------------------------------------------------------- */

static const char *type_name(char type, int on_device) {
  if (on_device && !type) return sizeof(real) == 2 ? "bfloat16 on this device" : "float32";
  return type == '@' ? "int32" : type == '#' ? "float32 or uint16 (bf16 bits)" : "float32";
}

/* NumPy's array, or what DLPack describes. */
static int any_array(const Op *op, const Param *p, PyObject *value, Array *out) {
  if (!PyArray_Check(value)) {
    int found = read_dlpack(op->name, p->name, value, out);
    if (!found)
      PyErr_Format(PyExc_TypeError, "%s: argument '%s' must be a NumPy array or have __dlpack__, got %s", op->name, p->name, Py_TYPE(value)->tp_name);
    return found > 0 ? 0 : -1;
  }
  PyArrayObject *array = (PyArrayObject *)value;
  const int type = PyArray_TYPE(array);
  out->data = PyArray_DATA(array);
  out->dims = PyArray_NDIM(array);
  out->writable = PyArray_ISWRITEABLE(array);
  out->type = type == NPY_FLOAT32 ? FLOAT32 : type == NPY_UINT16 ? BFLOAT16 : type == NPY_INT32 ? INT32 : -1;
  out->contiguous = PyArray_IS_C_CONTIGUOUS(array) && PyArray_ISBEHAVED_RO(array);
  for (int d = 0; d < out->dims && d < MOST_AXES; d++) out->shape[d] = (size_t)PyArray_DIM(array, d);
  out->descr = (PyObject *)PyArray_DESCR(array);
  return 0;
}

static int read_scalar(const Op *op, const Param *p, PyObject *value, Arg *a) {
  a->given = 1;
  if (p->type == '@') {
    PyObject *integer = PyNumber_Index(value);
    a->integer = integer ? PyLong_AsUnsignedLongLong(integer) : 0;
    a->number = (double)a->integer;
    Py_XDECREF(integer);
    if (!PyErr_Occurred()) return 0;
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' must be an integer from 0 to 2^64 - 1, got %R", op->name, p->name, value);
    return -1;
  }
  a->number = PyFloat_AsDouble(value);
  if (PyErr_Occurred() || !isfinite(a->number)) {
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' must be a finite number, got %R", op->name, p->name, value);
    return -1;
  }
  return 0;
}

static int check_array(const Op *op, const Param *p, const Array *array, size_t *n, char *bound) {
  const int real_type = array->on_device && !p->type ? REAL_TYPE : FLOAT32, half = p->type == '#' && array->type == BFLOAT16;
  if (!half && array->type != (p->type == '@' ? INT32 : real_type)) {
    const char *wanted = type_name(p->type, array->on_device);
    if (array->descr)
      PyErr_Format(PyExc_ValueError, "%s: argument '%s' must be %s, got %S", op->name, p->name, wanted, array->descr);
    else
      PyErr_Format(PyExc_ValueError, "%s: argument '%s' must be %s, got %s", op->name, p->name, wanted, array->dtype);
    return -1;
  }
  if (!array->contiguous) {
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' must be a C-contiguous, aligned array %s", op->name, p->name,
                 array->on_device ? "(to 16 bytes)" : "in native byte order");
    return -1;
  }
  if (p->in_place && !array->writable) {
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' is written in place and must be writable", op->name, p->name);
    return -1;
  }
  if (array->dims != p->dims) {
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' must have %d axes (%s), got %d", op->name, p->name, p->dims, p->letter, array->dims);
    return -1;
  }
  for (int d = 0; d < p->dims; d++) {
    unsigned char letter = (unsigned char)p->letter[d];
    size_t size = array->shape[d];
    if (bound[letter] && n[letter] != size) {
      PyErr_Format(PyExc_ValueError, "%s: argument '%s' has size %zu on axis %d (%c), expected %zu", op->name, p->name, size, d,
                   letter, n[letter]);
      return -1;
    }
    bound[letter] = 1;
    n[letter] = size;
  }
  return 0;
}

/* Integers of the device, which are checked, come to the host. */
static int pull_integers(const Op *op, Arg *a, Array *array) {
  npy_intp count = (npy_intp)a->n;
  PyObject *copy = PyArray_SimpleNew(1, &count, NPY_INT32);
  if (!copy) return -1;
  device_lock();
  device_pull(PyArray_DATA((PyArrayObject *)copy), array->data, a->n * sizeof(int32_t));
  const char *failure = device_error();
  device_unlock();
  Py_SETREF(a->owner, copy);
  a->data = a->host = PyArray_DATA((PyArrayObject *)copy);
  return failure ? (raise_failure(op->name, failure), -1) : 0;
}

/* On the device already: there is no host's array to lend, and *on_device says so. */
static int read_array(const Op *op, const Param *p, PyObject *value, Arg *a, size_t *n, char *bound, int *on_device) {
  Array array = {0};
  if (any_array(op, p, value, &array)) return -1;
  a->owner = array.owner;
  if (check_array(op, p, &array, n, bound)) return -1;
  a->n = 1;
  for (int d = 0; d < array.dims; d++) a->n *= array.shape[d];
  a->type = p->type == '#' ? array.type : FLOAT32;
  a->given = 1;
  a->data = array.data;
  a->host = array.on_device ? NULL : array.data;
  *on_device |= array.on_device;
  return array.on_device && p->type == '@' ? pull_integers(op, a, &array) : 0;
}

/* Rules bind a letter that is not bound yet (d=k*n gives k from d and n). */
static int check_rules(const Op *op, size_t *n, char *bound) {
  for (const char *s = op->rules; *s; s += strcspn(s, " "), s += *s == ' ') {
    size_t *l = n + s[0], right;
    if (s[1] == '>') {
      if (*l > 0) continue;
      PyErr_Format(PyExc_ValueError, "%s: size %c must not be 0", op->name, s[0]);
      return -1;
    }
    if (s[1] == '%') {
      if (n[(int)s[2]] > 0 && *l % n[(int)s[2]] == 0) continue;
      PyErr_Format(PyExc_ValueError, "%s: size %c (%zu) must be a multiple of size %c (%zu)", op->name, s[0], *l, s[2],
                   n[(int)s[2]]);
      return -1;
    }
    if (s[3] == '+')
      right = n[(int)s[2]] + (size_t)(s[4] - '0');
    else
      right = (s[2] >= '0' && s[2] <= '9' ? (size_t)(s[2] - '0') : n[(int)s[2]]) * n[(int)s[4]];
    if (bound[(int)s[0]] && *l != right) {
      PyErr_Format(PyExc_ValueError, "%s: sizes must satisfy %.5s, got %c = %zu, expected %zu", op->name, s, s[0], *l, right);
      return -1;
    }
    *l = right;
  }
  return 0;
}

static int check_range(const Op *op, const Arg *a, const char *name, long long low, long long high, size_t count) {
  int i = find_param(op, name);
  if (i < 0 || !a[i].data) return 0;
  const int32_t *v = a[i].data;
  for (size_t k = 0; k < count; k++)
    if (v[k] < low || v[k] > high) {
      PyErr_Format(PyExc_ValueError, "%s: argument '%s' holds %d at flat index %zu, expected %lld to %lld", op->name, name,
                   (int)v[k], k, low, high);
      return -1;
    }
  return 0;
}

int check_rows(const char *what, const int32_t *slot, const int32_t *prev, int past, size_t B, size_t T, size_t S) {
  for (size_t b = 0; b < B && slot; b++)
    for (size_t c = 0; c < b; c++)
      if (slot[b] == slot[c]) {
        PyErr_Format(PyExc_ValueError, "%s: argument 'slot' names slot %d twice (rows %zu and %zu)", what, (int)slot[b], c, b);
        return -1;
      }
  if (!slot && S < B) {
    PyErr_Format(PyExc_ValueError, "%s: the state has %zu slots, expected at least the batch size %zu", what, S, B);
    return -1;
  }
  for (size_t m = 0; prev && m < B * T; m++) {
    long t = (long)(m % T), p = prev[m];
    if (p == t - 1 || (p == -2 && !past) || (past && T <= PENDING && p >= -1 && p < t)) continue;
    PyErr_Format(PyExc_ValueError,
                 !past          ? "%s: prev[%zu,%ld] is %ld, expected -2 or %ld (trees need a state and at most 32 tokens)"
                 : T <= PENDING ? "%s: prev[%zu,%ld] is %ld, expected -1 to %ld (documents cannot start inside a state)"
                                : "%s: prev[%zu,%ld] is %ld, expected %ld (more than 32 tokens with a state)",
                 what, m / T, t, p, t - 1);
    return -1;
  }
  return 0;
}

int check_top(const char *what, const int32_t *ids, size_t M, size_t J, size_t V) {
  size_t *met = calloc(V ? V : 1, sizeof *met), i = 0; /* the last row that has a token, from 1 on */
  if (!met) {
    PyErr_NoMemory();
    return -1;
  }
  for (; i < M * J; i++) {
    if (ids[i] < 0 || (size_t)ids[i] >= V || met[ids[i]] == i / J + 1) break;
    met[ids[i]] = i / J + 1;
  }
  free(met);
  if (i == M * J) return 0;
  PyErr_Format(PyExc_ValueError, "%s: argument 'ids' holds %d at flat index %zu, expected different tokens from 0 to %zu in a row of %zu",
               what, (int)ids[i], i, V - 1, J);
  return -1;
}

/* The cursors of the slots in use: seen <= committed <= pos, and a ring of R + PENDING tokens holds what lies between the checkpoint,
 * at floor(seen/R)*R, and pos, and between what is committed and the call's last token. */
static int check_cursors(const Op *op, Rows r, size_t B, size_t T) {
  for (size_t b = 0; b < B; b++) {
    size_t s = r.slot ? (size_t)r.slot[b] : b;
    long pos = r.pos ? r.pos[s] : 0, committed = r.committed ? r.committed[s] : 0, seen = r.seen ? r.seen[s] : 0;
    long checkpoint = seen / op->ring * op->ring;
    if (seen <= committed && committed <= pos && pos - committed + (T <= PENDING ? (long)T : 0) <= PENDING && committed - seen <= PENDING &&
        pos - checkpoint <= op->ring + PENDING)
      continue;
    PyErr_Format(PyExc_ValueError,
                 "%s: slot %zu has seen %ld, committed %ld, pos %ld: expected seen <= committed <= pos, at most %d between seen and "
                 "committed, at most %d pending with this call's %zu tokens, and at most %d between the checkpoint at %ld and pos",
                 op->name, s, seen, committed, pos, PENDING, PENDING, T, op->ring + PENDING, checkpoint);
    return -1;
  }
  return 0;
}

static int both_or_none(const Op *op, const Arg *a, const char *one, const char *other) {
  int i = find_param(op, one), j = find_param(op, other);
  if (i < 0 || j < 0 || !a[i].data == !a[j].data) return 0;
  PyErr_Format(PyExc_ValueError, "%s: arguments '%s' and '%s' go together, got one of them", op->name, one, other);
  return -1;
}

static int has(const Op *op, const Arg *a, const char *name) {
  int i = find_param(op, name);
  return i >= 0 && a[i].data;
}

static Rows rows_of(const Op *op, const Arg *a) {
  Rows rows = {0};
  const char *members[] = {"slot", "keep", "prev", "pos", "committed", "seen"};
  const int32_t **member[] = {&rows.slot, &rows.keep, &rows.prev, &rows.pos, &rows.committed, &rows.seen};
  for (int k = 0; k < 6; k++) {
    int i = find_param(op, members[k]);
    if (i >= 0) *member[k] = a[i].data;
  }
  return rows;
}

static int check_values(const Op *op, const Arg *a, const size_t *n, const char *bound) {
  size_t B = n['b'], T = n['t'], S = bound['s'] ? n['s'] : B;
  long long far = 1 << 30;
  if (both_or_none(op, a, "kcache", "vcache") || both_or_none(op, a, "ring_x", "ring_dt") ||
      both_or_none(op, a, "ring_x", "ring_B") || both_or_none(op, a, "th", "tw") ||
      both_or_none(op, a, "ids", "log_probs") || both_or_none(op, a, "ids", "tail"))
    return -1;
  int past = has(op, a, "ring_x") || has(op, a, "kcache") || has(op, a, "cache");
  if (has(op, a, "ring_x")) {
    if (!has(op, a, "state")) {
      PyErr_Format(PyExc_ValueError, "%s: a ring needs argument 'state'", op->name);
      return -1;
    }
    if (n['r'] != (size_t)op->ring + PENDING) {
      PyErr_Format(PyExc_ValueError, "%s: the ring must hold %d tokens (axis r), got %zu", op->name, op->ring + PENDING, n['r']);
      return -1;
    }
  }
  size_t least = has(op, a, "kcache") ? PENDING + 1 : has(op, a, "cache") ? n['w'] - 1 + PENDING : 0;
  int sinks = has(op, a, "kcache") ? find_param(op, "sinks") : -1;
  if (sinks >= 0 && a[find_param(op, "window")].integer) least += (size_t)fmin(a[sinks].number, (double)far);
  if (least && n['l'] < least) {
    PyErr_Format(PyExc_ValueError, "%s: the cache must hold at least %zu tokens (axis l), got %zu", op->name, least, n['l']);
    return -1;
  }
  if (!strncmp(op->name, "conv1d", 6)) {
    int block = find_param(op, "block");
    uint64_t width = a[block].given ? a[block].integer : 1;
    if (n['x'] != n['d'] && (!width || n['x'] % width)) {
      PyErr_Format(PyExc_ValueError, "%s: argument 'block' must divide size x (%zu)", op->name, n['x']);
      return -1;
    }
  }
  long long last = (long long)n['v'] - 1, tokens = (long long)T;
  if (check_range(op, a, "ids", 0, last, B * T) || check_range(op, a, "target", INT32_MIN, last, n['m']) ||
      check_range(op, a, "draft", 0, last, B * n['k']) || check_range(op, a, "count", 0, (long long)n['k'], B) ||
      check_range(op, a, "top_k", 0, INT32_MAX, B) || check_range(op, a, "slot", 0, (long long)S - 1, B) ||
      check_range(op, a, "keep", 0, tokens, B) || check_range(op, a, "pos", 0, far, S) ||
      check_range(op, a, "committed", 0, far, S) || check_range(op, a, "seen", 0, far, S) ||
      check_range(op, a, "position", 0, far, !strcmp(op->name, "uniform") ? B : B * T))
    return -1;
  int known = find_param(op, "log_probs");
  if (known >= 0 && op->param[known].in_place && n['j'] > n['v']) {
    PyErr_Format(PyExc_ValueError, "%s: size j (%zu) must be at most size v (%zu)", op->name, n['j'], n['v']);
    return -1;
  }
  if (known >= 0 && !op->param[known].in_place && a[known].data &&
      check_top(op->name, a[find_param(op, "ids")].data, n['m'], n['j'], n['v']))
    return -1;
  int i = find_param(op, "to"), kind = find_param(op, "kind");
  if (i >= 0 && (a[i].number + a[i + 2].number > (double)n['n'] || a[i + 1].number + a[i + 2].number > (double)n['m'])) {
    PyErr_Format(PyExc_ValueError, "%s: rows %zu of src to row %zu of dst do not fit (%zu and %zu rows)", op->name,
                 (size_t)a[i + 1].integer, (size_t)a[i].integer, n['m'], n['n']);
    return -1;
  }
  if (kind >= 0 && a[kind].integer > JENSEN_SHANNON) {
    PyErr_Format(PyExc_ValueError, "%s: argument 'kind' must be 0 (forward), 1 (reverse) or 2 (Jensen-Shannon)", op->name);
    return -1;
  }
  int silu = find_param(op, "silu");
  if (silu >= 0 && a[silu].integer > 1) {
    PyErr_Format(PyExc_ValueError, "%s: argument 'silu' must be 0 or 1", op->name);
    return -1;
  }
  int step = find_param(op, "step");
  if (step >= 0 && !a[step].integer) {
    PyErr_Format(PyExc_ValueError, "%s: argument 'step' counts from 1, got 0", op->name);
    return -1;
  }
  int first = find_param(op, "first");
  if (first >= 0 && a[first].integer % 4) {
    PyErr_Format(PyExc_ValueError, "%s: argument 'first' must be a multiple of 4", op->name);
    return -1;
  }
  if (step >= 0 && a[1].type != a[2].type) {
    PyErr_Format(PyExc_ValueError, "%s: arguments 'm' and 'v' must be of one dtype", op->name);
    return -1;
  }
  i = find_param(op, "temperature");
  if ((kind >= 0 || known >= 0) && a[i].given && a[i].number <= 0) {
    PyErr_Format(PyExc_ValueError, "%s: argument 'temperature' must be positive", op->name);
    return -1;
  }
  int prev = find_param(op, "prev"), slot = find_param(op, "slot");
  if (prev < 0) return 0;
  if (check_rows(op->name, slot >= 0 ? a[slot].data : NULL, a[prev].data, past, B, T, S)) return -1;
  return has(op, a, "ring_x") ? check_cursors(op, rows_of(op, a), B, T) : 0;
}

PyObject *raise_failure(const char *where, const char *failure) {
  return PyErr_Format(strstr(failure, "out of memory") ? PyExc_MemoryError : PyExc_RuntimeError, "%s: %s", where, failure);
}

/* ---- the generic caller ------------------------------------------------------------------------------------------------ */

static PyObject *new_output(const Op *op, const Param *p, Arg *a, const size_t *n, int on_device) {
  if (p->optional && !has(op, a - (p - op->param), p->name + 1)) Py_RETURN_NONE;
  npy_intp shape[MOST_DIMS];
  for (int d = 0; d < p->dims; d++) shape[d] = (npy_intp)n[(unsigned char)p->letter[d]];
  if (on_device) return tensor_result(p->type == '@' ? INT32 : p->type ? FLOAT32 : REAL_TYPE, p->dims, shape, &a->data);
  PyObject *array = PyArray_SimpleNew(p->dims, shape, p->type == '@' ? NPY_INT32 : NPY_FLOAT32);
  if (array) a->data = a->host = PyArray_DATA((PyArrayObject *)array), a->n = (size_t)PyArray_SIZE((PyArrayObject *)array);
  return array;
}

static size_t item_size(const Param *p, const Arg *a) { return p->type == '#' && a->type == BFLOAT16 ? 2 : 4; }

/* From the arrays to where the op computes, and back. */
static void lend_all(const Op *op, Arg *a) {
  for (int i = 0; i < op->params; i++)
    if (a[i].host) a[i].data = device_lend(a[i].host, a[i].n, item_size(op->param + i, a + i), !op->param[i].type, !op->param[i].output);
}
static void return_all(const Op *op, Arg *a) {
  for (int i = 0; i < op->params; i++) {
    const Param *p = op->param + i;
    if (a[i].host) device_return(a[i].host, a[i].data, a[i].n, item_size(p, a + i), !p->type, p->output || p->in_place);
  }
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of one of `repeat` calls in a row: what a GPU does is recorded, so that the host does not slow it down. */
static double time_calls(const Op *op, Arg *a, const size_t *n, Rows rows, size_t repeat) {
  Recording *r = recording_new();
  double start = 0;
  op->thunk(a, n, rows);
  recording_begin();
  for (size_t i = 0; i < repeat; i++) op->thunk(a, n, rows);
  recording_end(r);
  for (int timed = 0; timed < 2; timed++) {
    device_pull(NULL, NULL, 0); /* waits */
    start = now();
    if (!recording_play(r))
      for (size_t i = 0; i < repeat; i++) op->thunk(a, n, rows);
    device_pull(NULL, NULL, 0);
  }
  double seconds = (now() - start) / (double)repeat;
  recording_free(r);
  return seconds;
}

/* repeat 0: the op's results; else the seconds of a call. */
static PyObject *run_op(const Op *op, PyObject *const *args, Py_ssize_t positional, PyObject *names, size_t repeat) {
  PyObject *value[MOST_PARAMS] = {0}, *out[MOST_PARAMS] = {0}, *result = NULL;
  Arg a[MOST_PARAMS] = {0};
  size_t n[128] = {0};
  char bound[128] = {0};
  double seconds = 0;
  int on_device = 0; /* an argument is there: results stay there */
  if (positional > op->inputs)
    return PyErr_Format(PyExc_TypeError, "%s: takes %d arguments, got %zd", op->name, op->inputs, positional);
  for (Py_ssize_t i = 0; i < positional; i++) value[i] = args[i];
  for (Py_ssize_t k = 0; names && k < PyTuple_GET_SIZE(names); k++) {
    PyObject *name = PyTuple_GET_ITEM(names, k);
    const char *text = PyUnicode_AsUTF8(name);
    int i = text ? find_param(op, text) : -1;
    if (i < 0 || i >= op->inputs) return PyErr_Format(PyExc_TypeError, "%s: unknown argument '%U'; it takes %s", op->name, name, op->spec);
    if (value[i]) return PyErr_Format(PyExc_TypeError, "%s: argument '%U' given twice", op->name, name);
    value[i] = args[positional + k];
  }
  for (int i = 0; i < op->inputs; i++) {
    const Param *p = op->param + i;
    if (!value[i] || value[i] == Py_None) {
      if (p->optional) continue;
      PyErr_Format(PyExc_TypeError, "%s: argument '%s' is missing", op->name, p->name);
      goto done;
    }
    if (p->scalar ? read_scalar(op, p, value[i], a + i) : read_array(op, p, value[i], a + i, n, bound, &on_device)) goto done;
  }
  if (check_rules(op, n, bound) || check_values(op, a, n, bound)) goto done;
  for (int i = op->inputs; i < op->params; i++)
    if (!(out[i] = new_output(op, op->param + i, a + i, n, on_device))) goto done;
  const char *failure;
  Py_BEGIN_ALLOW_THREADS
  device_lock();
  lend_all(op, a);
  if (!(failure = device_error())) {
    if (repeat)
      seconds = time_calls(op, a, n, rows_of(op, a), repeat);
    else
      op->thunk(a, n, rows_of(op, a));
  }
  return_all(op, a);
  if (on_device) device_pull(NULL, NULL, 0); /* waits: the arguments' owners may do with them what they like */
  if (!failure) failure = device_error();
  device_unlock();
  Py_END_ALLOW_THREADS
  if (failure) {
    raise_failure(op->name, failure);
    goto done;
  }
  if (repeat) {
    result = PyFloat_FromDouble(seconds);
  } else if (op->params - op->inputs == 1) {
    result = Py_NewRef(out[op->inputs]);
  } else if (op->params == op->inputs) {
    result = Py_NewRef(Py_None);
  } else if ((result = PyTuple_New(op->params - op->inputs))) {
    for (int i = op->inputs; i < op->params; i++) PyTuple_SET_ITEM(result, i - op->inputs, Py_NewRef(out[i]));
  }
done:
  for (int i = 0; i < op->params; i++) {
    Py_XDECREF(out[i]);
    Py_XDECREF(a[i].owner);
  }
  return result;
}

static PyObject *call_op(PyObject *self, PyObject *const *args, Py_ssize_t positional, PyObject *names) {
  const Op *op = PyCapsule_GetPointer(self, NULL);
  return op ? run_op(op, args, positional, names, 0) : NULL;
}

static PyObject *py_time_op(PyObject *self, PyObject *const *args, Py_ssize_t positional, PyObject *names) {
  (void)self;
  const char *name = positional == 2 ? PyUnicode_AsUTF8(args[0]) : NULL;
  long repeat = name ? PyLong_AsLong(args[1]) : 0;
  for (int i = 0; name && i < OP_COUNT && repeat > 0; i++)
    if (!strcmp(OPS[i].name, name)) return run_op(OPS + i, args + 2, 0, names, (size_t)repeat);
  return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "time_op: expected the name of an op, a positive count, and the op's arguments by name");
}

/* ---- the module ------------------------------------------------------------------------------------------------------------ */

static PyObject *py_workers(PyObject *self, PyObject *none) {
  (void)self;
  (void)none;
  return PyLong_FromSize_t(workers());
}

/* Whether this processor has an x86-64 level; the base module alone answers, before any other is imported. */
static PyObject *py_supports(PyObject *self, PyObject *level) {
  (void)self;
  const char *name = PyUnicode_AsUTF8(level);
  if (!name) return NULL;
  int has = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!strcmp(name, "x86-64-v3")) has = v3;
  if (!strcmp(name, "x86-64-v4"))
    has = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return PyBool_FromLong(has);
}

static PyObject *py_sum_squares(PyObject *self, PyObject *value) {
  (void)self;
  static const Op op = {.name = "sum_squares"};
  static const Param p = {.name = "g", .type = '#', .dims = 1, .letter = "n"};
  size_t n[128] = {0};
  char bound[128] = {0};
  Arg a = {0};
  int on_device = 0;
  if (read_array(&op, &p, value, &a, n, bound, &on_device)) {
    Py_XDECREF(a.owner);
    return NULL;
  }
  device_lock();
  if (!on_device) a.data = device_lend(a.host, a.n, item_size(&p, &a), 0, 1);
  double sum = a.data ? sum_squares((Matrix){a.data, a.type}, a.n) : 0;
  if (!on_device) device_return(a.host, a.data, a.n, item_size(&p, &a), 0, 0);
  const char *failure = device_error();
  device_unlock();
  Py_XDECREF(a.owner);
  return failure ? raise_failure("sum_squares", failure) : PyFloat_FromDouble(sum);
}

static PyObject *py_missing(PyObject *self, PyObject *none) {
  (void)self;
  (void)none;
  const char *what = device_missing();
  return what ? PyUnicode_FromString(what) : Py_NewRef(Py_None);
}

static PyObject *py_memory(PyObject *self, PyObject *args) {
  (void)self;
  int reset = 0;
  size_t used, peak;
  if (!PyArg_ParseTuple(args, "|p", &reset)) return NULL;
  device_memory(&used, &peak, reset);
  return Py_BuildValue("nn", (Py_ssize_t)used, (Py_ssize_t)peak);
}

static PyMethodDef functions[] = {
    {"workers", py_workers, METH_NOARGS, "How many threads the ops use: MIL_NUM_THREADS, else the affinity count."},
    {"supports", py_supports, METH_O, "supports(level) -> bool: whether this processor has x86-64-v3 or x86-64-v4."},
    {"missing", py_missing, METH_NOARGS, "missing() -> why there is no device to compute on, or None."},
    {"time_op", (PyCFunction)(void (*)(void))py_time_op, METH_FASTCALL | METH_KEYWORDS,
     "time_op(name, repeat, **arguments) -> seconds of one of `repeat` calls in a row, arguments and results staying on the device."},
    {"memory", py_memory, METH_VARARGS,
     "memory(reset=False) -> (bytes in use, the most since the last reset) of the device; zeros where memory is the system's."},
    {"sum_squares", py_sum_squares, METH_O, "sum_squares(g float32, or uint16 (bf16 bits) (n,)) -> float: the sum of squares, in double."},
    {0}};

static int add_ops(PyObject *module) {
  static PyMethodDef methods[OP_COUNT];
  static char docs[OP_COUNT][1024];
  PyObject *specs = PyDict_New(), *name = PyModule_GetNameObject(module);
  int failed = !specs || !name;
  for (int i = 0; i < OP_COUNT && !failed; i++) {
    Op *op = OPS + i;
    parse_spec(op);
    snprintf(docs[i], sizeof docs[i],
             "%s\n\n%s\n\nArrays are C-contiguous; letters are sizes, equal letters equal sizes; unmarked and %%: float32, @: int32, #: float32 or\n"
             "uint16 (bf16 bits), !: written in place, ?: optional, :1 a number, -> what is returned. Raises ValueError or TypeError\n"
             "with a sentence that names the op, the argument, the axis and the sizes.",
             op->spec, op->doc);
    methods[i] = (PyMethodDef){op->name, (PyCFunction)(void (*)(void))call_op, METH_FASTCALL | METH_KEYWORDS, docs[i]};
    PyObject *self = PyCapsule_New(op, NULL, NULL), *spec = PyUnicode_FromString(op->spec);
    PyObject *function = self ? PyCFunction_NewEx(methods + i, self, name) : NULL;
    failed = !function || !spec || PyDict_SetItemString(specs, op->name, spec) || PyModule_AddObjectRef(module, op->name, function);
    Py_XDECREF(function);
    Py_XDECREF(self);
    Py_XDECREF(spec);
  }
  failed = failed || PyModule_AddObjectRef(module, "OPS", specs);
  Py_XDECREF(specs);
  Py_XDECREF(name);
  return failed ? -1 : 0;
}

static int exec_module(PyObject *module) {
  import_array1(-1);
  int blas = find_blas();
  if (add_ops(module) || add_types(module) || add_tensor(module) || PyModule_AddFunctions(module, functions)) return -1;
  if (PyModule_AddIntConstant(module, "SCAN_RING", SCAN_RING) || PyModule_AddIntConstant(module, "SSD_RING", SSD_RING) ||
      PyModule_AddIntConstant(module, "FEW", FEW) || PyModule_AddIntConstant(module, "PENDING", PENDING))
    return -1;
  return PyModule_AddObjectRef(module, "BLAS", blas ? Py_True : Py_False);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec_module},
#ifdef Py_mod_multiple_interpreters
                                   {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
                                   {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                   {0}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "mambainllama", .m_doc = "The ops, Model and State.", .m_slots = slots};

#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
PyMODINIT_FUNC INIT(MIL_MODULE)(void);
PyMODINIT_FUNC INIT(MIL_MODULE)(void) { return PyModuleDef_Init(&definition); }
