/* scan.cu - Mamba-1's selective scan: forward, and the passes over tokens that backward needs before it goes back.
 *
 * Many tokens: over_tiles. A warp owns 32 channels of a row and runs through time with their states in registers. Tokens come in tiles
 * by cp.async, two tiles ahead; while a tile is scanned, lane by lane one token of the next is made ready (softplus, d x, B and C as
 * floats), so that the exp units, the FMA units and the loads are busy at the same time. Warps never wait for each other.
 * Few tokens with a State: few_tokens. A warp takes 32 (or 8) channels of a row: replays the ring, folds, runs the call's tokens. */
#include "scan.cuh"

/* ---- many tokens ------------------------------------------------------------------------------------------------------------------ */

template <int ARRAYS> struct TileSpace {
  real raw[3][ARRAYS][TILE][32]; /* this tile's tokens, the next's, and those under way: 0 x (dy), 1 dt, 2 B (C), 3 z, 4 C */
  float2 du[2][TILE][32];        /* d log2(e), and d x (dy silu(z)) */
  float V[2][TILE][32];          /* B (C) of the two blocks */
  float C[2][TILE][32];
  real out[TILE][32];
};
constexpr int arrays_of(int pass) { return pass == OUTPUT ? 5 : pass == STARTS ? 4 : 3; }

/* RUN tokens of a tile made ready. Lane l has channels 2 (l % 16), + 1 of tokens l / 16, + 2, and four states of token l / 8. The loads
 * come before, the stores after the arithmetic of the tokens that are scanned meanwhile. */
template <int PASS> struct Ready {
  float4 du[RUN / 2], V, C;
  __device__ void load(const TileSpace<arrays_of(PASS)> &m, int raw, int part, float2 bias, bool gated) {
    const int lane = threadIdx.x % 32;
    const auto &r = m.raw[raw];
#pragma unroll
    for (int k = 0; k < RUN / 2; k++) {
      const int i = part + 2 * k + lane / 16, c = lane % 16 * 2;
      const float2 w = load_two(&r[0][i][c]), v = load_two(&r[1][i][c]);
      const float d = softplus_log2<sizeof(real) == 4>(v.x + bias.x), e = softplus_log2<sizeof(real) == 4>(v.y + bias.y);
      if constexpr (PASS == STARTS) {
        const float2 z = load_two(&r[3][i][c]);
        du[k] = make_float4(d, gated ? w.x * gate(z.x) : w.x, e, gated ? w.y * gate(z.y) : w.y);
      } else {
        du[k] = make_float4(d, LN2 * d * w.x, e, LN2 * e * w.y);
      }
    }
    V = load_four(&r[2][part + lane / 8][lane % 8 * 4]).unpack();
    if constexpr (PASS == OUTPUT) C = load_four(&r[4][part + lane / 8][lane % 8 * 4]).unpack();
  }
  __device__ void store(TileSpace<arrays_of(PASS)> &m, int to, int part) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < RUN / 2; k++) *(float4 *)&m.du[to][part + 2 * k + lane / 16][lane % 16 * 2] = du[k];
    *(float4 *)&m.V[to][part + lane / 8][lane % 8 * 4] = V;
    if constexpr (PASS == OUTPUT) *(float4 *)&m.C[to][part + lane / 8][lane % 8 * 4] = C;
  }
};

/* PASS: see scan.cuh. CH: lanes share so many channels. POLY of 32 decays (two tokens of 16 states) are polynomials of DEGREE. */
template <int PASS, int CH, int POLY, int DEGREE, int WARPS> static __global__ void __launch_bounds__(32 * WARPS, 8 / WARPS) over_tiles(const Scan s, size_t items) {
  constexpr int ST = STATES / CH, ARRAYS = arrays_of(PASS);
  constexpr bool BACK = PASS == STARTS;
  const size_t warps = (s.D + 31) / 32, item = (size_t)blockIdx.x * WARPS + (WARPS > 1 ? threadIdx.x / 32 : 0);
  if (item >= items) return;
  const size_t w = item % warps, b = item / warps % s.B, chunk = item / warps / s.B;
  DYNAMIC_SHARED(TileSpace<ARRAYS>, space);
  TileSpace<ARRAYS> &m = space[threadIdx.x / 32];
  const Place<CH> at;
  const size_t c0 = 32 * w, c = c0 + at.lane;
  const bool gated = s.z, mine = c < s.D;

  /* The row's tiles are shifted so that one ends where `state` is left: after `cut` tokens. */
  int slot = 0, cut = 0;
  if (PASS == OUTPUT || PASS == ENDS)
    if (s.state && s.initial) {
      const Past p = past_of(s, b);
      slot = p.slot, cut = max(p.mark - p.pos, 0);
    }
  const int T = (int)s.T, low = (int)(chunk * s.tiles * TILE) - (TILE - cut % TILE) % TILE, high = min(low + (int)(s.tiles * TILE), T);
  const int start = max(low, 0), tiles = high > low ? (high - low + TILE - 1) / TILE : 0;
  const auto first_of = [&](int q) { return low + (BACK ? tiles - 1 - q : q) * TILE; };

  Feed<ARRAYS, TILE> feed;
#pragma unroll
  for (int k = 0; k < feed.COUNT; k++) {
    const int a = feed.array(k);
    if (a == 2 && !BACK)
      feed.blocks(k, s, b, w, first_of(0), TILE);
    else
      feed.channels(k, s, a == 0 ? (BACK ? s.dy : s.x) : a == 1 ? s.dt : a == 3 ? s.z : s.C, b, w, first_of(0), BACK ? -TILE : TILE);
  }

  float A[CH][ST], S[CH][ST], limit[CH][ST];
#pragma unroll
  for (int i = 0; i < CH; i++) {
    const size_t channel = c0 + at.channel(i);
#pragma unroll
    for (int n = 0; n < ST; n++) {
      A[i][n] = channel < s.D ? rate(s.A_log[channel * STATES + at.state + n]) : -1.0f;
      limit[i][n] = decay_limit(A[i][n]);
      S[i][n] = 0;
    }
    if ((PASS == OUTPUT || PASS == CHECKPOINTS) && channel < s.D) carry(S[i], A[i], s, s.initial, s.ends, b, channel, at.state, 0, chunk, 1);
  }
  const size_t pair = c0 + at.lane % 16 * 2;
  const float2 bias = s.dt_bias && pair < s.D ? make_float2(s.dt_bias[pair], s.dt_bias[pair + 1]) : make_float2(0, 0);
  const float skip = PASS == OUTPUT && s.Dskip && mine ? s.Dskip[c] : 0.0f, open = gated ? 0.0f : 1.0f;
  float total = 0;
  Ready<PASS> ready;
  Drain<1, TILE> drain;
  for (int k = 0; PASS == OUTPUT && k < drain.COUNT; k++) drain.channels(k, s, s.y, b, w, first_of(0), TILE);

  const auto fetch = [&](int raw, int q) {
    const int first = first_of(q);
    feed.fetch(&m.raw[raw][0][0][0], first, start, q < tiles ? high : 0);
    cp_async_commit();
    return kind_of_token(s, b, first, TILE);
  };
  int kind = fetch(0, 0), coming = fetch(1, 1);
  cp_async_wait<1>();
  __syncwarp();
  for (int part = 0; part < TILE; part += RUN) {
    ready.load(m, 0, part, bias, gated);
    ready.store(m, 0, part);
  }
  __syncwarp();
  mend_steps(m.du[0], kind);
  kind = coming;
  __syncwarp();

  for (int q = 0, raw = 0; q < tiles; q++) {
    const int next = raw == 2 ? 0 : raw + 1, now = q & 1;
    const int first = first_of(q);
    coming = fetch(next == 2 ? 0 : next + 1, q + 2);
    cp_async_wait<1>();
    __syncwarp();
#pragma unroll 1
    for (int part = BACK ? TILE - RUN : 0; part >= 0 && part < TILE; part += BACK ? -RUN : RUN) {
      float y[RUN][CH];
      if constexpr (PASS == CHECKPOINTS)
        if (first + part < T) {
          const size_t row = (b * ((s.T + RUN - 1) / RUN) + (first + part) / RUN) * s.D;
#pragma unroll
          for (int i = 0; i < CH; i++)
            if (c0 + at.channel(i) < s.D) store_reals(s.checkpoints + (row + c0 + at.channel(i)) * STATES + at.state, S[i]);
        }
      ready.load(m, next, part, bias, gated);
#pragma unroll
      for (int k = 0; k < RUN; k++) {
        const int i = part + (BACK ? RUN - 1 - k : k);
        float V[ST], C[ST];
        load_floats(V, &m.V[now][i][at.block * STATES + at.state]);
        if constexpr (PASS == OUTPUT) load_floats(C, &m.C[now][i][at.block * STATES + at.state]);
#pragma unroll
        for (int l = 0; l < CH; l++) {
          const float2 du = m.du[now][i][at.channel(l)];
          if (PASS == ENDS && l == 0) total += du.x;
#pragma unroll
          for (int n = 0; n < ST; n++) {
            const int e = ((k % 2 * CH + l) * ST + n) * POLY; /* POLY of every 32, spread evenly */
            const float a = e / 32 != (e + POLY) / 32 ? decay_polynomial<DEGREE>(du.x, A[l][n], limit[l][n]) : exp2_approx(du.x * A[l][n]);
            S[l][n] = BACK ? a * fmaf(du.y, V[n], S[l][n]) : fmaf(a, S[l][n], du.y * V[n]);
            if constexpr (PASS == OUTPUT) y[k][l] = n ? fmaf(C[n], S[l][n], y[k][l]) : C[n] * S[l][n];
          }
        }
      }
      if constexpr (PASS == OUTPUT) {
        float out[RUN];
#pragma unroll
        for (int k = 0; k < RUN; k++)
          out[k] = fmaf(skip, load(&m.raw[raw][0][part + k][at.lane]), fold(y[k])) * (gate(load(&m.raw[raw][3][part + k][at.lane])) + open);
#pragma unroll
        for (int k = 0; k < RUN; k++) store(&m.out[part + k][at.lane], out[k]);
      }
      ready.store(m, !now, part);
    }
    __syncwarp();
    mend_steps(m.du[!now], kind);
    kind = coming;
    if constexpr (PASS == OUTPUT) {
      drain.write(&m.out[0][0], first, start, high);
      if (cut && first + TILE == cut) {
#pragma unroll
        for (int i = 0; i < CH; i++)
          if (c0 + at.channel(i) < s.D) store_floats(s.state + ((size_t)slot * s.D + c0 + at.channel(i)) * STATES + at.state, S[i]);
      }
    }
    raw = next;
    __syncwarp();
  }
  if constexpr (PASS == ENDS || PASS == STARTS) {
    const size_t row = (chunk * s.B + b) * s.D;
#pragma unroll
    for (int i = 0; i < CH; i++)
      if (c0 + at.channel(i) < s.D) store_floats((BACK ? s.starts : s.ends) + (row + c0 + at.channel(i)) * STATES + at.state, S[i]);
    if (PASS == ENDS && mine) s.total[row + c] = total;
  }
}

/* The choices that cuda/dev/scan.cu times. */
template <int PASS> static void launch_pass(const Scan &s) {
  constexpr int WARPS = 1, POLY = sizeof(real) == 4 ? 0 : PASS == OUTPUT ? 6 : 8;
  const size_t items = (s.D + 31) / 32 * s.B * s.chunks;
  LAUNCH((over_tiles<PASS, 2, POLY, 4, WARPS>), blocks_for(items, WARPS), 32 * WARPS, WARPS * sizeof(TileSpace<arrays_of(PASS)>), s, items);
}
void scan_pass(Pass pass, const Scan &s) {
  if (pass == OUTPUT) launch_pass<OUTPUT>(s);
  if (pass == ENDS) launch_pass<ENDS>(s);
  if (pass == STARTS) launch_pass<STARTS>(s);
  if (pass == CHECKPOINTS) launch_pass<CHECKPOINTS>(s);
}

void scan_cut(Scan &s) {
  const size_t warps = (s.D + 31) / 32 * s.B, wanted = 8 * (size_t)multiprocessors(); /* two for each of an SM's four schedulers */
  const size_t tiles = (s.T + TILE - 1 + TILE - 1) / TILE; /* a row may be shifted */
  const size_t most = warps * 5 < wanted * 2 ? ceil_div(wanted, warps) : 1;
  const size_t chunks = min(most, max(s.T / 64, (size_t)1));
  s.tiles = ceil_div(tiles, chunks), s.chunks = ceil_div(tiles, s.tiles);
}

/* ---- few tokens ------------------------------------------------------------------------------------------------------------------- */

constexpr int PIECE = 8; /* tokens staged at a time */

/* A warp's share: L lanes to a channel, so 32/L channels, of VALUES/16 blocks. A token is pieces of 16 bytes: x, B, C, z, dt. */
template <int L> struct Few {
  static constexpr int CHANNELS = 32 / L, ST = STATES / L, VALUES = L == 1 ? 32 : 16;
  static constexpr int X = CHANNELS / REALS_16, V = VALUES / REALS_16, DT = CHANNELS / 4;
  static constexpr int AT_B = X, AT_C = X + V, AT_Z = X + 2 * V, AT_DT = 2 * X + 2 * V, PIECES = AT_DT + DT, COUNT = (PIECES + 31) / 32;
  struct Space {
    uint4 raw[2][PIECE][PIECES];
    float B[PIECE][VALUES], C[PIECE][VALUES];
  };
};

/* Where a lane's pieces of a token come from: from the call's arrays or from the ring. */
template <int L> struct Sources {
  using F = Few<L>;
  const char *call[F::COUNT], *ring[F::COUNT];
  size_t call_stride[F::COUNT], ring_stride[F::COUNT];
  __device__ void set(int k, const void *from_call, const void *from_ring, size_t width, size_t column, size_t ring_column, size_t ring_size) {
    call_stride[k] = width * sizeof(real), ring_stride[k] = width * ring_size;
    call[k] = from_call ? (const char *)from_call + column * sizeof(real) : nullptr;
    ring[k] = from_ring ? (const char *)from_ring + ring_column * ring_size : nullptr;
  }
  __device__ Sources(const Scan &s, size_t c0) {
    const size_t rep = s.D / STATES / s.J;
#pragma unroll
    for (int k = 0; k < F::COUNT; k++) {
      const int q = k * 32 + threadIdx.x % 32, e = (q < F::AT_B ? q : q < F::AT_C ? q - F::AT_B : q < F::AT_Z ? q - F::AT_C : q < F::AT_DT ? q - F::AT_Z : q - F::AT_DT) * REALS_16;
      const size_t block = c0 / STATES + e / STATES;
      set(k, nullptr, nullptr, 0, 0, 0, 0);
      if (q < F::AT_B) {
        if (c0 + e < s.D) set(k, s.x, s.ring.x, s.D, c0 + e, c0 + e, sizeof(real));
      } else if (q < F::AT_C) {
        if (block * STATES < s.D) set(k, s.Bm, s.ring.B, s.J * STATES, block / rep * STATES + e % STATES, block / rep * STATES + e % STATES, sizeof(real));
      } else if (q < F::AT_Z) {
        if (block * STATES < s.D) set(k, s.C, nullptr, s.D, block * STATES + e % STATES, 0, 0);
      } else if (q < F::AT_DT) {
        if (c0 + e < s.D) set(k, s.z, nullptr, s.D, c0 + e, 0, 0);
      } else if (q < F::PIECES) { /* floats in the ring */
        const size_t f = (q - F::AT_DT) * 4;
        set(k, e < F::CHANNELS && c0 + e < s.D ? s.dt : nullptr, c0 + f < s.D ? s.ring.dt : nullptr, s.D, c0 + e, c0 + f, sizeof(float));
      }
    }
  }
  /* Positions at .. at+n of row b. */
  __device__ void fetch(uint4 (*raw)[F::PIECES], const Scan &s, const Past &p, size_t b, int at, int n) const {
    for (int i = 0; i < n; i++) {
      const bool mine = at + i >= p.pos;
      const size_t row = mine ? b * s.T + (at + i - p.pos) : ring_row(p, at + i);
#pragma unroll
      for (int k = 0; k < F::COUNT; k++) {
        const char *from = mine ? call[k] : ring[k];
        if (from) cp_async_16(&raw[i][k * 32 + threadIdx.x % 32], from + row * (mine ? call_stride[k] : ring_stride[k]));
      }
    }
  }
};

/* The first `run` tokens of the call (0: only what precedes it) for channels of block x and rows y, y + gridDim.y, …, at most 32.
 * initial (B,D,16), or NULL: takes the state after them. own_B: the block has whole kv blocks, and writes the ring's B. */
template <int L, bool TREE> static __global__ void __launch_bounds__(L == 1 ? 256 : 512) few_tokens(const Scan s, size_t run, float *initial, bool own_B) {
  using F = Few<L>;
  constexpr int ST = F::ST;
  constexpr unsigned ALL = 0xffffffffu;
  DYNAMIC_SHARED(typename F::Space, spaces);
  typename F::Space &m = spaces[threadIdx.x / 32];
  float4 *tree = (float4 *)(spaces + blockDim.x / 32) + threadIdx.x; /* (run,ST/4,threads): every token's state */
  const int lane = threadIdx.x % 32, j = lane % L, state = j * ST;
  const size_t c0 = (size_t)blockIdx.x * (blockDim.x / L) + threadIdx.x / 32 * F::CHANNELS, c = c0 + lane / L, rep = s.D / STATES / s.J;
  const bool mine = c < s.D, gated = s.z;

  float A[ST], limit[ST], S[ST] = {}, ahead[ST] = {};
  if (mine) load_floats(A, s.A_log + c * STATES + state);
#pragma unroll
  for (int n = 0; n < ST; n++) A[n] = mine ? __fmul_rn(rate(A[n]), LOG2E) : -1.0f, limit[n] = decay_limit(A[n]);
  const float skip = s.Dskip && mine ? s.Dskip[c] : 0.0f, bias = s.dt_bias && mine ? s.dt_bias[c] : 0.0f;
  const Sources<L> sources(s, c0);
  const size_t block = c0 / STATES + lane / STATES; /* whose B this lane stages: the first of a kv block's writes it to the ring */
  const bool writes_B = own_B && lane < F::VALUES && c0 % STATES == 0 && block * STATES < s.D && block % rep == 0;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int rows = (int)((s.B - blockIdx.y + gridDim.y - 1) / gridDim.y);
  Past all = {};
  if (lane < rows) all = past_of(s, blockIdx.y + (size_t)lane * gridDim.y);
  const auto past = [&](int r) {
    return Past{__shfl_sync(ALL, all.slot, r), __shfl_sync(ALL, all.begin, r), __shfl_sync(ALL, all.pos, r), __shfl_sync(ALL, all.mark, r)};
  };
  const auto row_of = [&](int r) { return blockIdx.y + (size_t)r * gridDim.y; };
  const auto load_state = [&](const Past &p) {
    if (mine) load_floats(ahead, s.state + ((size_t)p.slot * s.D + c) * STATES + state);
  };
  const auto piece_of = [&](const Past &p, int at) { return min(PIECE, p.pos + (int)run - at); };

  Past p = past(0);
  int r = 0, at = p.begin, buffer = 0;
  sources.fetch(m.raw[0], s, p, row_of(0), at, piece_of(p, at));
  cp_async_commit();
  load_state(p);
  for (bool fresh = true;;) {
    const int n = piece_of(p, at);
    const bool last = at + n >= p.pos + (int)run, more = !last || r + 1 < rows;
    const size_t b = row_of(r);
    Past next = p;
#pragma unroll
    for (int i = 0; i < ST; i++) S[i] = fresh ? ahead[i] : S[i];
    if (last && more) next = past(r + 1);
    const int next_at = last ? next.begin : at + n;
    if (more) {
      sources.fetch(m.raw[buffer ^ 1], s, next, row_of(r + last), next_at, piece_of(next, next_at));
      if (last) load_state(next);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    if (lane < F::VALUES)
      for (int i = 0; i < n; i++) {
        const uint4 *token = m.raw[buffer][i];
        m.B[i][lane] = load((const real *)(token + F::AT_B) + lane);
        if (at + i >= p.pos) m.C[i][lane] = load((const real *)(token + F::AT_C) + lane);
      }
    /* The call's tokens may take the places of ring entries that other warps of the kv block replay. */
    if (own_B && at <= p.pos && at + n > p.pos && p.pos + (int)run - p.begin > RING_ROWS) __syncthreads();
    __syncwarp();
    for (int i = 0; i < n; i++) {
      const uint4 *token = m.raw[buffer][i];
      const int position = at + i, t = position - p.pos;
      const float x = load((const real *)token + lane / L);
      const float d = t < 0 ? ((const float *)(token + F::AT_DT))[lane / L]
                            : __fmul_rn(softplus_log2<true>(__fadd_rn(load((const real *)(token + F::AT_DT) + lane / L), bias)), LN2);
      const float u = __fmul_rn(d, x), *Bt = m.B[i] + (L == 1 ? lane / 16 * 16 : 0) + state, *Ct = m.C[i] + (L == 1 ? lane / 16 * 16 : 0) + state;
      float R[ST], sum[ST / 4];
#pragma unroll
      for (int e = 0; e < ST; e++) R[e] = S[e];
      if (TREE && t >= 0) {
        const int before = s.rows.prev[b * s.T + t];
#pragma unroll
        for (int e = 0; e < ST; e += 4) {
          const float4 q = before >= 0 ? tree[(before * (ST / 4) + e / 4) * blockDim.x] : make_float4(0, 0, 0, 0);
          if (before != -1) R[e] = q.x, R[e + 1] = q.y, R[e + 2] = q.z, R[e + 3] = q.w;
        }
      }
#pragma unroll
      for (int e = 0; e < ST; e += 4) {
        const float4 Bq = *(const float4 *)(Bt + e);
        const float B4[4] = {Bq.x, Bq.y, Bq.z, Bq.w};
#pragma unroll
        for (int n4 = 0; n4 < 4; n4++) {
          const float a = sizeof(real) == 2 && n4 == 3 ? decay_polynomial<4>(d, A[e + n4], limit[e + n4]) : exp2_approx(__fmul_rn(d, A[e + n4]));
          R[e + n4] = fmaf(a, R[e + n4], __fmul_rn(u, B4[n4]));
        }
      }
      if (TREE && t >= 0) {
#pragma unroll
        for (int e = 0; e < ST; e += 4) tree[(t * (ST / 4) + e / 4) * blockDim.x] = make_float4(R[e], R[e + 1], R[e + 2], R[e + 3]);
      } else {
#pragma unroll
        for (int e = 0; e < ST; e++) S[e] = R[e];
      }
      if (position + 1 == p.mark && mine) store_floats(s.state + ((size_t)p.slot * s.D + c) * STATES + state, R);
      if (t < 0) continue;
#pragma unroll
      for (int e = 0; e < ST; e += 4) {
        const float4 Cq = *(const float4 *)(Ct + e);
        sum[e / 4] = fmaf(Cq.w, R[e + 3], fmaf(Cq.z, R[e + 2], fmaf(Cq.y, R[e + 1], __fmul_rn(Cq.x, R[e]))));
      }
      float y; /* of four states each: (0 + 1) + (2 + 3), in registers or across lanes */
      if constexpr (L == 1) {
        y = __fadd_rn(__fadd_rn(sum[0], sum[1]), __fadd_rn(sum[2], sum[3]));
      } else {
        y = __fadd_rn(sum[0], __shfl_xor_sync(ALL, sum[0], 1));
        y = __fadd_rn(y, __shfl_xor_sync(ALL, y, 2));
      }
      y = fmaf(skip, x, y);
      if (gated) y = __fmul_rn(y, gate(load((const real *)(token + F::AT_Z) + lane / L)));
      if (mine && j == 0) store(s.y + (b * s.T + t) * s.D + c, y);
      if (!s.ring.x || position < ring_first(p) || position >= ring_last(p, s.T)) continue;
      const size_t row = ring_row(p, position);
      if (mine && j == 0) store(s.ring.x + row * s.D + c, x), s.ring.dt[row * s.D + c] = d;
      if (writes_B) store(s.ring.B + (row * s.J + block / rep) * STATES + lane % STATES, m.B[i][lane]);
    }
    if (last && initial && mine) store_floats(initial + (b * s.D + c) * STATES + state, S);
    if (!more) break;
    fresh = last, r += last, p = next, at = next_at, buffer ^= 1;
    __syncwarp();
  }
}

/* The call's tokens that the ring takes. only_B: the rest is written. */
static __global__ void fill_ring(const Scan s, bool only_B) {
  const size_t b = blockIdx.x / RING_ROWS;
  const Past p = past_of(s, b);
  const int position = ring_first(p) + (int)(blockIdx.x % RING_ROWS);
  if (position >= ring_last(p, s.T)) return;
  const size_t from = b * s.T + (position - p.pos), to = ring_row(p, position), width = s.J * s.N;
  for (size_t e = threadIdx.x; e < width; e += blockDim.x) s.ring.B[to * width + e] = s.Bm[from * width + e];
  for (size_t c = threadIdx.x; !only_B && c < s.D; c += blockDim.x) {
    s.ring.x[to * s.D + c] = s.x[from * s.D + c];
    s.ring.dt[to * s.D + c] = __fmul_rn(softplus_log2<true>(__fadd_rn(load(s.dt + from * s.D + c), s.dt_bias ? s.dt_bias[c] : 0.0f)), LN2);
  }
}

template <int L, bool TREE> static void launch_few(const Scan &s, size_t run, float *initial, size_t blocks, bool own_B) {
  const size_t threads = STATES * blocks * L, groups = ceil_div(s.D, STATES * blocks);
  const size_t shared = threads / 32 * sizeof(typename Few<L>::Space) + (TREE ? run * threads * Few<L>::ST * sizeof(float) : 0);
  const size_t rows = min(max(s.B * groups / (24 * (size_t)multiprocessors()), (size_t)1), (size_t)32);
  LAUNCH_EARLY((few_tokens<L, TREE>), dim3(groups, ceil_div(s.B, rows)), threads, shared, s, run, initial, own_B);
}

/* A thread block has whole kv blocks, about 64 channels of them, if that is possible: then it can write the ring's B itself. */
static void run_few(const Scan &s, size_t run, float *initial) {
  const bool tree = s.rows.prev && run, narrow = tree || s.B * s.D < 128 * (size_t)multiprocessors();
  const size_t rep = s.D / STATES / s.J;
  const bool whole = rep <= (size_t)(tree ? 4 : narrow ? 8 : 16);
  const size_t blocks = whole ? rep * max((size_t)1, 4 / rep) : 4;
  if (tree)
    launch_few<4, true>(s, run, initial, blocks, whole);
  else if (narrow)
    launch_few<4, false>(s, run, initial, blocks, whole);
  else
    launch_few<1, false>(s, run, initial, blocks, whole);
  if (run && s.ring.x && !whole) LAUNCH(fill_ring, s.B * RING_ROWS, 256, 0, s, true);
}

/* ---- any N ------------------------------------------------------------------------------------------------------------------------ */

/* One thread takes a channel through the ring and the call. states (B,slots,N,D): slot 0 is the running state; where tokens branch, slot
 * t+1 is token t's. */
static __global__ void any_forward(const Scan s, float *states, size_t slots) {
  const size_t item = (size_t)blockIdx.x * blockDim.x + threadIdx.x, b = item / s.D, c = item % s.D;
  if (b >= s.B) return;
  const size_t N = s.N, k = c / N, kv = k / (s.D / N / s.J);
  const Past p = past_of(s, b);
  const float bias = s.dt_bias ? s.dt_bias[c] : 0.0f;
  float *S = states + b * slots * N * s.D + c, *state = s.state ? s.state + ((size_t)p.slot * s.D + c) * N : nullptr;
  for (size_t n = 0; n < N; n++) S[n * s.D] = state ? state[n] : 0.0f;
  for (int at = p.begin; at < p.pos + (int)s.T; at++) {
    const int t = at - p.pos, before = t >= 0 && s.rows.prev ? s.rows.prev[b * s.T + t] : -1;
    const size_t row = t < 0 ? ring_row(p, at) : b * s.T + t;
    const bool branch = slots > 1 && t >= 0;
    const float *from = before == -2 ? nullptr : branch ? S + (before + 1) * N * s.D : S;
    float *to = branch ? S + (size_t)(t + 1) * N * s.D : S, sum = 0;
    const real *Bt = (t < 0 ? s.ring.B : s.Bm) + (row * s.J + kv) * N, *Ct = s.C + row * s.D + k * N;
    const float x = load((t < 0 ? s.ring.x : s.x) + row * s.D + c);
    const float d = t < 0 ? s.ring.dt[row * s.D + c] : __fmul_rn(softplus_log2<true>(__fadd_rn(load(s.dt + row * s.D + c), bias)), LN2);
    for (size_t n = 0; n < N; n++) {
      const float a = exp2_approx(__fmul_rn(d, __fmul_rn(rate(s.A_log[c * N + n]), LOG2E)));
      const float now = fmaf(a, from ? from[n * s.D] : 0.0f, __fmul_rn(__fmul_rn(d, x), load(Bt + n)));
      to[n * s.D] = now;
      if (t >= 0) sum = fmaf(load(Ct + n), now, sum);
      if (state && at + 1 == p.mark) state[n] = now;
    }
    if (t < 0) continue;
    if (s.Dskip) sum = fmaf(s.Dskip[c], x, sum);
    if (s.z) sum = __fmul_rn(sum, gate(load(s.z + row * s.D + c)));
    store(s.y + row * s.D + c, sum);
  }
}

static void run_any(const Scan &s) {
  const size_t slots = s.rows.prev && s.T <= PENDING ? s.T + 1 : 1;
  float *states = (float *)device_scratch(s.B * slots * s.N * s.D * sizeof(float));
  if (!states) return;
  LAUNCH(any_forward, blocks_for(s.B * s.D, 64), 64, 0, s, states, slots);
  if (s.state && s.ring.x) LAUNCH(fill_ring, s.B * RING_ROWS, 256, 0, s, false);
}

/* ---- the op ----------------------------------------------------------------------------------------------------------------------- */

bool scan_fast(const Scan &s) {
  const void *arrays[] = {s.y, s.state, s.ring.x, s.ring.B, s.ring.dt, s.x, s.dt, s.Bm, s.C, s.z, s.A_log, s.dy, s.dstate};
  for (const void *p : arrays)
    if ((uintptr_t)p & 15) return false;
  return s.N == STATES;
}

static void run_many(Scan &s) {
  scan_cut(s);
  const size_t size = s.B * s.D, ends = s.chunks > 1 ? s.chunks * size : 0;
  float *scratch = (float *)device_scratch(((s.state ? size * STATES : 1) + ends * (STATES + 1)) * sizeof(float));
  if (!scratch) return;
  s.ends = scratch, s.total = s.ends + ends * STATES;
  if (s.state) {
    float *initial = s.total + ends;
    run_few(s, 0, initial);
    s.initial = initial;
  }
  if (s.chunks > 1) scan_pass(ENDS, s);
  scan_pass(OUTPUT, s);
  if (s.state && s.ring.x) LAUNCH(fill_ring, s.B * RING_ROWS, 256, 0, s, false);
}

void selective_scan_forward(real *y, float *state, Ring ring, const real *x, const real *dt, const float *A_log, const real *Bm,
                            const real *C, const float *Dskip, const float *dt_bias, const real *z, Rows rows, size_t B,
                            size_t T, size_t D, size_t N, size_t J) {
  Scan s = {};
  s.y = y, s.state = state, s.ring = ring, s.x = x, s.dt = dt, s.A_log = A_log, s.Bm = Bm, s.C = C, s.Dskip = Dskip, s.dt_bias = dt_bias;
  s.z = z, s.rows = rows, s.B = B, s.T = T, s.D = D, s.N = N, s.J = J;
  if (!B || !T || !D || !N || !J) return;
  if (!scan_fast(s))
    run_any(s);
  else if (state && T <= PENDING)
    run_few(s, T, nullptr);
  else
    run_many(s);
}
