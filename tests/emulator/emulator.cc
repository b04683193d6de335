/* emulator.cc - fibers, barriers, and the runtime of cuda_runtime.h. */
#include "cuda_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif
/* switch_to(&save, load): callee-saved registers and the stack pointer change places. */
extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulator {
enum { MOST_THREADS = 1024, STACK = 1 << 18, SLOT = 256 };
struct Warp {
  alignas(16) unsigned char slot[2][32][SLOT];
  unsigned arrived, turn; /* lanes that wait; how often they all met */
};
static void *scheduler, *context[MOST_THREADS];
static bool done[MOST_THREADS];
static int turns[MOST_THREADS];
static Warp warps[MOST_THREADS / 32];
static unsigned char *stacks;
alignas(1024) static unsigned char shared_bytes[232448];
static int current, threads, alive, waiting, votes[2], any[2], all[2];
static unsigned epoch;
static const std::function<void()> *work;

unsigned char *shared_memory() { return shared_bytes; }
int lane() { return current % 32; }
int warp_turn() { return turns[current]++ & 1; }
void *warp_slot(int l, int parity) { return warps[current / 32].slot[parity][l]; }
static void yield() { emulator_switch(&context[current], scheduler); }
static std::vector<std::vector<std::function<void()>>> groups[MOST_THREADS]; /* of products under way; the last one is open */

unsigned live_lanes() {
  unsigned mask = 0;
  for (int i = 0, base = current / 32 * 32; i < 32 && base + i < threads; i++) mask |= (unsigned)!done[base + i] << i;
  return mask;
}

void warp_barrier(unsigned mask) {
  Warp *w = &warps[current / 32];
  unsigned turn = w->turn;
  w->arrived |= 1u << lane();
  for (long spins = 0; w->turn == turn; spins++) {
    unsigned wanted = mask & live_lanes();
    if ((w->arrived & wanted) == wanted) {
      w->arrived &= ~wanted;
      w->turn++;
      return;
    }
    if (spins > 1 << 20) {
      fprintf(stderr, "emulator: a warp operation waits for lanes that never come (block %u, thread %d)\n", blockIdx.x, current);
      abort();
    }
    yield();
  }
}

void barrier() {
  unsigned now = epoch;
  waiting++;
  for (long spins = 0; epoch == now; spins++) {
    if (waiting >= alive) {
      waiting = 0;
      epoch++;
      return;
    }
    if (spins > 1 << 20) {
      fprintf(stderr, "emulator: __syncthreads waits for threads that never come (block %u, thread %d)\n", blockIdx.x, current);
      abort();
    }
    yield();
  }
}

void wait_until(const std::function<bool()> &f) {
  for (long spins = 0; !f(); spins++) {
    if (spins > 1 << 20) {
      fprintf(stderr, "emulator: a barrier waits for arrivals that never come (block %u, thread %d)\n", blockIdx.x, current);
      abort();
    }
    yield();
  }
}

void barrier_of(int id, int count) {
  static int arrived[16];
  static unsigned turn[16];
  const unsigned now = turn[id];
  if (++arrived[id] == count) arrived[id] = 0, turn[id]++;
  wait_until([=] { return turn[id] != now; });
}

void later(std::function<void()> f) {
  if (groups[current].empty()) groups[current].emplace_back();
  groups[current].back().push_back(std::move(f));
}
void commit_later() { groups[current].emplace_back(); }
void run_later(int left) {
  auto &mine = groups[current];
  while ((int)mine.size() > left + 1) {
    for (auto &f : mine.front()) f();
    mine.erase(mine.begin());
  }
}

int block_vote(int value, int how) {
  int e = epoch & 1;
  if (waiting == 0) votes[e] = any[e] = 0, all[e] = 1;
  votes[e] += value != 0, any[e] |= value != 0, all[e] &= value != 0;
  barrier();
  int result = how == 0 ? votes[e] : how == 1 ? any[e] : all[e];
  barrier();
  return result;
}

static void fiber() {
  (*work)();
  done[current] = true;
  alive--;
  yield();
}

static void start(int i) {
  void **top = (void **)(stacks + (size_t)(i + 1) * STACK - 64);
  *--top = nullptr; /* keeps the entry's stack at 16n + 8, as after a call */
  *--top = (void *)fiber;
  for (int k = 0; k < 6; k++) *--top = nullptr;
  context[i] = top;
  done[i] = false;
  turns[i] = 0;
  groups[i].clear();
}

cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()> &body) {
  if (!stacks) stacks = (unsigned char *)mmap(nullptr, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  gridDim = grid, blockDim = block, work = &body;
  threads = (int)(block.x * block.y * block.z);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        memset(shared_bytes, 0xff, shared); /* NaN: what is read must have been written */
        for (int w = 0; w < (threads + 31) / 32; w++) warps[w].arrived = 0;
        alive = threads, waiting = 0;
        for (int i = 0; i < threads; i++) start(i);
        while (alive)
          for (int i = 0; i < threads; i++) {
            if (done[i]) continue;
            current = i;
            threadIdx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            emulator_switch(&scheduler, context[i]);
          }
      }
  return cudaSuccess;
}

static cudaError_t last;
cudaError_t fails(cudaError_t error) { return last = error; }

static std::vector<std::function<void()>> *capture;
void submit(std::function<void()> f) {
  if (capture)
    capture->push_back(f);
  else
    f();
}
}  // namespace emulator

struct EmulatedGraph { std::vector<std::function<void()>> work; };

const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : e ? "invalid argument" : "no error"; }
const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
cudaError_t cudaPeekAtLastError(void) { return emulator::last; }
cudaError_t cudaGetLastError(void) {
  const cudaError_t error = emulator::last;
  emulator::last = cudaSuccess;
  return error;
}
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
  *v = a == cudaDevAttrMultiProcessorCount ? 4 : a == cudaDevAttrL2CacheSize ? 1 << 20 : 232448;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void **p, size_t n) {
  *p = n > ((size_t)8 << 30) || posix_memalign(p, 256, n ? n : 1) ? nullptr : *p;
  if (*p && n < 1 << 20) memset(*p, 0xff, n);
  return *p ? cudaSuccess : emulator::fails(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *p) { free(p); return cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) { return cudaMalloc(p, n); }
cudaError_t cudaFreeHost(void *p) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = (size_t)8 << 30; return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind, cudaStream_t) {
  emulator::submit([=] { memcpy(d, s, n); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, cudaMemcpyKind, cudaStream_t) {
  emulator::submit([=] { for (size_t i = 0; i < h; i++) memcpy((char *)d + i * dp, (const char *)s + i * sp, w); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t) {
  emulator::submit([=] { memset(d, v, n); });
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { *s = (cudaStream_t)64; return cudaSuccess; } // never dereferenced
cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulator::capture ? emulator::fails(cudaErrorInvalidValue) : cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaStreamSynchronize(nullptr); }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  emulator::capture = new std::vector<std::function<void()>>;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) {
  *g = new EmulatedGraph{*emulator::capture};
  delete emulator::capture;
  emulator::capture = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long) { *e = new EmulatedGraph(*g); return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
  for (auto &f : e->work) f();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { delete e; return cudaSuccess; }
