/* dev/norm.cu - times the norms of many rows, and checks them against sums in double. From the root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_BF16=1 \
 *     -Icsrc -Icuda cuda/dev/norm.cu -o norm && ./norm
 *
 * TB/s count each activation once a read and once a write. A graph goes through as many arrays as exceed the L2. Errors are of
 * y, dx and dz, in norm, over the first rows. */
#include "../norm.cu"
#include "device.cuh"

struct Case {
  real *y, *dx, *dz;
  const real *dy, *x, *z;
};

static float *floats(size_t n) {
  const std::vector<real> from = pull(normal(n), n);
  std::vector<float> v(n);
  for (size_t i = 0; i < n; i++) v[i] = real_to_float(from[i]);
  float *x = array<float>(n);
  CHECK(cudaMemcpyAsync(x, v.data(), n * sizeof(float), cudaMemcpyHostToDevice, stream()));
  CHECK(cudaStreamSynchronize(stream()));
  return x;
}

struct Distance {
  double off, size;
  void add(real got, double wanted) { off += pow(real_to_float(got) - wanted, 2), size += wanted * wanted; }
  double relative() const { return sqrt(off / size); }
};
/* Of rows (n,C), row i with the weights i % H. */
static void check(const Case &s, const float *weights, bool gated, double eps, size_t n, size_t H, size_t C) {
  std::vector<float> w(H * C);
  CHECK(cudaStreamSynchronize(stream()));
  CHECK(cudaMemcpy(w.data(), weights, H * C * sizeof(float), cudaMemcpyDeviceToHost));
  const std::vector<real> x = pull(s.x, n * C), dy = pull(s.dy, n * C), y = pull(s.y, n * C), dx = pull(s.dx, n * C);
  const std::vector<real> z = gated ? pull(s.z, n * C) : x, dz = gated ? pull(s.dz, n * C) : dx;
  Distance of_y = {}, of_dx = {}, of_dz = {};
  auto gate = [&](size_t i) { return gated ? real_to_float(z[i]) / (1 + exp(-(double)real_to_float(z[i]))) : 1; };
  for (size_t row = 0; row < n; row++) {
    double square = 0, dot = 0;
    for (size_t i = row * C; i < (row + 1) * C; i++) {
      const double a = real_to_float(x[i]) * gate(i);
      square += a * a, dot += real_to_float(dy[i]) * w[i % (H * C)] * a;
    }
    const double r = 1 / sqrt(square / C + eps);
    for (size_t i = row * C; i < (row + 1) * C; i++) {
      const double v = real_to_float(x[i]), g = real_to_float(z[i]), q = 1 / (1 + exp(-g)), a = v * gate(i), k = w[i % (H * C)];
      const double da = r * (real_to_float(dy[i]) * k - a * r * r * dot / C);
      of_y.add(y[i], a * r * k);
      of_dx.add(dx[i], da * gate(i));
      if (gated) of_dz.add(dz[i], da * v * q * (1 + g * (1 - q)));
    }
  }
  printf("  errors %.1e %.1e", of_y.relative(), of_dx.relative());
  if (gated) printf(" %.1e", of_dz.relative());
  printf("\n");
}

/* f(i) moves `arrays` arrays of n reals. */
template <class F> static void row(const char *name, size_t arrays, size_t n, size_t sets, F f) {
  const double us = timed((int)sets, f);
  printf("  %-34s %8.1f us %6.2f TB/s\n", name, us, (double)arrays * n * sizeof(real) / us * 1e-6);
}

/* H 0: the plain norm of rows of C */
static void norms(size_t M, size_t H, size_t C) {
  const bool gated = H > 0;
  const size_t n = M * (gated ? H : 1) * C, sets = std::min<size_t>(32, ((size_t)512 << 20) / (n * sizeof(real)) + 1);
  const float eps = 1e-5f, *w = floats((gated ? H : 1) * C);
  float *dw = floats((gated ? H : 1) * C);
  std::vector<Case> all;
  for (size_t i = 0; i < sets; i++)
    all.push_back({array<real>(n), array<real>(n), gated ? array<real>(n) : nullptr, normal(n), normal(n),
                   gated ? normal(n) : nullptr});
  auto forward = [&](int i) {
    if (gated)
      gated_rmsnorm_forward(all[i].y, all[i].x, all[i].z, w, eps, M, H, C);
    else
      rmsnorm_forward(all[i].y, all[i].x, w, eps, M, C);
  };
  auto backward = [&](int i, float *dw, int add) {
    const Case &s = all[i];
    if (gated)
      gated_rmsnorm_backward(s.dx, s.dz, dw, s.dy, s.x, s.z, w, eps, M, H, C);
    else
      rmsnorm_backward(s.dx, dw, s.dy, s.x, w, eps, add, M, C);
  };
  if (gated)
    printf("gated %zu x %zu x %zu\n", M, H, C);
  else
    printf("plain %zu x %zu\n", M, C);
  row("forward", gated ? 3 : 2, n, sets, forward);
  row("backward, w frozen", gated ? 5 : 3, n, sets, [&](int i) { backward(i, nullptr, 0); });
  row("backward", gated ? 5 : 3, n, sets, [&](int i) { backward(i, dw, 0); });
  forward(0);
  backward(0, nullptr, 0);
  check(all[0], w, gated, eps, std::min<size_t>(M, 64) * (gated ? H : 1), gated ? H : 1, C);
  if (!gated) row("backward, dx added to, w frozen", 4, n, sets, [&](int i) { backward(i, nullptr, 1); });
  if (!gated) row("backward, dx added to", 4, n, sets, [&](int i) { backward(i, dw, 1); });
  free_all();
}

int main() {
  for (size_t M : {1, 2048, 8192}) norms(M, 0, 4096);
  norms(8192, 0, 8192);
  for (size_t M : {1, 2048, 8192}) norms(M, 32, 128);
  return 0;
}
