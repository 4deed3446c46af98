/* Products on threads. */
#include "native.h"

#include <stdlib.h>

static long pieces_of(const struct matrix *w, long threads) {
    return threads < 2 ? 1 : threads * PIECES < w->tiles ? threads * PIECES : w->tiles;
}

struct product {
    const struct matrix *w;
    const float *x;
    float *y;
    long stride, rows, y_stride, pieces;
};

static void product_piece(void *work, long index, long thread) {
    const struct product *p = work;
    (void)thread;
    tier->multiply(p->w, p->w->tiles * index / p->pieces, p->w->tiles * (index + 1) / p->pieces, p->x, p->stride, p->rows,
                   p->y, p->y_stride);
}

/* float32 x [rows][columns] -> y [rows][16 tiles]. */
EXPORT void palaestra_multiply(const struct matrix *w, const float *x, long rows, float *y, long threads) {
    const long pieces = pieces_of(w, threads);
    struct product p = {w, x, y, w->columns, rows, w->tiles * TILE, pieces};
    spread(product_piece, &p, pieces, threads);
}

struct int8_product {
    const struct matrix *w;
    const struct bytes *x;
    float *y;
    long rows, pieces;
};

static void int8_piece(void *work, long index, long thread) {
    const struct int8_product *p = work;
    (void)thread;
    tier->multiply_int8(p->w, p->w->tiles * index / p->pieces, p->w->tiles * (index + 1) / p->pieces, p->x, p->rows, p->y,
                        p->w->tiles * TILE);
}

/* The same for NVFP4 weights, x being rounded to int8 first. Returns 0, or 1 where memory for that cannot be had. */
EXPORT int palaestra_multiply_int8(const struct matrix *w, const float *x, long rows, float *y, long threads) {
    const long blocks = rows * (w->columns / BLOCK), pieces = pieces_of(w, threads);
    struct bytes *room = malloc((blocks ? blocks : 1) * sizeof *room);
    struct int8_product p = {w, room, y, rows, pieces};
    if (!room) return 1;
    tier->to_bytes(x, blocks, room);
    spread(int8_piece, &p, pieces, threads);
    free(room);
    return 0;
}
