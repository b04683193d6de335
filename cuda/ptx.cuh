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

/* ---- Hopper (sm_90a): products of a warpgroup, four warps from a multiple of 128 threads on; barriers in shared memory --- */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS 1
#endif

/* A matrix of bf16 in shared memory, rows of 128 bytes from a multiple of 1024 on, in which the hardware finds 16-byte unit u of
 * row r at u ^ r%8. stride: bytes from 8 rows to the next 8; leading (transposed matrices): from 64 columns to the next 64. */
__device__ static inline uint64_t matrix_128(const void *start, int leading, int stride) {
  return (uint64_t)(shared_address(start) >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | 1ull << 62;
}
/* The same, so many bytes further. */
__device__ static inline uint64_t matrix_at(uint64_t matrix, int bytes) { return matrix + (bytes >> 4); }

/* c (64xN float; a warp's 16 rows as in mma) = (add: +=) a (64x16) b (16xN). b: N rows of 16; TRANSPOSED: 16 rows of N. a: 64 rows
 * of 16, or a warp's fragment as in mma. In order between wgmma_fence (registers may be used, and before that fence_async: shared
 * memory has been written), wgmma_commit (ends a group) and wgmma_wait<n> (all groups but the last n are done), after which
 * settle(c) keeps the compiler from reading c earlier. */
#define WGMMA_4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define WGMMA_32(c, n)                                                                                                         \
  WGMMA_4(c, n), WGMMA_4(c, n + 1), WGMMA_4(c, n + 2), WGMMA_4(c, n + 3), WGMMA_4(c, n + 4), WGMMA_4(c, n + 5),                 \
      WGMMA_4(c, n + 6), WGMMA_4(c, n + 7)
#define WGMMA_C64                                                                                                              \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define WGMMA_C128                                                                                                             \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"    \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"   \
  "%62,%63}"
template <int TRANSPOSED> __device__ static inline void wgmma(float (&c)[8][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_C64 ", %32, %33, p, 1, 1, 0, %35;\n}\n"
               : WGMMA_32(c, 0) : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED));
}
template <int TRANSPOSED> __device__ static inline void wgmma(float (&c)[16][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " WGMMA_C128 ", %64, %65, p, 1, 1, 0, %67;\n}\n"
               : WGMMA_32(c, 0), WGMMA_32(c, 8) : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED));
}
template <int TRANSPOSED> __device__ static inline void wgmma(float (&c)[8][4], const unsigned (&a)[4], uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_C64 ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}\n"
               : WGMMA_32(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}
template <int TRANSPOSED> __device__ static inline void wgmma(float (&c)[16][4], const unsigned (&a)[4], uint64_t b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " WGMMA_C128 ", {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}\n"
               : WGMMA_32(c, 0), WGMMA_32(c, 8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}
__device__ static inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ static inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N> __device__ static inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory"); }
template <int N> __device__ static inline void settle(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) asm volatile("" : WGMMA_4(c, n)::"memory");
}
/* What this thread wrote to shared memory is seen by products that start after a barrier. */
__device__ static inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

/* A barrier of `count` arrivals; its phases alternate between parity 0 and 1. wait: until the phase of that parity is over. */
__device__ static inline void barrier_init(uint64_t *barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ static inline void barrier_arrive(uint64_t *barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(shared_address(barrier)) : "memory");
}
__device__ static inline void barrier_wait(uint64_t *barrier, int parity) {
  asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}\n"
               ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
/* Of `threads` threads, a multiple of 32; id 1 .. 15. */
__device__ static inline void barrier_of(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
/* The warpgroup gives registers back, down to N a thread; or takes them, up to N. */
template <int N> __device__ static inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N)); }
template <int N> __device__ static inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N)); }
#endif
