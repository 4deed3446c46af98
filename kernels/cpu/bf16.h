/* y = x W^T for NVFP4 weights and bf16 activations, through products of pairs of bf16 that are summed in float32. Every
   output is summed in the same order whatever the number of rows. */

#define BF16_ROWS 8

INLINE __m512bh pairs(__m512i words, int at) { /* columns 2 at and 2 at + 1 of eight; a permutation looks at five bits */
    const __m512i table = (__m512i)_mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, (short)0x8000, (short)0xbf00, (short)0xbf80, (short)0xbfc0,
        (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0));
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * at), table);
}

INLINE __m512bh pair_of(const uint16_t *x) {
    int32_t found;
    memcpy(&found, x, sizeof found);
    return (__m512bh)_mm512_set1_epi32(found);
}

/* The sums of `rows` rows, a constant where this is inlined, with one tile. */
INLINE void bf16_outputs(const struct pass *p, const uint16_t *x, const int rows) {
    const long columns = p->w->columns;
    vec total[BF16_ROWS] = {0};
    for (long block = 0; block < columns; block += BLOCK) {
        const uint32_t *words = (const uint32_t *)p->w->data + place(p, 0, columns * 2) + block * 2;
        __m512 part[BF16_ROWS] = {0};
        prefetch(words);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512i found = _mm512_loadu_si512(words + half * TILE);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512bh values = pairs(found, i);
                for (int row = 0; row < rows; row++)
                    part[row] = _mm512_dpbf16_ps(part[row], values, pair_of(x + row * columns + block + 8 * half + 2 * i));
            }
        }
        const vec scale = step(p, NVFP4, 0, block);
        for (int row = 0; row < rows; row++) total[row] += (vec)part[row] * scale;
    }
    for (int row = 0; row < rows; row++)
        store(p->y + row * p->y_stride + place(p, 0, TILE), total[row] * (p->w->scale * STEPS_UNIT));
}

#define BF16_EXACTLY(n)                                                                                                  \
    case n: bf16_outputs(&p, of, n); break;

/* As `multiply`, for rows of x in bf16. With many rows a tile stays in the cache for all of them. */
static void multiply_bf16(const struct matrix *w, long tile, long last, const uint16_t *x, long rows, float *y,
                          long y_stride) {
    const long times = (rows + BF16_ROWS - 1) / BF16_ROWS;
    for (; tile < last; tile++)
        for (long time = 0; time < times; time++) {
            const long row = rows * time / times;
            const uint16_t *of = x + row * w->columns;
            struct pass p = {.w = w, .y = y + row * y_stride, .y_stride = y_stride, .tile = tile};
            switch (rows * (time + 1) / times - row) {
            BF16_EXACTLY(1) BF16_EXACTLY(2) BF16_EXACTLY(3) BF16_EXACTLY(4)
            BF16_EXACTLY(5) BF16_EXACTLY(6) BF16_EXACTLY(7) BF16_EXACTLY(8)
            }
        }
}
