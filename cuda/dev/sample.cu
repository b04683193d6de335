/* dev/sample.cu - times sampling and verification with their filters, and draws each row once more alone. From the root:
 *
 *   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -DMIL_CUDA=1 -DMIL_GPU=1 -DMIL_BF16=1 \
 *     -Icsrc -Icuda cuda/dev/sample.cu -o sample && ./sample
 *
 * A vocabulary of 128256; logits N(0, 4), or only halves of integers, so that hundreds of tokens tie. The time of a call in a
 * graph of ten. */
#include "../sample.cu"
#include "device.cuh"

/* ---- data ---------------------------------------------------------------------------------------------------------------- */

static __global__ void normals(float *x, size_t n, const float *near, float scale, float step, unsigned seed) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    unsigned long long z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull, z ^= z >> 31;
    const float u = ((unsigned)z + 1.0f) * 0x1p-32f, v = (unsigned)(z >> 32) * 0x1p-32f;
    const float y = (near ? near[i] : 0) + scale * sqrtf(-2 * logf(u)) * cospif(2 * v);
    x[i] = step > 0 ? roundf(y / step) * step : y;
  }
}
template <class T> static T *put(const std::vector<T> &v) {
  T *x = array<T>(v.size());
  CHECK(cudaMemcpy(x, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return x;
}
static std::vector<int32_t> pull(const int32_t *x, size_t n) {
  std::vector<int32_t> v(n);
  CHECK(cudaStreamSynchronize(stream()));
  CHECK(cudaMemcpy(v.data(), x, n * sizeof *x, cudaMemcpyDeviceToHost));
  return v;
}
static float *uniforms(size_t n) {
  std::vector<float> u(n);
  for (float &x : u) x = (float)(rand() % (1 << 24)) * 0x1p-24f;
  return put(u);
}

/* ---- calls --------------------------------------------------------------------------------------------------------------- */

constexpr size_t V = 128256, MOST = 64, K = 4;
struct Filters {
  const char *name;
  float temperature;
  int32_t top_k;
  float top_p, min_p;
};

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  printf("%s\n\n", device.name);
  float *distinct = array<float>(MOST * (K + 1) * V), *ties = array<float>(MOST * (K + 1) * V);
  float *near = array<float>(MOST * K * V);
  LAUNCH(normals, 4096, 256, 0, distinct, MOST * (K + 1) * V, (const float *)nullptr, 2.0f, 0.0f, 1u);
  LAUNCH(normals, 4096, 256, 0, ties, MOST * (K + 1) * V, (const float *)nullptr, 2.0f, 0.5f, 2u);
  LAUNCH(normals, 4096, 256, 0, near, MOST * K * V, (const float *)nullptr, 2.0f, 0.0f, 3u);
  const float *u = uniforms(MOST * (K + 1)), *u_accept = uniforms(MOST * K);
  int32_t *token = array<int32_t>(MOST), *accepted = array<int32_t>(MOST), *draft = array<int32_t>(MOST * K);
  const Filters all[] = {{"greedy", 0, 0, 1, 0},          {"plain", 1, 0, 1, 0},          {"top_k 50", 1, 50, 1, 0},
                         {"top_k 50000", 1, 50000, 1, 0}, {"top_p 0.9", 1, 0, 0.9f, 0},   {"top_p 0.999", 1, 0, 0.999f, 0},
                         {"min_p 0.05", 1, 0, 1, 0.05f},  {"all", 0.8f, 1000, 0.9f, 0.02f}, {"hot, top_p 0.9", 20, 0, 0.9f, 0}};
  for (const Filters &f : all) {
    const float *temperature = put(std::vector<float>(MOST, f.temperature)), *top_p = put(std::vector<float>(MOST, f.top_p));
    const float *min_p = put(std::vector<float>(MOST, f.min_p));
    const int32_t *top_k = put(std::vector<int32_t>(MOST, f.top_k));
    printf("%-16s sample:", f.name);
    for (const float *logits : {distinct, ties}) {
      auto draw_rows = [&](size_t first, size_t B) {
        sample(token + first, logits + first * V, temperature, top_k, top_p, min_p, u + first, B, V);
      };
      for (size_t B : {1, 8, 64}) printf(" %6.1f", timed(10, [&](int) { draw_rows(0, B); }));
      const std::vector<int32_t> together = pull(token, MOST);
      for (size_t b = 0; b < MOST; b++) draw_rows(b, 1);
      printf(" us for 1, 8, 64 rows%s, %s;", logits == ties ? " of ties" : "",
             together == pull(token, MOST) ? "the same alone" : "OTHERS ALONE");
    }
    /* the drafts' tokens from their own distributions */
    printf(" verify, K %zu:", K);
    for (size_t k = 0; k < K; k++) {
      sample(token, near + k * MOST * V, temperature, top_k, top_p, min_p, u, MOST, V);
      const std::vector<int32_t> t = pull(token, MOST);
      for (size_t i = 0; i < MOST; i++) {
        const size_t row = k * MOST + i;
        CHECK(cudaMemcpy(draft + row, &t[i], sizeof t[i], cudaMemcpyHostToDevice));
      }
    }
    for (size_t B : {1, 8, 64})
      printf(" %6.1f", timed(10, [&](int) {
               verify(accepted, token, distinct, draft, near, nullptr, temperature, top_k, top_p, min_p, u_accept, u, B, K, V);
             }));
    printf(" us for 1, 8, 64 rows\n");
  }
  return 0;
}
