/* dlpack.c - DLPack (dmlc/dlpack, include/dlpack/dlpack.h 1.0): arrays of other libraries come in, ours go out, nothing copied. */
#include "module.h"

#include "model.h"

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_READ_ONLY = 1 };
typedef struct {
  int32_t type, id;
} DLDevice;
typedef struct {
  void *data;
  DLDevice device;
  int32_t dims;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides; /* strides NULL: C order */
  uint64_t offset;
} DLTensor;
typedef struct Managed {
  DLTensor tensor;
  void *context;
  void (*release)(struct Managed *self);
} Managed;
typedef struct Versioned {
  struct {
    uint32_t major, minor;
  } version;
  void *context;
  void (*release)(struct Versioned *self);
  uint64_t flags;
  DLTensor tensor;
} Versioned;
static const char OLD[] = "dltensor", NEW[] = "dltensor_versioned";

static DLDevice here(void) {
  DLDevice device = {DL_CPU, 0};
  int id = device_id();
  return id < 0 ? device : (DLDevice){DL_CUDA, id};
}

/* ---- in -------------------------------------------------------------------------------------------------------------------- */

/* object.method(), with keywords if there are any. */
static PyObject *call_method(PyObject *object, const char *method, PyObject *keywords) {
  PyObject *bound = PyObject_GetAttrString(object, method), *none = PyTuple_New(0);
  PyObject *result = bound && none ? PyObject_Call(bound, none, keywords) : NULL;
  Py_XDECREF(bound);
  Py_XDECREF(none);
  return result;
}

static PyObject *capsule_of(PyObject *value, int on_device) {
  PyObject *keywords = on_device ? Py_BuildValue("{s(ii)sn}", "max_version", 1, 0, "stream", (Py_ssize_t)(intptr_t)device_stream())
                                 : Py_BuildValue("{s(ii)}", "max_version", 1, 0);
  PyObject *capsule = keywords ? call_method(value, "__dlpack__", keywords) : NULL;
  if (!capsule && keywords && PyErr_ExceptionMatches(PyExc_TypeError)) { /* from before DLPack 1.0 */
    PyErr_Clear();
    if (!PyDict_DelItemString(keywords, "max_version")) capsule = call_method(value, "__dlpack__", keywords);
  }
  Py_XDECREF(keywords);
  return capsule;
}

int read_dlpack(const char *what, const char *name, PyObject *value, Array *out) {
  int type, id;
  PyObject *device = PyObject_HasAttrString(value, "__dlpack_device__") ? call_method(value, "__dlpack_device__", NULL) : NULL;
  if (!device) return PyErr_Occurred() ? -1 : 0;
  int parsed = PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &id);
  Py_DECREF(device);
  if (!parsed) return -1;
  DLDevice own = here();
  out->on_device = own.type == DL_CUDA && type == DL_CUDA;
  if (out->on_device ? id != own.id : type != DL_CPU && type != DL_CUDA_HOST) {
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' is on the DLPack device (%d, %d), and this module computes on (%d, %d)", what, name, type, id,
                 (int)own.type, (int)own.id);
    return -1;
  }
  PyObject *capsule = capsule_of(value, out->on_device);
  if (!capsule) return -1;
  const DLTensor *t = NULL;
  uint64_t flags = 0;
  if (PyCapsule_IsValid(capsule, NEW)) {
    Versioned *v = PyCapsule_GetPointer(capsule, NEW);
    t = v->version.major == 1 ? &v->tensor : NULL;
    flags = v->flags;
  } else if (PyCapsule_IsValid(capsule, OLD)) {
    t = &((Managed *)PyCapsule_GetPointer(capsule, OLD))->tensor;
  }
  if (!t || t->dims < 0 || t->dims > MOST_AXES) {
    PyErr_Format(PyExc_ValueError, "%s: argument '%s' gives no DLPack 1 tensor of at most %d axes", what, name, MOST_AXES);
    Py_DECREF(capsule);
    return -1;
  }
  out->owner = capsule; /* its destructor releases the memory */
  out->dims = t->dims;
  out->writable = !(flags & DL_READ_ONLY);
  out->contiguous = 1;
  int64_t stride = 1, n = 1;
  for (int d = t->dims - 1; d >= 0; d--) {
    out->shape[d] = (size_t)t->shape[d];
    if (t->strides && t->shape[d] > 1 && t->strides[d] != stride) out->contiguous = 0;
    stride *= t->shape[d];
  }
  for (int d = 0; d < t->dims; d++) n *= t->shape[d];
  out->contiguous |= n == 0;
  const int code = t->dtype.code, bits = t->dtype.lanes == 1 ? t->dtype.bits : 0;
  out->type = code == DL_FLOAT && bits == 32 ? FLOAT32 : (code == DL_BFLOAT || code == DL_UINT) && bits == 16 ? BFLOAT16 : code == DL_INT && bits == 32 ? INT32 : -1;
  const char *kind[] = {"int", "uint", "float", "?", "bfloat", "complex", "bool"};
  snprintf(out->dtype, sizeof out->dtype, "%s%d", code < 7 ? kind[code] : "?", bits);
  out->data = n ? (char *)t->data + t->offset : (void *)out; /* nothing is read of it, yet it is there */
  const size_t unit = out->on_device ? 16 : out->type == BFLOAT16 ? 2 : 4; /* kernels read 16 bytes at a time */
  out->contiguous = out->contiguous && (n == 0 || (uintptr_t)out->data % unit == 0);
  return 1;
}

/* ---- out -------------------------------------------------------------------------------------------------------------------- */

typedef struct {
  PyObject_HEAD Buffer *buffer;
  int type, dims, read_only;
  int64_t shape[MOST_AXES];
} TensorObject;

static PyTypeObject *tensor_type;

PyObject *new_tensor(Buffer *buffer, int type, int dims, const npy_intp *shape, int read_only) {
  TensorObject *self = buffer ? (TensorObject *)tensor_type->tp_alloc(tensor_type, 0) : NULL;
  if (!self) {
    buffer_release(buffer);
    return buffer ? NULL : raise_failure("Tensor", "out of memory");
  }
  self->buffer = buffer;
  self->type = type, self->dims = dims, self->read_only = read_only;
  for (int d = 0; d < dims; d++) self->shape[d] = shape[d];
  return (PyObject *)self;
}

PyObject *tensor_result(int type, int dims, const npy_intp *shape, void **data) {
  size_t bytes = type == BFLOAT16 ? 2 : 4;
  for (int d = 0; d < dims; d++) bytes *= (size_t)shape[d];
  Buffer *buffer = buffer_new(bytes);
  if (!buffer) return raise_failure("Tensor", device_error());
  *data = buffer->data;
  return new_tensor(buffer, type, dims, shape, 0);
}

static void tensor_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  buffer_release(((TensorObject *)self)->buffer);
  type->tp_free(self);
  Py_DECREF(type);
}

/* What a capsule holds: a reference to the buffer, and where its consumer's work is. */
typedef struct {
  Managed old;
  Versioned new;
  Buffer *buffer;
  void *stream;
  int64_t shape[MOST_AXES], strides[MOST_AXES];
} Export;

static void release(Export *e) { /* by any thread, without the GIL: the consumer is through with it, but its queue may not be */
  if (e->stream) device_order(e->stream, 0);
  buffer_release(e->buffer);
  free(e);
}
static void release_old(Managed *self) { release(self->context); }
static void release_new(Versioned *self) { release(self->context); }

static void drop_capsule(PyObject *capsule) { /* nobody took it */
  for (int new = 0; new < 2; new++)
    if (PyCapsule_IsValid(capsule, new ? NEW : OLD)) {
      void *p = PyCapsule_GetPointer(capsule, new ? NEW : OLD);
      new ? release_new(p) : release_old(p);
      return;
    }
}

static PyObject *tensor_dlpack(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO", names, &stream, &version, &device, &copy)) return NULL;
  TensorObject *o = (TensorObject *)self;
  DLDevice own = here();
  int type = own.type, id = own.id;
  unsigned major = 0, minor = 0;
  if (device != Py_None && !(PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &id))) return NULL;
  if (version != Py_None && !(PyTuple_Check(version) && PyArg_ParseTuple(version, "II", &major, &minor))) return NULL;
  long long queue = stream == Py_None ? 1 : PyLong_AsLongLong(stream); /* 1: CUDA's default stream; -1: the caller orders the work itself */
  if (PyErr_Occurred()) return NULL;
  if (type != own.type || id != own.id || copy == Py_True || queue == 0)
    return PyErr_Format(PyExc_BufferError, "this memory is on (%d, %d), and it is neither copied nor given to stream 0", (int)own.type, (int)own.id);
  Export *e = calloc(1, sizeof *e);
  if (!e) return PyErr_NoMemory();
  e->buffer = buffer_share(o->buffer);
  if (own.type == DL_CUDA && queue > 0) {
    e->stream = (void *)(intptr_t)queue;
    device_order(e->stream, 1);
  }
  int64_t stride = 1;
  for (int d = o->dims - 1; d >= 0; d--) e->shape[d] = o->shape[d], e->strides[d] = stride, stride *= o->shape[d];
  DLTensor t = {.data = o->buffer->data, .device = own, .dims = o->dims, .dtype = {DL_FLOAT, 32, 1}, .shape = e->shape, .strides = e->strides};
  if (o->type == BFLOAT16) t.dtype.code = DL_BFLOAT, t.dtype.bits = 16;
  if (o->type == INT32) t.dtype.code = DL_INT;
  e->old = (Managed){t, e, release_old};
  e->new = (Versioned){{1, 0}, e, release_new, o->read_only ? DL_READ_ONLY : 0, t};
  PyObject *capsule = major ? PyCapsule_New(&e->new, NEW, drop_capsule) : PyCapsule_New(&e->old, OLD, drop_capsule);
  if (!capsule) release(e);
  return capsule;
}

static PyObject *tensor_device(PyObject *self, PyObject *none) {
  (void)self, (void)none;
  DLDevice own = here();
  return Py_BuildValue("ii", (int)own.type, (int)own.id);
}

static PyObject *tensor_numpy(PyObject *self, PyObject *none) {
  (void)none;
  TensorObject *o = (TensorObject *)self;
  npy_intp shape[MOST_AXES];
  for (int d = 0; d < o->dims; d++) shape[d] = (npy_intp)o->shape[d];
  PyObject *array = PyArray_SimpleNew(o->dims, shape, o->type == INT32 ? NPY_INT32 : NPY_FLOAT32);
  if (!array) return NULL;
  const size_t n = (size_t)PyArray_SIZE((PyArrayObject *)array);
  char *to = PyArray_DATA((PyArrayObject *)array);
  uint16_t *half = (uint16_t *)(to + 2 * n); /* widened from the front: a half is read before its place is written */
  device_lock();
  device_pull(o->type == BFLOAT16 ? (void *)half : to, o->buffer->data, n * (o->type == BFLOAT16 ? 2 : 4));
  const char *failure = device_error();
  device_unlock();
  for (size_t i = 0; i < n && o->type == BFLOAT16; i++) {
    const float wide = bf16_to_float(half[i]);
    memcpy(to + 4 * i, &wide, 4);
  }
  if (!failure) return array;
  Py_DECREF(array);
  return raise_failure("Tensor.numpy", failure);
}

static PyObject *tensor_shape(PyObject *self, void *none) {
  (void)none;
  TensorObject *o = (TensorObject *)self;
  PyObject *tuple = PyTuple_New(o->dims);
  for (int d = 0; tuple && d < o->dims; d++) PyTuple_SET_ITEM(tuple, d, PyLong_FromLongLong(o->shape[d]));
  return tuple;
}

static PyObject *tensor_dtype(PyObject *self, void *none) {
  (void)none;
  const int type = ((TensorObject *)self)->type;
  return PyUnicode_FromString(type == BFLOAT16 ? "bfloat16" : type == INT32 ? "int32" : "float32");
}

static PyMethodDef tensor_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS, "A capsule of this memory, not a copy."},
    {"__dlpack_device__", tensor_device, METH_NOARGS, "(1, 0) on the CPU, (2, number) on CUDA."},
    {"numpy", tensor_numpy, METH_NOARGS, "A copy on the host: float32, or int32."},
    {0}};
static PyGetSetDef tensor_getters[] = {{"shape", tensor_shape, NULL, "a tuple", NULL},
                                       {"dtype", tensor_dtype, NULL, "\"float32\" | \"bfloat16\" | \"int32\"", NULL},
                                       {0}};
static PyType_Slot tensor_slots[] = {{Py_tp_dealloc, tensor_dealloc}, {Py_tp_methods, tensor_methods}, {Py_tp_getset, tensor_getters},
                                     {Py_tp_doc, "Memory of the device, for torch.from_dlpack and its like. It lives as long as anybody uses it."}, {0}};
static PyType_Spec tensor_spec = {"mambainllama.Tensor", sizeof(TensorObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, tensor_slots};

int add_tensor(PyObject *module) {
  tensor_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
  return tensor_type ? PyModule_AddObjectRef(module, "Tensor", (PyObject *)tensor_type) : -1;
}
