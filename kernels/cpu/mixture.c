/* A mixture's experts on threads. */
#include "native.h"

#include <stdlib.h>
#include <string.h>

/* The gate's outputs [rows][count], which are overwritten -> the chosen experts [rows][top] and their weights. */
EXPORT void palaestra_route(const struct moe *m, float *gate, long rows, int64_t *chosen, float *weights) {
    for (long row = 0; row < rows; row++) tier->route(m, gate + row * m->count, chosen + row * m->top, weights + row * m->top);
}

struct mixture {
    const struct moe *m;
    const float *x;
    float *out, *scratch;
    const int32_t *chosen, *starts, *busy; /* expert i's rows: chosen[starts[i]] to chosen[starts[i + 1]]; those with any */
    long width, room;
};

static void expert_piece(void *work, long index, long thread) {
    const struct mixture *w = work;
    const long expert = w->busy[index], first = w->starts[expert], count = w->starts[expert + 1] - first;
    tier->expert(w->m->experts + expert, w->x, w->width, w->chosen + first, count, w->out + first * w->width,
                 w->scratch + thread * w->room);
}

/* Every expert's rows, and which experts have any; returns how many have. `most`: of the rows of one. */
static long listed(const struct moe *m, const float *weights, long rows, int32_t *lists, struct mixture *w, long *most) {
    int32_t *starts = lists, *busy = starts + m->count + 1, *chosen = busy + m->count;
    long active = 0;
    *w = (struct mixture){.m = m, .starts = starts, .busy = busy, .chosen = chosen};
    starts[0] = *most = 0;
    for (long i = 0; i < m->count; i++) {
        const long count = choosing(weights + i, m->count, rows, chosen + starts[i]);
        if (count) busy[active++] = (int32_t)i;
        *most = count > *most ? count : *most;
        starts[i + 1] = starts[i] + (int32_t)count;
    }
    return active;
}

/* The chosen experts' weighted sums: x [rows][width], weights [rows][count] -> y [rows][width], summed in the order of the
   experts whatever the number of threads. Returns 0, or 1 where memory for it cannot be had. */
EXPORT int palaestra_experts(const struct moe *m, const float *x, long rows, long width, const float *weights, float *y,
                             long threads) {
    const long seats = seats_of(threads);
    int32_t *lists = malloc((rows * m->count + 2 * m->count + 1) * sizeof *lists);
    struct mixture w;
    long most;
    if (!lists) return 1;
    const long active = listed(m, weights, rows, lists, &w, &most), outputs = padded(w.starts[m->count] * width);
    w.x = x;
    w.width = width;
    w.room = padded(most * width) + padded(most * m->experts->up.tiles * TILE);
    if (posix_memalign((void **)&w.out, 64, (outputs + seats * w.room) * sizeof(float))) w.out = NULL;
    if (w.out) {
        w.scratch = w.out + outputs;
        spread(expert_piece, &w, active, seats);
        memset(y, 0, rows * width * sizeof(float));
        for (long i = 0; i < m->count; i++)
            tier->scatter(w.out + w.starts[i] * width, w.chosen + w.starts[i], w.starts[i + 1] - w.starts[i], weights + i,
                          m->count, width, y);
    }
    const int failed = !w.out;
    free(w.out);
    free(lists);
    return failed;
}
