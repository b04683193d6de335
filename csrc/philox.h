/* philox.h - Philox4x32-10 (Salmon et al. 2011): random words as a pure function of a counter and a seed; and the values that
 * start fresh, drawn from them. Host and device. */
#ifndef MIL_PHILOX_H
#define MIL_PHILOX_H
#include "ops.h"

/* out (4) = ten rounds over counter (4), key = seed (low, high). out may be counter. */
HD void philox(uint32_t out[4], const uint32_t counter[4], uint64_t seed) {
  uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3];
  uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t x = (uint64_t)0xd2511f53u * a, y = (uint64_t)0xcd9e8d57u * c;
    a = (uint32_t)(y >> 32) ^ b ^ low;
    b = (uint32_t)y;
    c = (uint32_t)(x >> 32) ^ d ^ high;
    d = (uint32_t)x;
    low += 0x9e3779b9u, high += 0xbb67ae85u;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

/* x in bf16, one of the two around it, at random so that x is the mean; `random` 16 bits. NaN stays NaN. */
HD uint16_t round_at_random(float x, uint32_t random) {
  const uint32_t u = float_to_bits(x);
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + random) >> 16);
}
/* adamw (ops.h): the random bits of elements 4 i … 4 i + 3, a word each: m takes the low half, v the high one. */
HD void moment_bits(uint32_t word[4], uint64_t key, size_t i, size_t step) {
  const uint32_t counter[4] = {(uint32_t)i, (uint32_t)(i >> 32), (uint32_t)step, 2};
  philox(word, counter, key);
}

HD double open_unit(uint32_t word) { return (word + 0.5) * 0x1p-32; } /* (0,1) */

HD double fresh_draw(int how, double a, double b, const uint32_t word[4], size_t i) {
  switch (how) {
    case FILL_UNIFORM: return a + (b - a) * open_unit(word[0]);
    case FILL_NORMAL: return a + b * sqrt(-2 * log(open_unit(word[0]))) * cos(6.283185307179586 * open_unit(word[1]));
    case FILL_LOG_UNIFORM: return log(a + (b - a) * open_unit(word[0]));
    case FILL_DT: {
      double dt = exp(log(a) + (log(b) - log(a)) * open_unit(word[0]));
      dt = dt > 1e-4 ? dt : 1e-4;
      return dt + log(-expm1(-dt));
    }
    case FILL_LOG_INDEX: return log((double)(i % (size_t)b) + 1);
    default: return a;
  }
}

/* Element i of fill (ops.h). */
HD float fresh_value(int how, double a, double b, uint64_t seed, uint32_t stream, size_t i) {
  uint32_t counter[4] = {(uint32_t)i, (uint32_t)(i >> 32), stream, 1}, word[4];
  philox(word, counter, seed);
  return (float)fresh_draw(how, a, b, word, i);
}
#endif
