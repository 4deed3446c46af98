/* The layers of a hybrid model, token by token: what a conversation's state is owes nothing to how many of its tokens came
   at once. Rows of activations are float32 and lie their own width apart. Every width is a multiple of 16. */

INLINE float *take(float **scratch, long count) {
    float *found = *scratch;
    *scratch += padded(count);
    return found;
}

INLINE void full(const struct matrix *w, const float *x, long rows, float *y) { /* rows of y are padded to whole tiles */
    multiply(w, 0, w->tiles, x, w->columns, rows, y, w->tiles * TILE);
}

INLINE float mean_square(const float *x, long width) {
    vec total = {0};
    for (long i = 0; i < width; i += LANES) total += load(x + i) * load(x + i);
    return sum(total) / width;
}

static void normalise(const float *x, const float *weight, long width, float eps, float *y) {
    float scale = 1 / sqrtf(mean_square(x, width) + eps);
    for (long i = 0; i < width; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

static void add(float *x, const float *y, long count) {
    for (long i = 0; i < count; i += LANES) store(x + i, load(x + i) + load(y + i));
}

static void relu_squared(float *x, long count) {
    for (long i = 0; i < count; i += LANES) {
        vec value = larger(load(x + i), (vec){0});
        store(x + i, value * value);
    }
}
