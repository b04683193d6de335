/* attention_hopper.cu - attention of many tokens by the products of Hopper's warpgroups (wgmma), after FlashAttention-3 (Shah
 * et al. 2024): the first warpgroup of a block fetches tiles, the other two compute on 64 rows each, one product ahead of the
 * softmax. bf16, heads of 33 .. 128; the kernels of attention.cu and attention_backward.cu do the rest.
 *
 * A tile's way: the fetching threads wait until its stage is empty, copy (cp.async), wait for their copies, make them seen by
 * the products (fence_async) and arrive at `full`; the computing warps wait there, and arrive at `empty` when the products that
 * read the tile are done. */
#include "attention_backward.cuh"

[[maybe_unused]] constexpr int FETCHING = 128, BLOCK = 3 * 128; /* threads: those that fetch, all */

/* Tiles as wgmma reads them: panels of 64 columns, rows of 128 bytes with their 16-byte units permuted. */
template <int PD, int ROWS> struct Swizzled {
  static constexpr int COLS = PD, SIZE = ROWS * PD;
  __device__ static int at(int row, int col) { return col / 64 * (64 * ROWS) + row * 64 + (col % 64 ^ row % 8 * 8); }
};
/* Rows that one warpgroup owns, and that its results pass through (padded). */
template <int PD> constexpr int OWN = 64 * PITCH<PD>;

/* c (64, ROWS) = a b^T, begun: a (64, PD), b (ROWS, PD) */
template <int PD, int ROWS>
__device__ static inline void begin_score(float (&c)[1][ROWS / 8][4], const real *a, const real *b) {
  const uint64_t left = matrix_128(a, 0, 1024), right = matrix_128(b, 0, 1024);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < PD / 16; k++)
    wgmma<0>(c[0], matrix_at(left, k / 4 * (64 * 128) + k % 4 * 32), matrix_at(right, k / 4 * (ROWS * 128) + k % 4 * 32),
             k > 0);
  wgmma_commit();
}
/* c (64, PD) += a b, begun: a (64, ROWS), b (ROWS, PD) */
template <int PD, int ROWS>
__device__ static inline void begin_weigh(float (&c)[1][PD / 8][4], const Left<__nv_bfloat16> (&a)[ROWS / 16], const real *b) {
  const uint64_t right = matrix_128(b, ROWS * 128, 1024);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < ROWS / 16; k++) wgmma<1>(c[0], a[k].r, matrix_at(right, k * 16 * 128), 1);
  wgmma_commit();
}
template <int N> __device__ static inline void as_lefts(Left<__nv_bfloat16> (&a)[N / 2], const float (&s)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) as_left(a[k], s[0][2 * k], s[0][2 * k + 1]);
}

/* Stages of tiles: tile i stands in stage i % STAGES. */
template <int STAGES> struct Pipe {
  uint64_t full[STAGES], empty[STAGES];
  __device__ void init() {
    for (int i = 0; i < STAGES; i++) barrier_init(full + i, FETCHING), barrier_init(empty + i, (BLOCK - FETCHING) / 32);
  }
  __device__ void wait_empty(int i) { barrier_wait(empty + i % STAGES, ~(i / STAGES) & 1); }
  __device__ void wait_full(int i) { barrier_wait(full + i % STAGES, i / STAGES & 1); }
  /* By all lanes of a warp whose products from the tile are done. */
  __device__ void release(int i) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + i % STAGES);
  }
};

/* How fetching threads hand their copies over: those of a tile while the next tile's are under way, but before they wait for
 * its stage, which may be in use until the tile has come. */
struct Fetcher {
  uint64_t *full = nullptr; /* of the tile that is to be handed over */
  template <int LATER> __device__ void hand_over() {
    if (!full) return;
    cp_async_wait<LATER>();
    fence_async();
    barrier_arrive(full);
    full = nullptr;
  }
  template <int STAGES, class Copy> __device__ void fetch(Pipe<STAGES> &pipe, int i, Copy copy) {
    if (i >= STAGES) hand_over<0>();
    pipe.wait_empty(i);
    copy(i % STAGES);
    cp_async_commit();
    hand_over<1>();
    full = pipe.full + i % STAGES;
  }
};

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

/* Stages of KEYS keys and values. */
template <int KEYS> constexpr int KEY_STAGES = 256 / KEYS;
/* Shared: q of each warpgroup, stages of keys and of values. */
template <int PD, int KEYS>
constexpr size_t FORWARD_SHARED = (2 * OWN<PD> + 2 * KEY_STAGES<KEYS> * KEYS * PD) * sizeof(real);

/* Grid (H, tiles of 128 queries, B), the longest first. */
template <int PD, int KEYS> static __global__ void __launch_bounds__(BLOCK, 1) attend_many_hopper(Attention a) {
#ifdef WARPGROUPS
  constexpr int STAGES = KEY_STAGES<KEYS>;
  typedef Swizzled<PD, KEYS> Tile;
  DYNAMIC_SHARED(real, q_tile);
  __shared__ Pipe<STAGES> k_pipe, v_pipe;
  real *const k_tile = q_tile + 2 * OWN<PD>, *const v_tile = k_tile + STAGES * Tile::SIZE;
  const int h = blockIdx.x, b = a.begin + blockIdx.z;
  const int first = (int)(gridDim.y - 1 - blockIdx.y) * 128, last = min(first + 128, a.T) - 1;
  const int base = base_of(a, b), low = first_seen(a, b, base, first), begin = (base + low) / KEYS * KEYS - base;
  const int tiles = (last - begin) / KEYS + 1;
  if (threadIdx.x == 0) k_pipe.init(), v_pipe.init();
  __syncthreads();

  if (threadIdx.x < FETCHING) {
    give_registers<40>();
    const Keys keys = keys_of(a, b, h / a.rep, base);
    Fetcher fetcher;
    auto fetch = [&](Pipe<STAGES> &pipe, real *tile, const real *cache, const real *own, int i) {
      fetcher.fetch(pipe, i, [&](int stage) {
        load_keys<Tile, KEYS, FETCHING, false>(tile + stage * Tile::SIZE, nullptr, a, keys, cache, own, begin + i * KEYS, low,
                                               last + 1);
      });
    };
    for (int w = 0; w < 2; w++) { /* with the first keys */
      const real *q = a.q + query_at(a, b, first + 64 * w, h);
      load_tile<Swizzled<PD, 64>, 64, FETCHING>(q_tile + w * OWN<PD>, Alone(), a.q, a.P, true, 0, a.T - first - 64 * w,
                                                [&](int row) { return q + row * (a.H * a.P); });
    }
    for (int i = 0; i <= tiles; i++) {
      if (i < tiles) fetch(k_pipe, k_tile, a.kcache, a.k, i);
      if (i > 0) fetch(v_pipe, v_tile, a.vcache, a.v, i - 1);
    }
    fetcher.hand_over<0>();
    return;
  }

  take_registers<232>();
  const int group = threadIdx.x / 128 - 1, mine = threadIdx.x % 128 / 32 * 16, warp_first = first + 64 * group + mine;
  real *const q = q_tile + group * OWN<PD>;
  float o[1][PD / 8][4] = {}, s[1][KEYS / 8][4], top[1][2] = {{NO_SCORE, NO_SCORE}}, sum[1][2] = {}, shrink[1][2];
  Left<__nv_bfloat16> p[KEYS / 16];
  k_pipe.wait_full(0);
  begin_score<PD, KEYS>(s, q, k_tile);
  wgmma_wait<0>();
  settle(s[0]);
  k_pipe.release(0);
  hide_unseen(s, a, b, base, warp_first, begin);
  online_softmax(s, top, sum, shrink, a.scale);
  as_lefts(p, s);
  for (int i = 1; i < tiles; i++) {
    k_pipe.wait_full(i);
    begin_score<PD, KEYS>(s, q, k_tile + i % STAGES * Tile::SIZE);
    v_pipe.wait_full(i - 1);
    begin_weigh<PD, KEYS>(o, p, v_tile + (i - 1) % STAGES * Tile::SIZE);
    wgmma_wait<1>();
    settle(s[0]);
    k_pipe.release(i);
    hide_unseen(s, a, b, base, warp_first, begin + i * KEYS);
    const bool rises = online_softmax(s, top, sum, shrink, a.scale);
    wgmma_wait<0>();
    settle(o[0]);
    v_pipe.release(i - 1);
    if (rises) rescale(o, shrink);
    as_lefts(p, s);
  }
  v_pipe.wait_full(tiles - 1);
  begin_weigh<PD, KEYS>(o, p, v_tile + (tiles - 1) % STAGES * Tile::SIZE);
  wgmma_wait<0>();
  settle(o[0]);
  barrier_of(1 + group, 128); /* q is read by all four warps */
  store_attended<PD>(o, top, sum, q, mine, a, b, h, warp_first);
#endif
}

template <int PD, int KEYS> static void run_many_hopper(const Attention &a) {
  in_parts(a, [](const Attention &a, unsigned count) {
    LAUNCH((attend_many_hopper<PD, KEYS>), dim3(a.H, ceil_div(a.T, 128), count), BLOCK, (FORWARD_SHARED<PD, KEYS>), a);
  });
}

/* ---- dk, dv -------------------------------------------------------------------------------------------------------------- */

constexpr int QUERY_STAGES = 4;
/* Shared: k and v of each warpgroup, stages of q and dout, and their stats. */
template <int PD>
constexpr size_t KEYS_HOPPER = (4 * OWN<PD> + 2 * QUERY_STAGES * 64 * PD) * sizeof(real) + QUERY_STAGES * 64 * sizeof(float2);

/* A warp's sums of 16 keys, times factor, into a part (B,T,G,P). */
template <int PD>
__device__ static inline void store_part(const float (&c)[1][PD / 8][4], float factor, float *part, const Attention &a, int b,
                                         int key, int g) {
  const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = key + row + 8 * i;
    float *to = part + key_at(a, b, t, g) + col;
    if (t >= a.T) continue;
#pragma unroll
    for (int n = 0; n < PD / 8; n++)
      if (8 * n + col < a.P) put(to + 8 * n, c[0][n][2 * i] * factor, c[0][n][2 * i + 1] * factor);
  }
}

/* Grid (B G split, tiles of 128 keys), the longest first; a warpgroup has 64 keys. Tiles of 64 queries of the part's heads in
 * turn. The products for a step's gradients run on while the next scores begin. */
template <int PD> static __global__ void __launch_bounds__(BLOCK, 1) backward_keys_hopper(Attention a) {
#ifdef WARPGROUPS
  constexpr int STAGES = QUERY_STAGES;
  typedef Swizzled<PD, 64> Tile;
  DYNAMIC_SHARED(real, k_tile);
  __shared__ Pipe<STAGES> pipe;
  __shared__ int starts[STAGES]; /* where a stage's queries start */
  real *const v_tile = k_tile + 2 * OWN<PD>, *const q_tile = v_tile + 2 * OWN<PD>, *const d_tile = q_tile + STAGES * Tile::SIZE;
  float2 *const stats = (float2 *)(d_tile + STAGES * Tile::SIZE);
  const int part = blockIdx.x % a.split, g = blockIdx.x / a.split % a.G, b = blockIdx.x / a.split / a.G;
  const int first = blockIdx.y * 128, from = g * a.rep + part * a.rep / a.split, to = g * a.rep + (part + 1) * a.rep / a.split;
  const int tiles = tiles_that_see<128, 64, BLOCK>(a, b, first), steps = tiles * (to - from);
  if (threadIdx.x == 0) pipe.init();
  __syncthreads();

  if (threadIdx.x < FETCHING) {
    give_registers<56>();
    Fetcher fetcher;
    for (int w = 0; w < 2; w++) /* with the first queries */
      load_groups<Tile, 64, FETCHING>(k_tile + w * OWN<PD>, v_tile + w * OWN<PD>, a, b, first + 64 * w, g);
    for (int i = 0, h = from, t = first; i < steps; i++) {
      fetcher.fetch(pipe, i, [&](int stage) {
        load_heads<Tile, 64, FETCHING>(q_tile + stage * Tile::SIZE, d_tile + stage * Tile::SIZE, a, b, t, h);
        if (threadIdx.x < 32) cp_async_16(stats + stage * 64 + 2 * threadIdx.x, stats_of(a, b, h, t + 2 * threadIdx.x));
        if (threadIdx.x == 0) starts[stage] = t;
      });
      t += 64;
      if (t == first + tiles * 64) t = first, h++;
    }
    fetcher.hand_over<0>();
    return;
  }

  take_registers<224>();
  const int group = threadIdx.x / 128 - 1, mine = threadIdx.x % 128 / 32 * 16, own = first + 64 * group, key = own + mine;
  real *const k = k_tile + group * OWN<PD>, *const v = v_tile + group * OWN<PD>;
  float dk[1][PD / 8][4] = {}, dv[1][PD / 8][4] = {}, s[1][8][4], dp[1][8][4];
  Left<__nv_bfloat16> p[4], ds[4];
  settle(dk[0]);
  settle(dv[0]);
  int held = -1; /* the step whose products may be under way */
  for (int i = 0; i < steps; i++) {
    const real *q = q_tile + i % STAGES * Tile::SIZE, *d = d_tile + i % STAGES * Tile::SIZE;
    const float2 *at = stats + i % STAGES * 64;
    pipe.wait_full(i);
    if (starts[i % STAGES] + 64 <= own) { /* all of them before the keys */
      wgmma_wait<0>();
      if (held >= 0) pipe.release(held);
      held = -1;
      pipe.release(i);
      continue;
    }
    begin_score<PD, 64>(s, k, q);
    wgmma_wait<1>();
    if (held >= 0) pipe.release(held);
    held = i;
    begin_score<PD, 64>(dp, v, d);
    wgmma_wait<1>();
    settle(s[0]);
    weights_of_keys(s, at, a, b, key, starts[i % STAGES]);
    wgmma_wait<0>();
    settle(dp[0]);
    slopes_of_keys(dp, s, at);
    as_lefts(p, s);
    as_lefts(ds, dp);
    begin_weigh<PD, 64>(dv, p, d);
    begin_weigh<PD, 64>(dk, ds, q);
  }
  wgmma_wait<0>();
  settle(dk[0]);
  settle(dv[0]);
  if (a.split > 1) {
    const size_t n = (size_t)a.B * a.T * a.G * a.P;
    store_part<PD>(dk, a.scale * LN2, a.parts + 2 * part * n, a, b, key, g);
    store_part<PD>(dv, 1, a.parts + (2 * part + 1) * n, a, b, key, g);
    return;
  }
  barrier_of(1 + group, 128); /* k and v are read by all four warps */
  store_gradient<PD>(dk, a.scale * LN2, k, mine, a, key, [&](int t) { return a.dk + key_at(a, b, t, g); });
  store_gradient<PD>(dv, 1, v, mine, a, key, [&](int t) { return a.dv + key_at(a, b, t, g); });
#endif
}

/* dk, dv (n, a multiple of 8) = the sums of their parts, in order. Grid (blocks, 2). */
[[maybe_unused]] static __global__ void add_parts(Attention a, size_t n) {
  real *out = blockIdx.y ? a.dv : a.dk;
  for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += (size_t)gridDim.x * blockDim.x * 4) {
    float4 sum = {0, 0, 0, 0};
    for (int part = 0; part < a.split; part++) {
      const float4 x = *(const float4 *)(a.parts + (2 * part + blockIdx.y) * n + i);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    put(out + i, sum.x, sum.y);
    put(out + i + 2, sum.z, sum.w);
  }
}

template <int PD> static void run_keys_hopper(const Attention &a) {
  LAUNCH(backward_keys_hopper<PD>, dim3(a.B * a.G * a.split, ceil_div(a.T, 128)), BLOCK, KEYS_HOPPER<PD>, a);
  const size_t n = (size_t)a.B * a.T * a.G * a.P;
  if (a.split > 1) LAUNCH(add_parts, dim3(blocks_for(n / 4, 256, 4096), 2), 256, 0, a, n);
}

/* ---- dq ------------------------------------------------------------------------------------------------------------------ */

/* Shared: q and dout of each warpgroup, stages of keys and values. */
template <int PD, int KEYS>
constexpr size_t QUERIES_HOPPER = (4 * OWN<PD> + 2 * KEY_STAGES<KEYS> * KEYS * PD) * sizeof(real);

/* Grid (H, tiles of 128 queries, B), the longest first. */
template <int PD, int KEYS> static __global__ void __launch_bounds__(BLOCK, 1) backward_queries_hopper(Attention a) {
#ifdef WARPGROUPS
  constexpr int STAGES = KEY_STAGES<KEYS>;
  typedef Swizzled<PD, KEYS> Tile;
  DYNAMIC_SHARED(real, q_tile);
  __shared__ Pipe<STAGES> pipe;
  real *const d_tile = q_tile + 2 * OWN<PD>, *const k_tile = d_tile + 2 * OWN<PD>, *const v_tile = k_tile + STAGES * Tile::SIZE;
  const int h = blockIdx.x, b = a.begin + blockIdx.z;
  const int first = (int)(gridDim.y - 1 - blockIdx.y) * 128, last = min(first + 128, a.T) - 1;
  const int begin = first_seen(a, b, 0, first) / KEYS * KEYS, tiles = (last - begin) / KEYS + 1;
  if (threadIdx.x == 0) pipe.init();
  __syncthreads();

  if (threadIdx.x < FETCHING) {
    give_registers<40>();
    Fetcher fetcher;
    for (int w = 0; w < 2; w++) /* with the first keys */
      load_heads<Swizzled<PD, 64>, 64, FETCHING>(q_tile + w * OWN<PD>, d_tile + w * OWN<PD>, a, b, first + 64 * w, h);
    for (int i = 0; i < tiles; i++)
      fetcher.fetch(pipe, i, [&](int stage) {
        const int to = stage * Tile::SIZE;
        load_groups<Tile, KEYS, FETCHING>(k_tile + to, v_tile + to, a, b, begin + i * KEYS, h / a.rep);
      });
    fetcher.hand_over<0>();
    return;
  }

  take_registers<232>();
  const int group = threadIdx.x / 128 - 1, mine = threadIdx.x % 128 / 32 * 16, warp_first = first + 64 * group + mine;
  const int warp_full = first_seen(a, b, 0, max(min(warp_first + 15, last), 0));
  real *const q = q_tile + group * OWN<PD>, *const d = d_tile + group * OWN<PD>;
  float2 stats[1][2];
  load_stats(stats, a, b, h, warp_first);
  float dq[1][PD / 8][4] = {}, s[1][KEYS / 8][4], dp[1][KEYS / 8][4];
  settle(dq[0]);
  Left<__nv_bfloat16> ds[KEYS / 16];
  for (int i = 0; i < tiles; i++) {
    const real *k = k_tile + i % STAGES * Tile::SIZE, *v = v_tile + i % STAGES * Tile::SIZE;
    pipe.wait_full(i);
    begin_score<PD, KEYS>(s, q, k);
    wgmma_wait<1>();
    if (i) pipe.release(i - 1);
    begin_score<PD, KEYS>(dp, d, v);
    wgmma_wait<1>();
    settle(s[0]);
    weights_of_queries(s, stats, a, b, warp_first, warp_full, begin + i * KEYS);
    wgmma_wait<0>();
    settle(dp[0]);
    slopes_of_queries(dp, s, stats);
    as_lefts(ds, dp);
    begin_weigh<PD, KEYS>(dq, ds, k);
  }
  wgmma_wait<0>();
  settle(dq[0]);
  barrier_of(1 + group, 128); /* q is read by all four warps */
  store_gradient<PD>(dq, a.scale * LN2, q, mine, a, warp_first, [&](int t) { return a.dq + query_at(a, b, t, h); });
#endif
}

template <int PD, int KEYS> static void run_queries_hopper(const Attention &a) {
  in_parts(a, [](const Attention &a, unsigned count) {
    LAUNCH((backward_queries_hopper<PD, KEYS>), dim3(a.H, ceil_div(a.T, 128), count), BLOCK, (QUERIES_HOPPER<PD, KEYS>), a);
  });
}

/* ---- the choice ---------------------------------------------------------------------------------------------------------- */

/* Is this module's code for this card the one with wgmma? Elsewhere the kernels are empty. */
static bool has_warpgroups() {
  static const bool has = [] {
    cudaFuncAttributes found;
    if (cudaFuncGetAttributes(&found, attend_many_hopper<128, 128>) != cudaSuccess) return cudaGetLastError(), false;
    return found.binaryVersion == 90 && found.numRegs > 64;
  }();
  return has;
}

/* f(width) with the head dimension padded to one that the kernels here are made for; false: there is none, or no such card. */
template <class E, class F> static bool on_hopper(const Attention &a, F f) {
  if constexpr (sizeof(E) == 2) {
    if (!a.whole || a.P <= 32 || a.P > 128 || !has_warpgroups()) return false;
    if (a.P <= 64)
      f(std::integral_constant<int, 64>());
    else
      f(std::integral_constant<int, 128>());
    return true;
  }
  return false;
}

bool attend_on_hopper(const Attention &a) {
  return on_hopper<real>(a, [&](auto width) { run_many_hopper<decltype(width)::value, 128>(a); });
}

/* Where a group's keys alone make too few blocks for the card, its heads are shared out. */
int backward_split(const Attention &a) {
  if (!on_hopper<real>(a, [](auto) {})) return 0;
  const size_t blocks = (size_t)a.B * a.G * ceil_div(a.T, 128), wanted = (size_t)multiprocessors() * 3 / 2;
  return (int)std::min<size_t>(a.rep, ceil_div(wanted, blocks));
}
void backward_on_hopper(const Attention &a) {
  on_hopper<real>(a, [&](auto width) {
    run_keys_hopper<decltype(width)::value>(a);
    run_queries_hopper<decltype(width)::value, 128>(a);
  });
}
