/* Quantising to NVFP4, and the Hadamard transform, on threads. */
#include "native.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define LEAST 64 /* patches that are worth a thread's while */

static long parts(long whole, long size) { return (whole + size - 1) / size; }

static long pieces_of(long patches, long threads) {
    const long most = patches / LEAST;
    return threads < 2 || most < 2 ? 1 : threads * PIECES < most ? threads * PIECES : most;
}

struct job {
    const struct quantising *q;
    long each, total, pieces; /* patches: of each matrix, of all */
};

static void raise_to(int32_t *amax, int32_t found) {
    _Atomic int32_t *shared = (_Atomic int32_t *)amax;
    int32_t before = atomic_load(shared);
    while (found > before && !atomic_compare_exchange_weak(shared, &before, found)) {}
}

static void amax_piece(void *work, long index, long thread) {
    const struct job *j = work;
    (void)thread;
    for (long patch = j->total * index / j->pieces; patch < j->total * (index + 1) / j->pieces; patch++)
        raise_to(j->q->amax + patch / j->each, tier->amax(j->q, patch));
}

static void quantize_piece(void *work, long index, long thread) {
    const struct job *j = work;
    (void)thread;
    for (long patch = j->total * index / j->pieces; patch < j->total * (index + 1) / j->pieces; patch++)
        tier->quantize(j->q, patch, j->q->scale2[patch / j->each]);
}

/* The smallest power of two under which no block scale exceeds `bound`, but 2^-116 at least; 1 for a zero matrix. */
static float global_scale(float most, float bound) {
    int exponent;
    if (most == 0) return 1;
    if (frexpf(fmaxf(most / (6 * bound), 0x1p-116f), &exponent) == .5f) exponent--;
    return ldexpf(1, exponent < -116 ? -116 : exponent);
}

/* The global scales, where they are not given, and whether the values can be held. */
static enum refusal settle(const struct quantising *q) {
    for (long i = 0; i < q->matrices; i++) {
        float most;
        memcpy(&most, q->amax + i, sizeof most);
        if (!isfinite(most)) return NOT_FINITE;
        if (q->bound > 0) q->scale2[i] = global_scale(most, q->bound);
        if (q->bound <= 0 && most > 6 * 448 * q->scale2[i] * (1 + 0x1p-20f)) return NO_FIT; /* nvfp4.py: ROUNDED */
    }
    return NONE;
}

/* Returns what was refused, if anything. */
EXPORT int palaestra_quantize(const struct quantising *q, long threads) {
    const long each = q->square ? q->rows / BLOCK * parts(q->columns, PATCH) : parts(q->rows * q->columns, PATCH);
    struct job j = {q, each, q->matrices * each, pieces_of(q->matrices * each, threads)};
    spread(amax_piece, &j, j.pieces, threads);
    const enum refusal refused = settle(q);
    if (refused == NONE) spread(quantize_piece, &j, j.pieces, threads);
    return refused;
}

struct reading {
    const uint8_t *codes, *scales;
    const float *scale2;
    float *values;
    long blocks, each, total, pieces; /* blocks of a matrix; patches of each, of all */
};

static void dequantize_piece(void *work, long index, long thread) {
    const struct reading *r = work;
    (void)thread;
    for (long patch = r->total * index / r->pieces; patch < r->total * (index + 1) / r->pieces; patch++) {
        const long matrix = patch / r->each, first = patch % r->each * (PATCH / BLOCK);
        const long at = matrix * r->blocks + first, left = r->blocks - first;
        tier->dequantize(r->codes + at * BLOCK / 2, r->scales + at, r->scale2[matrix],
                         left < PATCH / BLOCK ? left : PATCH / BLOCK, r->values + at * BLOCK);
    }
}

/* Matrices of so many blocks each: codes, E4M3 scales and global scales -> values. */
EXPORT void palaestra_dequantize(const uint8_t *codes, const uint8_t *scales, const float *scale2, long matrices,
                                 long blocks, float *values, long threads) {
    const long each = parts(blocks, PATCH / BLOCK), total = matrices * each;
    struct reading r = {codes, scales, scale2, values, blocks, each, total, pieces_of(total, threads)};
    spread(dequantize_piece, &r, r.pieces, threads);
}

struct turning {
    const struct rotation *rotation;
    const float *x;
    float *y;
    long count, pieces;
};

static void transform_piece(void *work, long index, long thread) {
    const struct turning *t = work;
    const long patches = parts(t->count, PATCH), from = patches * index / t->pieces * PATCH;
    const long to = patches * (index + 1) / t->pieces * PATCH;
    (void)thread;
    tier->transform(t->rotation, t->x + from, t->y + from, (to < t->count ? to : t->count) - from);
}

/* x [count] -> y [count], the count a multiple of the size. */
EXPORT void palaestra_transform(const struct rotation *rotation, const float *x, float *y, long count, long threads) {
    struct turning t = {rotation, x, y, count, pieces_of(parts(count, PATCH), threads)};
    spread(transform_piece, &t, t.pieces, threads);
}
