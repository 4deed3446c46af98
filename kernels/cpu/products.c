/* Products on threads. */
#include "native.h"

#include <stdlib.h>

struct product {
    const struct matrix *w;
    const void *given, *x; /* x: as the kernels take them, in `room` where they were converted */
    void *room;
    float *y;
    long rows, pieces;
    void (*run)(const struct product *p, long tile, long last);
};

static void with_floats(const struct product *p, long tile, long last) {
    tier->multiply(p->w, tile, last, p->x, p->w->columns, p->rows, p->y, p->w->tiles * TILE);
}

static void with_bf16(const struct product *p, long tile, long last) {
    tier->multiply_bf16(p->w, tile, last, p->x, p->rows, p->y, p->w->tiles * TILE);
}

static void with_bytes(const struct product *p, long tile, long last) {
    tier->multiply_int8(p->w, tile, last, p->x, p->rows, p->y, p->w->tiles * TILE);
}

static void product_piece(void *work, long index, long thread) {
    const struct product *p = work;
    (void)thread;
    p->run(p, p->w->tiles * index / p->pieces, p->w->tiles * (index + 1) / p->pieces);
}

_Static_assert(sizeof(struct bytes) <= BLOCK * sizeof(float), "room for floats must do for bytes");
#define FEW 4096 /* activations that are converted without memory from the heap */

static void row_as_floats(void *work, long row, long thread) {
    const struct product *p = work;
    const uint16_t *x = (const uint16_t *)p->given + row * p->w->columns;
    uint32_t *to = (uint32_t *)p->room + row * p->w->columns;
    (void)thread;
    for (long i = 0; i < p->w->columns; i++) to[i] = (uint32_t)x[i] << 16;
}

static void row_as_bytes(void *work, long row, long thread) {
    const struct product *p = work;
    const long blocks = p->w->columns / BLOCK;
    (void)thread;
    tier->to_bytes((const float *)p->given + row * p->w->columns, blocks, (struct bytes *)p->room + row * blocks);
}

/* x [rows][columns] -> y float32 [rows][16 tiles]. `activations`: FLOAT32 or BFLOAT16, as which x comes, or INT8: it comes
   as float32 and is rounded (NVFP4 weights alone). Returns 0, or 1 where memory for that cannot be had. */
EXPORT int palaestra_multiply(const struct matrix *w, const void *x, int activations, long rows, float *y, long threads) {
    const long pieces = threads < 2 ? 1 : threads * PIECES < w->tiles ? threads * PIECES : w->tiles;
    const int direct = activations == BFLOAT16 && w->kind == NVFP4 && tier->multiply_bf16;
    struct product p = {w, x, x, NULL, y, rows, pieces, direct ? with_bf16 : activations == INT8 ? with_bytes : with_floats};
    float few[FEW];
    if (activations != FLOAT32 && !direct && rows) {
        p.x = p.room = rows * w->columns <= FEW ? few : malloc(rows * w->columns * sizeof(float));
        if (!p.room) return 1;
        spread(activations == INT8 ? row_as_bytes : row_as_floats, &p, rows, threads);
    }
    spread(product_piece, &p, pieces, threads);
    if (p.room != few) free(p.room);
    return 0;
}
