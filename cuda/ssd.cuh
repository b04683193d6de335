/* ssd.cuh - what Mamba-2's forward and backward share: chunks of Q tokens, their decays, products of tiles in shared memory, and
 * the walk that carries a state over the chunks.
 *
 * The formulas are csrc/ssd.c's. Products run on tensor cores with bf16 operands and float sums in `_cuda`; in `_cuda32` the same
 * fragments hold floats and `mma` is plain float arithmetic with operands that travel by shuffles. A state (P,N) lives in the
 * accumulators of the product that updates it: of 16 rows a warp owns all columns. Decays and weights are float, folded into one
 * operand before it is rounded. A tile is at most 128 x 128; larger P and N are more tiles, which every sum splits into. */
#ifndef MIL_SSD_CUH
#define MIL_SSD_CUH
#include <initializer_list>

#include "common.cuh"

enum { Q = 64, BLOCKS = Q / 16, LOWER = BLOCKS * (BLOCKS + 1) / 2, RING = SSD_RING + PENDING, WALK_ROWS = 64, WALK_THREADS = 128 };

struct Ssd {
  real *y, *dx, *ddt, *dB, *dC;
  float *state, *dstate, *dA_log, *dD, *ddt_bias;
  Ring ring;
  const real *dy, *x, *dt, *Bm, *C;
  const float *A_log, *Dskip, *dt_bias;
  Rows rows;
  int B, T, H, G, P, N;
  int b0;             /* the first row of the batch in this launch (few tokens) */
  int p0, n0;         /* where this launch's tile of the state starts */
  int slices, parts;  /* blocks along P; segments of the forward */
  int chunks;         /* at most, of a row */
  int vectors;        /* rows start at and are made of 16-byte pieces */
  float *starts;      /* forward (B,H,parts,P,N): the state before each segment, but for what comes from segments before the last */
  float *decays;      /* forward (B,H,parts): what is left of a state after a segment */
  real *tiles;        /* backward (2,B,H,chunks,64 slices,NT): the state before a chunk, the cotangent of the state after it */
  float *partial;     /* backward (B,chunks,H,PARTIALS) */
};

/* ---- fragments ------------------------------------------------------------------------------------------------------------ */

/* A word is two neighbours of a row; four words are a 16x16 matrix: as a left operand its 8x8 quarters (0,0) (1,0) (0,1) (1,1), as a
 * right operand two of 8 columns, (0,0) (1,0) and (0,1) (1,1). */
template <class R> struct Parts;
template <> struct Parts<__nv_bfloat16> {
  typedef unsigned word;
  typedef float log; /* sums of logarithms of decays: their differences must be good to the tolerance */
};
template <> struct Parts<float> {
  typedef float2 word;
  typedef double log;
};
typedef Parts<real>::word word;
typedef Parts<real>::log log_t;

static __device__ inline void pack(unsigned &w, float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  memcpy(&w, &v, 4);
}
static __device__ inline void pack(float2 &w, float low, float high) { w = make_float2(low, high); }
static __device__ inline float low(unsigned w) { return low_bf16(w); }
static __device__ inline float low(float2 w) { return w.x; }
static __device__ inline float high(unsigned w) { return high_bf16(w); }
static __device__ inline float high(float2 w) { return w.y; }
static __device__ inline unsigned from_lane(unsigned w, int lane) { return __shfl_sync(0xffffffffu, w, lane); }
static __device__ inline float2 from_lane(float2 w, int lane) {
  return make_float2(__shfl_sync(0xffffffffu, w.x, lane), __shfl_sync(0xffffffffu, w.y, lane));
}
static __device__ inline void store_words(__nv_bfloat16 *p, unsigned a, unsigned b) { *(uint2 *)p = make_uint2(a, b); }
static __device__ inline void store_words(float *p, float2 a, float2 b) { *(float4 *)p = make_float4(a.x, a.y, b.x, b.y); }

/* c (16x8) += a (16x16) b (16x8), the fragments of mma.m16n8k16 */
static __device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  mma_bf16(c, a, b);
}
static __device__ inline void mma(float (&c)[4], const float2 (&a)[4], float2 b0, float2 b1) {
  const int lane = threadIdx.x % 32, row = lane & ~3, column = 8 * (lane % 4);
#pragma unroll 1
  for (int k = 0; k < 4; k++) {
    const float2 r0 = from_lane(a[0], row + k), r1 = from_lane(a[1], row + k), r2 = from_lane(a[2], row + k), r3 = from_lane(a[3], row + k);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float2 lo = from_lane(b0, column + 4 * n + k), hi = from_lane(b1, column + 4 * n + k);
      c[n] += r0.x * lo.x + r0.y * lo.y + r2.x * hi.x + r2.y * hi.y;
      c[n + 2] += r1.x * lo.x + r1.y * lo.y + r3.x * hi.x + r3.y * hi.y;
    }
  }
}
static __device__ inline void mma2(float (&c)[4], float (&d)[4], const word (&a)[4], const word (&b)[4]) {
  mma(c, a, b[0], b[1]);
  mma(d, a, b[2], b[3]);
}

/* ---- tiles in shared memory --------------------------------------------------------------------------------------------------- */

/* Element (row, col) of a tile of COLS columns: the 16-byte pieces of a row change places from row to row, so that eight rows of a
 * column of pieces lie in different banks. All of a row's bits are above those of col. */
template <int COLS> static __device__ inline int row_at(int row) {
  constexpr int pieces = COLS / REALS_16, turn = pieces < 8 ? pieces : 8;
  return row * COLS + row * turn / 8 % turn * REALS_16;
}
template <int COLS> static __device__ inline int at(int row, int col) { return row_at<COLS>(row) ^ col; }

/* Operands from the 16x16 matrix at (row, col) of a tile: left, left of its transpose, right (it is (k,n)), right of its transpose. */
enum { LEFT, LEFT_T, RIGHT, RIGHT_T };
template <int COLS, int HOW> static __device__ inline void load(unsigned (&w)[4], const __nv_bfloat16 *tile, int row, int col) {
  const int lane = threadIdx.x % 32, one = lane & 8, two = lane / 16 * 8; /* where quarters 1 and 3, 2 and 3 stand */
  const bool down_first = HOW == LEFT || HOW == RIGHT;
  const int lane_at = row_at<COLS>(row + lane % 8 + (down_first ? one : two)) * 2 ^ (down_first ? two : one) * 2;
  const char *p = (const char *)tile + (lane_at ^ col * 2); /* most of col is known at compile time */
  if (HOW == LEFT || HOW == RIGHT_T)
    ldmatrix_x4(w, p);
  else
    ldmatrix_x4_trans(w, p);
}
template <int COLS, int HOW> static __device__ inline void load(float2 (&w)[4], const float *tile, int row, int col) {
  const int lane = threadIdx.x % 32;
  for (int q = 0; q < 4; q++) {
    const int one = q % 2 * 8, two = q / 2 * 8, i = lane / 4, j = lane % 4 * 2;
    if (HOW == LEFT) w[q] = *(const float2 *)(tile + at<COLS>(row + i + one, col + j + two));
    if (HOW == RIGHT_T) w[q] = *(const float2 *)(tile + at<COLS>(row + i + two, col + j + one));
    if (HOW == LEFT_T) w[q] = make_float2(tile[at<COLS>(row + j + two, col + i + one)], tile[at<COLS>(row + j + 1 + two, col + i + one)]);
    if (HOW == RIGHT) w[q] = make_float2(tile[at<COLS>(row + j + one, col + i + two)], tile[at<COLS>(row + j + 1 + one, col + i + two)]);
  }
}
static __device__ inline word word_at(const real *p) { return *(const word *)p; }

/* Lower triangles (Q,Q) of blocks of 16: block (i,j), j <= i. */
static __device__ inline int lower(int i, int j) { return (i * (i + 1) / 2 + j) * 256; }
static __device__ inline void lower_block(int index, int *i, int *j) {
  *i = (index >= 1) + (index >= 3) + (index >= 6);
  *j = index - *i * (*i + 1) / 2;
}

/* c (16x16, two tiles of 8 columns) += rows 16 i.. of a times rows 16 j.. of b, both (Q,K) */
template <int K> static __device__ inline void dots_16(float (&c)[2][4], const real *a, int i, const real *b, int j) {
#pragma unroll 4
  for (int k = 0; k < K; k += 16) {
    word u[4], v[4];
    load<K, LEFT>(u, a, 16 * i, k);
    load<K, RIGHT_T>(v, b, 16 * j, k);
    mma2(c[0], c[1], u, v);
  }
}

/* A tile of ROWS rows of COLS elements, of which n rows of `cols` elements come from global memory and the rest is zero; row(r): where
 * row r stands there, counted from `from`. FAST, here and below: 16-byte accesses are possible everywhere and nothing is added up
 * over tiles. Ends with no barrier. */
template <bool FAST, int ROWS, int COLS, int THREADS, class Row>
static __device__ inline void fetch(real *tile, const real *from, int ld, int n, int cols, Row row) {
  constexpr int pieces = COLS / REALS_16, step = THREADS / pieces;
  const int r0 = threadIdx.x / pieces, c = threadIdx.x % pieces * REALS_16;
#pragma unroll
  for (int i = 0; i < ROWS; i += step) {
    const int r = r0 + i;
    const real *at_row = from + (ptrdiff_t)(row(r) * ld + c);
    if (FAST)
      cp_async_16(tile + at<COLS>(r, c), at_row, r < n && c < cols ? 16 : 0);
    else
      for (int e = 0; e < REALS_16; e++) store(tile + at<COLS>(r, c) + e, r < n && c + e < cols ? load(at_row + e) : 0);
  }
}

/* Words a of columns col + 2 j, b of columns col + 8 + 2 j, j = lane % 4, of one row: neighbouring lanes trade, so that each has
 * four elements in a row. All lanes call; `valid`: the row exists; add: +=. */
template <bool FAST> static __device__ inline void store_row(real *row, int col, int cols, word a, word b, bool valid, bool add) {
  const int lane = threadIdx.x % 32, odd = lane % 2;
  const word other = from_lane(odd ? a : b, lane ^ 1), first = odd ? other : a, second = odd ? b : other;
  const int c = col + 8 * odd + lane % 4 / 2 * 4;
  if (!valid || c >= cols) return;
  if (FAST) return store_words(row + c, first, second);
  const float v[4] = {low(first), high(first), low(second), high(second)};
  for (int e = 0; e < 4; e++)
    if (c + e < cols) store(row + c + e, v[e] + (add ? load(row + c + e) : 0));
}

/* ---- which tokens -------------------------------------------------------------------------------------------------------------------- */

/* Positions: `state` stands at begin, this call's first token at pos; `cut` tokens after begin the state is written back. */
struct Place {
  int slot, begin, pos, cut;
};
static __device__ inline Place place(const Ssd &s, int b) {
  const Rows &r = s.rows;
  const int slot = r.slot ? r.slot[b] : b, keep = r.keep ? r.keep[b] : s.T;
  if (!s.ring.x) return {slot, 0, 0, keep};
  const int pos = r.pos ? r.pos[slot] : 0, committed = r.committed ? r.committed[slot] : 0, seen = r.seen ? r.seen[slot] : 0;
  const int begin = seen / SSD_RING * SSD_RING;
  return {slot, begin, pos, (s.T > PENDING ? pos + keep : committed) / SSD_RING * SSD_RING - begin};
}

/* The chunks of a row: those below 0 are the ring's tokens, one or, cut in two, two; then this call's, cut at `stop`. Chunk c holds
 * tokens at .. at+n, counted from begin. */
struct Chunk {
  int at, n;
};
struct Chunks {
  int ring, stop, first, count, cut;
};
static __device__ inline Chunks chunks_of(const Ssd &s, const Place &p) {
  Chunks k;
  k.ring = min(p.pos - p.begin, (int)RING);
  k.cut = s.state || s.dstate ? p.cut : 0;
  k.stop = min(max(k.cut - k.ring, 0), s.T);
  k.first = k.ring ? (0 < k.cut && k.cut < k.ring ? -2 : -1) : 0;
  k.count = (k.stop + Q - 1) / Q + (s.T - k.stop + Q - 1) / Q;
  return k;
}
static __device__ inline Chunk chunk_at(const Ssd &s, const Chunks &k, int c) {
  if (c < 0) {
    const int split = k.first == -2 ? k.cut : 0;
    return {c == -2 ? 0 : split, c == -2 ? split : k.ring - split};
  }
  const int before = (k.stop + Q - 1) / Q, t = c < before ? c * Q : k.stop + (c - before) * Q;
  return {k.ring + t, min((int)Q, (c < before ? k.stop : s.T) - t)};
}

/* A block's head and rows. Blocks of one group are neighbours: they read the same x and B. */
struct Block {
  int b, part, h, g, slice;
};
static __device__ inline Block block_of(const Ssd &s, int parts) {
  Block k;
  unsigned i = blockIdx.x;
  k.slice = i % s.slices, i /= s.slices;
  k.h = i % s.H, i /= s.H;
  k.part = i % parts, k.b = i / parts;
  k.g = k.h / (s.H / s.G);
  return k;
}

/* Where row r of a chunk stands, counted from row `first` of the ring's arrays (which wrap) or of this call's. */
struct Source {
  bool old;
  int from, wrap;
  size_t first;
  __device__ int operator()(int r) const { return from + r - (from + r >= wrap ? (int)RING : 0); }
};
static __device__ inline Source source(const Ssd &s, const Place &p, const Chunks &k, const Chunk &c, int b) {
  if (c.at < k.ring) return {true, (p.begin + c.at) % RING, RING, (size_t)p.slot * RING};
  return {false, 0, INT32_MAX, (size_t)b * s.T + c.at - k.ring};
}

/* ---- decays -------------------------------------------------------------------------------------------------------------------------- */

/* Of a chunk: cum_t (of log2 a), d, e_t, w_t, w_t d_t; first: the last document's start at or before t, -1: none in this chunk. */
struct alignas(16) Decay {
  log_t cum[Q];
  float d[Q], e[Q], w[Q], wd[Q];
  int first[Q];
  float last; /* e of the last token */
};

/* Token 2 lane + i of a chunk: dt + dt_bias, or what the ring holds, and whether a document starts. */
struct Steps {
  float raw[2];
  bool old, start[2];
};
static __device__ inline Steps load_steps(const Ssd &s, const Source &source, const Chunk &c, int h) {
  Steps v;
  const float bias = s.dt_bias ? s.dt_bias[h] : 0;
  v.old = source.old;
  for (int i = 0; i < 2; i++) {
    const int t = threadIdx.x % 32 * 2 + i;
    const size_t row = source.first + (t < c.n ? source(t) : 0);
    v.raw[i] = t >= c.n ? 0 : v.old ? s.ring.dt[row * s.H + h] : load(s.dt + row * s.H + h) + bias;
    v.start[i] = t < c.n && (v.old ? v.raw[i] < 0 : s.rows.prev && s.rows.prev[row] == -2);
  }
  return v;
}

template <class V> static __device__ inline V scan_add(V v) {
  const int lane = threadIdx.x % 32;
  for (int o = 1; o < 32; o *= 2) {
    const V other = __shfl_up_sync(0xffffffffu, v, o);
    if (lane >= o) v += other;
  }
  return v;
}

/* One warp fills k; A2 = A log2 e. Tokens after the chunk's end have d = 0. */
static __device__ inline void make_decay(Decay *k, const Steps &v, int n, float A2) {
  const int lane = threadIdx.x % 32;
  float d[2];
  log_t cum[2];
  int first[2];
  for (int i = 0; i < 2; i++) d[i] = 2 * lane + i >= n ? 0 : v.old ? fabsf(v.raw[i]) : softplus(v.raw[i]);
  const log_t a = v.start[0] ? 0 : -d[0] * (log_t)A2, b = v.start[1] ? 0 : -d[1] * (log_t)A2;
  const log_t both = scan_add(a + b), before = __shfl_up_sync(0xffffffffu, both, 1);
  cum[0] = (lane ? before : 0) + a, cum[1] = cum[0] + b;
  int last = v.start[1] ? 2 * lane + 1 : v.start[0] ? 2 * lane : -1;
  for (int o = 1; o < 32; o *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, last, o);
    if (lane >= o) last = max(last, other);
  }
  const int earlier = __shfl_up_sync(0xffffffffu, last, 1);
  first[0] = v.start[0] ? 2 * lane : lane ? earlier : -1, first[1] = last;
  const log_t total = __shfl_sync(0xffffffffu, cum[1], 31);
  const int final = __shfl_sync(0xffffffffu, last, 31);
  for (int i = 0; i < 2; i++) {
    const int t = 2 * lane + i;
    k->cum[t] = cum[i], k->d[t] = d[i], k->first[t] = first[i];
    k->e[t] = first[i] < 0 ? exp2_approx((float)cum[i]) : 0;
    k->w[t] = t < n && t >= final ? exp2_approx((float)(total - cum[i])) : 0;
    k->wd[t] = k->w[t] * d[i];
  }
  if (lane == 31) k->last = final < 0 ? exp2_approx((float)total) : 0;
}

/* One body, so that d has the same bits in a call and in the ring. */
static __device__ __noinline__ float ssd_step(float dt) { return softplus(dt); }

static __device__ inline float log2_decay(const Ssd &s, int h) { return exp_(s.A_log[h]) * 1.44269504f; }

/* What a block works on, in shared memory: registers are dear. */
struct Where {
  Block k;
  Place p;
  Chunks all;
  float A2, left; /* left: of a state after a segment */
  __device__ void find(const Ssd &s, int parts) {
    if (threadIdx.x == 0) {
      k = block_of(s, parts), p = place(s, k.b), all = chunks_of(s, p), A2 = log2_decay(s, k.h), left = 1;
    }
    __syncthreads();
  }
};

/* L[t,s] of tokens s, s+1, even s, for one t */
struct alignas(2 * sizeof(log_t)) Two {
  log_t v[2];
};
static __device__ inline float2 decays_between(const Decay *k, log_t cum, int first, int t, int s) {
  const Two c = *(const Two *)(k->cum + s);
  const float a = exp2_approx((float)(cum - c.v[0])), b = exp2_approx((float)(cum - c.v[1]));
  const unsigned span = t - first;
  return make_float2((unsigned)(s - first) <= span ? a : 0, (unsigned)(s + 1 - first) <= span ? b : 0);
}

/* ---- a state in registers --------------------------------------------------------------------------------------------------------------
 *
 * S[m][c][i] is row 16 (warp MT + m) + lane/4 + i/2*8, column 8 c + lane%4*2 + i%2 of a block's rows. */

/* f(S's pair, row, column of the pair) for every pair of neighbours */
template <int MT, int NT, class F> static __device__ inline void each_pair(float (&S)[MT][NT / 8][4], F f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int c = 0; c < NT / 8; c++)
#pragma unroll
      for (int i = 0; i < 4; i += 2) f(S[m][c][i], S[m][c][i + 1], 16 * (warp * MT + m) + lane / 4 + i / 2 * 8, 8 * c + lane % 4 * 2);
}

/* S = scale S + the tile's floats at `from`, (rows,cols) with rows N apart */
template <bool FAST, int MT, int NT>
static __device__ inline void add_state(float (&S)[MT][NT / 8][4], float scale, const float *from, int N, int rows, int cols) {
  each_pair<MT, NT>(S, [&](float &a, float &b, int p, int n) {
    const float *v = from + (ptrdiff_t)p * N + n;
    const bool inside = p < rows && n < cols;
    const float2 two = FAST ? inside ? *(const float2 *)v : make_float2(0, 0) : make_float2(inside ? v[0] : 0, inside && n + 1 < cols ? v[1] : 0);
    a = scale * a + two.x, b = scale * b + two.y;
  });
}
template <bool FAST, int MT, int NT>
static __device__ inline void write_state(float *to, float (&S)[MT][NT / 8][4], int N, int rows, int cols) {
  each_pair<MT, NT>(S, [&](float &a, float &b, int p, int n) {
    float *v = to + (ptrdiff_t)p * N + n;
    const bool inside = p < rows && n < cols;
    if (FAST && inside) *(float2 *)v = make_float2(a, b);
    if (!FAST && inside) v[0] = a;
    if (!FAST && inside && n + 1 < cols) v[1] = b;
  });
}

/* S = last S + sum_s weight[s] X[s]^T Y[s] over n tokens.   X (Q,XCOLS)  Y (Q,NT) */
template <int MT, int NT, int XCOLS>
static __device__ inline void update(float (&S)[MT][NT / 8][4], float last, const real *X, const real *Y, const float *weight, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  each_pair<MT, NT>(S, [&](float &a, float &b, int, int) { a *= last, b *= last; });
#pragma unroll 1
  for (int s = 0; s < n; s += 16) {
    word a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      load<XCOLS, LEFT_T>(a[m], X, s, 16 * (warp * MT + m));
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float2 w = *(const float2 *)(weight + s + lane % 4 * 2 + q / 2 * 8);
        pack(a[m][q], low(a[m][q]) * w.x, high(a[m][q]) * w.y);
      }
    }
#pragma unroll
    for (int c = 0; c < NT / 8; c += 2) {
      word b[4];
      load<NT, RIGHT>(b, Y, s, 8 * c);
#pragma unroll
      for (int m = 0; m < MT; m++) mma2(S[m][c], S[m][c + 1], a[m], b);
    }
  }
}

/* ---- the walk ---------------------------------------------------------------------------------------------------------------------------- */

/* A block carries WALK_ROWS rows of a head's state over chunks and leaves, without outputs,
 * forward (dy NULL): over segment `part`, from its start or from zero: `starts` of the next segment and its `decays`;
 * backward, part 0: the state before every chunk; part 1: the cotangent of the state after every chunk, in reverse, by the same
 * recurrence: dS = e_last dS + sum_t e_t dy_t C_t^T. */
template <bool FAST, int NT>
static __global__ void __launch_bounds__(WALK_THREADS, FAST && sizeof(real) == 2 ? 4 : 3) walk(Ssd s, int parts, int part_chunks) {
  DYNAMIC_SHARED(real, stages);
  __shared__ Decay decay[2];
  __shared__ Where where;
  constexpr int X_TILE = Q * WALK_ROWS, STAGE = X_TILE + Q * NT;
  const int warp = threadIdx.x / 32;
  where.find(s, parts);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Block &k = where.k;
  const Place &p = where.p;
  const Chunks &all = where.all;
  const bool back = s.dy && k.part, forward = !s.dy;
  const int p0 = s.p0 + k.slice * WALK_ROWS, rows = min((int)WALK_ROWS, s.P - p0), cols = min(NT, s.N - s.n0);
  const int begin = forward && k.part ? k.part * part_chunks : all.first, end = forward ? min((k.part + 1) * part_chunks, all.count) : all.count;
  if (begin >= end) return;
  const unsigned head = k.b * s.H + k.h;
  auto tile = [&] { return ((size_t)p.slot * s.H + k.h) * s.P * s.N + (size_t)p0 * s.N + s.n0; };
  auto start = [&](int part) { return s.starts + ((size_t)head * s.parts + part) * s.P * s.N + (size_t)p0 * s.N + s.n0; };

  auto at_step = [&](int i) { return back ? end - 1 - i : begin + i; };
  auto load_chunk = [&](int i) {
    const Chunk c = chunk_at(s, all, at_step(i));
    const Source row = source(s, p, all, c, k.b);
    const int ldx = back ? s.H * s.P : s.G * s.P, ldy = back ? s.H * s.N : s.G * s.N, of = back ? k.h : k.g;
    const real *x = back ? s.dy : row.old ? s.ring.x : s.x, *y = back ? s.C : row.old ? s.ring.B : s.Bm;
    real *X = stages + (i & 1) * STAGE;
    fetch<FAST, Q, WALK_ROWS, WALK_THREADS>(X, x + row.first * ldx + of * s.P + p0, ldx, c.n, rows, row);
    fetch<FAST, Q, NT, WALK_THREADS>(X + X_TILE, y + row.first * ldy + of * s.N + s.n0, ldy, c.n, cols, row);
    cp_async_commit();
  };
  auto steps_of = [&](int i) {
    const Chunk c = chunk_at(s, all, at_step(i));
    return load_steps(s, source(s, p, all, c, k.b), c, k.h);
  };

  float S[1][NT / 8][4] = {};
  if (!back && s.state && !(forward && k.part)) add_state<FAST, 1, NT>(S, 0, s.state + tile(), s.N, rows, cols);
  load_chunk(0);
  if (warp == 0) make_decay(decay, steps_of(0), chunk_at(s, all, at_step(0)).n, where.A2);
  for (int i = 0; i < end - begin; i++) {
    const int c = at_step(i);
    const Chunk now = chunk_at(s, all, c);
    const bool more = i + 1 < end - begin, mine = more && warp == i % (WALK_THREADS / 32);
    Steps ahead;
    const real *X = stages + (i & 1) * STAGE;
    const Decay *d = decay + (i & 1);
    cp_async_wait<0>();
    __syncthreads();
    if (more) load_chunk(i + 1);
    if (mine) ahead = steps_of(i + 1);
    if (back && s.dstate && now.at + now.n == all.stop) add_state<FAST, 1, NT>(S, 1, s.dstate + tile(), s.N, rows, cols);
    if (forward && c == 0 && !k.part && s.state) write_state<FAST, 1, NT>(start(0), S, s.N, rows, cols);
    if (!forward) {
      real *to = s.tiles + (((size_t)k.part * s.B * s.H + head) * s.chunks + c) * s.slices * WALK_ROWS * NT + (size_t)k.slice * WALK_ROWS * NT;
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int q = 0; q < NT / 8; q += 2)
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          word a, b;
          pack(a, S[0][q][half], S[0][q][half + 1]);
          pack(b, S[0][q + 1][half], S[0][q + 1][half + 1]);
          store_row<true>(to + (16 * warp + lane / 4 + 4 * half) * NT, 8 * q, NT, a, b, true, false);
        }
    }
    if (forward || more || (back && s.dstate)) update<1, NT, WALK_ROWS>(S, d->last, X, X + X_TILE, back ? d->e : d->wd, now.n);
    if (threadIdx.x == 0 && c >= 0) where.left *= d->last;
    if (c < 0 && now.at + now.n == all.cut) write_state<FAST, 1, NT>(s.state + tile(), S, s.N, rows, cols);
    if (mine) make_decay(decay + ((i + 1) & 1), ahead, chunk_at(s, all, at_step(i + 1)).n, where.A2);
  }
  if (forward) {
    write_state<FAST, 1, NT>(start(k.part + 1), S, s.N, rows, cols);
    if (threadIdx.x == 0 && !k.slice && !s.n0) s.decays[(size_t)head * s.parts + k.part] = where.left;
  } else if (back && s.dstate) {
    if (!all.stop) add_state<FAST, 1, NT>(S, 1, s.dstate + tile(), s.N, rows, cols);
    write_state<FAST, 1, NT>(s.dstate + tile(), S, s.N, rows, cols);
  }
}

template <bool FAST, int NT> static void run_walk(const Ssd &s, int parts, int part_chunks) {
  const size_t shared = 2 * (Q * WALK_ROWS + Q * NT) * sizeof(real);
  LAUNCH_EARLY((walk<FAST, NT>), (unsigned)((size_t)s.B * parts * s.H * s.slices), WALK_THREADS, shared, s, parts, part_chunks);
}

/* ssd_few.cu: a call with a State of at most PENDING tokens. */
void ssd_few(Ssd s);

/* Whether every row of every array starts at a 16-byte piece and holds whole ones. */
template <class... A> static bool all_vectors(size_t P, size_t N, A *...arrays) {
  uintptr_t bits = 0;
  (void)std::initializer_list<int>{(bits |= (uintptr_t)arrays, 0)...};
  return !(bits & 15) && P % REALS_16 == 0 && N % REALS_16 == 0;
}
#endif
