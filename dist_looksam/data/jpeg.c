/* A region of a JPEG, decoded and resized in one call: see jpeg.py, which loads this by ctypes.

   Decodes baseline JPEGs by libjpeg-turbo, only the rows and columns of the region, and resizes as
   Pillow does (triangle filter; weights in fixed point with 22 bits; first rows, then columns, with
   8 bits between), so that the pixels are those of the Python route to the bit. All rows are decoded
   before any is resized: in turns, four at a time, both took 5 % longer on a quiet core. Everything
   else is refused: a function then returns a number above 0, and the Python route decodes. */
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
#define HALF (1 << (BITS - 1))
#define LOW_BITS 11
#define MOST_BYTES ((size_t)64 << 20)    /* of a decoded region, and of its rows resized */
#define MOST_PIXELS ((size_t)1 << 26)   /* of a picture whose coefficients are held */
#define MOST_TAPS 1024
#define SLACK (4 * MOST_TAPS + 64) /* bytes that the resize may read behind the rows, times 0 */
#define BORDER 4 /* columns on both sides, whose colours may lack a neighbour */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#else
#define HAS_AVX2 0
#endif

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

static int size_of(const uint8_t *data, size_t n, int *width, int *height) {
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

/* width << 16 | height of a picture that `looksam_square` may decode; else below 0, why not. */
int64_t looksam_size(const uint8_t *data, size_t n) {
    int width = 0, height = 0, why = size_of(data, n, &width, &height);
    return why ? -why : (int64_t)width << 16 | height;
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
    int *first, *taps; /* of each output pixel: the first input pixel, and how many */
    int32_t *weights;  /* `most` of each output pixel */
    int most;
    int16_t *halves; /* the weights' upper and lower bits: see `halve` */
    int fours;       /* groups of four weights that every output pixel has in `halves` */
} Filter;

/* Weights of the triangle filter from [low, high) of `in` pixels to `out`, as Pillow makes them; if
   `mirror`, those of the last output pixel come first. */
static int filter_of(Filter *f, int in, float low, float high, int out, int mirror) {
    double scale = (double)(high - low) / out, wide = scale < 1 ? 1 : scale, *w;
    int o, at, i;
    f->most = 2 * ((int)wide + 1) + 2;
    if (f->most > MOST_TAPS) return TOO_LARGE;
    f->first = malloc(2 * (size_t)out * sizeof(int));
    f->weights = calloc((size_t)out * (size_t)f->most, sizeof(int32_t));
    w = malloc((size_t)f->most * sizeof(double));
    if (!f->first || !f->weights || !w) return free(w), NO_MEMORY;
    f->taps = f->first + out;
    for (o = 0; o < out; o++) {
        double centre = low + (o + 0.5) * scale, sum = 0, inverse = 1.0 / wide;
        int32_t *weights;
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
        at = mirror ? out - 1 - o : o;
        weights = f->weights + (size_t)at * (size_t)f->most;
        for (i = 0; i < to - from; i++) {
            if (sum != 0) w[i] /= sum;
            weights[i] = (int32_t)(0.5 + w[i] * (1 << BITS));
        }
        f->first[at] = from;
        f->taps[at] = to - from;
    }
    free(w);
    return 0;
}

/* Weights as products of 16 bits need them: w = upper << LOW_BITS | lower. For each output pixel and
   each four of its taps 16 upper halves, then 16 lower ones: those of taps 0 1 0 1 0 1 0 1, then 2 3
   2 3 2 3 2 3. Weights behind the last tap are 0. */
static int halve(Filter *f, int out) {
    int o, four, lane, widest = 1;
    for (o = 0; o < out; o++)
        if (f->taps[o] > widest) widest = f->taps[o];
    f->fours = (widest + 3) / 4;
    f->halves = malloc(64 * (size_t)out * (size_t)f->fours);
    if (!f->halves) return NO_MEMORY;
    for (o = 0; o < out; o++)
        for (four = 0; four < f->fours; four++)
            for (lane = 0; lane < 16; lane++) {
                int tap = 4 * four + lane / 8 * 2 + lane % 2;
                int16_t *to = f->halves + 32 * ((size_t)o * (size_t)f->fours + (size_t)four) + lane;
                int32_t w = tap < f->most ? f->weights[(size_t)o * (size_t)f->most + (size_t)tap] : 0;
                to[0] = (int16_t)(w >> LOW_BITS);
                to[16] = (int16_t)(w & ((1 << LOW_BITS) - 1));
            }
    return 0;
}

/* Each of four rows of RGBX pixels to one of `side` pixels RGB. */
static void across(const uint8_t *in, size_t stride, const Filter *f, int side, uint8_t *out,
                   size_t wide) {
    int y, o, j, k;
    for (y = 0; y < 4; y++, in += stride, out += wide)
        for (o = 0; o < side; o++) {
            const uint8_t *p = in + 4 * (size_t)f->first[o];
            const int32_t *w = f->weights + (size_t)o * (size_t)f->most;
            int32_t sum[3] = {HALF, HALF, HALF};
            for (j = 0; j < f->taps[o]; j++)
                for (k = 0; k < 3; k++) sum[k] += p[4 * j + k] * w[j];
            for (k = 0; k < 3; k++) out[3 * o + k] = (uint8_t)(sum[k] >> BITS);
        }
}

/* One row of `bytes` bytes of `taps` rows under one another. */
static void down(const uint8_t *in, size_t wide, const int32_t *w, int taps, size_t bytes,
                 uint8_t *out) {
    size_t x;
    int j;
    for (x = 0; x < bytes; x++) {
        int32_t sum = HALF;
        for (j = 0; j < taps; j++) sum += in[(size_t)j * wide + x] * w[j];
        out[x] = (uint8_t)(sum >> BITS);
    }
}

/* The same with AVX2. */
#ifdef AVX2
/* Of each pixel four bytes are written: the last one again by the next pixel. */
AVX2 static inline __attribute__((always_inline)) void across_by(int fours, const uint8_t *in,
                                                                 size_t stride, const Filter *f,
                                                                 int side, uint8_t *out,
                                                                 size_t wide) {
    /* Of 4 pixels RGBX to 16 bits: R0 R1 G0 G1 B0 B1 X0 X1, and the same of pixels 2 and 3. */
    const __m256i pairs = _mm256_setr_epi8(
        0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,
        8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
    const __m256i half = _mm256_setr_epi32(HALF, HALF, HALF, HALF, 0, 0, 0, 0);
    const int16_t *w = f->halves;
    int o, j, row;
    for (o = 0; o < side; o++, out += 3) {
        const uint8_t *p = in + 4 * (size_t)f->first[o];
        __m256i high[4], low[4];
        __m128i even, odd; /* pixels of rows 0 and 2; of rows 1 and 3 */
        int pixels[4];
        for (row = 0; row < 4; row++) high[row] = _mm256_setzero_si256(), low[row] = half;
        for (j = 0; j < fours; j++, p += 16, w += 32) {
            __m256i upper = _mm256_loadu_si256((const __m256i *)w);
            __m256i lower = _mm256_loadu_si256((const __m256i *)(w + 16));
            for (row = 0; row < 4; row++) {
                __m128i four = _mm_loadu_si128((const __m128i *)(p + (size_t)row * stride));
                __m256i levels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(four), pairs);
                high[row] = _mm256_add_epi32(high[row], _mm256_madd_epi16(levels, upper));
                low[row] = _mm256_add_epi32(low[row], _mm256_madd_epi16(levels, lower));
            }
        }
        for (row = 0; row < 4; row++)
            low[row] = _mm256_add_epi32(low[row], _mm256_slli_epi32(high[row], LOW_BITS));
        for (row = 0; row < 4; row += 2) {
            __m256i a = _mm256_permute2x128_si256(low[row], low[row + 1], 0x20);
            __m256i b = _mm256_permute2x128_si256(low[row], low[row + 1], 0x31);
            low[row] = _mm256_srli_epi32(_mm256_add_epi32(a, b), BITS);
        }
        low[0] = _mm256_packus_epi32(low[0], low[2]);
        low[0] = _mm256_packus_epi16(low[0], low[0]);
        even = _mm256_castsi256_si128(low[0]), odd = _mm256_extracti128_si256(low[0], 1);
        pixels[0] = _mm_cvtsi128_si32(even), pixels[1] = _mm_cvtsi128_si32(odd);
        pixels[2] = _mm_extract_epi32(even, 1), pixels[3] = _mm_extract_epi32(odd, 1);
        for (row = 0; row < 4; row++) memcpy(out + (size_t)row * wide, pixels + row, 4);
    }
}

AVX2 static void across_avx2(const uint8_t *in, size_t stride, const Filter *f, int side,
                             uint8_t *out, size_t wide) {
    if (f->fours == 1)
        across_by(1, in, stride, f, side, out, wide);
    else
        across_by(f->fours, in, stride, f, side, out, wide);
}

AVX2 static void down_avx2(const uint8_t *in, size_t wide, const int32_t *w, int taps,
                           size_t bytes, uint8_t *out) {
    size_t x;
    int j;
    for (x = 0; x + 8 <= bytes; x += 8) {
        __m256i sum = _mm256_set1_epi32(HALF);
        __m128i levels;
        for (j = 0; j < taps; j++) {
            levels = _mm_loadl_epi64((const __m128i *)(in + (size_t)j * wide + x));
            sum = _mm256_add_epi32(
                sum, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(levels), _mm256_set1_epi32(w[j])));
        }
        sum = _mm256_srli_epi32(sum, BITS);
        levels = _mm_packus_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        _mm_storel_epi64((__m128i *)(out + x), _mm_packus_epi16(levels, levels));
    }
    down(in + x, wide, w, taps, bytes - x, out + x);
}
#else
#define across_avx2 across
#define down_avx2 down
#endif

typedef struct {
    int eighths, x0, y0, x1, y1; /* columns [x0, x1) and rows [y0, y1) at eighths/8 of the size */
    float box[4];                /* left, top, right, bottom within them */
} Region;

typedef struct {
    struct jpeg_decompress_struct info;
    Errors errors;
    Filter fx, fy;
    uint8_t *decoded; /* all rows of the region, RGBX, and room for up to three more */
    uint8_t *between; /* the same rows, RGB, `side` pixels and a byte for `across_by` */
    int side, fast;
} Work;

/* The filters and `between`. */
static int prepare(Work *w, const Region *r, int mirror) {
    const float *box = r->box;
    size_t bytes = (size_t)(r->y1 - r->y0 + 3) * (3 * (size_t)w->side + 1);
    int why = filter_of(&w->fx, r->x1 - r->x0, box[0], box[2], w->side, mirror);
    if (!why) why = filter_of(&w->fy, r->y1 - r->y0, box[1], box[3], w->side, 0);
    if (!why && w->fast) why = halve(&w->fx, w->side);
    if (why) return why;
    if (bytes > MOST_BYTES) return TOO_LARGE;
    w->between = malloc(bytes);
    return w->between ? 0 : NO_MEMORY;
}

/* Decodes the region; its rows are resized to `between`. */
static int decode(Work *w, const uint8_t *data, size_t n, const Region *r) {
    struct jpeg_decompress_struct *info = &w->info;
    size_t stride, wide = 3 * (size_t)w->side + 1;
    JDIMENSION first, columns;
    int y, rows;
    info->err = jpeg_std_error(&w->errors.base);
    w->errors.base.error_exit = give_up;
    w->errors.base.emit_message = on_message;
    if (setjmp(w->errors.back)) return DAMAGED;
    jpeg_create_decompress(info);
    jpeg_mem_src(info, data, (unsigned long)n);
    jpeg_read_header(info, TRUE);
    if (!plain_colours(info) || jpeg_has_multiple_scans(info) || info->data_precision != 8)
        return OTHER_COLOURS;
    info->scale_num = (unsigned)r->eighths;
    info->scale_denom = 8;
    info->out_color_space = JCS_EXT_RGBX;
    info->dct_method = JDCT_ISLOW;
    info->do_fancy_upsampling = TRUE;
    jpeg_start_decompress(info);
    if (r->x1 > (int)info->output_width || r->y1 > (int)info->output_height) return DAMAGED;
    first = (JDIMENSION)(r->x0 > BORDER ? r->x0 - BORDER : 0);
    columns = (JDIMENSION)(r->x1 + BORDER) - first;
    if (columns > info->output_width - first) columns = info->output_width - first;
    if (columns < info->output_width) jpeg_crop_scanline(info, &first, &columns);
    stride = 4 * (size_t)info->output_width;
    rows = r->y1 - r->y0;
    if (stride * (size_t)(rows + 3) > MOST_BYTES) return TOO_LARGE;
    w->decoded = malloc(stride * (size_t)(rows + 3) + SLACK);
    if (!w->decoded) return NO_MEMORY;
    if (r->y0 && jpeg_skip_scanlines(info, (JDIMENSION)r->y0) != (JDIMENSION)r->y0) return DAMAGED;
    for (y = 0; y < rows; y++) {
        JSAMPROW row = w->decoded + (size_t)y * stride;
        if (jpeg_read_scanlines(info, &row, 1) != 1) return DAMAGED;
    }
    for (y = 0; y < rows; y += 4)
        (w->fast ? across_avx2 : across)(
            w->decoded + (size_t)y * stride + 4 * ((size_t)r->x0 - first), stride, &w->fx, w->side,
            w->between + (size_t)y * wide, wide);
    return 0;
}

/* The columns of `between` to side x side pixels. */
static void finish(const Work *w, uint8_t *out) {
    size_t bytes = 3 * (size_t)w->side;
    int y;
    for (y = 0; y < w->side; y++, out += bytes)
        (w->fast ? down_avx2 : down)(w->between + (size_t)w->fy.first[y] * (bytes + 1), bytes + 1,
                                     w->fy.weights + (size_t)y * (size_t)w->fy.most, w->fy.taps[y],
                                     bytes, out);
}

/* out: side x side x 3 bytes, the box of the region of the picture at eighths/8 of its size;
   region: columns and rows [x0, y0, x1, y1); box: left, top, right, bottom within the region.
   Returns 0, or why not; `out` is then undefined. */
int looksam_square(const uint8_t *data, size_t n, int eighths, int x0, int y0, int x1, int y1,
                   float left, float top, float right, float bottom, int side, int mirror,
                   uint8_t *out) {
    const Region r = {eighths, x0, y0, x1, y1, {left, top, right, bottom}};
    Work w;
    int why;
    if (eighths < 1 || eighths > 8 || side < 1 || side > 8192 || x0 < 0 || y0 < 0 || x1 <= x0 ||
        y1 <= y0 || x1 > JPEG_MAX_DIMENSION || y1 > JPEG_MAX_DIMENSION ||
        !(0 <= left && left < right && right <= x1 - x0) ||
        !(0 <= top && top < bottom && bottom <= y1 - y0))
        return TOO_LARGE;
    memset(&w, 0, sizeof w);
    w.side = side;
    w.fast = HAS_AVX2;
    why = prepare(&w, &r, mirror);
    if (!why) why = decode(&w, data, n, &r);
    if (!why) finish(&w, out);
    jpeg_destroy_decompress(&w.info); /* does nothing if it was not created */
    free(w.fx.first), free(w.fx.weights), free(w.fx.halves), free(w.fy.first), free(w.fy.weights);
    free(w.decoded), free(w.between);
    return why;
}

typedef struct {
    struct jpeg_decompress_struct from;
    struct jpeg_compress_struct to;
    struct jpeg_destination_mgr target; /* the caller's memory */
    Errors errors;
} Copied;

static void begin_output(j_compress_ptr info) { (void)info; }
static void end_output(j_compress_ptr info) { (void)info; }
static boolean no_room(j_compress_ptr info) {
    give_up((j_common_ptr)info);
    return FALSE;
}

/* What is no part of the picture, such as Exif; libjpeg writes JFIF's and Adobe's marks itself. */
static void copy_markers(struct jpeg_decompress_struct *from, struct jpeg_compress_struct *to) {
    jpeg_saved_marker_ptr m;
    for (m = from->marker_list; m; m = m->next) {
        unsigned n = m->data_length;
        if (m->marker == JPEG_APP0 && n >= 5 && !memcmp(m->data, "JFIF", 5)) continue;
        if (m->marker == JPEG_APP0 + 14 && n >= 5 && !memcmp(m->data, "Adobe", 5)) continue;
        jpeg_write_marker(to, m->marker, m->data, n);
    }
}

static int copy_baseline(Copied *c, const uint8_t *data, size_t n, uint8_t *out, size_t room) {
    jvirt_barray_ptr *coefficients;
    int marker;
    c->from.err = c->to.err = jpeg_std_error(&c->errors.base);
    c->errors.base.error_exit = give_up;
    c->errors.base.emit_message = on_message;
    if (setjmp(c->errors.back)) return DAMAGED;
    jpeg_create_decompress(&c->from);
    jpeg_create_compress(&c->to);
    for (marker = JPEG_APP0; marker < JPEG_APP0 + 16; marker++)
        jpeg_save_markers(&c->from, marker, 0xFFFF);
    jpeg_mem_src(&c->from, data, (unsigned long)n);
    jpeg_read_header(&c->from, TRUE);
    if (!c->from.progressive_mode || c->from.data_precision != 8) return OTHER_COLOURS;
    if ((size_t)c->from.image_width * c->from.image_height > MOST_PIXELS) return TOO_LARGE;
    coefficients = jpeg_read_coefficients(&c->from);
    jpeg_copy_critical_parameters(&c->from, &c->to);
    c->to.optimize_coding = TRUE;
    c->target.init_destination = begin_output;
    c->target.empty_output_buffer = no_room;
    c->target.term_destination = end_output;
    c->target.next_output_byte = out;
    c->target.free_in_buffer = room;
    c->to.dest = &c->target;
    jpeg_write_coefficients(&c->to, coefficients);
    copy_markers(&c->from, &c->to);
    jpeg_finish_compress(&c->to);
    jpeg_finish_decompress(&c->from);
    return 0;
}

/* Writes a progressive JPEG to `out` as one in a single scan, with the same coefficients: without
   loss. Returns its bytes, at most `room`; else below 0, why not. */
int64_t looksam_baseline(const uint8_t *data, size_t n, uint8_t *out, size_t room) {
    Copied c;
    int why;
    if (!room) return -TOO_LARGE; /* libjpeg writes a byte before it asks whether there is room */
    memset(&c, 0, sizeof c);
    why = copy_baseline(&c, data, n, out, room);
    jpeg_destroy_compress(&c.to);
    jpeg_destroy_decompress(&c.from);
    return why ? -why : (int64_t)(room - c.target.free_in_buffer);
}
