/* dev/linear.cu - times linear layers of few tokens and their tiles, and compares bits with a row alone. From the root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_GPU=1 -DMIL_BF16=1 \
 *     -Icsrc -Icuda cuda/dev/linear.cu -o linear && ./linear
 *
 * A graph of calls, one behind the other, each with other weights, so that the L2 holds none of them; the time of one call.
 * TB/s are those of the weights. An argument: how many rows to time alone, with every tiling that is not hopeless. */
#include "../act.cu"
#include "../linear.cu"
#include "device.cuh"

void device_zero(void *p, size_t bytes) { CHECK(cudaMemsetAsync(p, 0, bytes, stream())); }
void gemm(void *, int, size_t, const void *, size_t, int, const void *, size_t, int, int, int, size_t, size_t, size_t) {
  abort(); /* few tokens do without */
}

static float *ones(size_t n) {
  std::vector<float> v(n, 1);
  float *x = array<float>(n);
  CHECK(cudaMemcpyAsync(x, v.data(), n * sizeof *x, cudaMemcpyHostToDevice, stream()));
  CHECK(cudaStreamSynchronize(stream()));
  return x;
}
/* How many rows of a and b differ */
static size_t different(const void *a, const void *b, size_t rows, size_t row_bytes) {
  std::vector<char> x(rows * row_bytes), y(rows * row_bytes);
  CHECK(cudaStreamSynchronize(stream()));
  CHECK(cudaMemcpy(x.data(), a, x.size(), cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(y.data(), b, y.size(), cudaMemcpyDeviceToHost));
  size_t n = 0;
  for (size_t m = 0; m < rows; m++) n += memcmp(&x[m * row_bytes], &y[m * row_bytes], row_bytes) != 0;
  return n;
}

/* ---- layers -------------------------------------------------------------------------------------------------------------- */

enum Kind { PLAIN, ADDED, GATED, LOGITS };
constexpr size_t MOST_ROWS = 320;

struct Layer {
  const char *name;
  Kind kind;
  std::vector<size_t> O;
  size_t K;
  std::vector<std::vector<Product>> p; /* a set of weights each */
  std::vector<real *> y, expected;     /* a product each; of gate and up one */
  real *x;

  size_t outputs() const {
    size_t all = 0;
    for (size_t o : O) all += o;
    return all;
  }
  size_t bytes() const { return outputs() * K * sizeof(real); }
  size_t row_bytes(size_t i) const { return O[i] * (kind == LOGITS ? sizeof(float) : sizeof(real)); }
  int sets() const { return (int)p.size(); }
  int results() const { return kind == GATED ? 1 : (int)O.size(); }

  Layer(const char *name, Kind kind, std::vector<size_t> O, size_t K) : name(name), kind(kind), O(O), K(K) {
    x = normal(MOST_ROWS * K);
    for (int i = 0; i < results(); i++)
      for (auto *to : {&y, &expected}) to->push_back((real *)array<char>(MOST_ROWS * row_bytes(i)));
    const int sets = (int)std::max<size_t>(2, ((size_t)400 << 20) / bytes() + 1);
    for (int s = 0; s < sets; s++) {
      std::vector<Product> set;
      for (size_t i = 0; i < O.size(); i++)
        set.push_back({y[kind == GATED ? 0 : i], {normal(O[i] * K), BFLOAT16}, nullptr, O[i]});
      p.push_back(set);
    }
  }
  /* M rows of x from m on, to `to` */
  void call(int set, const std::vector<real *> &to, size_t m, size_t M) const {
    std::vector<Product> q = p[set];
    const real *rows = x + m * K;
    for (size_t i = 0; i < q.size(); i++) q[i].y = (real *)((char *)to[kind == GATED ? 0 : i] + m * row_bytes(i));
    if (kind == GATED)
      swiglu_linear_forward(q[0].y, rows, nullptr, 0, q[0].w, nullptr, q[1].w, nullptr, M, 1, K, O[0]);
    else if (kind == LOGITS)
      logits_forward((float *)(void *)q[0].y, rows, q[0].w, M, 1, K, O[0]);
    else
      linears_forward(q.data(), (int)q.size(), rows, nullptr, 0, kind == ADDED, M, 1, K);
  }
  Few few(int set, size_t M) const {
    Few c = {};
    c.n = (int)O.size(), c.x = x, c.K = K, c.M = (unsigned)M, c.how = kind == LOGITS ? FLOATS : kind == ADDED ? ADD : 0;
    for (int i = 0; i < c.n; i++) c.p[i] = p[set][i];
    return c;
  }
  void clear(const std::vector<real *> &to) const {
    for (int i = 0; i < results(); i++) device_zero(to[i], MOST_ROWS * row_bytes(i));
  }
  size_t differ(size_t M) const {
    size_t n = 0;
    for (int i = 0; i < results(); i++) n += different(y[i], expected[i], M, row_bytes(i));
    return n;
  }
};

static void print(const Layer &l, size_t M, double us, size_t differ) {
  printf("%9.1f us %5.2f TB/s %6.0f TFLOP/s   %s", us, l.bytes() / us * 1e-6, 2.0 * M * l.outputs() * l.K / us * 1e-6,
         differ ? "DIFFERS" : "same bits");
  if (differ) printf(" in %zu rows", differ);
  printf("\n");
}

static void time_tilings(const Layer &l, size_t M) {
  const size_t units = find_tiles(l.few(0, M), l.kind == GATED).first[l.kind == GATED ? 1 : l.O.size()];
  const Tiled chosen = choose_tiles<real>(units, M, l.K, true);
  const double least = clocks(*chosen.tiling, chosen.splits, units, M, l.K);
  for (const Tiling &t : TILINGS<real>)
    for (unsigned splits = 1; t.shared <= shared_limit() && splits <= (unsigned)(PARTS / t.par); splits *= 2) {
      const double predicted = clocks(t, splits, units, M, l.K);
      const Tiled tiled = {&t, splits};
      const size_t tiles = outputs_tiles(t, units) * row_tiles_of(t, M);
      if (predicted > 1.4 * least || (splits > 1 && tiles > MOST_SPLIT_TILES)) continue;
      float *parts = (float *)device_scratch(parts_bytes(tiled, units, M) + 256);
      auto run = [&](int set) {
        Tiles c = find_tiles(l.few(set, M), l.kind == GATED);
        c.parts = parts;
        run_tiles(c, tiled);
      };
      const double us = timed(l.sets(), run);
      l.clear(l.y);
      run(0);
      printf("  %c %3d x %3d, %d parts at once, %d splits, %5zu items, %5.1f us expected",
             &t == chosen.tiling && splits == chosen.splits ? '*' : ' ', 16 * t.mmas, rows_of(t.cols, t.par), t.par, splits,
             tiles * splits, predicted / 1700);
      print(l, M, us, l.differ(M));
    }
}

static void time_layer(const Layer &l, const std::vector<size_t> &rows, bool tilings) {
  printf("%s, K %zu: %.0f MB, %.1f us at 4.25 TB/s\n", l.name, l.K, l.bytes() * 1e-6, l.bytes() / 4.25e6);
  l.clear(l.expected);
  for (size_t m = 0; m < rows.back(); m++) l.call(0, l.expected, m, 1);
  for (size_t M : rows) {
    const double us = timed(l.sets(), [&](int set) { l.call(set, l.y, 0, M); });
    l.clear(l.y);
    l.call(0, l.y, 0, M);
    printf("%4zu rows", M);
    print(l, M, us, l.differ(M));
    if (tilings) time_tilings(l, M);
  }
  printf("\n");
}

/* The products of a decoder layer of the 8B shape, one behind the other, with norms and residuals: what decode does of them. */
static void time_decoder_layer(const std::vector<size_t> &rows) {
  constexpr size_t C = 4096, E = 1024, F = 14336;
  struct Weights {
    Matrix q, k, v, o, gate, up, down;
  };
  std::vector<Weights> layers(2);
  auto matrix = [](size_t O, size_t K) { return Matrix{normal(O * K), BFLOAT16}; };
  for (Weights &w : layers)
    w = {matrix(C, C), matrix(E, C), matrix(E, C), matrix(C, C), matrix(F, C), matrix(F, C), matrix(C, F)};
  real *h = normal(MOST_ROWS * C), *q = array<real>(MOST_ROWS * C);
  real *k = array<real>(MOST_ROWS * E), *v = array<real>(MOST_ROWS * E), *act = array<real>(MOST_ROWS * F);
  const float *norm = ones(C);
  const double bytes = sizeof(real) * (2.0 * C * C + 2.0 * E * C + 3.0 * F * C);
  for (size_t M : rows) {
    const double us = timed(8, [&](int i) {
      const Weights &w = layers[i % 2];
      const Product in[] = {{q, w.q, nullptr, C}, {k, w.k, nullptr, E}, {v, w.v, nullptr, E}};
      linears_forward(in, 3, h, norm, 1e-5f, 0, M, 1, C);
      linear_forward(h, q, w.o, nullptr, 1, M, 1, C, C);
      swiglu_linear_forward(act, h, norm, 1e-5f, w.gate, nullptr, w.up, nullptr, M, 1, C, F);
      linear_forward(h, act, w.down, nullptr, 1, M, 1, F, C);
    });
    printf("a layer of the 8B shape, %4zu rows %9.1f us %5.2f TB/s %6.0f TFLOP/s; 32 of them %6.2f ms\n", M, us,
           bytes / us * 1e-6, bytes * M / us * 1e-6, us * 32e-3);
  }
  free_all();
}

int main(int count, char **arguments) {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  printf("%s, %d multiprocessors\n\n", device.name, device.multiProcessorCount);
  std::vector<size_t> rows = {1, 4, 8, 16, 17, 32, 64, 128, 256, 320};
  if (count > 1) rows = {(size_t)std::min(std::max(atoi(arguments[1]), 1), (int)MOST_ROWS)};
  time_decoder_layer(rows);
  printf("\n");
  const struct {
    const char *name;
    Kind kind;
    std::vector<size_t> O;
    size_t K;
  } shapes[] = {{"14336 outputs", PLAIN, {14336}, 4096},
                {"down, 4096 outputs", ADDED, {4096}, 14336},
                {"out, 4096 outputs", ADDED, {4096}, 4096},
                {"q, k, v, 4096 + 1024 + 1024 outputs", PLAIN, {4096, 1024, 1024}, 4096},
                {"Mamba's input, 4096 + 1024 + 1024 + 4096 + 32 outputs", PLAIN, {4096, 1024, 1024, 4096, 32}, 4096},
                {"gate and up, 2 x 14336 outputs", GATED, {14336, 14336}, 4096},
                {"logits, 128256 outputs", LOGITS, {128256}, 4096}};
  for (auto &s : shapes) {
    time_layer(Layer(s.name, s.kind, s.O, s.K), rows, count > 1);
    free_all();
  }
  return 0;
}
