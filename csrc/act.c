/* act.c - SwiGLU, and a sum. */
#include "device.h"
#include "ops.h"

typedef struct {
  real *y, *dup;
  const real *dy, *gate, *up;
} Swiglu;

static void swiglu_range(void *arg, size_t i, size_t end, size_t worker) {
  (void)worker;
  const Swiglu *s = arg;
  for (; i < end; i++) s->y[i] = silu(s->gate[i]) * s->up[i];
}

static void swiglu_gradient(void *arg, size_t i, size_t end, size_t worker) { /* y is dgate */
  (void)worker;
  const Swiglu *s = arg;
  for (; i < end; i++) { /* y = silu(gate) * up */
    float g = s->gate[i], sig = sigmoid(g), dy = s->dy[i], dgate = dy * s->up[i] * sig * (1.0f + g * (1.0f - sig));
    s->dup[i] = dy * g * sig;
    s->y[i] = dgate;
  }
}

void swiglu_forward(real *y, const real *gate, const real *up, size_t n) {
  Swiglu s = {.y = y, .gate = gate, .up = up};
  parallel(swiglu_range, &s, n, 20);
}

void swiglu_backward(real *dgate, real *dup, const real *dy, const real *gate, const real *up, size_t n) {
  Swiglu s = {.y = dgate, .dup = dup, .dy = dy, .gate = gate, .up = up};
  parallel(swiglu_gradient, &s, n, 30);
}

static void add_range(void *arg, size_t i, size_t end, size_t worker) { /* up is x */
  (void)worker;
  const Swiglu *s = arg;
  for (; i < end; i++) s->y[i] += s->up[i];
}

void accumulate(real *y, const real *x, size_t n) {
  Swiglu s = {.y = y, .up = x};
  parallel(add_range, &s, n, 1);
}
