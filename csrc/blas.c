/* blas.c - at import, the sgemm inside SciPy and the setter of its threads; the CPU's large products use it. */
#include "module.h"

#include <dlfcn.h>
#include <link.h>

#include "blas.h"

/* "void (char *, char *, int *, int *, int *, S *, S *, int *, S *, int *, S *, S *, int *)", S a typedef of float. */
static int sgemm_signature(const char *s) {
  static const char kinds[] = "cciiissisissi"; /* of Fortran's sgemm */
  if (strncmp(s, "void (", 6)) return 0;
  s += 6;
  for (const char *k = kinds; *k; k++) {
    size_t length = strcspn(s, ",)");
    if (length < 3 || s[length - 1] != '*' || s[length - 2] != ' ') return 0;
    size_t word = length - 2;
    int fits = *k == 'c' ? word == 4 && !strncmp(s, "char", 4)
               : *k == 'i' ? word == 3 && !strncmp(s, "int", 3)
                           : (word == 5 && !strncmp(s, "float", 5)) || (word > 14 && !strncmp(s + word - 14, "cython_blas_s", 13)) ||
                                 (word > 13 && !strncmp(s + word - 13, "cython_blas_s", 13));
    if (!fits || (k[1] ? s[length] != ',' : s[length] != ')')) return 0;
    s += length + 1 + (s[length + 1] == ' ');
  }
  return *s == 0;
}

static int find_threads(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size;
  (void)data;
  if (!info->dlpi_name || !strstr(info->dlpi_name, "scipy") || !strstr(info->dlpi_name, "blas")) return 0;
  void *library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  static const char *const pairs[][2] = {{"scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"},
                                         {"openblas_get_num_threads", "openblas_set_num_threads"}};
  for (int i = 0; i < 2 && !blas_set_threads; i++) {
    void *get = dlsym(library, pairs[i][0]), *set = dlsym(library, pairs[i][1]);
    if (get && set) {
      memcpy(&blas_get_threads, &get, sizeof get);
      memcpy(&blas_set_threads, &set, sizeof set);
    }
  }
  return blas_set_threads != NULL; /* the handle stays open: the library must not go away under us */
}

/* Without the capsule, with a signature that we do not know, or with threads that we cannot set, linear.c's own product serves. */
int find_blas(void) {
  PyObject *scipy = PyImport_ImportModule("scipy.linalg.cython_blas"), *api = NULL, *capsule = NULL;
  if (scipy) api = PyObject_GetAttrString(scipy, "__pyx_capi__");
  if (api) capsule = PyMapping_GetItemString(api, "sgemm");
  if (capsule && PyCapsule_CheckExact(capsule) && sgemm_signature(PyCapsule_GetName(capsule))) {
    dl_iterate_phdr(find_threads, NULL);
    void *p = blas_set_threads ? PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)) : NULL;
    memcpy(&blas_sgemm, &p, sizeof p);
  }
  Py_XDECREF(capsule);
  Py_XDECREF(api);
  Py_XDECREF(scipy);
  PyErr_Clear();
  return blas_sgemm != NULL;
}
