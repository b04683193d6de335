/* copy.cu - row copies and fresh values. */
#include "common.cuh"
#include "philox.h"

static __global__ void convert(void *to, int type, const void *from, size_t n) {
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    if (type == FLOAT32)
      ((float *)to)[i] = bf16_to_float(((const uint16_t *)from)[i]);
    else
      ((uint16_t *)to)[i] = float_to_bf16(((const float *)from)[i]);
}

void copy_rows(void *dst, int dst_type, size_t to, Matrix src, size_t from, size_t n, size_t K) {
  const size_t dst_row = K * (dst_type == FLOAT32 ? 4 : 2), src_row = K * (src.type == FLOAT32 ? 4 : 2);
  char *target = (char *)dst + to * dst_row;
  const char *source = (const char *)src.data + from * src_row;
  if (dst_type == src.type)
    device_copy(target, source, n * dst_row);
  else
    LAUNCH(convert, blocks_for(n * K, 256, 8192), 256, 0, target, dst_type, source, n * K);
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
