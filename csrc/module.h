/* module.h - what module.c, pymodel.c and dlpack.c, the only files that include Python.h, share. */
#ifndef MIL_MODULE_H
#define MIL_MODULE_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL mil_array_api
#ifndef MODULE_MAIN
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "device.h"
#include "ops.h"

struct Buffer;

/* slot distinct (NULL: S >= B); prev a chain of documents, or with a `past` (caches, a ring) a chain, or for few tokens a tree.
 * -1: a sentence is set, beginning with `what`. */
int check_rows(const char *what, const int32_t *slot, const int32_t *prev, int past, size_t B, size_t T, size_t S);
/* ids (M,J): from 0 to V-1, different ones in a row. -1: a sentence is set, beginning with `what`. */
int check_top(const char *what, const int32_t *ids, size_t M, size_t J, size_t V);
/* NULL, with MemoryError or RuntimeError set: what the device latched. */
PyObject *raise_failure(const char *where, const char *failure);
int add_types(PyObject *module); /* pymodel.c: Model and State */

/* dlpack.c. An array of another library: its memory, which `owner` holds until it is released. type: FLOAT32 | BFLOAT16 (uint16 too) | INT32,
 * -1: another, which `dtype` names, or for an array of NumPy's `descr` (borrowed). */
enum { MOST_AXES = 8, INT32 = 2, REAL_TYPE = sizeof(real) == 2 ? BFLOAT16 : FLOAT32 };
typedef struct {
  void *data;
  PyObject *owner, *descr;
  int on_device, writable, contiguous, type, dims;
  size_t shape[MOST_AXES];
  char dtype[16];
} Array;
/* 1; 0: value has no DLPack; -1: a sentence is set, beginning with `what`. Work of the device after this call finds the array written. */
int read_dlpack(const char *what, const char *name, PyObject *value, Array *out);
/* A Tensor of a reference that it takes over (NULL: an error is set); of new memory, unset. */
PyObject *new_tensor(struct Buffer *buffer, int type, int dims, const npy_intp *shape, int read_only);
PyObject *tensor_result(int type, int dims, const npy_intp *shape, void **data);
int add_tensor(PyObject *module);
#endif
