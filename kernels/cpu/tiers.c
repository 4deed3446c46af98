/* The choice of a tier. */
#include "native.h"

#include <string.h>

const struct operations *tier;

/* The tiers of this machine, the best first. */
static const struct operations *const *known(void) {
    static const struct operations *found[5];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq")) {
        if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")
            && __builtin_cpu_supports("avx512bf16"))
            found[count++] = &avx512bf16;
        found[count++] = &avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &avx2;
#endif
    found[count] = &portable;
    return found;
}

/* Use the tier of that name (NULL: the best). Returns its name, or NULL if this machine has no such tier. */
EXPORT const char *palaestra_use(const char *name) {
    for (const struct operations *const *at = known(); *at; at++)
        if (!name || !strcmp((*at)->name, name)) return (tier = *at)->name;
    return NULL;
}
