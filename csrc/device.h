/* device.h - the whole device abstraction. device.c is the CPU's, cuda/device.cu the GPU's. */
#ifndef MIL_DEVICE_H
#define MIL_DEVICE_H
#include <stddef.h>

#include "real.h"

void *device_alloc(size_t bytes);                                  /* 64-byte aligned, not zeroed; NULL: out of memory, error latched */
void device_free(void *p);                                         /* NULL is fine */
void device_push(void *device, const void *host, size_t bytes);    /* host to device */
void device_pull(void *host, const void *device, size_t bytes);    /* device to host, waits for the device's work */
void pull_floats(float *host, const real *device, size_t n);       /* n activations as float */
void device_copy(void *dst, const void *src, size_t bytes);        /* device to device, no overlap */
void device_zero(void *p, size_t bytes);
/* Scratch of an op: grow-only, valid until the next call of device_scratch on this thread; its size must be a pure function of
 * dims. NULL: out of memory, error latched. */
void *device_scratch(size_t bytes);
const char *device_error(void);                                    /* the latched error, once; NULL: none */
void device_fail(const char *what);                                /* latch an error */

/* pool.c - one thread pool. The CPU's alone; op files under csrc use it, model code does not.
 * parallel calls f(arg, begin, end, worker) for a fixed split of [0,n) over the workers: worker i of W gets [n i/W, n (i+1)/W).
 * `work` is about how many float operations one item costs: small totals run on the caller as one range (worker 0), a rule of
 * n and work alone. Nested calls run on the caller. */
void parallel(void (*f)(void *arg, size_t begin, size_t end, size_t worker), void *arg, size_t n, double work);
size_t workers(void);                                              /* W: MIL_NUM_THREADS, else the affinity count */
#endif
