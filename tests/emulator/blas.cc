/* blas.cc - cuda/blas.cu's product on the CPU, a plain loop. */
#include "common.cuh"

extern "C" int find_blas(void) { return 1; }

static float element(const void *p, int type, size_t i) { return type == FLOAT32 ? ((const float *)p)[i] : bf16_to_float(((const uint16_t *)p)[i]); }

void gemm(void *c, int type_c, size_t ldc, const void *a, size_t lda, int ta, const void *b, size_t ldb, int tb, int type_ab, int add,
          size_t m, size_t n, size_t k) {
  emulator::submit([=] {
    for (size_t i = 0; i < m; i++)
      for (size_t j = 0; j < n; j++) {
        double sum = add ? element(c, type_c, i * ldc + j) : 0;
        for (size_t l = 0; l < k; l++)
          sum += (double)element(a, type_ab, ta ? l * lda + i : i * lda + l) * element(b, type_ab, tb ? j * ldb + l : l * ldb + j);
        if (type_c == FLOAT32)
          ((float *)c)[i * ldc + j] = (float)sum;
        else
          ((uint16_t *)c)[i * ldc + j] = float_to_bf16((float)sum);
      }
  });
}
