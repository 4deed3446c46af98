/* Quantising to NVFP4, and the Hadamard transform. A stack of matrices is cut into patches of PATCH columns and one row, or
   sixteen for square blocks; where blocks are not square, a matrix counts as a single long row. Every tier gives the plain
   version's very bits: compilers may fuse a product with a sum, so that no product here meets a sum unless it is exact. */

typedef uint32_t uvec __attribute__((vector_size(sizeof(vec))));

/* The first LANES of sixteen. */
#if LANES == 16
#define FIRST(...) __VA_ARGS__
#elif LANES == 8
#define FIRST(a, b, c, d, e, f, g, h, ...) a, b, c, d, e, f, g, h
#else
#define FIRST(a, b, c, d, ...) a, b, c, d
#endif
#define PICK(a, b, ...) SHUFFLE(a, b, FIRST(__VA_ARGS__))
#define EVEN(a, b) PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

static const ivec PLACES = {FIRST(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};

INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

/* -- reductions: of LANES blocks one after the other, a lane each; neighbours first, as in nvfp4.py */

INLINE vec block_maxima(const float *x) { /* of magnitudes */
    vec at[BLOCK];
    for (int i = 0; i < BLOCK; i++) at[i] = absolute(load(x + i * LANES));
    for (int count = BLOCK / 2; count; count /= 2)
        for (int i = 0; i < count; i++)
            at[i] = larger(EVEN(at[2 * i], at[2 * i + 1]), ODD(at[2 * i], at[2 * i + 1]));
    return at[0];
}

INLINE vec block_sums(vec *at) {
    for (int count = BLOCK / 2; count; count /= 2)
        for (int i = 0; i < count; i++) at[i] = EVEN(at[2 * i], at[2 * i + 1]) + ODD(at[2 * i], at[2 * i + 1]);
    return at[0];
}

/* -- E4M3 scales, as floats and as codes */

/* To nearest, ties to even: adding 1.5 2^23 times the numbers' distance rounds to it. */
INLINE vec to_e4m3(vec scale) {
    scale = where(scale > splat(448), splat(448), larger(scale, splat(0x1p-9f)));
    vec magic = larger((vec)((ivec)scale & 0x7f800000), splat(0x1p-6f)) * (12582912.f / 8);
    return scale + magic - magic;
}

INLINE ivec e4m3_codes(vec scale) {
    ivec small = __builtin_convertvector(scale * 512.f, ivec), normal = ((ivec)scale >> 20) - (120 << 3);
    return (ivec)where(scale < splat(0x1p-6f), (vec)small, (vec)normal);
}

/* The smallest that is not below: the next code is the next number. */
INLINE vec e4m3_above(vec scale) {
    vec nearest = to_e4m3(scale), normal = (vec)((ivec)nearest + (1 << 20)), next;
    scale = where(scale > splat(448), splat(448), scale);
    next = where(nearest < splat(0x1p-6f), nearest + 0x1p-9f, normal);
    return where(nearest < scale, next, nearest);
}

/* -- E2M1 magnitudes */

INLINE vec power_below(vec magnitude) { /* the power of two, 1 at least: half of it is the distance of the numbers */
    return (vec)((ivec)larger(magnitude, splat(1)) & 0x7f800000);
}

INLINE vec at_most_6(vec magnitude) { return where(magnitude > splat(6), splat(6), magnitude); }

INLINE vec to_e2m1(vec magnitude) { /* to nearest, ties to even */
    vec magic = power_below(magnitude) * (12582912.f / 2);
    return at_most_6(magnitude + magic - magic);
}

/* One of the two nearest, the one above where the draw in [0, 1) is below the rest. */
INLINE vec drawn_e2m1(vec magnitude, vec draw) {
    vec power = power_below(magnitude);
    vec steps = magnitude * (vec)((255 << 23) - (ivec)power);
    ivec below = __builtin_convertvector(steps, ivec);
    vec rest = steps - __builtin_convertvector(below, vec);
    return at_most_6(__builtin_convertvector(below - (draw < rest), vec) * (power * .5f));
}

INLINE ivec e2m1_codes(vec magnitude) {
    ivec normal = ((ivec)magnitude >> 22) - 252; /* from 1 */
    return (ivec)where(magnitude < splat(1), (vec)(-(ivec)(magnitude > (vec){0})), (vec)normal);
}

/* -- draws: of a seed and the number of the value, so that threads and tiers make no difference */

INLINE uint64_t mixed(uint64_t x) { /* splitmix64 */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* 24 random bits a lane, as numbers in [0, 1), for the values of a block from that place. */
INLINE vec draws(uint64_t key, int place) {
    uvec x = ((uvec)PLACES + (uint32_t)place) * 0x9e3779b9u + (uint32_t)key;
    x = (x ^ x >> 16) * 0x21f0aaadu ^ (uint32_t)(key >> 32);
    x = (x ^ x >> 15) * 0x735a2d97u;
    return __builtin_convertvector((ivec)((x ^ x >> 15) >> 8), vec) * 0x1p-24f;
}

/* -- the Hadamard transform of blocks of 16 to 128 values: sums and differences of neighbours, of pairs, and so on */

#define BUTTERFLY(v, distance, ...) \
    PICK(v, v, __VA_ARGS__) + (vec)((ivec)(v) ^ (((PLACES & (distance)) != 0) << 31))

INLINE vec within(vec v) {
    v = BUTTERFLY(v, 1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    v = BUTTERFLY(v, 2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#if LANES > 4
    v = BUTTERFLY(v, 4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#endif
#if LANES > 8
    v = BUTTERFLY(v, 8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
    return v;
}

/* The signs come first, or last in the inverse. */
INLINE void transform_block(const float *x, float *y, const float *signs, const int size, int inverse) {
    const float scale = size == 16 ? .25f : size == 32 ? .17677669529663687f : size == 64 ? .125f : .08838834764831845f;
    const int count = size / LANES;
    vec at[128 / LANES];
    for (int i = 0; i < count; i++) {
        vec value = load(x + i * LANES);
        at[i] = within(inverse ? value : value * load(signs + i * LANES));
    }
    for (int distance = 1; distance < count; distance *= 2)
        for (int i = 0; i < count; i++)
            if (!(i & distance)) {
                vec a = at[i], b = at[i + distance];
                at[i] = a + b;
                at[i + distance] = a - b;
            }
    for (int i = 0; i < count; i++)
        store(y + i * LANES, inverse ? at[i] * scale * load(signs + i * LANES) : at[i] * scale);
}

INLINE void transform_sized(const struct rotation *r, const float *x, float *y, long width, const int size) {
    for (long at = 0; at < width; at += size) transform_block(x + at, y + at, r->signs, size, r->inverse);
}

/* x [width] -> y, which may be x; the width a multiple of the size. */
static void transform(const struct rotation *r, const float *x, float *y, long width) {
    if (r->size == 16) transform_sized(r, x, y, width, 16);
    else if (r->size == 32) transform_sized(r, x, y, width, 32);
    else if (r->size == 64) transform_sized(r, x, y, width, 64);
    else transform_sized(r, x, y, width, 128);
}

/* -- quantising */

struct patch {
    const float *x; /* [rows][stride], zeros beyond the last block */
    long stride, blocks, from, row; /* from: the number of its first value in the stack; row: from there to the next row's */
    int rows;
};

INLINE struct patch patch_at(const struct quantising *q, long index, float *room) {
    const int rows = q->square ? BLOCK : 1;
    const long columns = q->square ? q->columns : q->rows * q->columns;
    const long across = (columns + PATCH - 1) / PATCH, column = index % across * PATCH;
    const long width = columns - column < PATCH ? columns - column : PATCH;
    const long from = index / across * rows * columns + column;
    struct patch p = {q->x + from, columns, width / BLOCK, from, columns, rows};
    if (!q->rotation.size && width == PATCH) return p;
    for (int row = 0; row < rows; row++) {
        float *to = room + row * PATCH;
        memcpy(to, p.x + row * columns, width * sizeof(float));
        memset(to + width, 0, (PATCH - width) * sizeof(float));
        if (q->rotation.size) transform(&q->rotation, to, to, width);
    }
    p.x = room;
    p.stride = PATCH;
    return p;
}

INLINE ivec larger_of(ivec a, ivec b) { return (ivec)where(a > b, (vec)a, (vec)b); }

/* The largest magnitude of a patch, as the bits of a float: beyond those of numbers for infinities and NaN. */
static int32_t amax(const struct quantising *q, long index) {
    float room[BLOCK * PATCH];
    const struct patch p = patch_at(q, index, room);
    ivec most[4] = {{0}};
    for (int row = 0; row < p.rows; row++)
        for (long i = 0; i < PATCH; i += 4 * LANES)
            for (int k = 0; k < 4; k++)
                most[k] = larger_of((ivec)absolute(load(p.x + row * p.stride + i + k * LANES)), most[k]);
    most[0] = larger_of(larger_of(most[0], most[1]), larger_of(most[2], most[3]));
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found = most[0][lane] > found ? most[0][lane] : found;
    return found;
}

/* The squared error that the scales leave, of values that are already divided by the global scale. */
INLINE vec squared_error(const vec *scaled, vec scale, const int rows) {
    float steps[LANES];
    vec errors[BLOCK];
    store(steps, scale);
    for (int row = 0; row < rows; row++) {
        vec squares[BLOCK];
        for (int i = 0; i < BLOCK; i++) {
            vec value = scaled[row * BLOCK + i], step = splat(steps[i / PARTS]);
            vec error = to_e2m1(value / step) * step - value; /* that product is exact, fused or not */
            squares[i] = error * error;
        }
        errors[row] = block_sums(squares);
    }
    for (int count = rows / 2; count; count /= 2)
        for (int i = 0; i < count; i++) errors[i] = errors[2 * i] + errors[2 * i + 1];
    return errors[0];
}

/* Of the candidates the scales of the least squared error, the earlier of equals. */
INLINE vec best_scale(const struct quantising *q, const float *x, long stride, vec ideal, float scale2, const int rows) {
    vec scaled[BLOCK * BLOCK], best = to_e4m3(ideal * q->multiples[0]), least;
    if (q->candidates == 1) return best;
    for (int i = 0; i < rows * BLOCK; i++)
        scaled[i] = absolute(load(x + i / BLOCK * stride + i % BLOCK * LANES)) / splat(scale2);
    least = squared_error(scaled, best, rows);
    for (int i = 1; i < q->candidates; i++) {
        vec scale = to_e4m3(ideal * q->multiples[i]), error = squared_error(scaled, scale, rows);
        best = where(error < least, scale, best);
        least = where(error < least, error, least);
    }
    return best;
}

/* One block with its step, the number of its first value being `at`. */
INLINE void round_block(const struct quantising *q, const float *x, float step, long at) {
    const uint64_t key = q->stochastic ? mixed(mixed(q->seed) ^ (uint64_t)(at / BLOCK)) : 0;
    for (int i = 0; i < BLOCK; i += LANES) {
        vec ratio = load(x + i) / splat(step), magnitude = absolute(ratio);
        ivec sign = (ivec)ratio & INT32_MIN;
        vec rounded = q->stochastic ? drawn_e2m1(magnitude, draws(key, i)) : to_e2m1(magnitude);
        if (q->values)
            store(q->values + at + i, (vec)((ivec)rounded | sign) * splat(step));
        else
            codes_store(e2m1_codes(rounded) | (sign >> 28 & 8), q->codes + (at + i) / 2);
    }
}

/* Up to LANES blocks beside each other. */
INLINE void quantize_blocks(const struct quantising *q, const struct patch *p, long block, float scale2, const int rows) {
    const float *x = p->x + block * BLOCK;
    const long count = p->blocks - block < LANES ? p->blocks - block : LANES;
    float steps[LANES];
    int32_t codes[LANES];
    vec most = {0}, scale, ideal;
    ivec found;
    for (int row = 0; row < rows; row++) most = larger(block_maxima(x + row * p->stride), most);
    ideal = most / splat(6 * scale2);
    scale = q->stochastic ? e4m3_above(ideal) : best_scale(q, x, p->stride, ideal, scale2, rows);
    scale = where(most > (vec){0}, scale, splat(1));
    found = e4m3_codes(scale);
    memcpy(codes, &found, sizeof codes);
    store(steps, scale * scale2);
    for (int row = 0; row < rows; row++)
        for (long i = 0; i < count; i++) {
            const long at = p->from + row * p->row + (block + i) * BLOCK;
            if (!q->values) q->scales[at / BLOCK] = codes[i];
            round_block(q, x + row * p->stride + i * BLOCK, steps[i], at);
        }
}

/* A patch under its matrix's global scale: codes and scales, or, where there is room for them, values. */
static void quantize(const struct quantising *q, long index, float scale2) {
    float room[BLOCK * PATCH];
    const struct patch p = patch_at(q, index, room);
    for (long block = 0; block < p.blocks; block += LANES)
        if (q->square)
            quantize_blocks(q, &p, block, scale2, BLOCK);
        else
            quantize_blocks(q, &p, block, scale2, 1);
}

/* Blocks of codes and their scales -> values. */
static void dequantize(const uint8_t *codes, const uint8_t *scales, float scale2, long blocks, float *values) {
    for (long block = 0; block < blocks; block += LANES) {
        const long count = blocks - block < LANES ? blocks - block : LANES;
        uint8_t some[LANES] = {0};
        float steps[LANES];
        memcpy(some, scales + block, count);
        store(steps, e4m3(some) * scale2);
        for (long i = 0; i < count * BLOCK; i += LANES)
            store(values + block * BLOCK + i, codes_values(codes + (block * BLOCK + i) / 2) * splat(steps[i / BLOCK]));
    }
}
