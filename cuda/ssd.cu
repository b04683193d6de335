/* ssd.cu - Mamba-2's forward over many tokens: csrc/ssd.c on the GPU. Few tokens with a State: ssd_few.cu.
 *
 * A block walks the chunks of a head's sequence in order, its rows of the state in registers: G = C B^T, M = L G d + D
 * (bf16, in shared memory), y = e C S + M x, then the state's update; chunks come through cp.async, one ahead. Where the heads of a
 * batch are too few to fill the GPU, a row is cut into segments: `walk` first finds what each segment adds to a state that starts
 * from zero, and a segment's block begins by adding those before it up. */
#include "ssd.cuh"

/* ---- many tokens ------------------------------------------------------------------------------------------------------------ */

template <bool FAST, int MT, int WARPS, int NT> static __global__ void __launch_bounds__(32 * WARPS, sizeof(real) == 2 ? 2 : 1) outputs(Ssd s, int part_chunks) {
  DYNAMIC_SHARED(real, stages);
  constexpr int PT = 16 * MT * WARPS, X_TILE = Q * PT, STAGE = X_TILE + 2 * Q * NT;
  __shared__ Decay decay[2];
  __shared__ Where where;
  real *M = stages + 2 * STAGE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = 16 * MT * warp;
  where.find(s, s.parts);
  const Block &k = where.k;
  const Place &p = where.p;
  const Chunks &all = where.all;
  const int p0 = k.slice * PT, rows = min(PT, s.P - p0), cols = min(NT, s.N - s.n0);
  const int begin = s.parts > 1 ? k.part * part_chunks : all.first, end = min((k.part + 1) * part_chunks, all.count);
  if (begin >= end) return;
  const size_t head = (size_t)k.b * s.H + k.h, first = (size_t)p0 * s.N + s.n0, tile = ((size_t)p.slot * s.H + k.h) * s.P * s.N + first;
  const float D = s.Dskip && !s.n0 ? s.Dskip[k.h] : 0;

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

  if (s.parts == 1) wait_for_previous_kernel(); /* else that was `walk`: what is loaded here is older */
  load_chunk(begin);
  if (warp == 0) make_decay(decay + (begin & 1), steps_of(begin), chunk_at(s, all, begin).n, where.A2);
  if (s.parts > 1) wait_for_previous_kernel();
  let_next_kernel_start();
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
    if (mine) make_decay(decay + ((c + 1) & 1), ahead, chunk_at(s, all, c + 1).n, where.A2);
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
    sequence<true, 1, 8, 128>(s, parts);
}

/* The ring after many tokens: those that stand at or behind the checkpoint. All heads have read the old entries by now. */
static __global__ void remember(const Ssd s) {
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
    const float d = ssd_step(load(s.dt + from * s.H + h) + (s.dt_bias ? s.dt_bias[h] : 0));
    s.ring.dt[to * s.H + h] = s.rows.prev && s.rows.prev[from] == -2 ? -d : d;
  }
}

/* ---- the op ------------------------------------------------------------------------------------------------------------- */

void ssd_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm, const real *C,
                 const float *Dskip, const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G, size_t P, size_t N) {
  if (!B || !T || !H || !P) return;
  Ssd s = {};
  s.y = y, s.state = state, s.x = x, s.dt = dt, s.Bm = Bm, s.C = C, s.A_log = A_log, s.Dskip = Dskip, s.dt_bias = dt_bias, s.rows = rows;
  s.B = (int)B, s.T = (int)T, s.H = (int)H, s.G = (int)G, s.P = (int)P, s.N = (int)N;
  if (state) s.ring = ring;
  s.vectors = all_vectors(P, N, (void *)y, (void *)state, (void *)s.ring.x, (void *)s.ring.B, (const void *)x, (const void *)Bm, (const void *)C);
  s.chunks = (int)ceil_div(T, Q) + (state ? 1 : 0);
  if (state && T <= PENDING) return ssd_few(s);
  many(s);
  if (s.ring.x) LAUNCH_EARLY(remember, (unsigned)(B * RING), 128, 0, s);
}
