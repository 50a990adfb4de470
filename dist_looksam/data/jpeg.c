/* A region of a JPEG, decoded and resized in one call: see jpeg.py, which loads this by ctypes.

   Decodes baseline JPEGs by libjpeg-turbo, only the rows and columns of the region, and resizes as
   Pillow does (triangle filter; weights in fixed point with 22 bits; first rows, then columns, with
   8 bits between), so that the pixels are those of the Python route to the bit. Everything else is
   refused: a function then returns a number above 0, and the Python route decodes the picture. */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo 2.0 or later is needed"
#endif

enum { NOT_BASELINE = 1, NOT_WHOLE, MAY_BE_TURNED, TOO_LARGE, OTHER_COLOURS, DAMAGED, NO_MEMORY };

#define BITS 22                          /* of a weight behind the point */
#define MOST_BYTES ((size_t)64 << 20)    /* of a decoded region */
#define MOST_TAPS 1024
#define BORDER 4 /* columns on both sides, whose colours may lack a neighbour */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif
typedef int32_t Eight __attribute__((vector_size(32)));
typedef int32_t Four __attribute__((vector_size(16)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));
typedef uint8_t FourBytes __attribute__((vector_size(4)));

static unsigned two(const uint8_t *p) { return (unsigned)p[0] << 8 | p[1]; }

/* Whether an Exif segment of n bytes says plainly that the picture is upright. */
static int upright(const uint8_t *p, size_t n) {
    size_t i, at, entries;
    int little;
    if (n < 16) return 0;
    p += 6, n -= 6; /* "Exif\0\0" */
    little = !memcmp(p, "II*\0", 4);
    if (!little && memcmp(p, "MM\0*", 4)) return 0;
#define SHORT(q) (little ? (unsigned)((q)[1] << 8 | (q)[0]) : two(q))
#define LONG(q) (little ? SHORT(q) | SHORT((q) + 2) << 16 : SHORT(q) << 16 | SHORT((q) + 2))
    at = LONG(p + 4);
    if (at > n || n - at < 2) return 0;
    entries = SHORT(p + at);
    if ((n - at - 2) / 12 < entries) return 0;
    for (i = 0; i < entries; i++) {
        const uint8_t *entry = p + at + 2 + 12 * i;
        if (SHORT(entry) == 0x0112)
            return SHORT(entry + 2) == 3 && LONG(entry + 4) == 1 && SHORT(entry + 8) == 1;
    }
    return 0;
#undef SHORT
#undef LONG
}

/* Whether the data of the only scan, from byte i on, go on to the mark of the end. */
static int whole(const uint8_t *data, size_t n, size_t i) {
    while (i + 1 < n) {
        const uint8_t *mark = memchr(data + i, 0xFF, n - 1 - i);
        if (!mark) return 0;
        i = (size_t)(mark - data) + 1;
        if (data[i] == 0xD9) return 1;
        if (data[i] == 0xFF) continue;
        if (data[i] && (data[i] < 0xD0 || data[i] > 0xD7)) return 0;
        i++;
    }
    return 0;
}

/* Width and height of a picture that `looksam_square` may decode. Returns 0, or why not. */
int looksam_size(const uint8_t *data, size_t n, int *width, int *height) {
    size_t i = 2, length;
    int kind, sized = 0;
    if (n < 4 || data[0] != 0xFF || data[1] != 0xD8) return NOT_BASELINE;
    while (i + 4 <= n) {
        if (data[i] != 0xFF) return DAMAGED;
        kind = data[i + 1];
        length = two(data + i + 2);
        if (length < 2 || length > n - i - 2) return DAMAGED;
        if (kind == 0xDA) return !sized ? DAMAGED : whole(data, n, i + 2 + length) ? 0 : NOT_WHOLE;
        if (kind == 0xC0) {
            if (sized++ || length < 8 || data[i + 4] != 8) return NOT_BASELINE;
            *height = (int)two(data + i + 5);
            *width = (int)two(data + i + 7);
            if (!*height || !*width) return NOT_BASELINE;
        } else if (kind == 0xE1 && length >= 8 && !memcmp(data + i + 4, "Exif\0\0", 6)) {
            if (!upright(data + i + 4, length - 2)) return MAY_BE_TURNED;
        } else if (kind != 0xC4 && kind != 0xDB && kind != 0xDD && kind != 0xFE && kind >> 4 != 0xE) {
            return NOT_BASELINE;
        }
        i += 2 + length;
    }
    return DAMAGED;
}

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf back;
} Errors;

static void give_up(j_common_ptr info) { longjmp(((Errors *)info->err)->back, 1); }
static void on_message(j_common_ptr info, int level) {
    if (level < 0) give_up(info); /* libjpeg would go on with grey */
}

static int plain_colours(const struct jpeg_decompress_struct *info) {
    const jpeg_component_info *c = info->comp_info;
    int i;
    if (info->num_components == 1) /* grey: the factors have no effect */
        return info->jpeg_color_space == JCS_GRAYSCALE && c->h_samp_factor <= 2 &&
               c->v_samp_factor <= 2;
    if (info->num_components != 3 || info->jpeg_color_space != JCS_YCbCr) return 0;
    for (i = 1; i < 3; i++)
        if (c[i].h_samp_factor != 1 || c[i].v_samp_factor != 1) return 0;
    return c->h_samp_factor <= 2 && c->v_samp_factor <= c->h_samp_factor; /* 4:4:4, 4:2:2, 4:2:0 */
}

typedef struct {
    struct jpeg_decompress_struct info;
    Errors errors;
    uint8_t *pixels; /* RGBX, `rows` rows of `stride` bytes */
    size_t stride;
    int left; /* the column of the region within a row */
} Decoded;

/* The columns [x0, x1) and rows [y0, y1) of the picture decoded at eighths/8 of its size. */
static int decode(Decoded *d, const uint8_t *data, size_t n, int eighths, int x0, int y0, int x1,
                  int y1) {
    struct jpeg_decompress_struct *info = &d->info;
    JDIMENSION first, columns;
    int y;
    info->err = jpeg_std_error(&d->errors.base);
    d->errors.base.error_exit = give_up;
    d->errors.base.emit_message = on_message;
    if (setjmp(d->errors.back)) return DAMAGED;
    jpeg_create_decompress(info);
    jpeg_mem_src(info, data, (unsigned long)n);
    jpeg_read_header(info, TRUE);
    if (!plain_colours(info) || jpeg_has_multiple_scans(info) || info->data_precision != 8)
        return OTHER_COLOURS;
    info->scale_num = (unsigned)eighths;
    info->scale_denom = 8;
    info->out_color_space = JCS_EXT_RGBX;
    info->dct_method = JDCT_ISLOW;
    info->do_fancy_upsampling = TRUE;
    jpeg_start_decompress(info);
    if (x1 > (int)info->output_width || y1 > (int)info->output_height) return DAMAGED;
    first = (JDIMENSION)(x0 > BORDER ? x0 - BORDER : 0);
    columns = (JDIMENSION)(x1 + BORDER) - first;
    if (columns > info->output_width - first) columns = info->output_width - first;
    if (columns < info->output_width) jpeg_crop_scanline(info, &first, &columns);
    d->left = x0 - (int)first;
    d->stride = 4 * (size_t)info->output_width;
    if (d->stride * (size_t)(y1 - y0) > MOST_BYTES) return TOO_LARGE;
    d->pixels = malloc(d->stride * (size_t)(y1 - y0) + 32); /* the resize reads 8 bytes more */
    if (!d->pixels) return NO_MEMORY;
    if (y0 && jpeg_skip_scanlines(info, (JDIMENSION)y0) != (JDIMENSION)y0) return DAMAGED;
    for (y = 0; y < y1 - y0; y++) {
        JSAMPROW row = d->pixels + (size_t)y * d->stride;
        if (jpeg_read_scanlines(info, &row, 1) != 1) return DAMAGED;
    }
    return 0;
}

typedef struct {
    int *first, *taps; /* of each output pixel: the first input pixel, and how many */
    int32_t *weights;  /* `most` of each output pixel */
    int most;
} Filter;

/* Weights of the triangle filter from [low, high) of `in` pixels to `out`, as Pillow makes them. */
static int filter_of(Filter *f, int in, float low, float high, int out) {
    double scale = (double)(high - low) / out, wide = scale < 1 ? 1 : scale, *w;
    int o, i;
    f->most = 2 * ((int)wide + 1) + 2;
    if (f->most > MOST_TAPS) return TOO_LARGE;
    f->first = malloc(2 * (size_t)out * sizeof(int));
    f->weights = calloc((size_t)out * (size_t)f->most, sizeof(int32_t));
    w = malloc((size_t)f->most * sizeof(double));
    if (!f->first || !f->weights || !w) return free(w), NO_MEMORY;
    f->taps = f->first + out;
    for (o = 0; o < out; o++) {
        double centre = low + (o + 0.5) * scale, sum = 0, inverse = 1.0 / wide;
        int from = (int)(centre - wide + 0.5), to = (int)(centre + wide + 0.5);
        if (from < 0) from = 0;
        if (to > in) to = in;
        if (to - from < 1 || to - from > f->most) return free(w), TOO_LARGE;
        for (i = 0; i < to - from; i++) {
            double x = (i + from - centre + 0.5) * inverse;
            if (x < 0) x = -x;
            w[i] = x < 1 ? 1 - x : 0;
            sum += w[i];
        }
        for (i = 0; i < to - from; i++) {
            if (sum != 0) w[i] /= sum;
            f->weights[(size_t)o * (size_t)f->most + (size_t)i] = (int32_t)(0.5 + w[i] * (1 << BITS));
        }
        f->first[o] = from;
        f->taps[o] = to - from;
    }
    free(w);
    return 0;
}

/* One row: `side` RGBX pixels, each of neighbouring RGBX pixels; two taps at a time. */
static inline __attribute__((always_inline)) void across(const uint8_t *in, const Filter *f,
                                                         const Eight *pairs, int side,
                                                         uint8_t *out) {
    int o, j, half = f->most / 2;
    for (o = 0; o < side; o++) {
        const uint8_t *p = in + 4 * (size_t)f->first[o];
        const Eight *w = pairs + (size_t)o * (size_t)half;
        Eight sum = {0};
        Four parts[2];
        FourBytes bytes;
        for (j = 0; j < (f->taps[o] + 1) / 2; j++) {
            EightBytes two_pixels;
            memcpy(&two_pixels, p + 8 * (size_t)j, 8);
            sum += __builtin_convertvector(two_pixels, Eight) * w[j];
        }
        memcpy(parts, &sum, sizeof parts);
        bytes = __builtin_convertvector((parts[0] + parts[1] + (1 << (BITS - 1))) >> BITS, FourBytes);
        memcpy(out + 4 * (size_t)o, &bytes, 4);
    }
}

/* One row of `bytes` bytes, of `taps` rows under one another. */
static inline __attribute__((always_inline)) void down(const uint8_t *in, size_t stride,
                                                       const int32_t *w, int taps, size_t bytes,
                                                       uint8_t *out) {
    size_t x;
    int j;
    for (x = 0; x < bytes; x += 8) {
        Eight sum = {0};
        EightBytes levels;
        for (j = 0; j < taps; j++) {
            memcpy(&levels, in + (size_t)j * stride + x, 8);
            sum += __builtin_convertvector(levels, Eight) * w[j];
        }
        levels = __builtin_convertvector((sum + (1 << (BITS - 1))) >> BITS, EightBytes);
        memcpy(out + x, &levels, 8);
    }
}

FAST static void resize(const uint8_t *pixels, size_t stride, int rows, const Filter *fx,
                        const Filter *fy, const Eight *pairs, uint8_t *between, size_t wide,
                        int side, int mirror, uint8_t *out) {
    int y, x;
    uint8_t *line = between + (size_t)rows * wide;
    for (y = 0; y < rows; y++)
        across(pixels + (size_t)y * stride, fx, pairs, side, between + (size_t)y * wide);
    for (y = 0; y < side; y++) {
        uint8_t *to = out + 3 * (size_t)y * (size_t)side;
        down(between + (size_t)fy->first[y] * wide, wide,
             fy->weights + (size_t)y * (size_t)fy->most, fy->taps[y], wide, line);
        for (x = 0; x < side; x++) {
            const uint8_t *p = line + 4 * (size_t)(mirror ? side - 1 - x : x);
            to[3 * x] = p[0], to[3 * x + 1] = p[1], to[3 * x + 2] = p[2];
        }
    }
}

/* `resize` and its memory. box: left, top, right, bottom within the region. */
static int resized(const Decoded *d, int columns, int rows, const float *box, int side, int mirror,
                   uint8_t *out) {
    Filter fx = {0}, fy = {0};
    size_t wide = (4 * (size_t)side + 7) / 8 * 8, i;
    uint8_t *between = NULL;
    Eight *pairs = NULL;
    int why = filter_of(&fx, columns, box[0], box[2], side), lane;
    if (!why) why = filter_of(&fy, rows, box[1], box[3], side);
    if (!why) {
        size_t half = (size_t)side * (size_t)fx.most / 2;
        between = calloc((size_t)rows + 1, wide);
        if (!between || posix_memalign((void **)&pairs, 32, half * sizeof(Eight))) why = NO_MEMORY;
        for (i = 0; !why && i < half; i++)
            for (lane = 0; lane < 8; lane++) pairs[i][lane] = fx.weights[2 * i + (size_t)lane / 4];
    }
    if (!why)
        resize(d->pixels + 4 * (size_t)d->left, d->stride, rows, &fx, &fy, pairs, between, wide, side,
               mirror, out);
    free(fx.first), free(fx.weights), free(fy.first), free(fy.weights), free(between), free(pairs);
    return why;
}

/* out: side x side x 3 bytes, the box of the region of the picture at eighths/8 of its size;
   region: columns and rows [x0, y0, x1, y1); box: left, top, right, bottom within the region.
   Returns 0, or why not; `out` is then undefined. */
int looksam_square(const uint8_t *data, size_t n, int eighths, int x0, int y0, int x1, int y1,
                   float left, float top, float right, float bottom, int side, int mirror,
                   uint8_t *out) {
    Decoded d;
    const float box[4] = {left, top, right, bottom};
    int why;
    if (eighths < 1 || eighths > 8 || x0 < 0 || y0 < 0 || x1 <= x0 || y1 <= y0 || side < 1 ||
        side > 8192 || !(0 <= left && left < right && right <= x1 - x0) ||
        !(0 <= top && top < bottom && bottom <= y1 - y0))
        return TOO_LARGE;
    memset(&d, 0, sizeof d);
    why = decode(&d, data, n, eighths, x0, y0, x1, y1);
    if (!why) why = resized(&d, x1 - x0, y1 - y0, box, side, mirror, out);
    jpeg_destroy_decompress(&d.info); /* does nothing if it was not created */
    free(d.pixels);
    return why;
}
