/* device.c - device.h on the CPU: memory is memory. */
#define _GNU_SOURCE
#include "device.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { LINE = 64, HUGE_PAGE = 1 << 21 }; /* large blocks ask for huge pages: one pass over weights touches each page once */

static _Thread_local const char *failure;

void device_fail(const char *what) {
  if (!failure) failure = what;
}

const char *device_error(void) {
  const char *what = failure;
  failure = NULL;
  return what;
}

void *device_alloc(size_t bytes) {
  const size_t unit = bytes < 2 * HUGE_PAGE ? LINE : HUGE_PAGE;
  void *p = bytes > SIZE_MAX - unit ? NULL : aligned_alloc(unit, (bytes + unit - 1 + !bytes) / unit * unit);
  if (!p) device_fail("out of memory");
  if (p && unit == HUGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);
  return p;
}

void device_lock(void) {}
void device_unlock(void) {}
const char *device_missing(void) { return NULL; }
int device_id(void) { return -1; }
void *device_stream(void) { return NULL; }
void device_order(void *stream, int ours_first) { (void)stream, (void)ours_first; }
Recording *recording_new(void) { return NULL; }
void recording_free(Recording *r) { (void)r; }
int recording_play(Recording *r) { return (void)r, 0; }
void recording_begin(void) {}
void recording_end(Recording *r) { (void)r; }
void device_memory(size_t *used, size_t *peak, int reset) { (void)reset, *used = *peak = 0; } /* not counted: the system knows */
void *device_lend(void *host, size_t n, size_t size, int as_real, int fill) {
  (void)n, (void)size, (void)as_real, (void)fill;
  return host;
}
void device_return(void *host, void *lent, size_t n, size_t size, int as_real, int back) {
  (void)host, (void)lent, (void)n, (void)size, (void)as_real, (void)back;
}
void device_free(void *p) { free(p); }
void device_push(void *device, const void *host, size_t bytes) { memcpy(device, host, bytes); }
void device_pull(void *host, const void *device, size_t bytes) { memcpy(host, device, bytes); }
void pull_floats(float *host, const real *device, size_t n) { memcpy(host, device, n * sizeof *host); }
void device_copy(void *dst, const void *src, size_t bytes) { memcpy(dst, src, bytes); }
void device_copy_rows(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t bytes, size_t rows) {
  for (size_t i = 0; i < rows; i++) memcpy((char *)dst + i * dst_pitch, (const char *)src + i * src_pitch, bytes);
}
void device_zero(void *p, size_t bytes) { memset(p, 0, bytes); }
void *device_host(void *p) { return p; }

void *device_scratch(size_t bytes) {
  static _Thread_local void *scratch;
  static _Thread_local size_t size;
  if (bytes > size) {
    free(scratch);
    scratch = device_alloc(bytes);
    size = scratch ? bytes : 0;
  }
  return scratch;
}
