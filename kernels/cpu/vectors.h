/* Arithmetic on vectors of LANES floats, in what every tier's compiler offers. */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define PARTS (TILE / LANES) /* vectors to a tile's rows */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE vec load(const float *from) {
    vec found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE void store(float *to, vec values) { memcpy(to, &values, sizeof values); }

INLINE int32_t four_of(const int8_t *bytes) {
    int32_t found;
    memcpy(&found, bytes, sizeof found);
    return found;
}

INLINE vec splat(float value) { return value - (vec){0}; }

INLINE vec where(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

INLINE vec larger(vec a, vec b) { return where(a > b, a, b); }

/* e^x to about an ulp: 2^n times a polynomial of the rest, n the nearest whole number to x / ln 2. */
INLINE vec exponential(vec x) {
    const vec magic = splat(12582912.f); /* 1.5 2^23: adding it rounds */
    x = where(x < splat(-87.f), splat(-87.f), where(x > splat(88.f), splat(88.f), x));
    vec moved = x * 1.44269504088896341f + magic, n = moved - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + .5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    return p * (vec)(((ivec)moved - (ivec)magic + 127) << 23);
}

INLINE vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

/* Lane i: the sum of the lanes of rows[i]. */
INLINE vec sums(const vec *rows) {
    vec at[LANES];
    for (int i = 0; i < LANES; i++) at[i] = rows[i];
#if LANES == 16
    for (int i = 0; i < 8; i++)
        at[i] = SHUFFLE(at[i], at[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
            + SHUFFLE(at[i], at[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        at[i] = SHUFFLE(at[i], at[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
            + SHUFFLE(at[i], at[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        at[i] = SHUFFLE(at[i], at[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
            + SHUFFLE(at[i], at[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(at[0], at[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
        + SHUFFLE(at[0], at[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif LANES == 8
    for (int i = 0; i < 4; i++)
        at[i] = SHUFFLE(at[i], at[i + 4], 0, 1, 2, 3, 8, 9, 10, 11)
            + SHUFFLE(at[i], at[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; i++)
        at[i] = SHUFFLE(at[i], at[i + 2], 0, 1, 8, 9, 4, 5, 12, 13)
            + SHUFFLE(at[i], at[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(at[0], at[1], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(at[0], at[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
    for (int i = 0; i < 2; i++)
        at[i] = SHUFFLE(at[i], at[i + 2], 0, 1, 4, 5) + SHUFFLE(at[i], at[i + 2], 2, 3, 6, 7);
    return SHUFFLE(at[0], at[1], 0, 4, 2, 6) + SHUFFLE(at[0], at[1], 1, 5, 3, 7);
#endif
}

INLINE float sum(vec values) {
    float found = 0;
    for (int lane = 0; lane < LANES; lane++) found += values[lane];
    return found;
}
