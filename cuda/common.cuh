/* common.cuh - what every .cu file shares: launches that are checked, loads and stores of `real`, reductions. */
#ifndef MIL_COMMON_CUH
#define MIL_COMMON_CUH
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <type_traits>

#include "real.h"
extern "C" {
#include "device.h"
#include "ops.h"
}

/* ---- device.cu ----------------------------------------------------------------------------------------------------------- */

cudaStream_t stream(); /* the one stream; made at first use */
int multiprocessors();
bool synchronous(); /* MIL_CUDA_SYNC=1: wait after every launch, so that an error names its kernel, and hide nothing from tools */
/* Latches the first error as "what (file:line): CUDA's sentence"; cudaSuccess: nothing. */
void latch(cudaError_t error, const char *what, const char *file, int line);
#define CHECK(call) latch(call, #call, __FILE__, __LINE__)

/* LAUNCH((kernel<1, 2>), grid, block, shared bytes, arguments…): in the stream, checked; an empty grid does nothing.
 * LAUNCH_EARLY: the kernel may start before the one before it has ended, and calls wait_for_previous_kernel() before it reads
 * what that wrote, or writes what that reads. */
#define LAUNCH(kernel, grid, block, shared, ...) launch(#kernel, __FILE__, __LINE__, 0, kernel, grid, block, shared, __VA_ARGS__)
#define LAUNCH_EARLY(kernel, grid, block, shared, ...) launch(#kernel, __FILE__, __LINE__, 1, kernel, grid, block, shared, __VA_ARGS__)

template <class... P, class... A>
void launch(const char *what, const char *file, int line, int early, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... args) {
  if (!grid.x || !grid.y || !grid.z) return;
  if (shared > 16 << 10) /* with static shared memory beside it, it may pass the 48 KiB that need no asking */
    latch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), what, file, line);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream();
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  latch(cudaLaunchKernelEx(&config, kernel, P(args)...), what, file, line);
  if (synchronous()) latch(cudaStreamSynchronize(stream()), what, file, line);
}

/* Blocks of `block` threads for n items, at most `most` (grid-stride loops take the rest). */
static inline unsigned blocks_for(size_t n, size_t block, size_t most = (size_t)1 << 30) {
  size_t blocks = (n + block - 1) / block;
  return (unsigned)(blocks < most ? blocks : most);
}
static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

/* ---- blas.cu: cuBLASLt ---------------------------------------------------------------------------------------------------- */

/* Row-major c (m,n) (= | add: +=) op(a) op(b) with float accumulation: op(a) (m,k), op(b) (k,n); ta: a is stored (k,m), tb: b (n,k).
 * Types are FLOAT32 | BFLOAT16, a and b alike; FLOAT32 products are plain, not TF32. ld: elements from row to row as stored. */
void gemm(void *c, int type_c, size_t ldc, const void *a, size_t lda, int ta, const void *b, size_t ldb, int tb, int type_ab, int add,
          size_t m, size_t n, size_t k);

/* ---- loads and stores ------------------------------------------------------------------------------------------------------- */

constexpr int REALS_16 = 16 / sizeof(real); /* reals in 16 bytes: 8 of bf16, 4 of float */
constexpr int REAL_TYPE = sizeof(real) == 2 ? BFLOAT16 : FLOAT32;

__device__ static inline float load(const float *p) { return *p; }
__device__ static inline void store(float *p, float v) { *p = v; }
__device__ static inline float load(const __nv_bfloat16 *p) { return __bfloat162float(*p); }
__device__ static inline void store(__nv_bfloat16 *p, float v) { *p = __float2bfloat16(v); }

/* Two bf16 in a word, low half first. */
__device__ static inline unsigned pack_bf16(float low, float high) {
  return (unsigned)__bfloat16_as_ushort(__float2bfloat16(low)) | (unsigned)__bfloat16_as_ushort(__float2bfloat16(high)) << 16;
}
__device__ static inline float low_bf16(unsigned word) { return __uint_as_float(word << 16); }
__device__ static inline float high_bf16(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

__device__ static inline bool aligned_16(const void *p) { return ((uintptr_t)p & 15) == 0; }

/* 16 bytes at p (16-byte aligned) as floats, and back. */
__device__ static inline void load_16(float (&v)[4], const float *p) {
  float4 q = *(const float4 *)p;
  v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}
__device__ static inline void unpack_16(float (&v)[4], uint4 q) {
  v[0] = __uint_as_float(q.x), v[1] = __uint_as_float(q.y), v[2] = __uint_as_float(q.z), v[3] = __uint_as_float(q.w);
}
__device__ static inline void store_16(float *p, const float (&v)[4]) { *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]); }
__device__ static inline void unpack_16(float (&v)[8], uint4 q) {
  v[0] = low_bf16(q.x), v[1] = high_bf16(q.x), v[2] = low_bf16(q.y), v[3] = high_bf16(q.y);
  v[4] = low_bf16(q.z), v[5] = high_bf16(q.z), v[6] = low_bf16(q.w), v[7] = high_bf16(q.w);
}
__device__ static inline void load_16(float (&v)[8], const __nv_bfloat16 *p) { unpack_16(v, *(const uint4 *)p); }
__device__ static inline void store_16(__nv_bfloat16 *p, const float (&v)[8]) {
  *(uint4 *)p = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

/* A row of n elements in pieces: f(Int<N>(), i) for elements i .. i+N, N being 16 bytes of reals where `whole` says that every pointer is
 * aligned for it, then 1; dealt out to `lanes` threads, the same elements to a thread in every call. */
template <int N> using Int = std::integral_constant<int, N>;
template <class F> __device__ void each_piece(size_t n, bool whole, int lane, int lanes, F f) {
  const size_t cut = whole ? n / REALS_16 * REALS_16 : 0;
  for (size_t i = (size_t)lane * REALS_16; i < cut; i += (size_t)lanes * REALS_16) f(Int<REALS_16>(), i);
  for (size_t i = cut + lane; i < n; i += lanes) f(Int<1>(), i);
}
__device__ static inline void load_piece(float (&v)[1], const real *p) { v[0] = load(p); }
__device__ static inline void store_piece(real *p, const float (&v)[1]) { store(p, v[0]); }
__device__ static inline void load_piece(float (&v)[REALS_16], const real *p) { load_16(v, p); }
__device__ static inline void store_piece(real *p, const float (&v)[REALS_16]) { store_16(p, v); }
static inline bool all_aligned(const void *a, const void *b = nullptr, const void *c = nullptr, const void *d = nullptr, const void *e = nullptr) {
  return !(((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)d | (uintptr_t)e) & 15);
}

/* ---- logits in order: larger ones first, of equal ones the lower index ------------------------------------------------------------ */

typedef unsigned long long Key;
__device__ static inline Key key_of(float x, size_t i) { return (Key)rank(x) << 32 | (0xffffffffu - (uint32_t)i); }
__device__ static inline uint32_t index_of(Key key) { return 0xffffffffu - (uint32_t)key; }
__device__ static inline float logit_of(Key key) {
  const uint32_t r = (uint32_t)(key >> 32);
  return __uint_as_float(r >> 31 ? r ^ 0x80000000u : ~r);
}

/* Is this the last of `blocks` blocks to come here? All threads of a block ask; what the others wrote before is then seen by all of the last.
 * arrived: 0 at first, and again after the last. */
__device__ static inline bool last_to_arrive(unsigned *arrived, unsigned blocks) {
  __threadfence();
  __syncthreads();
  const int last = __syncthreads_or(threadIdx.x == 0 && atomicInc(arrived, blocks - 1) == blocks - 1);
  __threadfence();
  return last != 0;
}

/* ---- reductions: a fixed order --------------------------------------------------------------------------------------------------- */

template <class T> __device__ T warp_sum(T v) {
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
__device__ static inline float warp_max(float v) {
  for (int d = 16; d; d /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}
/* Of a block whose threads are a multiple of 32 (at most 1024): every thread gets the result; all must call. */
template <class T> __device__ T block_sum(T v) {
  __shared__ T part[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  __syncthreads(); /* part may still be read from the call before */
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? part[lane] : T(0));
}
__device__ static inline float block_max(float v) {
  __shared__ float part[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = warp_max(v);
  __syncthreads();
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_max(lane < warps ? part[lane] : -INFINITY);
}
#endif
