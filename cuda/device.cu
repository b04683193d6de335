/* device.cu - device.h on CUDA: one stream, one caching allocator, the error latch, recorded graphs. */
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "common.cuh"

static std::recursive_mutex lock_;
typedef std::lock_guard<std::recursive_mutex> Guard;
void device_lock(void) { lock_.lock(); }
void device_unlock(void) { lock_.unlock(); }

/* ---- errors --------------------------------------------------------------------------------------------------------------- */

static char failure[512];
static bool failed;

static void fail(const char *what) {
  if (failed) return;
  failed = true;
  snprintf(failure, sizeof failure, "%s", what);
}
void device_fail(const char *what) { fail(what); }

void latch(cudaError_t error, const char *what, const char *file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError(); /* forget it where it can be forgotten */
  if (failed) return;
  const char *name = strrchr(file, '/');
  char text[512];
  const bool kernel = error >= 700 && error < 720 && !synchronous(); /* what a kernel of before did: illegal address … launch failure */
  snprintf(text, sizeof text, "%s (%s:%d): %s%s", what, name ? name + 1 : file, line, cudaGetErrorString(error),
           kernel ? "; with MIL_CUDA_SYNC=1 the error names its kernel" : "");
  fail(text);
}

const char *device_error(void) {
  static char text[512];
  latch(cudaPeekAtLastError(), "a kernel", __FILE__, __LINE__);
  if (!failed) return nullptr;
  failed = false;
  memcpy(text, failure, sizeof text);
  return text;
}

/* ---- the stream --------------------------------------------------------------------------------------------------------------- */

cudaStream_t stream() {
  static cudaStream_t s = [] {
    cudaStream_t made = nullptr;
    CHECK(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return s;
}

int device_id(void) {
  int id = 0;
  CHECK(cudaGetDevice(&id));
  return id;
}
void device_order(void *other, int ours_first) {
  Guard guard(lock_);
  static cudaEvent_t event = [] {
    cudaEvent_t made = {};
    CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    return made;
  }();
  const cudaStream_t first = ours_first ? stream() : (cudaStream_t)other, second = ours_first ? (cudaStream_t)other : stream();
  CHECK(cudaEventRecord(event, first));
  CHECK(cudaStreamWaitEvent(second, event, 0));
}

static int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}
int multiprocessors() {
  static int n = attribute(cudaDevAttrMultiProcessorCount);
  return n;
}
bool synchronous() {
  static bool yes = getenv("MIL_CUDA_SYNC") && !strcmp(getenv("MIL_CUDA_SYNC"), "1");
  return yes;
}
size_t workers(void) { return 1; }

const char *device_missing(void) {
  static char text[256];
  int n = 0, driver = 0;
  cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaSuccess && n > 0) return nullptr;
  cudaGetLastError();
  CHECK(cudaDriverGetVersion(&driver)); /* 0: none */
  const char *what = error == cudaSuccess ? "no CUDA device" : cudaGetErrorString(error);
  snprintf(text, sizeof text, driver ? "%s" : "there is no NVIDIA driver (libcuda.so.1) on this machine", what);
  return text;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------------
 *
 * Freed blocks are kept by size and given out again to requests of at least 7/8 of them; all work is in one stream, so a block may
 * change hands at once. When the device refuses, everything kept goes back and the request is tried once more. MIL_CUDA_SYNC=1: blocks
 * are neither rounded up nor kept, so that compute-sanitizer sees what lies outside of them. */

static std::unordered_map<void *, size_t> given; /* block: its size */
static std::multimap<size_t, void *> kept;
static size_t used, most_used;

static size_t round_size(size_t n) {
  if (synchronous()) return n + !n;
  const size_t unit = n < (1 << 20) ? 512 : 1 << 20;
  return (n + unit - 1 + !n) / unit * unit;
}

static void give_back_all() {
  if (kept.empty()) return;
  CHECK(cudaStreamSynchronize(stream()));
  for (auto &entry : kept) CHECK(cudaFree(entry.second));
  kept.clear();
}

void *device_alloc(size_t bytes) {
  Guard guard(lock_);
  const size_t size = round_size(bytes);
  void *p = nullptr;
  size_t got = size;
  auto found = kept.lower_bound(size);
  if (size < bytes) {
    fail("out of memory: a size overflowed");
    return nullptr;
  }
  if (found != kept.end() && found->first - size <= found->first / 8) {
    got = found->first, p = found->second;
    kept.erase(found);
  } else if (cudaMalloc(&p, size) != cudaSuccess) {
    cudaGetLastError();
    give_back_all();
    cudaError_t error = cudaMalloc(&p, size);
    if (error != cudaSuccess) {
      char text[256];
      size_t left = 0, all = 0;
      cudaGetLastError();
      cudaMemGetInfo(&left, &all);
      snprintf(text, sizeof text, "%s: %.2f GiB asked for, %.2f GiB of %.2f GiB free, %.2f GiB in use here", cudaGetErrorString(error),
               size / 0x1p30, left / 0x1p30, all / 0x1p30, used / 0x1p30);
      fail(text);
      return nullptr;
    }
  }
  given[p] = got;
  used += got;
  if (used > most_used) most_used = used;
  return p;
}

void device_free(void *p) {
  if (!p) return;
  Guard guard(lock_); /* Python frees models and States while another thread computes */
  auto found = given.find(p);
  used -= found->second;
  if (synchronous())
    CHECK(cudaFree(p));
  else
    kept.emplace(found->second, p);
  given.erase(found);
}

void device_memory(size_t *now, size_t *most, int reset) {
  *now = used, *most = most_used;
  if (reset) most_used = used;
}

static unsigned generation; /* moves when scratch does: recorded graphs point into it */
void *device_scratch(size_t bytes) {
  static void *scratch;
  static size_t size;
  if (bytes > size || (synchronous() && bytes != size)) {
    device_free(scratch);
    scratch = device_alloc(bytes);
    size = scratch ? bytes : 0;
    generation++;
  }
  return scratch;
}

/* ---- copies --------------------------------------------------------------------------------------------------------------------- */

/* Host memory is copied into pinned pieces, which the card then fetches by itself: two large ones in turn for weights, and a ring for
 * the few integers of a call, so that nobody waits for the stream. */
enum { RING = 4 << 20, SMALL = 64 << 10, LARGE = 32 << 20 };

static void *pinned(size_t bytes) {
  void *p = nullptr;
  CHECK(cudaHostAlloc(&p, bytes, cudaHostAllocDefault));
  return p;
}

static void push_small(void *device, const void *host, size_t bytes) {
  static char *ring;
  static size_t at;
  if (!ring && !(ring = (char *)pinned(RING))) return;
  if (at + bytes > RING) {
    CHECK(cudaStreamSynchronize(stream())); /* once in 4 MB: what was in the ring has been fetched */
    at = 0;
  }
  memcpy(ring + at, host, bytes);
  CHECK(cudaMemcpyAsync(device, ring + at, bytes, cudaMemcpyHostToDevice, stream()));
  at += (bytes + 63) / 64 * 64;
}

/* By a few threads: one fills neither the bus to the card nor, where `from` is a mapped file, the disk's queue. */
static void copy_together(char *to, const char *from, size_t n) {
  enum { THREADS = 4 };
  const size_t part = (n / THREADS + 4095) / 4096 * 4096;
  std::thread helper[THREADS];
  for (int i = 1; i < THREADS && i * part < n; i++)
    helper[i] = std::thread([=] { memcpy(to + i * part, from + i * part, n - i * part < part ? n - i * part : part); });
  memcpy(to, from, n < part ? n : part);
  for (std::thread &t : helper)
    if (t.joinable()) t.join();
}

static void push_large(void *device, const void *host, size_t bytes) {
  static struct {
    char *data;
    cudaEvent_t fetched;
  } piece[2];
  for (size_t i = 0, turn = 0; i < bytes; i += LARGE, turn ^= 1) {
    const size_t n = bytes - i < LARGE ? bytes - i : LARGE;
    if (piece[turn].data) {
      CHECK(cudaEventSynchronize(piece[turn].fetched));
    } else {
      if (!(piece[turn].data = (char *)pinned(LARGE))) return;
      CHECK(cudaEventCreateWithFlags(&piece[turn].fetched, cudaEventDisableTiming));
    }
    copy_together(piece[turn].data, (const char *)host + i, n);
    CHECK(cudaMemcpyAsync((char *)device + i, piece[turn].data, n, cudaMemcpyHostToDevice, stream()));
    CHECK(cudaEventRecord(piece[turn].fetched, stream()));
  }
}

void device_push(void *device, const void *host, size_t bytes) {
  Guard guard(lock_);
  if (bytes && bytes <= SMALL) push_small(device, host, bytes);
  if (bytes > SMALL) push_large(device, host, bytes);
}
void device_pull(void *host, const void *device, size_t bytes) {
  if (bytes) CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream()));
  CHECK(cudaStreamSynchronize(stream()));
}
void device_copy(void *dst, const void *src, size_t bytes) {
  if (bytes) CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream()));
}
void device_copy_rows(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t bytes, size_t rows) {
  if (bytes && rows) CHECK(cudaMemcpy2DAsync(dst, dst_pitch, src, src_pitch, bytes, rows, cudaMemcpyDeviceToDevice, stream()));
}
void device_zero(void *p, size_t bytes) {
  if (bytes) CHECK(cudaMemsetAsync(p, 0, bytes, stream()));
}
void *device_host(void *) { return nullptr; }
void *device_stream(void) { return stream(); }

static __global__ void widen(float *to, const real *from, size_t n) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) to[i] = load(from + i);
}
template <class T> static __device__ void round_to(T *to, float x) { /* NaN keeps its upper bits */
  if constexpr (sizeof(T) == sizeof(float))
    *to = x;
  else
    *to = __ushort_as_bfloat16(float_to_bf16(x));
}
static __global__ void narrow(real *to, const float *from, size_t n) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) round_to(to + i, from[i]);
}

void pull_floats(float *host, const real *device, size_t n) {
  if (REAL_TYPE == FLOAT32) return device_pull(host, device, n * sizeof *host);
  float *wide = (float *)device_alloc(n * sizeof *wide);
  if (!wide) return;
  LAUNCH(widen, blocks_for(n, 256, 4096), 256, 0, wide, device, n);
  device_pull(host, wide, n * sizeof *host);
  device_free(wide);
}

void *device_lend(void *host, size_t n, size_t size, int as_real, int fill) {
  const bool convert = as_real && REAL_TYPE != FLOAT32;
  void *lent = device_alloc(n * (convert ? sizeof(real) : size));
  if (!lent || !fill || !n) return lent;
  if (!convert) {
    device_push(lent, host, n * size);
    return lent;
  }
  float *wide = (float *)device_alloc(n * sizeof *wide);
  if (!wide) return lent;
  device_push(wide, host, n * sizeof *wide);
  LAUNCH(narrow, blocks_for(n, 256, 4096), 256, 0, (real *)lent, wide, n);
  device_free(wide);
  return lent;
}

void device_return(void *host, void *lent, size_t n, size_t size, int as_real, int back) {
  if (lent && back && n) {
    if (as_real)
      pull_floats((float *)host, (const real *)lent, n);
    else
      device_pull(host, lent, n * size);
  }
  device_free(lent);
}

/* ---- recordings: work that is issued again and again is captured once and then replayed; nothing waits inside a capture, so with
 * MIL_CUDA_SYNC=1 it is issued each time ------------------------------------------------------------------------------------------ */

struct Recording {
  cudaGraphExec_t graph;
  unsigned generation;
};

Recording *recording_new(void) { return new Recording(); }
void recording_free(Recording *r) {
  if (r && r->graph) CHECK(cudaGraphExecDestroy(r->graph));
  delete r;
}
int recording_play(Recording *r) {
  if (r->graph && r->generation != generation) {
    CHECK(cudaGraphExecDestroy(r->graph));
    r->graph = nullptr;
  }
  if (!r->graph) return 0;
  CHECK(cudaGraphLaunch(r->graph, stream()));
  return 1;
}
void recording_begin(void) {
  if (!synchronous()) CHECK(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed));
}
void recording_end(Recording *r) {
  if (synchronous()) return;
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamEndCapture(stream(), &graph));
  if (!graph) return;
  CHECK(cudaGraphInstantiate(&r->graph, graph, 0));
  CHECK(cudaGraphDestroy(graph));
  r->generation = generation;
}
