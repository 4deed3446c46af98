/* What stands before and after the recurrence in training, with gradients: the causal convolution, gate and norm. */

INLINE vec silu_slope(vec x, vec s) { return s * (1 + x * (1 - s)); } /* s: sigmoid(x) */

struct channels {
    long sequence, first, count;
};

static struct channels channels_of(const struct convolution *c, long piece) {
    const long parts = (c->width + CHANNELS - 1) / CHANNELS, first = piece % parts * CHANNELS;
    return (struct channels){piece / parts, first, c->width - first < CHANNELS ? c->width - first : CHANNELS};
}

/* The convolution's sum at x, a token that has `reach` tokens of its sequence before it. */
INLINE vec convolved(const struct convolution *c, const float *x, long channel, long reach) {
    vec total = load(c->bias + channel);
    for (long back = 0; back <= reach; back++)
        total += load(x - back * c->x_stride) * load(c->weight + (c->kernel - 1 - back) * c->width + channel);
    return total;
}

static void convolution_forward(const void *work, long piece, float *scratch) {
    const struct convolution *c = work;
    const struct channels part = channels_of(c, piece);
    long reach = -1;
    (void)scratch;
    for (long at = part.sequence * c->length; at < (part.sequence + 1) * c->length; at++) {
        reach = c->starts && c->starts[at] ? 0 : reach + 1 < c->kernel ? reach + 1 : c->kernel - 1;
        for (long i = part.first; i < part.first + part.count; i += LANES) {
            const vec total = convolved(c, c->x + at * c->x_stride + i, i, reach);
            store(c->y + at * c->width + i, total * sigmoid(total));
        }
    }
}

/* How many tokens before `at` belong to its sequence, up to what the kernel sees. */
static long reach_of(const struct convolution *c, long at) {
    long reach = 0;
    while (reach < c->kernel - 1 && (at - reach) % c->length && !(c->starts && c->starts[at - reach])) reach++;
    return reach;
}

/* Gradients of one token's channels. recent [kernel][CHANNELS]: those of the sums of this token and the next, a ring. */
INLINE void convolution_token(const struct convolution *c, const struct channels *part, long at, long ahead, float *recent,
                              float *dweight) {
    const long reach = reach_of(c, at);
    for (long i = 0; i < part->count; i += LANES) {
        const long channel = part->first + i;
        const float *x = c->x + at * c->x_stride + channel;
        const vec total = convolved(c, x, channel, reach);
        const vec own = load(c->dy + at * c->width + channel) * silu_slope(total, sigmoid(total));
        vec dx = {0};
        store(recent + at % c->kernel * CHANNELS + i, own);
        for (long on = 0; on <= ahead; on++) {
            const vec of_sum = load(recent + (at + on) % c->kernel * CHANNELS + i);
            float *to = dweight + (c->kernel - 1 - on) * CHANNELS + i;
            dx += of_sum * load(c->weight + (c->kernel - 1 - on) * c->width + channel);
            store(to, load(to) + of_sum * load(x));
        }
        store(c->dx + at * c->width + channel, dx);
        store(dweight + c->kernel * CHANNELS + i, load(dweight + c->kernel * CHANNELS + i) + own);
    }
}

static void convolution_backward(const void *work, long piece, float *scratch) {
    const struct convolution *c = work;
    const struct channels part = channels_of(c, piece);
    float *recent = take(&scratch, c->kernel * CHANNELS), *dweight = take(&scratch, (c->kernel + 1) * CHANNELS);
    long ahead = -1; /* tokens of the same sequence after this one that see it */
    memset(dweight, 0, (c->kernel + 1) * CHANNELS * sizeof(float));
    for (long at = (part.sequence + 1) * c->length - 1; at >= part.sequence * c->length; at--) {
        ahead = ahead + 1 < c->kernel ? ahead + 1 : c->kernel - 1;
        convolution_token(c, &part, at, ahead, recent, dweight);
        if (c->starts && c->starts[at]) ahead = -1;
    }
    for (long row = 0; row <= c->kernel; row++)
        memcpy(c->dweight + (part.sequence * (c->kernel + 1) + row) * c->width + part.first, dweight + row * CHANNELS,
               part.count * sizeof(float));
}

/* The gated values of one group into `gated`, and 1 / their root mean square. */
static float gate_group(const float *y, const float *z, long width, float eps, float *gated) {
    for (long i = 0; i < width; i += LANES) store(gated + i, load(y + i) * load(z + i) * sigmoid(load(z + i)));
    return 1 / sqrtf(mean_square(gated, width) + eps);
}

static long rows_before(const struct gate *g, long piece) {
    return piece * GATE_ROWS < g->rows ? piece * GATE_ROWS : g->rows;
}

static void gate_forward(const void *work, long piece, float *scratch) {
    const struct gate *g = work;
    const long group = g->width / g->groups;
    for (long row = rows_before(g, piece); row < rows_before(g, piece + 1); row++)
        for (long first = 0; first < g->width; first += group) {
            float *out = g->out + row * g->width + first;
            const float *y = g->y + row * g->width + first, *z = g->z + row * g->z_stride + first;
            const float scale = gate_group(y, z, group, g->eps, scratch);
            for (long i = 0; i < group; i += LANES)
                store(out + i, load(scratch + i) * scale * load(g->weight + first + i));
        }
}

/* Gradients of one row's group that begins at `first`; dweight [width] is added to. */
static void gate_group_backward(const struct gate *g, long row, long first, float *gated, float *dweight) {
    const long group = g->width / g->groups, at = row * g->width + first;
    const float *z = g->z + row * g->z_stride + first, *y = g->y + at, *dout = g->dout + at;
    const float scale = gate_group(y, z, group, g->eps, gated);
    vec total = {0};
    for (long i = 0; i < group; i += LANES) {
        const vec flow = load(dout + i) * load(gated + i);
        total += flow * load(g->weight + first + i);
        store(dweight + first + i, load(dweight + first + i) + flow * scale);
    }
    const float back = sum(total) * scale * scale * scale / group;
    for (long i = 0; i < group; i += LANES) {
        const vec of_gated = load(dout + i) * load(g->weight + first + i) * scale - load(gated + i) * back;
        const vec gate = load(z + i), s = sigmoid(gate);
        store(g->dy + at + i, of_gated * gate * s);
        store(g->dz + at + i, of_gated * load(y + i) * silu_slope(gate, s));
    }
}

static void gate_backward(const void *work, long piece, float *scratch) {
    const struct gate *g = work;
    float *dweight = g->dweight + piece * g->width;
    memset(dweight, 0, g->width * sizeof(float));
    for (long row = rows_before(g, piece); row < rows_before(g, piece + 1); row++)
        for (long first = 0; first < g->width; first += g->width / g->groups)
            gate_group_backward(g, row, first, scratch, dweight);
}
