/* sample.cu - sampling, speculative acceptance and the uniforms that they consume. Several blocks a row, a pass a kernel.
 *
 * Probabilities relative to the largest are summed as integers (units of 2^-40): exact in any order, so a draw does not depend
 * on how threads met, nor on how many blocks a row has. What is below 2^-41 of the largest counts as 0.
 *
 * top_k and top_p keep a prefix of the tokens, ordered by logit downwards and then by index; so a row's filters come down to
 * one key (logit, index), the last that stays. Bins of equal width in log p, counted over the whole row, say near where it
 * is; the few tokens there are gathered, and the last block to do so searches them. */
#include <float.h>

#include "common.cuh"
#include "philox.h"

namespace {

enum { THREADS = 256, BINS = 2048, MOST_SPLITS = 64, GATHERED = 2048 };
typedef Key Mass; /* of probability, or a count, or a key */

struct Best {
  float value;
  int32_t at;
};
struct Row { /* of logits; what the passes find */
  Best best;
  unsigned candidates, blocks; /* gathered so far; how many blocks have done so */
  Mass last;                   /* key: what is below does not stay */
  Mass total;                  /* mass of what stays */
};
struct Settings {
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k;
};
/* A call of verify; sampling is one without drafts, K = 0. R = B (K+1) + B K rows of logits: the targets', then the drafts'. */
struct Call {
  int32_t *accepted, *token;
  const float *logits, *draft_logits, *u_accept, *u;
  const int32_t *draft, *count;
  Settings settings;
  size_t B, K, V, R;
  unsigned splits, digit; /* blocks a row; 2^digit bins are used */
  Row *row;       /* (R) */
  Best *best;     /* (R,splits) */
  Mass *bins;     /* (R,2,BINS): how many tokens, and their mass */
  Mass *gathered; /* (R,GATHERED) keys */
  Mass *sums;     /* (B,2,splits): of p, of what is left of it without q */
  unsigned *done; /* (B): blocks that have left their sums */
};

__device__ Mass mass(float p) { return (Mass)((double)p * 0x1p40 + 0.5); }

/* ---- rows --------------------------------------------------------------------------------------------------------------- */

struct Line {
  const float *x;
  size_t b;
  bool used; /* somebody asks for its distribution, or its argmax */
};
__device__ size_t count_of(const Call &c, size_t b) { return c.count ? (size_t)c.count[b] : c.K; }
__device__ Line line_of(const Call &c, size_t r) {
  const size_t targets = c.B * (c.K + 1), at = r < targets ? r : r - targets, each = r < targets ? c.K + 1 : c.K;
  const size_t b = at / each, i = at % each, count = count_of(c, b);
  if (r < targets) return {c.logits + at * c.V, b, i <= count};
  return {c.draft_logits + at * c.V, b, i < count && c.settings.temperature[b] > 0};
}
__device__ bool limits_count(const Call &c, size_t b) { return c.settings.top_k[b] > 0 && (size_t)c.settings.top_k[b] < c.V; }
__device__ bool filtered(const Call &c, size_t b) {
  return c.settings.temperature[b] > 0 && (limits_count(c, b) || c.settings.top_p[b] < 1);
}

/* The distribution of a row, temperature above 0: its largest is 1. Nothing above -inf: all mass on token 0. */
struct Distribution {
  const float *x;
  float max, beta, min_p;
  Mass last;
  int bins;

  __device__ float of(float v, size_t i) const { /* before the filters */
    if (max == -INFINITY) return i ? 0 : 1;
    return v == max ? 1 : v >= -FLT_MAX ? exp_((v - max) * beta) : 0;
  }
  __device__ float operator()(size_t i) const { return kept(i, x[i]); }
  __device__ float kept(size_t i, float v) const {
    const float p = of(v, i);
    return p > 0 && key_of(v, i) >= last && !(p < min_p && p != 1) ? p : 0;
  }
  /* Bins downwards from the largest; the last has all that are too small for a mass. p > 0 */
  __device__ int bin(float v) const {
    return v == max ? 0 : (int)fminf((max - v) * beta * ((bins - 1) / 28.5f), (float)(bins - 1));
  }
};
__device__ Distribution distribution_of(const Call &c, const Line &line, const Row &row) {
  return {line.x, row.best.value, 1 / c.settings.temperature[line.b], c.settings.min_p[line.b], row.last, 1 << c.digit};
}

/* A pass's grid: blocks (splits, rows), the rows in y and z. */
dim3 grid_of(const Call &c, size_t rows) {
  const unsigned y = rows < 32768 ? (unsigned)rows : 32768;
  return dim3(c.splits, y, (unsigned)ceil_div(rows, y));
}
__device__ size_t grid_row() { return blockIdx.y + (size_t)gridDim.y * blockIdx.z; }
__device__ size_t split_begin(const Call &c, size_t split) { return c.V * split / c.splits; }
/* f(i, x[i]) from begin to end, by the block, four loads under way; the second: of the block's split */
template <class F> __device__ void each_logit(const float *x, size_t begin, size_t end, F f) {
  for (size_t i = begin + threadIdx.x; i < end; i += 4 * blockDim.x) {
    float v[4];
#pragma unroll
    for (int u = 0; u < 4; u++) v[u] = i + u * blockDim.x < end ? x[i + u * blockDim.x] : 0;
#pragma unroll
    for (int u = 0; u < 4; u++)
      if (i + u * blockDim.x < end) f(i + u * blockDim.x, v[u]);
  }
}
template <class F> __device__ void each_of_split(const Call &c, const float *x, F f) {
  each_logit(x, split_begin(c, blockIdx.x), split_begin(c, blockIdx.x + 1), f);
}

/* ---- sums over a block -------------------------------------------------------------------------------------------------- */

/* Of the threads before this one, and of all */
__device__ Mass sum_before(Mass own, Mass *all) {
  __shared__ Mass part[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Mass up = own, before = 0;
  for (int d = 1; d < 32; d *= 2) {
    const Mass other = __shfl_up_sync(0xffffffffu, up, d);
    if (lane >= d) up += other;
  }
  __syncthreads();
  if (lane == 31) part[warp] = up;
  __syncthreads();
  *all = 0;
  for (int w = 0; w < (int)blockDim.x / 32; w++) {
    if (w < warp) before += part[w];
    *all += part[w];
  }
  return before + up - own;
}
__device__ Mass largest(Mass v) {
  __shared__ Mass part[THREADS / 32];
  for (int d = 16; d; d /= 2) {
    const Mass other = __shfl_xor_sync(0xffffffffu, v, d);
    v = v > other ? v : other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < (int)blockDim.x / 32; w++) v = v > part[w] ? v : part[w];
  return v;
}

/* The first of n bins up to which their sum reaches limit > 0, and the sum before it; n: it does not. */
struct Found {
  unsigned bin;
  Mass before;
};
__device__ Found find_bin(const Mass *bins, unsigned n, Mass limit) {
  __shared__ Found found;
  const unsigned each = n / blockDim.x;
  const Mass *const mine = bins + threadIdx.x * each;
  Mass own = 0, all;
  for (unsigned i = 0; i < each; i++) own += mine[(i + threadIdx.x) % each]; /* the threads of a warp in different banks */
  const Mass before = sum_before(own, &all);
  if (threadIdx.x == 0) found = {n, all};
  __syncthreads();
  if (before < limit && limit <= before + own) {
    unsigned i = 0;
    Mass sum = before;
    for (; sum + mine[i] < limit; i++) sum += mine[i];
    found = {threadIdx.x * each + i, sum};
  }
  __syncthreads();
  const Found result = found;
  __syncthreads(); /* before found is written again */
  return result;
}

/* ---- the largest: the first of them; NaN counts as -inf; 0 when nothing is above -inf ----------------------------------- */

__device__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a; }
__device__ Best warp_best(Best mine) {
  for (int d = 16; d; d /= 2)
    mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.value, d), __shfl_xor_sync(0xffffffffu, mine.at, d)});
  return mine;
}

/* best of a part of a row; what later passes add to is set to zero. */
__global__ void __launch_bounds__(THREADS) find_best(const __grid_constant__ Call c) {
  __shared__ Best part[THREADS / 32];
  const size_t r = grid_row();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (r >= c.R) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    c.row[r] = {};
    if (r < c.B) c.done[r] = 0;
  }
  const Line line = line_of(c, r);
  if (!line.used) return;
  if (filtered(c, line.b))
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < 2 * BINS; i += c.splits * blockDim.x)
      c.bins[r * 2 * BINS + i] = 0;
  Best mine = {-INFINITY, 0};
  each_of_split(c, line.x, [&](size_t i, float v) {
    if (v > mine.value) mine = {v, (int32_t)i};
  });
  mine = warp_best(mine);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < (int)blockDim.x / 32; w++) mine = better(mine, part[w]);
  c.best[r * c.splits + blockIdx.x] = mine;
}

/* ---- bins: row.best; where a filter asks for them, how many tokens are in a bin, and their mass ------------------------- */

__global__ void __launch_bounds__(THREADS) fill_bins(const __grid_constant__ Call c) {
  __shared__ Mass masses[BINS];
  __shared__ unsigned counts[BINS];
  const size_t r = grid_row();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (r >= c.R) return;
  const Line line = line_of(c, r);
  const bool fill = line.used && filtered(c, line.b);
  if (!line.used || (blockIdx.x && !fill)) return;
  Best best = {-INFINITY, 0};
  for (unsigned s = threadIdx.x % 32; s < c.splits; s += 32) best = better(best, c.best[r * c.splits + s]);
  best = warp_best(best);
  if (blockIdx.x == 0 && threadIdx.x == 0) c.row[r].best = best;
  if (!fill || best.value == -INFINITY) return;

  const Distribution p = distribution_of(c, line, {best});
  for (int i = threadIdx.x; i < p.bins; i += blockDim.x) masses[i] = 0, counts[i] = 0;
  __syncthreads();
  each_of_split(c, line.x, [&](size_t i, float v) {
    const float pi = p.of(v, i);
    if (!(pi > 0)) return;
    const int bin = p.bin(v);
    atomicAdd(counts + bin, 1u);
    atomicAdd(masses + bin, mass(pi));
  });
  __syncthreads();
  Mass *const to = c.bins + r * 2 * BINS;
  for (int i = threadIdx.x; i < p.bins; i += blockDim.x)
    if (counts[i]) {
      atomicAdd(to + i, (Mass)counts[i]);
      atomicAdd(to + BINS + i, masses[i]);
    }
}

/* ---- filters: row.last -------------------------------------------------------------------------------------------------- */

__device__ Mass share_of(Mass total, float top_p) {
  const double part = (double)total * top_p;
  return part < 1 ? 1 : (Mass)ceil(part);
}

/* Tokens of the bins `one` and first … end, or more: from shared memory, or, if they are too many for it, from the row. */
struct Candidates {
  Distribution p;
  size_t V, n;
  int digit;
  const Mass *keys, *masses;

  template <class F> __device__ void each(F f) const { /* f(key, mass, bin) */
    if (n > GATHERED)
      return each_logit(p.x, 0, V, [&](size_t i, float v) {
        const float pi = p.of(v, i);
        if (pi > 0) f(key_of(v, i), mass(pi), p.bin(v));
      });
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) f(keys[i], masses[i], p.bin(logit_of(keys[i])));
  }
  /* The key at which the tokens of a bin, the largest first, reach limit: radix selection by what their keys do not share. */
  __device__ Mass reach(Mass *bins, unsigned bin, Mass limit, bool by_mass) const {
    Mass high = 0, low = 0;
    each([&](Mass key, Mass, unsigned b) {
      if (b == bin) high = high > key ? high : key, low = low > ~key ? low : ~key;
    });
    high = largest(high), low = ~largest(low);
    int left = 64 - __clzll((long long)(high ^ low));
    Mass known = left < 64 ? high >> left << left : 0;
    while (left) {
      const int shift = left > digit ? left - digit : 0;
      const unsigned most = (1u << (left - shift)) - 1;
      for (int i = threadIdx.x; i < p.bins; i += blockDim.x) bins[i] = 0;
      __syncthreads();
      each([&](Mass key, Mass m, unsigned b) {
        if (b == bin && (left == 64 || key >> left == known >> left))
          atomicAdd(bins + (most - (key >> shift & most)), by_mass ? m : 1);
      });
      __syncthreads();
      const Found found = find_bin(bins, p.bins, limit);
      known |= (Mass)(most - found.bin) << shift;
      limit -= found.before, left = shift;
    }
    return known;
  }
};

constexpr size_t SELECT_SHARED = (BINS + 2 * GATHERED) * sizeof(Mass);

__global__ void __launch_bounds__(THREADS) find_last(const __grid_constant__ Call c) {
  DYNAMIC_SHARED(Mass, bins);
  Mass *const keys = bins + BINS, *const masses = keys + GATHERED;
  const size_t r = grid_row();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (r >= c.R) return;
  const Line line = line_of(c, r);
  if (!line.used || !filtered(c, line.b)) return;
  Row &row = c.row[r];
  const Distribution p = distribution_of(c, line, row);
  if (p.max == -INFINITY) return;
  const float top_p = c.settings.top_p[line.b];
  auto read_bins = [&](int which) {
    __syncthreads();
    for (int i = threadIdx.x; i < p.bins; i += blockDim.x) bins[i] = c.bins[(r * 2 + which) * BINS + i];
    __syncthreads();
  };

  /* top_k: its bin, and the mass of those above. It keeps all of them: no such bin. */
  const unsigned none = p.bins;
  Found one = {none, 0};
  if (limits_count(c, line.b)) {
    read_bins(0);
    one = find_bin(bins, none, (Mass)c.settings.top_k[line.b]);
    if (one.bin == none && top_p >= 1) return;
  }
  read_bins(1);
  Mass own = 0, above;
  for (unsigned i = threadIdx.x; i < one.bin; i += blockDim.x) own += bins[i];
  sum_before(own, &above);
  /* top_p: the bins where its last token can be, whatever top_k keeps of its own bin */
  unsigned first = one.bin, end = one.bin;
  if (top_p < 1) {
    first = find_bin(bins, none, share_of(above, top_p)).bin;
    end = find_bin(bins, none, share_of(above + (one.bin < none ? bins[one.bin] : 0), top_p)).bin;
  }
  each_of_split(c, p.x, [&](size_t i, float v) {
    if (!(p.of(v, i) > 0)) return;
    const unsigned b = p.bin(v);
    if (b != one.bin && (b < first || b > end)) return;
    const unsigned at = atomicAdd(&row.candidates, 1u);
    if (at < GATHERED) c.gathered[r * GATHERED + at] = key_of(v, i);
  });
  if (!last_to_arrive(&row.blocks, gridDim.x)) return;

  const Candidates some = {p, c.V, __ldcg(&row.candidates), (int)c.digit, keys, masses};
  for (size_t i = threadIdx.x; some.n <= GATHERED && i < some.n; i += blockDim.x) {
    keys[i] = __ldcg(c.gathered + r * GATHERED + i);
    masses[i] = mass(p.of(logit_of(keys[i]), 1));
  }
  __syncthreads();
  Mass last = 0, total = above;
  if (one.bin < none) {
    last = some.reach(bins, one.bin, c.settings.top_k[line.b] - one.before, false);
    Mass kept = 0;
    some.each([&](Mass key, Mass m, unsigned b) { kept += b == one.bin && key >= last ? m : 0; });
    sum_before(kept, &total);
    total += above;
  }
  if (top_p < 1) {
    read_bins(1);
    const Mass limit = share_of(total, top_p);
    const Found found = find_bin(bins, none, limit);
    last = some.reach(bins, found.bin, limit - found.before, true);
  }
  if (threadIdx.x == 0) row.last = last;
}

/* ---- a row's mass, and draws -------------------------------------------------------------------------------------------- */

/* row.total: what the drafts are judged by */
__global__ void __launch_bounds__(THREADS) add_masses(const __grid_constant__ Call c) {
  const size_t r = grid_row();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (r >= c.R) return;
  const Line line = line_of(c, r);
  if (!line.used || !(c.settings.temperature[line.b] > 0)) return;
  const Distribution p = distribution_of(c, line, c.row[r]);
  Mass own = 0;
  each_of_split(c, p.x, [&](size_t i, float v) { own += mass(p.kept(i, v)); });
  own = block_sum(own);
  if (threadIdx.x == 0) atomicAdd(&c.row[r].total, own);
}

/* What a token is drawn from: p, or what is left of p without q, both normalised. */
struct Target {
  Distribution p, q;
  float a, b; /* 1 / their masses */

  __device__ Mass of(size_t i, float v, bool without) const { /* v: p.x[i] */
    const float pi = p.kept(i, v);
    return mass(without ? fmaxf(__fadd_rn(__fmul_rn(pi, a), -__fmul_rn(q(i), b)), 0) : pi);
  }
};
__device__ Target target_of(const Call &c, size_t b, size_t i, bool judged) {
  const size_t r = b * (c.K + 1) + i, s = c.B * (c.K + 1) + b * c.K + i;
  Target t = {};
  t.p = distribution_of(c, line_of(c, r), c.row[r]);
  if (judged) {
    t.q = distribution_of(c, line_of(c, s), c.row[s]);
    t.a = (float)(0x1p40 / (double)c.row[r].total), t.b = (float)(0x1p40 / (double)c.row[s].total);
  }
  return t;
}

/* How many of the drafts of row b are accepted; all threads ask. */
__device__ size_t count_accepted(const Call &c, size_t b, size_t count) {
  size_t i = threadIdx.x;
  for (; i < count; i += blockDim.x) {
    const Target t = target_of(c, b, i, true);
    const size_t d = (size_t)c.draft[b * c.K + i];
    if (!(c.u_accept[b * c.K + i] * (t.q(d) * t.b) < t.p(d) * t.a)) break;
  }
  return count - (size_t)largest(i < count ? count - i : 0);
}

__device__ void greedy(const Call &c, size_t b, size_t count) {
  const Row *const row = c.row + b * (c.K + 1);
  size_t i = 0;
  while (i < count && c.draft[b * c.K + i] == row[i].best.at) i++;
  if (c.accepted) c.accepted[b] = (int32_t)i;
  c.token[b] = row[i].best.at;
}

/* The first token whose cumulative mass exceeds u times the whole: each block sums its split, the last one looks. */
__global__ void __launch_bounds__(THREADS) draw_tokens(const __grid_constant__ Call c) {
  __shared__ Mass below;
  __shared__ unsigned split;
  const size_t b = grid_row();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (b >= c.B) return;
  const size_t count = count_of(c, b);
  if (!(c.settings.temperature[b] > 0)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) greedy(c, b, count);
    return;
  }
  const size_t accepted = count_accepted(c, b, count);
  const bool rejected = accepted < count;
  const Target t = target_of(c, b, accepted, rejected);
  Mass *const sums = c.sums + b * 2 * c.splits, own[2] = {0, 0};
  each_of_split(c, t.p.x, [&](size_t i, float v) {
    own[0] += t.of(i, v, false);
    if (rejected) own[1] += t.of(i, v, true);
  });
  own[0] = block_sum(own[0]), own[1] = block_sum(own[1]);
  if (threadIdx.x == 0) sums[blockIdx.x] = own[0], sums[c.splits + blockIdx.x] = own[1];
  if (!last_to_arrive(c.done + b, gridDim.x)) return;

  Mass all, all_left, before;
  const bool here = threadIdx.x < c.splits;
  own[0] = here ? __ldcg(sums + threadIdx.x) : 0, own[1] = here ? __ldcg(sums + c.splits + threadIdx.x) : 0;
  before = sum_before(own[0], &all);
  const Mass before_left = sum_before(own[1], &all_left);
  const bool without = all_left > 0;
  if (without) before = before_left, all = all_left, own[0] = own[1];
  const Mass goal = (Mass)((double)c.u[b * (c.K + 1) + accepted] * (double)all);
  if (threadIdx.x == 0) c.token[b] = 0;
  if (threadIdx.x == 0 && c.accepted) c.accepted[b] = (int32_t)accepted;
  if (threadIdx.x == 0) split = 0, below = 0;
  __syncthreads();
  if (before <= goal && goal < before + own[0]) split = threadIdx.x, below = before;
  __syncthreads();
  const size_t begin = split_begin(c, split), end = split_begin(c, split + 1);
  const size_t run = (end - begin + blockDim.x - 1) / blockDim.x;
  const size_t from = begin + threadIdx.x * run, to = from + run < end ? from + run : end;
  own[0] = 0;
  for (size_t i = from; i < to; i++) own[0] += t.of(i, t.p.x[i], without);
  before = below + sum_before(own[0], &all);
  if (!(before <= goal && goal < before + own[0])) return;
  for (size_t i = from; i < to; i++) {
    before += t.of(i, t.p.x[i], without);
    if (before > goal) {
      c.token[b] = (int32_t)i;
      return;
    }
  }
}

__global__ void uniform_values(float *u, const int32_t *index, const int32_t *position, const int32_t *use, const int32_t *low,
                               const int32_t *high, size_t n) {
  for (size_t b = (size_t)blockIdx.x * blockDim.x + threadIdx.x; b < n; b += (size_t)gridDim.x * blockDim.x) {
    uint32_t word[4] = {(uint32_t)index[b], (uint32_t)position[b], (uint32_t)use[b], 0};
    philox(word, word, (uint64_t)(uint32_t)high[b] << 32 | (uint32_t)low[b]);
    u[b] = (float)(word[0] >> 8) * 0x1p-24f;
  }
}

}  // namespace

void verify(int32_t *accepted, int32_t *token, const float *logits, const int32_t *draft, const float *draft_logits,
            const int32_t *count, const float *temperature, const int32_t *top_k, const float *top_p, const float *min_p,
            const float *u_accept, const float *u_sample, size_t B, size_t K, size_t V) {
  if (!B || !V) return;
  Call c = {accepted, token, logits, draft_logits, u_accept, u_sample, draft, count, {temperature, top_p, min_p, top_k}};
  c.B = B, c.K = K, c.V = V, c.R = B * (K + 1) + B * K;
  unsigned threads = THREADS; /* sums are exact: any number does; that of the bins is a multiple of it */
  while (threads > 32 && threads / 2 >= V) threads /= 2;
  const size_t splits = ceil_div(V, c.R < 32 ? 2048 : 8192);
  c.digit = V > 1024 ? 11 : 8, c.splits = splits < MOST_SPLITS ? (unsigned)splits : MOST_SPLITS;
  const size_t of_row = (2 * BINS + GATHERED) * sizeof(Mass) + sizeof(Row) + c.splits * sizeof(Best);
  unsigned char *scratch = (unsigned char *)device_scratch(c.R * of_row + B * (2 * c.splits * sizeof(Mass) + sizeof(unsigned)));
  if (!scratch) return;
  c.bins = (Mass *)scratch, c.gathered = c.bins + c.R * 2 * BINS, c.sums = c.gathered + c.R * GATHERED;
  c.row = (Row *)(c.sums + B * 2 * c.splits), c.best = (Best *)(c.row + c.R), c.done = (unsigned *)(c.best + c.R * c.splits);
  LAUNCH_EARLY(find_best, grid_of(c, c.R), threads, 0, c);
  LAUNCH_EARLY(fill_bins, grid_of(c, c.R), threads, 0, c);
  LAUNCH_EARLY(find_last, grid_of(c, c.R), threads, SELECT_SHARED, c);
  if (K) LAUNCH_EARLY(add_masses, grid_of(c, c.R), threads, 0, c);
  LAUNCH_EARLY(draw_tokens, grid_of(c, B), threads, 0, c);
}

void sample(int32_t *token, const float *logits, const float *temperature, const int32_t *top_k, const float *top_p,
            const float *min_p, const float *u, size_t B, size_t V) {
  verify(nullptr, token, logits, nullptr, nullptr, nullptr, temperature, top_k, top_p, min_p, nullptr, u, B, 0, V);
}

void uniform(float *u, const int32_t *index, const int32_t *position, const int32_t *use, const int32_t *low, const int32_t *high,
             size_t B) {
  LAUNCH(uniform_values, blocks_for(B, 128), 128, 0, u, index, position, use, low, high, B);
}
