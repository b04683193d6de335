/* scan_backward.cu - Mamba-1's selective scan, backward.
 *
 * S' = a S + u B, a = 2^(d A), y = sum_n C S' + D x, out = y silu(z), against g, the cotangent of y, and dS, that of S':
 *   dS += g C;  dC = sum_channels g S';  dB = sum_channels u dS;  du = sum_n B dS;
 *   P = a S dS;  dd = sum_n A P;  dA += d P;  dS = a dS, that of S.
 * A forward pass leaves the state before every RUN tokens (checkpoints, in `real`); then a warp takes 32 channels of a row back
 * through time, RUN tokens at a time: forward from the checkpoint with the states kept in registers, and back. Lane (g,j) of
 * 8x4 has four channels and four states, so that every sum is over four lanes: those over states without moves (fold), those
 * over channels with. */
#include "scan.cuh"

constexpr int BACK_WARPS = 2; /* 64 channels: with the usual 4 blocks to a kv block, dB is complete in the thread block */

/* raw: 0 x, 1 dt, 2 B, 3 z, 4 C, 5 dy. edge: what only a channel's own lane needs: sigmoid(v), d, d out/dz without y, x. */
struct BackSpace {
  real raw[3][6][RUN][32];
  float2 du[2][RUN][32]; /* d log2(e), d x */
  float g[2][RUN][32], B[2][RUN][32], C[2][RUN][32];
  float4 edge[2][RUN][32];
  real out[4][RUN][32]; /* 0 dx, 1 ddt, 2 dz, 3 dC */
};

/* A run made ready: lane l has channel l, and four states of token l / 8. */
__device__ static inline void stage_run(BackSpace &m, int raw, int to, float bias, bool gated) {
  const int lane = threadIdx.x % 32;
  const auto &r = m.raw[raw];
  float4 edge[RUN];
  float2 du[RUN];
  float g[RUN];
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const float x = load(&r[0][i][lane]), v = load(&r[1][i][lane]) + bias, dy = load(&r[5][i][lane]), z = load(&r[3][i][lane]);
    const float d = softplus_log2<sizeof(real) == 4>(v), sigmoid = reciprocal_approx(1.0f + exp2_approx(-LOG2E * v));
    const float s = reciprocal_approx(1.0f + exp2_approx(-LOG2E * z));
    du[i] = make_float2(d, LN2 * d * x);
    g[i] = gated ? dy * z * s : dy;
    edge[i] = make_float4(sigmoid, LN2 * d, dy * s * fmaf(z, 1.0f - s, 1.0f), x);
  }
  const float4 B = load_four(&r[2][lane / 8][lane % 8 * 4]).unpack(), C = load_four(&r[4][lane / 8][lane % 8 * 4]).unpack();
#pragma unroll
  for (int i = 0; i < RUN; i++) m.du[to][i][lane] = du[i], m.g[to][i][lane] = g[i], m.edge[to][i][lane] = edge[i];
  *(float4 *)&m.B[to][lane / 8][lane % 8 * 4] = B;
  *(float4 *)&m.C[to][lane / 8][lane % 8 * 4] = C;
}
/* Tokens outside the call change nothing: their x, dy are zero already, their steps become so. */
__device__ static inline void mend_run(BackSpace &m, int to, int kind) {
  mend_steps(m.du[to], kind);
  for (unsigned out = __ballot_sync(0xffffffffu, kind == 2); out; out &= out - 1)
    m.edge[to][__ffs(out) - 1][threadIdx.x % 32] = make_float4(0, 0, 0, 0);
}

/* v[n] belongs to state n of four: returns the sum over the lanes 0, 4, 8, 12 away for state (lane / 4) % 4. */
__device__ static inline float fold_channels(const float (&v)[4], int lane) {
  const bool high = lane & 8, odd = lane & 4;
  const float a = (high ? v[2] : v[0]) + __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 8);
  const float b = (high ? v[3] : v[1]) + __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 8);
  return (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 4);
}

/* KEPT: of so many tokens of a run the decays are kept in registers; those of the others are computed again. */
template <int KEPT> static __global__ void __launch_bounds__(32 * BACK_WARPS, 8 / BACK_WARPS) back_over_runs(const Scan s) {
  constexpr int CH = 4, ST = 4;
  const size_t spans = (s.D + 63) / 64, span = blockIdx.x % spans, b = blockIdx.x / spans % s.B,
               chunk = blockIdx.x / spans / s.B;
  const size_t blocks = s.D / STATES, runs = (s.T + RUN - 1) / RUN;
  DYNAMIC_SHARED(BackSpace, space);
  float (*shares)[RUN][64] = (float (*)[RUN][64])(space + BACK_WARPS); /* (2,RUN,4,16) dB of every block */
  const int warp = threadIdx.x / 32;
  BackSpace &m = space[warp];
  const Place<CH> at;
  const int lane = at.lane,
            own = at.block * STATES + at.state + lane / 4 % 4; /* the block and state whose sum over channels ends here */
  const size_t w = BACK_WARPS * span + warp, c0 = 32 * w, c = c0 + lane;
  const bool gated = s.z, mine = c < s.D;
  const int T = (int)s.T, low = (int)(chunk * s.tiles * TILE), high = min(low + (int)(s.tiles * TILE), T),
            count = (high - low + RUN - 1) / RUN;
  const auto first_of = [&](int q) { return low + (count - 1 - q) * RUN; };

  Feed<6, RUN> feed;
#pragma unroll
  for (int k = 0; k < feed.COUNT; k++) {
    const int a = feed.array(k);
    if (a == 2)
      feed.blocks(k, s, b, w, first_of(0), -RUN);
    else
      feed.channels(k, s, a == 0 ? s.x : a == 1 ? s.dt : a == 3 ? s.z : a == 4 ? s.C : s.dy, b, w, first_of(0), -RUN);
  }
  Drain<4, RUN> drain;
#pragma unroll
  for (int k = 0; k < drain.COUNT; k++) {
    const int a = drain.array(k);
    drain.channels(k, s, a == 0 ? s.dx : a == 1 ? s.ddt : a == 2 ? s.dz : s.dC, b, w, first_of(0), -RUN);
  }
  float A[CH][ST], dS[CH][ST], dA[CH][ST] = {};
  Four<real> saved[CH] = {};
#pragma unroll
  for (int l = 0; l < CH; l++) {
    const size_t channel = c0 + at.channel(l);
#pragma unroll
    for (int n = 0; n < ST; n++) A[l][n] = channel < s.D ? rate(s.A_log[channel * STATES + at.state + n]) : -1.0f, dS[l][n] = 0;
    if (channel < s.D) carry(dS[l], A[l], s, s.final, s.starts, b, channel, at.state, s.chunks - 1, chunk, -1);
  }
  const float bias = s.dt_bias && mine ? s.dt_bias[c] : 0.0f, skip = s.Dskip && mine ? s.Dskip[c] : 0.0f;
  float dskip = 0, dbias = 0;
  const unsigned group = (unsigned)s.group;
  const int here = (int)min(blocks - 4 * span, (size_t)4);
  const size_t units = blocks / group, unit = 4 * span / group;
  const bool whole = units == s.J;

  const auto fetch = [&](int raw, int q) {
    feed.fetch(&m.raw[raw][0][0][0], first_of(q), low, q < count ? high : 0);
    cp_async_commit();
    return kind_of_token(s, b, first_of(q), RUN);
  };
  constexpr bool AHEAD = sizeof(real) == 2; /* checkpoints are fetched a run ahead, if there are registers for it */
  const real *checkpoint = s.checkpoints + ((b * runs + first_of(0) / RUN) * s.D + c - at.j) * STATES + at.state;
  const auto restore = [&](int q) {
#pragma unroll
    for (int l = 0; l < CH; l++)
      if (q < count && mine) saved[l] = load_four(checkpoint + (l ^ at.j) * STATES);
    checkpoint -= s.D * STATES;
  };
  int kind = fetch(0, 0), coming = fetch(1, 1);
  if (AHEAD) restore(0);
  cp_async_wait<1>();
  __syncwarp();
  stage_run(m, 0, 0, bias, gated);
  __syncwarp();
  mend_run(m, 0, kind);
  kind = coming;

  for (int q = 0, raw = 0; q < count; q++) {
    const int next = raw == 2 ? 0 : raw + 1, now = q & 1, first = first_of(q);
    float S[RUN + 1][CH][ST], kept[RUN][CH][ST];
    if (!AHEAD) restore(q);
#pragma unroll
    for (int l = 0; l < CH; l++) {
      const float4 v = saved[l].unpack();
      S[0][l][0] = v.x, S[0][l][1] = v.y, S[0][l][2] = v.z, S[0][l][3] = v.w;
    }
    coming = fetch(next == 2 ? 0 : next + 1, q + 2);
    if (AHEAD) restore(q + 1);
    cp_async_wait<1>();
    __syncthreads(); /* and the run before has been written */
    stage_run(m, next, !now, bias, gated);
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      float B[ST];
      load_floats(B, &m.B[now][i][at.block * STATES + at.state]);
#pragma unroll
      for (int l = 0; l < CH; l++) {
        const float2 du = m.du[now][i][at.channel(l)];
#pragma unroll
        for (int n = 0; n < ST; n++) {
          const float a = exp2_approx(du.x * A[l][n]);
          S[i + 1][l][n] = fmaf(a, S[i][l][n], du.y * B[n]);
          if (i >= RUN - KEPT) kept[i][l][n] = a;
        }
      }
    }
    float out[5]; /* of the token before: stored after the loads of the next, which need not wait for it then */
    const auto put = [&](int i) {
      for (int a = 0; a < 4; a++) store(&m.out[a][i][a < 3 ? lane : own], out[a]);
      shares[now][i][warp * 32 + own] = out[4];
    };
#pragma unroll
    for (int i = RUN - 1; i >= 0; i--) {
      float B[ST], C[ST], g[CH], y[CH], dx[CH], dd[CH], dB[ST], dC[ST];
      float2 du[CH];
      load_floats(B, &m.B[now][i][at.block * STATES + at.state]);
      load_floats(C, &m.C[now][i][at.block * STATES + at.state]);
#pragma unroll
      for (int l = 0; l < CH; l++) du[l] = m.du[now][i][at.channel(l)], g[l] = m.g[now][i][at.channel(l)];
      const float4 edge = m.edge[now][i][lane];
      if (i < RUN - 1) put(i + 1);
#pragma unroll
      for (int l = 0; l < CH; l++)
#pragma unroll
        for (int n = 0; n < ST; n++) {
          const float a = i >= RUN - KEPT ? kept[i][l][n] : exp2_approx(du[l].x * A[l][n]);
          const float ds = fmaf(g[l], C[n], dS[l][n]), back = a * ds, power = back * S[i][l][n];
          dS[l][n] = back;
          dA[l][n] = fmaf(power, du[l].x, dA[l][n]);
          y[l] = n ? fmaf(C[n], S[i + 1][l][n], y[l]) : C[n] * S[i + 1][l][n];
          dx[l] = n ? fmaf(B[n], ds, dx[l]) : B[n] * ds;
          dd[l] = n ? fmaf(A[l][n], power, dd[l]) : A[l][n] * power;
          dB[n] = l ? fmaf(du[l].y, ds, dB[n]) : du[l].y * ds;
          dC[n] = l ? fmaf(g[l], S[i + 1][l][n], dC[n]) : g[l] * S[i + 1][l][n];
        }
      const float sum = fold(dx); /* slot 0 is the lane's own channel */
      out[0] = fmaf(edge.y, sum, skip * g[0]);
      out[1] = fmaf(edge.w, sum, fold(dd)) * edge.x;
      out[2] = edge.z * fmaf(skip, edge.w, fold(y));
      out[3] = fold_channels(dC, lane);
      out[4] = fold_channels(dB, lane);
      dskip = fmaf(g[0], edge.w, dskip);
      dbias += out[1];
    }
    put(0);
    __syncthreads();
    mend_run(m, !now, kind);
    kind = coming;
    raw = next;
    drain.write(&m.out[0][0][0], first, low, high);
    /* dB: sums over the blocks of a kv block that are here; thread (i,n) has state n of token i. */
    const int i = threadIdx.x / STATES, n = threadIdx.x % STATES;
    float sum[4];
#pragma unroll
    for (int k = 0; k < 4; k++) sum[k] = shares[now][i][k * STATES + n];
    if (group > 1) sum[0] += sum[1], sum[2] += sum[3];
    if (group > 2) sum[0] += sum[2];
    const size_t to = ((b * s.T + first + i) * units + unit) * STATES + n;
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (k < (first + i < T ? here : 0) && k % group == 0) {
        if (whole)
          store(s.dB + to + k / group * STATES, sum[k]);
        else
          s.part_B[to + k / group * STATES] = sum[k];
      }
  }
  float *part = s.part + (chunk * s.B + b) * s.D * (STATES + 2);
#pragma unroll
  for (int l = 0; l < CH; l++) {
    const size_t channel = c0 + at.channel(l);
    if (channel >= s.D) continue;
#pragma unroll
    for (int n = 0; n < ST; n++) dA[l][n] *= LN2 * A[l][n];
    store_floats(part + channel * STATES + at.state, dA[l]);
    if (s.dstate && chunk == 0) store_floats(s.dstate + (b * s.D + channel) * STATES + at.state, dS[l]);
  }
  if (mine) part[s.D * STATES + c] = dskip, part[s.D * (STATES + 1) + c] = dbias;
}

/* ---- sums over shares, in their order ------------------------------------------------------------------------------------ */

/* dB (M,J,N) = sum over `shares` of part (M,J,shares,N) */
static __global__ void sum_dB(real *dB, const float *part, size_t shares, size_t N, size_t count) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= count) return;
  float sum = 0;
  for (size_t k = 0; k < shares; k++) sum += part[(e / N * shares + k) * N + e % N];
  store(dB + e, sum);
}
/* dA_log (D,N), dD, dbias (D) += sum over `shares` of part (shares, D*N + 2 D) */
static __global__ void sum_parameters(float *dA_log, float *dD, float *dbias, const float *part, size_t shares, size_t D,
                                      size_t N) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, size = D * (N + 2);
  if (e >= size) return;
  float *to = e < D * N         ? (dA_log ? dA_log + e : nullptr)
              : e < D * (N + 1) ? (dD ? dD + (e - D * N) : nullptr)
              : dbias           ? dbias + (e - D * (N + 1))
                                : nullptr;
  if (!to) return;
  float sum = 0;
  for (size_t k = 0; k < shares; k++) sum += part[k * size + e];
  *to += sum;
}

/* ---- any N --------------------------------------------------------------------------------------------------------------- */

constexpr int ANY = 16; /* tokens between checkpoints */

/* (B,chunks or ANY,N,D) floats, a thread to a channel; S[i] is the state before the i-th token of a chunk. */
struct Any {
  float *checkpoints, *S, *dS, *dB, *dC;
  size_t chunks;
};
__device__ static inline float any_decay(const Scan &s, float d, size_t c, size_t n) {
  return exp2_approx(d * rate(s.A_log[c * s.N + n]) * LOG2E);
}
__device__ static inline float any_step(const Scan &s, size_t row, size_t c) {
  return softplus_log2<true>(load(s.dt + row * s.D + c) + (s.dt_bias ? s.dt_bias[c] : 0.0f)) * LN2;
}
__device__ static inline bool starts_document(const Scan &s, size_t b, size_t t) {
  return s.rows.prev && s.rows.prev[b * s.T + t] == -2;
}

/* The states before tokens first .. first+n of channel c to S (n+1,N,D), of which the first is there. */
__device__ static void any_states(const Scan &s, float *S, size_t b, size_t c, size_t first, size_t n, bool keep) {
  const size_t size = s.N * s.D, kv = c / s.N / (s.D / s.N / s.J);
  for (size_t i = 0; i < n; i++) {
    const size_t row = b * s.T + first + i;
    const float d = any_step(s, row, c), u = d * load(s.x + row * s.D + c), *from = S + (keep ? i * size : 0);
    float *to = S + (keep ? (i + 1) * size : 0);
    const bool fresh = starts_document(s, b, first + i);
    for (size_t k = 0; k < s.N; k++)
      to[k * s.D] = fmaf(any_decay(s, d, c, k), fresh ? 0.0f : from[k * s.D], u * load(s.Bm + (row * s.J + kv) * s.N + k));
  }
}

static __global__ void any_checkpoints(const Scan s, const Any any) {
  const size_t item = (size_t)blockIdx.x * blockDim.x + threadIdx.x, b = item / s.D, c = item % s.D, size = s.N * s.D;
  if (b >= s.B) return;
  float *S = any.S + b * (ANY + 1) * size + c, *part = s.part + b * s.D * (s.N + 2);
  for (size_t n = 0; n < s.N; n++) {
    S[n * s.D] = s.initial ? s.initial[(b * s.D + c) * s.N + n] : 0.0f;
    any.dS[b * size + n * s.D + c] = s.dstate ? s.dstate[(b * s.D + c) * s.N + n] : 0.0f;
    part[c * s.N + n] = 0;
  }
  part[s.D * s.N + c] = part[s.D * (s.N + 1) + c] = 0;
  for (size_t k = 0; k < any.chunks; k++) {
    for (size_t n = 0; n < s.N; n++) any.checkpoints[(b * any.chunks + k) * size + n * s.D + c] = S[n * s.D];
    any_states(s, S, b, c, k * ANY, min((size_t)ANY, s.T - k * ANY), false);
  }
}

static __global__ void any_back(const Scan s, const Any any, size_t chunk) {
  const size_t item = (size_t)blockIdx.x * blockDim.x + threadIdx.x, b = item / s.D, c = item % s.D, N = s.N, D = s.D,
               size = N * D;
  if (b >= s.B) return;
  const size_t first = chunk * ANY, count = min((size_t)ANY, s.T - first), block = c / N, kv = block / (D / N / s.J);
  float *S = any.S + b * (ANY + 1) * size + c, *dS = any.dS + b * size + c, *part = s.part + b * D * (N + 2);
  const float skip = s.Dskip ? s.Dskip[c] : 0.0f;
  for (size_t n = 0; n < N; n++) S[n * D] = any.checkpoints[(b * any.chunks + chunk) * size + n * D + c];
  any_states(s, S, b, c, first, count, true);
  for (size_t i = count; i-- > 0;) {
    const size_t row = b * s.T + first + i;
    const real *B = s.Bm + (row * s.J + kv) * N, *C = s.C + row * D + block * N;
    const float x = load(s.x + row * D + c), d = any_step(s, row, c), u = d * x, dy = load(s.dy + row * D + c);
    const bool fresh = starts_document(s, b, first + i);
    float y = skip * x, g = dy, du = 0, dd = 0, *dB = any.dB + (b * ANY + i) * size + c,
          *dC = any.dC + (b * ANY + i) * size + c;
    for (size_t n = 0; n < N; n++) y = fmaf(load(C + n), S[(i + 1) * size + n * D], y);
    if (s.z) {
      const float z = load(s.z + row * D + c), sg = reciprocal_approx(1.0f + exp2_approx(-LOG2E * z));
      g = dy * z * sg;
      store(s.dz + row * D + c, dy * y * sg * fmaf(z, 1.0f - sg, 1.0f));
    }
    for (size_t n = 0; n < N; n++) {
      const float ds = fmaf(g, load(C + n), dS[n * D]), back = fresh ? 0.0f : any_decay(s, d, c, n) * ds,
                  power = back * S[i * size + n * D], A = rate(s.A_log[c * N + n]);
      dS[n * D] = back;
      dB[n * D] = u * ds;
      dC[n * D] = g * S[(i + 1) * size + n * D];
      part[c * N + n] += A * d * power;
      du = fmaf(load(B + n), ds, du);
      dd = fmaf(A, power, dd);
    }
    const float w = LOG2E * (load(s.dt + row * D + c) + (s.dt_bias ? s.dt_bias[c] : 0.0f)),
                dv = fmaf(x, du, dd) * reciprocal_approx(1.0f + exp2_approx(-w));
    store(s.dx + row * D + c, fmaf(d, du, skip * g));
    store(s.ddt + row * D + c, dv);
    part[D * N + c] += g * x;
    part[D * (N + 1) + c] += dv;
  }
  if (s.dstate && !chunk)
    for (size_t n = 0; n < N; n++) s.dstate[(b * D + c) * N + n] = dS[n * D];
}

/* dC of the chunk's tokens over the N channels of a block, dB over those of a kv block. An element a thread. */
static __global__ void any_sums(const Scan s, const Any any, size_t first, size_t count) {
  const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x, width = s.D + s.J * s.N, b = e / width / count,
               i = e / width % count, column = e % width;
  if (b >= s.B) return;
  const bool C = column < s.D;
  const size_t at = C ? column : column - s.D, channels = C ? s.N : s.D / s.J, size = s.N * s.D;
  const float *from = (C ? any.dC : any.dB) + (b * ANY + i) * size + at % s.N * s.D + at / s.N * channels;
  float sum = 0;
  for (size_t k = 0; k < channels; k++) sum += from[k];
  store(C ? s.dC + (b * s.T + first + i) * s.D + at : s.dB + (b * s.T + first + i) * s.J * s.N + at, sum);
}

static void any_backward(Scan &s) {
  const size_t size = s.B * s.N * s.D;
  Any any = {};
  any.chunks = ceil_div(s.T, ANY);
  s.part = (float *)device_scratch(((any.chunks + 1 + 1 + 3 * ANY) * size + s.B * s.D * (s.N + 2)) * sizeof(float));
  if (!s.part) return;
  any.S = s.part + s.B * s.D * (s.N + 2), any.dS = any.S + (ANY + 1) * size, any.dB = any.dS + size,
  any.dC = any.dB + ANY * size;
  any.checkpoints = any.dC + ANY * size;
  LAUNCH(any_checkpoints, blocks_for(s.B * s.D, 64), 64, 0, s, any);
  for (size_t k = any.chunks; k-- > 0;) {
    const size_t count = min((size_t)ANY, s.T - k * ANY);
    LAUNCH(any_back, blocks_for(s.B * s.D, 64), 64, 0, s, any, k);
    LAUNCH(any_sums, blocks_for(s.B * count * (s.D + s.J * s.N), 256), 256, 0, s, any, k * ANY, count);
  }
}

/* ---- the op -------------------------------------------------------------------------------------------------------------- */

static void fast_backward(Scan &s) {
  scan_cut(s);
  const size_t size = s.B * s.D, rep = s.D / STATES / s.J, chunked = s.chunks > 1 ? s.chunks * size : 0,
               final = chunked && s.dstate ? size * STATES : 0;
  s.group = rep % 4 == 0 ? 4 : rep % 2 == 0 ? 2 : 1;
  const size_t part_B = s.group == rep ? 0 : s.B * s.T * (s.D / s.group), checkpoints = s.B * ceil_div(s.T, RUN) * s.D * STATES;
  s.part =
      (float *)device_scratch((s.chunks * size * (STATES + 2) + chunked * (2 * STATES + 1) + final + part_B) * sizeof(float) +
                              checkpoints * sizeof(real));
  if (!s.part) return;
  s.ends = s.part + s.chunks * size * (STATES + 2), s.starts = s.ends + chunked * STATES;
  float *copy = s.starts + chunked * STATES;
  s.part_B = copy + final, s.checkpoints = (real *)(s.part_B + part_B), s.total = (float *)(s.checkpoints + checkpoints);
  s.final = s.dstate;
  if (final) { /* the first chunk writes dstate while others read it */
    device_copy(copy, s.dstate, final * sizeof(float));
    s.final = copy;
  }
  if (s.chunks > 1) scan_pass(ENDS, s), scan_pass(STARTS, s);
  scan_pass(CHECKPOINTS, s);
  LAUNCH((back_over_runs<2>), ceil_div(s.D, 64) * s.B * s.chunks, 32 * BACK_WARPS,
         BACK_WARPS * (sizeof(BackSpace) + 2 * RUN * 32 * sizeof(float)), s);
  if (part_B)
    LAUNCH(sum_dB, blocks_for(s.B * s.T * s.J * STATES, 256), 256, 0, s.dB, s.part_B, rep / s.group, (size_t)STATES,
           s.B * s.T * s.J * STATES);
}

void selective_scan_backward(real *dx, real *ddt, float *dA_log, real *dB, real *dC, float *dD, float *ddt_bias, real *dz,
                             float *dstate, const real *dy, const float *state, const real *x, const real *dt,
                             const float *A_log, const real *Bm, const real *C, const float *Dskip, const float *dt_bias,
                             const real *z, Rows rows, size_t B, size_t T, size_t D, size_t N, size_t J) {
  Scan s = {};
  s.x = x, s.dt = dt, s.A_log = A_log, s.Bm = Bm, s.C = C, s.Dskip = Dskip, s.dt_bias = dt_bias, s.z = z, s.B = B, s.T = T,
  s.D = D, s.N = N, s.J = J;
  s.rows.prev = rows.prev, s.dy = dy, s.dx = dx, s.ddt = ddt, s.dB = dB, s.dC = dC, s.dz = dz, s.dstate = dstate,
  s.initial = state;
  if (!B || !T || !D || !N || !J) return;
  if (scan_fast(s) && !((uintptr_t)state & 15))
    fast_backward(s);
  else
    any_backward(s);
  if (s.part)
    LAUNCH(sum_parameters, blocks_for(D * (N + 2), 256), 256, 0, dA_log, dD, ddt_bias, s.part, s.chunks ? s.chunks * B : B, D,
           N);
}
