/* scan.cuh - Mamba-1's selective scan on CUDA: what scan.cu (forward) and scan_backward.cu share.
 *
 * Every kernel takes one Scan by value. N = 16 is fast: a warp takes 32 neighbouring channels of a row of the batch through
 * time, all states in registers. Any other N, and arrays that are not 16-byte aligned, go through the kernels named any_*. */
#ifndef MIL_SCAN_CUH
#define MIL_SCAN_CUH
#include "common.cuh"

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float RESET = 1e30f; /* a step after which nothing is left of the state before it */
constexpr int STATES = 16;     /* the N of the fast kernels */
constexpr int TILE = 8;        /* tokens that over_tiles stages at a time; chunks are whole tiles */
constexpr int RUN = 4;         /* tokens from one of backward's checkpoints to the next */
constexpr int RING_ROWS = SCAN_RING + PENDING;
constexpr int CHUNKS_16 = 32 / REALS_16; /* 16-byte pieces of 32 channels */

struct Scan {
  real *y;
  float *state;
  Ring ring;
  const real *x, *dt;
  const float *A_log;
  const real *Bm, *C;
  const float *Dskip, *dt_bias;
  const real *z;
  Rows rows;
  size_t B, T, D, N, J;
  /* backward */
  const real *dy;
  real *dx, *ddt, *dB, *dC, *dz;
  float *dstate;
  /* scratch */
  const float *initial; /* (B,D,N) the state before the call; NULL: zero */
  const float *final;   /* (B,D,N) the cotangent of the state after it; NULL: zero */
  size_t chunks, tiles; /* T in chunks of so many tiles */
  float *total, *ends; /* (chunks,B,D) sum of d log2(e) over a chunk; (chunks,B,D,N) the state after it if it was zero before */
  float *starts;       /* (chunks,B,D,N) the cotangent of the state before it if that after it is zero */
  real *checkpoints;   /* (B,runs,D,N) the state before every RUN tokens */
  float *part;         /* (chunks,B, D*N + 2 D) shares of dA_log, dD, ddt_bias */
  float *part_B;       /* (B,T, D/N/group, N) shares of dB, of `group` blocks each */
  size_t group;
};

/* ---- scalar functions: the roundings are spelled out, so that a token has the same bits in every kernel that meets it ---- */

/* softplus(v) log2(e) = log2(1 + 2^(v log2 e)). exact: good to float where it is small; else to 1e-7 absolute. */
template <bool EXACT> __device__ static inline float softplus_log2(float v) {
  const float w = __fmul_rn(v, LOG2E), e = exp2_approx(-fabsf(w));
  float l = log2_approx(__fadd_rn(1.0f, e));
  if (EXACT && e < 0.03125f) l = __fmul_rn(__fmul_rn(e, LOG2E), fmaf(e, fmaf(e, fmaf(e, -0.25f, 1 / 3.0f), -0.5f), 1.0f));
  return __fadd_rn(fmaxf(w, 0.0f), l);
}
__device__ static inline float gate(float z) {
  return __fmul_rn(z, reciprocal_approx(__fadd_rn(1.0f, exp2_approx(__fmul_rn(z, -LOG2E)))));
}
/* A = -exp(A_log): the decay of a step is 2^(d log2(e) A). */
__device__ static inline float rate(float A_log) { return -exp2_approx(__fmul_rn(A_log, LOG2E)); }

/* 2^(d A) for d >= 0 >= A, `limit` = 126 / -A. The exp units do 16 a cycle and multiprocessor, the FMA units 128 operations: a
 * few of the exps as polynomials (as in FlashAttention-4) keep both busy. 2^r, |r| <= 1/2, is 1 + r q(r): the error vanishes
 * with r, so slow decays stay slow; relative to the rate it is 3e-4 (degree 3) or 1e-5 (4). */
__device__ static inline float decay_limit(float A) { return -126.0f / A; }
/* (1 + r q(r)) 2^m, m in the low bits of `shifted` */
template <int DEGREE> __device__ static inline float exp2_parts(float shifted, float r) {
  float p;
  if (DEGREE == 3) p = fmaf(r, fmaf(r, 5.5922091e-2f, 2.42035821e-1f), 6.93126261e-1f);
  if (DEGREE == 4) p = fmaf(r, fmaf(r, fmaf(r, 9.67604388e-3f, 5.58383577e-2f), 2.40221679e-1f), 6.93136752e-1f);
  static_assert(DEGREE == 3 || DEGREE == 4, "");
  return __uint_as_float(__float_as_uint(fmaf(r, p, 1.0f)) + (__float_as_uint(shifted) << 23));
}
template <int DEGREE> __device__ static inline float decay_polynomial(float d, float A, float limit) {
  const float c = fminf(d, limit), m = fmaf(c, A, 12582912.0f);
  return exp2_parts<DEGREE>(m, fmaf(c, A, -__fadd_rn(m, -12582912.0f)));
}
/* 2^w, w <= 0 */
template <int DEGREE> __device__ static inline float exp2_polynomial(float w) {
  const float c = fmaxf(w, -126.0f), m = __fadd_rn(c, 12582912.0f);
  return exp2_parts<DEGREE>(m, __fadd_rn(c, -__fadd_rn(m, -12582912.0f)));
}

/* ---- loads and stores of a few neighbours -------------------------------------------------------------------------------- */

template <int N> __device__ static inline void load_floats(float (&v)[N], const float *p) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 q = *(const float4 *)(p + i);
    v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
  }
}
template <int N> __device__ static inline void store_floats(float *p, const float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *(float4 *)(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
template <int N> __device__ static inline void store_reals(float *p, const float (&v)[N]) { store_floats(p, v); }
template <int N> __device__ static inline void store_reals(__nv_bfloat16 *p, const float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *(uint2 *)(p + i) = make_uint2(pack_bf16(v[i], v[i + 1]), pack_bf16(v[i + 2], v[i + 3]));
}

/* Four reals as they lie in memory: nothing waits for them until they are unpacked. */
template <class R> struct Four;
template <> struct Four<float> {
  float4 q;
  __device__ float4 unpack() const { return q; }
};
template <> struct Four<__nv_bfloat16> {
  uint2 q;
  __device__ float4 unpack() const { return make_float4(low_bf16(q.x), high_bf16(q.x), low_bf16(q.y), high_bf16(q.y)); }
};
__device__ static inline Four<real> load_four(const real *p) { return *(const Four<real> *)p; }
__device__ static inline float2 load_two(const float *p) { return *(const float2 *)p; }
__device__ static inline float2 load_two(const __nv_bfloat16 *p) {
  const unsigned q = *(const unsigned *)p;
  return make_float2(low_bf16(q), high_bf16(q));
}

/* ---- a warp's 32 channels ------------------------------------------------------------------------------------------------ */

/* At the edges (loads, softplus, gate, stores) lane l owns channel l. Inside, CH neighbouring lanes share their CH channels:
 * lane j of them has states state .. state + ST of each, slot i being channel i ^ j of them. So a sum over states needs no
 * moves: fold. */
template <int CH> struct Place {
  static constexpr int ST = STATES / CH;
  int lane, j, state, block; /* block: of the two C blocks */
  __device__ Place() : lane(threadIdx.x % 32), j(lane % CH), state(j * ST), block(lane / 16) {}
  __device__ int channel(int slot) const { return lane - j + (slot ^ j); }
};

/* v[i] belongs to channel i ^ j: returns the sum over the V lanes for this lane's own channel. */
template <int V> __device__ static inline float fold(float (&v)[V]) {
#pragma unroll
  for (int w = V / 2; w; w /= 2)
#pragma unroll
    for (int i = 0; i < w; i++) v[i] += __shfl_xor_sync(0xffffffffu, v[i + w], w);
  return v[0];
}

/* ARRAYS of (time, channels) that a warp copies to shared memory ROWS tokens at a time: raw (ARRAYS,ROWS,32). */
template <int ARRAYS, int ROWS> struct Feed {
  static constexpr int EACH = ROWS * CHUNKS_16, COUNT = ARRAYS * EACH / 32;
  static_assert(ARRAYS * EACH % 32 == 0, "whole warps");
  const char *at[COUNT]; /* of the tokens that are fetched next; NULL at first: zeros */
  int step[COUNT];       /* bytes from fetch to fetch */
  unsigned there = 0;    /* bit k: the k-th piece is not zeros */
  __device__ static int piece(int k) { return k * 32 + threadIdx.x % 32; }
  __device__ static int array(int k) { return EACH % 32 ? piece(k) / EACH : k * 32 / EACH; }
  __device__ static int row(int k) { return piece(k) / CHUNKS_16 % ROWS; }
  __device__ static int column(int k) { return piece(k) % CHUNKS_16 * REALS_16; }
  /* The k-th piece is of p (B,T,D), channels 32 w .., or of Bm (B,T,J,16), whose blocks are shared by rep blocks of channels.
   * Tokens first .. are fetched first, then those `steps` further on, and so on. */
  __device__ void channels(int k, const Scan &s, const real *p, size_t b, size_t w, int first, int steps) {
    const size_t c = 32 * w + column(k);
    set(k, p && c < s.D, p ? p : s.dt, c, s.D, b * s.T, first, steps);
  }
  __device__ void blocks(int k, const Scan &s, size_t b, size_t w, int first, int steps) {
    const unsigned block = 2 * (unsigned)w + column(k) / STATES, all = (unsigned)(s.D / STATES), rep = all / (unsigned)s.J;
    set(k, block < all, s.Bm, block / rep * STATES + column(k) % STATES, s.J * STATES, b * s.T, first, steps);
  }
  __device__ void set(int k, bool is, const real *p, size_t column, size_t width, size_t rows, int first, int steps) {
    there |= (unsigned)is << k;
    at[k] = (const char *)p + (ptrdiff_t)((rows * width + column + (first + row(k)) * (ptrdiff_t)width) * sizeof(real));
    step[k] = (int)(width * sizeof(real)) * steps;
  }
  /* The next tokens, of which this lane's first row is `first`; those outside [low, high) as zeros. */
  __device__ void fetch(real *raw, int first, int low, int high) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int t = first + row(k);
      cp_async_16(raw + piece(k) * REALS_16, at[k], (there >> k & 1) && t >= low && t < high ? 16 : 0);
      at[k] += step[k];
    }
  }
};

/* The way back: a warp's results of ROWS tokens, (ARRAYS,ROWS,32) in shared memory, to tokens of arrays (B,T,D). */
template <int ARRAYS, int ROWS> struct Drain {
  static constexpr int EACH = ROWS * CHUNKS_16, COUNT = ARRAYS * EACH / 32;
  static_assert(ARRAYS * EACH % 32 == 0, "whole warps");
  char *at[COUNT];
  int step;
  unsigned there = 0;
  __device__ static int piece(int k) { return k * 32 + threadIdx.x % 32; }
  __device__ static int array(int k) { return EACH % 32 ? piece(k) / EACH : k * 32 / EACH; }
  __device__ static int row(int k) { return piece(k) / CHUNKS_16 % ROWS; }
  /* As Feed::channels. */
  __device__ void channels(int k, const Scan &s, real *p, size_t b, size_t w, int first, int steps) {
    const size_t c = 32 * w + piece(k) % CHUNKS_16 * REALS_16;
    there |= (unsigned)(p && c < s.D) << k, step = (int)(s.D * sizeof(real)) * steps;
    at[k] = (char *)(p ? p : s.dx) + (ptrdiff_t)((b * s.T * s.D + c + (first + row(k)) * (ptrdiff_t)s.D) * sizeof(real));
  }
  __device__ void write(const real *from, int first, int low, int high) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const int t = first + row(k);
      if ((there >> k & 1) && t >= low && t < high) *(uint4 *)at[k] = *(const uint4 *)(from + piece(k) * REALS_16);
      at[k] += step;
    }
  }
};

/* Lane i < n gets the kind of token first + i: 0 ordinary, 1 starts a document, 2 outside the call. */
__device__ static inline int kind_of_token(const Scan &s, size_t b, int first, int n) {
  const int T = (int)s.T, lane = threadIdx.x % 32, t = first + lane;
  if ((!s.rows.prev && first >= 0 && first + n <= T) || lane >= n) return 0;
  return t < 0 || t >= T ? 2 : s.rows.prev && s.rows.prev[b * s.T + t] == -2;
}
/* Decays that are not as staged. */
__device__ static inline void mend_steps(float2 (*du)[32], int kind) {
  for (unsigned odd = __ballot_sync(0xffffffffu, kind != 0); odd; odd &= odd - 1) {
    const int i = __ffs(odd) - 1, what = __shfl_sync(0xffffffffu, kind, i);
    du[i][threadIdx.x % 32].x = what == 1 ? RESET : 0.0f;
  }
}

/* S of channel c (its states from `state` on) before chunk `chunk`, and the cotangent of S after it. */
template <int ST> __device__ static inline void carry(float (&S)[ST], const float (&A)[ST], const Scan &s, const float *from,
                                                      const float *chunk_ends, size_t b, size_t c, int state, size_t first,
                                                      size_t last, ptrdiff_t step) {
  const size_t row = b * s.D + c, size = s.B * s.D;
#pragma unroll
  for (int n = 0; n < ST; n++) S[n] = 0;
  if (from) load_floats(S, from + row * STATES + state);
  for (size_t k = first; k != last; k += step) {
    float end[ST];
    const float d = s.total[k * size + row];
    load_floats(end, chunk_ends + (k * size + row) * STATES + state);
#pragma unroll
    for (int n = 0; n < ST; n++) S[n] = fmaf(exp2_approx(d * A[n]), S[n], end[n]);
  }
}

/* ---- past: what a call runs for a row of the batch (csrc/scan.c) --------------------------------------------------------- */

/* Positions begin .. pos from the ring, then its own pos .. pos+T; `state` is left at mark. */
struct Past {
  int slot, begin, pos, mark;
};
__device__ static inline Past past_of(const Scan &s, size_t b) {
  const Rows &r = s.rows;
  const bool ring = s.state && s.ring.x;
  Past p;
  p.slot = r.slot ? r.slot[b] : (int)b;
  const int keep = r.keep ? r.keep[b] : (int)s.T, committed = r.committed ? r.committed[p.slot] : 0,
            seen = r.seen ? r.seen[p.slot] : 0;
  p.pos = r.pos ? r.pos[p.slot] : 0;
  p.begin = ring ? seen / SCAN_RING * SCAN_RING : p.pos;
  p.mark = !ring ? p.pos + keep : (s.T > PENDING ? p.pos + keep : committed) / SCAN_RING * SCAN_RING;
  return p;
}
__device__ static inline size_t ring_row(const Past &p, int position) {
  return (size_t)p.slot * RING_ROWS + position % RING_ROWS;
}
/* The call's tokens that the ring takes: first .. last, positions. */
__device__ static inline int ring_first(const Past &p) { return max(p.mark, p.pos); }
__device__ static inline int ring_last(const Past &p, size_t T) { return min(p.pos + (int)T, p.mark + RING_ROWS); }

/* ---- scan.cu ------------------------------------------------------------------------------------------------------------- */

/* OUTPUT: y, and `state` at its mark. ENDS: total, ends. STARTS: starts. CHECKPOINTS: the state before every RUN tokens. */
enum Pass { OUTPUT, ENDS, STARTS, CHECKPOINTS };
void scan_pass(Pass pass, const Scan &s);
/* How T is cut: whole rows where they fill the device, else in chunks, whose ends are found first, at 1.7 times the work. */
void scan_cut(Scan &s);
/* N = 16, and every array may be read and written 16 bytes at a time. */
bool scan_fast(const Scan &s);
#endif
