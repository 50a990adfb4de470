/* Calls the C route with changed JPEGs and random regions: see fuzz_jpeg.py. The code is included,
   so that the sanitizers watch it; each file is a block of exactly its size. Each region is decoded
   with AVX2 (where it is) and without, and the pixels must be the same. */
static int avx2;
#if defined(__x86_64__) && defined(__GNUC__)
static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
static int has_avx2(void) { return 0; }
#endif
#define __builtin_cpu_supports(name) avx2
#include "../../dist_looksam/data/jpeg.c"

#include <time.h>

#define GUARD 64

static uint64_t state;
static uint64_t draw(uint64_t below) { /* SplitMix64 */
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return below ? (x ^ x >> 31) % below : 0;
}

static uint8_t *read_file(const char *path, size_t *n) {
    FILE *file = fopen(path, "rb");
    uint8_t *data;
    if (!file || fseek(file, 0, SEEK_END)) exit(2);
    *n = (size_t)ftell(file);
    rewind(file);
    data = malloc(*n + 1);
    if (fread(data, 1, *n, file) != *n) exit(2);
    fclose(file);
    return data;
}

/* A changed copy: bytes set (more often in the header), a piece cut out, doubled, or the end lost. */
static uint8_t *changed(const uint8_t *from, size_t *n) {
    static const uint8_t odd[] = {0, 1, 0x7F, 0x80, 0xC0, 0xC4, 0xD0, 0xD9, 0xDA, 0xE1, 0xFE, 0xFF};
    size_t size = *n, at, count, header = size < 700 ? size : 700;
    uint8_t *data = malloc(2 * size + 1), *exact;
    memcpy(data, from, size);
    for (count = draw(6); count; count--) {
        at = draw(draw(3) ? header : size);
        data[at] = draw(2) ? odd[draw(sizeof odd)] : (uint8_t)draw(256);
    }
    if (!draw(4)) size = draw(size + 1);
    if (size && !draw(4)) {
        size_t length;
        at = draw(size), length = draw(size - at) / (1 + draw(50));
        if (draw(2)) {
            memmove(data + at + length, data + at, size - at), size += length;
        } else {
            memmove(data + at, data + at + length, size - at - length), size -= length;
        }
    }
    exact = malloc(size ? size : 1);
    memcpy(exact, data, size);
    free(data);
    *n = size;
    return exact;
}

int main(int count, char **arguments) { /* SECONDS SEED FILE... */
    long calls = 0, pictures = 0, copies = 0, refused[8] = {0};
    state = (uint64_t)atoll(arguments[2]);
    while (clock() / CLOCKS_PER_SEC < atol(arguments[1])) {
        int width, height, why, tries;
        int64_t size;
        size_t n;
        uint8_t *file = read_file(arguments[3 + draw((uint64_t)count - 3)], &n);
        uint8_t *data = changed(file, &n);
        size = looksam_size(data, n);
        why = size < 0, width = (int)(size >> 16), height = (int)(size & 0xFFFF);
        for (tries = 0; tries < 3 && (!why || !tries); tries++) {
            static const int scales[] = {1, 2, 3, 4, 8};
            int eighths = scales[draw(5)], side = 1 + (int)draw(draw(4) ? 64 : 300), result;
            int w = why ? 100 : (width * eighths + 7) / 8, h = why ? 100 : (height * eighths + 7) / 8;
            int x0 = (int)draw((uint64_t)w), y0 = (int)draw((uint64_t)h);
            int x1 = x0 + 1 + (int)draw((uint64_t)(w - x0 + (draw(9) ? 0 : 20)));
            int y1 = y0 + 1 + (int)draw((uint64_t)(h - y0 + (draw(9) ? 0 : 20)));
            float left = (float)(x1 - x0) * (float)draw(100) / 200, top = (float)(y1 - y0) / 9;
            float right = left + 0.01f + (float)draw((uint64_t)(x1 - x0)), bottom = (float)(y1 - y0);
            size_t bytes = 3 * (size_t)side * (size_t)side;
            uint8_t *out = malloc(bytes), *same = malloc(bytes);
            int mirror = (int)draw(2);
            avx2 = has_avx2();
            result = looksam_square(data, n, eighths, x0, y0, x1, y1, left, top, right, bottom, side,
                                    mirror, out);
            avx2 = 0;
            if (looksam_square(data, n, eighths, x0, y0, x1, y1, left, top, right, bottom, side,
                               mirror, same) != result) abort();
            if (!result && memcmp(out, same, bytes)) abort();
            calls++, pictures += !result, refused[result]++;
            free(out), free(same);
        }
        if (why) { /* progressive ones among them: their baseline copy, in any room */
            size_t room = draw(4) ? 2 * n + 65536 : draw(draw(2) ? 3 : n + 1), i;
            uint8_t *out = malloc(room + GUARD);
            memset(out + room, 0xA5, GUARD); /* libjpeg is not watched */
            copies += looksam_baseline(data, n, out, room) > 0;
            for (i = 0; i < GUARD; i++)
                if (out[room + i] != 0xA5) abort();
            free(out);
        }
        free(data), free(file);
    }
    printf("%ld calls, %ld pictures, %ld made baseline; refused as of 1 to 7:", calls, pictures,
           copies);
    for (count = 1; count < 8; count++) printf(" %ld", refused[count]);
    printf("\n");
    return 0;
}
