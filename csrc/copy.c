/* copy.c - row copies and fresh values. */
#include "device.h"
#include "ops.h"
#include "philox.h"

void copy_rows(void *dst, int dst_type, size_t to, Matrix src, size_t from, size_t n, size_t K) {
  if (dst_type == src.type) {
    size_t row = K * (dst_type == FLOAT32 ? 4 : 2);
    device_copy((char *)dst + to * row, (const char *)src.data + from * row, n * row);
    return;
  }
  for (size_t i = 0; i < n * K; i++)
    if (dst_type == FLOAT32)
      ((float *)dst)[to * K + i] = bf16_to_float(((const uint16_t *)src.data)[from * K + i]);
    else
      ((uint16_t *)dst)[to * K + i] = float_to_bf16(((const float *)src.data)[from * K + i]);
}

typedef struct {
  void *w;
  int type, how;
  double a, b;
  uint64_t seed;
  uint32_t stream;
} Fill;

static void fill_range(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const Fill *f = arg;
  for (; i < end; i++) {
    float x = fresh_value(f->how, f->a, f->b, f->seed, f->stream, i);
    if (f->type == FLOAT32)
      ((float *)f->w)[i] = x;
    else
      ((uint16_t *)f->w)[i] = float_to_bf16(x);
  }
}

void fill(void *w, int type, int how, float a, float b, uint64_t seed, uint32_t stream, size_t n) {
  Fill f = {w, type, how, a, b, seed, stream};
  parallel(fill_range, &f, n, 100);
}
