/* ssd.cu - the ladder of ../conv1d.cu, ../ssd.cu and ../ssd_few.cu: what is left open in them, each choice against the others,
 * then the ops, and what a Mamba-2 layer runs between its projections. From the repository's root:
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
#include "../ssd_few.cu"

constexpr double BYTES = 4.25e6; /* a us */
constexpr size_t STATES_OF_MAMBA_1 = 16;
constexpr size_t L2 = 100 << 20; /* arrays of so many bytes are not in it when their turn comes again */

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

template <int V>
static void conv_rung(const ConvPart &part, Rows rows, size_t B, size_t T, unsigned threads, size_t run, double floor) {
  char name[96];
  Conv s = conv_of(&part, 1, rows, 1, B, T, STATES_OF_MAMBA_1, WIDTH, CACHE);
  const bool caches = part.cache;
  s.run = (unsigned)run, s.first[1] = (unsigned)ceil_div(part.D / V, threads);
  snprintf(name, sizeof name, "  %d channels and %zu tokens a thread, %u threads", V, run, threads);
  const unsigned blocks = (unsigned)(B * ceil_div(T, run) * s.first[1]);
  row(name,
      time_us(1, caches ? 32 : 4,
              [&](int) {
                if (caches)
                  LAUNCH_EARLY((slide<V, false>), blocks, threads, 0, s, true);
                else
                  LAUNCH_EARLY((slide<V, true>), blocks, threads, 0, s, false);
              }),
      floor);
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
  row(name,
      time_us(1, 4,
              [&](int) { conv1d_backward(dx, dw, dbias, dy, x, w, bias, Rows{}, 1, B, T, X, D, STATES_OF_MAMBA_1, WIDTH); }),
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
    part.push_back({array<real>(B * T * D), array<real>(B * CACHE * X), array<real>(B * T * X), array<float>(D * WIDTH),
                    array<float>(D), X, D});
    bytes += sizeof(real) * (double)B * ((WIDTH - 1 + 2 * T) * X + T * D) + 20.0 * D;
  }
  const Rows rows = {nullptr, nullptr, nullptr, integers(std::vector<int32_t>(B, 100)), nullptr, nullptr};
  snprintf(name, sizeof name, "conv with a cache: B %zu, T %zu, Mamba-%d", B, T, three ? 2 : 1);
  row(name,
      time_us(1, 32,
              [&](int) { conv1d_forward(part.data(), (int)part.size(), rows, 1, B, T, STATES_OF_MAMBA_1, WIDTH, CACHE); }),
      bytes / BYTES);
  if (!three)
    for (unsigned threads : {32, 64, 128}) {
      conv_rung<1>(part[0], rows, B, T, threads, BATCH, bytes / BYTES);
      conv_rung<2>(part[0], rows, B, T, threads, BATCH, bytes / BYTES);
      conv_rung<4>(part[0], rows, B, T, threads, BATCH, bytes / BYTES);
    }
  free_arrays();
}

/* ---- few tokens with a State --------------------------------------------------------------------------------------------- */

constexpr int HEADS = 32, KV_GROUPS = 8, DIM = 128;

/* The Rows of calls of T tokens at positions pos, each of which commits what the call before left. */
static Rows rows_at(size_t B, int pos, int seen) {
  int32_t *now = integers(std::vector<int32_t>(B, pos));
  return {nullptr, nullptr, nullptr, now, now, integers(std::vector<int32_t>(B, seen))};
}

/* What layers keep and read; each has its own State. */
struct Layers {
  size_t B, T;
  std::vector<float *> state;
  std::vector<Ring> ring;
  real *y, *x, *dt, *Bm, *C;
  float *A_log, *D, *bias;
  Layers(size_t B, size_t T) : B(B), T(T) {
    const size_t bytes = B * HEADS * DIM * DIM * sizeof(float), count = std::max((size_t)2, ceil_div(L2, bytes));
    for (size_t i = 0; i < count; i++) {
      state.push_back(array<float>(B * HEADS * DIM * DIM));
      ring.push_back({array<real>(B * RING * KV_GROUPS * DIM), array<real>(B * RING * KV_GROUPS * DIM),
                      array<float>(B * RING * HEADS, 0.05f, 0.04f)});
    }
    y = array<real>(B * T * HEADS * DIM), x = array<real>(B * T * KV_GROUPS * DIM), dt = array<real>(B * T * HEADS, -4, 1);
    Bm = array<real>(B * T * KV_GROUPS * DIM), C = array<real>(B * T * HEADS * DIM);
    A_log = array<float>(HEADS, 1, 0.5f), D = array<float>(HEADS), bias = array<float>(HEADS, 0, 0.1f);
  }
  int count() const { return (int)state.size(); }
  void forward(int i, const Rows &rows) const {
    ssd_forward(y, state[i], ring[i], x, dt, A_log, Bm, C, D, bias, rows, B, T, HEADS, KV_GROUPS, DIM, DIM);
  }
  Ssd call(int i, const Rows &rows) const {
    Ssd s = {};
    s.y = y, s.state = state[i], s.ring = ring[i], s.x = x, s.dt = dt, s.Bm = Bm, s.C = C, s.A_log = A_log, s.Dskip = D,
    s.dt_bias = bias;
    s.rows = rows, s.B = (int)B, s.T = (int)T, s.H = HEADS, s.G = KV_GROUPS, s.P = s.N = DIM, s.vectors = 1;
    return s;
  }
  double floor(bool folds, double replayed) const {
    return B * (HEADS * DIM * (DIM * 4.0 * (1 + folds) + 4.0 * T) + KV_GROUPS * DIM * 4.0 * (replayed + 2 * T)) / BYTES;
  }
};

/* RPT rows a thread; so many blocks of a multiprocessor, 0: a tile a block. */
template <int RPT> static void few_rung(const Layers &l, const Rows &rows, int each, double floor) {
  char name[96];
  const unsigned slices = DIM / (GROUPS * RPT), tiles = (unsigned)l.B * HEADS * slices;
  const unsigned blocks = each ? std::min(tiles, (unsigned)(each * multiprocessors())) : tiles;
  if (each > resident<RPT> || (each > 1 && tiles <= (unsigned)((each - 1) * multiprocessors()))) return;
  if (each)
    snprintf(name, sizeof name, "  %d rows a tile, %d blocks a multiprocessor", GROUPS * RPT, each);
  else
    snprintf(name, sizeof name, "  %d rows a tile, a block each", GROUPS * RPT);
  row(name,
      time_us(l.count(), l.B < 16 ? 2 : 4,
              [&](int i) {
                Ssd s = l.call(i, rows);
                s.slices = slices;
                LAUNCH_EARLY((replay<4, RPT>), blocks, REPLAY_THREADS, (Space<4, RPT>::bytes(l.T)), s, tiles);
              }),
      floor);
}
static void ssd_with_state(size_t B, size_t T, bool rungs) {
  char name[96];
  const Layers l(B, T);
  std::vector<Rows> phase;
  std::vector<double> us;
  const int step = T > 1 ? 3 : 1; /* tokens committed a call */
  double sum = 0;
  for (int k = 0; k < SSD_RING; k++) {
    const int pos = 4 * SSD_RING + k * step, seen = pos - step;
    phase.push_back(rows_at(B, pos, seen));
    us.push_back(time_us(l.count(), l.B < 16 ? 2 : 4, [&](int i) { l.forward(i, phase[k]); }));
    sum += us.back();
  }
  snprintf(name, sizeof name, "ssd: B %zu, T %zu, mean over the ring", B, T);
  row(name, sum / SSD_RING, l.floor(false, 8) + (l.floor(true, 8) - l.floor(false, 8)) * step / SSD_RING);
  printf("  by position, from %d on, every %d:", 4 * SSD_RING, step);
  for (double t : us) printf(" %.1f", t);
  printf("  (those behind a multiple of %d fold)\n", SSD_RING);
  for (int k : {2, 0}) { /* plain, fold */
    if (!rungs) break;
    printf("  %s\n", k ? "in the middle of a run" : "a fold");
    const double floor = l.floor(!k, k * step);
    for (int each : {0, 1, 2, 3})
      few_rung<1>(l, phase[k], each, floor), few_rung<2>(l, phase[k], each, floor), few_rung<4>(l, phase[k], each, floor);
  }
  free_arrays();
}

/* What a Mamba-2 layer runs between its projections. */
static void between_projections(size_t B, size_t T) {
  char name[96];
  const Layers l(B, T);
  const size_t X[3] = {KV_GROUPS * DIM, KV_GROUPS * DIM, HEADS * DIM};
  real *out[3] = {l.x, l.Bm, l.C}, *z = array<real>(B * T * HEADS * DIM), *g = array<real>(B * T * HEADS * DIM);
  std::vector<std::vector<ConvPart>> part(l.count());
  float *norm = array<float>(HEADS * DIM);
  for (int i = 0; i < 3; i++) {
    const real *in = array<real>(B * T * X[i]);
    const float *w = array<float>(X[i] * WIDTH), *bias = array<float>(X[i]);
    for (auto &p : part) p.push_back({out[i], array<real>(B * CACHE * X[i]), in, w, bias, X[i], X[i]});
  }
  const Rows rows = rows_at(B, 4 * SSD_RING + 8, 4 * SSD_RING + 7);
  const auto conv = [&](int i) { conv1d_forward(part[i].data(), 3, rows, 1, B, T, 1, WIDTH, CACHE); };
  const auto normed = [&](int) { gated_rmsnorm_forward(g, l.y, z, norm, 1e-5f, B * T, HEADS, DIM); };
  const auto time = [&](const char *what, auto f) {
    snprintf(name, sizeof name, "  %s", what);
    row(name, time_us(l.count(), B < 16 ? 2 : 4, f), 0);
  };
  printf("between the projections of Mamba-2: B %zu, T %zu\n", B, T);
  time("convolution", conv);
  time("convolution, ssd", [&](int i) { conv(i), l.forward(i, rows); });
  time("convolution, ssd, gated norm", [&](int i) { conv(i), l.forward(i, rows), normed(i); });
  time("gated norm", normed);
  free_arrays();
}

/* ---- many tokens --------------------------------------------------------------------------------------------------------- */

static void ssd_many(size_t B, size_t T) {
  char name[96];
  const Layers l(B, T);
  Ssd s = l.call(0, Rows{});
  s.state = nullptr, s.ring = {}, s.chunks = (int)ceil_div(T, Q);
  const double floor = 2.0 * B * T * DIM * (2 * HEADS + 2 * KV_GROUPS) / BYTES;
  snprintf(name, sizeof name, "ssd forward: B %zu, T %zu", B, T);
  row(name, time_us(1, 8, [&](int) { many(s); }), floor);
  for (int parts = 1; parts <= 16; parts *= 2) {
    snprintf(name, sizeof name, "  %d segments: 8 warps of 16 rows", parts);
    row(name, time_us(1, 8, [&](int) { sequence<true, 1, 8, 128>(s, parts); }), floor);
    snprintf(name, sizeof name, "  %d segments: 4 warps of 32 rows", parts);
    row(name, time_us(1, 8, [&](int) { sequence<true, 2, 4, 128>(s, parts); }), floor);
    snprintf(name, sizeof name, "  %d segments: 4 warps of 16 rows", parts);
    row(name, time_us(1, 8, [&](int) { sequence<true, 1, 4, 128>(s, parts); }), floor);
  }
  free_arrays();
}

static __global__ void nothing(int) { wait_for_previous_kernel(); }

int main() {
  printf("%-70s %9s %9s %9s\n", "", "us", "floor us", "of floor");
  row("an empty kernel in a graph", time_us(1, 64, [](int) { LAUNCH_EARLY(nothing, 1, 32, 0, 0); }), 0);
  printf("\nMamba-2 with a State: 32 heads, 8 groups, P = N = 128, a ring of %d\n", SSD_RING);
  for (size_t T : {1, 5}) between_projections(1, T), between_projections(64, T);
  for (size_t T : {1, 5})
    for (size_t B : {1, 4, 16, 64, 256}) ssd_with_state(B, T, B != 4);
  printf("\nconvolution, width 4\n");
  for (size_t B : {1, 64, 256}) conv_few(B, 1, true), conv_few(B, 1, false);
  conv_few(1, 5, true), conv_few(64, 5, true);
  conv_many(8, 2048, 6144, 1);
  conv_many(8, 2048, 1024, 4);
  conv_many(1, 2048, 6144, 1);
  printf("\nMamba-2 over many tokens\n");
  ssd_many(1, 2048);
  ssd_many(8, 2048);
  return 0;
}
