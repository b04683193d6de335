/* norm.cu - RMSNorm, and Mamba-2's gated one per head: memory's speed.
 *
 * A team of LANES threads has one row of C elements. A block's teams have neighbouring heads of a row m, or neighbouring rows,
 * and go through m in strides: a thread keeps its head and its columns, so that their weights, and what it has added to their
 * gradients, stay in registers, as do its pieces of the row, which is read once. The team depends on C alone, and so do a row's
 * bits. Rows that do not fit, or are not aligned, are read again where they are needed. */
#include "common.cuh"

namespace {

enum { THREADS = 256, WARP_ROW = 1024 };

struct Norm {
  real *y, *dx, *dz;
  float *part; /* (chunks*side,H,C): the gradient of w, by teams; NULL: not wanted */
  const real *dy, *x, *z;
  const float *w; /* (H,C) */
  float eps;
  int add;
  size_t M, H, C;
  bool whole;                           /* rows are pieces of 16 bytes, aligned */
  unsigned heads, side, across, chunks; /* a block has `side` rows m of `heads` heads at once; blocks: chunks of m x across H */
};

__device__ float fast_sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)); }

/* N sums over a team; every thread of the block calls. */
template <int LANES, int N> __device__ void team_sum(float (&v)[N], int turn) {
#pragma unroll
  for (int d = (LANES < 32 ? LANES : 32) / 2; d; d /= 2)
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(0xffffffffu, v[i], d);
  if constexpr (LANES > 32) {
    static_assert(LANES == THREADS, "");
    __shared__ float part[2][N][THREADS / 32]; /* in turn: one barrier is enough */
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < N; i++) part[turn][i][threadIdx.x / 32] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
      v[i] = 0;
#pragma unroll
      for (int w = 0; w < THREADS / 32; w++) v[i] += part[turn][i][w];
    }
  }
}

/* A thread's part in its team. KEPT: pieces of a row that it keeps; 0: none, it reads them again. */
template <int LANES, int KEPT> struct Team {
  static constexpr int SIZE = KEPT ? KEPT : 1;
  typedef uint4 Row[SIZE];
  typedef float Columns[SIZE][REALS_16];
  size_t first, step, head, beside, C; /* rows first + beside, … of the head */
  int lane;
  bool whole, exists, alive; /* the head is there; so is the row */

  __device__ Team(const Norm &n) : C(n.C), lane(threadIdx.x % LANES), whole(n.whole) {
    const unsigned team = threadIdx.x / LANES;
    head = (size_t)(blockIdx.x % n.across) * n.heads + team % n.heads;
    beside = team / n.heads;
    first = (size_t)(blockIdx.x / n.across) * n.side, step = (size_t)n.chunks * n.side;
    exists = alive = head < n.H && beside < n.side;
  }
  /* f(Int<N>(), c, k) for the thread's elements c .. c+N, its k-th piece. Kept pieces past the row's end are zeros. */
  template <class F> __device__ void each(F f) const {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int k = 0; k < KEPT; k++) f(Int<REALS_16>(), (size_t)(lane + k * LANES) * REALS_16, k);
    } else {
      each_piece(alive ? C : 0, whole, lane, LANES, [&](auto N, size_t c) { f(N, c, 0); });
    }
  }
  __device__ void keep(Row &kept, const real *row) const {
    if constexpr (KEPT > 0)
      each([&](auto, size_t c, int k) { kept[k] = alive && c < C ? *(const uint4 *)(row + c) : make_uint4(0, 0, 0, 0); });
  }
  __device__ void keep_weights(Columns &kept, const float *w) const {
    if constexpr (KEPT > 0)
      each([&](auto, size_t c, int k) {
#pragma unroll
        for (int i = 0; i < REALS_16; i += 4) {
          const float4 q = exists && c < C ? *(const float4 *)(w + c + i) : make_float4(0, 0, 0, 0);
          kept[k][i] = q.x, kept[k][i + 1] = q.y, kept[k][i + 2] = q.z, kept[k][i + 3] = q.w;
        }
      });
  }
  __device__ void recompute(Row &kept) const {
    if constexpr (KEPT > 0)
#pragma unroll
      for (uint4 &piece : kept) forget(piece);
  }
  template <int N> __device__ void get(float (&v)[N], const Row &kept, const real *row, size_t c, int k) const {
    if constexpr (KEPT > 0)
      unpack_16(v, kept[k]);
    else
      load_piece(v, row + c);
  }
  template <int N> __device__ void put(real *row, size_t c, const float (&v)[N]) const {
    if (!KEPT || (alive && c < C)) store_piece(row + c, v);
  }
};

/* Blocks that a multiprocessor's registers have room for. */
constexpr int blocks_forward(int kept, bool gated) { return kept > 2 ? gated ? 2 : 3 : gated ? 4 : 5; }
constexpr int blocks_backward(int kept, bool gated, bool dw) { return kept > 2 ? gated || dw ? 1 : 2 : dw && !gated ? 2 : 3; }

/* y = a r w, a = x or x silu(z), r = 1/rms(a) */
template <int LANES, int KEPT, bool GATED>
__global__ void __launch_bounds__(THREADS, blocks_forward(KEPT, GATED)) norm_rows(Norm n) {
  Team<LANES, KEPT> t(n);
  typename Team<LANES, KEPT>::Columns weights;
  wait_for_previous_kernel();
  const float *w = n.w + t.head * n.C;
  t.keep_weights(weights, w);
  int turn = 0;
  for (size_t m = t.first; m < n.M; m += t.step, turn ^= 1) {
    t.alive = t.exists && m + t.beside < n.M;
    const size_t at = ((m + t.beside) * n.H + t.head) * n.C;
    typename Team<LANES, KEPT>::Row x, z;
    t.keep(x, n.x + at);
    if (GATED) t.keep(z, n.z + at);
    auto activation = [&](auto &a, size_t c, int k) {
      t.get(a, x, n.x + at, c, k);
      if (!GATED) return;
      std::remove_reference_t<decltype(a)> g;
      t.get(g, z, n.z + at, c, k);
      for (float &v : a) v *= g[&v - a] * fast_sigmoid(g[&v - a]);
    };
    float sum[1] = {0};
    t.each([&](auto N, size_t c, int k) {
      float a[N];
      activation(a, c, k);
      for (int i = 0; i < N; i++) sum[0] += a[i] * a[i];
    });
    team_sum<LANES>(sum, turn);
    t.recompute(x);
    if (GATED) t.recompute(z);
    const float r = rsqrtf(sum[0] / (float)n.C + n.eps);
    t.each([&](auto N, size_t c, int k) {
      float a[N];
      activation(a, c, k);
      for (int i = 0; i < N; i++) a[i] *= r * (KEPT ? weights[k][i] : w[c + i]);
      t.put(n.y + at, c, a);
    });
  }
}

/* da = r (dy w - a r^2 mean(dy w a)), dw += dy a r; plain: dx (= | +=) da; gated: dx = da silu(z), dz = da x silu'(z). */
template <int LANES, int KEPT, bool GATED, bool DW>
__global__ void __launch_bounds__(THREADS, blocks_backward(KEPT, GATED, DW)) norm_backward(Norm n) {
  Team<LANES, KEPT> t(n);
  typename Team<LANES, KEPT>::Columns weights, dweights = {};
  const float *w = n.w + t.head * n.C;
  float *part = DW ? n.part + ((blockIdx.x / n.across * n.side + t.beside) * n.H + t.head) * n.C : nullptr;
  t.keep_weights(weights, w);
  if (DW && !KEPT)
    t.each([&](auto N, size_t c, int) {
      for (int i = 0; i < N; i++) part[c + i] = 0;
    });
  int turn = 0;
  for (size_t m = t.first; m < n.M; m += t.step, turn ^= 1) {
    t.alive = t.exists && m + t.beside < n.M;
    const size_t at = ((m + t.beside) * n.H + t.head) * n.C;
    typename Team<LANES, KEPT>::Row x, dy, z, before;
    t.keep(x, n.x + at);
    t.keep(dy, n.dy + at);
    if (GATED) t.keep(z, n.z + at);
    if (!GATED && n.add) t.keep(before, n.dx + at);
    float sum[2] = {0, 0};
    t.each([&](auto N, size_t c, int k) {
      float v[N], d[N], g[N];
      t.get(v, x, n.x + at, c, k);
      t.get(d, dy, n.dy + at, c, k);
      if (GATED) t.get(g, z, n.z + at, c, k);
      for (int i = 0; i < N; i++) {
        const float a = GATED ? v[i] * (g[i] * fast_sigmoid(g[i])) : v[i];
        sum[0] += a * a;
        sum[1] += d[i] * (KEPT ? weights[k][i] : w[c + i]) * a;
      }
    });
    team_sum<LANES>(sum, turn);
    t.recompute(x);
    t.recompute(dy);
    if (GATED) t.recompute(z);
    const float r = t.alive ? rsqrtf(sum[0] / (float)n.C + n.eps) : 0, s = sum[1] * r * r / (float)n.C;
    t.each([&](auto N, size_t c, int k) {
      float v[N], d[N], g[N], old[N];
      t.get(v, x, n.x + at, c, k);
      t.get(d, dy, n.dy + at, c, k);
      if (GATED) t.get(g, z, n.z + at, c, k);
      if (!GATED && n.add) t.get(old, before, n.dx + at, c, k);
      for (int i = 0; i < N; i++) {
        const float q = GATED ? fast_sigmoid(g[i]) : 1, gate = GATED ? g[i] * q : 1, a = v[i] * gate;
        const float da = r * (d[i] * (KEPT ? weights[k][i] : w[c + i]) - a * s);
        if (DW) (KEPT ? dweights[k][i] : part[c + i]) += d[i] * a * r;
        d[i] = GATED ? da * gate : n.add ? old[i] + da : da;
        if (GATED) g[i] = da * v[i] * (q + gate * (1 - q)); /* silu' = q (1 + z (1 - q)) */
      }
      if (GATED || n.dx) t.put(n.dx + at, c, d);
      if (GATED) t.put(n.dz + at, c, g);
    });
  }
  if (DW && KEPT && t.exists)
    t.each([&](auto, size_t c, int k) {
#pragma unroll
      for (int i = 0; i < REALS_16; i += 4)
        if (c < n.C)
          *(float4 *)(part + c + i) = make_float4(dweights[k][i], dweights[k][i + 1], dweights[k][i + 2], dweights[k][i + 3]);
    });
}

/* out[i] += sum_b part[b*n + i]: warp v of 32 adds every 32nd b, in order, then the warps are added. */
__global__ void __launch_bounds__(1024) add_partials(float *out, const float *part, size_t count, size_t n) {
  __shared__ float sums[32][33];
  const size_t first = (size_t)blockIdx.x * 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0;
  if (first + lane < n)
#pragma unroll 4
    for (size_t b = warp; b < count; b += 32) sum += part[b * n + first + lane];
  sums[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane][warp]);
  if (lane == 0 && first + warp < n) out[first + warp] += sum;
}

/* f(Int<LANES>(), Int<KEPT>()) for rows of C elements */
template <class F> void choose_team(size_t C, bool whole, F f) {
  const size_t pieces = C / REALS_16;
  if (whole && pieces <= 16)
    f(Int<8>(), Int<2>());
  else if (whole && pieces <= 128)
    f(Int<32>(), Int<4>());
  else if (whole && pieces <= 512)
    f(Int<THREADS>(), Int<2>());
  else if (whole && pieces <= 1024)
    f(Int<THREADS>(), Int<4>());
  else if (C <= WARP_ROW)
    f(Int<32>(), Int<0>());
  else
    f(Int<THREADS>(), Int<0>());
}

/* Sets who has what; returns the blocks: as many as run at once, `resident` a multiprocessor, or those that have work. The
 * heads of few rows are spread over more multiprocessors. */
unsigned share_out(Norm &n, size_t teams, size_t resident) {
  n.across = (unsigned)ceil_div(n.H, n.M <= FEW && teams > 8 ? 8 : teams);
  n.heads = (unsigned)ceil_div(n.H, n.across), n.side = (unsigned)teams / n.heads;
  const size_t most = resident * multiprocessors() / n.across;
  n.chunks = blocks_for(n.M, n.side, most ? most : 1);
  return n.chunks * n.across;
}

template <bool GATED> void run(Norm n) {
  n.whole = n.C % REALS_16 == 0 && all_aligned(n.y, n.x, n.z, n.w);
  if (!n.C || !n.M || !n.H) return;
  choose_team(n.C, n.whole, [&](auto lanes, auto kept) {
    const unsigned blocks = share_out(n, THREADS / lanes, blocks_forward(kept, GATED));
    LAUNCH_EARLY((norm_rows<lanes, kept, GATED>), blocks, THREADS, 0, n);
  });
}

template <bool GATED> void run_backward(Norm n, float *dw) {
  n.whole = n.C % REALS_16 == 0 && all_aligned(n.dx, n.dz, n.dy, n.x, n.z) && all_aligned(n.w);
  if (!n.C || !n.M || !n.H) return;
  choose_team(n.C, n.whole, [&](auto lanes, auto kept) {
    const unsigned blocks = share_out(n, THREADS / lanes, blocks_backward(kept, GATED, dw));
    if (!dw) {
      LAUNCH((norm_backward<lanes, kept, GATED, false>), blocks, THREADS, 0, n);
      return;
    }
    const size_t count = (size_t)n.chunks * n.side, size = n.H * n.C;
    n.part = (float *)device_scratch(count * size * sizeof(float));
    if (!n.part) return;
    LAUNCH((norm_backward<lanes, kept, GATED, true>), blocks, THREADS, 0, n);
    LAUNCH(add_partials, blocks_for(size, 32), 1024, 0, dw, n.part, count, size);
  });
}

Norm plain(const real *x, const float *w, float eps, size_t M, size_t C) {
  Norm n = {};
  n.x = x, n.w = w, n.eps = eps, n.M = M, n.H = 1, n.C = C;
  return n;
}
Norm gated(const real *x, const real *z, const float *w, float eps, size_t M, size_t H, size_t C) {
  Norm n = plain(x, w, eps, M, C);
  n.z = z, n.H = H;
  return n;
}

}  // namespace

void rmsnorm_forward(real *y, const real *x, const float *w, float eps, size_t M, size_t C) {
  Norm n = plain(x, w, eps, M, C);
  n.y = y;
  run<false>(n);
}
void rmsnorm_backward(real *dx, float *dw, const real *dy, const real *x, const float *w, float eps, int add, size_t M,
                      size_t C) {
  Norm n = plain(x, w, eps, M, C);
  n.dx = dx, n.dy = dy, n.add = add && dx;
  run_backward<false>(n, dw);
}
void gated_rmsnorm_forward(real *y, const real *x, const real *z, const float *w, float eps, size_t M, size_t H, size_t P) {
  Norm n = gated(x, z, w, eps, M, H, P);
  n.y = y;
  run<true>(n);
}
void gated_rmsnorm_backward(real *dx, real *dz, float *dw, const real *dy, const real *x, const real *z, const float *w,
                            float eps, size_t M, size_t H, size_t P) {
  Norm n = gated(x, z, w, eps, M, H, P);
  n.dx = dx, n.dz = dz, n.dy = dy;
  run_backward<true>(n, dw);
}
