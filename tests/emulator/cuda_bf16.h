/* cuda_bf16.h - bf16 on the CPU, as far as cuda/ uses it. */
#ifndef EMULATED_CUDA_BF16_H
#define EMULATED_CUDA_BF16_H
#include <stdint.h>
#include <string.h>

#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
static inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u = __float_as_uint(f), r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {(uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : r)};
}
static inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __float2bfloat16(f); }
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16(a), __float2bfloat16(b)}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
static inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
static inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return {u}; }
#endif
