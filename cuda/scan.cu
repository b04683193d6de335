/* scan.cu - Mamba-1's selective scan: forward, and the passes over tokens that backward needs before it goes back.
 *
 * Many tokens: over_tiles. A warp owns 32 channels of a row and runs through time with their states in registers. Tokens come
 * in tiles by cp.async, two tiles ahead; while tokens are scanned, as many of the next tile are made ready (softplus, d x, B
 * and C as floats), so that the exp units, the FMA units and the loads are busy at the same time. Warps never wait for others.
 * Few tokens with a State: few_tokens. A warp takes 32 (or 8) channels of a row: replays the ring, folds, runs the call's. */
#include "scan.cuh"

/* ---- many tokens --------------------------------------------------------------------------------------------------------- */

template <int ARRAYS> struct TileSpace {
  real raw[3][ARRAYS][TILE][32]; /* this tile's tokens, the next's, and those under way: 0 x (dy), 1 dt, 2 B (C), 3 z, 4 C */
  float2 du[2][TILE][32];        /* d log2(e), and d x (dy silu(z)) */
  float V[2][TILE][32];          /* B (C) of the two blocks */
  float C[2][TILE][32];
  real out[TILE][32];
};
constexpr int arrays_of(int pass) { return pass == OUTPUT ? 5 : pass == STARTS ? 4 : 3; }

/* RUN tokens of a tile made ready. Lane l has channels 2 (l % 16), + 1 of tokens l / 16, + 2, and four states of token l / 8.
 * The loads come before, the stores after the arithmetic of the tokens that are scanned meanwhile. */
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

/* PASS: see scan.cuh. CH: lanes share so many channels. POLY of 32 decays (two tokens, 16 states) are polynomials of DEGREE. */
template <int PASS, int CH, int POLY, int DEGREE, int WARPS> static __global__ void __launch_bounds__(32 * WARPS, 8 / WARPS)
    over_tiles(const Scan s, size_t items) {
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
  const int T = (int)s.T, low = (int)(chunk * s.tiles * TILE) - (TILE - cut % TILE) % TILE,
            high = min(low + (int)(s.tiles * TILE), T);
  const int start = max(low, 0), tiles = high > low ? (high - low + TILE - 1) / TILE : 0;
  const auto first_of = [&](int q) { return low + (BACK ? tiles - 1 - q : q) * TILE; };

  Feed<ARRAYS, TILE> feed;
#pragma unroll
  for (int k = 0; k < feed.COUNT; k++) {
    const int a = feed.array(k);
    if (a == 2 && !BACK)
      feed.blocks(k, s, b, w, first_of(0), TILE);
    else
      feed.channels(k, s,
                    a == 0   ? (BACK ? s.dy : s.x)
                    : a == 1 ? s.dt
                    : a == 3 ? s.z
                             : s.C,
                    b, w, first_of(0), BACK ? -TILE : TILE);
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
    if ((PASS == OUTPUT || PASS == CHECKPOINTS) && channel < s.D)
      carry(S[i], A[i], s, s.initial, s.ends, b, channel, at.state, 0, chunk, 1);
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
            const float a =
                e / 32 != (e + POLY) / 32 ? decay_polynomial<DEGREE>(du.x, A[l][n], limit[l][n]) : exp2_approx(du.x * A[l][n]);
            S[l][n] = BACK ? a * fmaf(du.y, V[n], S[l][n]) : fmaf(a, S[l][n], du.y * V[n]);
            if constexpr (PASS == OUTPUT) y[k][l] = n ? fmaf(C[n], S[l][n], y[k][l]) : C[n] * S[l][n];
          }
        }
      }
      if constexpr (PASS == OUTPUT) {
        float out[RUN];
#pragma unroll
        for (int k = 0; k < RUN; k++)
          out[k] = fmaf(skip, load(&m.raw[raw][0][part + k][at.lane]), fold(y[k])) *
                   (gate(load(&m.raw[raw][3][part + k][at.lane])) + open);
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
          if (c0 + at.channel(i) < s.D)
            store_floats(s.state + ((size_t)slot * s.D + c0 + at.channel(i)) * STATES + at.state, S[i]);
      }
    }
    raw = next;
    __syncwarp();
  }
  if constexpr (PASS == ENDS || PASS == STARTS) {
    const size_t row = (chunk * s.B + b) * s.D;
#pragma unroll
    for (int i = 0; i < CH; i++)
      if (c0 + at.channel(i) < s.D)
        store_floats((BACK ? s.starts : s.ends) + (row + c0 + at.channel(i)) * STATES + at.state, S[i]);
    if (PASS == ENDS && mine) s.total[row + c] = total;
  }
}

/* The choices that cuda/dev/scan.cu times. */
template <int PASS> static void launch_pass(const Scan &s) {
  constexpr int WARPS = 1, POLY = sizeof(real) == 4 ? 0 : PASS == OUTPUT ? 4 : 6;
  const size_t items = (s.D + 31) / 32 * s.B * s.chunks;
  LAUNCH((over_tiles<PASS, 2, POLY, 4, WARPS>), blocks_for(items, WARPS), 32 * WARPS,
         WARPS * sizeof(TileSpace<arrays_of(PASS)>), s, items);
}
void scan_pass(Pass pass, const Scan &s) {
  if (pass == OUTPUT) launch_pass<OUTPUT>(s);
  if (pass == ENDS) launch_pass<ENDS>(s);
  if (pass == STARTS) launch_pass<STARTS>(s);
  if (pass == CHECKPOINTS) launch_pass<CHECKPOINTS>(s);
}

void scan_cut(Scan &s) {
  const size_t warps = (s.D + 31) / 32 * s.B,
               wanted = 8 * (size_t)multiprocessors();     /* two for each of an SM's four schedulers */
  const size_t tiles = (s.T + TILE - 1 + TILE - 1) / TILE; /* a row may be shifted */
  const size_t most = warps * 5 < wanted * 2 ? ceil_div(wanted, warps) : 1;
  const size_t chunks = min(most, max(s.T / 64, (size_t)1));
  s.tiles = ceil_div(tiles, chunks), s.chunks = ceil_div(tiles, s.tiles);
}

/* ---- few tokens ---------------------------------------------------------------------------------------------------------- */

constexpr int PIECE = 8; /* tokens staged at a time */

/* A warp's share: L lanes to a channel, so 32/L channels of VALUES/16 blocks. A token is pieces of 16 bytes: x, B, C, z, dt. */
template <int L> struct Few {
  static constexpr int CHANNELS = 32 / L, ST = STATES / L, VALUES = L == 1 ? 32 : 16;
  static constexpr int X = CHANNELS / REALS_16, V = VALUES / REALS_16, DT = CHANNELS / 4;
  static constexpr int AT_B = X, AT_C = X + V, AT_Z = X + 2 * V, AT_DT = 2 * X + 2 * V, PIECES = AT_DT + DT,
                       COUNT = (PIECES + 31) / 32;
  struct Space {
    uint4 raw[2][PIECE][PIECES];
    float B[PIECE][VALUES], C[PIECE][VALUES];
  };
};

/* Where a lane's pieces of a token come from: from the call's arrays or from the ring. Strides are bytes from row to row. */
template <int L> struct Sources {
  using F = Few<L>;
  const char *call[F::COUNT], *ring[F::COUNT];
  int call_stride[F::COUNT], ring_stride[F::COUNT];
  __device__ void set(int k, const void *from, size_t width, size_t column, const void *kept, size_t kept_column,
                      size_t kept_size) {
    call_stride[k] = (int)(width * sizeof(real)), ring_stride[k] = (int)(width * kept_size);
    call[k] = from ? (const char *)from + column * sizeof(real) : nullptr,
    ring[k] = kept ? (const char *)kept + kept_column * kept_size : nullptr;
  }
  __device__ Sources(const Scan &s, size_t c0) {
    const unsigned rep = (unsigned)(s.D / STATES / s.J);
#pragma unroll
    for (int k = 0; k < F::COUNT; k++) {
      const int q = k * 32 + threadIdx.x % 32;
      const int e = (q - (q < F::AT_B    ? 0
                          : q < F::AT_C  ? F::AT_B
                          : q < F::AT_Z  ? F::AT_C
                          : q < F::AT_DT ? F::AT_Z
                                         : F::AT_DT)) *
                    REALS_16;
      const unsigned block = (unsigned)(c0 / STATES) + e / STATES, n = e % STATES;
      const bool channel = c0 + e < s.D, whole = block * STATES < s.D;
      set(k, nullptr, 0, 0, nullptr, 0, 0);
      if (q < F::AT_B) {
        if (channel) set(k, s.x, s.D, c0 + e, s.ring.x, c0 + e, sizeof(real));
      } else if (q < F::AT_C) {
        if (whole) set(k, s.Bm, s.J * STATES, block / rep * STATES + n, s.ring.B, block / rep * STATES + n, sizeof(real));
      } else if (q < F::AT_Z) {
        if (whole) set(k, s.C, s.D, c0 / STATES * STATES + e, nullptr, 0, 0);
      } else if (q < F::AT_DT) {
        if (channel) set(k, s.z, s.D, c0 + e, nullptr, 0, 0);
      } else if (q < F::PIECES) { /* the ring's are floats */
        const size_t f = c0 + (q - F::AT_DT) * 4;
        set(k, e < F::CHANNELS && channel ? s.dt : nullptr, s.D, c0 + e, f < s.D ? s.ring.dt : nullptr, f, sizeof(float));
      }
    }
  }
  /* Positions at .. at+n of row b: those that the ring has, and the call's. */
  __device__ void fetch_ring(uint4 (*raw)[F::PIECES], const Past &p, int at, int n) const {
    const int replayed = min(max(p.pos - at, 0), n), lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0, place = at % RING_ROWS; i < replayed; i++, place = place + 1 < RING_ROWS ? place + 1 : 0)
#pragma unroll
      for (int k = 0; k < F::COUNT; k++)
        if (ring[k]) cp_async_16(&raw[i][k * 32 + lane], ring[k] + (ptrdiff_t)(p.slot * RING_ROWS + place) * ring_stride[k]);
  }
  __device__ void fetch_call(uint4 (*raw)[F::PIECES], const Scan &s, const Past &p, int b, int at, int n) const {
    const int replayed = min(max(p.pos - at, 0), n), lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = replayed, row = b * (int)s.T + at - p.pos; i < n; i++)
#pragma unroll
      for (int k = 0; k < F::COUNT; k++)
        if (call[k]) cp_async_16(&raw[i][k * 32 + lane], call[k] + (ptrdiff_t)(row + i) * call_stride[k]);
  }
};

/* The decay of state e of four, 2^w for w <= 0. The exp units are what this waits for: one of four is a polynomial (scan.cuh), the
 * same one wherever a token is met. */
__device__ static inline float few_decay(int e, float w) { return sizeof(real) == 2 && e == 3 ? exp2_polynomial<4>(w) : exp2_approx(w); }
/* S = 2^(d A) S + u B */
template <int ST>
__device__ static inline void advance(float (&S)[ST], float d, float u, const float (&A)[ST], const float *B) {
#pragma unroll
  for (int e = 0; e < ST; e += 4) {
    const float4 q = *(const float4 *)(B + e);
    S[e] = fmaf(few_decay(0, __fmul_rn(d, A[e])), S[e], __fmul_rn(u, q.x));
    S[e + 1] = fmaf(few_decay(1, __fmul_rn(d, A[e + 1])), S[e + 1], __fmul_rn(u, q.y));
    S[e + 2] = fmaf(few_decay(2, __fmul_rn(d, A[e + 2])), S[e + 2], __fmul_rn(u, q.z));
    S[e + 3] = fmaf(few_decay(3, __fmul_rn(d, A[e + 3])), S[e + 3], __fmul_rn(u, q.w));
  }
}
/* sum_n C S: of four states each, (0 + 1) + (2 + 3), in registers or across lanes. */
template <int ST> __device__ static inline float read_out(const float (&S)[ST], const float *C) {
  float sum[ST / 4];
#pragma unroll
  for (int e = 0; e < ST; e += 4) {
    const float4 q = *(const float4 *)(C + e);
    sum[e / 4] = fmaf(q.w, S[e + 3], fmaf(q.z, S[e + 2], fmaf(q.y, S[e + 1], __fmul_rn(q.x, S[e]))));
  }
  if constexpr (ST == STATES) return __fadd_rn(__fadd_rn(sum[0], sum[1]), __fadd_rn(sum[2], sum[3]));
  const float pair = __fadd_rn(sum[0], __shfl_xor_sync(0xffffffffu, sum[0], 1));
  return __fadd_rn(pair, __shfl_xor_sync(0xffffffffu, pair, 2));
}

/* The first `run` tokens of the call (0: only what precedes it) for channels of block x and rows y, y + gridDim.y, …, at most
 * 32. initial (B,D,16), or NULL: takes the state after them. own_B: the block has whole kv blocks, and writes the ring's B. */
template <int L, bool TREE> static __global__ void __launch_bounds__(L == 1 ? 256 : 512)
    few_tokens(const Scan s, int run, float *initial, bool own_B) {
  using F = Few<L>;
  constexpr int ST = F::ST;
  constexpr unsigned ALL = 0xffffffffu;
  DYNAMIC_SHARED(typename F::Space, spaces);
  typename F::Space &m = spaces[threadIdx.x / 32];
  float4 *const tree = (float4 *)(spaces + blockDim.x / 32) + threadIdx.x; /* (run,ST/4,threads): every token's state */
  const int lane = threadIdx.x % 32, state = lane % L * ST, values = (L == 1 ? lane / STATES * STATES : 0) + state,
            own = lane / L;
  const size_t c0 = (size_t)blockIdx.x * (blockDim.x / L) + threadIdx.x / 32 * F::CHANNELS, c = c0 + own;
  const bool mine = c < s.D, keeps = mine && lane % L == 0;
  const int D = (int)s.D, width_B = (int)s.J * STATES;

  float A[ST], S[ST], ahead[ST] = {};
  if (mine) load_floats(A, s.A_log + c * STATES + state);
#pragma unroll
  for (int n = 0; n < ST; n++) A[n] = mine ? __fmul_rn(rate(A[n]), LOG2E) : -1.0f;
  const float skip = s.Dskip && mine ? s.Dskip[c] : 0.0f, bias = s.dt_bias && mine ? s.dt_bias[c] : 0.0f;
  const Sources<L> sources(s, c0);
  /* Whose B this lane stages: the first block's of a kv block go to the ring. */
  const unsigned block = (unsigned)(c0 / STATES) + lane / STATES, rep = (unsigned)(s.D / STATES / s.J);
  const bool keeps_B = own_B && s.ring.x && lane < F::VALUES && c0 % STATES == 0 && block * STATES < s.D && block % rep == 0;
  real *const ring_B = s.ring.B + block / rep * STATES + lane % STATES, *const ring_x = s.ring.x + c;
  float *const ring_dt = s.ring.dt + c;

  const int rows = (int)((s.B - blockIdx.y + gridDim.y - 1) / gridDim.y);
  Past all = {};
  if (lane < rows) all = past_of(s, blockIdx.y + (size_t)lane * gridDim.y);
  const auto past = [&](int r) {
    return Past{__shfl_sync(ALL, all.slot, r), __shfl_sync(ALL, all.begin, r), __shfl_sync(ALL, all.pos, r),
                __shfl_sync(ALL, all.mark, r)};
  };
  const auto row_of = [&](int r) { return (int)(blockIdx.y + r * gridDim.y); };
  const auto load_state = [&](const Past &p) {
    if (mine) load_floats(ahead, s.state + ((size_t)p.slot * s.D + c) * STATES + state);
  };
  const auto save_state = [&](const Past &p, const float (&from)[ST]) {
    if (mine) store_floats(s.state + ((size_t)p.slot * s.D + c) * STATES + state, from);
  };
  const auto piece_of = [&](const Past &p, int at) { return min(PIECE, p.pos + run - at); };

  Past p = past(0);
  int buffer = 0;
  sources.fetch_ring(m.raw[0], p, p.begin, piece_of(p, p.begin)); /* what the State keeps is older than the kernel before */
  load_state(p);
  wait_for_previous_kernel();
  let_next_kernel_start();
  sources.fetch_call(m.raw[0], s, p, row_of(0), p.begin, piece_of(p, p.begin));
  cp_async_commit();
  for (int r = 0; r < rows; r++) {
    const int b = row_of(r);
    Past next = p;
#pragma unroll
    for (int e = 0; e < ST; e++) S[e] = ahead[e];
    for (int at = p.begin, n;; at += n) {
      n = piece_of(p, at);
      const bool last = at + n >= p.pos + run, more = !last || r + 1 < rows;
      if (last && more) next = past(r + 1);
      const int next_at = last ? next.begin : at + n;
      if (more) {
        sources.fetch_ring(m.raw[buffer ^ 1], next, next_at, piece_of(next, next_at));
        sources.fetch_call(m.raw[buffer ^ 1], s, next, row_of(r + last), next_at, piece_of(next, next_at));
      }
      if (last && more) load_state(next);
      cp_async_commit();
      cp_async_wait<1>();
      __syncwarp();
      const int replayed = min(max(p.pos - at, 0), n);
      const uint4 *token = m.raw[buffer][0];
      if (lane < F::VALUES)
#pragma unroll 1
        for (int i = 0; i < n; i++) {
          m.B[i][lane] = load((const real *)(token + i * F::PIECES + F::AT_B) + lane);
          m.C[i][lane] =
              load((const real *)(token + i * F::PIECES + F::AT_C) + lane); /* of a replayed token: nobody reads it */
        }
      /* The call's tokens may take the places of ring entries that other warps of the kv block replay. */
      if (own_B && at <= p.pos && at + n > p.pos && p.pos + run - p.begin > RING_ROWS) __syncthreads();
      __syncwarp();
      const float *B = m.B[0] + values, *C = m.C[replayed] + values;
#pragma unroll 1
      for (int position = at; position < at + replayed; token += F::PIECES, B += F::VALUES) {
        const float d = ((const float *)(token + F::AT_DT))[own];
        advance(S, d, __fmul_rn(d, load((const real *)token + own)), A, B);
        if (++position == p.mark) save_state(p, S);
      }
      int t = at + replayed - p.pos, place = (at + replayed) % RING_ROWS;
      real *y = s.y + ((size_t)b * s.T + t) * s.D + c;
#pragma unroll 1
      for (const int end = at + n - p.pos; t < end; t++, y += D, token += F::PIECES, B += F::VALUES, C += F::VALUES) {
        const float x = load((const real *)token + own);
        const float d = __fmul_rn(softplus_log2<true>(__fadd_rn(load((const real *)(token + F::AT_DT) + own), bias)), LN2),
                    u = __fmul_rn(d, x);
        float branch[ST];
        if constexpr (TREE) {
          const int before = s.rows.prev[b * s.T + t];
#pragma unroll
          for (int e = 0; e < ST; e += 4) {
            const float4 q = before >= 0 ? tree[(before * (ST / 4) + e / 4) * blockDim.x] : make_float4(0, 0, 0, 0);
            branch[e] = before == -1 ? S[e] : q.x, branch[e + 1] = before == -1 ? S[e + 1] : q.y;
            branch[e + 2] = before == -1 ? S[e + 2] : q.z, branch[e + 3] = before == -1 ? S[e + 3] : q.w;
          }
          advance(branch, d, u, A, B);
#pragma unroll
          for (int e = 0; e < ST; e += 4)
            tree[(t * (ST / 4) + e / 4) * blockDim.x] = make_float4(branch[e], branch[e + 1], branch[e + 2], branch[e + 3]);
        } else {
          advance(S, d, u, A, B);
        }
        const float (&now)[ST] = TREE ? branch : S;
        if (p.pos + t + 1 == p.mark) save_state(p, now);
        float out = fmaf(skip, x, read_out(now, C));
        if (s.z) out = __fmul_rn(out, gate(load((const real *)(token + F::AT_Z) + own)));
        if (keeps) store(y, out);
        if (!s.ring.x) continue;
        const ptrdiff_t row = p.slot * RING_ROWS + place, to = row * D;
        if (keeps) store(ring_x + to, x), ring_dt[to] = d;
        if (keeps_B) store(ring_B + row * width_B, B[lane - values]);
        place = place + 1 < RING_ROWS ? place + 1 : 0;
      }
      buffer ^= 1;
      __syncwarp();
      if (last) break;
    }
    if (initial && mine) store_floats(initial + ((size_t)b * s.D + c) * STATES + state, S);
    p = next;
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
    s.ring.dt[to * s.D + c] =
        __fmul_rn(softplus_log2<true>(__fadd_rn(load(s.dt + from * s.D + c), s.dt_bias ? s.dt_bias[c] : 0.0f)), LN2);
  }
}

template <int L, bool TREE> static void launch_few(const Scan &s, size_t run, float *initial, size_t blocks, bool own_B) {
  const size_t threads = STATES * blocks * L, groups = ceil_div(s.D, STATES * blocks);
  const size_t shared = threads / 32 * sizeof(typename Few<L>::Space) + (TREE ? run * threads * Few<L>::ST * sizeof(float) : 0);
  const size_t resident =
      max((size_t)1, 512 / threads) * multiprocessors(); /* one wave, in which a block prefetches its next row */
  const size_t rows = min(ceil_div(s.B * groups, resident), (size_t)32);
  LAUNCH_EARLY((few_tokens<L, TREE>), dim3(groups, ceil_div(s.B, rows)), threads, shared, s, (int)run, initial, own_B);
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

/* ---- any N --------------------------------------------------------------------------------------------------------------- */

/* One thread takes a channel through the ring and the call. states (B,slots,N,D): slot 0 is the running state; where tokens
 * branch, slot t+1 is token t's. */
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
    const float d =
        t < 0 ? s.ring.dt[row * s.D + c] : __fmul_rn(softplus_log2<true>(__fadd_rn(load(s.dt + row * s.D + c), bias)), LN2);
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

/* ---- the op -------------------------------------------------------------------------------------------------------------- */

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
  s.y = y, s.state = state, s.ring = ring, s.x = x, s.dt = dt, s.A_log = A_log, s.Bm = Bm, s.C = C, s.Dskip = Dskip,
  s.dt_bias = dt_bias;
  s.z = z, s.rows = rows, s.B = B, s.T = T, s.D = D, s.N = N, s.J = J;
  if (!B || !T || !D || !N || !J) return;
  if (!scan_fast(s))
    run_any(s);
  else if (state && T <= PENDING)
    run_few(s, T, nullptr);
  else
    run_many(s);
}
