/* philox.h - Philox4x32-10 (Salmon et al. 2011): random words as a pure function of a counter and a seed. */
#ifndef MIL_PHILOX_H
#define MIL_PHILOX_H
#include <stdint.h>

/* out (4) = ten rounds over counter (4), key = seed (low, high). out may be counter. */
static inline void philox(uint32_t out[4], const uint32_t counter[4], uint64_t seed) {
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
#endif
