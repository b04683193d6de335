/* dev/scan.cu - the ladder of ../scan.cu, ../scan_backward.cu and ../conv1d.cu: what is left open in them as template
 * arguments, each against the others, then the ops. From the repository's root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_BF16=1 \
 *        -Icsrc -Icuda cuda/dev/scan.cu -o scan && ./scan
 *
 * Times are medians of graphs, in us a call. floor: the larger of bytes over 4.25 TB/s and exponentials over 16 a clock and
 * multiprocessor at 1.75 GHz. error: of y (dx) against the first rung's, in norm, over the first million. */
#include "../scan.cu"
#include "../scan_backward.cu"
#include "../conv1d.cu"
#include "device.cuh"

constexpr double BYTES = 4.25e6, EXPS = 16 * 132 * 1.75e3; /* a us */

/* ---- data and time ------------------------------------------------------------------------------------------------------- */

static __device__ float noise(size_t i, unsigned seed) {
  unsigned x = (unsigned)i * 2654435761u ^ (unsigned)(i >> 32) ^ seed * 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu, x = (x ^ x >> 13) * 0xc2b2ae35u, x ^= x >> 16;
  return (float)x * 0x1p-31f - 1.0f;
}
template <class R> static __global__ void draw_even(R *p, size_t n, float mean, float spread, unsigned seed) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    store(p + i, mean + spread * noise(i, seed));
}
/* n of R, mean +- spread, evenly. */
template <class R> static R *even(size_t n, float mean = 0, float spread = 1) {
  static unsigned seed;
  R *p = array<R>(n);
  LAUNCH((draw_even<R>), blocks_for(n, 256, 4096), 256, 0, p, n, mean, spread, ++seed);
  return p;
}

/* us of one call of f, which makes `calls`: recorded `repeat` times in a graph. */
template <class F> static double time_us(F f, int calls = 1, int repeat = 4) {
  return timed(repeat, [&](int) { f(); }, 9) / calls;
}

static std::vector<float> first_million(const real *p, size_t n) {
  const std::vector<real> v = pull(p, std::min(n, (size_t)1000000));
  std::vector<float> floats;
  for (real x : v) floats.push_back(real_to_float(x));
  return floats;
}
static double apart(const std::vector<float> &a, const std::vector<float> &b) {
  double off = 0, size = 0;
  for (size_t i = 0; i < a.size(); i++) off += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), size += (double)b[i] * b[i];
  return sqrt(off / size);
}
static void row(const char *name, double us, double floor, double error = -1) {
  printf("%-58s %9.2f %9.2f %7.0f %%", name, us, floor, 100 * floor / us);
  if (error >= 0) printf("  error %.1e", error);
  printf("\n");
  fflush(stdout);
}

/* ---- scan over many tokens ----------------------------------------------------------------------------------------------- */

static Scan many(size_t B, size_t T, size_t D, size_t J) {
  const size_t n = B * T * D;
  Scan s = {};
  s.B = B, s.T = T, s.D = D, s.N = STATES, s.J = J;
  s.x = even<real>(n), s.dt = even<real>(n, -4, 1), s.z = even<real>(n), s.C = even<real>(n),
  s.Bm = even<real>(B * T * J * STATES), s.dy = even<real>(n);
  s.A_log = even<float>(D * STATES, 1.5f, 1.3f), s.Dskip = even<float>(D), s.dt_bias = even<float>(D, 0, 0.1f);
  s.y = even<real>(n), s.dx = even<real>(n), s.ddt = even<real>(n), s.dz = even<real>(n), s.dC = even<real>(n),
  s.dB = even<real>(B * T * J * STATES);
  scan_cut(s);
  s.group = 4;
  s.part = even<float>(s.chunks * B * D * (STATES + 2)), s.checkpoints = even<real>(B * ceil_div(T, RUN) * D * STATES);
  const size_t ends = s.chunks > 1 ? s.chunks * B * D : 1;
  s.ends = even<float>(ends * STATES), s.starts = even<float>(ends * STATES), s.total = even<float>(ends, 1, 0.1f);
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
  float *dA_log = even<float>(D * STATES), *dD = even<float>(D), *dbias = even<float>(D);
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
  const real *x = even<real>(n), *dt = even<real>(n, -4, 1), *z = even<real>(n), *C = even<real>(n),
             *Bm = even<real>(B * T * J * STATES);
  const float *A_log = even<float>(D * STATES, 1.5f, 1.3f), *Dskip = even<float>(D), *bias = even<float>(D, 0, 0.1f);
  real *y = even<real>(n);
  std::vector<float *> state;
  std::vector<Ring> ring;
  for (size_t i = 0; i < copies; i++) {
    state.push_back(even<float>(B * D * STATES));
    ring.push_back(Ring{even<real>(B * RING_ROWS * D), even<real>(B * RING_ROWS * J * STATES),
                        even<float>(B * RING_ROWS * D, 0.05f, 0.04f)});
  }
  std::vector<Rows> rows;
  int32_t *keep = ints(std::vector<int32_t>(B, T == 1));
  double replayed = 0, folds = 0;
  for (int k = 0; k < SCAN_RING; k++) {
    const int pos = 8 * SCAN_RING + k * accepted, seen = pos - accepted;
    int32_t *now = ints(std::vector<int32_t>(B, pos)), *before = ints(std::vector<int32_t>(B, seen));
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

/* ---- convolution --------------------------------------------------------------------------------------------------------- */

static void conv(size_t B, size_t T, size_t X, size_t rep) {
  char name[96];
  const size_t D = X * rep;
  const real *x = even<real>(B * T * X), *dy = even<real>(B * T * D);
  real *y = even<real>(B * T * D), *dx = even<real>(B * T * X);
  const float *w = even<float>(D * WIDTH), *bias = even<float>(D);
  float *dw = even<float>(D * WIDTH), *dbias = even<float>(D);
  const double in = 2.0 * B * T * X, out = 2.0 * B * T * D;
  snprintf(name, sizeof name, "conv forward: B %zu, T %zu, %zu -> %zu channels", B, T, X, D);
  row(name, time_us([&] { conv1d_forward(y, nullptr, x, w, bias, Rows{}, 1, B, T, X, D, STATES, WIDTH, 0); }),
      (in + out) / BYTES);
  for (size_t run = 16; T > 16 && run <= 64; run *= 2) {
    Conv s = conv_of(x, w, bias, Rows{}, 1, B, T, X, D, STATES, WIDTH, 0);
    s.y = y, s.run = run;
    snprintf(name, sizeof name, "  %zu tokens a thread", run);
    row(name,
        time_us([&] { LAUNCH((slide<REALS_16, true>), B * ceil_div(T, run) * ceil_div(D / REALS_16, 128), 128, 0, s, false); }),
        (in + out) / BYTES);
  }
  snprintf(name, sizeof name, "conv backward: B %zu, T %zu, %zu -> %zu channels", B, T, X, D);
  row(name, time_us([&] { conv1d_backward(dx, dw, dbias, dy, x, w, bias, Rows{}, 1, B, T, X, D, STATES, WIDTH); }),
      (2 * in + out) / BYTES);
}
static void conv_decode(size_t B, size_t X, size_t rep) {
  char name[96];
  const size_t D = X * rep, K = WIDTH - 1 + PENDING;
  const real *x = even<real>(B * X);
  real *y = even<real>(B * D), *cache = even<real>(B * K * X);
  const float *w = even<float>(D * WIDTH), *bias = even<float>(D);
  const Rows rows = {nullptr, nullptr, nullptr, ints(std::vector<int32_t>(B, 100)), nullptr, nullptr};
  snprintf(name, sizeof name, "conv decode: B %zu, %zu -> %zu channels", B, X, D);
  row(name, time_us([&] { conv1d_forward(y, cache, x, w, bias, rows, 1, B, 1, X, D, STATES, WIDTH, K); }, 1, 32),
      (2.0 * B * (5 * X + D) + 20.0 * D) / BYTES);
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
  printf("\nconvolution, width 4\n");
  conv(8, 2048, 6144, 1);
  conv(8, 2048, 1024, 4);
  conv(1, 2048, 6144, 1);
  for (size_t B : {1, 256}) conv_decode(B, 1024, 4);
  return 0;
}
