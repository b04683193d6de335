/* ssd_few.cu - Mamba-2, few tokens with a State: the replay of csrc/ssd.c on the GPU.
 *
 * Memory is the limit: a head's checkpoint is read once, and written only by folds. A block takes tiles in turn, rows of a
 * head's checkpoint in registers; while one is worked on, the next one's is under way to shared memory, where each thread
 * fetches what it will hold itself. What came since the checkpoint is replayed in the quadratic form. The heads of a group are
 * neighbours: their block reads the ring once. What a State keeps is older than the kernel before this one, and is read before
 * that has ended.
 *
 * All sums have an order that depends on a token's path and on N alone, and products are added by explicit fmaf, so that a
 * token's bits do not depend on the kernel's template or on what else is in the call. */
#include "ssd.cuh"

enum { REPLAY_THREADS = 256, GROUPS = REPLAY_THREADS / 8, PAST = RING + PENDING, READERS = 1 << 14 };

/* (b,g): tiles that have read a ring of which this call overwrites entries. Zero between calls. */
static __device__ unsigned readers[READERS];

/* Rows of head h. Those of a batch row, group and slice are neighbours. */
struct Tile {
  int b, g, slice, h;
  __device__ bool shares_ring(const Tile &k) const { return b == k.b && g == k.g && slice == k.slice; }
};
static __device__ inline Tile tile_of(const Ssd &s, unsigned i) {
  const unsigned rep = s.H / s.G, r = i % rep;
  Tile k;
  i /= rep, k.slice = i % s.slices;
  i /= s.slices, k.g = i % s.G, k.b = s.b0 + i / s.G;
  k.h = k.g * rep + r;
  return k;
}

/* A token's path: `list` is the run that ends with it, back to a multiple of R, as indices of the past (ring, then call); base
 * is what stands before the run: an index, -1 the checkpoint as found, -2 nothing. fresh: no token before it has this base. */
struct Paths {
  int list[PENDING][SSD_RING], length[PENDING], base[PENDING];
  bool fresh[PENDING];
};
/* Of the tile at hand. y_t = e_t S C_t + sum_j w_tj dots_tj x_j */
struct Head {
  Paths paths;
  float d[PAST], w[PENDING][SSD_RING], dots[PENDING][SSD_RING], e[PENDING], fold_w[SSD_RING], fold_e;
  float A2, D;
  int fold_list[SSD_RING];
  bool last;
  Place at;
};

/* Dynamic shared memory. */
template <int CHUNKS, int RPT> struct Space {
  static constexpr int ROWS = GROUPS * RPT, N = 32 * CHUNKS, X = CHUNKS ? ROWS : 0;
  float4 *state;   /* (RPT,CHUNKS,REPLAY_THREADS) of the next tile */
  float *inter;    /* (T,ROWS) S C_t */
  real *C, *B, *x; /* (2,T,N)  (RING+T,N)  (RING+T,ROWS) */
  static size_t bytes(size_t T) {
    return (RPT * CHUNKS * REPLAY_THREADS * 4 + T * ROWS) * sizeof(float) + (2 * T * N + (RING + T) * (N + X)) * sizeof(real);
  }
  __device__ Space(float4 *p, int T) {
    state = p, inter = (float *)(p + RPT * CHUNKS * REPLAY_THREADS);
    C = (real *)(inter + T * ROWS), B = C + 2 * T * N, x = B + (RING + T) * N;
  }
};

/* What a thread holds of a state: rows 4 (8 r + warp) + lane/8, columns 32 c + 4 (lane%8). CHUNKS 0: any N, in scratch. */
template <int CHUNKS, int RPT> struct Slice {
  float v[RPT][CHUNKS][4];
  __device__ Slice(const Ssd &) {}
  static __device__ int chunks(const Ssd &) { return CHUNKS; }
  __device__ float (&at(int r, int c))[4] { return v[r][c]; }
};
template <> struct Slice<0, 1> {
  float *p;
  __device__ Slice(const Ssd &s) : p(s.starts + (size_t)blockIdx.x * chunks(s) * REPLAY_THREADS * 4) {}
  static __device__ int chunks(const Ssd &s) { return (s.N + 31) / 32; }
  __device__ float (&at(int, int c))[4] { return *(float (*)[4])(p + ((size_t)c * REPLAY_THREADS + threadIdx.x) * 4); }
};

template <class R> static __device__ inline void load_4(float (&v)[4], const R *p) {
  if constexpr (sizeof(R) == 4) {
    load_16(v, p);
  } else {
    const uint2 q = *(const uint2 *)p;
    v[0] = low_bf16(q.x), v[1] = high_bf16(q.x), v[2] = low_bf16(q.y), v[3] = high_bf16(q.y);
  }
}
template <class R> static __device__ inline void store_4(R *p, const float (&v)[4]) {
  if constexpr (sizeof(R) == 4)
    store_16(p, v);
  else
    *(uint2 *)p = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

/* One warp: lane t < T climbs its own path. Without a ring every token is a run of its own. */
static __device__ void climb(Paths &p, const Ssd &s, const Place &at, int b, int ring) {
  const int t = threadIdx.x % 32;
  const int *prev = s.rows.prev ? s.rows.prev + (size_t)b * s.T : nullptr;
  auto parent = [&](int i) { return i < ring ? i - 1 : !prev ? i - 1 : prev[i - ring] == -2 ? -2 : ring + prev[i - ring]; };
  if (t < s.T) {
    int length = 1, i = ring + t;
    if (s.ring.x) {
      int depth = prev ? 0 : t;
      for (int u = t; prev && (u = prev[u]) >= 0;) depth++;
      length = (at.pos + depth) % SSD_RING + 1;
    }
    p.length[t] = length;
    for (int j = length - 1; j >= 0; j--) p.list[t][j] = i, i = parent(i);
    p.base[t] = i;
  }
  __syncwarp();
  bool fresh = true;
  for (int u = 0; u < min(t, s.T); u++) fresh &= t >= s.T || p.base[u] != p.base[t];
  if (t < s.T) p.fresh[t] = fresh;
}

/* Seen from the end of a run of n tokens: w[j] = exp(cum_last - cum_j) d_j, and e = exp(cum_last). 16 lanes; lane j has d_j,
 * or 0. */
static __device__ void run_decay(float *w, float *e, float d, int n, float A2) {
  const int j = threadIdx.x % SSD_RING;
  float sum = d;
  for (int o = 1; o < SSD_RING; o *= 2) {
    const float other = __shfl_down_sync(0xffffffffu, sum, o, SSD_RING);
    if (j + o < SSD_RING) sum += other;
  }
  const float after = __shfl_down_sync(0xffffffffu, sum, 1, SSD_RING);
  if (j < n) w[j] = exp2_approx(-A2 * (j + 1 < SSD_RING ? after : 0.0f)) * d;
  if (j == 0) *e = exp2_approx(-A2 * sum);
}

template <int CHUNKS, int RPT> struct Replay {
  static constexpr int ROWS = GROUPS * RPT, N = 32 * CHUNKS;
  const Ssd &s;
  Head &m;
  const Space<CHUNKS, RPT> space;
  const int tid, lane, warp, part, first_row, rep;
  Slice<CHUNKS, RPT> S;
  /* the tile at hand; entries: `ring` of the ring, then the call's, `past` together */
  Tile k;
  Place at;
  int ring, past;
  const real *C;

  __device__ Replay(const Ssd &s, Head &m, float4 *shared)
      : s(s), m(m), space(shared, s.T), tid(threadIdx.x), lane(tid % 32), warp(tid / 32), part(tid % 8), first_row(tid / 8),
        rep(s.H / s.G), S(s) {}

  __device__ int rows_of(const Tile &k) const { return RPT > 1 ? (int)ROWS : min((int)ROWS, s.P - k.slice * ROWS); }
  __device__ float *checkpoint_of(const Tile &k, int slot) const {
    return s.state + (((size_t)slot * s.H + k.h) * s.P + k.slice * ROWS + first_row) * s.N + 4 * part;
  }
  __device__ int ring_of(const Place &at) const { return min(at.pos - at.begin, (int)RING); }
  /* The row of ring.x … or of x … that entry i is. */
  __device__ static size_t row_of(const Ssd &s, const Place &at, int b, int ring, int i) {
    return i < ring ? (size_t)at.slot * RING + (at.begin + i) % RING : (size_t)b * s.T + i - ring;
  }

  /* ---- from memory ---- */

  __device__ void fetch_state(const Tile &k, int slot) const {
    const float *from = checkpoint_of(k, slot);
    const int rows = rows_of(k);
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        cp_async_16(space.state + (r * CHUNKS + c) * REPLAY_THREADS + tid, from + (size_t)(GROUPS * r) * N + 32 * c,
                    first_row + GROUPS * r < rows ? 16 : 0);
  }
  __device__ void take_state() {
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        load_16(S.at(r, c), (const float *)(space.state + (r * CHUNKS + c) * REPLAY_THREADS + tid));
  }
  __device__ void load_checkpoint() {
    const float *from = checkpoint_of(k, at.slot);
    const int rows = rows_of(k);
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < S.chunks(s); c++) {
        float (&v)[4] = S.at(r, c);
        const bool there = first_row + GROUPS * r < rows;
        if (CHUNKS) {
          const float4 q = there ? __ldcs((const float4 *)(from + (size_t)(GROUPS * r) * N + 32 * c)) : make_float4(0, 0, 0, 0);
          v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
        } else
          for (int i = 0; i < 4; i++) v[i] = there && 32 * c + 4 * part + i < s.N ? from[32 * c + i] : 0;
      }
  }
  __device__ void write_checkpoint() {
    float *to = checkpoint_of(k, at.slot);
    const int rows = rows_of(k);
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < S.chunks(s); c++) {
        float (&v)[4] = S.at(r, c);
        if (first_row + GROUPS * r >= rows) continue;
        if (CHUNKS)
          __stcs((float4 *)(to + (size_t)(GROUPS * r) * N + 32 * c), make_float4(v[0], v[1], v[2], v[3]));
        else
          for (int i = 0; i < 4; i++)
            if (32 * c + 4 * part + i < s.N) to[32 * c + i] = v[i];
      }
  }
  /* x and B of entries first .. last */
  __device__ void fetch_entries(int first, int last) const {
    if (!CHUNKS) return;
    constexpr int pieces = (N + ROWS) / REALS_16;
    const int p0 = k.slice * ROWS, rows = rows_of(k);
#pragma unroll 1
    for (int i = first * pieces + tid; i < last * pieces; i += REPLAY_THREADS) {
      const int entry = i / pieces, piece = i % pieces * REALS_16;
      const bool old = entry < ring;
      const size_t row = row_of(s, at, k.b, ring, entry) * s.G + k.g;
      if (piece < N)
        cp_async_16(space.B + entry * N + piece, (old ? s.ring.B : s.Bm) + row * s.N + piece);
      else
        cp_async_16(space.x + entry * ROWS + piece - N, (old ? s.ring.x : s.x) + row * s.P + p0 + piece - N,
                    piece - N < rows ? 16 : 0);
    }
  }
  __device__ void fetch_C(const Tile &k, int buffer) const {
    constexpr int pieces = CHUNKS ? N / REALS_16 : 1;
    for (int i = tid; CHUNKS && i < s.T * pieces; i += REPLAY_THREADS)
      cp_async_16(space.C + buffer * s.T * N + i * REALS_16,
                  s.C + (((size_t)k.b * s.T + i / pieces) * s.H + k.h) * N + i % pieces * REALS_16);
  }
  /* A number of a tile for each thread: dt of entry tid, if that is one of first .. last (the ring's is a step, the call's is
   * not yet one), A_log and D. They are loaded before the tile's turn, into `ahead`. */
  __device__ void load_numbers(float &ahead, const Tile &k, const Place &at, int ring, int first, int last) const {
    const size_t i = row_of(s, at, k.b, ring, tid) * s.H + k.h;
    if (tid >= first && tid < last) ahead = tid < ring ? s.ring.dt[i] : load(s.dt + i) + (s.dt_bias ? s.dt_bias[k.h] : 0);
    if (tid == PAST) ahead = s.A_log[k.h];
    if (tid == PAST + 1) ahead = s.Dskip ? s.Dskip[k.h] : 0;
  }
  __device__ void keep_numbers(float ahead) const {
    if (tid < past) m.d[tid] = tid < ring ? fabsf(ahead) : ssd_step(ahead);
    if (tid == PAST) m.A2 = exp_(ahead) * 1.44269504f;
    if (tid == PAST + 1) m.D = ahead;
  }

  /* ---- operands: of entry i, token t, this thread's columns of chunk c ---- */

  __device__ void B_at(int i, int c, float (&v)[4]) const {
    if constexpr (CHUNKS) return load_4(v, space.B + i * N + 32 * c + 4 * part);
    const real *from = (i < ring ? s.ring.B : s.Bm) + (row_of(s, at, k.b, ring, i) * s.G + k.g) * s.N + 32 * c + 4 * part;
    for (int q = 0; q < 4; q++) v[q] = 32 * c + 4 * part + q < s.N ? load(from + q) : 0;
  }
  __device__ void C_at(int t, int c, float (&v)[4]) const {
    if constexpr (CHUNKS) return load_4(v, C + t * N + 32 * c + 4 * part);
    const real *from = s.C + (((size_t)k.b * s.T + t) * s.H + k.h) * s.N + 32 * c + 4 * part;
    for (int q = 0; q < 4; q++) v[q] = 32 * c + 4 * part + q < s.N ? load(from + q) : 0;
  }
  __device__ float x_at(int i, int row) const {
    if (CHUNKS) return load(space.x + i * ROWS + row);
    return row < rows_of(k)
               ? load((i < ring ? s.ring.x : s.x) + (row_of(s, at, k.b, ring, i) * s.G + k.g) * s.P + k.slice * ROWS + row)
               : 0;
  }

  /* ---- arithmetic ---- */

  __device__ void weights() {
#pragma unroll 1
    for (int t = tid / SSD_RING; t < (s.T + 1) / 2 * 2; t += REPLAY_THREADS / SSD_RING) { /* whole warps */
      const int u = min(t, s.T - 1), n = m.paths.length[u], j = tid % SSD_RING;
      run_decay(m.w[u], m.e + u, j < n ? m.d[m.paths.list[u][j]] : 0, n, m.A2);
    }
#pragma unroll 1
    for (int i = tid / 8; i < (s.T * SSD_RING + 3) / 4 * 4; i += GROUPS) {
      const int t = min(i / SSD_RING, s.T - 1), j = i % SSD_RING;
      const bool there = i < s.T * SSD_RING && j < m.paths.length[t];
      const int entry = there ? m.paths.list[t][j] : ring;
      float sum = 0;
#pragma unroll
      for (int c = 0; c < S.chunks(s); c++) {
        float u[4], v[4];
        C_at(t, c, u);
        B_at(entry, c, v);
        for (int q = 0; q < 4; q++) sum = fmaf(u[q], v[q], sum);
      }
      for (int o = 4; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
      if (part == 0 && there) m.dots[t][j] = sum;
    }
  }
  /* S = e S + sum_j w_j x_j B_j^T, the one way in which a run, that which ends with entry `end`, enters a state. nothing: there
   * was none before. */
  __device__ void fold(int end, bool nothing) {
    const int n = end < ring ? SSD_RING : m.paths.length[end - ring];
    __syncthreads(); /* the fold before may still be read */
    if (warp == 0) {
      const int j = lane % SSD_RING;
      const int entry = j >= n ? 0 : end < ring ? end - SSD_RING + 1 + j : m.paths.list[end - ring][j];
      if (lane < n) m.fold_list[j] = entry;
      run_decay(m.fold_w, &m.fold_e, j < n ? m.d[entry] : 0, n, m.A2);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < S.chunks(s); c++)
        for (int q = 0; q < 4; q++) S.at(r, c)[q] = nothing ? 0 : m.fold_e * S.at(r, c)[q];
#pragma unroll 1
    for (int j = 0; j < n; j++) {
      const int i = m.fold_list[j];
      float wx[RPT];
#pragma unroll
      for (int r = 0; r < RPT; r++) wx[r] = m.fold_w[j] * x_at(i, first_row + GROUPS * r);
#pragma unroll
      for (int c = 0; c < S.chunks(s); c++) {
        float v[4];
        B_at(i, c, v);
#pragma unroll
        for (int r = 0; r < RPT; r++)
          for (int q = 0; q < 4; q++) S.at(r, c)[q] = fmaf(wx[r], v[q], S.at(r, c)[q]);
      }
    }
  }
  /* inter[u] = S C_u */
  __device__ void read_out(int u) {
    float sum[RPT];
#pragma unroll
    for (int r = 0; r < RPT; r++) sum[r] = 0;
#pragma unroll
    for (int c = 0; c < S.chunks(s); c++) {
      float v[4];
      C_at(u, c, v);
#pragma unroll
      for (int r = 0; r < RPT; r++)
        for (int q = 0; q < 4; q++) sum[r] = fmaf(S.at(r, c)[q], v[q], sum[r]);
    }
    /* Over the 8 lanes of a row, in one order: while rows are left a lane hands half of them over and adds to the others. */
    int row = 0;
#pragma unroll
    for (int o = 4, left = RPT; o; o /= 2) {
      const int upper = (lane & o) != 0;
      if (left > 1) {
        left /= 2;
#pragma unroll
        for (int r = 0; r < left; r++) {
          const float other = __shfl_xor_sync(0xffffffffu, upper ? sum[r] : sum[r + left], o);
          sum[r] = (upper ? sum[r + left] : sum[r]) + other;
        }
        row += upper * left;
      } else
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], o);
    }
    space.inter[u * ROWS + first_row + GROUPS * row] = sum[0];
  }
  /* First the checkpoint moves for good; then S goes to each base and is read for all its tokens; last, without a ring, to the
   * state after `keep` tokens. Entries are numbered from the checkpoint as found, -1. */
  __device__ void states() {
    const int target = s.ring.x ? min(at.cut, ring) - 1 : -1;
    int stands = -1, checkpoint_at = -1;
    for (int t = -1; t <= s.T; t++) {
      const int goal = t < 0 ? target : t < s.T ? m.paths.base[t] : s.ring.x ? -1 : at.cut - 1;
      if (t == s.T ? goal < 0 : t >= 0 && (goal == -2 || !m.paths.fresh[t])) continue;
      if (stands != goal && goal == checkpoint_at) load_checkpoint(), stands = goal;
      while (stands != goal) { /* a run on: from where S stands, from the checkpoint, or from nothing */
        int next = goal, base;
        for (;; next = base) {
          base = next < ring ? next - SSD_RING : m.paths.base[next - ring];
          if (base == stands || base == checkpoint_at || base == -2) break;
        }
        if (base != stands && base != -2) load_checkpoint();
        fold(next, base == -2);
        stands = next;
      }
      if (t < 0) checkpoint_at = stands;
      if (t == s.T || (t < 0 && target >= 0)) write_checkpoint();
      for (int u = max(t, 0); t >= 0 && u < s.T; u++)
        if (m.paths.base[u] == goal) read_out(u);
    }
  }
  __device__ void outputs() const {
    constexpr int UNIT = CHUNKS ? 4 : 1, EACH = ROWS / UNIT;
    const int rows = rows_of(k);
#pragma unroll 1
    for (int i = tid; i < s.T * EACH; i += REPLAY_THREADS) {
      const int t = i / EACH, row = i % EACH * UNIT, n = m.paths.length[t];
      if (row >= rows) continue;
      float v[UNIT];
#pragma unroll
      for (int q = 0; q < UNIT; q++) v[q] = m.paths.base[t] == -2 ? 0 : m.e[t] * space.inter[t * ROWS + row + q];
#pragma unroll 4
      for (int j = 0; j < n; j++) {
        const float w = fmaf(m.w[t][j], m.dots[t][j], j == n - 1 ? m.D : 0);
        const int entry = m.paths.list[t][j];
        float x[UNIT];
        if constexpr (CHUNKS)
          load_4(x, space.x + entry * ROWS + row);
        else
          x[0] = x_at(entry, row);
#pragma unroll
        for (int q = 0; q < UNIT; q++) v[q] = fmaf(w, x[q], v[q]);
      }
      real *y = s.y + (((size_t)k.b * s.T + t) * s.H + k.h) * s.P + k.slice * ROWS + row;
      if constexpr (CHUNKS)
        store_4(y, v);
      else
        store(y, v[0]);
    }
  }

  /* ---- the ring ---- */

  /* The call's entries that stand at or behind the checkpoint: a head writes its dt, the first of a group x and B. Where they
   * take the places of entries that are replayed, the last tile that has read these writes everything. */
  __device__ void remember() {
    typedef std::conditional_t<CHUNKS != 0, uint4, real> Unit;
    constexpr int EACH = sizeof(Unit) / sizeof(real);
    const bool all = past > RING;
    if (all && !read_last()) return;
    const int from = at.begin + max(at.cut, 0), first = max(from - at.pos, 0), n = min(from + (int)RING - at.pos, s.T) - first;
    const bool leads = all || k.h % rep == 0, here = CHUNKS && !all; /* x and B are still in shared memory */
    const int p0 = all ? 0 : k.slice * ROWS, rows = !leads ? 0 : all ? s.P : min((int)ROWS, s.P - p0);
    const int columns = leads && (all || !k.slice) ? s.N : 0;
    const int width = (rows + columns) / EACH, heads = all ? rep : !k.slice, h0 = all ? k.g * rep : k.h;
    const size_t call = ((size_t)k.b * s.T * s.G + k.g);
    const real *x = here ? space.x + ring * ROWS : s.x + call * s.P + p0, *B = here ? space.B + ring * N : s.Bm + call * s.N;
    const size_t x_stride = here ? ROWS : (size_t)s.G * s.P, B_stride = here ? N : (size_t)s.G * s.N;
    for (int i = tid; i < n * width; i += REPLAY_THREADS) {
      const int t = first + i / width, e = i % width * EACH;
      const size_t to = ((size_t)at.slot * RING + (at.pos + t) % RING) * s.G + k.g;
      if (e < rows)
        *(Unit *)(s.ring.x + to * s.P + p0 + e) = *(const Unit *)(x + t * x_stride + e);
      else
        *(Unit *)(s.ring.B + to * s.N + e - rows) = *(const Unit *)(B + t * B_stride + e - rows);
    }
    for (int i = tid; i < n * heads; i += REPLAY_THREADS) {
      const int t = first + i / heads, h = h0 + i % heads;
      const size_t dt = ((size_t)k.b * s.T + t) * s.H + h;
      s.ring.dt[((size_t)at.slot * RING + (at.pos + t) % RING) * s.H + h] =
          all ? ssd_step(load(s.dt + dt) + (s.dt_bias ? s.dt_bias[h] : 0)) : m.d[ring + t];
    }
  }
  __device__ bool read_last() {
    const unsigned tiles = rep * s.slices;
    __syncthreads();
    if (tid == 0) {
      __threadfence();
      m.last = atomicInc(readers + (k.b - s.b0) * s.G + k.g, tiles - 1) == tiles - 1;
      __threadfence();
    }
    __syncthreads();
    return m.last;
  }

  /* ---- tiles first .. last ---- */

  __device__ void run(unsigned i, unsigned last) {
    float ahead = 0;
    k = tile_of(s, i), at = place(s, k.b), ring = ring_of(at), past = ring + s.T;
    fetch_state(k, at.slot);
    fetch_entries(0, ring);
    load_numbers(ahead, k, at, ring, 0, ring);
    if (warp == 0) climb(m.paths, s, at, k.b, ring);
    wait_for_previous_kernel();
    let_next_kernel_start();
    fetch_entries(ring, past);
    fetch_C(k, 0);
    load_numbers(ahead, k, at, ring, ring, past);
    cp_async_commit();
    bool other_ring = false, other_row = false;
    for (int buffer = 0;; buffer ^= 1) {
      cp_async_wait<0>();
      take_state();
      __syncthreads(); /* the tile before is done */
      if (other_ring) fetch_entries(0, past);
      if (other_row && warp == 0) climb(m.paths, s, at, k.b, ring);
      cp_async_commit();
      keep_numbers(ahead);
      if (tid == 0) m.at = at;
      C = space.C + buffer * s.T * N;

      const bool more = ++i < last;
      if (more) {
        const Tile next = tile_of(s, i);
        const Place next_at = next.b != k.b ? place(s, next.b) : at;
        const int next_ring = ring_of(next_at);
        fetch_state(next, next_at.slot);
        fetch_C(next, buffer ^ 1);
        load_numbers(ahead, next, next_at, next_ring, 0, next_ring + s.T);
      }
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      at = m.at; /* registers are dear from here on */
      if (!CHUNKS) load_checkpoint();
      weights();
      states();
      __syncthreads();
      outputs();
      if (s.ring.x) remember();
      if (!more) break;
      const Tile before = k;
      k = tile_of(s, i);
      other_ring = !k.shares_ring(before), other_row = k.b != before.b;
      if (other_row) at = place(s, k.b), ring = ring_of(at), past = ring + s.T;
    }
  }
};

/* Blocks of a multiprocessor. */
template <int RPT> constexpr int resident = RPT == 1 ? 3 : RPT == 4 && sizeof(real) == 4 ? 1 : 2;

template <int CHUNKS, int RPT>
static __global__ void __launch_bounds__(REPLAY_THREADS, resident<RPT>) replay(const __grid_constant__ Ssd s, unsigned tiles) {
  DYNAMIC_SHARED(float4, shared);
  __shared__ Head head;
  const unsigned first = (unsigned)((size_t)tiles * blockIdx.x / gridDim.x),
                 last = (unsigned)((size_t)tiles * (blockIdx.x + 1) / gridDim.x);
  Replay<CHUNKS, RPT>(s, head, shared).run(first, last);
}

static size_t most_shared() {
  static int bytes = [] {
    int value = 0;
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    return value;
  }();
  return (size_t)bytes;
}
template <int CHUNKS, int RPT> static size_t shared_of(size_t T) { return Space<CHUNKS, RPT>::bytes(T) + sizeof(Head); }

template <int CHUNKS, int RPT> static void run_replay(Ssd s) {
  s.slices = (int)ceil_div(s.P, GROUPS * RPT);
  const size_t tiles = (size_t)s.B * s.H * s.slices, fit = (most_shared() + 1024) / (shared_of<CHUNKS, RPT>(s.T) + 1024);
  const size_t blocks = min(tiles, multiprocessors() * min(max(fit, (size_t)1), (size_t)resident<RPT>));
  if (!CHUNKS) {
    s.starts = (float *)device_scratch(blocks * ceil_div(s.N, 32) * REPLAY_THREADS * 4 * sizeof(float));
    if (!s.starts) return;
  }
  LAUNCH_EARLY((replay<CHUNKS, RPT>), (unsigned)blocks, REPLAY_THREADS, (Space<CHUNKS, RPT>::bytes(s.T)), s, (unsigned)tiles);
}

/* Rows a thread, 1 where they would not come out even: many where there are heads enough, so that the ring is read by few
 * blocks; else few, to fill the GPU. */
template <int CHUNKS> static void replay_rows(const Ssd &s) {
  const size_t heads = (size_t)s.B * s.H, enough = 4 * (size_t)multiprocessors(), most = most_shared();
  if (s.P % 128 == 0 && heads * (s.P / 128) >= enough && shared_of<CHUNKS, 4>(s.T) <= most)
    run_replay<CHUNKS, 4>(s);
  else if (s.P % 64 == 0 && heads * (s.P / 64) >= enough && shared_of<CHUNKS, 2>(s.T) <= most)
    run_replay<CHUNKS, 2>(s);
  else if (shared_of<CHUNKS, 1>(s.T) <= most)
    run_replay<CHUNKS, 1>(s);
  else
    run_replay<0, 1>(s);
}

void ssd_few(Ssd s) {
  const int B = s.B, step = max(READERS / s.G, 1);
  for (s.b0 = 0; s.b0 < B; s.b0 += step) {
    s.B = min(step, B - s.b0);
    if (s.vectors && s.N == 128)
      replay_rows<4>(s);
    else if (s.vectors && s.N == 64)
      replay_rows<2>(s);
    else
      run_replay<0, 1>(s);
  }
}
