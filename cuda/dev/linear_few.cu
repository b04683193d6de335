/* linear_few.cu - the ladder of few_rows.cuh: shapes of tile and ring against each other, against registers in place of
 * rings, and against a plain read of W; then a layer's products as a chain, with what the next kernel may do early. From the
 * repository's root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_BF16=1 \
 *        -Icsrc -Icuda cuda/dev/linear_few.cu cuda/device.cu cuda/act.cu -o /tmp/linear_few && /tmp/linear_few
 *
 * Times are medians of graphs of 16 or more launches, each on other weights (2 GiB in turn: L2 has none), in us a launch. */
#include <stdio.h>

#include <algorithm>
#include <vector>

#include "common.cuh"

static int early = 1; /* LAUNCH_EARLY starts early */
#undef LAUNCH_EARLY
#define LAUNCH_EARLY(kernel, ...) launch(#kernel, __FILE__, __LINE__, early, kernel, __VA_ARGS__)
#include "../linear.cu"

void gemm(void *, int, size_t, const void *, size_t, int, const void *, size_t, int, int, int, size_t, size_t, size_t) {}

constexpr size_t POOL = (size_t)2 << 30;
constexpr double COPY = 4250; /* GB/s of a device copy on the H200 */
static bf16 *pool;

/* ---- rungs --------------------------------------------------------------------------------------------------------------- */

/* What a read costs: 8 loads of 16 bytes a thread under way, nothing computed. */
static __global__ void __launch_bounds__(512) read_all(unsigned *out, const uint4 *p, size_t n) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  unsigned x = 0;
  const size_t stride = (size_t)gridDim.x * 512;
  size_t i = (size_t)blockIdx.x * 512 + threadIdx.x;
  for (; i + 7 * stride < n; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int u = 0; u < 8; u++) v[u] = load_streaming(p + i + u * stride);
#pragma unroll
    for (int u = 0; u < 8; u++) x ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < n; i += stride) x ^= p[i].x;
  if (x == 0x12345678) *out = x;
}

/* few_rows with its rings in registers: 16 loads of a lane under way. At most 8 rows, staged; K a multiple of 2048. */
static __global__ void __launch_bounds__(THREADS, 2) in_registers(const __grid_constant__ Few c) {
  constexpr int GROUPS = 2, DEPTH = 4;
  DYNAMIC_SHARED(unsigned char, memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
  float *const part = (float *)memory;
  uint4 *const xs = (uint4 *)(memory + part_bytes(GROUPS, 1));
  Cursor<GROUPS, false> w(c, units_of_part(c.K, warp), g);
  auto k_of = [&](unsigned stage) { return (size_t)(stage * PARTS + warp) * UNIT + 8 * j; };
  uint4 a[DEPTH][2][GROUPS];
  auto fetch_w = [&](uint4 (&to)[2][GROUPS]) {
    if (w.done(c)) return;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++)
      to[i / GROUPS][i % GROUPS] = load_streaming(w.row[i % GROUPS] + k_of(w.stage) + 32 * (i / GROUPS));
    w.advance(c, g);
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++) fetch_w(a[d]);
  wait_for_previous_kernel();
  if (blockIdx.x + c.late * gridDim.x >= c.tiles) let_next_kernel_start();
  stage_rows(xs, (float *)(xs + c.M * row_chunks(c.K)), c);
  const uint4 *staged = xs + (g < (int)c.M ? g : c.M - 1) * row_chunks(c.K);
  for (unsigned tile = blockIdx.x; tile < c.tiles; tile += gridDim.x) {
    Outputs<GROUPS, 1, false> out;
    out.read(c, tile);
    if (tile + c.late * gridDim.x >= c.tiles) let_next_kernel_start();
    float acc[1][1][4] = {};
    for (unsigned stage = 0; stage < w.stages; stage += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
#pragma unroll
        for (int s = 0; s < 2; s++) add_slab(acc[0][0], a[d][s][0], a[d][s][1], staged[k_of(stage + d) / 8 + 4 * s]);
        fetch_w(a[d]);
      }
    }
    finish_tile(acc, part, out, c);
  }
}

struct Rung {
  const char *name;
  int groups, cols, depth, staged;
  void (*kernel)(Few);
};
#define RUNG(groups, cols, depth, staged) \
  {#groups "x8 d" #depth, groups, cols, depth, staged, few_rows<groups, cols, depth, staged, false>}
#define RUNGS(cols, staged)                                                                                \
  RUNG(1, cols, 8, staged), RUNG(2, cols, 3, staged), RUNG(2, cols, 4, staged), RUNG(2, cols, 6, staged), \
      RUNG(4, cols, 3, staged), RUNG(4, cols, 4, staged), RUNG(4, cols, 6, staged)
static const Rung LADDER[] = {RUNGS(1, true), RUNGS(1, false), RUNGS(2, true), RUNGS(2, false),
                              {"registers", 2, 1, 0, 1, in_registers}};
constexpr int VARIANTS = 7;

static size_t shared_of(const Rung &r, size_t M, size_t K) {
  if (!r.depth) return part_bytes(r.groups, 1) + M * row_chunks(K) * 16;
  return few_shared(r.groups, r.cols, r.depth, r.staged, M, K);
}
static bool fits(const Rung &r, size_t M, size_t K) {
  return shared_of(r, M, K) <= shared_limit() && (r.depth || K % 2048 == 0);
}
static void start(const Rung &r, Few c, size_t left = 128 << 10, unsigned ahead = 4) {
  find_tiles(&c, 8 * r.groups, false);
  c.late = (unsigned)(1 + left / (8 * r.groups * sizeof(bf16) * (c.K + 1))), c.ahead = ahead;
  LAUNCH_EARLY(r.kernel, blocks_for(c.tiles, 1, multiprocessors()), THREADS, shared_of(r, c.M, c.K), c);
}

/* ---- time ---------------------------------------------------------------------------------------------------------------- */

static void failed(const char *where) {
  if (const char *error = device_error()) printf("%s: %s\n", where, error), exit(1);
}

/* us of one of the calls of work that a graph holds */
template <class F> static double time_of(F work, int calls = 16) {
  Recording *r = recording_new();
  work();
  recording_begin();
  for (int i = 0; i < calls; i++) work();
  recording_end(r);
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  std::vector<float> ms;
  for (int i = 0; i < 7; i++) {
    CHECK(cudaEventRecord(from, stream()));
    recording_play(r);
    CHECK(cudaEventRecord(to, stream()));
    CHECK(cudaEventSynchronize(to));
    ms.push_back(0);
    CHECK(cudaEventElapsedTime(&ms.back(), from, to));
  }
  CHECK(cudaEventDestroy(from));
  CHECK(cudaEventDestroy(to));
  recording_free(r);
  failed("a graph");
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2] * 1000 / calls;
}

/* Weights of n elements, others at each call. */
static size_t at;
static const bf16 *weights(size_t n) {
  n = (n + 511) / 512 * 512;
  if (at + n > POOL / sizeof(bf16)) at = 0;
  at += n;
  return pool + at - n;
}

static __global__ void randomise(bf16 *p, size_t n) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    unsigned h = (unsigned)i * 2654435761u ^ (unsigned)(i >> 32);
    h = (h ^ h >> 15) * 2246822519u, h = (h ^ h >> 13) * 3266489917u, h ^= h >> 16;
    store(p + i, ((int)(h >> 8) - (1 << 23)) * 0x1p-23f);
  }
}

/* ---- right: every shape gives the bits of row_tiles, and that what FFMA gives within rounding ---------------------------- */

static bool check(size_t M, size_t K, size_t O, const real *x, real *y) {
  bool good = true;
  std::vector<uint16_t> expected(M * O), got(M * O);
  const Product p = {y, {pool, BFLOAT16}, nullptr, O};
  auto run = [&](std::vector<uint16_t> &to, auto work) {
    device_zero(y, M * O * sizeof(real));
    work();
    device_pull(to.data(), y, to.size() * 2);
    failed("check");
  };
  run(got, [&] { start_floats<bf16>(p, x, 0, M, K); });
  run(expected, [&] { start_tiles<64, 32, 4, 6>(p, x, 0, M, K); });
  double error = 0, size = 0;
  for (size_t i = 0; i < M * O; i++) {
    const double a = bf16_to_float(expected[i]), b = bf16_to_float(got[i]);
    error += (a - b) * (a - b), size += b * b;
  }
  if (!(error <= 1e-5 * size)) printf("row_tiles: error %.2e\n", error / size), good = false;
  auto compare = [&](const char *name) {
    if (got != expected) printf("%s differs from row_tiles<64, 32> at M %zu K %zu O %zu\n", name, M, K, O), good = false;
  };
  run(got, [&] { start_tiles<64, 64, 4, 5>(p, x, 0, M, K); });
  compare("row_tiles<64, 64>");
  run(got, [&] { start_tiles<128, 128, 2, 3>(p, x, 0, M, K); });
  compare("row_tiles<128, 128>");
  for (const Rung &r : LADDER) {
    if (M > 8u * r.cols || !fits(r, M, K)) continue;
    Few c = {};
    c.p[0] = p, c.n = 1, c.M = (unsigned)M, c.K = K, c.x = x;
    run(got, [&] { start(r, c); });
    compare(r.name);
  }
  return good;
}

/* ---- tables -------------------------------------------------------------------------------------------------------------- */

static void table(const real *x, real *y) {
  const size_t shapes[][2] = {{4096, 14336}, {14336, 4096}, {4096, 128256}, {4096, 4096},
                              {4096, 1024},  {2048, 8192},  {8192, 2048},   {3072, 8192}};
  printf("\nus, GB/s and share of %.0f GB/s of ours; the rungs staged | streamed\n%6s %7s %3s %6s %6s %5s %6s %6s", COPY, "K",
         "O", "M", "ours", "GB/s", "share", "plain", "read");
  for (int v = 0; v < VARIANTS; v++) printf(" %13s", LADDER[v].name);
  printf(" registers\n");
  for (auto &s : shapes)
    for (size_t M : {1, 5, 8, 16}) {
      const size_t K = s[0], O = s[1];
      const int calls = K * O < (32 << 20) ? 64 : 16;
      auto product = [&] { linear_forward(y, x, {weights(K * O), BFLOAT16}, nullptr, 0, 1, M, K, O); };
      const double read = time_of([&] {
        const uint4 *w = (const uint4 *)(const void *)weights(K * O);
        LAUNCH_EARLY(read_all, 2 * multiprocessors(), 512, 0, (unsigned *)y, w, K * O / 8);
      }, calls);
      const double ours = time_of(product, calls);
      early = 0;
      const double plain = time_of(product, calls);
      early = 1;
      const double speed = K * O * 2e-3 / ours;
      printf("%6zu %7zu %3zu %6.1f %6.0f %5.2f %6.1f %6.1f", K, O, M, ours, speed, speed / COPY, plain, read);
      for (int v = 0; v <= VARIANTS; v++)
        for (int staged = 1; staged >= (v < VARIANTS ? 0 : 1); staged--) {
          const Rung &r = LADDER[v == VARIANTS ? 4 * VARIANTS : (M > 8) * 2 * VARIANTS + (1 - staged) * VARIANTS + v];
          const char *end = staged ? "|" : "";
          if (M > 8u * r.cols || !fits(r, M, K)) {
            printf(" %6s%s", "-", end);
            continue;
          }
          Few c = {};
          c.n = 1, c.M = (unsigned)M, c.K = K, c.x = x;
          printf(" %6.1f%s", time_of([&] {
                   c.p[0] = {y, {weights(K * O), BFLOAT16}, nullptr, O};
                   start(r, c);
                 }, calls),
                 end);
        }
      printf("\n");
      fflush(stdout);
    }
}

/* Products in turn, one row: how much of its W a block has left when the next kernel may start, and how many stages of W that
 * brings to L2. */
static void policy(const real *x, real *y) {
  const size_t shapes[][2] = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};
  printf("\nfour products in turn (436 MB), us; rows: KiB left when the next may start, columns: stages to L2\n%8s", "");
  const unsigned stages[] = {0, 2, 4, 8, 16};
  for (unsigned ahead : stages) printf(" %7u", ahead);
  for (size_t left : {0, 128, 256, 512, 1 << 20}) {
    printf("\n%8zu", left);
    for (unsigned ahead : stages)
      printf(" %7.1f", time_of([&] {
               for (auto &s : shapes) {
                 Few c = {};
                 c.p[0] = {y, {weights(s[0] * s[1]), BFLOAT16}, nullptr, s[1]}, c.n = 1, c.M = 1, c.K = s[0], c.x = x;
                 start(LADDER[2], c, left << 10, ahead);
               }
             }, 4));
  }
  printf("\n");
}

/* A layer's products as the model calls them: q k v, o, gate and up, down; 436 MB. */
static void chain(real *y, const float *norm) {
  const size_t C = 4096, E = 1024, F = 14336;
  printf("\na layer's products (C 4096, F 14336), us; floor %.1f\n", (C * (C + 2 * E) + C * C + 3 * C * F) * 2e-3 / COPY);
  for (size_t M : {1, 5, 16, 32, 64, 256}) {
    real *h = y, *q = y + M * C, *k = q + M * C, *v = k + M * E, *act = v + M * E;
    auto layer = [&] {
      const Product qkv[] = {{q, {weights(C * C), BFLOAT16}, nullptr, C},
                             {k, {weights(C * E), BFLOAT16}, nullptr, E},
                             {v, {weights(C * E), BFLOAT16}, nullptr, E}};
      linears_forward(qkv, 3, h, norm, 1e-5f, 0, M, 1, C);
      linear_forward(h, q, {weights(C * C), BFLOAT16}, nullptr, 1, M, 1, C, C);
      const Matrix gate = {weights(C * F), BFLOAT16}, up = {weights(C * F), BFLOAT16};
      swiglu_linear_forward(act, h, norm, 1e-5f, gate, nullptr, up, nullptr, M, 1, C, F);
      linear_forward(h, act, {weights(C * F), BFLOAT16}, nullptr, 1, M, 1, F, C);
    };
    const double fast = time_of(layer, 4);
    early = 0;
    printf("M %3zu: %7.1f, without early starts %7.1f\n", M, fast, time_of(layer, 4));
    early = 1;
  }
}

int main() {
  const size_t xs = (size_t)256 * 14336, ys = (size_t)256 * 128256, norms = 14336;
  pool = (bf16 *)device_alloc(POOL);
  real *x = (real *)device_alloc(xs * sizeof(real)), *y = (real *)device_alloc(ys * sizeof(real));
  float *norm = (float *)device_alloc(norms * sizeof(float));
  failed("memory");
  LAUNCH(randomise, 4096, 256, 0, pool, POOL / sizeof(bf16));
  LAUNCH(randomise, 4096, 256, 0, (bf16 *)x, xs);
  LAUNCH(randomise, 4096, 256, 0, (bf16 *)y, ys);
  LAUNCH(randomise, 4096, 256, 0, (bf16 *)norm, norms * 2);
  bool good = true;
  for (size_t M : {1, 5, 8, 13, 16, 33, 130})
    for (size_t K : {4096, 14336, 520})
      for (size_t O : {1024, 200}) good &= check(M, K, O, x, y);
  printf("%s\n", good ? "every shape gives the same bits" : "WRONG");
  table(x, y);
  policy(x, y);
  chain(y, norm);
  return !good;
}
