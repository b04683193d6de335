/* ptx.cuh - the PTX instructions that kernels use, each as a function; tests/emulator/ptx.cuh has them on the CPU.
 *
 * Fragments of mma.m16n8k16 (PTX ISA): lane = 4 g + j. a[i]: row g + i%2*8, columns 2j, 2j+1 (+8 for i >= 2);
 * b[i]: rows 2j, 2j+1 (+8 for i = 1) of column g; c[i]: row g + i/2*8, column 2j + i%2. The low half is the lower column. */
#ifndef MIL_PTX_CUH
#define MIL_PTX_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define DYNAMIC_SHARED(type, name)                             \
  extern __shared__ __align__(1024) unsigned char shared_bytes[]; \
  type *name = (type *)shared_bytes

__device__ static inline unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* c (16x8 float) += a (16x16 bf16, row) b (16x8 bf16, col) */
__device__ static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* 8x8 matrices of 2-byte elements from shared memory; lane i gives the address (16-byte aligned) of row i%8 of matrix i/8.
 * x2: lanes 16.. are ignored. trans: each matrix transposed. */
__device__ static inline void ldmatrix_x4(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ static inline void ldmatrix_x2(unsigned (&r)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ static inline void ldmatrix_x2_trans(unsigned (&r)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

/* 16 bytes from global to shared memory, both 16-byte aligned; of them only `bytes` are read, the rest is zero. */
__device__ static inline void cp_async_16(void *shared, const void *global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
/* The same, and L2 gets the whole aligned 256 bytes around it. */
__device__ static inline void cp_async_16_ahead(void *shared, const void *global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
__device__ static inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/* At most N of this thread's groups are still under way. */
template <int N> __device__ static inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

/* Programmatic dependent launch: what stands before the wait may overlap the kernel before; nothing written by it may be read there.
 * No effect where the launch does not ask for it. */
__device__ static inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
__device__ static inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ static inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ static inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ static inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
/* 16 bytes that nobody reads again (weights in decode): not kept in L1. */
__device__ static inline uint4 load_streaming(const void *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
/* The compiler knows nothing of v from here on: what is made of it again is computed again, not kept in registers. */
__device__ static inline void forget(uint4 &v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
__device__ static inline void prefetch_l2(const void *p) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p)); }
#endif
