/* AVX-512 (F, BW, VL, DQ). */
#include "records.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define BF16 0
#include "avx512.h"

#include "operations.h"

const struct operations avx512 = {"avx512", OPERATIONS, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
