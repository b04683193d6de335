/* attention_few.cu - attention of few tokens with a State: decode, verification, trees.
 *
 * Keys are cut into chunks at absolute depths. A block computes (max, sum, o) of all queries of a group on one chunk after the
 * other, and the chunks are added in the order of depth, by the group's last block or, where there are many, by a second kernel.
 * A key's place depends on its depth alone and hidden keys weigh exactly 0, so a token's bits depend on what it sees, not on
 * what runs beside it or on how the tokens before came into the cache.
 *
 * Chunks that lie in the cache whole serve all queries of a group. The chunk that holds depth `base`, and the one behind it if
 * this call's tokens reach it, are `own`: one item for a chain, one a token for a tree, where each goes its own path. The other
 * items are `n` chunks each, folded as they come; n, 1 or SPAN, moves work between the two kernels and no bit. */
#include "attention.cuh"

/* Chunks of a span. Spans of one class modulo CLASSES are added one by one, then the classes. */
constexpr int SPAN = 8, CLASSES = 16;

/* A row's partials: `slots` of items, then two of own chunks; each PD floats o, then max (in powers of 2) and sum. */
struct Partials {
  float *data; /* (b of a launch, G, T*rep, slots+2, PD+4) */
  int4 *seen;  /* (B,T): first depth, end, base, first chunk of the row; NULL: the last block of a group adds its chunks */
  int n, slots;
};
/* Blocks of a (b, group) that are done; 0 between launches. */
constexpr int MOST_GROUPS = 4096;
static __device__ unsigned blocks_done[MOST_GROUPS];

template <int PD>
__device__ static inline float *partial(const Attention &a, const Partials &p, int b, int g, int r, int slot) {
  return p.data + ((((size_t)(b - a.begin) * a.G + g) * a.T * a.rep + r) * (p.slots + 2) + slot) * (PD + 4);
}

/* A running (max, sum, o) takes up another with maximum x: sum and o become old a + new b. false: there is nothing in it. */
__device__ static inline bool take_up(float &top, float x, float &a, float &b) {
  if (x == -INFINITY) return false;
  const float most = fmaxf(top, x);
  a = exp2_approx(top - most), b = exp2_approx(x - most), top = most;
  return true;
}
__device__ static inline float add_up(float old, float a, float x, float b) { return __fmaf_rn(old, a, __fmul_rn(x, b)); }

/* ---- the sum of chunks --------------------------------------------------------------------------------------------------- */

namespace {
template <int PD> struct Sum {
  static constexpr int V = PD / 128 ? PD / 128 : 1; /* a lane has columns 4 lane .. +4, 128 further … */
  float top, sum, o[V][4];

  __device__ void clear() {
    top = -INFINITY, sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++) o[v][0] = o[v][1] = o[v][2] = o[v][3] = 0;
  }
  __device__ void load(const float *from) {
    const int c = threadIdx.x % 32 * 4;
    const float2 scalars = __ldcg((const float2 *)(from + PD)); /* another block may have written it */
    top = scalars.x, sum = scalars.y;
#pragma unroll
    for (int v = 0; v < V; v++)
      if (128 * v + c < PD) {
        const float4 x = __ldcg((const float4 *)(from + 128 * v + c));
        o[v][0] = x.x, o[v][1] = x.y, o[v][2] = x.z, o[v][3] = x.w;
      }
  }
  __device__ void store(float *to) const {
    const int c = threadIdx.x % 32 * 4;
#pragma unroll
    for (int v = 0; v < V; v++)
      if (128 * v + c < PD) store_16(to + 128 * v + c, o[v]);
    if (c == 0) to[PD] = top, to[PD + 1] = sum;
  }
  __device__ void add(const Sum &x) {
    float shrink, grow;
    if (!take_up(top, x.top, shrink, grow)) return;
    sum = add_up(sum, shrink, x.sum, grow);
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int c = 0; c < 4; c++) o[v][c] = add_up(o[v][c], shrink, x.o[v][c], grow);
  }
};
}  // namespace

/* A warp: the spans from .. to that are i modulo CLASSES, each the sum of its chunks. row: the query's partials. */
template <int PD, int CHUNK>
__device__ static Sum<PD> add_class(const float *row, const Partials &p, const int4 seen, int i) {
  /* Chunks first .. cached are in items. */
  const int cached = seen.z / CHUNK, first = seen.w, units = SPAN / p.n;
  const int skipped = first / p.n, end = cached > first ? (cached + p.n - 1) / p.n : 0;
  const int from = seen.x / CHUNK / SPAN, to = (seen.y - 1) / CHUNK / SPAN;
  Sum<PD> all, inner, part[SPAN], mine[2];
  all.clear();
  for (int span = from + (i - from % CLASSES + CLASSES) % CLASSES; span <= to; span += CLASSES) {
    inner.clear();
#pragma unroll
    for (int k = 0; k < SPAN; k++) {
      const int unit = span * units + k;
      part[k].clear();
      if (k < units && unit >= skipped && unit < end) part[k].load(row + (size_t)(unit - skipped) * (PD + 4));
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
      mine[k].clear();
      if ((cached + k) / SPAN == span && (cached + k) * CHUNK < seen.y) mine[k].load(row + (size_t)(p.slots + k) * (PD + 4));
    }
#pragma unroll
    for (int k = 0; k < SPAN; k++) inner.add(part[k]);
    inner.add(mine[0]);
    inner.add(mine[1]);
    all.add(inner);
  }
  return all;
}

/* ---- chunks -------------------------------------------------------------------------------------------------------------- */

/* What four warps tell each other about 16 queries. */
struct Shared {
  Seen seen;
  float tops[4][16], sums[4][16];
};

/* Scores s of rows r .. r+16 with this warp's keys, those of depths e .. : scaled, hidden ones -inf; then weights in p_tile
 * (16, CHUNK). top, sum: of this lane's two rows over the chunk. */
template <int CHUNK, int N>
__device__ static inline void chunk_softmax(float (&s)[1][N][4], float (&top)[2], float (&sum)[2], real *p_tile, Shared &x,
                                            const Attention &a, int r, int e) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, j = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = min((r + 8 * i + g) / a.rep, a.T - 1), from = x.seen.from[t] - e, to = x.seen.to[t] - e;
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int c = 2 * i; c < 2 * i + 2; c++) {
        const int key = 8 * (warp * N + n) + 2 * j + c % 2;
        s[0][n][c] = key < from || key >= to ? -INFINITY : s[0][n][c] * a.scale;
        most = fmaxf(most, s[0][n][c]);
      }
    most = quad_max(most);
    if (j == 0) x.tops[warp][8 * i + g] = most;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = 8 * i + g;
    top[i] = fmaxf(fmaxf(x.tops[0][row], x.tops[1][row]), fmaxf(x.tops[2][row], x.tops[3][row]));
    const float level = top[i] == -INFINITY ? 0 : top[i];
    float part = 0;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float u = exp2_approx(s[0][n][2 * i] - level), v = exp2_approx(s[0][n][2 * i + 1] - level);
      part += u + v;
      put(p_tile + at<CHUNK>(row, 8 * (warp * N + n) + 2 * j), u, v);
    }
    part = quad_sum(part);
    if (j == 0) x.sums[warp][row] = part;
  }
  cp_async_wait<0>(); /* the values */
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = 8 * i + g;
    sum[i] = x.sums[0][row] + x.sums[1][row] + x.sums[2][row] + x.sums[3][row];
  }
}

/* One row's (top, sum) and this lane's columns c of o into its partial, which holds (old_top, old_sum) unless it is fresh. */
template <int D>
__device__ static inline void put_partial(float *to, int PD, bool fresh, float old_top, float old_sum, float top, float sum,
                                          const float (&o)[1][D][4], int i) {
  const int warp = threadIdx.x / 32, j = threadIdx.x % 4;
  float most = fresh ? -INFINITY : old_top, shrink = 0, grow = 1;
  if (!take_up(most, top, shrink, grow) && !fresh) return;
#pragma unroll
  for (int n = 0; n < D; n++) {
    float2 *const x = (float2 *)(to + 8 * (warp * D + n) + 2 * j);
    const float2 old = fresh ? make_float2(0, 0) : *x;
    *x = make_float2(add_up(old.x, shrink, o[0][n][2 * i], grow), add_up(old.y, shrink, o[0][n][2 * i + 1], grow));
  }
  if (warp == 0 && j == 0) to[PD] = most, to[PD + 1] = add_up(old_sum, shrink, sum, grow);
}

/* RoPE of rows first .. end of the queries (token major, heads within) in a tile, by 128 threads; all meet before and after. */
template <int PD> __device__ static inline void rotate_queries(real *tile, const Attention &a, int b, int first, int end) {
  const int half = a.P / 2;
  for (int i = threadIdx.x; i < half; i += 128) {
    float cosine = 0, sine = 0;
    for (int row = first, before = -1; row < end; row++) {
      const int t = row / a.rep;
      if (t != before) rope_angle(cosine, sine, a.rope.position[(size_t)b * a.T + t], a.rope.inv_freq[i], a.rope.scale), before = t;
      real *const x = tile + at<PD>(row - first, i);
      float u = load(x), v = load(x + half);
      rotate(u, v, cosine, sine);
      store(x, u), store(x + half, v);
    }
  }
}

/* This call's keys, up to depth `high`, in the tile of depths e .. e+CHUNK. */
template <int PD, int CHUNK>
__device__ static inline void rotate_keys(real *tile, const Attention &a, const Keys &keys, int e, int high) {
  const int half = a.P / 2, begin = max(e, keys.base), end = min(e + CHUNK, high);
  for (int i = threadIdx.x; i < half * max(end - begin, 0); i += 128) {
    const int depth = begin + i / half, c = i % half, t = keys.path ? keys.path[depth - keys.base] : depth - keys.base;
    real *const x = tile + at<PD>(depth - e, c);
    float u = load(x), v = load(x + half), cosine, sine;
    rope_angle(cosine, sine, a.rope.position[(size_t)keys.b * a.T + t], a.rope.inv_freq[c], a.rope.scale);
    rotate(u, v, cosine, sine);
    store(x, u), store(x + half, v);
  }
}

/* Token t of group g to the caches, when everything that reads them is over. */
__device__ static inline void write_token(const Attention &a, int b, int g, int base, int t) {
  const size_t entry = (((size_t)slot_of(a, b) * a.K + entry_at(a, base + t)) * a.G + g) * a.P, mine = key_at(a, b, t, g);
  const int half = a.P / 2;
  for (int c = threadIdx.x; c < a.P; c += blockDim.x) {
    a.vcache[entry + c] = a.v[mine + c];
    if (!a.rope.inv_freq) {
      a.kcache[entry + c] = a.k[mine + c];
    } else if (c < half) {
      float u = load(a.k + mine + c), v = load(a.k + mine + c + half), cosine, sine;
      rope_angle(cosine, sine, a.rope.position[(size_t)b * a.T + t], a.rope.inv_freq[c], a.rope.scale);
      rotate(u, v, cosine, sine);
      store(a.kcache + entry + c, u), store(a.kcache + entry + c + half, v);
    }
  }
}

/* Grid (G, own + items, B); a block goes on to the item that lies as many further as there are blocks for items. Four warps
 * share a chunk's keys for the scores, its columns for the values; 16 queries at a time. */
template <int PD, int CHUNK, int BLOCKS>
static __global__ void __launch_bounds__(128, BLOCKS) attend_few(Attention a, Partials p) {
  constexpr int N = CHUNK / 32, D = PD / 32; /* blocks of 8 keys, of 8 columns, of a warp */
  __shared__ Shared shared;
  DYNAMIC_SHARED(real, k_tile);
  real *const v_tile = k_tile + at<PD>(CHUNK, 0), *const q_tile = v_tile + at<PD>(CHUNK, 0);
  real *const p_tile = q_tile; /* one after the other */
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4;
  const int b = a.begin + blockIdx.z, group = blockIdx.x, own = a.rows.prev ? a.T : 1;
  const int token = a.rows.prev && (int)blockIdx.y < own ? (int)blockIdx.y : -1;
  const int begin = max(token, 0) * a.rep, end = token >= 0 ? begin + a.rep : a.T * a.rep; /* rows: token major, heads within */
  auto load_queries = [&](int r) {
    load_tile<Padded<PD>, 16, 128>(q_tile, Alone(), a.q, a.P, a.whole, 0, end - r, [&](int row) {
      return a.q + query_at(a, b, (r + row) / a.rep, group * a.rep + (r + row) % a.rep);
    });
    cp_async_commit();
  };
  let_next_kernel_start();
  wait_for_previous_kernel();
  load_queries(begin);
  bool queried = true;
  const int base = base_of(a, b), low = base - min(base, a.window ? min(a.K, a.window - 1) : a.K); /* low: the first seen */
  const int cached = base / CHUNK, first = low / CHUNK, skipped = first / p.n;
  const int items = own + (cached > first ? (cached + p.n - 1) / p.n - skipped : 0);
  find_seen(shared.seen, a, b, base, low, token);
  if (p.seen && blockIdx.y == 0 && group == 0 && (int)threadIdx.x < a.T)
    p.seen[(size_t)b * a.T + threadIdx.x] = make_int4(shared.seen.from[threadIdx.x], shared.seen.to[threadIdx.x], base, first);
  Keys keys = keys_of(a, b, group, base);
  if (token >= 0) keys.path = shared.seen.path;
  const int high = token >= 0 ? shared.seen.to[token] : base + a.T;

  for (int item = blockIdx.y; item < items; item += item < own ? items : gridDim.y - own) {
    const int unit = skipped + item - own;
    const int from = item < own ? cached : max(first, unit * p.n);
    const int to = item < own ? (high - 1) / CHUNK + 1 : min((unit + 1) * p.n, cached);
    for (int chunk = from; chunk < to; chunk++) {
      const int e = chunk * CHUNK, slot = item < own ? p.slots + chunk - cached : item - own;
      const bool fresh = item < own || chunk == from;
      if (!queried) load_queries(begin);
      queried = false;
      load_keys<Padded<PD>, CHUNK, 128, false>(k_tile, nullptr, a, keys, a.kcache, a.k, e - base, low - base, high - base);
      cp_async_commit();
      load_keys<Padded<PD>, CHUNK, 128, false>(v_tile, nullptr, a, keys, a.vcache, a.v, e - base, low - base, high - base);
      cp_async_commit();
      for (int r = begin; r < end; r += 16) {
        float old_top[2] = {}, old_sum[2] = {}, top[2], sum[2], *out[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          out[i] = r + 8 * i + row < end ? partial<PD>(a, p, b, group, r + 8 * i + row, slot) : nullptr;
          if (out[i] && !fresh) old_top[i] = out[i][PD], old_sum[i] = out[i][PD + 1];
        }
        if (r > begin)
          load_queries(r), cp_async_wait<0>();
        else
          cp_async_wait<1>(); /* all but the values */
        __syncthreads();
        if (a.rope.inv_freq) {
          rotate_queries<PD>(q_tile, a, b, r, min(r + 16, end));
          if (r == begin && item < own) rotate_keys<PD, CHUNK>(k_tile, a, keys, e, high);
          __syncthreads();
        }
        float s[1][N][4], o[1][D][4] = {};
        score<PD>(s, q_tile, 0, k_tile, warp * (CHUNK / 4));
        chunk_softmax<CHUNK>(s, top, sum, p_tile, shared, a, r, e);
#pragma unroll STEPS
        for (int k = 0; k < CHUNK / 16; k++) {
          Left<real> left;
          load_left<CHUNK>(left, p_tile, 0, k);
#pragma unroll
          for (int n = 0; n < D; n += 2) {
            Right<real> right;
            load_columns<PD>(right, v_tile, 16 * k, (warp * D + n) / 2);
            multiply(o[0][n], o[0][n + 1], left, right);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (out[i]) put_partial(out[i], PD, fresh, old_top[i], old_sum[i], top[i], sum[i], o, i);
        __syncthreads();
      }
    }
  }
  if (p.seen) return;

  /* The last block of (b, group) adds its chunks: a warp a query. */
  if (!last_to_arrive(blocks_done + (b - a.begin) * a.G + group, gridDim.y)) return;
  for (int r = warp; r < a.T * a.rep; r += 4) {
    const int t = r / a.rep, h = group * a.rep + r % a.rep, lane = threadIdx.x % 32;
    const int4 seen = make_int4(shared.seen.from[t], shared.seen.to[t], base, first);
    const float *row = partial<PD>(a, p, b, group, r, 0);
    Sum<PD> total;
    total.clear();
    for (int i = 0; i < CLASSES; i++) total.add(add_class<PD, CHUNK>(row, p, seen, i));
    for (int v = 0; v < total.V; v++)
      for (int c = 0; c < 4; c++)
        if (128 * v + 4 * lane + c < a.P) store(a.o + query_at(a, b, t, h) + 128 * v + 4 * lane + c, total.o[v][c] / total.sum);
    if (a.lse && lane == 0) a.lse[((size_t)b * a.H + h) * a.T + t] = total.top * LN2 + logf(total.sum);
  }
  for (int t = 0; t < a.T; t++) write_token(a, b, group, base, t);
}

/* Grid (T*rep, G, B), a block a query. Block r writes token r/rep to the caches: everything that reads them is over. */
template <int PD, int CHUNK> static __global__ void combine(Attention a, Partials p) {
  __shared__ __align__(16) float total[CLASSES][PD + 4];
  const int r = blockIdx.x, group = blockIdx.y, b = a.begin + blockIdx.z, t = r / a.rep, h = group * a.rep + r % a.rep;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int4 seen = p.seen[(size_t)b * a.T + t];
  const float *row = partial<PD>(a, p, b, group, r, 0);
  for (int i = threadIdx.x / 32; i < CLASSES; i += blockDim.x / 32) add_class<PD, CHUNK>(row, p, seen, i).store(total[i]);
  __syncthreads();
  for (int c = threadIdx.x; c < a.P; c += blockDim.x) {
    float top = -INFINITY, sum = 0, o = 0, shrink, grow;
#pragma unroll
    for (int i = 0; i < CLASSES; i++) {
      if (!take_up(top, total[i][PD], shrink, grow)) continue;
      sum = add_up(sum, shrink, total[i][PD + 1], grow);
      o = add_up(o, shrink, total[i][c], grow);
    }
    store(a.o + query_at(a, b, t, h) + c, o / sum);
    if (a.lse && c == 0) a.lse[((size_t)b * a.H + h) * a.T + t] = top * LN2 + logf(sum);
  }
  if (r % a.rep == 0) write_token(a, b, group, seen.z, t);
}

template <int PD, int CHUNK>
constexpr size_t FEW_SHARED = (2 * CHUNK * PITCH<PD> + 16 * std::max(PITCH<PD>, PITCH<CHUNK>)) * sizeof(real);

/* n: chunks of an item, 0: as suits the size. Few groups: the blocks that there is room for at once take the items in turn, so
 * none is launched in vain where contexts are short. Many: so many that the last ones end together. */
template <int PD, int CHUNK> static bool run_few(const Attention &a, int n = 0) {
  constexpr size_t SHARED = FEW_SHARED<PD, CHUNK>;
  constexpr int BLOCKS = (int)std::min<size_t>(4, (227 << 10) / (SHARED + (2 << 10)));
  if (!fits(SHARED)) return false;
  const size_t groups = (size_t)a.B * a.G, spans = ceil_div(a.K, CHUNK * SPAN);
  Partials p = {};
  p.n = n ? n : groups * spans >= 2048 ? SPAN : 1;
  p.slots = (int)ceil_div(a.K, CHUNK * p.n) + 2;
  const size_t row = (size_t)a.G * a.T * a.rep * (p.slots + 2) * (PD + 4) * sizeof(float);
  const size_t seen = (size_t)a.B * a.T * sizeof(int4), most = std::max<size_t>(1, ((size_t)1 << 27) / row);
  const int rows = (int)std::min<size_t>(std::min(a.B, 65535), most); /* of b, whose partials fit in 128 MB */
  unsigned char *scratch = (unsigned char *)device_scratch(seen + rows * row);
  if (!scratch) return true;
  const bool together = spans <= 4 && a.T * a.rep <= 8 && a.B <= rows && groups <= MOST_GROUPS; /* a block can add a group's chunks */
  p.seen = together ? nullptr : (int4 *)scratch;
  p.data = (float *)(scratch + seen);
  const int own = a.rows.prev ? a.T : 1;
  const long long room = BLOCKS * multiprocessors(), launched = (long long)rows * a.G; /* groups at once */
  const int blocks = (int)(4 * launched > room ? 4096 / launched : room / launched - own);
  const unsigned items = std::min(p.slots, std::max(1, blocks)), warps = spans >= 8 ? 16 : spans >= 4 ? 8 : 4;
  in_parts(a, [&](const Attention &a, unsigned count) {
    LAUNCH_EARLY((attend_few<PD, CHUNK, BLOCKS>), dim3(a.G, own + items, count), 128, SHARED, a, p);
    if (!together) LAUNCH_EARLY((combine<PD, CHUNK>), dim3(a.T * a.rep, a.G, count), 32 * warps, 0, a, p);
  }, rows);
  return true;
}

bool attend_few_tokens(const Attention &a) {
  return padded(a.P, [&](auto width) {
    constexpr int PD = width < 64 ? 64 : width, CHUNK = PD <= 128 ? 128 : 64;
    if (run_few<PD, CHUNK>(a)) return true;
    if constexpr (FEW_SHARED<PD, CHUNK> > LEAST_SHARED && CHUNK > 64) return run_few<PD, 64>(a);
    return false;
  });
}
