/* cuda_runtime.h - the part of CUDA that cuda/ uses, run on the CPU: kernels are tested where no GPU is.
 *
 * A block's threads are fibers on one OS thread; they change places at barriers and warp operations, in a fixed order. Blocks run
 * one after the other, so __shared__ is static. Copies are immediate. A captured graph is a list of closures.
 * What it cannot show: speed, and races between threads that do not meet at a barrier. Sanitizers see every access. */
#ifndef EMULATED_CUDA_RUNTIME_H
#define EMULATED_CUDA_RUNTIME_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

/* ---- the runtime ------------------------------------------------------------------------------------------------------- */

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2, cudaErrorInvalidValue = 1, cudaErrorNotReady = 600, cudaErrorNoDevice = 100 };
typedef struct EmulatedStream *cudaStream_t;
typedef int cudaEvent_t;
typedef struct EmulatedGraph *cudaGraph_t, *cudaGraphExec_t;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum { cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrL2CacheSize = 38 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttributeValue { int programmaticStreamSerializationAllowed; };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};
const char *cudaGetErrorString(cudaError_t);
const char *cudaGetErrorName(cudaError_t);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaGetDeviceCount(int *);
cudaError_t cudaDriverGetVersion(int *);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDevice(int *);
cudaError_t cudaDeviceGetAttribute(int *, cudaDeviceAttr, int);
cudaError_t cudaMalloc(void **, size_t);
cudaError_t cudaFree(void *);
cudaError_t cudaHostAlloc(void **, size_t, unsigned);
cudaError_t cudaFreeHost(void *);
cudaError_t cudaMemGetInfo(size_t *, size_t *);
cudaError_t cudaMemcpyAsync(void *, const void *, size_t, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemcpy2DAsync(void *, size_t, const void *, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);

static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned) { return cudaSuccess; }
static inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

namespace emulator {
void submit(std::function<void()> work); /* now, or into the graph that is being captured */
cudaError_t fails(cudaError_t error); /* the same; it is what cudaGetLastError gives */
cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()> &body);
void barrier();                                  /* of the block */
void warp_barrier(unsigned mask);
void *warp_slot(int lane, int parity);           /* 256 bytes a lane, twice */
int warp_turn();                                 /* 0 or 1, changes with each exchange of this thread */
int lane();
unsigned char *shared_memory();
int block_vote(int value, int how);              /* 0 count, 1 or, 2 and */
unsigned live_lanes();
void barrier_of(int id, int threads); /* a named barrier of some threads */
void wait_until(const std::function<bool()> &f); /* others run meanwhile */
void later(std::function<void()> work);          /* this thread's asynchronous products, in groups, */
void commit_later();
void run_later(int left);                        /* done but for the last `left` groups */

/* Every lane of mask puts a T; get(from) reads any lane's. Two parities: nobody overwrites what a slow lane still reads. */
template <class T> struct Exchange {
  int parity;
  Exchange(const T &value, unsigned mask) : parity(warp_turn()) {
    static_assert(sizeof(T) <= 256, "");
    memcpy(warp_slot(lane(), parity), &value, sizeof value);
    warp_barrier(mask);
  }
  T get(int from) const {
    T value;
    memcpy(&value, warp_slot(from, parity), sizeof value);
    return value;
  }
};
}  // namespace emulator

template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...args) {
  const unsigned threads = c->blockDim.x * c->blockDim.y * c->blockDim.z;
  if (!c->gridDim.x || !c->gridDim.y || !c->gridDim.z || c->gridDim.y > 65535 || c->gridDim.z > 65535 || c->dynamicSmemBytes > 232448 ||
      threads > 1024 || threads < 1)
    return emulator::fails(cudaErrorInvalidValue);
  std::tuple<P...> values(static_cast<P>(args)...);
  dim3 grid = c->gridDim, block = c->blockDim;
  size_t shared = c->dynamicSmemBytes;
  emulator::submit([=] { emulator::run(grid, block, shared, [&] { std::apply(kernel, values); }); });
  return cudaSuccess;
}
struct cudaFuncAttributes { int binaryVersion, numRegs; };
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, F *) { /* of a Hopper card */
  *attributes = {90, 168};
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) { return cudaSuccess; }
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *, int, size_t) {
  *n = 1;
  return cudaSuccess;
}

/* ---- device code -------------------------------------------------------------------------------------------------------- */

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
enum { warpSize = 32 };
#define DYNAMIC_SHARED(type, name) type *name = (type *)emulator::shared_memory()

static inline void __syncthreads() { emulator::barrier(); }
static inline int __syncthreads_count(int v) { return emulator::block_vote(v, 0); }
static inline int __syncthreads_or(int v) { return emulator::block_vote(v, 1); }
static inline int __syncthreads_and(int v) { return emulator::block_vote(v, 2); }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline unsigned __activemask() { return emulator::live_lanes(); }

template <class T> T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  emulator::Exchange<T> e(v, mask);
  int lane = emulator::lane();
  return e.get((lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  (void)width;
  emulator::Exchange<T> e(v, mask);
  return e.get(emulator::lane() ^ x);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32) {
  emulator::Exchange<T> e(v, mask);
  int lane = emulator::lane(), from = lane + (int)d;
  return e.get((from ^ lane) & ~(width - 1) ? lane : from);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32) {
  emulator::Exchange<T> e(v, mask);
  int lane = emulator::lane(), from = lane - (int)d;
  return e.get(from < 0 || ((from ^ lane) & ~(width - 1)) ? lane : from);
}
static inline unsigned __ballot_sync(unsigned mask, int v) {
  emulator::Exchange<int> e(v, mask);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1 && e.get(i)) bits |= 1u << i;
  return bits;
}
static inline int __any_sync(unsigned mask, int v) { return __ballot_sync(mask, v) != 0; }
static inline int __all_sync(unsigned mask, int v) { return __ballot_sync(mask, v) == mask; }

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }
template <class T> T atomicAdd(T *p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T> T atomicMax(T *p, T v) {
  T old = *p;
  if (v > old) *p = v;
  return old;
}
template <class T> T atomicExch(T *p, T v) {
  T old = *p;
  *p = v;
  return old;
}
template <class T> T atomicCAS(T *p, T compare, T v) {
  T old = *p;
  if (old == compare) *p = v;
  return old;
}
static inline unsigned atomicInc(unsigned *p, unsigned limit) {
  unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

#define __expf(x) expf(x) /* glibc declares the name itself */
#define __exp2f(x) exp2f(x) /* glibc declares the name itself */
#define __logf(x) logf(x) /* glibc declares the name itself */
#define __log2f(x) log2f(x) /* glibc declares the name itself */
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline void sincosf_(float x, float *s, float *c) { *s = sinf(x), *c = cosf(x); }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline float saturate(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
#define EMULATED_MIN_MAX(T)                                  \
  static inline T min(T a, T b) { return a < b ? a : b; }    \
  static inline T max(T a, T b) { return a > b ? a : b; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
#endif
