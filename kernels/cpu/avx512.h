/* What both tiers of AVX-512 have: vectors of sixteen floats, and thirty-two registers of them. BF16: the tier that also
   has products of bytes and of bf16. */
#define LANES 16
#define ROWS 12       /* rows of x that one pass takes */
#define CHAINS 12     /* vectors of sums that keep it busy */
#define CODE_ROWS 8  /* the same for NVFP4, whose codes are unpacked on the way */
#define UNPACK 0     /* whether it pays to unpack them before where there are more rows */
#define CODE_CHAINS 1
#define INT8_ROWS 8  /* the same for activations as bytes */
#define INT8_TILES 2 /* tiles side by side there */

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

typedef __m512i nibbles;

#include "vectors.h"

INLINE nibbles codes_load(const uint32_t *words) { return _mm512_loadu_si512(words); }

INLINE vec codes_at(nibbles words, int at) { /* a permutation looks at the lowest four bits alone */
    const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    return (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * at), table);
}
#define CODES_UNIT 1.f

/* Lane by lane `from` plus the dot product of 16 bytes with twice the values of 16 codes, plus the offset. */
#define CODES_OFFSET 12
INLINE ivec block_dot(const uint32_t *words, const int8_t *x, int32_t from) {
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#if BF16
    __m512i total = _mm512_set1_epi32(from);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) { /* a permutation of bytes looks at six bits, and the table is there four times */
        const __m512i found = _mm512_loadu_si512(words + half * TILE);
        __m512i even = _mm512_permutexvar_epi8(found, table);
        __m512i odd = _mm512_permutexvar_epi8(_mm512_srli_epi32(found, 4), table);
        total = _mm512_dpbusd_epi32(total, even, _mm512_set1_epi32(four_of(x + 8 * half)));
        total = _mm512_dpbusd_epi32(total, odd, _mm512_set1_epi32(four_of(x + 8 * half + 4)));
    }
    return (ivec)total;
#else
    const __m512i low = _mm512_set1_epi8(15);
    __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i found = _mm512_loadu_si512(words + half * TILE);
        __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(found, low));
        __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(found, 4), low));
        total = _mm512_add_epi16(total, _mm512_maddubs_epi16(even, _mm512_set1_epi32(four_of(x + 8 * half))));
        total = _mm512_add_epi16(total, _mm512_maddubs_epi16(odd, _mm512_set1_epi32(four_of(x + 8 * half + 4))));
    }
    return (ivec)_mm512_add_epi32(_mm512_madd_epi16(total, _mm512_set1_epi16(1)), _mm512_set1_epi32(from));
#endif
}

INLINE vec e4m3(const uint8_t *codes) { /* as half-precision numbers with another exponent bias */
    __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(wide, 7), 15);
    __m256i half = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7), sign);
    return (vec)_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
}

INLINE vec e4m3_steps(const uint8_t *codes) {
    return (vec)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes)), 7));
}

INLINE vec bfloat16(const uint16_t *values) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values)), 16);
}

/* Sixteen codes, a lane each <-> eight bytes, the even lane in the low nibble. */
INLINE void codes_store(ivec codes, uint8_t *to) {
    __m512i pairs = _mm512_or_si512((__m512i)codes, _mm512_srli_epi64((__m512i)codes, 28));
    _mm_storel_epi64((__m128i *)to, _mm512_cvtepi64_epi8(pairs));
}

INLINE vec codes_values(const uint8_t *bytes) {
    __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)bytes));
    return codes_at(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), 0);
}

INLINE vec float16(const uint16_t *values) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)values)); }

/* What does not fit is cut off; beyond the largest: the largest. */
INLINE void store_float16(uint16_t *to, vec values) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
}
