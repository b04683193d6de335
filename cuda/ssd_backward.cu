/* ssd_backward.cu - Mamba-2's gradients: csrc/ssd.c's chunk_backward, chunks in parallel.
 *
 * `walk` leaves the state before every chunk and the cotangent of the state after it (in `real`: both are operands of products and
 * nothing else; what is carried from chunk to chunk is float). Then a block owns a chunk of a group and goes through the group's heads
 * in order, dx and dB of the chunk in its accumulators: their sums over heads are plain sums in a fixed order. With M = L G d + D and
 * V = L W d,  G = C B^T  W = dy x^T  (bf16, in shared memory):
 *   dC = e dy S + V B      dB = w d x dS + V^T C      dx = w d B dS^T + M^T dy
 * The decays' gradients come from sums over rows and columns of W L G, from C.(dy S) and from B.(x dS). */
#include "ssd.cuh"

enum { D_A_LOG, D_D, D_BIAS, PARTIALS, WARPS = 4, THREADS = 32 * WARPS };

/* Of the head at hand. row[j][t]: over s < t of block j, z d; col[i][s]: over t > s of block i, z; z = W L G. */
struct Sums {
  float row[BLOCKS][Q], col[BLOCKS][Q], z[Q], W[Q]; /* z, W: the diagonals */
  float C[WARPS][Q], B[WARPS][Q], whole[WARPS];     /* C.(dy S), B.(x dS), <dS, S>: a warp's columns */
  float raw[Q];                                     /* dt + dt_bias */
  int start[Q];
};

/* c = rows row .. row+32 of A (Q,K) times columns col .. of B (K,.): COLS columns a row; transposed: B is (.,K) */
template <int K, int CG, int COLS, bool TRANSPOSED>
static __device__ inline void product(float (&c)[2][2 * CG][4], const real *A, int row, const real *B, int col) {
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int q = 0; q < 2 * CG; q++) c[m][q][0] = c[m][q][1] = c[m][q][2] = c[m][q][3] = 0;
#pragma unroll 2
  for (int k = 0; k < K; k += 16) {
    word a[2][4];
    load<K, LEFT>(a[0], A, row, k);
    load<K, LEFT>(a[1], A, row + 16, k);
#pragma unroll
    for (int q = 0; q < CG; q++) {
      word b[4];
      if (TRANSPOSED)
        load<COLS, RIGHT_T>(b, B, col + 16 * q, k);
      else
        load<COLS, RIGHT>(b, B, k, col + 16 * q);
#pragma unroll
      for (int m = 0; m < 2; m++) mma2(c[m][2 * q], c[m][2 * q + 1], a[m], b);
    }
  }
}

/* c (Q rows) += T^T Y, T a lower triangle */
template <int CG, int COLS> static __device__ inline void add_upper(float (&c)[BLOCKS][2 * CG][4], const real *T, const real *Y, int col, int n) {
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    if (16 * i >= n) break;
    word b[CG][4];
#pragma unroll
    for (int q = 0; q < CG; q++) load<COLS, RIGHT>(b[q], Y, 16 * i, col + 16 * q);
#pragma unroll
    for (int j = 0; j <= i; j++) {
      word a[4];
      load<16, LEFT_T>(a, T + lower(i, j), 0, 0);
#pragma unroll
      for (int q = 0; q < CG; q++) mma2(c[j][2 * q], c[j][2 * q + 1], a, b[q]);
    }
  }
}

/* out[t] = sum over a warp's columns of c[t] . Y[t], rows row .. row+32 */
template <int CG, int COLS> static __device__ inline void row_dots(float *out, const float (&c)[2][2 * CG][4], const real *Y, int row, int col) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = row + 16 * m + lane / 4 + 8 * half;
      float sum = 0;
#pragma unroll
      for (int q = 0; q < 2 * CG; q++) {
        const word v = word_at(Y + at<COLS>(t, col + 8 * q + lane % 4 * 2));
        sum += c[m][q][2 * half] * low(v) + c[m][q][2 * half + 1] * high(v);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0) out[t] = sum;
    }
}

template <int CG> static __device__ inline void scale_rows(float (&c)[2][2 * CG][4], const float *factor) {
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float f = factor[16 * m + threadIdx.x % 32 / 4 + e / 2 * 8];
#pragma unroll
      for (int q = 0; q < 2 * CG; q++) c[m][q][e] *= f;
    }
}

/* Rows row .. of c to global memory, ld elements from row to row. */
template <bool FAST, int R, int CG>
static __device__ inline void store_rows(real *to, int ld, const float (&c)[R][2 * CG][4], int row, int n, int col, int cols, bool add) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < R; m++)
#pragma unroll
    for (int half = 0; half < 4; half += 2)
#pragma unroll
      for (int q = 0; q < 2 * CG; q += 2) {
        const int t = row + 16 * m + lane / 4 + 4 * half;
        word a, b;
        pack(a, c[m][q][half], c[m][q][half + 1]);
        pack(b, c[m][q + 1][half], c[m][q + 1][half + 1]);
        store_row<FAST>(to + (ptrdiff_t)t * ld, col + 8 * q, cols, a, b, t < n, add);
      }
}

/* The blocks of G and W: M and V to shared memory, z = W L G to its sums. */
template <int PT, int NT>
static __device__ inline void triangles(real *M, real *V, Sums *sums, const Decay *d, const real *X, const real *Y, const real *C, const real *dY, float D, int n) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (n + 15) / 16;
  for (int index = warp; index < blocks * (blocks + 1) / 2; index += WARPS) {
    int i, j;
    lower_block(index, &i, &j);
    float G[2][4] = {}, W[2][4] = {}, col[2][2] = {};
    dots_16<NT>(G, C, i, Y, j);
    dots_16<PT>(W, dY, i, X, j);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = 16 * i + lane / 4 + 8 * half, first = d->first[t];
      const log_t cum = d->cum[t];
      float row = 0;
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const int s = 16 * j + 8 * q + lane % 4 * 2, to = lower(i, j) + at<16>(lane / 4 + 8 * half, 8 * q + lane % 4 * 2);
        const float2 L = decays_between(d, cum, first, t, s), step = *(const float2 *)(d->d + s);
        const float g[2] = {G[q][2 * half] * L.x, G[q][2 * half + 1] * L.y}, w[2] = {W[q][2 * half], W[q][2 * half + 1]};
        float z[2] = {w[0] * g[0], w[1] * g[1]}, skip[2] = {};
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (t == s + e) sums->z[t] = z[e], sums->W[t] = w[e], z[e] = 0, skip[e] = D;
        row += z[0] * step.x + z[1] * step.y, col[q][0] += z[0], col[q][1] += z[1];
        pack(*(word *)(M + to), g[0] * step.x + skip[0], g[1] * step.y + skip[1]);
        pack(*(word *)(V + to), w[0] * L.x * step.x, w[1] * L.y * step.y);
      }
      row += __shfl_xor_sync(0xffffffffu, row, 1);
      row += __shfl_xor_sync(0xffffffffu, row, 2);
      if (lane % 4 == 0) sums->row[j][t] = row;
    }
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        for (int o = 4; o < 32; o *= 2) col[q][e] += __shfl_xor_sync(0xffffffffu, col[q][e], o);
        if (lane < 4) sums->col[i][16 * j + 8 * q + 2 * lane + e] = col[q][e];
      }
  }
}

/* One warp, two neighbouring tokens a lane: ddt and the parameters' sums. */
static __device__ inline void finish(const Ssd &s, const Sums *sums, const Decay *d, float *partial, size_t row, int h, int n, bool add) {
  const int lane = threadIdx.x % 32;
  const float A = exp_(s.A_log[h]);
  float dd[2], future[2], past[2], whole = 0;
  for (int w = 0; w < WARPS; w++) whole += sums->whole[w];
  whole *= d->last;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = 2 * lane + i;
    dd[i] = future[i] = past[i] = 0;
    if (t >= n) continue;
    float col = 0, C = 0, B = 0;
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (j <= t / 16) future[i] += sums->row[j][t];
      if (j >= t / 16 && 16 * j < n) col += sums->col[j][t];
    }
    for (int w = 0; w < WARPS; w++) C += sums->C[w][t], B += sums->B[w][t];
    future[i] += d->e[t] * C - d->d[t] * col;
    dd[i] = col + sums->z[t] + d->w[t] * B;
    past[i] = d->wd[t] * B;
  }
  const float sum = scan_add(future[0] + future[1]), all = __shfl_sync(0xffffffffu, sum, 31), pasts = scan_add(past[0] + past[1]);
  float dla[2] = {all - sum + future[0] + future[1] + pasts - past[0] - past[1] + whole, all - sum + future[1] + pasts - past[1] + whole};
  float dA = 0, dD = 0, dbias = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = 2 * lane + i;
    if (t >= n) continue;
    if (sums->start[t]) dla[i] = 0;
    const size_t to = (row + t) * s.H + h;
    const float ddt = (dd[i] - A * dla[i]) * sigmoid(sums->raw[t]);
    store(s.ddt + to, ddt + (add ? load(s.ddt + to) : 0));
    dA -= dla[i] * A * d->d[t], dbias += ddt, dD += sums->W[t];
  }
  dA = warp_sum(dA), dbias = warp_sum(dbias), dD = warp_sum(dD);
  if (lane) return;
  partial[D_A_LOG] = dA + (add ? partial[D_A_LOG] : 0);
  partial[D_BIAS] = dbias + (add ? partial[D_BIAS] : 0);
  partial[D_D] = s.n0 ? partial[D_D] : dD + (s.p0 ? partial[D_D] : 0);
}

/* from (PT,NT), rows together, in the place of the tile's S; returns this thread's part of their inner product. */
template <int PT, int NT> static __device__ inline float exchange(real *S, const real *from) {
  constexpr int pieces = NT / REALS_16;
  float sum = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < PT * pieces; i += THREADS) {
    real *to = S + at<NT>(i / pieces, i % pieces * REALS_16);
    float a[REALS_16], b[REALS_16];
    load_16(a, to);
    load_16(b, from + (size_t)i * REALS_16);
    for (int e = 0; e < REALS_16; e++) sum += a[e] * b[e];
    store_16(to, b);
  }
  return sum;
}

template <bool FAST, int PT, int NT> static __global__ void __launch_bounds__(THREADS, sizeof(real) == 2 ? 2 : 1) gradients(Ssd s) {
  DYNAMIC_SHARED(real, X);
  real *Y = X + Q * PT, *C = Y + Q * NT, *dY = C + Q * NT, *S = dY + Q * PT, *M = S + PT * NT, *V = M + LOWER * 256;
  Decay *d = (Decay *)(V + LOWER * 256);
  Sums *sums = (Sums *)(d + 1);
  constexpr int CG = NT / 64, PG = PT / 64; /* groups of 16 columns a warp owns */
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, col_n = NT / WARPS * warp, col_p = PT / WARPS * warp;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int g = blockIdx.x % s.G, c = blockIdx.x / s.G % s.chunks, b = blockIdx.x / s.G / s.chunks, rep = s.H / s.G;
  const int rows = min(PT, s.P - s.p0), cols = min(NT, s.N - s.n0);
  const Place p = place(s, b);
  const Chunks all = chunks_of(s, p);
  const bool add = s.p0 || s.n0;
  float *partial = s.partial + (((size_t)b * s.chunks + c) * s.H + (size_t)g * rep) * PARTIALS;
  if (c >= all.count) {
    for (int i = threadIdx.x; i < rep * PARTIALS; i += THREADS) partial[i] = 0;
    return;
  }
  const Chunk now = chunk_at(s, all, c);
  const int n = now.n;
  const Source row = source(s, p, all, now, b);
  const size_t first = row.first, tile = (size_t)PT * NT;
  const int ldC = s.H * s.N, lddy = s.H * s.P, ldB = s.G * s.N, ldx = s.G * s.P;

  auto load_head = [&](int h) { /* what the triangles need, then the state */
    fetch<FAST, Q, NT, THREADS>(C, s.C + first * ldC + h * s.N + s.n0, ldC, n, cols, row);
    fetch<FAST, Q, PT, THREADS>(dY, s.dy + first * lddy + h * s.P + s.p0, lddy, n, rows, row);
    cp_async_commit();
    const real *from = s.tiles + (((size_t)b * s.H + h) * s.chunks + c) * tile;
    fetch<true, PT, NT, THREADS>(S, from, NT, PT, NT, [](int r) { return r; });
    cp_async_commit();
    for (int i = threadIdx.x; i < (int)(tile * sizeof(real) / 128); i += THREADS)
      prefetch_l2((const char *)(from + (size_t)s.B * s.H * s.chunks * tile) + 128 * i);
  };
  auto decays = [&](const Steps &v, int h) {
    make_decay(d, v, n, log2_decay(s, h));
    for (int i = 0; i < 2; i++) sums->raw[2 * lane + i] = v.raw[i], sums->start[2 * lane + i] = v.start[i];
  };

  fetch<FAST, Q, PT, THREADS>(X, s.x + first * ldx + g * s.P + s.p0, ldx, n, rows, row);
  fetch<FAST, Q, NT, THREADS>(Y, s.Bm + first * ldB + g * s.N + s.n0, ldB, n, cols, row);
  load_head(g * rep);
  if (warp == WARPS - 1) decays(load_steps(s, row, now, g * rep), g * rep);
  float dx[BLOCKS][2 * PG][4] = {}, dB[BLOCKS][2 * CG][4] = {};
  for (int h = g * rep; h < (g + 1) * rep; h++) {
    const bool more = h + 1 < (g + 1) * rep;
    Steps ahead;
    cp_async_wait<1>();
    __syncthreads();
    triangles<PT, NT>(M, V, sums, d, X, Y, C, dY, s.Dskip && !s.n0 ? s.Dskip[h] : 0, n);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < n; t += 32) { /* dC */
      float acc[2][2 * CG][4];
      product<PT, CG, NT, false>(acc, dY, t, S, col_n);
      row_dots<CG, NT>(sums->C[warp], acc, C, t, col_n);
      scale_rows<CG>(acc, d->e + t);
#pragma unroll 1
      for (int j = 0; j <= t / 16 + 1 && 16 * j < n; j++) {
        word v[CG][4];
#pragma unroll
        for (int q = 0; q < CG; q++) load<NT, RIGHT>(v[q], Y, 16 * j, col_n + 16 * q);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          const int i = t / 16 + m;
          if (j > i || 16 * i >= n) continue;
          word a[4];
          load<16, LEFT>(a, V + lower(i, j), 0, 0);
#pragma unroll
          for (int q = 0; q < CG; q++) mma2(acc[m][2 * q], acc[m][2 * q + 1], a, v[q]);
        }
      }
      store_rows<FAST, 2, CG>(s.dC + first * ldC + h * s.N + s.n0, ldC, acc, t, n, col_n, cols, s.p0 > 0);
    }
    __syncthreads();
    const float inner = warp_sum(exchange<PT, NT>(S, s.tiles + (((size_t)(s.B + b) * s.H + h) * s.chunks + c) * tile));
    if (lane == 0) sums->whole[warp] = inner;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < BLOCKS; r += 2) { /* dB */
      if (16 * r >= n) break;
      float acc[2][2 * CG][4];
      product<PT, CG, NT, false>(acc, X, 16 * r, S, col_n);
      row_dots<CG, NT>(sums->B[warp], acc, Y, 16 * r, col_n);
      scale_rows<CG>(acc, d->wd + 16 * r);
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int q = 0; q < 2 * CG; q++)
#pragma unroll
          for (int e = 0; e < 4; e++) dB[r + m][q][e] += acc[m][q][e];
    }
    add_upper<CG, NT>(dB, V, C, col_n, n);
#pragma unroll
    for (int r = 0; r < BLOCKS; r += 2) { /* dx */
      if (16 * r >= n) break;
      float acc[2][2 * PG][4];
      product<NT, PG, NT, true>(acc, Y, 16 * r, S, col_p);
      scale_rows<PG>(acc, d->wd + 16 * r);
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int q = 0; q < 2 * PG; q++)
#pragma unroll
          for (int e = 0; e < 4; e++) dx[r + m][q][e] += acc[m][q][e];
    }
    add_upper<PG, PT>(dx, M, dY, col_p, n);
    if (warp == WARPS - 1 && more) ahead = load_steps(s, row, now, h + 1);
    __syncthreads();
    if (more) load_head(h + 1);
    if (warp == WARPS - 1) {
      finish(s, sums, d, partial + (h - g * rep) * PARTIALS, first, h, n, add);
      __syncwarp();
      if (more) decays(ahead, h + 1);
    }
  }
  store_rows<FAST, BLOCKS, PG>(s.dx + first * ldx + g * s.P + s.p0, ldx, dx, 0, n, col_p, rows, s.n0 > 0);
  store_rows<FAST, BLOCKS, CG>(s.dB + first * ldB + g * s.N + s.n0, ldB, dB, 0, n, col_n, cols, s.p0 > 0);
}

/* Head h's partial sums of all chunks, in a fixed order. */
static __global__ void parameters(Ssd s) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  float *to[PARTIALS] = {};
  to[D_A_LOG] = s.dA_log, to[D_D] = s.dD, to[D_BIAS] = s.ddt_bias;
  const int h = blockIdx.x, n = s.B * s.chunks;
  for (int j = 0; j < PARTIALS; j++) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += s.partial[((size_t)i * s.H + h) * PARTIALS + j];
    sum = block_sum(sum);
    if (threadIdx.x == 0 && to[j]) to[j][h] += sum;
  }
}

template <bool FAST, int PT, int NT> static void run(Ssd s) {
  const size_t shared = (Q * (2 * PT + 2 * NT) + PT * NT + 2 * LOWER * 256) * sizeof(real) + sizeof(Decay) + sizeof(Sums);
  const size_t heads = (size_t)s.B * s.H * s.chunks;
  s.tiles = (real *)device_scratch(2 * heads * PT * NT * sizeof(real) + heads * PARTIALS * sizeof(float));
  s.partial = (float *)(s.tiles + 2 * heads * PT * NT);
  s.slices = PT / WALK_ROWS;
  if (!s.tiles) return;
  for (s.p0 = 0; s.p0 < s.P; s.p0 += PT)
    for (s.n0 = 0; s.n0 < s.N; s.n0 += NT) {
      run_walk<FAST, NT>(s, 2, s.chunks);
      LAUNCH_EARLY((gradients<FAST, PT, NT>), (unsigned)((size_t)s.B * s.chunks * s.G), THREADS, shared, s);
    }
  if (s.dA_log || s.dD || s.ddt_bias) LAUNCH_EARLY(parameters, (unsigned)s.H, 128, 0, s);
}

void ssd_backward(real *dx, real *ddt, float *dA_log, real *dB, real *dC, float *dD, float *ddt_bias, float *dstate, const real *dy,
                  const float *state, const real *x, const real *dt, const float *A_log, const real *Bm, const real *C, const float *Dskip,
                  const float *dt_bias, Rows rows, size_t B, size_t T, size_t H, size_t G, size_t P, size_t N) {
  if (!B || !T || !H || !P || !N) return;
  Ssd s = {};
  s.dx = dx, s.ddt = ddt, s.dB = dB, s.dC = dC, s.dstate = dstate, s.dy = dy, s.state = (float *)state, s.x = x, s.dt = dt;
  s.dA_log = dA_log, s.dD = dD, s.ddt_bias = ddt_bias, s.A_log = A_log, s.Bm = Bm, s.C = C, s.Dskip = Dskip, s.dt_bias = dt_bias, s.rows = rows;
  s.B = (int)B, s.T = (int)T, s.H = (int)H, s.G = (int)G, s.P = (int)P, s.N = (int)N;
  s.vectors = all_vectors(P, N, (const void *)dx, (const void *)dB, (const void *)dC, (const void *)dstate, (const void *)dy, (const void *)state,
                          (const void *)x, (const void *)Bm, (const void *)C);
  s.chunks = (int)ceil_div(T, Q) + (rows.keep ? 1 : 0);
  if (!s.vectors || P > 128 || N > 128)
    run<false, 64, 64>(s);
  else if (P <= 64 && N <= 64)
    run<true, 64, 64>(s);
  else if (P <= 64)
    run<true, 64, 128>(s);
  else if (N <= 64)
    run<true, 128, 64>(s);
  else
    run<true, 128, 128>(s);
}
