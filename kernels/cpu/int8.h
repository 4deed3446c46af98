/* y = x W^T for NVFP4 weights and activations that are rounded to int8, a scale a block: products of bytes, several times
   as many an instruction as of floats. For weights that come from memory, whose way is then all that counts. */

/* The columns in the order in which `block_dot` meets them. */
static const int ORDER[BLOCK] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};

/* Blocks of 16 floats -> bytes: scale amax / 127, to nearest. */
static void to_bytes(const float *x, long blocks, struct bytes *to) {
    for (long block = 0; block < blocks; block++, x += BLOCK, to++) {
        float most = 0;
        int32_t total = 0;
        for (int i = 0; i < BLOCK; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        const float inverse = most > 0 ? 127 / most : 0;
        for (int i = 0; i < BLOCK; i++) total += to->values[i] = (int8_t)lrintf(x[ORDER[i]] * inverse);
        to->offset = -CODES_OFFSET * total;
        to->scale = most / 127;
    }
}

INLINE void int8_outputs(const struct pass *p, const struct bytes *x, const int rows, const int wide) {
    const long columns = p->w->columns, blocks = columns / BLOCK;
    vec total[MOST] = {0};
    for (long block = 0; block < blocks; block++)
        for (int at = 0; at < wide; at++) {
            const uint32_t *words = (const uint32_t *)p->w->data + place(p, at, columns * 2) + block * 2 * TILE;
            __builtin_prefetch(words + 1024);
            const vec scale = step(p, NVFP4, at, block * BLOCK);
            for (int row = 0; row < rows; row++) {
                const struct bytes *of = x + row * blocks + block;
                vec dots = __builtin_convertvector(block_dot(words, of->values) + of->offset, vec);
                total[row * wide + at] += dots * (scale * of->scale);
            }
        }
    for (int at = 0; at < rows * wide; at++)
        store(p->y + at / wide * p->y_stride + place(p, at % wide, TILE), total[at] * (p->w->scale * .5f));
}

#define INT8_ROWS 4

/* As `multiply`, for rows of x as bytes. */
static void multiply_int8(const struct matrix *w, long tile, long last, const struct bytes *bytes, long rows, float *y,
                          long y_stride) {
    const long blocks = w->columns / BLOCK;
    for (; tile < last; tile++)
        for (long row = 0; row < rows;) {
            const struct bytes *x = bytes + row * blocks;
            struct pass p = {w, NULL, NULL, y + row * y_stride, 0, y_stride, 0, tile, last, 0, w->columns};
            if (rows - row >= INT8_ROWS) {
                int8_outputs(&p, x, INT8_ROWS, PARTS);
                row += INT8_ROWS;
            } else if (rows - row >= 2) {
                int8_outputs(&p, x, 2, PARTS);
                row += 2;
            } else {
                int8_outputs(&p, x, 1, PARTS);
                row += 1;
            }
        }
}
