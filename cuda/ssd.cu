/* ssd.cu - Mamba-2's forward: csrc/ssd.c on the GPU.
 *
 * Many tokens. A block walks the chunks of a head's sequence in order, its rows of the state in registers: G = C B^T, M = L G d + D
 * (bf16, in shared memory), y = e C S + M x, then the state's update; chunks come through cp.async, one ahead. Where the heads of a
 * batch are too few to fill the GPU, a row is cut into segments: `walk` first finds what each segment adds to a state that starts
 * from zero, and a segment's block begins by adding those before it up.
 *
 * Few tokens with a State. A block holds rows of a head's checkpoint in registers, read once; what came since is replayed in the
 * quadratic form (csrc/ssd.c). All sums have an order that depends on a token's path and on N alone, and products are added by
 * explicit fmaf, so that a token's bits do not depend on the kernel's template or on what else is in the call. */
#include "ssd.cuh"

/* ---- many tokens ------------------------------------------------------------------------------------------------------------ */

template <bool FAST, int MT, int WARPS, int NT> static __global__ void __launch_bounds__(32 * WARPS, sizeof(real) == 2 ? 2 : 1) outputs(Ssd s, int part_chunks) {
  DYNAMIC_SHARED(real, stages);
  constexpr int PT = 16 * MT * WARPS, X_TILE = Q * PT, STAGE = X_TILE + 2 * Q * NT;
  __shared__ Decay decay[2];
  real *M = stages + 2 * STAGE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = 16 * MT * warp;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Block k = block_of(s, s.parts);
  const Place p = place(s, k.b);
  const Chunks all = chunks_of(s, p);
  const int p0 = k.slice * PT, rows = min(PT, s.P - p0), cols = min(NT, s.N - s.n0);
  const int begin = s.parts > 1 ? k.part * part_chunks : all.first, end = min((k.part + 1) * part_chunks, all.count);
  if (begin >= end) return;
  const size_t head = (size_t)k.b * s.H + k.h, first = (size_t)p0 * s.N + s.n0, tile = ((size_t)p.slot * s.H + k.h) * s.P * s.N + first;
  const float A2 = log2_decay(s, k.h), D = s.Dskip && !s.n0 ? s.Dskip[k.h] : 0;

  auto load_chunk = [&](int c) {
    const Chunk to_come = chunk_at(s, all, c);
    const Source row = source(s, p, all, to_come, k.b);
    const int ldx = s.G * s.P, ldy = s.G * s.N, ldc = s.H * s.N;
    real *X = stages + (c & 1) * STAGE, *Y = X + X_TILE;
    fetch<FAST, Q, PT, 32 * WARPS>(X, (row.old ? s.ring.x : s.x) + row.first * ldx + k.g * s.P + p0, ldx, to_come.n, rows, row);
    fetch<FAST, Q, NT, 32 * WARPS>(Y, (row.old ? s.ring.B : s.Bm) + row.first * ldy + k.g * s.N + s.n0, ldy, to_come.n, cols, row);
    if (!row.old) fetch<FAST, Q, NT, 32 * WARPS>(Y + Q * NT, s.C + row.first * ldc + k.h * s.N + s.n0, ldc, to_come.n, cols, row);
    cp_async_commit();
  };
  auto steps_of = [&](int c) {
    const Chunk to_come = chunk_at(s, all, c);
    return load_steps(s, source(s, p, all, to_come, k.b), to_come, k.h);
  };

  load_chunk(begin);
  if (warp == 0) make_decay(decay + (begin & 1), steps_of(begin), chunk_at(s, all, begin).n, A2);
  float S[MT][NT / 8][4] = {};
  bool live = s.state || k.part;
  if (s.parts == 1 && s.state) add_state<FAST, MT, NT>(S, 0, s.state + tile, s.N, rows, cols);
  for (int i = s.state && !k.part ? 0 : 1; s.parts > 1 && i <= k.part; i++) { /* segment 1's start is whole */
    const size_t part = head * s.parts + i;
    add_state<FAST, MT, NT>(S, i > 1 ? s.decays[part - 1] : 0, s.starts + part * s.P * s.N + first, s.N, rows, cols);
  }

  for (int c = begin; c < end; c++) {
    const Chunk now = chunk_at(s, all, c);
    const real *X = stages + (c & 1) * STAGE, *Y = X + X_TILE, *C = Y + Q * NT;
    const Decay *d = decay + (c & 1);
    const bool more = c + 1 < end, mine = more && warp == (c & (WARPS - 1));
    Steps ahead;
    cp_async_wait<0>();
    __syncthreads();
    if (more) load_chunk(c + 1);
    if (mine) ahead = steps_of(c + 1);

    if (c >= 0) {
      const int blocks = (now.n + 15) / 16;
      for (int index = warp; index < blocks * (blocks + 1) / 2; index += WARPS) {
        int i, j;
        lower_block(index, &i, &j);
        float G[2][4] = {};
        dots_16<NT>(G, C, i, Y, j);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int t = 16 * i + lane / 4 + 8 * half, first_of_t = d->first[t];
          const log_t cum = d->cum[t];
#pragma unroll
          for (int n = 0; n < 2; n++) {
            const int u = 16 * j + 8 * n + lane % 4 * 2;
            const float2 L = decays_between(d, cum, first_of_t, t, u), step = *(const float2 *)(d->d + u);
            float a = G[n][2 * half] * L.x * step.x, b = G[n][2 * half + 1] * L.y * step.y;
            if (i == j) a += t == u ? D : 0, b += t == u + 1 ? D : 0;
            pack(*(word *)(M + lower(i, j) + at<16>(lane / 4 + 8 * half, 8 * n + lane % 4 * 2)), a, b);
          }
        }
      }
    }
    if (mine) make_decay(decay + ((c + 1) & 1), ahead, chunk_at(s, all, c + 1).n, A2);
    if (c >= 0) {
      __syncthreads();
      real *y = s.y + (((size_t)k.b * s.T + now.at - all.ring) * s.H + k.h) * s.P + p0;
#pragma unroll 1
      for (int i = 0; 16 * i < now.n; i += 2) { /* two blocks of 16 rows at a time */
        float acc[2][2 * MT][4] = {};
        if (live) {
#pragma unroll
          for (int n = 0; n < NT / 16; n++) {
            word a[2][4];
#pragma unroll
            for (int r = 0; r < 2; r++) load<NT, LEFT>(a[r], C, 16 * (i + r), 16 * n);
#pragma unroll
            for (int m = 0; m < MT; m++) { /* the accumulators of 16 rows of S are, packed, columns of the right operand */
              word b[4];
#pragma unroll
              for (int q = 0; q < 4; q++) pack(b[q], S[m][2 * n + q % 2][q / 2 * 2], S[m][2 * n + q % 2][q / 2 * 2 + 1]);
#pragma unroll
              for (int r = 0; r < 2; r++) mma2(acc[r][2 * m], acc[r][2 * m + 1], a[r], b);
            }
          }
#pragma unroll
          for (int r = 0; r < 2; r++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
              const float e = d->e[16 * (i + r) + lane / 4 + q / 2 * 8];
#pragma unroll
              for (int m = 0; m < 2 * MT; m++) acc[r][m][q] *= e;
            }
        }
#pragma unroll 1
        for (int j = 0; j <= i + 1 && 16 * j < now.n; j++) {
          word b[MT][4];
#pragma unroll
          for (int m = 0; m < MT; m++) load<PT, RIGHT>(b[m], X, 16 * j, column + 16 * m);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            if (j > i + r || 16 * (i + r) >= now.n) continue;
            word a[4];
            load<16, LEFT>(a, M + lower(i + r, j), 0, 0);
#pragma unroll
            for (int m = 0; m < MT; m++) mma2(acc[r][2 * m], acc[r][2 * m + 1], a, b[m]);
          }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int half = 0; half < 4; half += 2)
#pragma unroll
            for (int m = 0; m < 2 * MT; m += 2) {
              const int t = 16 * (i + r) + lane / 4 + 4 * half;
              word a, b;
              pack(a, acc[r][m][half], acc[r][m][half + 1]);
              pack(b, acc[r][m + 1][half], acc[r][m + 1][half + 1]);
              store_row<FAST>(y + (ptrdiff_t)t * s.H * s.P, column + 8 * m, rows, a, b, t < now.n, s.n0 > 0);
            }
      }
    }
    const bool cut = s.state && now.at + now.n == all.cut;
    if (more || cut) update<MT, NT, PT>(S, d->last, X, Y, d->wd, now.n);
    if (cut) write_state<FAST, MT, NT>(s.state + tile, S, s.N, rows, cols);
    live = true;
  }
}

template <bool FAST, int MT, int WARPS, int NT> static void run_outputs(Ssd s, int part_chunks) {
  const size_t shared = (2 * (size_t)(Q * 16 * MT * WARPS + 2 * Q * NT) + LOWER * 256) * sizeof(real);
  s.slices = (int)ceil_div(s.P, 16 * MT * WARPS);
  LAUNCH_EARLY((outputs<FAST, MT, WARPS, NT>), (unsigned)((size_t)s.B * s.parts * s.H * s.slices), 32 * WARPS, shared, s, part_chunks);
}

/* How many segments a row is cut into: until there are enough blocks, and two chunks a segment. */
static int segments_of(const Ssd &s) {
  const size_t blocks = (size_t)s.B * s.H * ceil_div(s.P, 128);
  int parts = 1;
  while (parts < 8 && blocks * parts * 2 < 3 * (size_t)multiprocessors() && s.chunks >= 4 * parts) parts *= 2;
  return parts;
}

template <bool FAST, int MT, int WARPS, int NT> static void sequence(Ssd s, int parts) {
  const size_t heads = (size_t)s.B * s.H;
  s.parts = parts, s.slices = (int)ceil_div(s.P, WALK_ROWS);
  if (parts > 1) {
    s.starts = (float *)device_scratch(heads * parts * ((size_t)s.P * s.N + 1) * sizeof(float));
    s.decays = s.starts + heads * parts * s.P * s.N;
    if (!s.starts) return;
  }
  const int part_chunks = (int)ceil_div(s.chunks, parts);
  for (s.n0 = 0; s.n0 < s.N; s.n0 += NT) {
    if (parts > 1) run_walk<FAST, NT>(s, parts - 1, part_chunks);
    run_outputs<FAST, MT, WARPS, NT>(s, part_chunks);
  }
}

static void many(const Ssd &s) {
  constexpr bool half = sizeof(real) == 2; /* floats need the registers of two warps */
  const int parts = segments_of(s);
  if (!s.vectors || s.N > 128)
    sequence<false, 1, 4, 64>(s, parts);
  else if (s.P <= 64 && s.N <= 64)
    sequence<true, 1, 4, 64>(s, parts);
  else if (s.P <= 64)
    sequence<true, 1, 4, 128>(s, parts);
  else if (s.N <= 64)
    sequence<true, half ? 2 : 1, half ? 4 : 8, 64>(s, parts);
  else
    sequence<true, half ? 2 : 1, half ? 4 : 8, 128>(s, parts);
}

/* ---- few tokens ------------------------------------------------------------------------------------------------------------------ */

enum { REPLAY_THREADS = 256, GROUPS = REPLAY_THREADS / 8, PAST = RING + PENDING };

/* One body, so that d has the same bits in a call and in the ring. */
static __device__ __noinline__ float step_size(float dt) { return softplus(dt); }

/* The new entries of the ring: those that stand at or behind the checkpoint. All heads have read the old ones by now. */
static __global__ void remember(Ssd s) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int b = blockIdx.x / RING, i = blockIdx.x % RING;
  const Place p = place(s, b);
  const int position = p.begin + max(p.cut, 0) + i, t = position - p.pos;
  if (t < 0 || t >= s.T) return;
  const size_t to = (size_t)p.slot * RING + position % RING, from = (size_t)b * s.T + t, X = (size_t)s.G * s.P, Y = (size_t)s.G * s.N;
  auto copy = [](real *to, const real *from, size_t n, int vectors) {
    if (vectors)
      for (size_t i = threadIdx.x; i < n / REALS_16; i += blockDim.x) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
    else
      for (size_t i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
  };
  copy(s.ring.x + to * X, s.x + from * X, X, s.vectors);
  copy(s.ring.B + to * Y, s.Bm + from * Y, Y, s.vectors);
  for (int h = threadIdx.x; h < s.H; h += blockDim.x) {
    const float d = step_size(load(s.dt + from * s.H + h) + (s.dt_bias ? s.dt_bias[h] : 0));
    s.ring.dt[to * s.H + h] = s.rows.prev && s.rows.prev[from] == -2 ? -d : d;
  }
}

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
  __device__ float (&at(int, int c))[4] { return *(float(*)[4])(p + ((size_t)c * REPLAY_THREADS + threadIdx.x) * 4); }
};

/* A token's path: `list` is the run that ends with it, back to a multiple of R, as indices of the past (ring, then call); base is
 * what stands before the run: an index, -1 the checkpoint as found, -2 nothing. */
struct Paths {
  int list[PENDING][SSD_RING], length[PENDING], base[PENDING];
};

/* Thread t < T climbs its own path. Without a ring every token is a run of its own. */
static __device__ void climb(Paths *p, const Ssd &s, const Place &at, int b, int ring) {
  const int t = threadIdx.x;
  if (t >= s.T) return;
  const int *prev = s.rows.prev ? s.rows.prev + (size_t)b * s.T : nullptr;
  auto parent = [&](int i) { return i < ring ? i - 1 : !prev ? i - 1 : prev[i - ring] == -2 ? -2 : ring + prev[i - ring]; };
  int length = 1, i = ring + t;
  if (s.ring.x) {
    int depth = prev ? 0 : t;
    for (int u = t; prev && (u = prev[u]) >= 0;) depth++;
    length = (at.pos + depth) % SSD_RING + 1;
  }
  p->length[t] = length;
  for (int j = length - 1; j >= 0; j--) p->list[t][j] = i, i = parent(i);
  p->base[t] = i;
}

/* Seen from the end of a run of n tokens: w[j] = exp(cum_last - cum_j) d_j, and e = exp(cum_last). 16 lanes; lane j has d_j or 0. */
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

template <int CHUNKS, int RPT> static __global__ void __launch_bounds__(REPLAY_THREADS, RPT == 1 ? 4 : RPT == 2 ? 3 : 2) replay(Ssd s) {
  constexpr int ROWS = GROUPS * RPT, N = 32 * CHUNKS;
  DYNAMIC_SHARED(float, inter); /* (T,ROWS) S C_t, then (T,N) C, (RING+T,N) B, (RING+T,ROWS) x */
  __shared__ Paths paths;
  __shared__ float d[PAST], w[PENDING][SSD_RING], e[PENDING], fold_w[SSD_RING], fold_e;
  __shared__ int fold_list[SSD_RING];
  __shared__ Place later; /* what is needed again after the state has filled the registers */
  float *Cs = inter + s.T * ROWS;
  real *Bs = (real *)(Cs + s.T * N), *xs = Bs + (RING + s.T) * N;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, group = lane / 8, part = lane % 8;
  const Block k = block_of(s, 1);
  const int b = k.b, p0 = k.slice * ROWS, rows = RPT > 1 ? ROWS : min(ROWS, s.P - p0), chunks = Slice<CHUNKS, RPT>::chunks(s), first_row = 4 * warp + group;
  const Place at = place(s, b); /* what is in Rows is older than the kernel before */
  float *checkpoint = s.state + (((size_t)at.slot * s.H + k.h) * s.P + p0) * s.N;
  if (CHUNKS)
    for (int i = tid; i < rows * N / 32; i += REPLAY_THREADS) prefetch_l2(checkpoint + 32 * i);
  wait_for_previous_kernel();

  Slice<CHUNKS, RPT> S(s);
  auto load_checkpoint = [&] {
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < chunks; c++) {
        const int row = first_row + GROUPS * r, n = 32 * c + 4 * part;
        const float *from = checkpoint + (size_t)row * s.N + n;
        float(&v)[4] = S.at(r, c);
        if (CHUNKS) {
          const float4 q = row < rows ? __ldcs((const float4 *)from) : make_float4(0, 0, 0, 0);
          v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
        } else
          for (int i = 0; i < 4; i++) v[i] = row < rows && n + i < s.N ? from[i] : 0;
      }
  };
  load_checkpoint();
  let_next_kernel_start();

  const int ring = min(at.pos - at.begin, (int)RING), past = ring + s.T, rep = s.H / s.G;
  auto row_of = [&](int i) { return i < ring ? at.slot * RING + (at.begin + i) % RING : b * s.T + i - ring; };
  auto B_at = [&](int i, int c, float(&v)[4]) { /* B of entry i, this thread's columns */
    const real *from = (i < ring ? s.ring.B : s.Bm) + ((size_t)row_of(i) * s.G + k.g) * s.N;
    for (int q = 0; q < 4; q++) v[q] = CHUNKS ? load(Bs + i * N + 32 * c + 4 * part + q) : 32 * c + 4 * part + q < s.N ? load(from + 32 * c + 4 * part + q) : 0;
  };
  auto C_at = [&](int t, int c, float(&v)[4]) {
    if (CHUNKS) return load_16(v, Cs + t * N + 32 * c + 4 * part);
    const real *from = s.C + (((size_t)b * s.T + t) * s.H + k.h) * s.N;
    for (int q = 0; q < 4; q++) v[q] = 32 * c + 4 * part + q < s.N ? load(from + 32 * c + 4 * part + q) : 0;
  };
  auto x_at = [&](int i, int row) {
    if (CHUNKS) return load(xs + i * ROWS + row);
    return row < rows ? load((i < ring ? s.ring.x : s.x) + ((size_t)row_of(i) * s.G + k.g) * s.P + p0 + row) : 0;
  };
  if (CHUNKS) {
    constexpr int pieces = (N + ROWS) / REALS_16;
#pragma unroll 1
    for (int i = tid; i < past * pieces; i += REPLAY_THREADS) {
      const int entry = i / pieces, piece = i % pieces * REALS_16;
      const size_t row = (size_t)row_of(entry) * s.G + k.g;
      if (piece < N)
        cp_async_16(Bs + entry * N + piece, (entry < ring ? s.ring.B : s.Bm) + row * s.N + piece);
      else
        cp_async_16(xs + entry * ROWS + piece - N, (entry < ring ? s.ring.x : s.x) + row * s.P + p0 + piece - N, piece - N < rows ? 16 : 0);
    }
    cp_async_commit();
#pragma unroll 1
    for (int i = tid; i < s.T * N; i += REPLAY_THREADS) {
      const int t = i / max(N, 1), n = i % max(N, 1);
      Cs[i] = load(s.C + (((size_t)b * s.T + t) * s.H + k.h) * N + n);
    }
  }
  const float A2 = log2_decay(s, k.h), D = s.Dskip ? s.Dskip[k.h] : 0;
#pragma unroll 1
  for (int i = tid; i < past; i += REPLAY_THREADS)
    d[i] = i < ring ? fabsf(s.ring.dt[(size_t)row_of(i) * s.H + k.h]) : step_size(load(s.dt + (size_t)row_of(i) * s.H + k.h) + (s.dt_bias ? s.dt_bias[k.h] : 0));
  if (tid == 0) later = at;
  climb(&paths, s, at, b, ring);
  __syncthreads();

#pragma unroll 1
  for (int t = tid / SSD_RING; t < (s.T + 1) / 2 * 2; t += REPLAY_THREADS / SSD_RING) { /* whole warps */
    const int u = min(t, s.T - 1), n = paths.length[u], j = tid % SSD_RING;
    run_decay(w[u], e + u, j < n ? d[paths.list[u][j]] : 0, n, A2);
  }
  cp_async_wait<0>();
  __syncthreads();

  /* w[t][j] becomes the factor of x_j in y_t. */
#pragma unroll 1
  for (int i = tid / 8; i < (s.T * SSD_RING + 3) / 4 * 4; i += GROUPS) {
    const int t = min(i / SSD_RING, s.T - 1), j = i % SSD_RING, n = paths.length[t];
    const bool there = i < s.T * SSD_RING && j < n;
    float sum = 0;
#pragma unroll 2
    for (int c = 0; c < chunks; c++) {
      float u[4], v[4];
      C_at(t, c, u);
      B_at(there ? paths.list[t][j] : ring, c, v);
      for (int q = 0; q < 4; q++) sum = fmaf(u[q], v[q], sum);
    }
    for (int o = 4; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (part == 0 && there) w[t][j] = w[t][j] * sum + (j == n - 1 ? D : 0);
  }

  auto write_checkpoint = [&] {
#pragma unroll
    for (int r = 0; r < RPT; r++)
#pragma unroll
      for (int c = 0; c < chunks; c++) {
        const int row = first_row + GROUPS * r, n = 32 * c + 4 * part;
        float *to = checkpoint + (size_t)row * s.N + n, (&v)[4] = S.at(r, c);
        if (row >= rows) continue;
        if (CHUNKS)
          __stcs((float4 *)to, make_float4(v[0], v[1], v[2], v[3]));
        else
          for (int i = 0; i < 4; i++)
            if (n + i < s.N) to[i] = v[i];
      }
  };

  /* First the checkpoint moves for good; then S goes to each base and is read for all its tokens; last, without a ring, to the state
   * after `keep` tokens. Entries are numbered from the checkpoint as found, -1. */
  const int target = s.ring.x ? min(later.cut, ring) - 1 : -1;
  int stands = -1, checkpoint_at = -1;
  for (int t = -1; t <= s.T; t++) {
    const int goal = t < 0 ? target : t < s.T ? paths.base[t] : s.ring.x ? -1 : later.cut - 1;
    bool done = t == s.T ? goal < 0 : goal == -2;
    for (int u = 0; u < min(t, s.T); u++) done |= t < s.T && paths.base[u] == goal;
    if (done) continue;
    if (stands != goal && goal == checkpoint_at) load_checkpoint(), stands = goal;
    while (stands != goal) { /* a run on: from where S stands, from the checkpoint, or from nothing */
      int next = goal, base;
      for (;; next = base) {
        base = next < ring ? next - SSD_RING : paths.base[next - ring];
        if (base == stands || base == checkpoint_at || base == -2) break;
      }
      if (base != stands && base != -2) load_checkpoint();
      const int n = next < ring ? SSD_RING : paths.length[next - ring];
      __syncthreads(); /* the fold before may still be read */
      if (tid < n) fold_list[tid] = next < ring ? next - SSD_RING + 1 + tid : paths.list[next - ring][tid];
      if (warp == 0) {
        __syncwarp();
        run_decay(fold_w, &fold_e, lane % SSD_RING < n ? d[fold_list[lane % SSD_RING]] : 0, n, A2);
      }
      __syncthreads();
      /* S = e S + sum_j w_j x_j B_j^T, the one way in which a run enters a state */
#pragma unroll
      for (int r = 0; r < RPT; r++)
#pragma unroll
        for (int c = 0; c < chunks; c++)
          for (int q = 0; q < 4; q++) S.at(r, c)[q] = base == -2 ? 0 : fold_e * S.at(r, c)[q];
#pragma unroll 1
      for (int j = 0; j < n; j++) {
        const int i = fold_list[j];
        float wx[RPT];
#pragma unroll
        for (int r = 0; r < RPT; r++) wx[r] = fold_w[j] * x_at(i, first_row + GROUPS * r);
#pragma unroll
        for (int c = 0; c < chunks; c++) {
          float v[4];
          B_at(i, c, v);
#pragma unroll
          for (int r = 0; r < RPT; r++)
            for (int q = 0; q < 4; q++) S.at(r, c)[q] = fmaf(wx[r], v[q], S.at(r, c)[q]);
        }
      }
      stands = next;
    }
    if (t < 0) checkpoint_at = stands;
    if (t == s.T || (t < 0 && target >= 0)) write_checkpoint();

    for (int u = max(t, 0); t >= 0 && u < s.T; u++) {
      if (paths.base[u] != goal) continue;
      float sum[RPT];
#pragma unroll
      for (int r = 0; r < RPT; r++) sum[r] = 0;
#pragma unroll
      for (int c = 0; c < chunks; c++) {
        float v[4];
        C_at(u, c, v);
#pragma unroll
        for (int r = 0; r < RPT; r++)
          for (int q = 0; q < 4; q++) sum[r] = fmaf(S.at(r, c)[q], v[q], sum[r]);
      }
      /* Over the group's 8 lanes, in one order: while rows are left a lane hands half of them over and adds to the others. */
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
      inter[u * ROWS + first_row + GROUPS * row] = sum[0];
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int i = tid; i < s.T * ROWS; i += REPLAY_THREADS) {
    const int t = i / ROWS, row = i % ROWS, n = paths.length[t];
    if (row >= rows) continue;
    float v = paths.base[t] == -2 ? 0 : e[t] * inter[i];
    for (int j = 0; j < n; j++) v = fmaf(w[t][j], x_at(paths.list[t][j], row), v);
    store(s.y + (((size_t)b * s.T + t) * s.H + k.h) * s.P + p0 + row, v);
  }

  if (s.ring.x && s.T == 1) { /* its entry is none of those that this call reads; more tokens: `remember` */
    const size_t to = (size_t)later.slot * RING + later.pos % RING;
    if (k.slice == 0 && tid == 0) s.ring.dt[to * s.H + k.h] = d[ring];
    if (k.h % rep == 0) {
      for (int i = tid; i < rows; i += REPLAY_THREADS) store(s.ring.x + (to * s.G + k.g) * s.P + p0 + i, x_at(ring, i));
      const size_t from = ((size_t)b * s.G + k.g) * s.N, into = (to * s.G + k.g) * s.N;
      for (int i = tid; i < s.N && !k.slice; i += REPLAY_THREADS) s.ring.B[into + i] = s.Bm[from + i];
    }
  }
}

template <int CHUNKS, int RPT> static void run_replay(Ssd s) {
  constexpr size_t ROWS = GROUPS * RPT, N = 32 * CHUNKS;
  s.slices = (int)ceil_div(s.P, ROWS);
  const size_t blocks = (size_t)s.B * s.H * s.slices, T = s.T;
  if (!CHUNKS) {
    s.starts = (float *)device_scratch(blocks * ceil_div(s.N, 32) * REPLAY_THREADS * 4 * sizeof(float));
    if (!s.starts) return;
  }
  const size_t shared = T * (ROWS + N) * sizeof(float) + (CHUNKS ? (RING + T) * (ROWS + N) * sizeof(real) : 0);
  LAUNCH_EARLY((replay<CHUNKS, RPT>), (unsigned)blocks, REPLAY_THREADS, shared, s);
}

/* Rows a thread, 1 where they would not come out even: many where there are heads enough, so that the ring is read by few blocks;
 * else few, to fill the GPU. */
template <int CHUNKS> static void replay_rows(const Ssd &s) {
  const size_t heads = (size_t)s.B * s.H, enough = 4 * (size_t)multiprocessors();
  if (s.P % 128 == 0 && heads * (s.P / 128) >= enough)
    run_replay<CHUNKS, 4>(s);
  else if (s.P % 64 == 0 && heads * (s.P / 64) >= enough)
    run_replay<CHUNKS, 2>(s);
  else
    run_replay<CHUNKS, 1>(s);
}

static void few(const Ssd &s) {
  if (s.vectors && s.N == 128)
    replay_rows<4>(s);
  else if (s.vectors && s.N == 64)
    replay_rows<2>(s);
  else
    run_replay<0, 1>(s);
}

void ssd_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm, const real *C,
                 const float *Dskip, const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G, size_t P, size_t N) {
  if (!B || !T || !H || !P) return;
  Ssd s = {};
  s.y = y, s.state = state, s.x = x, s.dt = dt, s.Bm = Bm, s.C = C, s.A_log = A_log, s.Dskip = Dskip, s.dt_bias = dt_bias, s.rows = rows;
  s.B = (int)B, s.T = (int)T, s.H = (int)H, s.G = (int)G, s.P = (int)P, s.N = (int)N;
  if (state) s.ring = ring;
  s.vectors = all_vectors(P, N, (void *)y, (void *)state, (void *)s.ring.x, (void *)s.ring.B, (const void *)x, (const void *)Bm, (const void *)C);
  s.chunks = (int)ceil_div(T, Q) + (state ? 1 : 0);
  if (state && T <= PENDING)
    few(s);
  else
    many(s);
  if (s.ring.x && T > 1) LAUNCH_EARLY(remember, (unsigned)(B * RING), 128, 0, s);
}
