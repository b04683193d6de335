/* dev/device.cuh - what every timing program here shares: the device layer, as far as an op needs it, data, and time. */
#ifndef MIL_DEV_DEVICE_CUH
#define MIL_DEV_DEVICE_CUH
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

#include "../common.cuh"

/* ---- the device layer, as far as the op needs it ------------------------------------------------------------------------- */

cudaStream_t stream() {
  static cudaStream_t s = [] {
    cudaStream_t made;
    cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    return made;
  }();
  return s;
}
int multiprocessors() {
  static int n = [] {
    int value;
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0);
    return value;
  }();
  return n;
}
bool synchronous() { return false; }
void latch(cudaError_t error, const char *what, const char *file, int line) {
  if (error == cudaSuccess) return;
  printf("%s (%s:%d): %s\n", what, file, line, cudaGetErrorString(error));
  exit(1);
}
void *device_scratch(size_t bytes) {
  static void *scratch;
  static size_t size;
  if (bytes > size) {
    CHECK(cudaStreamSynchronize(stream()));
    CHECK(cudaFree(scratch));
    CHECK(cudaMalloc(&scratch, size = bytes));
  }
  return scratch;
}
void device_copy(void *dst, const void *src, size_t bytes) {
  CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream()));
}

/* ---- data ---------------------------------------------------------------------------------------------------------------- */

static __global__ void draw(real *x, size_t n, unsigned seed) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    unsigned long long z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull, z ^= z >> 31;
    const float u = ((unsigned)z + 1.0f) * 0x1p-32f, v = (unsigned)(z >> 32) * 0x1p-32f;
    store(x + i, sqrtf(-2 * logf(u)) * cospif(2 * v));
  }
}
static std::vector<void *> arrays;
template <class T> static T *array(size_t n) {
  void *p;
  CHECK(cudaMalloc(&p, n * sizeof(T)));
  CHECK(cudaMemsetAsync(p, 0xff, n * sizeof(T), stream()));
  arrays.push_back(p);
  return (T *)p;
}
static inline real *normal(size_t n) {
  static unsigned seed;
  real *x = array<real>(n);
  LAUNCH(draw, 4096, 256, 0, x, n, ++seed);
  return x;
}
static inline int32_t *ints(std::vector<int32_t> v) {
  int32_t *x = array<int32_t>(v.size());
  CHECK(cudaMemcpyAsync(x, v.data(), v.size() * 4, cudaMemcpyHostToDevice, stream()));
  CHECK(cudaStreamSynchronize(stream()));
  return x;
}
static inline void free_all() {
  CHECK(cudaStreamSynchronize(stream()));
  for (void *p : arrays) CHECK(cudaFree(p));
  arrays.clear();
}
static inline std::vector<real> pull(const real *x, size_t n) {
  std::vector<real> v(n);
  CHECK(cudaStreamSynchronize(stream()));
  CHECK(cudaMemcpy(v.data(), x, n * sizeof(real), cudaMemcpyDeviceToHost));
  return v;
}
/* |x - y| / |y| */
static inline double error(const real *x, const real *y, size_t n) {
  std::vector<real> a = pull(x, n), b = pull(y, n);
  double d = 0, s = 0;
  for (size_t i = 0; i < n; i++) {
    const double u = real_to_float(a[i]), v = real_to_float(b[i]);
    d += (u - v) * (u - v), s += v * v;
  }
  return sqrt(d / s);
}
static inline bool same(const real *x, const real *y, size_t n) {
  return !memcmp(pull(x, n).data(), pull(y, n).data(), n * sizeof(real));
}

/* ---- timing: the median of rounds, each of `calls` replayed as one graph, in microseconds a call ------------------------- */

template <class F> static double timed(int calls, F f, int rounds = 15) {
  for (int i = 0; i < 2; i++) f(i % calls);
  CHECK(cudaStreamSynchronize(stream()));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; i++) f(i);
  CHECK(cudaStreamEndCapture(stream(), &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> ms(rounds);
  for (int r = -2; r < rounds; r++) {
    CHECK(cudaEventRecord(begin, stream()));
    CHECK(cudaGraphLaunch(exec, stream()));
    CHECK(cudaEventRecord(end, stream()));
    CHECK(cudaEventSynchronize(end));
    float t;
    CHECK(cudaEventElapsedTime(&t, begin, end));
    if (r >= 0) ms[r] = t;
  }
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  std::sort(ms.begin(), ms.end());
  return ms[rounds / 2] * 1e3 / calls;
}
#endif
