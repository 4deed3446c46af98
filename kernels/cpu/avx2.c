/* AVX2 with FMA and F16C: vectors of eight floats. */
#include "records.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define LANES 8
#define ROWS 5       /* rows of x that one pass takes */
#define CHAINS 12     /* vectors of sums that keep it busy */
#define CODE_ROWS 2  /* the same for NVFP4, whose codes are unpacked on the way */
#define UNPACK 1     /* whether it pays to unpack them before where there are more rows */
#define CODE_CHAINS 4
#define INT8_ROWS 4  /* the same for activations as bytes */
#define INT8_TILES 1 /* tiles side by side there */

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));

/* Twice the values of eight codes a lane, a byte each: those of the even nibbles, those of the odd ones. */
typedef struct {
    __m256i even, odd;
} nibbles;

#include "vectors.h"

INLINE nibbles codes_load(const uint32_t *words) {
    const __m256i low = _mm256_set1_epi8(15), found = _mm256_loadu_si256((const __m256i *)words);
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    nibbles split = {_mm256_shuffle_epi8(table, _mm256_and_si256(found, low)),
                     _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(found, 4), low))};
    return split;
}

INLINE vec codes_at(nibbles words, int at) { /* a byte at the top of a lane: 2^24 times its value */
    __m256i bytes = _mm256_slli_epi32(at & 1 ? words.odd : words.even, 24 - 8 * (at >> 1));
    return (vec)_mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(-(1 << 24))));
}
#define CODES_UNIT 0x1p-25f

/* Lane by lane `from` plus the dot product of 16 bytes with twice the values of 16 codes, plus the offset. */
#define CODES_OFFSET 12
INLINE ivec block_dot(const uint32_t *words, const int8_t *x, int32_t from) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m256i found = _mm256_loadu_si256((const __m256i *)(words + half * TILE));
        __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(found, low));
        __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(found, 4), low));
        total = _mm256_add_epi16(total, _mm256_maddubs_epi16(even, _mm256_set1_epi32(four_of(x + 8 * half))));
        total = _mm256_add_epi16(total, _mm256_maddubs_epi16(odd, _mm256_set1_epi32(four_of(x + 8 * half + 4))));
    }
    return (ivec)_mm256_add_epi32(_mm256_madd_epi16(total, _mm256_set1_epi16(1)), _mm256_set1_epi32(from));
}

INLINE vec e4m3(const uint8_t *codes) { /* as half-precision numbers with another exponent bias */
    __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)codes));
    __m128i sign = _mm_slli_epi16(_mm_srli_epi16(wide, 7), 15);
    __m128i half = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7), sign);
    return (vec)_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256));
}

INLINE vec e4m3_steps(const uint8_t *codes) {
    return (vec)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)codes)), 7));
}

INLINE vec bfloat16(const uint16_t *values) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)values)), 16);
}

/* Eight codes, a lane each <-> four bytes, the even lane in the low nibble. */
INLINE void codes_store(ivec codes, uint8_t *to) {
    __m256i pairs = _mm256_or_si256((__m256i)codes, _mm256_srli_epi64((__m256i)codes, 28));
    __m256i halves = _mm256_shuffle_epi8(pairs, _mm256_set1_epi64x(0x0800)); /* the bytes 0 and 8, at the bottom */
    __m128i four = _mm_unpacklo_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    memcpy(to, &four, 4);
}

INLINE vec codes_values(const uint8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    __m256i codes = _mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 28));
    __m256i signs = _mm256_slli_epi32(_mm256_srli_epi32(codes, 3), 31);
    __m256 magnitudes = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6), codes); /* the low 3 bits */
    return (vec)_mm256_or_ps(magnitudes, _mm256_castsi256_ps(signs));
}

INLINE vec float16(const uint16_t *values) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)values)); }

/* What does not fit is cut off; beyond the largest: the largest. */
INLINE void store_float16(uint16_t *to, vec values) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
}

#include "operations.h"

const struct operations avx2 = {"avx2", OPERATIONS, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
