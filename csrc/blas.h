/* blas.h - the library for products of many rows: on the CPU the sgemm that blas.c finds in SciPy at import (NULL: none, linear.c
 * uses its own product); on a GPU cuBLASLt, which is linked. */
#ifndef MIL_BLAS_H
#define MIL_BLAS_H

typedef void Sgemm(char *ta, char *tb, int *m, int *n, int *k, float *alpha, float *a, int *lda, float *b, int *ldb, float *beta,
                   float *c, int *ldc); /* Fortran's, column-major */
extern Sgemm *blas_sgemm;
extern int (*blas_get_threads)(void); /* both or neither; BLAS runs at one thread inside each of our workers */
extern void (*blas_set_threads)(int);
int find_blas(void);                  /* at import, with the GIL: 1 if there is one */
#endif
