/* sample.cu - sampling, speculative acceptance and the uniforms that they consume; a block a row.
 *
 * Probabilities relative to the largest are summed as integers (units of 2^-40): exact in any order, so a draw does not depend on how
 * threads met. What is below 2^-41 of the largest counts as 0. */
#include <float.h>

#include "common.cuh"
#include "philox.h"

namespace {

enum { THREADS = 1024, BINS = 2048, SPLITS = 64 };
typedef unsigned long long Mass;

struct Settings {
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k;
};

__device__ Mass mass(float p) { return (Mass)((double)p * 0x1p40 + 0.5); }

unsigned threads_for(size_t V) { return V < THREADS ? (unsigned)(V + 31) / 32 * 32 : THREADS; } /* sums are exact: any number does */

/* Larger floats have larger ranks; -0 ranks as 0. */
__device__ uint32_t rank(float x) {
  const uint32_t u = __float_as_uint(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

/* ---- argmax: the first largest; NaN counts as -inf; 0 when nothing is above -inf ------------------------------------------------- */

struct Best {
  float value;
  int32_t at;
};
__device__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a; }

__device__ Best block_best(Best mine) {
  __shared__ Best part[32];
  for (int d = 16; d; d /= 2) mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.value, d), __shfl_xor_sync(0xffffffffu, mine.at, d)});
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
  __syncthreads();
  Best best = part[0];
  for (int w = 1; w < (int)blockDim.x / 32; w++) best = better(best, part[w]);
  return best;
}

/* part (rows,SPLITS): of the blockIdx.x-th part of row blockIdx.y + gridDim.y * blockIdx.z */
__global__ void argmax_parts(Best *part, const float *logits, size_t rows, size_t V) {
  wait_for_previous_kernel();
  const size_t row = blockIdx.y + (size_t)gridDim.y * blockIdx.z, from = V * blockIdx.x / SPLITS, to = V * (blockIdx.x + 1) / SPLITS;
  if (row >= rows) return;
  Best mine = {-INFINITY, 0};
#pragma unroll 4
  for (size_t i = from + threadIdx.x; i < to; i += blockDim.x) {
    const float v = logits[row * V + i];
    if (v > mine.value) mine = {v, (int32_t)i};
  }
  mine = block_best(mine);
  if (threadIdx.x == 0) part[row * SPLITS + blockIdx.x] = mine;
}
__device__ int32_t argmax_of(const Best *part) {
  Best best = {-INFINITY, 0};
  for (int s = 0; s < SPLITS; s++)
    if (part[s].value > best.value) best = part[s];
  return best.at;
}
void find_argmax(Best *part, const float *logits, size_t rows, size_t V) {
  const unsigned y = rows < 32768 ? (unsigned)rows : 32768;
  LAUNCH_EARLY(argmax_parts, dim3(SPLITS, y, (unsigned)ceil_div(rows, y)), 256, 0, part, logits, rows, V);
}

/* ---- the distribution of a row ------------------------------------------------------------------------------------------------------- */

__device__ Mass total(const float *p, size_t V) {
  Mass sum = 0;
  for (size_t i = threadIdx.x; i < V; i += blockDim.x) sum += mass(p[i]);
  return block_sum(sum);
}

/* Keeps the shortest prefix of the tokens, ordered by logit downwards and then by index, whose mass (or count) reaches limit > 0.
 * Radix selection, by 11, 11 and 10 bits of its rank, of the last logit to stay; of its equals the first by index. */
__device__ void keep_prefix(float *p, const float *x, Mass limit, bool by_mass, size_t V) {
  __shared__ Mass bins[BINS];
  __shared__ uint32_t chosen;
  __shared__ Mass rest;
  __shared__ unsigned before[THREADS / 32];
  uint32_t last = 0, known = 0;
  for (int shift = 21; shift >= 0; shift -= shift > 10 ? 11 : 10) {
    const uint32_t digit = shift ? BINS - 1 : BINS / 2 - 1;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (size_t i = threadIdx.x; i < V; i += blockDim.x)
      if (p[i] > 0 && (rank(x[i]) & known) == last) atomicAdd(&bins[rank(x[i]) >> shift & digit], by_mass ? mass(p[i]) : (Mass)1);
    __syncthreads();
    if (threadIdx.x == 0) {
      Mass sum = 0, above = 0;
      uint32_t found = 0;
      for (int b = BINS; b-- && sum < limit;)
        if (bins[b] > 0) found = (uint32_t)b, above = sum, sum += bins[b];
      chosen = found, rest = limit - above;
    }
    __syncthreads();
    limit = rest;
    last |= chosen << shift;
    known |= digit << shift;
  }
  /* All equals of the last have one probability: how many of them stay? */
  Mass stay = limit;
  if (by_mass) {
    Mass one = 0;
    for (size_t i = threadIdx.x; i < V; i += blockDim.x)
      if (rank(x[i]) == last) one = mass(p[i]);
    for (int d = 16; d; d /= 2) {
      const Mass other = __shfl_xor_sync(0xffffffffu, one, d);
      one = one > other ? one : other;
    }
    __syncthreads();
    if (threadIdx.x == 0) rest = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) atomicMax(&rest, one);
    __syncthreads();
    stay = rest ? (limit + rest - 1) / rest : 0;
  }
  Mass kept = 0;
  for (size_t i = 0; i < V; i += blockDim.x) {
    const size_t k = i + threadIdx.x;
    const uint32_t r = k < V ? rank(x[k]) : 0;
    const unsigned equal = __ballot_sync(0xffffffffu, k < V && r == last);
    __syncthreads();
    if (threadIdx.x % 32 == 0) before[threadIdx.x / 32] = (unsigned)__popc(equal);
    __syncthreads();
    Mass ahead = kept + (unsigned)__popc(equal & ((1u << threadIdx.x % 32) - 1));
    for (int w = 0; w < (int)blockDim.x / 32; w++) {
      if (w < (int)threadIdx.x / 32) ahead += before[w];
      kept += before[w];
    }
    if (k < V && (r < last || (r == last && ahead >= stay))) p[k] = 0;
  }
  __syncthreads();
}

/* p (V) = the distribution of row b of the settings over x (V), temperature above 0; its largest is 1. Nothing above -inf: token 0. */
__device__ void distribution(float *p, const float *x, const Settings &s, size_t b, size_t V) {
  float max = -INFINITY;
  for (size_t i = threadIdx.x; i < V; i += blockDim.x)
    if (x[i] > max) max = x[i];
  max = block_max(max);
  const float beta = 1 / s.temperature[b], min_p = s.min_p[b];
  for (size_t i = threadIdx.x; i < V; i += blockDim.x) {
    const float v = x[i];
    p[i] = max == -INFINITY ? (i ? 0.0f : 1.0f) : v == max ? 1.0f : v >= -FLT_MAX ? exp_((v - max) * beta) : 0.0f;
  }
  __syncthreads();
  if (max == -INFINITY) return;
  if (s.top_k[b] > 0 && (size_t)s.top_k[b] < V) keep_prefix(p, x, (Mass)s.top_k[b], false, V);
  if (s.top_p[b] < 1) {
    const double all = (double)total(p, V) * s.top_p[b];
    keep_prefix(p, x, all < 1 ? 1 : (Mass)ceil(all), true, V);
  }
  for (size_t i = threadIdx.x; min_p > 0 && i < V; i += blockDim.x)
    if (p[i] < min_p && p[i] != 1) p[i] = 0;
  __syncthreads();
}

/* The first token whose cumulative mass exceeds u times the whole. */
__device__ int32_t draw(const float *p, float u, size_t V) {
  __shared__ Mass sums[THREADS / 32];
  __shared__ int32_t found;
  const Mass all = total(p, V), goal = (Mass)((double)u * (double)all);
  Mass below = 0;
  __syncthreads();
  if (threadIdx.x == 0) found = -1;
  for (size_t i = 0; i < V; i += blockDim.x) {
    const Mass mine = i + threadIdx.x < V ? mass(p[i + threadIdx.x]) : 0;
    Mass up = mine; /* of the warp, up to this lane */
    for (int d = 1; d < 32; d *= 2) {
      const Mass other = __shfl_up_sync(0xffffffffu, up, d);
      if ((int)threadIdx.x % 32 >= d) up += other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = up;
    __syncthreads();
    Mass ahead = below;
    for (int w = 0; w < (int)blockDim.x / 32; w++) {
      if (w < (int)threadIdx.x / 32) ahead += sums[w];
      below += sums[w];
    }
    if (mine && ahead + up - mine <= goal && goal < ahead + up) found = (int32_t)(i + threadIdx.x);
    if (below > goal) break; /* the same for all */
  }
  __syncthreads();
  return found < 0 ? 0 : found;
}

/* ---- sample -------------------------------------------------------------------------------------------------------------------------- */

/* p (B,V) scratch */
__global__ void sample_rows(int32_t *token, const Best *part, float *p, const float *logits, Settings s, const float *u, size_t V) {
  const size_t b = blockIdx.x;
  wait_for_previous_kernel();
  if (s.temperature[b] > 0) {
    distribution(p + b * V, logits + b * V, s, b, V);
    const int32_t drawn = draw(p + b * V, u[b], V);
    if (threadIdx.x == 0) token[b] = drawn;
  } else if (threadIdx.x == 0) {
    token[b] = argmax_of(part + b * SPLITS);
  }
}

/* ---- verify -------------------------------------------------------------------------------------------------------------------------- */

struct Round {
  int32_t *accepted, *token;
  const float *logits, *draft_logits, *u_accept, *u;
  const int32_t *draft, *count;
  Settings settings;
  const Best *part;
  float *p, *q; /* (B,V) each */
  size_t K, V;
};

__device__ void verify_sampled(const Round &r, size_t b, size_t count, float *p, float *q) {
  const size_t V = r.V, K = r.K;
  size_t i = 0;
  for (;; i++) {
    distribution(p, r.logits + (b * (K + 1) + i) * V, r.settings, b, V);
    if (i == count) break;
    distribution(q, r.draft_logits + (b * K + i) * V, r.settings, b, V);
    const float a = (float)(0x1p40 / (double)total(p, V)), c = (float)(0x1p40 / (double)total(q, V));
    const size_t d = (size_t)r.draft[b * K + i];
    if (r.u_accept[b * K + i] * (q[d] * c) < p[d] * a) continue;
    __syncthreads();
    for (size_t j = threadIdx.x; j < V; j += blockDim.x) q[j] = fmaxf(p[j] * a - q[j] * c, 0);
    __syncthreads();
    if (total(q, V) > 0) p = q;
    break;
  }
  const int32_t drawn = draw(p, r.u[b * (K + 1) + i], V);
  if (threadIdx.x == 0) r.accepted[b] = (int32_t)i, r.token[b] = drawn;
}

__global__ void verify_rows(Round r) {
  const size_t b = blockIdx.x, count = r.count ? (size_t)r.count[b] : r.K;
  if (r.settings.temperature[b] > 0) return verify_sampled(r, b, count, r.p + b * r.V, r.q + b * r.V);
  if (threadIdx.x) return;
  size_t i = 0;
  int32_t best = argmax_of(r.part + b * (r.K + 1) * SPLITS);
  while (i < count && r.draft[b * r.K + i] == best) best = argmax_of(r.part + (b * (r.K + 1) + ++i) * SPLITS);
  r.accepted[b] = (int32_t)i, r.token[b] = best;
}

__global__ void uniform_values(float *u, const int32_t *index, const int32_t *position, const int32_t *use, uint64_t seed, size_t n) {
  for (size_t b = (size_t)blockIdx.x * blockDim.x + threadIdx.x; b < n; b += (size_t)gridDim.x * blockDim.x) {
    uint32_t word[4] = {(uint32_t)index[b], (uint32_t)position[b], (uint32_t)use[b], 0};
    philox(word, word, seed);
    u[b] = (float)(word[0] >> 8) * 0x1p-24f;
  }
}

}  // namespace

void sample(int32_t *token, const float *logits, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p, const float *u,
            size_t B, size_t V) {
  if (!B || !V) return;
  float *p = (float *)device_scratch(B * V * sizeof(float) + B * SPLITS * sizeof(Best));
  if (!p) return;
  Best *part = (Best *)(p + B * V);
  find_argmax(part, logits, B, V);
  LAUNCH_EARLY(sample_rows, (unsigned)B, threads_for(V), 0, token, part, p, logits, Settings{temperature, top_p, min_p, top_k}, u, V);
}

void verify(int32_t *accepted, int32_t *token, const float *logits, const int32_t *draft, const float *draft_logits, const int32_t *count,
            const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p, const float *u_accept, const float *u_sample, size_t B,
            size_t K, size_t V) {
  if (!B || !V) return;
  float *p = (float *)device_scratch(2 * B * V * sizeof(float) + B * (K + 1) * SPLITS * sizeof(Best));
  if (!p) return;
  Best *part = (Best *)(p + 2 * B * V);
  find_argmax(part, logits, B * (K + 1), V);
  LAUNCH(verify_rows, (unsigned)B, threads_for(V), 0,
         Round{accepted, token, logits, draft_logits, u_accept, u_sample, draft, count, {temperature, top_p, min_p, top_k}, part, p, p + B * V, K, V});
}

void uniform(float *u, const int32_t *index, const int32_t *position, const int32_t *use, uint64_t seed, size_t B) {
  LAUNCH(uniform_values, blocks_for(B, 128), 128, 0, u, index, position, use, seed, B);
}
