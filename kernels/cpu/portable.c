/* Any machine: vectors of four floats, which compilers map to SSE2 or NEON. */
#include "records.h"

#define LANES 4
#define ROWS 2       /* rows of x that one pass takes */
#define CHAINS 8     /* vectors of sums that keep it busy */
#define CODE_ROWS 1  /* the same for NVFP4, whose codes are unpacked on the way */
#define UNPACK 1     /* whether it pays to unpack them before where there are more rows */
#define CODE_CHAINS 4
#define INT8_ROWS 4  /* the same for activations as bytes */
#define INT8_TILES 1 /* tiles side by side there */

typedef float vec __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(16)));

static const float CODES[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

typedef uint32_t nibbles __attribute__((vector_size(16)));

#include "vectors.h"

INLINE nibbles codes_load(const uint32_t *words) {
    nibbles found;
    __builtin_memcpy(&found, words, sizeof found);
    return found;
}

INLINE vec codes_at(nibbles words, int at) {
    vec found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = CODES[words[lane] >> (4 * at) & 15];
    return found;
}
#define CODES_UNIT 1.f

/* Lane by lane `from` plus the dot product of 16 bytes with twice the values of 16 codes. */
#define CODES_OFFSET 0
INLINE ivec block_dot(const uint32_t *words, const int8_t *x, int32_t from) {
    static const int PLACES[BLOCK] = {0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7}; /* of the nibbles, in that order */
    ivec total = from - (ivec){0};
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < BLOCK; i++)
            total[lane] += (int)(2 * CODES[words[i / 8 * TILE + lane] >> (4 * PLACES[i]) & 15]) * x[i];
    return total;
}

INLINE vec e4m3(const uint8_t *codes) { /* the exponents' bias by a multiplication, which subnormals survive */
    ivec bits;
    for (int lane = 0; lane < LANES; lane++) bits[lane] = (codes[lane] & 0x80) << 24 | (codes[lane] & 0x7f) << 20;
    return (vec)bits * 0x1p120f;
}

INLINE vec e4m3_steps(const uint8_t *codes) { return e4m3(codes) * 0x1p-8f; }

INLINE vec bfloat16(const uint16_t *values) {
    ivec bits;
    for (int lane = 0; lane < LANES; lane++) bits[lane] = (int32_t)((uint32_t)values[lane] << 16);
    return (vec)bits;
}

/* Four codes, a lane each <-> two bytes, the even lane in the low nibble. */
INLINE void codes_store(ivec codes, uint8_t *to) {
    for (int lane = 0; lane < LANES; lane += 2) to[lane / 2] = (uint8_t)(codes[lane] | codes[lane + 1] << 4);
}

INLINE vec codes_values(const uint8_t *bytes) {
    vec found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = CODES[bytes[lane / 2] >> (4 * (lane % 2)) & 15];
    return found;
}

INLINE vec float16(const uint16_t *values) { /* the exponents' bias by a multiplication, which subnormals survive */
    ivec bits;
    for (int lane = 0; lane < LANES; lane++)
        bits[lane] = (int32_t)((uint32_t)(values[lane] & 0x8000) << 16 | (uint32_t)(values[lane] & 0x7fff) << 13);
    return (vec)bits * 0x1p112f;
}

/* What does not fit is cut off; beyond the largest: the largest. */
INLINE void store_float16(uint16_t *to, vec values) {
    for (int lane = 0; lane < LANES; lane++) {
        const int32_t bits = ((ivec)values)[lane], size = bits & 0x7fffffff;
        const int32_t normal = ((size < 0x477fe000 ? size : 0x477fe000) >> 13) - (112 << 10);
        const int32_t subnormal = size < 0x38800000 ? (int32_t)(fabsf(values[lane]) * 0x1p24f) : 0;
        const int32_t beyond = size > 0x7f800000 ? 0x7e00 : 0x7c00; /* NaN, infinity */
        to[lane] = (uint16_t)((bits >> 16 & 0x8000) | (size < 0x38800000 ? subnormal : size < 0x7f800000 ? normal : beyond));
    }
}

#include "operations.h"

const struct operations portable = {"portable", OPERATIONS, NULL};
