/* real.h - the activation type, its conversions and the scalar functions that every op shares.
 *
 * The only file with a backend #ifdef. On the CPU `real` is float; on CUDA it is bf16 (`_cuda`) or float (`_cuda32`).
 * exp_ is branch-free so that plain -O3 vectorises the loops that call it (relative error < 2e-7 over the whole range). */
#ifndef MIL_REAL_H
#define MIL_REAL_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* MIL_BF16: `_cuda`, where kernels see bf16 and the host, which only moves activations, sees 16 bits.
 * MIL_CUDA: compiled as CUDA C++ (cuda/). */
#ifdef MIL_CUDA
#define HD __host__ __device__ static inline
#else
#define HD static inline
#endif

#if defined(MIL_BF16) && defined(MIL_CUDA)
#include <cuda_bf16.h>
typedef __nv_bfloat16 real;
HD float real_to_float(real x) { return __bfloat162float(x); }
HD real float_to_real(float x) { return __float2bfloat16(x); }
#elif defined(MIL_BF16)
typedef uint16_t real;
#else
typedef float real;
#define real_to_float(x) (x)
#define float_to_real(x) (x)
#endif
/* Tokens that a recurrent state keeps unfolded before it moves its checkpoint (ops.h, "the past"). Scan replays by the
 * recurrence: one token where arithmetic is dear, four where writing the state at every call is (MIL_GPU: host and device code of
 * the CUDA modules). SSD replays in its quadratic form, so reads of the checkpoint are shared out over many. */
#if defined(MIL_GPU) || defined(MIL_CUDA)
enum { SCAN_RING = 4, SSD_RING = 16 };
#else
enum { SCAN_RING = 1, SSD_RING = 16 };
#endif

HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
HD float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }
/* Round to nearest, ties to even; NaN stays NaN. */
HD uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : r);
}

/* n of them. */
HD void bf16_to_floats(float *__restrict to, const uint16_t *__restrict from, size_t n) {
  for (size_t i = 0; i < n; i++) to[i] = bf16_to_float(from[i]);
}
HD void floats_to_bf16(uint16_t *__restrict to, const float *__restrict from, size_t n) {
  for (size_t i = 0; i < n; i++) to[i] = float_to_bf16(from[i]);
}

/* Larger floats have larger ranks; -0 ranks as 0. */
HD uint32_t rank(float x) {
  uint32_t u = float_to_bits(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

/* exp(x): 2^n e^r with |r| <= ln2/2, e^r by a degree-7 Taylor polynomial. 0 below -87.3, inf above 88.72, NaN through. */
HD float exp_(float x) {
  float c = x < -87.3f ? -87.3f : x;
  c = c > 88.7f ? 88.7f : c;
  float n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;
  float r = (c - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  float y = p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
  y = x < -87.3f ? 0.0f : y;
  y = x > 88.72f ? bits_to_float(0x7f800000u) : y;
  return x != x ? x : y;
}
HD float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }
HD float silu(float x) { return x / (1.0f + exp_(-x)); }
/* d silu / dx */
HD float dsilu(float x) {
  float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}
/* log(1 + e^x) = max(x, 0) + log1p(e^-|x|), log1p(e) = 2 atanh(e / (2 + e)). */
HD float softplus(float x) {
  float e = exp_(-fabsf(x)), s = e / (2.0f + e), q = s * s;
  float p = 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 0.2f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return (x > 0.0f ? x : 0.0f) + 2.0f * s * p;
}
#endif
