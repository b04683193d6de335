/* pool.c - one thread pool: spin a moment, then sleep; a fixed split, so results do not depend on timing; alive after fork. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "device.h"

enum { MAX_WORKERS = 256, SPINS = 4000 };
static const double PARALLEL_WORK = 2e4; /* float operations below which waking the workers costs more than it saves */

static pthread_mutex_t users = PTHREAD_MUTEX_INITIALIZER; /* held by the thread whose job runs */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static size_t started; /* helper threads running in this process */
static atomic_uint generation, sleepers, unfinished;
static atomic_uint claimed[MAX_WORKERS]; /* the last generation whose part i somebody took */
static struct {
  void (*f)(void *, size_t, size_t, size_t);
  void *arg;
  size_t n, parts;
} job;
static _Thread_local int inside; /* a worker, or a caller whose job runs */

size_t workers(void) {
  static size_t count;
  if (!count) {
    const char *text = getenv("MIL_NUM_THREADS");
    long n = text ? strtol(text, NULL, 10) : 0;
    cpu_set_t set;
    if (n < 1) n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    count = n > MAX_WORKERS ? MAX_WORKERS : (size_t)n;
  }
  return count;
}

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static void run_part(size_t i) {
  size_t begin = job.n * i / job.parts, end = job.n * (i + 1) / job.parts;
  if (begin < end) job.f(job.arg, begin, end, i);
  atomic_fetch_sub(&unfinished, 1);
}

/* Part i of job g, unless it is taken. Who runs a part does not matter to its result, so the caller takes over from a worker that
 * the system has not woken yet; a job stands until all its parts are taken and done, so a part won here is the current job's. */
static int take_part(size_t i, unsigned g) {
  unsigned before = atomic_load(claimed + i);
  return (int)(before - g) < 0 && atomic_compare_exchange_strong(claimed + i, &before, g);
}

static void *work_loop(void *id) {
  unsigned seen = 0;
  inside = 1;
  for (;;) {
    for (int spin = 0; spin < SPINS && atomic_load(&generation) == seen; spin++) relax();
    if (atomic_load(&generation) == seen) {
      pthread_mutex_lock(&lock);
      atomic_fetch_add(&sleepers, 1);
      while (atomic_load(&generation) == seen) pthread_cond_wait(&wake, &lock);
      atomic_fetch_sub(&sleepers, 1);
      pthread_mutex_unlock(&lock);
    }
    seen = atomic_load(&generation);
    if (take_part((size_t)(uintptr_t)id, seen)) run_part((size_t)(uintptr_t)id);
  }
  return NULL;
}

static void before_fork(void) { pthread_mutex_lock(&users); }
static void after_fork_parent(void) { pthread_mutex_unlock(&users); }
static void after_fork_child(void) { /* the threads stayed with the parent: start anew at the next job */
  started = 0;
  atomic_store(&generation, 0);
  atomic_store(&sleepers, 0);
  for (size_t i = 0; i < MAX_WORKERS; i++) atomic_store(claimed + i, 0);
  pthread_mutex_init(&lock, NULL);
  pthread_cond_init(&wake, NULL);
  pthread_mutex_unlock(&users);
}
static void watch_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

static void start(size_t wanted) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_fork);
  while (started < wanted) {
    pthread_t thread;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 1 << 21);
    int failed = pthread_create(&thread, &attr, work_loop, (void *)(uintptr_t)(started + 1));
    pthread_attr_destroy(&attr);
    if (failed) return;
    started++;
  }
}

void parallel(void (*f)(void *arg, size_t begin, size_t end, size_t worker), void *arg, size_t n, double work) {
  size_t parts = workers();
  if (n == 0) return;
  if (inside || parts == 1 || n == 1 || (double)n * work < PARALLEL_WORK) {
    f(arg, 0, n, 0);
    return;
  }
  pthread_mutex_lock(&users);
  inside = 1;
  job.f = f, job.arg = arg, job.n = n, job.parts = parts;
  start(parts - 1); /* threads that cannot be had are not missed: the caller takes every part that nobody else does */
  atomic_store(&unfinished, (unsigned)parts);
  unsigned g = atomic_fetch_add(&generation, 1) + 1;
  if (atomic_load(&sleepers)) {
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
  }
  for (size_t i = 0; i < parts; i++)
    if (take_part(i, g)) run_part(i);
  for (int spin = 0; atomic_load(&unfinished); spin++) spin < SPINS ? relax() : (void)sched_yield();
  inside = 0;
  pthread_mutex_unlock(&users);
}
