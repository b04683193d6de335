/* scan.cu - the ladder of ../scan.cu and ../scan_backward.cu: what is left open in them as template arguments,
 * each against the others, then the ops. From the repository's root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_BF16=1 \
 *        -Icsrc -Icuda cuda/dev/scan.cu cuda/device.cu -o /tmp/scan && /tmp/scan
 *
 * Times are medians of graphs, in us a call. floor: the larger of bytes over 4.25 TB/s and exponentials over 16 a clock and
 * multiprocessor at 1.75 GHz. error: of y (dx) against the first rung's, in norm, over the first million. */
#include <stdio.h>

#include <algorithm>
#include <vector>

#include "common.cuh"
#include "../scan.cu"
#include "../scan_backward.cu"

constexpr double BYTES = 4.25e6, EXPS = 16 * 132 * 1.75e3; /* a us */

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
/* n of R, mean +- spread; never given back. */
template <class R> static R *array(size_t n, float mean = 0, float spread = 1) {
  static unsigned seed;
  R *p = (R *)device_alloc(n * sizeof(R));
  LAUNCH((draw<R>), blocks_for(n, 256, 4096), 256, 0, p, n, mean, spread, ++seed);
  return p;
}
static int32_t *integers(const std::vector<int32_t> &v) {
  int32_t *p = (int32_t *)device_alloc(v.size() * sizeof *p);
  device_push(p, v.data(), v.size() * sizeof *p);
  CHECK(cudaStreamSynchronize(stream()));
  return p;
}

/* us of one call of f, which makes `calls`: recorded `repeat` times in a graph. */
template <class F> static double time_us(F f, int calls = 1, int repeat = 4) {
  f();
  Recording *r = recording_new();
  recording_begin();
  for (int i = 0; i < repeat; i++) f();
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

static std::vector<float> first_million(const real *p, size_t n) {
  std::vector<float> v(std::min(n, (size_t)1000000));
  pull_floats(v.data(), p, v.size());
  return v;
}
static double apart(const std::vector<float> &a, const std::vector<float> &b) {
  double off = 0, size = 0;
  for (size_t i = 0; i < a.size(); i++) off += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), size += (double)b[i] * b[i];
  return sqrt(off / size);
}
static void row(const char *name, double us, double floor, double error = -1) {
  printf("%-58s %9.2f %9.2f %7.0f %%", name, us, floor, 100 * floor / us);
  if (error >= 0) printf("  error %.1e", error);
  if (const char *failure = device_error()) printf("  %s", failure);
  printf("\n");
  fflush(stdout);
}

/* ---- scan over many tokens ----------------------------------------------------------------------------------------------- */

static Scan many(size_t B, size_t T, size_t D, size_t J) {
  const size_t n = B * T * D;
  Scan s = {};
  s.B = B, s.T = T, s.D = D, s.N = STATES, s.J = J;
  s.x = array<real>(n), s.dt = array<real>(n, -4, 1), s.z = array<real>(n), s.C = array<real>(n),
  s.Bm = array<real>(B * T * J * STATES), s.dy = array<real>(n);
  s.A_log = array<float>(D * STATES, 1.5f, 1.3f), s.Dskip = array<float>(D), s.dt_bias = array<float>(D, 0, 0.1f);
  s.y = array<real>(n), s.dx = array<real>(n), s.ddt = array<real>(n), s.dz = array<real>(n), s.dC = array<real>(n),
  s.dB = array<real>(B * T * J * STATES);
  scan_cut(s);
  s.group = 4;
  s.part = array<float>(s.chunks * B * D * (STATES + 2)), s.checkpoints = array<real>(B * ceil_div(T, RUN) * D * STATES);
  const size_t ends = s.chunks > 1 ? s.chunks * B * D : 1;
  s.ends = array<float>(ends * STATES), s.starts = array<float>(ends * STATES), s.total = array<float>(ends, 1, 0.1f);
  return s;
}

template <int PASS, int CH, int POLY, int DEGREE, int WARPS>
static void rung(const Scan &s, double floor, std::vector<float> *first) {
  char name[96];
  const size_t items = (s.D + 31) / 32 * s.B * s.chunks;
  const double us = time_us([&] {
    LAUNCH((over_tiles<PASS, CH, POLY, DEGREE, WARPS>), blocks_for(items, WARPS), 32 * WARPS,
           WARPS * sizeof(TileSpace<arrays_of(PASS)>), s, items);
  });
  double error = -1;
  if (first) {
    const std::vector<float> y = first_million(PASS == OUTPUT ? s.y : s.checkpoints, s.B * s.T * s.D);
    if (first->empty()) *first = y;
    error = apart(y, *first);
  }
  snprintf(name, sizeof name, "%s, %d channels shared, %2d/32 of degree %d, %d warps",
           PASS == OUTPUT ? "output" : "checkpoints", CH, POLY, DEGREE, WARPS);
  row(name, us, floor, error);
}
template <int KEPT> static void rung_back(const Scan &s, double floor, std::vector<float> &first) {
  char name[96];
  const double us = time_us([&] {
    LAUNCH((back_over_runs<KEPT>), ceil_div(s.D, 64) * s.B * s.chunks, 32 * BACK_WARPS,
           BACK_WARPS * (sizeof(BackSpace) + 2 * RUN * 32 * sizeof(float)), s);
  });
  const std::vector<float> dx = first_million(s.dx, s.B * s.T * s.D);
  if (first.empty()) first = dx;
  snprintf(name, sizeof name, "back, decays of %d of %d tokens kept", KEPT, RUN);
  row(name, us, floor, apart(dx, first));
}

static void scan_many(size_t B, size_t T, size_t D, size_t J, bool ladder) {
  Scan s = many(B, T, D, J);
  const double n = (double)B * T * D, exps = n * STATES / EXPS, narrow = n * J * STATES / D;
  printf("\nselective scan: B %zu, T %zu, D %zu, J %zu; chunks %zu\n", B, T, D, J, s.chunks);
  if (ladder) {
    const double floor = std::max(exps, (5 * n + narrow) * 2 / BYTES),
                 floor_back = std::max(exps, (9 * n + 2 * narrow + n * STATES / RUN) * 2 / BYTES);
    std::vector<float> y, kept, dx;
    rung<OUTPUT, 2, 0, 4, 1>(s, floor, &y);
    rung<OUTPUT, 2, 2, 4, 1>(s, floor, &y);
    rung<OUTPUT, 2, 4, 4, 1>(s, floor, &y);
    rung<OUTPUT, 2, 6, 4, 1>(s, floor, &y);
    rung<OUTPUT, 2, 8, 4, 1>(s, floor, &y);
    rung<OUTPUT, 2, 4, 3, 1>(s, floor, &y);
    rung<OUTPUT, 2, 6, 3, 1>(s, floor, &y);
    rung<OUTPUT, 2, 4, 4, 4>(s, floor, &y);
    rung<OUTPUT, 1, 4, 4, 1>(s, floor, &y);
    rung<OUTPUT, 4, 4, 4, 1>(s, floor, &y);
    rung<CHECKPOINTS, 2, 0, 4, 1>(s, floor, &kept);
    rung<CHECKPOINTS, 2, 4, 4, 1>(s, floor, &kept);
    rung<CHECKPOINTS, 2, 6, 4, 1>(s, floor, &kept);
    rung<CHECKPOINTS, 2, 8, 4, 1>(s, floor, &kept);
    rung<CHECKPOINTS, 2, 6, 3, 1>(s, floor, &kept);
    rung<CHECKPOINTS, 2, 6, 4, 4>(s, floor, &kept);
    rung<CHECKPOINTS, 1, 6, 4, 1>(s, floor, &kept);
    rung<CHECKPOINTS, 4, 6, 4, 1>(s, floor, &kept);
    rung_back<2>(s, floor_back, dx);
    rung_back<0>(s, floor_back, dx);
    rung_back<3>(s, floor_back, dx);
    rung_back<4>(s, floor_back, dx);
  }
  float *dA_log = array<float>(D * STATES), *dD = array<float>(D), *dbias = array<float>(D);
  const auto forward = [&] {
    selective_scan_forward(s.y, nullptr, Ring{}, s.x, s.dt, s.A_log, s.Bm, s.C, s.Dskip, s.dt_bias, s.z, Rows{}, B, T, D,
                           STATES, J);
  };
  const auto backward = [&] {
    selective_scan_backward(s.dx, s.ddt, dA_log, s.dB, s.dC, dD, dbias, s.dz, nullptr, s.dy, nullptr, s.x, s.dt, s.A_log, s.Bm,
                            s.C, s.Dskip, s.dt_bias, s.z, Rows{}, B, T, D, STATES, J);
  };
  row("forward", time_us(forward), exps);
  row("backward", time_us(backward), std::max(exps, 9 * n * 2 / BYTES));
}

/* ---- scan over few tokens: a batch that goes on, position by position ---------------------------------------------------- */

/* Rounds of `T` tokens of which `accepted` stay, over a cycle of the ring. With several copies in turn, L2 holds no state. */
static void scan_few(size_t B, size_t T, size_t D, size_t J, int accepted, size_t copies) {
  char name[96];
  const size_t n = B * T * D;
  const real *x = array<real>(n), *dt = array<real>(n, -4, 1), *z = array<real>(n), *C = array<real>(n),
             *Bm = array<real>(B * T * J * STATES);
  const float *A_log = array<float>(D * STATES, 1.5f, 1.3f), *Dskip = array<float>(D), *bias = array<float>(D, 0, 0.1f);
  real *y = array<real>(n);
  std::vector<float *> state;
  std::vector<Ring> ring;
  for (size_t i = 0; i < copies; i++) {
    state.push_back(array<float>(B * D * STATES));
    ring.push_back(Ring{array<real>(B * RING_ROWS * D), array<real>(B * RING_ROWS * J * STATES),
                        array<float>(B * RING_ROWS * D, 0.05f, 0.04f)});
  }
  std::vector<Rows> rows;
  int32_t *keep = integers(std::vector<int32_t>(B, T == 1));
  double replayed = 0, folds = 0;
  for (int k = 0; k < SCAN_RING; k++) {
    const int pos = 8 * SCAN_RING + k * accepted, seen = pos - accepted;
    int32_t *now = integers(std::vector<int32_t>(B, pos)), *before = integers(std::vector<int32_t>(B, seen));
    rows.push_back(Rows{nullptr, keep, nullptr, now, now, before});
    replayed += pos - seen / SCAN_RING * SCAN_RING, folds += pos / SCAN_RING > seen / SCAN_RING;
  }
  const double states = (double)B * D * STATES, tokens = T + replayed / SCAN_RING;
  const double floor =
      std::max(states * tokens / EXPS,
               (4 * states * (1 + folds / SCAN_RING) + B * D * (10.0 * T + 6 * (T + replayed / SCAN_RING))) / BYTES);
  const int calls = SCAN_RING * (int)copies;
  snprintf(name, sizeof name, "B %zu, %zu token%s, state %s", B, T, T > 1 ? "s" : "", copies > 1 ? "from memory" : "alone");
  row(name,
      time_us(
          [&] {
            for (int i = 0; i < calls; i++)
              selective_scan_forward(y, state[i % copies], ring[i % copies], x, dt, A_log, Bm, C, Dskip, bias, z,
                                     rows[i / copies], B, T, D, STATES, J);
          },
          calls, calls < 16 ? 16 / calls : 1),
      floor);
}

static __global__ void nothing(int) { wait_for_previous_kernel(); }

int main() {
  printf("%-58s %9s %9s %9s\n", "", "us", "floor us", "of floor");
  row("an empty kernel in a graph", time_us([] { LAUNCH_EARLY(nothing, 1, 32, 0, 0); }, 1, 64), 0);
  scan_many(8, 2048, 4096, 64, true);
  scan_many(1, 2048, 4096, 64, false);
  scan_many(4, 2048, 4096, 64, false);
  printf("\nselective scan with a state, D 4096, J 64; a ring of %d\n", SCAN_RING);
  for (size_t B : {1, 4, 64, 256}) scan_few(B, 1, 4096, 64, 1, 1);
  scan_few(256, 1, 4096, 64, 1, 4);
  for (size_t B : {1, 64}) scan_few(B, 5, 4096, 64, 3, 1);
  scan_few(64, 5, 4096, 64, 3, 8);
  return 0;
}
