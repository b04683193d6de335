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

/* ---- Hopper: a product is computed when its group is waited for, as late as the hardware may ----------------------------- */

#define WARPGROUPS 1
static inline unsigned shared_address(const void *p) { return (unsigned)((const unsigned char *)p - emulator::shared_memory()); }
static inline uint64_t matrix_128(const void *start, int leading, int stride) {
  assert(leading % 16 == 0 && stride % 16 == 0 && shared_address(start) % 16 == 0);
  return (uint64_t)(shared_address(start) >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
static inline uint64_t matrix_at(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

/* Element (row of A or column of B, k) of the matrix that a descriptor (PTX ISA, wgmma; 128-byte swizzle) names. */
static inline float emulated_element(uint64_t matrix, int transposed, int row, int k) {
  assert(matrix >> 62 == 1 && (matrix >> 49 & 7) == 0);
  const unsigned start = (matrix & 0x3fff) << 4, leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
  unsigned at = transposed ? start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                           : start + row / 8 * stride + row % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  assert(at < 232448);
  return __bfloat162float(*(const __nv_bfloat16 *)(emulator::shared_memory() + at));
}
template <int TRANSPOSED, int N, class A> static inline void emulated_wgmma(float (&c)[N][4], A a, uint64_t b, int add) {
  const int lane = emulator::lane(), j = lane % 4;
  float (*const sums)[4] = c;
  emulator::later([=] {
    for (int n = 0; n < N; n++)
      for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += a(i / 2, k) * emulated_element(b, TRANSPOSED, 8 * n + 2 * j + i % 2, k);
        sums[n][i] = add ? sums[n][i] + sum : sum;
      }
  });
}
template <int TRANSPOSED, int N> static inline void wgmma(float (&c)[N][4], uint64_t a, uint64_t b, int add) {
  const int row = threadIdx.x % 128 / 32 * 16 + emulator::lane() / 4;
  emulated_wgmma<TRANSPOSED>(c, [=](int half, int k) { return emulated_element(a, 0, row + 8 * half, k); }, b, add);
}
template <int TRANSPOSED, int N> static inline void wgmma(float (&c)[N][4], const unsigned (&a)[4], uint64_t b, int add) {
  struct Fragment { unsigned a[4]; } mine;
  struct Rows { float v[2][16]; } rows;
  memcpy(mine.a, a, sizeof mine.a);
  emulator::Exchange<Fragment> e(mine, 0xffffffffu);
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++)
      rows.v[half][k] = emulated_half(e.get((emulator::lane() & ~3) + k % 8 / 2).a[half + k / 8 * 2], k % 2);
  emulated_wgmma<TRANSPOSED>(c, [=](int half, int k) { return rows.v[half][k]; }, b, add);
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() { emulator::commit_later(); }
template <int N> static inline void wgmma_wait() { emulator::run_later(N); }
template <int N> static inline void settle(float (&)[N][4]) {}
static inline void fence_async() {}

/* count, arrivals that are missing, phase */
static inline void barrier_init(uint64_t *barrier, int count) { *barrier = (uint64_t)count << 48 | (uint64_t)count << 32; }
static inline void barrier_arrive(uint64_t *barrier) {
  uint64_t v = *barrier - (1ull << 32);
  if (!(v >> 32 & 0xffff)) v = ((v & 0xffff000000000000ull) | v >> 48 << 32 | (v & 0xffffffffu)) + 1;
  *barrier = v;
}
static inline void barrier_wait(uint64_t *barrier, int parity) {
  emulator::wait_until([=] { return (int)(*(volatile uint64_t *)barrier & 1) != parity; });
}
static inline void barrier_of(int id, int threads) { emulator::barrier_of(id, threads); }
template <int N> static inline void give_registers() {}
template <int N> static inline void take_registers() {}
#endif
