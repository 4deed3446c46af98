/* y = x W^T for NVFP4 weights and activations that are rounded to int8, several blocks of them under one scale: products of
   bytes, several times as many an instruction as of floats. For weights that come from memory, whose way is then all that
   counts. */

typedef int8_t sixteen __attribute__((vector_size(BLOCK)));

/* A block's columns in the order in which `block_dot` meets them. */
INLINE sixteen ordered(sixteen x) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(x, x, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
#else
    return __builtin_shuffle(x, (sixteen){0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15});
#endif
}

#define BLOCKS_A_SCALE 4 /* blocks under one scale */
#define INT8_NEAR (1 << 20) /* codes of a weight that is likely to lie in the cache */
#define INT8_SUMS (PARTS * (INT8_ROWS > INT8_TILES ? INT8_ROWS : INT8_TILES)) /* vectors under way, at most */
#define SMALLEST 1e-36f /* 127 divided by less than that is no number */

/* The largest magnitude of `count` numbers, NaN being larger than all others. */
INLINE float largest_of(const float *x, long count) {
    int32_t most = 0;
    float found;
    for (long i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
    }
    memcpy(&found, &most, sizeof found);
    return found;
}

/* Floats -> bytes: a scale amax / 127 a group, to nearest. Where a value is no number, neither is the scale. */
static void to_bytes(const float *x, long blocks, struct bytes *to) {
    for (long first = 0; first < blocks; first += BLOCKS_A_SCALE) {
        const long last = first + BLOCKS_A_SCALE < blocks ? first + BLOCKS_A_SCALE : blocks;
        const float most = largest_of(x + first * BLOCK, (last - first) * BLOCK);
        const float inverse = most >= SMALLEST && most < INFINITY ? 127 / most : 0;
        for (long block = first; block < last; block++) {
            int32_t rounded[BLOCK] = {0}, total = 0;
            sixteen found;
            if (inverse > 0)
                for (int i = 0; i < BLOCK; i++) rounded[i] = (int32_t)rintf(x[block * BLOCK + i] * inverse);
            for (int i = 0; i < BLOCK; i++) total += rounded[i];
            for (int i = 0; i < BLOCK; i++) found[i] = (int8_t)rounded[i];
            found = ordered(found);
            memcpy(to[block].values, &found, sizeof found);
            to[block].offset = -CODES_OFFSET * total;
            to[block].scale = most < INFINITY ? most / 127 : NAN;
        }
    }
}

/* One block's sums, added to `part` [rows][wide]. */
INLINE void int8_block(const struct pass *p, const struct bytes *x, const int rows, const int wide, long block, vec *part) {
    const long columns = p->w->columns, blocks = columns / BLOCK;
    for (int at = 0; at < wide; at++) {
        const uint32_t *words = (const uint32_t *)p->w->data + place(p, at, columns * 2) + block * 2 * TILE;
        prefetch(words + (block + BLOCKS_AHEAD < blocks ? 0 : (wide / PARTS - 1) * columns * 2));
        const vec scale = step(p, NVFP4, at, block * BLOCK);
        for (int row = 0; row < rows; row++) {
            const struct bytes *of = x + row * blocks + block;
            vec dots = __builtin_convertvector(block_dot(words, of->values, of->offset), vec);
            part[row * wide + at] += dots * scale;
        }
    }
}

/* The sums of `rows` rows with `wide` vectors side by side, constants where this is inlined. */
INLINE void int8_outputs(const struct pass *p, const struct bytes *x, const int rows, const int wide) {
    const long columns = p->w->columns, blocks = columns / BLOCK;
    vec total[INT8_SUMS] = {0};
    for (long first = 0; first < blocks; first += BLOCKS_A_SCALE) {
        vec part[INT8_SUMS] = {0};
        if (first + BLOCKS_A_SCALE <= blocks) {
#pragma GCC unroll 4
            for (long block = first; block < first + BLOCKS_A_SCALE; block++) int8_block(p, x, rows, wide, block, part);
        } else
            for (long block = first; block < blocks; block++) int8_block(p, x, rows, wide, block, part);
        for (int at = 0; at < rows * wide; at++) total[at] += part[at] * x[at / wide * blocks + first].scale;
    }
    for (int at = 0; at < rows * wide; at++)
        store(p->y + at / wide * p->y_stride + place(p, at % wide, TILE), total[at] * (p->w->scale * STEPS_UNIT * .5f));
}

#define INT8_EXACTLY(n)                                                                                                  \
    case n:                                                                                                              \
        if (n <= INT8_ROWS) int8_outputs(&p, x, n, PARTS);                                                               \
        break;

/* As `multiply`, for rows of x as bytes. With many rows a tile stays in the cache for all of them. */
static void multiply_int8(const struct matrix *w, long tile, long last, const struct bytes *bytes, long rows, float *y,
                          long y_stride) {
    const long blocks = w->columns / BLOCK, times = (rows + INT8_ROWS - 1) / INT8_ROWS;
    if (rows == 1 && (long)w->tiles * TILE * w->columns <= INT8_NEAR)
        for (; tile + INT8_TILES <= last; tile += INT8_TILES) {
            struct pass p = {.w = w, .y = y, .tile = tile};
            int8_outputs(&p, bytes, 1, INT8_TILES * PARTS);
        }
    for (; tile < last; tile++)
        for (long time = 0; time < times; time++) {
            const long row = rows * time / times;
            const struct bytes *x = bytes + row * blocks;
            struct pass p = {.w = w, .y = y + row * y_stride, .y_stride = y_stride, .tile = tile};
            switch (rows * (time + 1) / times - row) {
            INT8_EXACTLY(1) INT8_EXACTLY(2) INT8_EXACTLY(3) INT8_EXACTLY(4)
            INT8_EXACTLY(5) INT8_EXACTLY(6) INT8_EXACTLY(7) INT8_EXACTLY(8)
            }
        }
}
