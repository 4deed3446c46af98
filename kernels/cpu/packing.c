/* Weights into tiles (records.h). */
#include "native.h"

#include <string.h>

static uint32_t word(const uint8_t *four) { /* eight codes, two a byte, the even column low -> the even ones, the odd ones */
    uint32_t found = 0;
    for (int i = 0; i < 4; i++) found |= (uint32_t)(four[i] & 15) << 4 * i | (uint32_t)(four[i] >> 4) << (16 + 4 * i);
    return found;
}

/* codes uint8[rows][columns / 2], scales uint8[rows][columns / 16] -> the same in tiles, which are zero before. */
EXPORT void palaestra_pack_nvfp4(const uint8_t *codes, const uint8_t *scales, long rows, long columns, uint32_t *words,
                                 uint8_t *steps) {
    const long blocks = columns / BLOCK;
    for (long row = 0; row < rows; row++)
        for (long block = 0; block < blocks; block++) {
            const long at = (row / TILE * blocks + block) * TILE + row % TILE;
            const uint8_t *from = codes + row * columns / 2 + block * 8;
            steps[at] = scales[row * blocks + block];
            words[(row / TILE * blocks + block) * 2 * TILE + row % TILE] = word(from);
            words[((row / TILE * blocks + block) * 2 + 1) * TILE + row % TILE] = word(from + 4);
        }
}

/* entries [rows][columns] of `size` bytes (1, 2 or 4) -> [tiles][columns][16]. */
EXPORT void palaestra_pack(const char *entries, long rows, long columns, long size, char *to) {
    for (long row = 0; row < rows; row++)
        for (long column = 0; column < columns; column++)
            memcpy(to + ((row / TILE * columns + column) * TILE + row % TILE) * size,
                   entries + (row * columns + column) * size, size);
}
