/* attention_hopper.cu - attention of many tokens by the products of Hopper's warpgroups (wgmma), after FlashAttention-3 (Shah
 * et al. 2024): the first warpgroup of a block fetches tiles, the other two compute on 64 rows each, one product ahead of the
 * softmax. bf16, heads of 33 .. 128; the kernels of attention.cu and attention_backward.cu do the rest.
 *
 * A tile's way: the fetching threads wait until its stage is empty, copy (cp.async), wait for their copies, make them seen by
 * the products (fence_async) and arrive at `full`; the computing warps wait there, and arrive at `empty` when the products that
 * read the tile are done. */
#include "attention.cuh"

constexpr int FETCHING = 128, BLOCK = 3 * 128; /* threads: those that fetch, all */

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

/* Two stages of tiles: tile i stands in stage i % 2. */
struct Pipe {
  uint64_t full[2], empty[2];
  __device__ void init() {
    for (int i = 0; i < 2; i++) barrier_init(full + i, FETCHING), barrier_init(empty + i, (BLOCK - FETCHING) / 32);
  }
  __device__ void wait_empty(int i) { barrier_wait(empty + i % 2, ~(i / 2) & 1); }
  __device__ void wait_full(int i) { barrier_wait(full + i % 2, i / 2 & 1); }
  /* By all lanes of a warp whose products from the tile are done. */
  __device__ void release(int i) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + i % 2);
  }
};

/* What fetching threads do with copies: begun() after a tile's copies, and the tile before it is handed over; end(). */
struct Fetcher {
  uint64_t *before = nullptr;
  __device__ void begun(uint64_t *full) {
    cp_async_commit();
    if (before) {
      cp_async_wait<1>();
      fence_async();
      barrier_arrive(before);
    }
    before = full;
  }
  __device__ void end() {
    cp_async_wait<0>();
    fence_async();
    barrier_arrive(before);
  }
};

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

/* Shared: q of each warpgroup, two stages of keys and of values. */
template <int PD, int KEYS> constexpr size_t FORWARD_SHARED = (2 * OWN<PD> + 4 * KEYS * PD) * sizeof(real);

/* Grid (H, tiles of 128 queries, B), the longest first. */
template <int PD, int KEYS> static __global__ void __launch_bounds__(BLOCK, 1) attend_many_hopper(Attention a) {
#ifdef WARPGROUPS
  typedef Swizzled<PD, KEYS> Tile;
  DYNAMIC_SHARED(real, q_tile);
  __shared__ Pipe k_pipe, v_pipe;
  real *const k_tile = q_tile + 2 * OWN<PD>, *const v_tile = k_tile + 2 * Tile::SIZE;
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
    auto fetch = [&](Pipe &pipe, real *tile, const real *cache, const real *own, int i) {
      pipe.wait_empty(i);
      load_keys<Tile, KEYS, FETCHING, false>(tile + i % 2 * Tile::SIZE, nullptr, a, keys, cache, own, begin + i * KEYS, low,
                                             last + 1);
      fetcher.begun(pipe.full + i % 2);
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
    fetcher.end();
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
    begin_score<PD, KEYS>(s, q, k_tile + i % 2 * Tile::SIZE);
    v_pipe.wait_full(i - 1);
    begin_weigh<PD, KEYS>(o, p, v_tile + (i - 1) % 2 * Tile::SIZE);
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
  begin_weigh<PD, KEYS>(o, p, v_tile + (tiles - 1) % 2 * Tile::SIZE);
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

/* ---- the choice ---------------------------------------------------------------------------------------------------------- */

/* Is this module's code for this card the one with wgmma? Elsewhere the kernels are empty. */
static bool has_warpgroups() {
  static const bool has = [] {
    cudaFuncAttributes found;
    if (cudaFuncGetAttributes(&found, attend_many_hopper<128, 128>) != cudaSuccess) return false;
    return found.binaryVersion == 90 && found.numRegs > 64;
  }();
  return has;
}

/* f(width) with the head dimension padded to one that the kernels here are made for. */
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
