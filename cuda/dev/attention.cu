/* dev/attention.cu - times the attention kernels and their tile choices, and checks them against the plain ones. From the root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_BF16=1 \
 *     -Icsrc -Icuda cuda/dev/attention.cu -o attention && ./attention
 *
 * FLOPs count what a causal mask leaves: 4 P a pair (forward), 10 P (backward). Decode: bytes of the keys and values that are
 * seen, a graph that goes through as many caches as exceed the L2, the time of one call. */
#include "../attention.cu"
#include "../attention_backward.cu"
#include "../attention_few.cu"
#include "../attention_hopper.cu"
#include "../attention_sinks.cu"
#include "device.cuh"

/* ---- a call -------------------------------------------------------------------------------------------------------------- */

static Attention shape(int B, int T, int H, int G, int P) {
  Attention a = {};
  a.B = B, a.T = T, a.H = H, a.G = G, a.P = P, a.rep = H / G, a.scale = LOG2E / sqrtf((float)P), a.whole = P % REALS_16 == 0;
  const size_t q = (size_t)B * T * H * P, k = (size_t)B * T * G * P;
  a.q = normal(q), a.k = normal(k), a.v = normal(k), a.o = array<real>(q), a.lse = array<float>((size_t)B * T * H);
  a.stats_T = (int)ceil_div(T, 128) * 128;
  return a;
}
static size_t outputs(const Attention &a) { return (size_t)a.B * a.T * a.H * a.P; }
static void forward(const Attention &a) {
  attention_forward(a.o, a.lse, a.kcache, a.vcache, (real *)a.q, (real *)a.k, a.v, a.rows, Rope{}, a.scale * LN2, a.window, a.sinks, a.B,
                    a.T, a.H, a.G, a.P, a.K);
}
static void plain(const Attention &a) { LAUNCH(attend_plain, dim3(a.T, a.H, a.B), 128, a.P * sizeof(float), a); }

/* Caches of K entries, `pos` of them filled. */
static void add_caches(Attention &a, int K, std::vector<int32_t> pos) {
  a.K = a.turns = K, a.rows.pos = ints(pos);
  const size_t n = (size_t)a.B * K * a.G * a.P;
  a.kcache = normal(n), a.vcache = normal(n);
}

/* ---- forward of many tokens ---------------------------------------------------------------------------------------------- */

static double causal(const Attention &a, int past) {
  return (double)a.B * a.H * a.P * ((double)a.T * past + a.T * (a.T + 1.0) / 2);
}

template <int PD, int MT, int WARPS, int KEYS, int BLOCKS>
static void time_many(const Attention &a, const real *expected, int past) {
  const double us = timed(5, [&](int) { run_many<PD, MT, WARPS, KEYS, BLOCKS>(a); });
  printf("  %3d rows (%d x %d) %3d keys, %d a multiprocessor %9.1f us %7.0f TFLOP/s   error %.1e\n", 16 * MT * WARPS, WARPS,
         16 * MT, KEYS, BLOCKS, us, 4 * causal(a, past) / us * 1e-6, error(a.o, expected, outputs(a)));
}
template <int PD, int KEYS> static void time_many_hopper(const Attention &a, const real *expected, int past) {
  const double us = timed(5, [&](int) { run_many_hopper<PD, KEYS>(a); });
  printf("  wgmma, 128 rows, %3d keys                  %9.1f us %7.0f TFLOP/s   error %.1e\n", KEYS, us,
         4 * causal(a, past) / us * 1e-6, error(a.o, expected, outputs(a)));
}
static void many(int B, int T, int H, int G, int P, int past, bool variants) {
  Attention a = shape(B, T, H, G, P);
  if (past) add_caches(a, past + T, std::vector<int32_t>(B, past));
  real *out = a.o, *expected = array<real>(outputs(a)), *again = array<real>(outputs(a));
  a.o = expected;
  plain(a);
  a.o = again;
  forward(a);
  a.o = out;
  const double us = timed(5, [&](int) { forward(a); });
  printf("forward B %d T %d past %d heads %d/%d x %d: %9.1f us %7.0f TFLOP/s   error %.1e   run to run: %s\n", B, T, past, H, G,
         P, us, 4 * causal(a, past) / us * 1e-6, error(a.o, expected, outputs(a)),
         same(a.o, again, outputs(a)) ? "same" : "DIFFERENT");
  if (variants && P == 128) {
    time_many_hopper<128, 128>(a, expected, past);
    time_many_hopper<128, 64>(a, expected, past);
    time_many<128, 2, 4, 64, 2>(a, expected, past);
    time_many<128, 2, 4, 32, 2>(a, expected, past);
    time_many<128, 2, 8, 64, 1>(a, expected, past);
    time_many<128, 1, 8, 64, 1>(a, expected, past);
    time_many<128, 1, 4, 64, 2>(a, expected, past);
  }
  free_all();
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

template <class F> static void time_part(const char *name, const Attention &a, double flops, F f) {
  const double us = timed(3, [&](int) { f(a); });
  printf("  %-45s %9.1f us %7.0f TFLOP/s of %.0f P\n", name, us, flops * causal(a, 0) / us * 1e-6, flops);
}
static void backward(int B, int T, int H, int G, int P, bool documents) {
  Attention a = shape(B, T, H, G, P);
  const size_t q = outputs(a), k = (size_t)B * T * G * P, stats = (size_t)B * H * a.stats_T;
  a.dout = normal(q), a.dq = array<real>(q), a.dk = array<real>(k), a.dv = array<real>(k);
  std::vector<int32_t> prev((size_t)B * T);
  for (size_t i = 0; i < prev.size(); i++) prev[i] = i % T % 700 ? (int32_t)(i % T) - 1 : -2;
  if (documents) a.rows.prev = ints(prev);
  forward(a);
  auto run = [&](real *dq, real *dk, real *dv) {
    attention_backward(dq, dk, dv, a.dout, a.q, a.k, a.v, a.o, a.lse, a.rows, a.scale * LN2, a.window, a.sinks, B, T, H, G, P);
  };
  const double us = timed(3, [&](int) { run(a.dq, a.dk, a.dv); });
  real *dq = array<real>(q), *dk = array<real>(k), *dv = array<real>(k);
  run(dq, dk, dv);
  const bool twice = same(dq, a.dq, q) && same(dk, a.dk, k) && same(dv, a.dv, k);

  Attention x = a; /* the plain kernels, and the parts, on stats of our own */
  x.stats = array<float2>(stats), x.dq = dq, x.dk = dk, x.dv = dv;
  if (documents) {
    int32_t *starts = array<int32_t>((size_t)B * T + 128);
    find_starts(starts, a.rows.prev, B, T);
    x.starts = starts;
  }
  const double of_stats = timed(3, [&](int) { LAUNCH(find_stats, ceil_div(stats * 8, 256), 256, 0, x); });
  LAUNCH(backward_plain<true>, dim3(T, G, B), 128, 2 * P * sizeof(float), x);
  LAUNCH(backward_plain<false>, dim3(T, H, B), 128, P * sizeof(float), x);
  printf("backward B %d T %d heads %d/%d x %d%s: %9.1f us %7.0f TFLOP/s   errors %.1e %.1e %.1e   run to run: %s\n", B, T, H, G,
         P, documents ? ", documents of 700" : "", us, documents ? 0 : 10 * causal(a, 0) / us * 1e-6, error(a.dq, dq, q),
         error(a.dk, dk, k), error(a.dv, dv, k), twice ? "same" : "DIFFERENT");
  printf("  delta %43.1f us %7.2f TB/s\n", of_stats, 2.0 * q * sizeof(real) / of_stats * 1e-6);
  if (P == 128 && !documents) {
    for (int split : {1, 2, 4}) {
      x.split = split, x.parts = array<float>(2 * split * k);
      time_part(split == 1   ? "dk, dv: wgmma, 128 keys, 64 queries"
                : split == 2 ? "dk, dv: the same, heads in 2 parts"
                             : "dk, dv: the same, heads in 4 parts",
                x, 8, run_keys_hopper<128>);
    }
    time_part("dk, dv: 128 keys, 64 queries", x, 8, run_keys_twice<128, 8, 64>);
    time_part("dk, dv: 64 keys, 64 queries", x, 8, run_keys_twice<128, 4, 64>);
    time_part("dq: wgmma, 128 queries, 128 keys", x, 6, run_queries_hopper<128, 128>);
    time_part("dq: wgmma, 128 queries, 64 keys", x, 6, run_queries_hopper<128, 64>);
    time_part("dq: 128 queries (4 x 32), 32 keys", x, 6, run_queries<128, 2, 4, 32, 2>);
    time_part("dq: 64 queries (4 x 16), 64 keys", x, 6, run_queries<128, 1, 4, 64, 2>);
  }
  free_all();
}

/* ---- few tokens ---------------------------------------------------------------------------------------------------------- */

template <int CHUNK> static void time_few(std::vector<Attention> &layers, double bytes, int n) {
  const double us = timed((int)layers.size(), [&](int i) { run_few<128, CHUNK>(layers[i], n); });
  printf("   %3d x %d: %7.1f us %5.2f TB/s", CHUNK, n, us, bytes / us * 1e-6);
}
static void few(int B, int T, int context, int capacity, bool tree = false, bool variants = true) {
  const int H = 32, G = 8, P = 128;
  const size_t cache = 2 * (size_t)B * capacity * G * P * sizeof(real);
  const int count = (int)std::min<size_t>(
      64, std::max<size_t>(2, ((size_t)256 << 20) / ((size_t)B * context * G * P * 2 * sizeof(real)) + 1));
  std::vector<Attention> layers;
  for (int i = 0; i < count && (i < 2 || cache * i < (size_t)60 << 30); i++) {
    Attention a = shape(B, T, H, G, P);
    add_caches(a, capacity, std::vector<int32_t>(B, context));
    std::vector<int32_t> prev;
    for (int k = 0; k < B * T; k++) prev.push_back((k % T - 1) / 2 - !(k % T)); /* a binary tree; its root follows the past */
    if (tree) a.rows.prev = ints(prev);
    layers.push_back(a);
  }
  Attention a = layers[0];
  real *expected = array<real>(outputs(a));
  a.o = expected;
  plain(a);
  const double us = timed((int)layers.size(), [&](int i) { forward(layers[i]); });
  const double bytes = 2.0 * B * context * G * P * sizeof(real);
  printf("few B %2d T %2d%s context %5d of %5d: %8.1f us %5.2f TB/s  error %.1e\n", B, T, tree ? " (tree)" : "", context,
         capacity, us, bytes / us * 1e-6, error(layers[0].o, expected, outputs(a)));
  if (variants) {
    printf("  chunk x n:");
    time_few<64>(layers, bytes, 1);
    time_few<128>(layers, bytes, 1);
    time_few<128>(layers, bytes, SPAN);
    time_few<256>(layers, bytes, 1);
    printf("\n");
  }
  free_all();
}

/* T tokens in one call, one by one, in other items, alone: the same bits. */
static void invariance() {
  const int B = 3, T = 7, H = 32, G = 8, P = 128, K = 4096;
  const std::vector<int32_t> pos = {3000, 1021, 124};
  Attention a = shape(B, T, H, G, P);
  add_caches(a, K, pos);
  const size_t n = outputs(a), row = (size_t)H * P, entry = (size_t)G * P;
  real *whole = array<real>(n), *steps = array<real>(n), *spans = array<real>(n), *alone = array<real>(n / B);
  a.o = whole;
  forward(a);
  a.o = spans;
  run_few<128, 128>(a, SPAN);
  Attention one = a;
  one.T = 1, one.lse = nullptr;
  real *q = array<real>(B * row), *k = array<real>(B * entry), *v = array<real>(B * entry), *o = array<real>(B * row);
  one.q = q, one.k = k, one.v = v, one.o = o;
  for (int t = 0; t < T; t++) {
    std::vector<int32_t> at = pos;
    for (int b = 0; b < B; b++) {
      at[b] += t;
      CHECK(cudaMemcpyAsync(q + b * row, a.q + ((size_t)b * T + t) * row, row * sizeof(real), cudaMemcpyDeviceToDevice,
                            stream()));
      CHECK(cudaMemcpyAsync(k + b * entry, a.k + ((size_t)b * T + t) * entry, entry * sizeof(real), cudaMemcpyDeviceToDevice,
                            stream()));
      CHECK(cudaMemcpyAsync(v + b * entry, a.v + ((size_t)b * T + t) * entry, entry * sizeof(real), cudaMemcpyDeviceToDevice,
                            stream()));
    }
    one.rows.pos = ints(at);
    forward(one);
    for (int b = 0; b < B; b++)
      CHECK(cudaMemcpyAsync(steps + ((size_t)b * T + t) * row, o + b * row, row * sizeof(real), cudaMemcpyDeviceToDevice,
                            stream()));
  }
  Attention single = a;
  single.B = 1, single.o = alone, single.lse = nullptr;
  forward(single);
  printf("bits: steps %s, spans %s, alone %s\n\n", same(whole, steps, n) ? "same" : "DIFFERENT",
         same(whole, spans, n) ? "same" : "DIFFERENT", same(whole, alone, n / B) ? "same" : "DIFFERENT");
  free_all();
}

static void time_rope(int M, int H, int P) {
  real *x = normal((size_t)M * H * P);
  std::vector<int32_t> at(M);
  std::vector<float> frequency(P / 2);
  for (int m = 0; m < M; m++) at[m] = m % 8192;
  for (int i = 0; i < P / 2; i++) frequency[i] = powf(500000, -2.0f * i / P);
  float *inv_freq = array<float>(P / 2);
  CHECK(cudaMemcpyAsync(inv_freq, frequency.data(), P / 2 * 4, cudaMemcpyHostToDevice, stream()));
  const int32_t *position = ints(at);
  const double us = timed(20, [&](int) { rope_forward(x, x, position, inv_freq, 1, M, H, P); });
  printf("rope M %5d heads %2d x %d: %7.1f us %5.2f TB/s\n", M, H, P, us, 2.0 * M * H * P * sizeof(real) / us * 1e-6);
  free_all();
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  printf("%s, %d multiprocessors\n\n", device.name, device.multiProcessorCount);
  invariance();
  for (int B : {1, 4}) many(B, 2048, 32, 8, 128, 0, true);
  many(1, 2048, 32, 8, 128, 2048, false);
  many(1, 2000, 32, 8, 128, 100, false);
  many(1, 8192, 32, 8, 128, 0, true);
  many(4, 2048, 32, 8, 64, 0, false);
  many(4, 2048, 16, 4, 256, 0, false);
  printf("\n");
  for (int B : {1, 4}) backward(B, 2048, 32, 8, 128, false);
  backward(4, 2048, 32, 8, 128, true);
  backward(4, 2048, 32, 8, 64, false);
  printf("\n");
  for (int T : {1, 5}) {
    few(1, T, 512, 1024);
    few(1, T, 512, 32768);
    few(1, T, 2048, 4096);
    few(1, T, 8192, 16384);
    few(1, T, 32760, 32768);
    few(8, T, 2048, 4096);
    few(64, T, 2048, 2112);
    few(64, T, 2048, 4096);
  }
  few(1, 15, 2048, 4096, true, false);
  few(1, 31, 30000, 32768, true, false);
  printf("\n");
  time_rope(8192, 32, 128);
  time_rope(8192, 8, 128);
  time_rope(1, 32, 128);
  return 0;
}
