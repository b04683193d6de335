/* blas.h - the sgemm that module.c finds in SciPy at import; NULL: none, linear.c uses its own product. */
#ifndef MIL_BLAS_H
#define MIL_BLAS_H

typedef void Sgemm(char *ta, char *tb, int *m, int *n, int *k, float *alpha, float *a, int *lda, float *b, int *ldb, float *beta,
                   float *c, int *ldc); /* Fortran's, column-major */
extern Sgemm *blas_sgemm;
extern int (*blas_get_threads)(void); /* both or neither; BLAS runs at one thread inside each of our workers */
extern void (*blas_set_threads)(int);
#endif
