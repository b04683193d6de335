/* attention_sinks.cu - the first tokens of a document, which a window of attention does not lose sight of (Xiao et al. 2023).
 *
 * The other kernels attend to the window alone. What is here adds the sinks that lie before it, of which there are few: to o and lse, as
 * the online softmax does; and to the gradients, whose p is right in any part of the keys once lse and delta are those of all. A sum
 * runs over a token's own sinks in their order, so few tokens stay row-invariant. A token whose window reaches back to the sinks keeps
 * every bit. */
#include "attention_backward.cuh"

/* x . y of P elements, by a warp. */
__device__ static inline float dot(const real *x, const real *y, int P) {
  float sum = 0;
  for (int c = threadIdx.x % 32; c < P; c += 32) sum += load(x + c) * load(y + c);
  return warp_sum(sum);
}

/* The sinks from .. to, as tokens (key_of), that stand before the window of token t. */
struct Sinks {
  int from, to;
};
__device__ static inline Sinks sinks_before(const Attention &a, int b, int base, int t, int window) {
  const int from = a.starts ? a.starts[(size_t)b * a.T + t] : -base;
  return {from, min(from + a.sinks, window)};
}

/* y = (y keep + sum of the lanes' weights times rows row(0) .. row(n)) scale, P elements, by a warp. */
template <class Row> __device__ static inline void add_rows(real *y, int P, float keep, float weight, int n, float scale, Row row) {
  for (int first = 0; first < P; first += 32) {
    const int c = first + threadIdx.x % 32;
    float x = c < P ? load(y + c) * keep : 0;
    for (int j = 0; j < n; j++) {
      const float w = __shfl_sync(0xffffffffu, weight, j);
      if (c < P) x += w * load(row(j) + c);
    }
    if (c < P) store(y + c, x * scale);
  }
}

/* Grid (T, 1, B), 128 threads: a warp a head in turn, a lane a sink in turn. */
static __global__ void add_sinks(Attention a) {
  __shared__ Seen seen;
  const int t = blockIdx.x, b = a.begin + blockIdx.z, lane = threadIdx.x % 32, base = base_of(a, b);
  const int *path = nullptr;
  int window = first_seen(a, b, base, t);
  if (a.kcache && a.rows.prev && a.T <= PENDING) {
    find_seen(seen, a, b, base, max(base - a.K, 0), t);
    path = seen.path, window = seen.from[t] - base;
  }
  const Sinks sinks = sinks_before(a, b, base, t, window);
  for (int h = threadIdx.x / 32; h < a.H; h += blockDim.x / 32) {
    Keys keys = keys_of(a, b, h / a.rep, base);
    keys.path = path;
    const real *q = a.q + query_at(a, b, t, h);
    float *const lse = a.lse + ((size_t)b * a.H + h) * a.T + t;
    for (int e = sinks.from; e < sinks.to; e += 32) {
      const int n = min(32, sinks.to - e);
      float score = -INFINITY;
      for (int j = 0; j < n; j++) {
        const float s = a.scale * dot(q, key_of(a, keys, a.kcache, a.k, e + j), a.P);
        if (j == lane) score = s;
      }
      const float old = *lse * LOG2E, top = fmaxf(old, warp_max(score)), weight = exp2f(score - top), keep = exp2f(old - top);
      const float sum = keep + warp_sum(weight);
      add_rows(a.o + query_at(a, b, t, h), a.P, keep, weight, n, 1 / sum, [&](int j) { return key_of(a, keys, a.vcache, a.v, e + j); });
      __syncwarp();
      if (lane == 0) *lse = top * LN2 + logf(sum);
      __syncwarp();
    }
  }
}

void attend_sinks(const Attention &a) {
  if (!a.sinks) return;
  in_parts(a, [](const Attention &a, unsigned count) { LAUNCH(add_sinks, dim3(a.T, 1, count), 128, 0, a); });
}

/* ---- gradients: there are no caches ---------------------------------------------------------------------------------------- */

/* p and ds = scale p (dp - delta) of token t and head h with key e of its group. */
__device__ static inline float2 slope_of(const Attention &a, int b, int t, int h, int e) {
  const size_t query = query_at(a, b, t, h), key = key_at(a, b, e, h / a.rep);
  const float2 stats = *stats_of(a, b, h, t);
  const float p = exp2f(a.scale * dot(a.q + query, a.k + key, a.P) - stats.x), dp = dot(a.dout + query, a.v + key, a.P);
  return make_float2(p, p * (dp - stats.y) * a.scale * LN2);
}

/* dq += ds k. Grid (T, 1, B), as add_sinks. */
static __global__ void add_sinks_to_queries(Attention a) {
  const int t = blockIdx.x, b = a.begin + blockIdx.z, lane = threadIdx.x % 32;
  const Sinks sinks = sinks_before(a, b, 0, t, first_seen(a, b, 0, t));
  for (int h = threadIdx.x / 32; h < a.H; h += blockDim.x / 32)
    for (int e = sinks.from; e < sinks.to; e += 32) {
      const int n = min(32, sinks.to - e);
      float ds = 0;
      for (int j = 0; j < n; j++) {
        const float s = slope_of(a, b, t, h, e + j).y;
        if (j == lane) ds = s;
      }
      add_rows(a.dq + query_at(a, b, t, h), a.P, 1, ds, n, 1, [&](int j) { return a.k + key_at(a, b, e + j, h / a.rep); });
    }
}

/* dk += ds^T q, dv += p^T dout. Grid (keys, G, B): a block a sink; its warps share out the queries whose windows lie behind it, and are
 * added in order. Shared: dk and dv (2,P) of each warp. */
static __global__ void add_queries_to_sinks(Attention a) {
  DYNAMIC_SHARED(float, sums);
  const int e = blockIdx.x, g = blockIdx.y, b = a.begin + blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int *starts = a.starts ? a.starts + (size_t)b * a.T : nullptr;
  const int start = starts ? starts[e] : 0, warps = blockDim.x / 32;
  if (e >= start + a.sinks) return;
  float *const dk = sums + 2 * a.P * warp, *const dv = dk + a.P;
  for (int c = lane; c < 2 * a.P; c += 32) dk[c] = 0;
  __syncwarp(); /* another lane adds to what this one has cleared, unless P is a multiple of 32 */
  for (int i = warp;; i += warps) {
    const int t = e + a.window + i / a.rep, h = g * a.rep + i % a.rep;
    if (t >= a.T || (starts && starts[t] != start)) break;
    const float2 slope = slope_of(a, b, t, h, e);
    const size_t query = query_at(a, b, t, h);
    for (int c = lane; c < a.P; c += 32) {
      dk[c] += slope.y * load(a.q + query + c);
      dv[c] += slope.x * load(a.dout + query + c);
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * a.P; c += blockDim.x) {
    real *const to = (c < a.P ? a.dk + c : a.dv + c - a.P) + key_at(a, b, e, g);
    float x = load(to);
    for (int w = 0; w < warps; w++) x += sums[2 * a.P * w + c];
    store(to, x);
  }
}

void add_gradients_of_sinks(const Attention &a) {
  if (!a.sinks) return;
  in_parts(a, [](const Attention &a, unsigned count) {
    const int keys = a.starts ? a.T : std::min(a.T, a.sinks), warps = a.P <= 512 ? 8 : 1;
    LAUNCH(add_sinks_to_queries, dim3(a.T, 1, count), 128, 0, a);
    LAUNCH(add_queries_to_sinks, dim3(keys, a.G, count), 32 * warps, 2 * warps * a.P * sizeof(float), a);
  });
}
