/* The recurrence of Mamba-2 over whole sequences, and its gradients.

   state_t = decay_t state_{t-1} + dt_t x_t B_t';  y_t = state_t C_t + d x_t.  The gradient of a state goes the same way
   back in time, and each gradient is a contraction of one of the two, so that a single loop serves all of them:

       sweep      in time   values   keys   queries   what comes out
       y          on        x        B      C         y
       dC         on        B        x      dy        dC
       dx         back      dy       C      B         du, of dt x
       dB         back      C        dy     x         dB, of B dt

   Token by token this takes two multiplications an entry of the state, fewer than any form in chunks; a LANES by LANES
   tile of the state stays in registers over a chunk. So that decay costs nothing, registers hold state / scale, the scale
   being the product of the decays since it was last 1.

   A sweep's output leaves out what a token gives to itself, which is added after. What remains is all that depends on the
   decays, and their gradients l_t = <dstate_t, decay_t state_{t-1}> then follow without a difference of large numbers:
   l_{t+1} = l_t - C_t dC_t + dt_t x_t du_t, from an l that is computed in full where a span begins. */

#define SCALE_LEAST 0x1p-40f

/* Of a chunk's tokens: what the state is multiplied by before each (1 but where the scale begins anew), what values and
   outputs are. `left`: the scale at the end. */
struct scales {
    float keep[SPAN], in[SPAN], out[SPAN], left;
};

static void find_scales(const float *decay, const float *weights, long tokens, struct scales *s) {
    float scale = 1;
    for (long t = 0; t < tokens; t++) {
        scale *= decay[t];
        s->keep[t] = 1;
        if (scale < SCALE_LEAST) {
            s->keep[t] = scale;
            scale = 1;
        }
        s->out[t] = scale;
        s->in[t] = weights[t] / scale;
    }
    s->left = scale;
}

/* One tile of the state: LANES keys' rows of LANES values. */
static void sweep_tile(const struct scales *s, long tokens, const float *values, const float *keys, const float *queries,
                       float *state, float *out) {
    vec kept[LANES];
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) kept[row] = load(state + row * LANES);
    for (long t = 0; t < tokens; t++) {
        if (__builtin_expect(s->keep[t] != 1, 0))
#pragma GCC unroll 16
            for (int row = 0; row < LANES; row++) kept[row] *= s->keep[t];
        const vec in = load(values + t * LANES) * s->in[t];
        vec totals[4] = {0};
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            totals[row % 4] += kept[row] * queries[t * LANES + row];
            kept[row] += in * keys[t * LANES + row];
        }
        const vec total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
        store(out + t * LANES, load(out + t * LANES) + total * s->out[t]);
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) store(state + row * LANES, kept[row] * s->left);
}

/* All of them: values and out are `wide`, keys and queries `deep`. */
static void sweep(const struct scales *s, long tokens, const float *values, long wide, const float *keys,
                  const float *queries, long deep, float *state, float *out) {
    memset(out, 0, wide * ROOM * sizeof(float));
    for (long i = 0; i < wide; i += LANES)
        for (long j = 0; j < deep; j += LANES)
            sweep_tile(s, tokens, values + i * ROOM, keys + j * ROOM, queries + j * ROOM, state + i * deep + j * LANES,
                       out + i * ROOM);
}

/* `tokens` rows, `stride` apart (negative: back in time), into the layout of a chunk. */
static void lay_out(const float *from, long stride, long tokens, long width, float *to) {
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) store(to + i * ROOM + t * LANES, load(from + t * stride + i));
}

INLINE vec at_token(const float *chunk, long t, long i) { return load(chunk + i * ROOM + t * LANES); }

/* Of every token of a chunk the dot product of its rows in a and b, [width] each. */
static void token_dots(const float *a, const float *b, long width, float *found) {
    for (long first = 0; first < SPAN; first += LANES) {
        vec rows[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            rows[lane] = (vec){0};
            for (long i = 0; i < width; i += LANES)
                rows[lane] += at_token(a, first + lane, i) * at_token(b, first + lane, i);
        }
        store(found + first, sums(rows));
    }
}

/* A state between its tiles and `whole`, which is [dim][state], or NULL for zeros: entry (value, key) lies at
   value * along + key * across. */
static void state_in(const float *whole, long wide, long deep, long along, long across, float *tiles) {
    if (!whole) {
        memset(tiles, 0, wide * deep * sizeof(float));
        return;
    }
    for (long i = 0; i < wide; i++)
        for (long j = 0; j < deep; j++)
            tiles[i / LANES * LANES * deep + j * LANES + i % LANES] = whole[i * along + j * across];
}

static void state_out(const float *tiles, long wide, long deep, long along, long across, float factor, float *whole) {
    for (long i = 0; i < wide; i++)
        for (long j = 0; j < deep; j++)
            whole[i * along + j * across] = tiles[i / LANES * LANES * deep + j * LANES + i % LANES] * factor;
}

/* A share of a group's heads in one sequence. */
struct share {
    long sequence, group, index, first, last; /* the heads from first to before last */
};

static struct share share_of(const struct scan *s, long piece) {
    const long count = s->groups * s->shares, heads = s->heads / count, part = piece % count;
    return (struct share){piece / count, part / s->shares, part % s->shares, part * heads, (part + 1) * heads};
}

static float decay_of(const struct scan *s, long at, long head) {
    return s->starts && s->starts[at] ? 0 : expf(s->dt[at * s->heads + head] * s->a[head]);
}

/* The scales on the way from token `at` on. */
static void scales_on(const struct scan *s, long at, long tokens, long head, struct scales *found) {
    float decay[SPAN], weights[SPAN];
    for (long t = 0; t < tokens; t++) {
        decay[t] = decay_of(s, at + t, head);
        weights[t] = s->dt[(at + t) * s->heads + head];
    }
    find_scales(decay, weights, tokens, found);
}

/* The scales on the way back from token `at`, of a sequence that ends before `end`. */
static void scales_back(const struct scan *s, long at, long end, long tokens, long head, struct scales *found) {
    float decay[SPAN], weights[SPAN];
    for (long t = 0; t < tokens; t++) {
        decay[t] = at - t + 1 < end ? decay_of(s, at - t + 1, head) : 1;
        weights[t] = 1;
    }
    find_scales(decay, weights, tokens, found);
}

/* The part of B or C from token `at` on (back from it, if `stride` is negative) of one group. */
static void lay_out_group(const struct scan *s, const float *from, long stride, long at, long tokens, long group,
                          float *to) {
    const long step = stride < 0 ? -stride : stride;
    lay_out(from + at * step + group * s->state, stride, tokens, s->state, to);
}

static void scan_forward(const void *work, long piece, float *scratch) {
    const struct scan *s = work;
    const struct share share = share_of(s, piece);
    const long dim = s->dim, state = s->state, size = dim * state, from = share.sequence * s->length;
    float *b = take(&scratch, ROOM * state), *c = take(&scratch, ROOM * state), *x = take(&scratch, ROOM * dim);
    float *out = take(&scratch, ROOM * dim), *states = take(&scratch, (share.last - share.first) * size), own[SPAN];
    struct scales scales;
    for (long head = share.first; head < share.last; head++)
        state_in(s->initial ? s->initial + (share.sequence * s->heads + head) * size : NULL, dim, state, state, 1,
                 states + (head - share.first) * size);
    for (long at = from; at < from + s->length; at += SPAN) {
        const long left = from + s->length - at, tokens = left < SPAN ? left : SPAN;
        lay_out_group(s, s->b, s->b_stride, at, tokens, share.group, b);
        lay_out_group(s, s->c, s->c_stride, at, tokens, share.group, c);
        token_dots(b, c, state, own);
        for (long head = share.first; head < share.last; head++) {
            lay_out(s->x + at * s->x_stride + head * dim, s->x_stride, tokens, dim, x);
            scales_on(s, at, tokens, head, &scales);
            sweep(&scales, tokens, x, dim, b, c, state, states + (head - share.first) * size, out);
            for (long t = 0; t < tokens; t++) {
                const long place = (at + t) * s->heads + head;
                const float through = own[t] * s->dt[place] + s->d[head];
                for (long i = 0; i < dim; i += LANES)
                    store(s->y + place * dim + i, at_token(out, t, i) + at_token(x, t, i) * through);
            }
        }
    }
    for (long head = share.first; head < share.last; head++)
        state_out(states + (head - share.first) * size, dim, state, state, 1, 1,
                  s->last + (share.sequence * s->heads + head) * size);
}

/* Of one head: the gradients of A and D so far. */
struct tally {
    double a, d;
};

/* What the gradients of a share work with. */
struct gradients {
    const struct scan *scan;
    struct share share;
    float *b, *c, *x, *dy, *sum; /* a chunk, laid out; a sum over heads of that */
    float *to_dim, *to_state; /* what sweeps give */
    float *on, *back; /* states in tiles, [heads]: the values of `on` are B, of `back` dy; then C, in the place of `on` */
    float *kept, *borders; /* [heads][length]: C_t dC_t; [spans][heads]: states before each span, as in `on` */
    struct tally *tallies;
};

static float *of_sums(const struct gradients *g, float *gradient, long at) { /* of token `at` in dB or dC */
    const struct scan *s = g->scan;
    const long token = g->share.index * s->batch * s->length + at;
    return gradient + (token * s->groups + g->share.group) * s->state;
}

/* Writes the sums of a chunk whose tokens lie `step` (1 or -1) apart from `at`. */
static void write_sums(const struct gradients *g, float *gradient, long at, long step, long tokens) {
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < g->scan->state; i += LANES)
            store(of_sums(g, gradient, at + step * t) + i, at_token(g->sum, t, i));
}

/* sum += (found + own row) factor, for the tokens of a chunk. */
INLINE void add_to_sum(const struct gradients *g, long t, const float *row, float own, float factor) {
    for (long i = 0; i < g->scan->state; i += LANES)
        store(g->sum + i * ROOM + t * LANES,
              at_token(g->sum, t, i) + (at_token(g->to_state, t, i) + at_token(row, t, i) * own) * factor);
}

/* The state before token `at`, where a span begins. */
static float *border(const struct gradients *g, long at, long head) {
    const long heads = g->share.last - g->share.first, span = at % g->scan->length / SPAN;
    return g->borders + (span * heads + head - g->share.first) * g->scan->dim * g->scan->state;
}

/* A chunk on in time, one head: dC, and C_t dC_t for the way back. */
static void head_on(const struct gradients *g, long at, long tokens, long head) {
    const struct scan *s = g->scan;
    const long dim = s->dim, state = s->state, index = head - g->share.first;
    float own[SPAN], flow[SPAN];
    struct scales scales;
    lay_out(s->x + at * s->x_stride + head * dim, s->x_stride, tokens, dim, g->x);
    lay_out(s->dy + (at * s->heads + head) * dim, s->heads * dim, tokens, dim, g->dy);
    scales_on(s, at, tokens, head, &scales);
    memcpy(border(g, at, head), g->on + index * dim * state, dim * state * sizeof(float));
    sweep(&scales, tokens, g->b, state, g->x, g->dy, dim, g->on + index * dim * state, g->to_state);
    token_dots(g->x, g->dy, dim, own);
    token_dots(g->c, g->to_state, state, flow);
    memcpy(g->kept + index * s->length + at % s->length, flow, tokens * sizeof(float));
    for (long t = 0; t < tokens; t++) add_to_sum(g, t, g->b, own[t] * s->dt[(at + t) * s->heads + head], 1);
}

static void gradients_on(const struct gradients *g) {
    const struct scan *s = g->scan;
    const long from = g->share.sequence * s->length, end = from + s->length;
    for (long at = from; at < end; at += SPAN) {
        const long tokens = end - at < SPAN ? end - at : SPAN;
        lay_out_group(s, s->b, s->b_stride, at, tokens, g->share.group, g->b);
        lay_out_group(s, s->c, s->c_stride, at, tokens, g->share.group, g->c);
        memset(g->sum, 0, ROOM * s->state * sizeof(float));
        for (long head = g->share.first; head < g->share.last; head++) head_on(g, at, tokens, head);
        write_sums(g, s->dc, at, 1, tokens);
    }
}

static float dot(const float *a, const float *b, long count) {
    vec total = {0};
    for (long i = 0; i < count; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}

/* l of the token where a span begins, the sweeps of that span done. */
static double flow_into(const struct gradients *g, long first, long head) {
    const struct scan *s = g->scan;
    const long size = s->dim * s->state;
    return decay_of(s, first, head) * dot(g->on + (head - g->share.first) * size, border(g, first, head), size);
}

/* The tokens of a chunk back from `at`, one head, after the sweeps: dx, ddt, and what is summed. */
static void head_back_tokens(const struct gradients *g, long at, long tokens, long head, const float *through) {
    const struct scan *s = g->scan;
    struct tally *tally = g->tallies + head - g->share.first;
    const float *kept = g->kept + (head - g->share.first) * s->length;
    double flow = flow_into(g, at - tokens + 1, head);
    float own[SPAN], given[SPAN];
    token_dots(g->x, g->dy, s->dim, own);
    token_dots(g->x, g->to_dim, s->dim, given);
    for (long t = tokens - 1; t >= 0; t--) {
        const long place = (at - t) * s->heads + head;
        const float dt = s->dt[place], skip = dt * through[t] + s->d[head];
        if (s->starts && s->starts[at - t]) flow = 0;
        tally->a += dt * flow;
        tally->d += own[t];
        s->ddt[place] = given[t] + own[t] * through[t] + s->a[head] * (float)flow;
        flow += (double)dt * given[t] - kept[(at - t) % s->length];
        for (long i = 0; i < s->dim; i += LANES)
            store(s->dx + place * s->dim + i, at_token(g->to_dim, t, i) * dt + at_token(g->dy, t, i) * skip);
        add_to_sum(g, t, g->c, own[t], dt);
    }
}

/* A chunk back in time from token `at`, one head. */
static void head_back(const struct gradients *g, long at, long tokens, long head, const float *through) {
    const struct scan *s = g->scan;
    const long dim = s->dim, state = s->state, place = (head - g->share.first) * dim * state;
    struct scales scales;
    lay_out(s->x + at * s->x_stride + head * dim, -s->x_stride, tokens, dim, g->x);
    lay_out(s->dy + (at * s->heads + head) * dim, -s->heads * dim, tokens, dim, g->dy);
    scales_back(s, at, (g->share.sequence + 1) * s->length, tokens, head, &scales);
    sweep(&scales, tokens, g->dy, dim, g->c, g->b, state, g->back + place, g->to_dim);
    sweep(&scales, tokens, g->c, state, g->dy, g->x, dim, g->on + place, g->to_state);
    head_back_tokens(g, at, tokens, head, through);
}

static void gradients_back(const struct gradients *g) {
    const struct scan *s = g->scan;
    const long from = g->share.sequence * s->length;
    float through[SPAN];
    for (long first = from + (s->length - 1) / SPAN * SPAN; first >= from; first -= SPAN) {
        const long left = from + s->length - first, tokens = left < SPAN ? left : SPAN, at = first + tokens - 1;
        lay_out_group(s, s->b, -s->b_stride, at, tokens, g->share.group, g->b);
        lay_out_group(s, s->c, -s->c_stride, at, tokens, g->share.group, g->c);
        token_dots(g->b, g->c, s->state, through);
        memset(g->sum, 0, ROOM * s->state * sizeof(float));
        for (long head = g->share.first; head < g->share.last; head++) head_back(g, at, tokens, head, through);
        write_sums(g, s->db, at, -1, tokens);
    }
}

/* From the way on to the way back: that begins with the gradient of the last state. */
static void turn(const struct gradients *g, long head) {
    const struct scan *s = g->scan;
    const long dim = s->dim, state = s->state, size = dim * state, index = head - g->share.first;
    const float *dlast = s->dlast ? s->dlast + (g->share.sequence * s->heads + head) * size : NULL;
    state_in(dlast, state, dim, 1, state, g->on + index * size);
    state_in(dlast, dim, state, state, 1, g->back + index * size);
    g->tallies[index] = (struct tally){0, 0};
}

static void scan_backward(const void *work, long piece, float *scratch) {
    const struct scan *s = work;
    const long dim = s->dim, state = s->state, size = dim * state;
    struct gradients g = {.scan = s, .share = share_of(s, piece)};
    const long heads = g.share.last - g.share.first, first = g.share.sequence * s->heads + g.share.first;
    float **const of_state[] = {&g.b, &g.c, &g.sum, &g.to_state}, **const of_dim[] = {&g.x, &g.dy, &g.to_dim};
    for (int i = 0; i < 4; i++) *of_state[i] = take(&scratch, ROOM * state);
    for (int i = 0; i < 3; i++) *of_dim[i] = take(&scratch, ROOM * dim);
    g.on = take(&scratch, heads * size);
    g.back = take(&scratch, heads * size);
    g.kept = take(&scratch, heads * s->length);
    g.borders = take(&scratch, (s->length + SPAN - 1) / SPAN * heads * size);
    g.tallies = (struct tally *)take(&scratch, heads * (long)(sizeof(struct tally) / sizeof(float)));
    for (long i = 0; i < heads; i++)
        state_in(s->initial ? s->initial + (first + i) * size : NULL, state, dim, 1, state, g.on + i * size);
    gradients_on(&g);
    for (long head = g.share.first; head < g.share.last; head++) turn(&g, head);
    gradients_back(&g);
    for (long i = 0; i < heads; i++) {
        s->da[first + i] = (float)g.tallies[i].a;
        s->dd[first + i] = (float)g.tallies[i].d;
        if (!s->initial) continue;
        const float decay = decay_of(s, g.share.sequence * s->length, g.share.first + i);
        state_out(g.on + i * size, state, dim, 1, state, decay, s->dinitial + (first + i) * size);
    }
}
