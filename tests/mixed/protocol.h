/*
 * What the ranks of a mixed job do, whatever language they are written in: tests/src/bin/rank/mixed.rs says the same in Rust.
 *
 * 1. A small and a long message to the right neighbour, the same from the left one.
 * 2. A split by even and odd rank, in reverse order, and a barrier in each half.
 * 3. Exchanges in f32, then in bf16: values are small integers, so that every sum is exact.
 * 4. A barrier. The rank that DIES names is killed instead, once the others have said, in a message, that they have come so far.
 */
#ifndef PROTOCOL_H
#define PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

enum { THROUGH = 7 /* the tag of that message */, SMALL = 33, LONG = 300000, HIDDEN = 96, TOPK = 2, EXPERTS = 8, MAX_TOKENS = 8, ROUNDS = 4 };

static inline unsigned char byte_of(int rank, size_t i) { return (unsigned char)(rank * 61 + (int)(i % 253)); }
static inline size_t tokens_of(int rank, int round) { return (size_t)((rank * 3 + round) % (MAX_TOKENS + 1)); }
static inline int id_of(int rank, int round, size_t t, int k) { return (int)((rank + round + (int)t * 3 + k * 5) % EXPERTS); }
static inline float weight_of(int k) { return (float)(k + 1); }
static inline float value_of(int rank, int round, size_t t, size_t c) {
  return (float)((rank + round + (int)t + (int)c) % 4);
}
/* Expert e multiplies by e + 1. */
static inline float sum_of(int rank, int round, size_t t, size_t c) {
  float sum = 0;
  int k;
  for (k = 0; k < TOPK; k++) sum += weight_of(k) * (float)(id_of(rank, round, t, k) + 1) * value_of(rank, round, t, c);
  return sum;
}
/* The experts lie in blocks: with EXPERTS a multiple of the ranks, EXPERTS / ranks on each. */

/* bf16 is the upper half of an f32; the values here need no rounding. */
static inline uint16_t to_bf16(float x) {
  union { float f; uint32_t u; } bits;
  bits.f = x;
  return (uint16_t)(bits.u >> 16);
}
static inline float from_bf16(uint16_t x) {
  union { uint32_t u; float f; } bits;
  bits.u = (uint32_t)x << 16;
  return bits.f;
}

#endif
