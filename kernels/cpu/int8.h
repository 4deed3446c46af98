/* y = x W^T for NVFP4 weights and activations that are rounded to int8, a scale a block: products of bytes, several times
   as many an instruction as of floats. For weights that come from memory, whose way is then all that counts. */

/* The columns in the order in which `block_dot` meets them. */
static const int ORDER[BLOCK] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};

#define SMALLEST 1e-36f /* 127 divided by less than that is no number */

/* The largest magnitude of a block, NaN being larger than all others. */
INLINE float largest_of(const float *x) {
    int32_t bits[BLOCK], most = 0;
    float found;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < BLOCK; i++) most = (bits[i] & 0x7fffffff) > most ? bits[i] & 0x7fffffff : most;
    memcpy(&found, &most, sizeof found);
    return found;
}

/* Blocks of 16 floats -> bytes: scale amax / 127, to nearest. Where a value is no number, neither is the scale. */
static void to_bytes(const float *x, long blocks, struct bytes *to) {
    for (long block = 0; block < blocks; block++, x += BLOCK, to++) {
        const float most = largest_of(x), inverse = most >= SMALLEST && most < INFINITY ? 127 / most : 0;
        int32_t rounded[BLOCK] = {0}, total = 0;
        if (inverse > 0)
            for (int i = 0; i < BLOCK; i++) total += rounded[i] = (int32_t)rintf(x[i] * inverse);
        for (int i = 0; i < BLOCK; i++) to->values[i] = (int8_t)rounded[ORDER[i]];
        to->offset = -CODES_OFFSET * total;
        to->scale = most < INFINITY ? most / 127 : NAN;
    }
}

/* The sums of `rows` rows, a constant where this is inlined, with one tile. One: a single stream of weights comes faster
   from memory than several side by side. */
INLINE void int8_outputs(const struct pass *p, const struct bytes *x, const int rows) {
    const long columns = p->w->columns, blocks = columns / BLOCK;
    vec total[INT8_ROWS * PARTS] = {0};
    for (long block = 0; block < blocks; block++)
        for (int at = 0; at < PARTS; at++) {
            const uint32_t *words = (const uint32_t *)p->w->data + place(p, at, columns * 2) + block * 2 * TILE;
            prefetch(words);
            const vec scale = step(p, NVFP4, at, block * BLOCK);
            for (int row = 0; row < rows; row++) {
                const struct bytes *of = x + row * blocks + block;
                vec dots = __builtin_convertvector(block_dot(words, of->values, of->offset), vec);
                total[row * PARTS + at] += dots * (scale * of->scale);
            }
        }
    for (int at = 0; at < rows * PARTS; at++)
        store(p->y + at / PARTS * p->y_stride + place(p, at % PARTS, TILE), total[at] * (p->w->scale * STEPS_UNIT * .5f));
}

#define INT8_EXACTLY(n)                                                                                                  \
    case n:                                                                                                              \
        if (n <= INT8_ROWS) int8_outputs(&p, x, n);                                                                      \
        break;

/* As `multiply`, for rows of x as bytes. With many rows a tile stays in the cache for all of them. */
static void multiply_int8(const struct matrix *w, long tile, long last, const struct bytes *bytes, long rows, float *y,
                          long y_stride) {
    const long blocks = w->columns / BLOCK, times = (rows + INT8_ROWS - 1) / INT8_ROWS;
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
