/* pymodel.c - the types Model and State: Python's handles on model.h. Checks here, computing there. */
#include "module.h"

#include <pthread.h>

#include "model.h"

typedef struct {
  PyObject_HEAD Model m;
  int version; /* moves when a layer's kind changes: a State from before no longer fits */
} ModelObject;

typedef struct {
  PyObject_HEAD State s;
  ModelObject *model;
  int version;
} StateObject;

static PyTypeObject *model_type, *state_type; /* the same for every interpreter that could load this module: there is one */
static pthread_mutex_t computing = PTHREAD_MUTEX_INITIALIZER; /* one model call at a time: arenas and the pool are shared */

#define COMPUTE(...)                   \
  Py_BEGIN_ALLOW_THREADS               \
  pthread_mutex_lock(&computing);      \
  device_lock();                       \
  __VA_ARGS__;                         \
  device_unlock();                     \
  pthread_mutex_unlock(&computing);    \
  Py_END_ALLOW_THREADS

/* NULL, with an exception if something failed on the device. */
static PyObject *finish(const char *where, int failed) {
  const char *what = device_error();
  if (failed || what) return raise_failure(where, what ? what : "out of memory");
  Py_RETURN_NONE;
}

/* A result, unless something failed. */
static PyObject *unless(int failed, const char *where, PyObject *result) {
  PyObject *none = result ? finish(where, failed) : NULL;
  if (!none) Py_CLEAR(result);
  Py_XDECREF(none);
  return result;
}
static PyObject *checked(const char *where, PyObject *result) { return unless(0, where, result); }

/* ---- Model: construction ---------------------------------------------------------------------------------------------------- */

static int read_size(PyObject *dict, const char *key, size_t *out) {
  PyObject *value = PyMapping_GetItemString(dict, key);
  *out = value ? PyLong_AsSize_t(value) : 0;
  Py_XDECREF(value);
  return PyErr_Occurred() || *out > 1u << 30 ? -1 : 0;
}

static int read_float(PyObject *dict, const char *key, float *out) {
  PyObject *value = PyMapping_GetItemString(dict, key);
  *out = value ? (float)PyFloat_AsDouble(value) : 0;
  Py_XDECREF(value);
  return PyErr_Occurred() ? -1 : 0;
}

static int kind_of(PyObject *name) {
  for (int i = 0; i < MIXERS; i++)
    if (PyUnicode_Check(name) && !PyUnicode_CompareWithASCIIString(name, MIXER[i].name)) return i;
  PyErr_Format(PyExc_ValueError, "layer kind is %R, expected 'attention', 'mamba1', 'mamba2', 'window' or 'identity'", name);
  return -1;
}

static int read_layers(PyObject *dict, Model *m) {
  PyObject *kinds = PyMapping_GetItemString(dict, "kinds"), *windows = PyMapping_GetItemString(dict, "window");
  int failed = !kinds || !windows || PySequence_Size(kinds) != (Py_ssize_t)m->c.layers || PySequence_Size(windows) != (Py_ssize_t)m->c.layers;
  m->kind = calloc(m->c.layers + 1, sizeof *m->kind);
  m->window = calloc(m->c.layers + 1, sizeof *m->window);
  for (size_t l = 0; l < m->c.layers && !failed; l++) {
    PyObject *kind = PySequence_GetItem(kinds, (Py_ssize_t)l), *window = PySequence_GetItem(windows, (Py_ssize_t)l);
    int k = kind ? kind_of(kind) : -1;
    failed = !m->kind || !m->window || k < 0 || !window;
    if (!failed) m->kind[l] = k, m->window[l] = PyLong_AsSize_t(window);
    failed = failed || PyErr_Occurred();
    Py_XDECREF(kind);
    Py_XDECREF(window);
  }
  if (failed && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the architecture's kinds and window must have one entry a layer");
  Py_XDECREF(kinds);
  Py_XDECREF(windows);
  return failed ? -1 : 0;
}

static int set_rope(Model *m, PyObject *value) {
  PyArrayObject *array = (PyArrayObject *)PyArray_FROM_OTF(value, NPY_FLOAT32, NPY_ARRAY_IN_ARRAY);
  if (!array) return -1;
  size_t n = m->c.head_dim / 2;
  if ((size_t)PyArray_SIZE(array) != n) {
    PyErr_Format(PyExc_ValueError, "inv_freq has %zd entries, expected head_dim/2 = %zu", (Py_ssize_t)PyArray_SIZE(array), n);
    Py_DECREF(array);
    return -1;
  }
  if (!m->inv_freq) m->inv_freq = device_alloc(n * sizeof(float));
  if (m->inv_freq) device_push(m->inv_freq, PyArray_DATA(array), n * sizeof(float));
  Py_DECREF(array);
  return m->inv_freq ? 0 : -1;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"architecture", "dtype", NULL};
  PyObject *dict, *rope;
  const char *dtype;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!s", names, &PyDict_Type, &dict, &dtype)) return NULL;
  ModelObject *self = (ModelObject *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  Model *m = &self->m;
  m->type = strcmp(dtype, "bfloat16") ? FLOAT32 : BFLOAT16;
  m->ranks = 1;
  int failed = 0;
#define X(name) failed = failed || read_size(dict, #name, &m->c.name);
  CONFIG_SIZES(X)
#undef X
#define X(name) failed = failed || read_float(dict, #name, &m->c.name);
  CONFIG_FLOATS(X)
#undef X
  if (!failed && (!m->c.vocab || !m->c.width || !m->c.heads || !m->c.kv_heads || !m->c.head_dim || m->c.heads % m->c.kv_heads)) {
    PyErr_SetString(PyExc_ValueError, "the architecture's sizes must be positive and heads a multiple of kv_heads");
    failed = 1;
  }
  failed = failed || read_layers(dict, m) || !(rope = PyMapping_GetItemString(dict, "inv_freq"));
  if (!failed) {
    failed = set_rope(m, rope) || model_init(m);
    Py_DECREF(rope);
  }
  if (failed) {
    if (!PyErr_Occurred()) Py_XDECREF(finish("Model", 1));
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject *)self;
}

static PyObject *model_clone_(PyObject *self, PyObject *none) {
  (void)none;
  ModelObject *clone = (ModelObject *)model_type->tp_alloc(model_type, 0);
  if (!clone || !model_clone(&clone->m, &((ModelObject *)self)->m)) return (PyObject *)clone;
  Py_DECREF(clone);
  return finish("Model.clone", 1);
}

static void model_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  model_free(&((ModelObject *)self)->m);
  type->tp_free(self);
  Py_DECREF(type);
}

/* ---- Model: parameters --------------------------------------------------------------------------------------------------------- */

static PyObject *full_name(const Param *p, size_t i, size_t layer) {
  return i < 3 ? PyUnicode_FromString(p->name) : PyUnicode_FromFormat("model.layers.%zu.%s", layer, p->name);
}

static int shape_of(const Param *p, npy_intp *shape) {
  shape[0] = (npy_intp)p->a;
  shape[1] = p->form == FILTER ? 1 : (npy_intp)p->b;
  shape[2] = (npy_intp)p->b;
  return p->form == VECTOR ? 1 : p->form == FILTER ? 3 : 2;
}

static Param *find(ModelObject *self, PyObject *name) {
  size_t layer;
  for (size_t i = 0; i < param_count(&self->m); i++) {
    Param *p = param_at(&self->m, i, &layer);
    if (!p->name) continue;
    PyObject *full = full_name(p, i, layer);
    int same = full ? PyObject_RichCompareBool(full, name, Py_EQ) : -1;
    Py_XDECREF(full);
    if (same) return same < 0 ? NULL : p;
  }
  PyErr_Format(PyExc_ValueError, "no parameter %R in this model (model.names lists them)", name);
  return NULL;
}

static PyObject *model_names(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  PyObject *dict = PyDict_New();
  size_t layer;
  for (size_t i = 0; dict && i < param_count(m); i++) {
    Param *p = param_at(m, i, &layer);
    if (!p->name) continue;
    npy_intp shape[3];
    int axes = shape_of(p, shape);
    PyObject *name = full_name(p, i, layer), *tuple = PyTuple_New(axes);
    for (int d = 0; tuple && d < axes; d++) PyTuple_SET_ITEM(tuple, d, PyLong_FromSsize_t(shape[d]));
    if (!name || !tuple || PyDict_SetItem(dict, name, tuple)) Py_CLEAR(dict);
    Py_XDECREF(name);
    Py_XDECREF(tuple);
  }
  return dict;
}

/* Rows first .. first+rows of an array with the parameter's shape. */
static PyObject *pull_rows(const Param *p, int type, const void *data, size_t first, size_t rows) {
  npy_intp shape[3];
  int axes = shape_of(p, shape);
  shape[0] = (npy_intp)rows;
  PyObject *array = PyArray_SimpleNew(axes, shape, type);
  if (!array) return NULL;
  size_t row = p->n / (p->a ? p->a : 1) * (type == NPY_FLOAT32 ? 4 : 2);
  device_pull(PyArray_DATA((PyArrayObject *)array), (const char *)data + first * row, rows * row);
  return checked("Model.get", array);
}

static PyObject *pull_array(const Param *p, int type, const void *data) { return pull_rows(p, type, data, 0, p->a); }

/* What this rank holds of m, v or master: in the parameter's shape if it is all, else flat. */
static PyObject *pull_held(const Param *p, int type, const void *data) {
  if (p->held == p->n) return pull_array(p, type, data);
  npy_intp n = (npy_intp)p->held;
  PyObject *array = PyArray_SimpleNew(1, &n, type);
  if (array) device_pull(PyArray_DATA((PyArrayObject *)array), data, p->held * (type == NPY_FLOAT32 ? 4 : 2));
  return array ? checked("Model.moments", array) : NULL;
}

static PyObject *raw_rows(PyObject *self, PyObject *name, Py_ssize_t first, Py_ssize_t rows) {
  Param *p = find((ModelObject *)self, name);
  if (!p) return NULL;
  if (rows < 0) rows = (Py_ssize_t)p->a - first;
  if (first < 0 || rows < 0 || first > (Py_ssize_t)p->a || rows > (Py_ssize_t)p->a - first)
    return PyErr_Format(PyExc_ValueError, "%U has %zu rows, asked for %zd from %zd on", name, p->a, rows, first);
  return pull_rows(p, p->type == FLOAT32 ? NPY_FLOAT32 : NPY_UINT16, p->buffer->data, (size_t)first, (size_t)rows);
}

static PyObject *model_raw(PyObject *self, PyObject *args) {
  PyObject *name;
  Py_ssize_t first = 0, rows = -1;
  return PyArg_ParseTuple(args, "O|nn", &name, &first, &rows) ? raw_rows(self, name, first, rows) : NULL;
}

/* A float32 array in place of one of bf16's bits. */
static PyObject *widened(PyObject *raw) {
  if (!raw || PyArray_TYPE((PyArrayObject *)raw) == NPY_FLOAT32) return raw;
  PyObject *array = PyArray_SimpleNew(PyArray_NDIM((PyArrayObject *)raw), PyArray_DIMS((PyArrayObject *)raw), NPY_FLOAT32);
  if (array) bf16_to_floats(PyArray_DATA((PyArrayObject *)array), PyArray_DATA((PyArrayObject *)raw), (size_t)PyArray_SIZE((PyArrayObject *)raw));
  Py_DECREF(raw);
  return array;
}

static PyObject *model_get(PyObject *self, PyObject *name) { return widened(raw_rows(self, name, 0, -1)); }

static int fits(const Param *p, PyObject *value, PyObject *name, int halves) {
  npy_intp shape[3];
  int axes = shape_of(p, shape);
  PyArrayObject *a = (PyArrayObject *)value;
  if (!PyArray_Check(value) || (PyArray_TYPE(a) != NPY_FLOAT32 && !(halves && PyArray_TYPE(a) == NPY_UINT16)) || !PyArray_ISCARRAY_RO(a)) {
    PyErr_Format(PyExc_ValueError, "%U: expected a C-contiguous float32 array%s", name, halves ? " (or uint16, the bits of bf16)" : "");
    return 0;
  }
  int same = PyArray_NDIM(a) == axes;
  for (int d = 0; same && d < axes; d++) same = PyArray_DIM(a, d) == shape[d];
  if (same) return 1;
  PyObject *got = PyObject_GetAttrString(value, "shape");
  if (got && axes == 1) PyErr_Format(PyExc_ValueError, "%U: shape is %S, expected (%zd,)", name, got, shape[0]);
  if (got && axes == 2) PyErr_Format(PyExc_ValueError, "%U: shape is %S, expected (%zd, %zd)", name, got, shape[0], shape[1]);
  if (got && axes == 3) PyErr_Format(PyExc_ValueError, "%U: shape is %S, expected (%zd, 1, %zd)", name, got, shape[0], shape[2]);
  Py_XDECREF(got);
  return 0;
}

static PyObject *model_tensor(PyObject *self, PyObject *name) {
  Param *p = find((ModelObject *)self, name);
  npy_intp shape[3];
  return p ? new_tensor(buffer_share(p->buffer), p->type, shape_of(p, shape), shape, 1) : NULL;
}

static PyObject *set_param(ModelObject *self, PyObject *name, PyObject *value, int on_device) {
  Param *p = find(self, name);
  if (!p || !fits(p, value, name, 1)) return NULL;
  self->m.version++;
  if (param_own(p)) return finish("Model.set", 1);
  PyArrayObject *a = (PyArrayObject *)value;
  Matrix src = {PyArray_DATA(a), PyArray_TYPE(a) == NPY_FLOAT32 ? FLOAT32 : BFLOAT16};
  void *staged = NULL;
  if (on_device) {
    COMPUTE(copy_rows(p->buffer->data, p->type, 0, src, 0, p->a, p->b);
            if (p->master) copy_rows(p->master, FLOAT32, 0, matrix(p, 0), 0, p->a, p->b);
            device_pull(NULL, NULL, 0)) /* waits: the memory is another's */
    return finish("Model.set", 0);
  }
  if (src.type != p->type) { /* converted on the host, then pushed */
    staged = malloc(param_bytes(p) + 1);
    if (!staged) return PyErr_NoMemory();
    if (p->type == FLOAT32)
      bf16_to_floats(staged, src.data, p->n);
    else
      floats_to_bf16(staged, src.data, p->n);
  }
  device_push(p->buffer->data, staged ? staged : src.data, param_bytes(p));
  free(staged);
  param_master(p);
  return finish("Model.set", 0);
}

static PyObject *model_set(PyObject *self, PyObject *args) {
  PyObject *name, *value;
  if (!PyArg_ParseTuple(args, "UO", &name, &value)) return NULL;
  Array array = {0};
  int found = PyArray_Check(value) ? 0 : read_dlpack("Model.set", "value", value, &array);
  if (found <= 0) return found ? NULL : set_param((ModelObject *)self, name, value, 0);
  PyObject *view = NULL; /* as an array: of the device's memory its shape and type alone are looked at */
  npy_intp shape[MOST_AXES];
  for (int d = 0; d < array.dims; d++) shape[d] = (npy_intp)array.shape[d];
  if (!array.contiguous || array.type < 0 || array.type == INT32)
    PyErr_Format(PyExc_ValueError, "%U: expected a C-contiguous float32 or bfloat16 array, on a GPU aligned to 16 bytes, got %s", name, array.dtype);
  else
    view = PyArray_SimpleNewFromData(array.dims, shape, array.type == FLOAT32 ? NPY_FLOAT32 : NPY_UINT16, array.data);
  PyObject *result = view ? set_param((ModelObject *)self, name, view, array.on_device) : NULL;
  Py_XDECREF(view);
  Py_DECREF(array.owner);
  return result;
}

static PyObject *model_grad(PyObject *self, PyObject *name) {
  Param *p = find((ModelObject *)self, name);
  if (!p) return NULL;
  const Model *m = &((ModelObject *)self)->m;
  if (!learns(m, p)) return PyErr_Format(PyExc_ValueError, "%U has no gradient: it is frozen, or no backward has run yet", name);
  return widened(pull_array(p, half_gradient(m, p) ? NPY_UINT16 : NPY_FLOAT32, stored_gradient(m, p)));
}

static PyObject *model_moments(PyObject *self, PyObject *name) {
  Param *p = find((ModelObject *)self, name);
  if (!p) return NULL;
  if (!p->m) Py_RETURN_NONE;
  const int type = p->moments == FLOAT32 ? NPY_FLOAT32 : NPY_UINT16;
  PyObject *m = pull_held(p, type, p->m), *v = pull_held(p, type, p->v);
  PyObject *w = p->master ? pull_held(p, NPY_FLOAT32, p->master) : Py_NewRef(Py_None);
  return Py_BuildValue("NNN", m, v, w); /* NULL if one of them is */
}

static PyObject *model_set_moments(PyObject *self, PyObject *args) {
  PyObject *name, *value[3];
  if (!PyArg_ParseTuple(args, "UOOO", &name, value, value + 1, value + 2)) return NULL;
  Model *m = &((ModelObject *)self)->m;
  Param *p = find((ModelObject *)self, name);
  if (!p) return NULL;
  if ((value[2] == Py_None) != (p->type == FLOAT32))
    return PyErr_Format(PyExc_ValueError, "%U: master weights go with bf16 matrices, and only with them", name);
  for (int i = 0; i < 3; i++)
    if ((i < 2 || value[i] != Py_None) && !fits(p, value[i], name, i < 2)) return NULL;
  const int type = PyArray_TYPE((PyArrayObject *)value[0]);
  if (PyArray_TYPE((PyArrayObject *)value[1]) != type) return PyErr_Format(PyExc_ValueError, "%U: m and v must be of one dtype", name);
  if (model_gradients(m) || param_moments(m, p, type == NPY_FLOAT32 ? FLOAT32 : BFLOAT16)) return finish("Model.set_moments", 1);
  void *to[] = {p->m, p->v, p->master};
  for (int i = 0; i < 3; i++) {
    const size_t size = i < 2 && type == NPY_UINT16 ? 2 : 4;
    if (to[i]) device_push(to[i], (const char *)PyArray_DATA((PyArrayObject *)value[i]) + p->first * size, p->held * size);
  }
  return finish("Model.set_moments", 0);
}

static PyObject *model_set_trainable(PyObject *self, PyObject *args) {
  PyObject *name;
  int trainable;
  if (!PyArg_ParseTuple(args, "Up", &name, &trainable)) return NULL;
  Param *p = find((ModelObject *)self, name);
  if (!p) return NULL;
  param_set_trainable(&((ModelObject *)self)->m, p, trainable);
  Py_RETURN_NONE;
}

static PyObject *model_half_gradients_(PyObject *self, PyObject *half) {
  model_half_gradients(&((ModelObject *)self)->m, half == Py_True);
  Py_RETURN_NONE;
}

static PyObject *model_zero_grad(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  if (m->gradients) device_zero(m->gradients, gradient_bytes(m));
  return finish("Model.zero_grad", 0);
}

static PyObject *model_grad_norm(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  double total = 0;
  COMPUTE(total = model_squares(m))
  return checked("Model.grad_norm", PyFloat_FromDouble(sqrt(total)));
}

static PyObject *model_step_(PyObject *self, PyObject *args) {
  Model *m = &((ModelObject *)self)->m;
  float lr, b1, b2, eps, decay, scale;
  Py_ssize_t step;
  int half;
  if (!PyArg_ParseTuple(args, "ffffffnp", &lr, &b1, &b2, &eps, &decay, &scale, &step, &half)) return NULL;
  if (step < 1) return PyErr_Format(PyExc_ValueError, "step counts from 1, got %zd", step);
  if (!m->gradients) return PyErr_Format(PyExc_ValueError, "there are no gradients to step on: no backward has run yet");
  const int moments = half ? BFLOAT16 : FLOAT32;
  size_t layer;
  for (size_t i = 0; i < param_count(m); i++) {
    const Param *p = param_at(m, i, &layer);
    if (learns(m, p) && p->m && p->moments != moments)
      return PyErr_Format(PyExc_ValueError, "the moments are %s, and this step is to keep %s ones: set_moments gives them anew",
                          half ? "float32" : "bfloat16", half ? "bfloat16" : "float32");
  }
  int failed;
  COMPUTE(failed = model_step(m, moments, lr, b1, b2, eps, decay, scale, (size_t)step))
  return finish("Model.step", failed);
}

/* ---- Model: a rank's part ------------------------------------------------------------------------------------------------------------ */

static PyObject *model_share_(PyObject *self, PyObject *args) {
  Py_ssize_t rank, ranks;
  if (!PyArg_ParseTuple(args, "nn", &rank, &ranks)) return NULL;
  if (rank < 0 || rank >= ranks) return PyErr_Format(PyExc_ValueError, "share: rank %zd is not one of %zd", rank, ranks);
  model_share(&((ModelObject *)self)->m, (size_t)rank, (size_t)ranks);
  return finish("Model.share", 0);
}

static PyObject *model_arena(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  if (model_gradients(m)) return finish("Model.arena", 1);
  return checked("Model.arena", Py_BuildValue("KnnK", (unsigned long long)(uintptr_t)m->gradients, (Py_ssize_t)m->halves, (Py_ssize_t)m->floats,
                                              (unsigned long long)(uintptr_t)device_stream()));
}

static PyObject *model_arena_get(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  if (model_gradients(m)) return finish("Model.arena_get", 1);
  npy_intp n = (npy_intp)gradient_bytes(m);
  void *host = device_host(m->gradients);
  PyObject *array = host ? PyArray_SimpleNewFromData(1, &n, NPY_UINT8, host) : PyArray_SimpleNew(1, &n, NPY_UINT8);
  if (array && host && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(self))) Py_CLEAR(array);
  if (array && !host) device_pull(PyArray_DATA((PyArrayObject *)array), m->gradients, gradient_bytes(m));
  return array ? checked("Model.arena_get", array) : NULL;
}

static PyObject *model_arena_put(PyObject *self, PyObject *args) {
  Model *m = &((ModelObject *)self)->m;
  Py_ssize_t first;
  PyObject *value;
  if (!PyArg_ParseTuple(args, "nO", &first, &value)) return NULL;
  PyArrayObject *a = (PyArrayObject *)value;
  const size_t n = PyArray_Check(value) && PyArray_TYPE(a) == NPY_UINT8 && PyArray_ISCARRAY_RO(a) ? (size_t)PyArray_SIZE(a) : 0;
  if (!m->gradients || !n || first < 0 || (size_t)first > gradient_bytes(m) || n > gradient_bytes(m) - (size_t)first)
    return PyErr_Format(PyExc_ValueError, "arena_put: expected a C-contiguous uint8 array that fits the arena");
  char *to = (char *)m->gradients + first;
  if (device_host(to) != PyArray_DATA(a)) device_push(to, PyArray_DATA(a), n);
  return finish("Model.arena_put", 0);
}

static PyObject *model_exchange_(PyObject *self, PyObject *args) {
  Model *m = &((ModelObject *)self)->m;
  size_t bytes;
  int out;
  if (!PyArg_ParseTuple(args, "p", &out)) return NULL;
  if (!m->gradients) return PyErr_Format(PyExc_ValueError, "exchange: no step has been taken");
  COMPUTE(bytes = model_exchange(m, out))
  return checked("Model.exchange", PyLong_FromSize_t(bytes));
}

/* ---- Model: layers ---------------------------------------------------------------------------------------------------------------- */

static PyObject *model_kinds(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  PyObject *list = PyList_New((Py_ssize_t)m->c.layers);
  for (size_t l = 0; list && l < m->c.layers; l++) PyList_SET_ITEM(list, (Py_ssize_t)l, PyUnicode_FromString(MIXER[m->kind[l]].name));
  return list;
}

static PyObject *model_windows(PyObject *self, PyObject *none) {
  (void)none;
  Model *m = &((ModelObject *)self)->m;
  PyObject *list = PyList_New((Py_ssize_t)m->c.layers);
  for (size_t l = 0; list && l < m->c.layers; l++)
    PyList_SET_ITEM(list, (Py_ssize_t)l, PyLong_FromSize_t(m->kind[l] == WINDOW ? m->window[l] : 0));
  return Py_BuildValue("Nn", list, (Py_ssize_t)m->c.sinks); /* NULL if the list is */
}

static PyObject *model_convert_(PyObject *self, PyObject *args) {
  ModelObject *o = (ModelObject *)self;
  PyObject *name;
  Py_ssize_t layer, window = 0, sinks = 0;
  int init;
  unsigned long long seed;
  if (!PyArg_ParseTuple(args, "nUpK|nn", &layer, &name, &init, &seed, &window, &sinks)) return NULL;
  int kind = kind_of(name);
  if (kind < 0) return NULL;
  if (layer < 0 || (size_t)layer >= o->m.c.layers || o->m.kind[layer] != ATTENTION || kind == ATTENTION)
    return PyErr_Format(PyExc_ValueError, "layer %zd cannot become %U: it must be one of the model's attention layers", layer, name);
  if (window < (kind == WINDOW) || sinks < 0)
    return PyErr_Format(PyExc_ValueError, "a window is 1 or more tokens and sinks are 0 or more, got %zd and %zd", window, sinks);
  o->version++;
  return finish("Model.convert", model_convert(&o->m, (size_t)layer, kind, init, seed, (size_t)window, (size_t)sinks));
}

static PyObject *model_share_mixer_(PyObject *self, PyObject *args) {
  ModelObject *o = (ModelObject *)self;
  PyObject *other;
  Py_ssize_t layer;
  if (!PyArg_ParseTuple(args, "nO", &layer, &other)) return NULL;
  if (!PyObject_TypeCheck(other, model_type)) return PyErr_Format(PyExc_ValueError, "layers are shared between models of one backend only");
  const Model *m = &o->m, *from = &((ModelObject *)other)->m;
  Config sizes = m->c;
  if (layer >= 0 && (size_t)layer < from->c.layers && from->kind[layer] != WINDOW) sizes.sinks = from->c.sinks; /* of no meaning for it */
  int same = m->type == from->type;
#define X(name) same = same && sizes.name == from->c.name;
  CONFIG_SIZES(X)
#undef X
  if (!same) return PyErr_Format(PyExc_ValueError, "layers are shared between models of one size and dtype only");
  if (layer < 0 || (size_t)layer >= m->c.layers) return PyErr_Format(PyExc_ValueError, "there is no layer %zd", layer);
  if (self == other) Py_RETURN_NONE;
  o->version++;
  model_share_mixer(&o->m, (size_t)layer, from);
  Py_RETURN_NONE;
}

static PyObject *model_randomize_(PyObject *self, PyObject *args) {
  unsigned long long seed;
  float std;
  if (!PyArg_ParseTuple(args, "Kf", &seed, &std)) return NULL;
  model_randomize(&((ModelObject *)self)->m, seed, std);
  return finish("Model.randomize", 0);
}

static PyObject *model_set_rope(PyObject *self, PyObject *args) {
  PyObject *value;
  float scale;
  if (!PyArg_ParseTuple(args, "Of", &value, &scale) || set_rope(&((ModelObject *)self)->m, value)) return NULL;
  ((ModelObject *)self)->m.c.rope_scale = scale;
  ((ModelObject *)self)->m.version++;
  Py_RETURN_NONE;
}

/* ---- Model: calls -------------------------------------------------------------------------------------------------------------------- */

static int32_t *ints(PyObject *value, const char *name, size_t n, long low, long high) {
  PyArrayObject *a = (PyArrayObject *)value;
  if (!PyArray_Check(value) || PyArray_TYPE(a) != NPY_INT32 || !PyArray_ISCARRAY_RO(a) || (size_t)PyArray_SIZE(a) != n) {
    PyErr_Format(PyExc_ValueError, "logits: argument '%s' must be a C-contiguous int32 array of %zu entries", name, n);
    return NULL;
  }
  int32_t *v = PyArray_DATA(a);
  for (size_t i = 0; i < n; i++)
    if (v[i] < low || v[i] > high) {
      PyErr_Format(PyExc_ValueError, "argument '%s' holds %d at flat index %zu, expected %ld to %ld", name, (int)v[i], i, low, high);
      return NULL;
    }
  return v;
}

static int read_ids(PyObject *value, const Model *m, const int32_t **ids, size_t *B, size_t *T) {
  PyArrayObject *a = (PyArrayObject *)value;
  if (!PyArray_Check(value) || PyArray_NDIM(a) != 2) {
    PyErr_SetString(PyExc_ValueError, "argument 'ids' must be an int32 array of shape (batch, tokens)");
    return -1;
  }
  *B = (size_t)PyArray_DIM(a, 0), *T = (size_t)PyArray_DIM(a, 1);
  *ids = ints(value, "ids", *B * *T, 0, (long)m->c.vocab - 1);
  return *ids ? 0 : -1;
}

static int check_state(const ModelObject *o, const StateObject *state, const Rows *rows, int extend, size_t B, size_t T) {
  const State *s = &state->s;
  if (state->model != o || state->version != o->version) {
    PyErr_SetString(PyExc_ValueError, "the state was made for another model (or before a layer of this one was converted)");
    return -1;
  }
  for (size_t b = 0; b < B; b++) {
    size_t i = rows->slot ? (size_t)rows->slot[b] : b, kept = rows->keep ? (size_t)rows->keep[b] : T;
    size_t start = (size_t)s->pos[i] + (extend ? (size_t)s->pending[i] : 0);
    if (start + T > s->capacity) {
      PyErr_Format(PyExc_ValueError, "row %zu: %zu tokens before and %zu new ones exceed the state's capacity of %zu", b, start, T,
                   s->capacity);
      return -1;
    }
    if (extend && (kept || T + (size_t)s->pending[i] > PENDING)) {
      PyErr_Format(PyExc_ValueError, "row %zu: extend adds to the %d pending tokens: keep must be 0, and at most %d may be pending", b,
                   s->pending[i], PENDING);
      return -1;
    }
    if (T > PENDING && !kept) {
      PyErr_Format(PyExc_ValueError, "row %zu: %zu tokens would stay uncommitted, at most %d may", b, T, PENDING);
      return -1;
    }
  }
  return 0;
}

static PyObject *model_logits_(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"ids", "state", "keep", "slot", "prev", "last", "extend", NULL};
  ModelObject *o = (ModelObject *)self;
  PyObject *ids_value, *state_value = Py_None, *keep = Py_None, *slot = Py_None, *prev = Py_None;
  Py_ssize_t last = -1;
  int extend = 0;
  const int32_t *ids;
  size_t B, T;
  Rows rows = {0};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOOOnp", names, &ids_value, &state_value, &keep, &slot, &prev, &last, &extend) ||
      read_ids(ids_value, &o->m, &ids, &B, &T))
    return NULL;
  if (state_value != Py_None && !PyObject_TypeCheck(state_value, state_type))
    return PyErr_Format(PyExc_ValueError, "argument 'state' must be a State of the model's own backend, got %s", Py_TYPE(state_value)->tp_name);
  StateObject *state = state_value == Py_None ? NULL : (StateObject *)state_value;
  if (!state && (slot != Py_None || extend)) return PyErr_Format(PyExc_ValueError, "arguments 'slot' and 'extend' need a state");
  size_t S = state ? state->s.slots : B;
  if (keep != Py_None && !(rows.keep = ints(keep, "keep", B, 0, (long)T))) return NULL;
  if (slot != Py_None && !(rows.slot = ints(slot, "slot", B, 0, (long)S - 1))) return NULL;
  if (prev != Py_None && !(rows.prev = ints(prev, "prev", B * T, -2, (long)T))) return NULL;
  if (check_rows("logits", rows.slot, rows.prev, state != NULL, B, T, S)) return NULL;
  if (state && check_state(o, state, &rows, extend, B, T)) return NULL;
  for (size_t b = 0; b < B && last > 0; b++)
    if ((size_t)last > (rows.keep ? (size_t)rows.keep[b] : T))
      return PyErr_Format(PyExc_ValueError, "row %zu keeps %zu tokens, fewer than last = %zd", b, rows.keep ? (size_t)rows.keep[b] : T, last);
  size_t n = last < 0 ? T : (size_t)last;
  npy_intp shape[3] = {(npy_intp)B, (npy_intp)n, (npy_intp)o->m.c.vocab};
  PyObject *out = PyArray_SimpleNew(3, shape, NPY_FLOAT32);
  if (!out || !B || !T) return out;
  int failed;
  COMPUTE(failed = model_logits(&o->m, state ? &state->s : NULL, PyArray_DATA((PyArrayObject *)out), ids, &rows, extend, last >= 0, n, B, T))
  return unless(failed, "Model.logits", out);
}

static float *floats(PyObject *value, const char *name, size_t n) {
  PyArrayObject *a = (PyArrayObject *)value;
  if (PyArray_Check(value) && PyArray_TYPE(a) == NPY_FLOAT32 && PyArray_ISCARRAY_RO(a) && (size_t)PyArray_SIZE(a) == n) return PyArray_DATA(a);
  PyErr_Format(PyExc_ValueError, "argument '%s' must be a C-contiguous float32 array of %zu entries", name, n);
  return NULL;
}

static Model *read_teacher(const ModelObject *student, PyObject *value) {
  if (!PyObject_TypeCheck(value, model_type) || value == (PyObject *)student) {
    PyErr_SetString(PyExc_ValueError, "argument 'teacher' must be another Model of the same backend");
    return NULL;
  }
  Model *t = &((ModelObject *)value)->m;
  if (t->c.vocab == student->m.c.vocab) return t;
  PyErr_Format(PyExc_ValueError, "the teacher's vocabulary has %zu tokens, the student's %zu", t->c.vocab, student->m.c.vocab);
  return NULL;
}

static PyObject *model_loss_(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"ids", "targets", "wce", "wkl", "teacher", "prev", "temperature", "kind", "backward", "recompute", NULL};
  ModelObject *o = (ModelObject *)self;
  PyObject *ids_value, *target_value, *wce_value, *wkl_value, *teacher = Py_None, *prev = Py_None;
  float tau = 1;
  int kind = 0, backward = 0, recompute = 0;
  const int32_t *ids, *target, *before = NULL;
  const float *wce, *wkl;
  size_t B, T;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOfipp", names, &ids_value, &target_value, &wce_value, &wkl_value, &teacher, &prev,
                                   &tau, &kind, &backward, &recompute) ||
      read_ids(ids_value, &o->m, &ids, &B, &T) || !(target = ints(target_value, "targets", B * T, INT32_MIN, (long)o->m.c.vocab - 1)) ||
      !(wce = floats(wce_value, "wce", B * T)) || !(wkl = floats(wkl_value, "wkl", B * T)))
    return NULL;
  Teacher top = {0};
  Model *t = NULL;
  if (PyTuple_Check(teacher)) {
    PyObject *top_ids, *log_probs, *tail;
    if (!PyArg_ParseTuple(teacher, "OOO", &top_ids, &log_probs, &tail)) return NULL;
    top.J = B && T && PyArray_Check(top_ids) ? (size_t)PyArray_SIZE((PyArrayObject *)top_ids) / (B * T) : 0;
    if (!(top.ids = ints(top_ids, "ids", B * T * top.J, INT32_MIN, INT32_MAX)) ||
        !(top.log_probs = floats(log_probs, "log_probs", B * T * top.J)) || !(top.tail = floats(tail, "tail", B * T)) ||
        check_top("teacher", top.ids, B * T, top.J, o->m.c.vocab))
      return NULL;
  } else if (teacher != Py_None && !(t = read_teacher(o, teacher))) {
    return NULL;
  }
  if (prev != Py_None && !(before = ints(prev, "prev", B * T, -2, (long)T))) return NULL;
  if (check_rows("loss", NULL, before, 0, B, T, B)) return NULL;
  npy_intp shape[3] = {2, (npy_intp)B, (npy_intp)T};
  PyObject *out = PyArray_SimpleNew(3, shape, NPY_FLOAT32);
  int failed = 0;
  if (!out) return NULL;
  float *losses = PyArray_DATA((PyArrayObject *)out);
  if (B && T)
    COMPUTE(failed = model_loss(&o->m, t, top, losses, ids, target, wce, wkl, before, tau, kind, backward, recompute, B, T))
  return unless(failed, "Model.loss", out);
}

/* Rising numbers of layers, 0 to `most`. */
static const int32_t *rising_layers(PyObject *value, size_t most, size_t *n) {
  *n = PyArray_Check(value) ? (size_t)PyArray_SIZE((PyArrayObject *)value) : 0;
  const int32_t *layer = ints(value, "layers", *n, 0, (long)most);
  for (size_t i = 1; layer && i < *n; i++)
    if (layer[i] <= layer[i - 1]) {
      PyErr_Format(PyExc_ValueError, "argument 'layers' must rise, got %d after %d", (int)layer[i], (int)layer[i - 1]);
      return NULL;
    }
  return layer;
}

static PyObject *model_hidden_(PyObject *self, PyObject *args) {
  Model *m = &((ModelObject *)self)->m;
  PyObject *ids_value, *layer_value, *prev;
  const int32_t *ids, *layer, *before = NULL;
  int mid;
  size_t B, T, n;
  if (!PyArg_ParseTuple(args, "OOOp", &ids_value, &layer_value, &prev, &mid) || read_ids(ids_value, m, &ids, &B, &T)) return NULL;
  if (!(layer = rising_layers(layer_value, m->c.layers - (size_t)mid, &n))) return NULL;
  if (prev != Py_None && !(before = ints(prev, "prev", B * T, -2, (long)T))) return NULL;
  if (check_rows("hidden", NULL, before, 0, B, T, B)) return NULL;
  npy_intp shape[4] = {(npy_intp)n, (npy_intp)B, (npy_intp)T, (npy_intp)m->c.width};
  PyObject *out = PyArray_SimpleNew(4, shape, NPY_FLOAT32);
  int failed = 0;
  if (!out) return NULL;
  if (B && T) COMPUTE(failed = model_hidden(m, PyArray_DATA((PyArrayObject *)out), ids, layer, n, mid, before, B, T))
  return unless(failed, "Model.hidden", out);
}

static PyObject *model_align_(PyObject *self, PyObject *args) {
  ModelObject *o = (ModelObject *)self;
  PyObject *ids_value, *teacher, *layer_value, *weight_value, *prev;
  const int32_t *ids, *layer, *before = NULL;
  const float *weight = NULL;
  int hidden, own;
  size_t B, T, n;
  if (!PyArg_ParseTuple(args, "OOOOppO", &ids_value, &teacher, &layer_value, &weight_value, &hidden, &own, &prev) ||
      read_ids(ids_value, &o->m, &ids, &B, &T))
    return NULL;
  Model *t = read_teacher(o, teacher);
  if (!t) return NULL;
  if (t->c.width != o->m.c.width || t->c.layers != o->m.c.layers)
    return PyErr_Format(PyExc_ValueError, "the teacher has %zu layers of width %zu, the student %zu of width %zu", t->c.layers, t->c.width,
                        o->m.c.layers, o->m.c.width);
  if (!(layer = rising_layers(layer_value, o->m.c.layers - 1, &n))) return NULL;
  if (weight_value != Py_None && !(weight = floats(weight_value, "weights", n * B * T))) return NULL;
  if (prev != Py_None && !(before = ints(prev, "prev", B * T, -2, (long)T))) return NULL;
  if (check_rows("align", NULL, before, 0, B, T, B)) return NULL;
  npy_intp shape[3] = {(npy_intp)n, (npy_intp)B, (npy_intp)T};
  PyObject *out = PyArray_SimpleNew(3, shape, NPY_FLOAT32);
  int failed = 0;
  if (!out) return NULL;
  if (B && T) COMPUTE(failed = model_align(&o->m, t, PyArray_DATA((PyArrayObject *)out), ids, layer, n, weight, hidden, own, before, B, T))
  return unless(failed, "Model.align", out);
}

static PyObject *model_top_(PyObject *self, PyObject *args) {
  ModelObject *o = (ModelObject *)self;
  PyObject *ids_value, *prev;
  float tau;
  Py_ssize_t J;
  const int32_t *ids, *before = NULL;
  size_t B, T;
  if (!PyArg_ParseTuple(args, "OOfn", &ids_value, &prev, &tau, &J) || read_ids(ids_value, &o->m, &ids, &B, &T)) return NULL;
  if (J < 1 || (size_t)J > o->m.c.vocab)
    return PyErr_Format(PyExc_ValueError, "k is %zd, expected 1 to the vocabulary's %zu", J, o->m.c.vocab);
  if (prev != Py_None && !(before = ints(prev, "prev", B * T, -2, (long)T))) return NULL;
  if (check_rows("top_log_probs", NULL, before, 0, B, T, B)) return NULL;
  npy_intp shape[3] = {(npy_intp)B, (npy_intp)T, J};
  PyObject *top = PyArray_SimpleNew(3, shape, NPY_INT32), *log_probs = PyArray_SimpleNew(3, shape, NPY_FLOAT32);
  PyObject *tail = PyArray_SimpleNew(2, shape, NPY_FLOAT32), *out = Py_BuildValue("NNN", top, log_probs, tail); /* NULL if one of them is */
  if (!out || !B || !T) return out;
  int failed;
#define DATA(array) PyArray_DATA((PyArrayObject *)(array))
  COMPUTE(failed = model_top(&o->m, DATA(top), DATA(log_probs), DATA(tail), ids, before, tau, (size_t)J, B, T))
#undef DATA
  return unless(failed, "Model.top_log_probs", out);
}

/* One round (model.h, Round): checks against both States here. */
static PyObject *model_round_(PyObject *self, PyObject *args) {
  ModelObject *o = (ModelObject *)self;
  PyObject *state_value, *draft_value, *draft_state_value, *in[12];
  int want;
  if (!PyArg_ParseTuple(args, "O!OO(OOOOOOO)(OOOOO)p", state_type, &state_value, &draft_value, &draft_state_value, in, in + 1, in + 2, in + 3, in + 4,
                        in + 5, in + 6, in + 7, in + 8, in + 9, in + 10, in + 11, &want))
    return NULL;
  StateObject *state = (StateObject *)state_value, *draft_state = NULL;
  ModelObject *draft = NULL;
  if (draft_value != Py_None) {
    if (!PyObject_TypeCheck(draft_value, model_type) || !PyObject_TypeCheck(draft_state_value, state_type))
      return PyErr_Format(PyExc_ValueError, "round: the draft and its state must be of the model's own backend");
    draft = (ModelObject *)draft_value, draft_state = (StateObject *)draft_state_value;
    if (draft->m.c.vocab != o->m.c.vocab)
      return PyErr_Format(PyExc_ValueError, "round: the draft's vocabulary has %zu tokens, the model's %zu", draft->m.c.vocab, o->m.c.vocab);
  }
  const long far = 1 << 30, vocab = (long)o->m.c.vocab - 1;
  Round r = {.B = PyArray_Check(in[0]) ? (size_t)PyArray_SIZE((PyArrayObject *)in[0]) : 0};
  if (!r.B || !(r.slot = ints(in[0], "slot", r.B, 0, (long)state->s.slots - 1)) || !(r.last = ints(in[1], "last", r.B, 0, vocab)) ||
      !(r.index = ints(in[2], "index", r.B, 0, INT32_MAX)) || !(r.at = ints(in[3], "at", r.B, 0, far)) || !(r.count = ints(in[4], "count", r.B, 0, FEW - 1)))
    return NULL;
  for (size_t b = 0; b < r.B; b++) r.K = draft && (size_t)r.count[b] > r.K ? (size_t)r.count[b] : r.K;
  if (r.K) {
    r.U = PyArray_Check(in[5]) ? (size_t)PyArray_SIZE((PyArrayObject *)in[5]) / r.B : 0;
    if (!(r.unread = ints(in[5], "unread", r.B * r.U, 0, vocab)) || !(r.keep = ints(in[6], "keep", r.B, 1, (long)r.U))) return NULL;
  }
  if (!(r.temperature = floats(in[7], "temperature", r.B)) || !(r.top_k = ints(in[8], "top_k", r.B, 0, INT32_MAX)) ||
      !(r.top_p = floats(in[9], "top_p", r.B)) || !(r.min_p = floats(in[10], "min_p", r.B)) ||
      !(r.seed = ints(in[11], "seed", 2 * r.B, INT32_MIN, INT32_MAX)))
    return NULL;
  if (r.U > FEW) return PyErr_Format(PyExc_ValueError, "round: at most %d unread tokens, got %zu", FEW, r.U);
  if (check_rows("round", r.slot, NULL, 1, r.B, 0, state->s.slots)) return NULL;
  Rows rows = {.slot = r.slot}, before = {.slot = r.slot, .keep = r.keep};
  if (check_state(o, state, &rows, 0, r.B, r.K + 1) || (r.K && check_state(draft, draft_state, &before, 0, r.B, r.U + r.K - 1))) return NULL;
  npy_intp shape[3] = {(npy_intp)r.B, (npy_intp)r.K, 0}, wide[3] = {(npy_intp)r.B, (npy_intp)r.K + 1, (npy_intp)o->m.c.vocab};
  PyObject *proposed = PyArray_SimpleNew(2, shape, NPY_INT32), *accepted = PyArray_SimpleNew(1, shape, NPY_INT32);
  PyObject *token = PyArray_SimpleNew(1, shape, NPY_INT32), *logits = want ? PyArray_SimpleNew(3, wide, NPY_FLOAT32) : Py_NewRef(Py_None);
  PyObject *none = NULL;
  if (proposed && accepted && token && logits) {
    int failed;
#define DATA(array) PyArray_DATA((PyArrayObject *)(array))
    COMPUTE(failed = model_round(&o->m, &state->s, draft ? &draft->m : NULL, draft ? &draft_state->s : NULL, &r, DATA(proposed), DATA(accepted),
                                 DATA(token), want ? DATA(logits) : NULL))
#undef DATA
    none = finish("Model.round", failed);
  }
  if (none) {
    Py_DECREF(none);
    return Py_BuildValue("NNNN", proposed, accepted, token, logits);
  }
  Py_XDECREF(proposed);
  Py_XDECREF(accepted);
  Py_XDECREF(token);
  Py_XDECREF(logits);
  return NULL;
}

static PyMethodDef model_methods[] = {
    {"names", model_names, METH_NOARGS, "names() -> {checkpoint name: shape}"},
    {"kinds", model_kinds, METH_NOARGS, "kinds() -> the layers' mixers, by name"},
    {"windows", model_windows, METH_NOARGS, "windows() -> (the window of each window layer, 0 for the others; sinks)"},
    {"get", model_get, METH_O, "get(name) -> the parameter as float32"},
    {"raw", model_raw, METH_VARARGS,
     "raw(name, first=0, rows=-1) -> the parameter as stored: float32, or uint16 (the bits of bf16); rows < 0: all from `first` on"},
    {"tensor", model_tensor, METH_O, "tensor(name) -> the parameter's own memory, a Tensor"},
    {"set", model_set, METH_VARARGS, "set(name, array): float32 or uint16 (the bits of bf16), NumPy's or with __dlpack__"},
    {"grad", model_grad, METH_O, "grad(name) -> its gradient, float32"},
    {"half_gradients", model_half_gradients_, METH_O, "half_gradients(bool): the gradients of bf16 matrices are kept in bf16"},
    {"moments", model_moments, METH_O, "moments(name) -> (m, v, master or None), m and v as stored: float32, or uint16 (bf16); None before the first step; flat where share\n"
     "left this rank a part of them"},
    {"set_moments", model_set_moments, METH_VARARGS, "set_moments(name, m, v, master): the whole arrays, of which a rank takes its part"},
    {"set_trainable", model_set_trainable, METH_VARARGS, "set_trainable(name, bool)"},
    {"clone", model_clone_, METH_NOARGS, "clone() -> a model that shares every parameter until one of the two writes it"},
    {"zero_grad", model_zero_grad, METH_NOARGS, "zero_grad()"},
    {"grad_norm", model_grad_norm, METH_NOARGS, "grad_norm() -> the norm of this rank's part of the gradients"},
    {"step", model_step_, METH_VARARGS, "step(lr, b1, b2, eps, decay, scale, step, bf16_moments): AdamW on this rank's part of the trainable parameters"},
    {"share", model_share_, METH_VARARGS,
     "share(rank, ranks): the gradients of all trainable parameters lie in one arena, those in bf16 and then those in float32, `ranks` equal parts\n"
     "of either; moments, master weights and steps are of the rank-th alone. What there was of them is dropped. (0, 1) at first: all"},
    {"arena", model_arena, METH_NOARGS, "arena() -> (address on the device, elements in bf16, in float32, the device's stream)"},
    {"arena_get", model_arena_get, METH_NOARGS,
     "arena_get() -> the arena's bytes, uint8: on a CPU themselves, while the trainable parameters stay what they are, else a copy"},
    {"arena_put", model_arena_put, METH_VARARGS, "arena_put(first, array uint8): writes the arena from its first-th byte on"},
    {"exchange", model_exchange_, METH_VARARGS,
     "exchange(out) -> n: after a step, this rank's part of the trainable weights as stored to n * rank bytes of the arena, or the others' from\n"
     "there; the gradients are lost"},
    {"convert", model_convert_, METH_VARARGS, "convert(layer, mixer, from_attention, seed, window, sinks)"},
    {"share_mixer", model_share_mixer_, METH_VARARGS,
     "share_mixer(layer, model): the layer's mixer becomes that of the other model, shared until one of the two writes it"},
    {"randomize", model_randomize_, METH_VARARGS, "randomize(seed, std)"},
    {"set_rope", model_set_rope, METH_VARARGS, "set_rope(inv_freq, scale)"},
    {"logits", (PyCFunction)(void (*)(void))model_logits_, METH_VARARGS | METH_KEYWORDS, "logits(ids, state, keep, slot, prev, last, extend)"},
    {"round", model_round_, METH_VARARGS,
     "round(state, draft, draft_state, (slot, last, index, at, count, unread, keep), (temperature, top_k, top_p, min_p, seed (B,2)), want_logits)\n"
     "-> (proposed, accepted, token, logits or None)"},
    {"loss", (PyCFunction)(void (*)(void))model_loss_, METH_VARARGS | METH_KEYWORDS,
     "loss(ids, targets, wce, wkl, teacher or (ids, log_probs, tail), prev, temperature, kind, backward, recompute) -> ce, kl of each"},
    {"hidden", model_hidden_, METH_VARARGS, "hidden(ids, layers, prev, mid) -> the stream before these layers, or in their middle"},
    {"align", model_align_, METH_VARARGS, "align(ids, teacher, layers, weights or None, hidden, own_prefix, prev) -> squared errors (layers, B, T)"},
    {"top_log_probs", model_top_, METH_VARARGS, "top_log_probs(ids, prev, temperature, k) -> (ids, log_probs, tail)"},
    {0}};

/* ---- State ------------------------------------------------------------------------------------------------------------------------------ */

static PyObject *state_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", "batch", "capacity", NULL};
  PyObject *model;
  Py_ssize_t slots, capacity;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!nn", names, model_type, &model, &slots, &capacity)) return NULL;
  const int most[] = {1 << 20, 1 << 30};
  if (slots < 1 || capacity < 1 || slots > most[0] || capacity > most[1])
    return PyErr_Format(PyExc_ValueError, "a State needs a batch from 1 to %d and a capacity from 1 to %d, got %zd and %zd", most[0], most[1], slots,
                        capacity);
  StateObject *self = (StateObject *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->model = (ModelObject *)Py_NewRef(model);
  self->version = self->model->version;
  self->s.slots = (size_t)slots;
  self->s.capacity = (size_t)capacity;
  if (!state_init(&self->s, &self->model->m)) return (PyObject *)self;
  Py_DECREF(self);
  return finish("State", 1);
}

static void state_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  StateObject *o = (StateObject *)self;
  state_free(&o->s);
  Py_XDECREF(o->model);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *state_counter(PyObject *self, void *which) {
  State *s = &((StateObject *)self)->s;
  npy_intp n = (npy_intp)s->slots;
  PyObject *array = PyArray_SimpleNew(1, &n, NPY_INT32);
  if (array) memcpy(PyArray_DATA((PyArrayObject *)array), which ? s->pending : s->pos, s->slots * sizeof(int32_t));
  return array;
}

static PyObject *state_size(PyObject *self, void *which) {
  State *s = &((StateObject *)self)->s;
  return PyLong_FromSize_t(which ? s->capacity : s->slots);
}

static Cache *cache_at(State *s, size_t i) { return &s->layer[i / MOST_CACHES][i % MOST_CACHES]; }

static PyObject *state_row_bytes(PyObject *self, void *none) {
  (void)none;
  State *s = &((StateObject *)self)->s;
  size_t bytes = 0;
  for (size_t i = 0; i < s->layers * MOST_CACHES; i++) bytes += cache_at(s, i)->rows * cache_at(s, i)->row_bytes;
  return PyLong_FromSize_t(bytes);
}

/* commit(rows, n, path or None): all rows checked before any moves */
static PyObject *state_commit_(PyObject *self, PyObject *args) {
  State *s = &((StateObject *)self)->s;
  PyObject *rows_value, *n_value, *path_value;
  if (!PyArg_ParseTuple(args, "OOO", &rows_value, &n_value, &path_value)) return NULL;
  size_t B = PyArray_Check(rows_value) ? (size_t)PyArray_SIZE((PyArrayObject *)rows_value) : 0, width = 0;
  const int32_t *rows = ints(rows_value, "rows", B, 0, (long)s->slots - 1), *n = rows ? ints(n_value, "n", B, 0, PENDING) : NULL, *path = NULL;
  if (!n || check_rows("commit", rows, NULL, 0, B, 0, s->slots)) return NULL;
  if (path_value != Py_None) {
    size_t size = PyArray_Check(path_value) ? (size_t)PyArray_SIZE((PyArrayObject *)path_value) : 0;
    width = B ? size / B : 0;
    if (!(path = ints(path_value, "path", B * width, -1, PENDING - 1))) return NULL;
  }
  for (size_t b = 0; b < B; b++) {
    if (n[b] > s->pending[rows[b]])
      return PyErr_Format(PyExc_ValueError, "commit: row %d has %d pending tokens, fewer than n = %d", (int)rows[b], (int)s->pending[rows[b]], (int)n[b]);
    if (path && (size_t)n[b] > width) return PyErr_Format(PyExc_ValueError, "commit: path has %zu columns, fewer than n = %d", width, (int)n[b]);
    for (int32_t i = 0; path && i < n[b]; i++) {
      int32_t p = path[b * width + (size_t)i];
      if (p < i || p >= s->pending[rows[b]] || (i && p <= path[b * width + (size_t)i - 1]))
        return PyErr_Format(PyExc_ValueError, "commit: path[%zu,%d] is %d: a path rises through the %d pending tokens", b, (int)i, (int)p, (int)s->pending[rows[b]]);
    }
  }
  for (size_t b = 0; b < B; b++) state_commit(s, (size_t)rows[b], (size_t)n[b], path ? path + b * width : NULL);
  return finish("State.commit", 0);
}

static PyObject *state_reset_(PyObject *self, PyObject *rows_value) {
  State *s = &((StateObject *)self)->s;
  size_t B = PyArray_Check(rows_value) ? (size_t)PyArray_SIZE((PyArrayObject *)rows_value) : 0;
  const int32_t *rows = ints(rows_value, "rows", B, 0, (long)s->slots - 1);
  if (!rows) return NULL;
  for (size_t b = 0; b < B; b++) state_reset(s, (size_t)rows[b]);
  return finish("State.reset", 0);
}

static PyObject *state_copy_(PyObject *self, PyObject *args) {
  State *s = &((StateObject *)self)->s;
  Py_ssize_t to, from;
  if (!PyArg_ParseTuple(args, "nn", &to, &from)) return NULL;
  if (to < 0 || from < 0 || (size_t)to >= s->slots || (size_t)from >= s->slots)
    return PyErr_Format(PyExc_ValueError, "copy: rows %zd and %zd must lie in 0 to %zu", to, from, s->slots - 1);
  state_copy(s, (size_t)to, (size_t)from);
  return finish("State.copy", 0);
}

/* dump() -> [bytes as uint8 arrays, a cache each], restore(list) */
static PyObject *state_dump(PyObject *self, PyObject *none) {
  (void)none;
  State *s = &((StateObject *)self)->s;
  PyObject *list = PyList_New(0);
  for (size_t i = 0; list && i < s->layers * MOST_CACHES; i++) {
    Cache *c = cache_at(s, i);
    if (!c->data) continue;
    npy_intp n = (npy_intp)(s->slots * c->rows * c->row_bytes);
    PyObject *array = PyArray_SimpleNew(1, &n, NPY_UINT8);
    if (array) device_pull(PyArray_DATA((PyArrayObject *)array), c->data, (size_t)n);
    for (size_t b = 0; array && b < s->slots; b++) { /* not what a sequence before has left */
      const size_t read = state_read(s, c, b);
      memset((char *)PyArray_DATA((PyArrayObject *)array) + (b * c->rows + read) * c->row_bytes, 0, (c->rows - read) * c->row_bytes);
    }
    if (!array || PyList_Append(list, array)) Py_CLEAR(list);
    Py_XDECREF(array);
  }
  npy_intp n = (npy_intp)s->slots;
  const int32_t *counters[] = {s->pos, s->pending, s->seen};
  for (int k = 0; list && k < 3; k++) {
    PyObject *array = PyArray_SimpleNew(1, &n, NPY_INT32);
    if (array) memcpy(PyArray_DATA((PyArrayObject *)array), counters[k], s->slots * sizeof(int32_t));
    if (!array || PyList_Append(list, array)) Py_CLEAR(list);
    Py_XDECREF(array);
  }
  return checked("State.save", list);
}

static PyObject *state_restore(PyObject *self, PyObject *list) {
  State *s = &((StateObject *)self)->s;
  size_t have = 0, i;
  for (i = 0; i < s->layers * MOST_CACHES; i++) have += cache_at(s, i)->data != NULL;
  int good = PyList_Check(list) && (size_t)PyList_GET_SIZE(list) == have + 3;
  const int32_t *counter[3] = {0};
  for (int copying = 0; good && copying < 2; copying++) { /* everything is checked before anything moves */
    size_t k = 0;
    for (i = 0; i < s->layers * MOST_CACHES && good; i++) {
      Cache *c = cache_at(s, i);
      if (!c->data) continue;
      PyArrayObject *a = (PyArrayObject *)PyList_GET_ITEM(list, (Py_ssize_t)k++);
      size_t bytes = s->slots * c->rows * c->row_bytes;
      good = PyArray_Check(a) && PyArray_TYPE(a) == NPY_UINT8 && PyArray_ISCARRAY_RO(a) && (size_t)PyArray_SIZE(a) == bytes;
      if (good && copying) device_push(c->data, PyArray_DATA(a), bytes);
    }
    for (int n = 0; n < 3 && good && !copying; n++) {
      long high[] = {(long)s->capacity, PENDING, (long)s->capacity};
      good = (counter[n] = ints(PyList_GET_ITEM(list, (Py_ssize_t)k++), "state", s->slots, 0, high[n])) != NULL;
    }
    for (i = 0; i < s->slots && good; i++) { /* of pos + pending tokens, the ring holds those behind seen */
      long pos = counter[0][i], pending = counter[1][i], seen = counter[2][i];
      good = seen <= pos && pos - seen + pending <= PENDING && (size_t)(pos + pending) <= s->capacity;
    }
  }
  if (!good) {
    PyErr_Clear();
    return PyErr_Format(PyExc_ValueError, "the saved state does not fit: another model, batch or capacity, or a damaged file");
  }
  int32_t *to[] = {s->pos, s->pending, s->seen};
  for (int n = 0; n < 3; n++) memcpy(to[n], counter[n], s->slots * sizeof(int32_t));
  return finish("State.load", 0);
}

static PyMethodDef state_methods[] = {{"commit", state_commit_, METH_VARARGS, "commit(rows, n, path or None)"},
                                      {"reset", state_reset_, METH_O, "reset(rows)"},
                                      {"copy", state_copy_, METH_VARARGS, "copy(dst, src)"},
                                      {"dump", state_dump, METH_NOARGS, "dump() -> list of arrays"},
                                      {"restore", state_restore, METH_O, "restore(list)"},
                                      {0}};
static PyGetSetDef state_getters[] = {{"pos", state_counter, NULL, "committed tokens a row (B,), a copy", NULL},
                                      {"pending", state_counter, NULL, "tokens that wait for commit a row (B,), a copy", (void *)1},
                                      {"batch", state_size, NULL, "rows", NULL},
                                      {"capacity", state_size, NULL, "most tokens a row", (void *)1},
                                      {"row_bytes", state_row_bytes, NULL, "memory of a row", NULL},
                                      {0}};

static PyType_Slot model_slots[] = {{Py_tp_new, model_new}, {Py_tp_dealloc, model_dealloc}, {Py_tp_methods, model_methods},
                                    {Py_tp_doc, "Model(architecture, dtype): parameters, gradients and calls; mambainllama.Model wraps it."}, {0}};
static PyType_Slot state_slots[] = {{Py_tp_new, state_new}, {Py_tp_dealloc, state_dealloc}, {Py_tp_methods, state_methods},
                                    {Py_tp_getset, state_getters}, {Py_tp_doc, "State(model, batch, capacity): what decoding remembers."}, {0}};
static PyType_Spec model_spec = {"mambainllama.CModel", sizeof(ModelObject), 0, Py_TPFLAGS_DEFAULT, model_slots};
static PyType_Spec state_spec = {"mambainllama.CState", sizeof(StateObject), 0, Py_TPFLAGS_DEFAULT, state_slots};

int add_types(PyObject *module) {
  model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
  state_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &state_spec, NULL);
  if (!model_type || !state_type) return -1;
  return PyModule_AddObjectRef(module, "Model", (PyObject *)model_type) || PyModule_AddObjectRef(module, "State", (PyObject *)state_type) ? -1 : 0;
}
