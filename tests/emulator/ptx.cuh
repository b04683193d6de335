/* ptx.cuh - cuda/ptx.cuh's instructions on the CPU: fragments travel between fibers as they do between lanes. */
#ifndef EMULATED_PTX_CUH
#define EMULATED_PTX_CUH
#include <assert.h>

#include "cuda_bf16.h"

static inline float emulated_half(unsigned word, int high) { return __uint_as_float(high ? word & 0xffff0000u : word << 16); }

/* c (16x8 float) += a (16x16 bf16, row) b (16x8 bf16, col): fragments as PTX ISA, mma.m16n8k16. */
static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Fragments { unsigned a[4], b[2]; } mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b, b, sizeof mine.b);
  emulator::Exchange<Fragments> e(mine, 0xffffffffu);
  int lane = emulator::lane();
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      unsigned wa = e.get(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], wb = e.get(col * 4 + k % 8 / 2).b[k / 8];
      sum += emulated_half(wa, k % 2) * emulated_half(wb, k % 2);
    }
    c[i] += sum;
  }
}

/* Four 8x8 matrices of 2-byte elements; lane i gives the address of row i%8 of matrix i/8. */
static inline void emulated_ldmatrix(unsigned *r, int count, const void *row, bool transposed) {
  assert((uintptr_t)row % 16 == 0);
  emulator::Exchange<const void *> e(row, 0xffffffffu);
  int lane = emulator::lane();
  for (int m = 0; m < count; m++)
    for (int half = 0; half < 2; half++) {
      int i = lane / 4, j = lane % 4 * 2 + half;
      uint16_t value = ((const uint16_t *)e.get(m * 8 + (transposed ? j : i)))[transposed ? i : j];
      r[m] = half ? r[m] | (unsigned)value << 16 : value;
    }
}
static inline void ldmatrix_x4(unsigned (&r)[4], const void *row) { emulated_ldmatrix(r, 4, row, false); }
static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) { emulated_ldmatrix(r, 4, row, true); }
static inline void ldmatrix_x2(unsigned (&r)[2], const void *row) { emulated_ldmatrix(r, 2, row, false); }
static inline void ldmatrix_x2_trans(unsigned (&r)[2], const void *row) { emulated_ldmatrix(r, 2, row, true); }

/* 16 bytes from global to shared memory; bytes < 16: the rest is zero. */
static inline void cp_async_16(void *shared, const void *global, int bytes = 16) {
  assert((uintptr_t)shared % 16 == 0 && (bytes == 0 || (uintptr_t)global % 16 == 0));
  memset(shared, 0, 16);
  if (bytes) memcpy(shared, global, (size_t)bytes);
}
static inline void cp_async_16_ahead(void *shared, const void *global, int bytes = 16) { cp_async_16(shared, global, bytes); }
static inline void cp_async_commit() {}
template <int N> static inline void cp_async_wait() {}
static inline void wait_for_previous_kernel() {}
static inline void let_next_kernel_start() {}
static inline float exp2_approx(float x) { return exp2f(x); }
static inline float log2_approx(float x) { return log2f(x); }
static inline float reciprocal_approx(float x) { return 1.0f / x; }
static inline uint4 load_streaming(const void *p) { uint4 v; memcpy(&v, p, 16); return v; }
static inline void forget(uint4 &) {}
static inline void prefetch_l2(const void *) {}
#endif
