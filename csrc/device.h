/* device.h - the whole device abstraction. device.c is the CPU's, cuda/device.cu the GPU's. */
#ifndef MIL_DEVICE_H
#define MIL_DEVICE_H
#include <stddef.h>

#include "real.h"

void device_lock(void);                                            /* one call at a time: held around everything below by the binding */
void device_unlock(void);
void *device_alloc(size_t bytes);                                  /* 64-byte aligned, not zeroed; NULL: out of memory, error latched */
void device_free(void *p);                                         /* NULL is fine */
void device_push(void *device, const void *host, size_t bytes);    /* host to device */
void device_pull(void *host, const void *device, size_t bytes);    /* device to host, waits for the device's work */
void pull_floats(float *host, const real *device, size_t n);       /* n activations as float */
void device_copy(void *dst, const void *src, size_t bytes);        /* device to device, no overlap */
void device_copy_rows(void *dst, size_t dst_pitch, const void *src, size_t src_pitch, size_t bytes, size_t rows); /* of rows, `bytes` each */
void device_zero(void *p, size_t bytes);
void *device_host(void *p);                                        /* the same memory as the host sees it; NULL: it does not */
void *device_stream(void);                                         /* in whose order the device works, for other libraries; NULL on the CPU */
/* Bytes that device_alloc has given out: now, and the most since the last reset. */
void device_memory(size_t *used, size_t *peak, int reset);
/* An op's argument of n elements, float32 on the host: the same memory on the CPU; elsewhere a copy, with `as_real` of the type
 * `real`, filled from the host unless it is an output. device_return ends the loan; `back`: what was written goes to the host. */
void *device_lend(void *host, size_t n, size_t size, int as_real, int fill);
void device_return(void *host, void *lent, size_t n, size_t size, int as_real, int back);
/* Scratch of an op: grow-only, valid until the next call of device_scratch on this thread; its size must be a pure function of
 * dims. NULL: out of memory, error latched. */
void *device_scratch(size_t bytes);
/* Work that is issued again and again. play: 1, it was done as recorded; 0: the caller issues it, once plainly (so that what grows has
 * grown), the next time between begin and end, then plays it. On the CPU play is always 0 and the rest does nothing. */
typedef struct Recording Recording;
Recording *recording_new(void);
void recording_free(Recording *r);
int recording_play(Recording *r);
void recording_begin(void);
void recording_end(Recording *r);
/* Other libraries' work: which CUDA device this is (-1: the CPU); what `stream` does from now on waits for our stream
 * (ours_first), or ours for it. Both may be called by any thread. */
int device_id(void);
void device_order(void *stream, int ours_first);
const char *device_missing(void);                                  /* why there is no device to compute on; NULL: there is one */
const char *device_error(void);                                    /* the latched error, once; NULL: none */
void device_fail(const char *what);                                /* latch an error */

/* pool.c - one thread pool. The CPU's alone; op files under csrc use it, model code does not.
 * parallel calls f(arg, begin, end, worker) for a fixed split of [0,n) over the workers: worker i of W gets [n i/W, n (i+1)/W).
 * `work` is about how many float operations one item costs: small totals run on the caller as one range (worker 0), a rule of
 * n and work alone. Nested calls run on the caller. */
void parallel(void (*f)(void *arg, size_t begin, size_t end, size_t worker), void *arg, size_t n, double work);
size_t workers(void);                                              /* W: MIL_NUM_THREADS, else the affinity count */
#endif
