/* Products on threads. */
#include "native.h"

#include <stdlib.h>

struct product {
    const struct matrix *w;
    const void *x;
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

static void *widened(const uint16_t *x, long count) {
    uint32_t *found = malloc((count ? count : 1) * sizeof *found);
    for (long i = 0; found && i < count; i++) found[i] = (uint32_t)x[i] << 16;
    return found;
}

static void *as_bytes(const float *x, long blocks) {
    struct bytes *found = malloc((blocks ? blocks : 1) * sizeof *found);
    if (found) tier->to_bytes(x, blocks, found);
    return found;
}

/* x [rows][columns] -> y float32 [rows][16 tiles]. `activations`: FLOAT32 or BFLOAT16, as which x comes, or INT8: it comes
   as float32 and is rounded (NVFP4 weights alone). Returns 0, or 1 where memory for that cannot be had. */
EXPORT int palaestra_multiply(const struct matrix *w, const void *x, int activations, long rows, float *y, long threads) {
    const long pieces = threads < 2 ? 1 : threads * PIECES < w->tiles ? threads * PIECES : w->tiles;
    const int direct = activations == BFLOAT16 && w->kind == NVFP4 && tier->multiply_bf16;
    struct product p = {w, x, y, rows, pieces, direct ? with_bf16 : activations == INT8 ? with_bytes : with_floats};
    void *room = NULL;
    if (activations != FLOAT32 && !direct) {
        room = activations == INT8 ? as_bytes(x, rows * w->columns / BLOCK) : widened(x, rows * w->columns);
        if (!room) return 1;
        p.x = room;
    }
    spread(product_piece, &p, pieces, threads);
    free(room);
    return 0;
}
