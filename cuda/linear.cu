/* linear.cu - y = x W^T and its backward; embedding. Few tokens: few_rows.cuh, row_tiles.cuh; many: cuBLASLt. What looks at a
 * matrix's dtype while it computes is here. */
#include "row_tiles.cuh"

/* ---- few tokens ---------------------------------------------------------------------------------------------------------- */

static size_t shared_limit() {
  static const size_t limit = [] {
    int device = 0, bytes = 0;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return (size_t)bytes;
  }();
  return limit;
}

/* Products' units of 8 outputs, one behind the other; a gated pair has those of one product. */
[[maybe_unused]] static unsigned find_units(Few *c, bool gated) {
  size_t units = 0;
  for (int i = 0; i < c->n; i++) {
    c->first[i] = (unsigned)units;
    if (!gated || !i) units += ceil_div(c->p[i].O, 8);
  }
  if (gated) c->first[1] = (unsigned)units;
  return c->first[c->n] = (unsigned)units;
}

/* How few_rows is launched: the deepest rings that fit, beside staged rows of x if those fit; a norm and a gated pair need them staged.
 * More than half of the shared memory, so that the next launch's blocks come one by one, each where a block of this one ends.
 * depth 0: it is not. */
struct Shape {
  int depth;
  bool staged;
  size_t shared;
};
constexpr int TILE = 4; /* units of a tile */
[[maybe_unused]] static Shape choose(const Few &c, bool gated) {
  const int cols = c.M > 8 ? 2 : 1;
  for (bool staged : {true, false})
    for (int depth : {8, 4}) {
      const size_t bytes = few_shared(TILE, cols, depth, staged, c.M, c.K);
      if (bytes <= shared_limit() && (staged || !(c.norm || gated))) return {depth, staged, std::max(bytes, shared_limit() / 2 + 1)};
    }
  return {};
}

template <int COLS, int DEPTH, bool STAGED, bool GATED> static void start_few(Few &c, size_t shared) {
  const unsigned units = find_units(&c, GATED);
  LAUNCH_EARLY((few_rows<TILE, COLS, DEPTH, STAGED, GATED>), blocks_for(units, 1, multiprocessors()), THREADS, shared, c);
}
template <int COLS, int DEPTH> static void start_few(Few &c, const Shape &s, bool gated) {
  if (gated) return start_few<COLS, DEPTH, true, true>(c, s.shared);
  if (s.staged) return start_few<COLS, DEPTH, true, false>(c, s.shared);
  start_few<COLS, DEPTH, false, false>(c, s.shared);
}

/* All products in one launch, if that is possible: at most 16 rows of bf16 and whole 16-byte vectors. `real` is bf16 where R
 * is. */
template <class R> static bool one_launch(Few c, bool gated) {
  if constexpr (sizeof(R) != sizeof(bf16)) return false;
  uintptr_t vectors = (uintptr_t)c.x | c.K * sizeof(bf16);
  for (int i = 0; i < c.n; i++) {
    if (c.p[i].w.type != BFLOAT16) return false;
    vectors |= (uintptr_t)c.p[i].w.data;
  }
  if (c.M > 16 || vectors & 15) return false;
  const Shape s = choose(c, gated);
  if constexpr (sizeof(R) == sizeof(bf16)) {
    if (s.depth == 8 && c.M <= 8) start_few<1, 8>(c, s, gated);
    if (s.depth == 8 && c.M > 8) start_few<2, 8>(c, s, gated);
    if (s.depth == 4 && c.M <= 8) start_few<1, 4>(c, s, gated);
    if (s.depth == 4 && c.M > 8) start_few<2, 4>(c, s, gated);
  }
  return s.depth > 0;
}

/* ---- more rows: tiles ---------------------------------------------------------------------------------------------------- */

/* A shape of row_tiles. fastest: with the deepest ring that Hopper's shared memory holds. */
struct Tiling {
  int mmas, cols, par;
  size_t shared;
  void (*start)(const Tiles &, unsigned blocks, size_t shared);
};
template <class R, int MMAS, int COLS, int PAR, int DEPTH, bool ALIGNED>
static void start_row_tiles(const Tiles &c, unsigned blocks, size_t shared) {
  LAUNCH_EARLY((row_tiles<MMAS, COLS, PAR, DEPTH, ALIGNED>), blocks, THREADS, shared, c);
}
template <class R, int MMAS, int COLS, int PAR, int DEPTH, bool ALIGNED = true> constexpr Tiling tiling() {
  return {MMAS, COLS, PAR, tiles_shared(MMAS, COLS, PAR, DEPTH), start_row_tiles<R, MMAS, COLS, PAR, DEPTH, ALIGNED>};
}
constexpr int deepest(int mmas, int cols, int par) {
  for (int depth = 6; depth > 3; depth--)
    if (tiles_shared(mmas, cols, par, depth) <= 232448) return depth;
  return 3;
}
template <class R, int MMAS, int COLS, int PAR> constexpr Tiling fastest() {
  return tiling<R, MMAS, COLS, PAR, deepest(MMAS, COLS, PAR)>();
}
/* For any alignment; then the first fits every card, and the lines have 32, 64, 96, 128, 160 rows. */
template <class R> constexpr Tiling GENERAL = tiling<R, 4, 2, 4, 3, false>();
template <class R> constexpr Tiling TILINGS[] = {
    tiling<R, 4, 2, 4, 3>(),
    fastest<R, 4, 2, 4>(), fastest<R, 5, 2, 4>(), fastest<R, 6, 2, 4>(), fastest<R, 7, 2, 4>(), fastest<R, 8, 2, 4>(),
    fastest<R, 4, 4, 4>(), fastest<R, 5, 4, 4>(), fastest<R, 6, 4, 4>(), fastest<R, 7, 4, 4>(), fastest<R, 8, 4, 4>(),
    fastest<R, 4, 3, 2>(), fastest<R, 5, 3, 2>(), fastest<R, 6, 3, 2>(), fastest<R, 7, 3, 2>(), fastest<R, 8, 3, 2>(),
    fastest<R, 4, 4, 2>(), fastest<R, 5, 4, 2>(), fastest<R, 6, 4, 2>(), fastest<R, 7, 4, 2>(), fastest<R, 8, 4, 2>(),
    fastest<R, 4, 5, 2>(), fastest<R, 5, 5, 2>(), fastest<R, 6, 5, 2>(), fastest<R, 7, 5, 2>()};

struct Tiled {
  const Tiling *tiling;
  unsigned splits;
};
static size_t outputs_tiles(const Tiling &t, size_t units) { return ceil_div(units, 2 * t.mmas); }
static size_t row_tiles_of(const Tiling &t, size_t M) { return ceil_div(M, rows_of(t.cols, t.par)); }
[[maybe_unused]] static size_t parts_bytes(const Tiled &t, size_t units, size_t M) {
  const size_t tiles = outputs_tiles(*t.tiling, units) * row_tiles_of(*t.tiling, M);
  return t.splits > 1 ? tiles * PARTS * 16 * t.tiling->mmas * rows_of(t.tiling->cols, t.tiling->par) * sizeof(float) : 0;
}

/* Clocks that a call takes, roughly: a multiprocessor gets some 32 bytes a clock while it fetches W and x, and does some 1800
 * FLOPs a clock; sums in scratch travel at some 48. */
[[maybe_unused]] static double clocks(const Tiling &t, unsigned splits, size_t units, size_t M, size_t K) {
  const double outs = 16 * t.mmas, rows = rows_of(t.cols, t.par);
  const double parts = splits > 1 ? PARTS * outs * rows * sizeof(float) / 48 : 0;
  const size_t items = outputs_tiles(t, units) * splits * row_tiles_of(t, M);
  const double bytes = 2 * (outs + (rows < M ? rows : M)) / 32, flops = 2 * outs * rows / 1800;
  const double memory = 2.0 * 8 * units * K / 2400; /* all of W, once */
  const double item = (double)K / splits * (bytes > flops ? bytes : flops) + 1500 + outs * rows / 8;
  const double work = ceil_div(items, multiprocessors()) * item;
  return (work > memory ? work : memory) + work / 16 + parts;
}
template <class R> static Tiled choose_tiles(size_t units, size_t M, size_t K, bool aligned) {
  Tiled best = {&GENERAL<R>, 1};
  double least = INFINITY;
  for (const Tiling &t : TILINGS<R>)
    for (unsigned splits = 1; aligned && t.shared <= shared_limit() && splits <= (unsigned)(PARTS / t.par); splits *= 2) {
      const double cost = clocks(t, splits, units, M, K);
      if (splits > 1 && outputs_tiles(t, units) * row_tiles_of(t, M) > MOST_SPLIT_TILES) continue;
      if (cost < least) least = cost, best = {&t, splits};
    }
  return best;
}

/* The products of c as row_tiles takes them. */
[[maybe_unused]] static Tiles find_tiles(const Few &c, bool gated) {
  Tiles all = {};
  const size_t vector = c.how & FLOATS ? 4 : 8;
  size_t units = 0;
  all.n = gated ? 1 : c.n, all.how = c.how, all.M = c.M, all.K = c.K, all.gated = gated, all.x = c.x, all.whole = true;
  for (int i = 0; i < c.n; i++) {
    all.p[i] = c.p[i];
    all.whole = all.whole && c.p[i].O % vector == 0 && !((uintptr_t)c.p[i].y & 15);
    if (i < all.n) units += (1 + gated) * ceil_div(c.p[i].O, 8), all.first[i + 1] = (unsigned)units;
  }
  return all;
}

[[maybe_unused]] static void run_tiles(Tiles c, const Tiled &t) {
  c.along = (unsigned)row_tiles_of(*t.tiling, c.M), c.splits = t.splits;
  c.items = (unsigned)outputs_tiles(*t.tiling, c.first[c.n]) * c.along * c.splits;
  t.tiling->start(c, blocks_for(c.items, 1, multiprocessors()), t.tiling->shared);
}

static void normalise(real *to, const Few &c) {
  LAUNCH_EARLY(norm_rows, blocks_for(c.M, 1, 1 << 16), THREADS, 0, to, c.x, c.norm, c.eps, (size_t)c.M, c.K);
}
static size_t normed_bytes(const Few &c) { return c.norm ? (c.M * c.K * sizeof(real) + 255) / 256 * 256 : 0; }

/* All products in a launch, of any number of rows; a norm is another before it. */
template <class R> static void start_tiles(const Few &c, bool gated) {
  Tiles all = find_tiles(c, gated);
  uintptr_t vectors = (c.norm ? 0 : (uintptr_t)c.x) | c.K * sizeof(bf16);
  for (int i = 0; i < c.n; i++) vectors |= (uintptr_t)c.p[i].w.data;
  const size_t units = all.first[all.n];
  const Tiled t = choose_tiles<R>(units, c.M, c.K, !(vectors & 15));
  const size_t normed = normed_bytes(c), parts = parts_bytes(t, units, c.M);
  unsigned char *scratch = normed + parts ? (unsigned char *)device_scratch(normed + parts) : nullptr;
  if (!scratch && normed + parts) return;
  if (c.norm) {
    normalise((real *)scratch, c);
    all.x = (const real *)scratch;
  }
  all.parts = (float *)(scratch + normed);
  run_tiles(all, t);
}

/* Few tokens in bf16: whatever is asked for, in one launch. */
template <class R> static bool few_launch(const Few &c, bool gated) {
  if constexpr (sizeof(R) == sizeof(bf16)) {
    for (int i = 0; i < c.n; i++)
      if (c.p[i].w.type != BFLOAT16) return false;
    if (!one_launch<R>(c, gated)) start_tiles<R>(c, gated);
    return true;
  }
  return false;
}

/* ---- weights that are float, or bf16 in a float module ------------------------------------------------------------------- */

template <class W> static void start_floats(const Product &p, const real *x, int how, size_t M, size_t K) {
  const W *w = (const W *)p.w.data;
  const bool whole = !(K % 4 || (uintptr_t)w % (4 * sizeof(W)) || (uintptr_t)x % (4 * sizeof(real)));
  const dim3 grid(blocks_for(p.O, 16), blocks_for(M, 8, 65535));
  const auto few_floats_of = M == 1 ? few_floats<W, 1> : few_floats<W, 8>;
  LAUNCH_EARLY(few_floats_of, grid, 128, 0, p.y, x, w, p.bias, how, M, K, p.O, whole);
}

/* One product of M rows of few tokens, of the kinds that few_launch leaves. */
static void few_product(const Product &p, const real *x, int how, size_t M, size_t K) {
  if (p.w.type == FLOAT32)
    start_floats<float>(p, x, how, M, K);
  else
    start_floats<bf16>(p, x, how, M, K);
}

/* ---- many tokens: cuBLASLt ----------------------------------------------------------------------------------------------- */

template <class D, class S>
static __global__ void convert(D *dst, const S *src, size_t from_row_to_row, size_t rows, size_t cols) {
  const size_t stride = (size_t)gridDim.x * blockDim.x;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * cols; i += stride)
    store(dst + i, load(src + i / cols * from_row_to_row + i % cols));
}

/* W's elements (rows,cols), ld apart in W, as `real` in scratch (rows,cols): cuBLASLt wants both operands of one type. */
static void widen_or_round(void *scratch, Matrix w, size_t first, size_t ld, size_t rows, size_t cols) {
  const unsigned blocks = blocks_for(rows * cols, 256, 32 * multiprocessors());
  if (w.type == FLOAT32)
    LAUNCH((convert<real, float>), blocks, 256, 0, (real *)scratch, (const float *)w.data + first, ld, rows, cols);
  else
    LAUNCH((convert<real, bf16>), blocks, 256, 0, (real *)scratch, (const bf16 *)w.data + first, ld, rows, cols);
}

/* Of n rows or columns of `other` elements each, how many are converted at a time; whole vectors of whatever they end in. */
static size_t chunk_of(size_t n, size_t other) {
  const size_t most = ((size_t)16 << 20) / (other + 1) / 256 * 256 + 256;
  return n < most ? n : most;
}
static size_t converted(const Product &p, size_t K) { return p.w.type == REAL_TYPE ? 0 : chunk_of(p.O, K) * K * sizeof(real); }

static __global__ void add_bias(real *y, const float *bias, size_t n, size_t O) {
  const size_t stride = (size_t)gridDim.x * blockDim.x;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) store(y + i, load(y + i) + bias[i % O]);
}

static void many_product(const Product &p, const real *x, int how, size_t M, size_t K, void *scratch) {
  const int add = how & ADD, type = how & FLOATS ? FLOAT32 : REAL_TYPE;
  const size_t size = type == FLOAT32 ? sizeof(float) : sizeof(real);
  const size_t O = p.O, step = p.w.type == REAL_TYPE ? O : chunk_of(O, K);
  if (!K && !add) device_zero(p.y, M * O * size);
  for (size_t o = 0; K && o < O; o += step) {
    const size_t n = step < O - o ? step : O - o;
    if (p.w.type != REAL_TYPE) widen_or_round(scratch, p.w, o * K, K, n, K);
    gemm((char *)p.y + o * size, type, O, x, K, 0, p.w.type == REAL_TYPE ? p.w.data : scratch, K, 1, REAL_TYPE, add, M, n, K);
  }
  if (p.bias) LAUNCH(add_bias, blocks_for(M * O, 256, 32 * multiprocessors()), 256, 0, p.y, p.bias, M * O, O);
}

/* ---- the products of a call ---------------------------------------------------------------------------------------------- */

/* Scratch for products one after the other: the rows normalised, then `more` bytes, then W's part in the type of x. */
struct Room {
  real *normed;
  void *more, *w;
};
static bool make_room(Room *room, const Few &c, bool few, size_t more) {
  const size_t normed = normed_bytes(c);
  size_t w = 0;
  for (int i = 0; i < c.n && !few; i++) w = converted(c.p[i], c.K) > w ? converted(c.p[i], c.K) : w;
  more = (more + 255) / 256 * 256;
  unsigned char *memory = normed + more + w ? (unsigned char *)device_scratch(normed + more + w) : nullptr;
  *room = {(real *)memory, memory + normed, memory + normed + more};
  return memory || !(normed + more + w);
}

static void one_by_one(const Few &c, const Room &room, bool few) {
  const real *x = c.x;
  if (c.norm) {
    normalise(room.normed, c);
    x = room.normed;
  }
  for (int i = 0; i < c.n; i++)
    if (!c.p[i].O)
      continue;
    else if (few)
      few_product(c.p[i], x, c.how, c.M, c.K);
    else
      many_product(c.p[i], x, c.how, c.M, c.K, room.w);
}

void linears_forward(const Product *p, int n, const real *x, const float *norm, float eps, int add, size_t B, size_t T,
                     size_t K) {
  Few c = {};
  Room room;
  c.x = x, c.norm = norm, c.eps = eps, c.how = add ? ADD : 0, c.M = (unsigned)(B * T), c.K = K;
  for (int i = 0; i < n; i++)
    if (p[i].O) c.p[c.n++] = p[i];
  if (!c.M || !c.n) return;
  if (T <= FEW && few_launch<real>(c, false)) return;
  if (make_room(&room, c, T <= FEW, 0)) one_by_one(c, room, T <= FEW);
}

void logits_forward(float *y, const real *x, Matrix w, size_t B, size_t T, size_t K, size_t O) {
  Few c = {};
  Room room;
  c.x = x, c.how = FLOATS, c.M = (unsigned)(B * T), c.K = K, c.n = 1;
  c.p[0] = {(real *)(void *)y, w, nullptr, O};
  if (!c.M || !O) return;
  if (T <= FEW && few_launch<real>(c, false)) return;
  if (make_room(&room, c, T <= FEW, 0)) one_by_one(c, room, T <= FEW);
}

void swiglu_linear_forward(real *y, const real *x, const float *norm, float eps, Matrix wg, const float *bg, Matrix wu,
                           const float *bu, size_t B, size_t T, size_t K, size_t F) {
  Few c = {};
  Room room;
  c.x = x, c.norm = norm, c.eps = eps, c.M = (unsigned)(B * T), c.K = K, c.n = 2;
  c.p[0] = {y, wg, bg, F}, c.p[1] = {y, wu, bu, F};
  if (!c.M || !F) return;
  if (T <= FEW && few_launch<real>(c, true)) return;
  if (!make_room(&room, c, T <= FEW, c.M * F * sizeof(real))) return;
  c.p[1].y = (real *)room.more;
  one_by_one(c, room, T <= FEW);
  swiglu_forward(y, y, c.p[1].y, c.M * F);
}

void linear_forward(real *y, const real *x, Matrix w, const float *bias, int add, size_t B, size_t T, size_t K, size_t O) {
  const Product p = {y, w, bias, O};
  linears_forward(&p, 1, x, nullptr, 0, add, B, T, K);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

/* Sums of dy's columns over a run of rows: part (runs,O). 32 columns a block, 8 rows at a time. */
static __global__ void sum_columns(float *part, const real *dy, size_t run, size_t M, size_t O) {
  __shared__ float sums[8][33];
  const size_t o = (size_t)blockIdx.x * 32 + threadIdx.x, first = blockIdx.y * run, end = first + run < M ? first + run : M;
  float sum = 0;
  for (size_t m = first + threadIdx.y; m < end && o < O; m += 8) sum += load(dy + m * O + o);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || o >= O) return;
  sum = 0;
  for (int r = 0; r < 8; r++) sum += sums[r][threadIdx.x];
  part[blockIdx.y * O + o] = sum;
}
static __global__ void add_parts(float *dbias, const float *part, size_t runs, size_t O) {
  const size_t o = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (o >= O) return;
  float sum = 0;
  for (size_t r = 0; r < runs; r++) sum += part[r * O + o];
  dbias[o] += sum;
}

static void bias_gradient(float *dbias, const real *dy, size_t M, size_t O) {
  const size_t run = M < 64 * 64 ? 64 : ceil_div(M, 64), runs = ceil_div(M, run);
  float *part = (float *)device_scratch(runs * O * sizeof(float));
  if (!part) return;
  LAUNCH(sum_columns, dim3(blocks_for(O, 32), (unsigned)runs), dim3(32, 8), 0, part, dy, run, M, O);
  LAUNCH(add_parts, blocks_for(O, 256), 256, 0, dbias, part, runs, O);
}

/* dx = dy W; a W of another type is converted in runs of columns, so that a dx is rounded once. */
static void input_gradient(real *dx, const real *dy, Matrix w, int add, size_t M, size_t K, size_t O) {
  if (w.type == REAL_TYPE) return gemm(dx, REAL_TYPE, K, dy, O, 0, w.data, K, 0, REAL_TYPE, add, M, K, O);
  const size_t step = chunk_of(K, O);
  void *scratch = device_scratch(O * step * sizeof(real));
  for (size_t k = 0; scratch && k < K; k += step) {
    const size_t n = step < K - k ? step : K - k;
    widen_or_round(scratch, w, k, K, O, n);
    gemm(dx + k, REAL_TYPE, K, dy, O, 0, scratch, n, 0, REAL_TYPE, add, M, n, O);
  }
}

void linear_backward(real *dx, float *dw, float *dbias, const real *dy, const real *x, Matrix w, int add, size_t M, size_t K,
                     size_t O) {
  if (dx && !O && !add) device_zero(dx, M * K * sizeof(real));
  if (!M || !O) return;
  if (dx && K) input_gradient(dx, dy, w, add, M, K, O);
  if (dw && K) gemm(dw, FLOAT32, K, dy, O, 1, x, K, 0, REAL_TYPE, 1, O, K, M);
  if (dbias) bias_gradient(dbias, dy, M, O);
}

/* ---- embedding ----------------------------------------------------------------------------------------------------------- */

template <class W> static __global__ void embed(real *y, const W *w, const int32_t *ids, size_t C, bool whole) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const W *from = w + (size_t)ids[blockIdx.x] * C;
  real *to = y + (size_t)blockIdx.x * C;
  if (whole)
    for (size_t c = threadIdx.x; c < C / REALS_16; c += blockDim.x) ((uint4 *)to)[c] = ((const uint4 *)from)[c];
  else
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) store(to + c, load(from + c));
}

void embedding_forward(real *y, Matrix w, const int32_t *ids, size_t M, size_t C) {
  const bool whole = w.type == REAL_TYPE && C % REALS_16 == 0 && !(((uintptr_t)y | (uintptr_t)w.data) & 15);
  if (w.type == FLOAT32)
    LAUNCH_EARLY((embed<float>), (unsigned)M, 256, 0, y, (const float *)w.data, ids, C, whole);
  else
    LAUNCH_EARLY((embed<bf16>), (unsigned)M, 256, 0, y, (const bf16 *)w.data, ids, C, whole);
}

/* Block m adds the rows of all tokens that are ids[m], in order, if none of them stands before m: REALS_16 columns a thread, in
 * registers. Several rows are under way together: an id may be every twentieth. */
static __global__ void __launch_bounds__(256)
    embed_gradient(float *dw, const real *dy, const int32_t *ids, size_t M, size_t C, bool whole) {
  constexpr int RUN = 2048, EACH = REALS_16, AHEAD = 4;
  __shared__ unsigned short found[RUN]; /* where in a run of tokens the id stands */
  __shared__ unsigned counts[8];
  const size_t m = blockIdx.x, column = ((size_t)blockIdx.y * 256 + threadIdx.x) * EACH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, here = column < C ? (int)min(C - column, (size_t)EACH) : 0;
  const int32_t id = ids[m];
  for (size_t i = 0; i < m; i += RUN) {
    int before = 0;
#pragma unroll
    for (int u = 0; u < RUN / 256; u++) {
      const size_t at = i + u * 256 + threadIdx.x;
      before |= at < m && ids[at] == id;
    }
    if (__syncthreads_or(before)) return;
  }
  float *const to = dw + (size_t)id * C + column;
  float sum[EACH] = {};
  auto fours = [&](auto f) {
#pragma unroll
    for (int e = 0; e < EACH; e += 4) f(sum + e, *(float4 *)(to + e));
  };
  if (whole && here)
    fours([](float *s, float4 &v) { s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w; });
#pragma unroll
  for (int e = 0; e < EACH; e++)
    if (!whole && e < here) sum[e] = to[e];
  for (size_t i = m; i < M; i += RUN) {
    unsigned same[RUN / 256], count = 0, total = 0;
#pragma unroll
    for (int u = 0; u < RUN / 256; u++) {
      const size_t at = i + warp * (RUN / 8) + u * 32 + lane;
      same[u] = __ballot_sync(0xffffffffu, at < M && ids[at] == id);
      count += __popc(same[u]);
    }
    if (lane == 0) counts[warp] = count;
    if (!__syncthreads_or(count)) continue;
    for (int w = 0; w < 8; w++) {
      if (w == warp) count = total;
      total += counts[w];
    }
#pragma unroll
    for (int u = 0; u < RUN / 256; u++) {
      if (same[u] >> lane & 1) found[count + __popc(same[u] & ((1u << lane) - 1))] = warp * (RUN / 8) + u * 32 + lane;
      count += __popc(same[u]);
    }
    __syncthreads();
    for (unsigned k = 0; k < total; k += AHEAD) {
      float row[AHEAD][EACH] = {};
#pragma unroll
      for (int q = 0; q < AHEAD; q++) {
        if (k + q >= total) break;
        const real *from = dy + (i + found[k + q]) * C + column;
        if (whole && here) load_16(row[q], from);
        for (int e = 0; !whole && e < here; e++) row[q][e] = load(from + e);
      }
#pragma unroll
      for (int q = 0; q < AHEAD; q++)
        if (k + q < total)
#pragma unroll
          for (int e = 0; e < EACH; e++) sum[e] += row[q][e];
    }
    __syncthreads(); /* before found and counts are written again */
  }
  if (whole && here)
    fours([](const float *s, float4 &v) { v = make_float4(s[0], s[1], s[2], s[3]); });
#pragma unroll
  for (int e = 0; e < EACH; e++)
    if (!whole && e < here) to[e] = sum[e];
}

void embedding_backward(float *dw, const real *dy, const int32_t *ids, size_t M, size_t C) {
  LAUNCH(embed_gradient, dim3((unsigned)M, blocks_for(C, 256 * REALS_16)), 256, 0, dw, dy, ids, M, C,
         C % REALS_16 == 0 && all_aligned(dw, dy));
}
