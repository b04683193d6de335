/* copy.c - row copies and fresh values. */
#include "device.h"
#include "ops.h"
#include "philox.h"

typedef struct {
  void *to;
  int type; /* of to; from is the other one */
  const void *from;
} Copy;

static void convert(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const Copy *c = arg;
  if (c->type == FLOAT32)
    bf16_to_floats((float *)c->to + i, (const uint16_t *)c->from + i, end - i);
  else
    floats_to_bf16((uint16_t *)c->to + i, (const float *)c->from + i, end - i);
}

void copy_rows(void *dst, int dst_type, size_t to, Matrix src, size_t from, size_t n, size_t K) {
  const size_t size = dst_type == FLOAT32 ? 4 : 2, src_size = src.type == FLOAT32 ? 4 : 2;
  Copy c = {(char *)dst + to * K * size, dst_type, (const char *)src.data + from * K * src_size};
  if (dst_type == src.type)
    device_copy(c.to, c.from, n * K * size);
  else
    parallel(convert, &c, n * K, 1);
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
