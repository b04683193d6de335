/* ssd.cu - the ladder of ../conv1d.cu and ../ssd.cu: what is left open in them, each choice against the others, then the ops, and what
 * a Mamba-2 layer runs between its projections. From the repository's root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_GPU=1 -DMIL_BF16=1 \
 *        -Icsrc -Icuda cuda/dev/ssd.cu cuda/norm.cu cuda/device.cu -o /tmp/ssd && /tmp/ssd
 *
 * Times are medians of graphs, in us a call; floor: bytes over 4.25 TB/s. */
#include <stdio.h>

#include <algorithm>
#include <vector>

#include "common.cuh"
#include "../conv1d.cu"
#include "../ssd.cu"

constexpr double BYTES = 4.25e6; /* a us */
constexpr size_t STATES_OF_MAMBA_1 = 16;

/* ---- data and time ------------------------------------------------------------------------------------------------------- */

static __device__ float noise(size_t i, unsigned seed) {
  unsigned x = (unsigned)i * 2654435761u ^ (unsigned)(i >> 32) ^ seed * 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu, x = (x ^ x >> 13) * 0xc2b2ae35u, x ^= x >> 16;
  return (float)x * 0x1p-31f - 1.0f;
}
template <class R> static __global__ void draw(R *p, size_t n, float mean, float spread, unsigned seed) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    store(p + i, mean + spread * noise(i, seed));
}
static std::vector<void *> arrays;
static void free_arrays() {
  for (void *p : arrays) device_free(p);
  arrays.clear();
}
/* n of R, mean +- spread */
template <class R> static R *array(size_t n, float mean = 0, float spread = 1) {
  static unsigned seed;
  R *p = (R *)device_alloc(n * sizeof(R));
  arrays.push_back(p);
  LAUNCH((draw<R>), blocks_for(n, 256, 4096), 256, 0, p, n, mean, spread, ++seed);
  return p;
}
static int32_t *integers(const std::vector<int32_t> &v) {
  int32_t *p = (int32_t *)device_alloc(v.size() * sizeof *p);
  arrays.push_back(p);
  device_push(p, v.data(), v.size() * sizeof *p);
  CHECK(cudaStreamSynchronize(stream()));
  return p;
}

/* us of one of f(0), f(1) … f(calls-1), which are recorded `repeat` times in a graph. */
template <class F> static double time_us(int calls, int repeat, F f) {
  for (int i = 0; i < calls; i++) f(i);
  Recording *r = recording_new();
  recording_begin();
  for (int i = 0; i < calls * repeat; i++) f(i % calls);
  recording_end(r);
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  std::vector<float> times;
  for (int i = 0; i < 9; i++) {
    float ms = 0;
    CHECK(cudaEventRecord(from, stream()));
    recording_play(r);
    CHECK(cudaEventRecord(to, stream()));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    if (i) times.push_back(ms);
  }
  recording_free(r);
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2] / repeat / calls;
}

static void row(const char *name, double us, double floor) {
  printf("%-70s %9.2f %9.2f %7.0f %%", name, us, floor, 100 * floor / us);
  if (const char *failure = device_error()) printf("  %s", failure);
  printf("\n");
  fflush(stdout);
}

/* ---- convolution --------------------------------------------------------------------------------------------------------- */

constexpr size_t CACHE = WIDTH - 1 + PENDING;

template <int V> static void conv_rung(const ConvPart &part, Rows rows, size_t B, size_t T, unsigned threads, size_t run, double floor) {
  char name[96];
  Conv s = conv_of(&part, 1, rows, 1, B, T, STATES_OF_MAMBA_1, WIDTH, CACHE);
  const bool caches = part.cache;
  s.run = (unsigned)run, s.first[1] = (unsigned)ceil_div(part.D / V, threads);
  snprintf(name, sizeof name, "  %d channels and %zu tokens a thread, %u threads", V, run, threads);
  const unsigned blocks = (unsigned)(B * ceil_div(T, run) * s.first[1]);
  row(name, time_us(1, caches ? 32 : 4, [&](int) {
        if (caches)
          LAUNCH_EARLY((slide<V, false>), blocks, threads, 0, s, true);
        else
          LAUNCH_EARLY((slide<V, true>), blocks, threads, 0, s, false);
      }), floor);
}
static void conv_many(size_t B, size_t T, size_t X, size_t rep) {
  char name[96];
  const size_t D = X * rep;
  const real *x = array<real>(B * T * X), *dy = array<real>(B * T * D);
  real *y = array<real>(B * T * D), *dx = array<real>(B * T * X);
  float *w = array<float>(D * WIDTH), *bias = array<float>(D), *dw = array<float>(D * WIDTH), *dbias = array<float>(D);
  const double in = sizeof(real) * (double)B * T * X, out = sizeof(real) * (double)B * T * D, floor = (in + out) / BYTES;
  const ConvPart part = {y, nullptr, x, w, bias, X, D};
  snprintf(name, sizeof name, "conv forward: B %zu, T %zu, %zu -> %zu channels", B, T, X, D);
  row(name, time_us(1, 4, [&](int) { conv1d_forward(&part, 1, Rows{}, 1, B, T, STATES_OF_MAMBA_1, WIDTH, 0); }), floor);
  for (size_t run : {16, 32, 64, 128}) {
    conv_rung<4>(part, Rows{}, B, T, 128, run, floor);
    conv_rung<8>(part, Rows{}, B, T, 128, run, floor);
  }
  conv_rung<2>(part, Rows{}, B, T, 128, 32, floor);
  snprintf(name, sizeof name, "conv backward: B %zu, T %zu, %zu -> %zu channels", B, T, X, D);
  row(name, time_us(1, 4, [&](int) { conv1d_backward(dx, dw, dbias, dy, x, w, bias, Rows{}, 1, B, T, X, D, STATES_OF_MAMBA_1, WIDTH); }),
      (2 * in + out) / BYTES);
  free_arrays();
}
/* Mamba-1's one part, or Mamba-2's three. */
static void conv_few(size_t B, size_t T, bool three) {
  char name[96];
  std::vector<ConvPart> part;
  std::vector<size_t> inputs = three ? std::vector<size_t>{1024, 1024, 4096} : std::vector<size_t>{1024};
  double bytes = 0;
  for (size_t X : inputs) {
    const size_t D = three ? X : 4 * X;
    part.push_back({array<real>(B * T * D), array<real>(B * CACHE * X), array<real>(B * T * X), array<float>(D * WIDTH), array<float>(D), X, D});
    bytes += sizeof(real) * (double)B * ((WIDTH - 1 + 2 * T) * X + T * D) + 20.0 * D;
  }
  const Rows rows = {nullptr, nullptr, nullptr, integers(std::vector<int32_t>(B, 100)), nullptr, nullptr};
  snprintf(name, sizeof name, "conv with a cache: B %zu, T %zu, Mamba-%d", B, T, three ? 2 : 1);
  row(name, time_us(1, 32, [&](int) { conv1d_forward(part.data(), (int)part.size(), rows, 1, B, T, STATES_OF_MAMBA_1, WIDTH, CACHE); }),
      bytes / BYTES);
  if (!three)
    for (unsigned threads : {32, 64, 128}) {
      conv_rung<1>(part[0], rows, B, T, threads, BATCH, bytes / BYTES);
      conv_rung<2>(part[0], rows, B, T, threads, BATCH, bytes / BYTES);
      conv_rung<4>(part[0], rows, B, T, threads, BATCH, bytes / BYTES);
    }
  free_arrays();
}

static __global__ void nothing(int) { wait_for_previous_kernel(); }

int main() {
  printf("%-70s %9s %9s %9s\n", "", "us", "floor us", "of floor");
  row("an empty kernel in a graph", time_us(1, 64, [](int) { LAUNCH_EARLY(nothing, 1, 32, 0, 0); }), 0);
  printf("\nconvolution, width 4\n");
  for (size_t B : {1, 64, 256}) conv_few(B, 1, true), conv_few(B, 1, false);
  conv_few(64, 5, true);
  conv_many(8, 2048, 6144, 1);
  conv_many(8, 2048, 1024, 4);
  conv_many(1, 2048, 6144, 1);
  return 0;
}
