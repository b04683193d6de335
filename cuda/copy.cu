/* copy.cu - row copies and fresh values. */
#include "common.cuh"
#include "philox.h"

/* eights: of eight elements each, where both arrays allow it. */
static __global__ void widen(float *to, const __nv_bfloat16 *from, size_t n, size_t eights) {
  const size_t stride = (size_t)gridDim.x * blockDim.x, first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (size_t i = first; i < eights; i += stride) {
    float v[8];
    load_16(v, from + 8 * i);
    ((float4 *)to)[2 * i] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4 *)to)[2 * i + 1] = make_float4(v[4], v[5], v[6], v[7]);
  }
  for (size_t i = 8 * eights + first; i < n; i += stride) to[i] = load(from + i);
}

static __global__ void narrow(__nv_bfloat16 *to, const float *from, size_t n, size_t eights) {
  const size_t stride = (size_t)gridDim.x * blockDim.x, first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (size_t i = first; i < eights; i += stride) {
    const float4 a = ((const float4 *)from)[2 * i], b = ((const float4 *)from)[2 * i + 1];
    store_16(to + 8 * i, {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w});
  }
  for (size_t i = 8 * eights + first; i < n; i += stride) store(to + i, from[i]);
}

void copy_rows(void *dst, int dst_type, size_t to, Matrix src, size_t from, size_t n, size_t K) {
  const size_t dst_row = K * (dst_type == FLOAT32 ? 4 : 2), src_row = K * (src.type == FLOAT32 ? 4 : 2);
  char *target = (char *)dst + to * dst_row;
  const char *source = (const char *)src.data + from * src_row;
  const size_t eights = all_aligned(target, source) ? n * K / 8 : 0;
  const unsigned blocks = blocks_for(eights ? eights : n * K, 256, 8192);
  if (dst_type == src.type)
    device_copy(target, source, n * dst_row);
  else if (dst_type == FLOAT32)
    LAUNCH(widen, blocks, 256, 0, (float *)target, (const __nv_bfloat16 *)source, n * K, eights);
  else
    LAUNCH(narrow, blocks, 256, 0, (__nv_bfloat16 *)target, (const float *)source, n * K, eights);
}

static __global__ void fill_values(void *w, int type, int how, double a, double b, uint64_t seed, uint32_t key, size_t n) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    float x = how == FILL_CONSTANT ? (float)a : fresh_value(how, a, b, seed, key, i);
    if (type == FLOAT32)
      ((float *)w)[i] = x;
    else
      ((uint16_t *)w)[i] = float_to_bf16(x);
  }
}

void fill(void *w, int type, int how, float a, float b, uint64_t seed, uint32_t key, size_t n) {
  LAUNCH(fill_values, blocks_for(n, 256, 8192), 256, 0, w, type, how, a, b, seed, key, n);
}
