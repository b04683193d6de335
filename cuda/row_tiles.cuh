/* row_tiles.cuh - y = x W^T for calls of few tokens with more rows than few_rows takes, and for any alignment: all products of
 * a call in one launch, a gated pair's SwiGLU included. A row gets few_rows' bits: the same parts, the same chains, the same
 * sum of the parts from 0 on.
 *
 * A tile has 16 MMAS outputs and ROWS rows. PAR parts of K are under way at once, so that a row of W is read 128 PAR bytes at
 * a time; a part has SHARE of the 8 warps, who share what they copy and each have all the outputs and 8 COLS of the rows. The
 * groups of warps meet only where parts are added: in shared memory, in order.
 *
 * Where tiles are too few for the card, a tile's parts are split over several blocks: each leaves its parts' sums in scratch,
 * and the block that comes last adds all of them, in the same order.
 *
 * A block goes through items (tile, split), and its copies run ahead of it from one item into the next; those of W start
 * before the kernel before has ended. */
#ifndef MIL_ROW_TILES_CUH
#define MIL_ROW_TILES_CUH
#include "few_rows.cuh"

/* Outputs are counted in units of 8. Products stand one behind the other; of a gated pair gate and up alternate, in the place
 * of one product. A tile may have units of several. */
struct Tiles {
  Product p[MOST_PRODUCTS];
  unsigned first[MOST_PRODUCTS + 1]; /* a product's first unit; behind the last: how many there are */
  unsigned M, along, splits, items;  /* row tiles; blocks that share a tile's parts; row tiles * splits * tiles of outputs */
  int n, how;
  bool gated, whole; /* whole: rows of y are whole vectors */
  const real *x;
  size_t K;
  float *parts; /* (tile, part, tile's elements) if splits > 1 */
};

constexpr int share_of(int par) { return PARTS / par; }
constexpr int rows_of(int cols, int par) { return 8 * cols * share_of(par); }
constexpr size_t tile_bytes(int mmas, int cols, int par) { return 4 * (size_t)rows_of(cols, par) * (16 * mmas + 4); }
constexpr size_t stage_bytes(int mmas, int cols, int par) { return 64 * (size_t)par * (16 * mmas + rows_of(cols, par)); }
constexpr size_t tiles_shared(int mmas, int cols, int par, int depth) {
  return tile_bytes(mmas, cols, par) + depth * stage_bytes(mmas, cols, par);
}

/* Blocks of a tile that have left their parts; the last one sets it back. */
constexpr unsigned MOST_SPLIT_TILES = 2048;
static __device__ unsigned arrived[MOST_SPLIT_TILES];

/* Where copies or sums stand: a stage, 32 k, of a part of an item. */
struct Place {
  unsigned item, part, end, stage, stages;

  __device__ void find_part(const Tiles &c, unsigned slot) {
    const unsigned each = PARTS / c.splits, split = item / c.along % c.splits;
    part = split * each + slot, end = (split + 1) * each, stage = 0, stages = 2 * units_of_part(c.K, part);
  }
  __device__ bool done(const Tiles &c) const { return item >= c.items; }
  /* Of a part that has no stage, too, the next. True: another item. */
  __device__ bool next_part(const Tiles &c, unsigned slot, unsigned par) {
    bool moved = false;
    do {
      part += par, stage = 0;
      if (part >= end) {
        item += gridDim.x, moved = true;
        find_part(c, slot);
      }
      stages = 2 * units_of_part(c.K, part);
    } while (!stages && !done(c));
    return moved;
  }
  __device__ size_t k() const { return (size_t)(stage / 2 * PARTS + part) * UNIT + stage % 2 * 32; }
};

__device__ static inline int product_of(const Tiles &c, unsigned unit) {
  int product = 0;
  for (int i = 1; i < c.n; i++)
    if (unit >= c.first[i]) product = i;
  return product;
}
/* Row `g` of a unit in W; NULL: there is none. A product's last unit repeats its last row. */
__device__ static inline const bf16 *row_of(const Tiles &c, unsigned unit, unsigned g) {
  if (unit >= c.first[c.n]) return nullptr;
  const int product = product_of(c, unit);
  const Product &p = c.p[c.gated ? unit % 2 : product];
  const size_t o = (size_t)(c.gated ? unit / 2 : unit - c.first[product]) * 8 + g;
  return (const bf16 *)p.w.data + (o < p.O ? o : p.O - 1) * c.K;
}

/* 8 outputs of a row, of which `room` exist: their bias; to y */
__device__ static inline void add_8(float (&v)[8], const float *bias, size_t room) {
  if (bias)
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += i < (int)room ? bias[i] : 0;
}
__device__ static inline void put_8(real *y, float (&v)[8], size_t room, const Tiles &c) {
  bf16 *const to = (bf16 *)(void *)y;
  if (c.how & ADD) {
    float old[8];
    if (c.whole)
      load_16(old, to);
    else
#pragma unroll
      for (int i = 0; i < 8; i++) old[i] = i < (int)room ? load(to + i) : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += old[i];
  }
  if (c.whole && !(c.how & FLOATS)) return store_16(to, v);
  if (c.whole) {
    const float low[4] = {v[0], v[1], v[2], v[3]}, high[4] = {v[4], v[5], v[6], v[7]};
    store_16((float *)(void *)y, low);
    return store_16((float *)(void *)y + 4, high);
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < (int)room) put(y, i, v[i], c.how);
}
__device__ static inline void read_8(float (&v)[8], const float *from) {
  const float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

/* A tile's sums to y: rows m0 …, units first …; 8 outputs a thread at a time. */
template <int UNITS>
__device__ static void write_tile(const float *total, unsigned m0, unsigned first, unsigned rows, const Tiles &c) {
  const unsigned each = c.gated ? 2 : 1, units = UNITS / each;
  for (unsigned i = threadIdx.x; i < rows * units; i += THREADS) {
    const unsigned m = i / units, u = i % units * each, unit = first + u;
    if (unit >= c.first[c.n]) continue;
    const int product = product_of(c, unit);
    const Product &p = c.p[product];
    const size_t o = (size_t)(unit - c.first[product]) / each * 8;
    float v[8];
    read_8(v, total + m * (8 * UNITS + 4) + 8 * u);
    add_8(v, p.bias ? p.bias + o : nullptr, p.O - o);
    if (c.gated) {
      const float *bias = c.p[1].bias;
      float up[8];
      read_8(up, total + m * (8 * UNITS + 4) + 8 * u + 8);
      add_8(up, bias ? bias + o : nullptr, p.O - o);
#pragma unroll
      for (int q = 0; q < 8; q++) {
        const float gate = real_to_float(float_to_real(v[q]));
        v[q] = gate * sigmoid(gate) * real_to_float(float_to_real(up[q]));
      }
    }
    const size_t at = (size_t)(m0 + m) * p.O + o;
    put_8(c.how & FLOATS ? (real *)(void *)((float *)(void *)p.y + at) : p.y + at, v, p.O - o, c);
  }
}

template <int MMAS, int COLS, int PAR, int DEPTH, bool ALIGNED>
static __global__ void __launch_bounds__(THREADS, 1) row_tiles(const __grid_constant__ Tiles c) {
  constexpr int SHARE = share_of(PAR), OUTS = 16 * MMAS, ROWS = rows_of(COLS, PAR);
  constexpr int STRIDE = OUTS + 4, STAGE = (OUTS + ROWS) * 4;
  constexpr int STEP = 8 * SHARE, COPIES = (OUTS + STEP - 1) / STEP; /* rows that the group copies at a time; of W: how often */
  constexpr unsigned FRAGMENTS = SHARE * MMAS * COLS;                 /* of a tile: 16 x 8 each */
  DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
  const int slot = warp / SHARE, share = warp % SHARE;
  const int chunk = threadIdx.x % 4, row = threadIdx.x % (32 * SHARE) / 4; /* what the thread copies */
  float *const total = (float *)shared;
  uint4 *const ring = shared + ROWS * STRIDE / 4 + slot * DEPTH * STAGE;

  auto tile_m = [&](unsigned item) { return item % c.along * ROWS; };
  auto tile_unit = [&](unsigned item) { return item / c.along / c.splits * 2 * MMAS; };

  /* Rows that are not there are not copied: what comes of them is not stored. */
  const bf16 *w[COPIES], *x;
  int x_rows;
  auto find_w = [&](const Place &at) {
#pragma unroll
    for (int r = 0; r < COPIES; r++) {
      const int o = row + r * STEP;
      w[r] = at.done(c) || o >= OUTS ? nullptr : row_of(c, tile_unit(at.item) + o / 8, o % 8);
    }
  };
  auto find_x = [&](const Place &at) {
    const unsigned m = tile_m(at.item) + row;
    x_rows = at.done(c) ? 0 : (int)c.M - (int)m;
    x = (const bf16 *)(const void *)c.x + (size_t)m * c.K;
  };
  auto copy = [&](uint4 *to, const bf16 *from, size_t k, bool ahead) {
    if constexpr (!ALIGNED)
      fetch<false>(to, from, k, c.K);
    else if (ahead)
      cp_async_16_ahead(to, from + (k < c.K ? k : 0), k < c.K ? 16 : 0);
    else
      cp_async_16(to, from + (k < c.K ? k : 0), k < c.K ? 16 : 0);
  };
  auto fetch_w = [&](unsigned to, const Place &at) {
    const size_t k = at.k() + 8 * chunk;
#pragma unroll
    for (int r = 0; r < COPIES; r++)
      if (w[r]) copy(ring + to * STAGE + (row + r * STEP) * 4 + chunk, w[r], k, true);
  };
  auto fetch_x = [&](unsigned to, const Place &at) {
    const size_t k = at.k() + 8 * chunk;
    const bf16 *from = x;
#pragma unroll
    for (int r = 0; r < ROWS / STEP; r++, from += STEP * c.K)
      if (r * STEP < x_rows) copy(ring + to * STAGE + (OUTS + row + r * STEP) * 4 + chunk, from, k, false);
  };
  auto next = [&](Place &at) { return ++at.stage >= at.stages && at.next_part(c, slot, PAR); };

  Place begin;
  begin.item = blockIdx.x;
  begin.find_part(c, slot);
  if (!begin.stages) begin.next_part(c, slot, PAR);
  Place at = begin;
  find_w(at);
  for (int i = 0; i < DEPTH - 1; i++) {
    fetch_w(i, at);
    cp_async_commit();
    if (next(at)) find_w(at);
  }
  wait_for_previous_kernel();
  at = begin;
  find_x(at);
  for (int i = 0; i < DEPTH - 1; i++) {
    fetch_x(i, at);
    cp_async_commit();
    if (next(at)) find_x(at);
  }

  unsigned now = 0; /* in the ring */
  for (unsigned item = blockIdx.x; item < c.items; item += gridDim.x) {
    const unsigned each = PARTS / c.splits, split = item / c.along % c.splits;
    const unsigned tile = item / c.along / c.splits * c.along + item % c.along;
    if (item + gridDim.x >= c.items) let_next_kernel_start();
    for (unsigned phase = 0; phase < each; phase += PAR) {
      const unsigned part = split * each + phase + slot, stages = 2 * units_of_part(c.K, part);
      float acc[MMAS][COLS][4] = {};
      for (unsigned stage = 0; stage < stages; stage++) {
        cp_async_wait<DEPTH - 2>();
        barrier_of(1 + slot, 32 * SHARE); /* the group's copies are there, and it has read the stage that is filled next */
        const unsigned free = now ? now - 1 : DEPTH - 1;
        const uint4 *const ws = ring + now * STAGE + lane, *const xs = ws + (OUTS + share * COLS * 8) * 4;
        uint4 b[COLS];
#pragma unroll
        for (int n = 0; n < COLS; n++) b[n] = xs[32 * n];
        fetch_w(free, at);
        fetch_x(free, at);
        cp_async_commit();
        if (next(at)) find_w(at), find_x(at);
#pragma unroll
        for (int i = 0; i < MMAS; i++) {
          const uint4 low = ws[64 * i], high = ws[64 * i + 32];
#pragma unroll
          for (int n = 0; n < COLS; n++) add_slab(acc[i][n], low, high, b[n]);
        }
        now = now + 1 < DEPTH ? now + 1 : 0;
      }
      /* A group that had fewer stages than the first: as many barriers as that. racecheck counts a warp's barriers, of whatever kind, and
       * takes two accesses behind equally many for simultaneous. */
      for (unsigned stage = stages; stage < 2 * units_of_part(c.K, split * each + phase); stage++) barrier_of(1 + slot, 32 * SHARE);
      if (c.splits > 1) {
        float4 *const to = (float4 *)c.parts + ((size_t)tile * PARTS + part) * FRAGMENTS * 32 + share * MMAS * COLS * 32 + lane;
#pragma unroll
        for (int i = 0; i < MMAS * COLS; i++) {
          const float(&v)[4] = acc[i / COLS][i % COLS];
          __stcg(to + 32 * i, make_float4(v[0], v[1], v[2], v[3]));
        }
        continue;
      }
      for (int s = 0; s < PAR; s++) { /* in the order of the parts */
        if (s == slot) {
          float *const to = total + (share * COLS * 8 + 2 * j) * STRIDE + g;
#pragma unroll
          for (int i = 0; i < MMAS; i++)
#pragma unroll
            for (int n = 0; n < COLS; n++)
#pragma unroll
              for (int q = 0; q < 4; q++) {
                float &sum = to[(8 * n + q % 2) * STRIDE + 16 * i + q / 2 * 8];
                sum = part ? sum + acc[i][n][q] : acc[i][n][q];
              }
        }
        __syncthreads();
      }
    }
    if (c.splits > 1) {
      if (!last_to_arrive(arrived + tile, c.splits)) continue;
      const float4 *const from = (const float4 *)c.parts + (size_t)tile * PARTS * FRAGMENTS * 32 + lane;
#pragma unroll 2
      for (unsigned f = warp; f < FRAGMENTS; f += PARTS) {
        float4 v[PARTS];
#pragma unroll
        for (int p = 0; p < PARTS; p++) v[p] = __ldcg(from + (p * FRAGMENTS + f) * 32);
#pragma unroll
        for (int p = 1; p < PARTS; p++) v[0].x += v[p].x, v[0].y += v[p].y, v[0].z += v[p].z, v[0].w += v[p].w;
        float *const to = total + (f / (MMAS * COLS) * COLS * 8 + f % COLS * 8 + 2 * j) * STRIDE + f / COLS % MMAS * 16 + g;
        to[0] = v[0].x, to[STRIDE] = v[0].y, to[8] = v[0].z, to[STRIDE + 8] = v[0].w;
      }
      __syncthreads();
    }
    const unsigned m0 = tile_m(item);
    write_tile<2 * MMAS>(total, m0, tile_unit(item), min(c.M - m0, (unsigned)ROWS), c);
    __syncthreads(); /* before total is written again */
  }
  cp_async_wait<0>();
}
#endif
