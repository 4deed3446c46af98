/* y = x W^T for a few rows of x. Weights are read once, and every output is summed in the same order whatever the number
   of rows beside it, so that a row's result owes nothing to its company. */

#define WIDE 256        /* columns of a tile that stay in the cache for many rows */
#define MOST (2 * TILE) /* vectors of sums under way, at most */
#define STEPS_UNIT 256 /* times what `e4m3_steps` makes of the codes of block scales, none of which is negative */
#define UNPACKED 6      /* beside `enum kind`: NVFP4 codes as floats, not yet multiplied by their blocks' scales */

struct unpacked {
    float values[WIDE * TILE], steps[WIDE / BLOCK * TILE];
};

/* The sums of `rows` rows over the columns from `from` to `to` of the tiles from `tile` to `last`. */
struct pass {
    const struct matrix *w;
    const struct unpacked *ready;
    const float *x;
    float *y;
    long stride, y_stride, rows, tile, last, from, to;
};

/* Where vector `at` of the tiles side by side starts, in an array that has `size` entries a tile. */
INLINE long place(const struct pass *p, int at, long size) {
    return (p->tile + at / PARTS) * size + at % PARTS * LANES;
}

INLINE vec weight(const struct pass *p, const int kind, int at, long column) {
    if (kind == UNPACKED) return load(p->ready->values + (column - p->from) * TILE + at * LANES);
    long from = place(p, at, p->w->columns * TILE) + column * TILE;
    if (kind == FLOAT32) return load((const float *)p->w->data + from);
    if (kind == BFLOAT16) return bfloat16((const uint16_t *)p->w->data + from);
    return e4m3((const uint8_t *)p->w->data + from);
}

INLINE vec step(const struct pass *p, const int kind, int at, long block) { /* of the block that starts at that column */
    if (kind == UNPACKED) return load(p->ready->steps + (block - p->from) + at * LANES);
    return e4m3_steps(p->w->scales + place(p, at, p->w->columns) + block);
}

/* A block's words, two lines of the cache, well before their turn. */
#define BLOCKS_AHEAD 32
INLINE void prefetch(const uint32_t *words) {
    __builtin_prefetch(words + BLOCKS_AHEAD * 2 * TILE);
    __builtin_prefetch(words + BLOCKS_AHEAD * 2 * TILE + TILE);
}

INLINE nibbles codes(const struct pass *p, int at, long column) {
    const uint32_t *words = (const uint32_t *)p->w->data + place(p, at, p->w->columns * 2) + column * 2;
    __builtin_prefetch(words + 1024);
    return codes_load(words);
}

#define NIBBLE(column) (((column) & 1) * 4 + ((column) >> 1)) /* the place of one of eight columns in its word */

/* Adds one column's products. */
INLINE void spread_over(const struct pass *p, const vec *values, vec *total, long column, const int rows, const int wide) {
    for (int row = 0; row < rows; row++) {
        vec x = splat(p->x[row * p->stride + column]);
        for (int at = 0; at < wide; at++) total[row * wide + at] += values[at] * x;
    }
}

/* Each of these adds to `total` [rows][wide]. `kind`, `rows` and `wide` are constants where they are inlined, so that
   the sums are registers. */
INLINE void dense(const struct pass *p, vec *total, const int kind, const int rows, const int wide) {
    for (long column = p->from; column < p->to; column++) {
        vec values[MOST];
        for (int at = 0; at < wide; at++) values[at] = weight(p, kind, at, column);
        spread_over(p, values, total, column, rows, wide);
    }
}

INLINE void blocks(const struct pass *p, vec *total, const int kind, const int rows, const int wide) {
    for (long block = p->from; block < p->to; block += BLOCK) {
        vec part[MOST] = {0};
#pragma GCC unroll 2
        for (long eight = block; eight < block + BLOCK; eight += 8) {
            nibbles words[MOST];
            if (kind == NVFP4)
                for (int at = 0; at < wide; at++) words[at] = codes(p, at, eight);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                vec values[MOST];
                for (int at = 0; at < wide; at++) {
                    values[at] = kind == NVFP4 ? codes_at(words[at], NIBBLE(i)) : weight(p, kind, at, eight + i);
                    if (rows == 1) part[at] += values[at] * p->x[eight + i]; /* at once: it needs fewer registers */
                }
                if (rows > 1) spread_over(p, values, part, eight + i, rows, wide);
            }
        }
        for (int at = 0; at < wide; at++) {
            vec scale = step(p, kind, at, block);
            for (int row = 0; row < rows; row++) total[row * wide + at] += part[row * wide + at] * scale;
        }
    }
}

INLINE void outputs(const struct pass *p, const int kind, const int rows, const int wide) {
    const int blocked = kind == NVFP4 || kind == UNPACKED;
    const float scale = p->to < p->w->columns ? 1 : p->w->scale * (blocked ? CODES_UNIT * STEPS_UNIT : 1);
    vec total[MOST];
    for (int at = 0; at < rows * wide; at++)
        total[at] = p->from ? load(p->y + at / wide * p->y_stride + place(p, at % wide, TILE)) : (vec){0};
    if (blocked) blocks(p, total, kind, rows, wide);
    else dense(p, total, kind, rows, wide);
    for (int at = 0; at < rows * wide; at++)
        store(p->y + at / wide * p->y_stride + place(p, at % wide, TILE), total[at] * scale);
}

/* Few rows: several tiles side by side, so that enough sums are under way. */
INLINE void tiles(struct pass p, const int kind, const int rows) {
    const int chains = kind == NVFP4 ? CODE_CHAINS : CHAINS;
    const int side = chains / (rows * PARTS) > 1 ? chains / (rows * PARTS) : 1;
    for (; p.tile + side <= p.last; p.tile += side) outputs(&p, kind, rows, side * PARTS);
    if (side > 1)
        for (; p.tile < p.last; p.tile++) outputs(&p, kind, rows, PARTS);
}

#define EXACTLY(n)                                                                                                       \
    case n:                                                                                                              \
        if (n <= ROWS) tiles(p, kind, n);                                                                                \
        break;

INLINE void counted(struct pass p, const int kind) {
    switch (p.rows) {
    EXACTLY(1) EXACTLY(2) EXACTLY(3) EXACTLY(4) EXACTLY(5) EXACTLY(6)
    EXACTLY(7) EXACTLY(8) EXACTLY(9) EXACTLY(10) EXACTLY(11) EXACTLY(12)
    }
}

static void few(struct pass p) {
    if (p.ready && p.w->kind == NVFP4) counted(p, UNPACKED);
    else if (p.w->kind == NVFP4) counted(p, NVFP4);
    else if (p.w->kind == FLOAT32) counted(p, FLOAT32);
    else if (p.w->kind == BFLOAT16) counted(p, BFLOAT16);
    else counted(p, FP8);
}

/* The pass's columns of its first tile. */
static void unpack(const struct pass *p, struct unpacked *to) {
    for (long block = p->from; block < p->to; block += BLOCK)
        for (int at = 0; at < PARTS; at++) {
            store(to->steps + (block - p->from) + at * LANES, step(p, NVFP4, at, block));
#pragma GCC unroll 2
            for (long eight = block; eight < block + BLOCK; eight += 8) {
                nibbles words = codes(p, at, eight);
                float *values = to->values + (eight - p->from) * TILE + at * LANES;
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) store(values + i * TILE, codes_at(words, NIBBLE(i)));
            }
        }
}

/* More rows than one pass takes, in passes of at most `most`, over a part of a tile that stays in the cache for all of them;
   `room`: where its codes become floats before. */
static void many(struct pass p, long most, struct unpacked *room) {
    const long rows = p.rows, times = (rows + most - 1) / most, columns = p.w->columns, last = p.last;
    const long wide = p.w->kind == NVFP4 && !room ? columns : WIDE;
    for (; p.tile < last; p.tile++)
        for (p.from = 0; p.from < columns; p.from = p.to) {
            p.to = p.from + wide < columns ? p.from + wide : columns;
            p.last = p.tile + 1;
            p.ready = room;
            if (room) unpack(&p, room);
            for (long time = 0; time < times; time++) {
                struct pass part = p;
                const long row = rows * time / times;
                part.rows = rows * (time + 1) / times - row;
                part.x += row * p.stride;
                part.y += row * p.y_stride;
                few(part);
            }
        }
}

/* float32 x [rows][columns] -> y [rows][16 tiles], the tiles from `tile` to `last` of it; rows of x lie `stride` floats
   apart, those of y `y_stride`. */
static void multiply(const struct matrix *w, long tile, long last, const float *x, long stride, long rows, float *y,
                     long y_stride) {
    struct pass p = {w, NULL, x, y, stride, y_stride, rows, tile, last, 0, w->columns};
    struct unpacked room;
    const int unpacks = w->kind == NVFP4 && UNPACK && rows > CODE_ROWS;
    const long most = w->kind == NVFP4 && !unpacks ? CODE_ROWS : ROWS;
    if (rows > most || unpacks) many(p, most, unpacks ? &room : NULL);
    else if (rows) few(p);
}
