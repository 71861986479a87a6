/*
One token through SmolLM2 on a CPU: model.py's forward pass for one row, written for the memory it has to read.

decode.py compiles this file when it is first needed, in half a second, and calls step(). What one token costs is a
walk over all weights, once, with two operations for each: the processor waits for memory. PyTorch adds to that some
700 calls with a few microseconds each and products that were made for many rows; here there is one call, and each
thread reads its share of every matrix from front to back. Activations are fp32, and int8 where they meet int8 weights.

Shapes: C hidden, I intermediate, H query heads, K key/value heads, G = H / K, D head dim, V vocabulary.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

/* Every caller passes the kind as a constant, so that each inlined copy holds the code of one kind only. */
enum { F32, BF16, INT8 };
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const void *data;   /* rows x columns, one row after the other */
    const float *scale; /* one factor per row for INT8, else NULL */
    int kind, rows, columns;
} Matrix;

typedef struct {
    const float *input_layernorm, *post_attention_layernorm;
    Matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
    void *keys, *values; /* (K, capacity, D): the cache of this layer */
} Layer;

typedef struct {
    int C, I, L, H, K, D, V, capacity, cache_kind, threads;
    float eps;
    const float *norm, *cos, *sin; /* (C), and (D) each for this position */
    Matrix embed_tokens, head;
    Layer *layers;
    float *x, *q, *hidden, *parts; /* what the threads share: C, H D, I and (capacity / BLOCK, rounded up) H (D + 2) */
} Model;

/* ---------------------------------------------------------------------------------------------------------------------
   numbers of each kind, and the sum of their products: the loops that take the time, left to the compiler to vectorise */

INLINE float load(int kind, const void *data, long i) {
    if (kind == F32) return ((const float *)data)[i];
    if (kind == INT8) return ((const int8_t *)data)[i];
    uint32_t word = (uint32_t)((const uint16_t *)data)[i] << 16; /* bf16 is the upper half of fp32 */
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE void store(int kind, void *data, long i, float value) { /* into the cache, which is fp32 or bf16 */
    if (kind == F32) {
        ((float *)data)[i] = value;
        return;
    }
    uint32_t word;
    memcpy(&word, &value, 4);
    ((uint16_t *)data)[i] = (word + 0x7fff + (word >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

INLINE float dot(int kind, const void *data, long start, const float *x, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += load(kind, data, start + i) * x[i];
    return sum;
}

/* int8 weights meet activations that are int8 too, with a scale for every BYTES_BLOCK of them: four products of bytes and
   their sum are one instruction on most processors, where widening the weights takes longer than the memory does. */
#define BYTES_BLOCK 32
typedef float Floats __attribute__((vector_size(64), aligned(4))); /* GCC and Clang compute with these types, in */
typedef int32_t Ints __attribute__((vector_size(64), aligned(4))); /* whatever vectors the processor has */

INLINE Ints dot_of_four(Ints w, Ints x) { /* word by word: the sum of the products of its four signed bytes, exactly */
#if defined(__AVX512VNNI__) && !defined(PLAIN)
    /* the instruction wants w unsigned: w + 128, and what that adds is taken off */
    __m512i a = (__m512i)w, b = (__m512i)x, zero = _mm512_setzero_si512(), top = _mm512_set1_epi8(-128);
    return (Ints)_mm512_dpbusd_epi32(zero, _mm512_xor_si512(a, top), b) - (Ints)_mm512_dpbusd_epi32(zero, top, b);
#elif defined(__AVX2__) && !defined(PLAIN)
    /* the sign of w goes to x; no sum of two products of 127 x 127 leaves 16 bits */
    Ints sums;
    for (int half = 0; half < 2; half++) {
        __m256i a = _mm256_loadu_si256((__m256i *)&w + half), b = _mm256_loadu_si256((__m256i *)&x + half);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
        _mm256_storeu_si256((__m256i *)&sums + half, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sums;
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(PLAIN)
    Ints sums;
    for (int i = 0; i < 4; i++) {
        int8x16_t a = vld1q_s8((int8_t *)&w + 16 * i), b = vld1q_s8((int8_t *)&x + 16 * i);
        vst1q_s32((int32_t *)&sums + 4 * i, vdotq_s32(vdupq_n_s32(0), a, b));
    }
    return sums;
#else
    Ints sums = (w >> 24) * (x >> 24);
    for (int k = 8; k <= 24; k += 8) sums += (w << k >> 24) * (x << k >> 24);
    return sums;
#endif
}

INLINE void to_bytes(const float *x, int n, int8_t *bytes, float *scale) { /* a block's scale for every four: a lane */
    for (int from = 0; from < n; from += BYTES_BLOCK) {
        int to = from + BYTES_BLOCK < n ? from + BYTES_BLOCK : n;
        float largest = 0, nan = 0;
        for (int i = from; i < to; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest, nan += x[i] * 0;
        if (nan != 0) largest = 0; /* one of them is infinite or no number, else nan is 0: what comes of it is no number */
        float back = largest > 1e-30f ? 127 / largest : 0;
        for (int i = from; i < to; i++) bytes[i] = back ? x[i] * back + (x[i] < 0 ? -0.5f : 0.5f) : 0; /* rounds */
        for (int i = from; i < to; i += 4) scale[i / 4] = largest / 127 + nan;
    }
}

INLINE float dot_bytes(const int8_t *w, const int8_t *x, const float *scale, int n) {
    Floats sums = {0};
    long i = 0;
    for (; i + 64 <= n; i += 64) {
        Ints products = dot_of_four(*(const Ints *)(w + i), *(const Ints *)(x + i));
        sums += __builtin_convertvector(products, Floats) * *(const Floats *)(scale + i / 4);
    }
    float sum = 0;
    for (int j = 0; j < 16; j++) sum += sums[j];
    for (; i < n; i++) sum += w[i] * x[i] * scale[i / 4];
    return sum;
}

/* ---------------------------------------------------------------------------------------------------------------------
   the parts */

/* While a row is computed with, have the bytes fetched that come AHEAD bytes after it: the processor looks ahead itself,
   but only to the end of a page of 4 KB. */
#define AHEAD 8192
INLINE const void *fetch_row(const Matrix *m, int r, int size) { /* row r, of numbers of `size` bytes */
    long bytes = (long)m->columns * size;
    const char *row = (const char *)m->data + r * bytes;
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((void *)((uintptr_t)row + AHEAD + i), 0, 2);
    return row;
}

INLINE void multiply_in(int kind, const Matrix *m, const float *x, float *y, int from, int to) {
    for (int r = from; r < to; r++) y[r] = dot(kind, fetch_row(m, r, kind == F32 ? 4 : 2), 0, x, m->columns);
}

static void multiply(const Matrix *m, const float *x, float *y, int from, int to) { /* rows from .. to - 1 of y = m x */
    int n = m->columns;
    if (m->kind == F32) multiply_in(F32, m, x, y, from, to);
    if (m->kind == BF16) multiply_in(BF16, m, x, y, from, to);
    if (m->kind == INT8) {
        int8_t bytes[n] __attribute__((aligned(64))); /* n is a multiple of 4 */
        float scale[n / 4] __attribute__((aligned(64)));
        to_bytes(x, n, bytes, scale);
        for (int r = from; r < to; r++)
            y[r] = dot_bytes(fetch_row(m, r, 1), bytes, scale, n) * m->scale[r];
    }
}

static void rms_norm(const float *x, const float *weight, float eps, int n, float *y) {
    float scale = 1.0f / sqrtf(dot(F32, x, 0, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void rotate(float *x, const float *cos, const float *sin, int D) { /* RoPE: dimension i pairs with i + D/2 */
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

/* e^x for x <= 0, as 2^k e^r with a whole k and |r| <= ln(2) / 2: plain arithmetic, so that a loop of it is vectorised,
   which expf() would prevent. Off by at most 2e-7, and by 5e-6 of the value, but no value is below 2^-101: a softmax
   does not see such weights, and numbers without leading zeros are faster. */
INLINE float exp_below_0(float x) {
    int32_t k = x * 1.44269504f - 0.5f; /* to the nearest, x being negative */
    float r = x - k * 0.693147181f;
    float e = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041665795f + r * (0.0083334519f + r * 0.0013937f)))));
    int32_t power = ((k < -100 ? -100 : k) + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return e * scale;
}

/* BLOCK, of positions, is the same whatever the number of threads, so that this changes no sum; decode.py defines it */

INLINE void attend_in(int kind, int D, const Model *m, const Layer *layer, int group, int block, int position) {
    /* One key/value head with its G query heads over one block of positions, so that each key and value is read once.
       Each query head leaves a part: the values weighted by e^(score - highest), the highest score, and the sum of the
       weights, which merge() puts together. That is FlashAttention's softmax (https://arxiv.org/abs/2205.14135). */
    int G = m->H / m->K, first = block * BLOCK;
    int n = position + 1 - first < BLOCK ? position + 1 - first : BLOCK;
    long row = ((long)group * m->capacity + first) * D;
    const float *q = m->q + group * G * D;
    float *parts = m->parts + ((long)block * m->H + group * G) * (D + 2), scale = 1.0f / sqrtf(D);
    float weights[G][BLOCK];
    for (int t = 0; t < n; t++)
        for (int g = 0; g < G; g++) weights[g][t] = dot(kind, layer->keys, row + (long)t * D, q + g * D, D) * scale;
    for (int g = 0; g < G; g++) {
        float highest = -INFINITY, sum = 0, *part = parts + g * (D + 2);
        for (int t = 0; t < n; t++) highest = weights[g][t] > highest ? weights[g][t] : highest;
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < n; t++) sum += weights[g][t] = exp_below_0(weights[g][t] - highest);
        memset(part, 0, sizeof(float) * D);
        part[D] = highest, part[D + 1] = sum;
    }
    for (int t = 0; t < n; t++)
        for (int g = 0; g < G; g++) {
            float weight = weights[g][t], *part = parts + g * (D + 2);
#pragma omp simd
            for (int i = 0; i < D; i++) part[i] += weight * load(kind, layer->values, row + (long)t * D + i);
        }
}

static void attend(const Model *m, const Layer *layer, int group, int block, int position) {
    if (m->cache_kind == F32) attend_in(F32, m->D, m, layer, group, block, position);
    if (m->cache_kind == BF16 && m->D == 64) attend_in(BF16, 64, m, layer, group, block, position);
    if (m->cache_kind == BF16 && m->D != 64) attend_in(BF16, m->D, m, layer, group, block, position);
}

static void merge(const Model *m, int blocks, float *attended) { /* the parts of all blocks, to (H D) */
    int H = m->H, D = m->D;
    for (int head = 0; head < H; head++, attended += D) {
        const float *parts = m->parts + head * (D + 2);
        long next = (long)H * (D + 2);
        float highest = -INFINITY, sum = 0;
        for (int b = 0; b < blocks; b++) highest = fmaxf(highest, parts[b * next + D]);
        memset(attended, 0, sizeof(float) * D);
        for (int b = 0; b < blocks; b++) {
            const float *part = parts + b * next;
            float shrink = expf(part[D] - highest);
            sum += shrink * part[D + 1];
            for (int i = 0; i < D; i++) attended[i] += shrink * part[i];
        }
        for (int i = 0; i < D; i++) attended[i] /= sum;
    }
}

static void project_query(const Model *m, const Layer *layer, const float *x, int head) {
    int D = m->D;
    multiply(&layer->q_proj, x, m->q, head * D, (head + 1) * D);
    rotate(m->q + head * D, m->cos, m->sin, D);
}

static void to_cache(const Model *m, void *buffer, int head, int position, const float *y) {
    long row = ((long)head * m->capacity + position) * m->D;
    for (int i = 0; i < m->D; i++) store(m->cache_kind, buffer, row + i, y[i]);
}

static void project_key(const Model *m, const Layer *layer, const float *x, int head, int position) {
    int D = m->D;
    float y[m->K * D]; /* multiply() fills the rows of this head */
    multiply(&layer->k_proj, x, y, head * D, (head + 1) * D);
    rotate(y + head * D, m->cos, m->sin, D);
    to_cache(m, layer->keys, head, position, y + head * D);
}

static void project_value(const Model *m, const Layer *layer, const float *x, int head, int position) {
    int D = m->D;
    float y[m->K * D];
    multiply(&layer->v_proj, x, y, head * D, (head + 1) * D);
    to_cache(m, layer->values, head, position, y + head * D);
}

/* ---------------------------------------------------------------------------------------------------------------------
   the whole: each thread does its share of the rows, and waits for the others where the next part needs all of them */

#define SHARE(n, i) for (int i = (long)(n) * thread / threads, i##_end = (long)(n) * (thread + 1) / threads; i < i##_end; i++)

void step(const Model *m, int token, int position, float *logits) {
    int C = m->C, I = m->I, H = m->H, K = m->K, blocks = position / BLOCK + 1;
    float *x = m->x; /* the residual stream */

    /* the token's row of the embedding */
    for (int i = 0; i < C; i++) {
        const Matrix *e = &m->embed_tokens;
        x[i] = load(e->kind, e->data, (long)token * C + i) * (e->kind == INT8 ? e->scale[token] : 1.0f);
    }
#pragma omp parallel num_threads(m->threads)
    {
        int thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
        float normed[C], y[C > I ? C : I], attended[H * m->D]; /* each thread computes its own, and waits for nobody */
        int c0 = (long)C * thread / threads, c1 = (long)C * (thread + 1) / threads; /* this thread's rows of C, I, V */
        int i0 = (long)I * thread / threads, i1 = (long)I * (thread + 1) / threads;
        int v0 = (long)m->V * thread / threads, v1 = (long)m->V * (thread + 1) / threads;

        for (int l = 0; l < m->L; l++) {
            const Layer *layer = m->layers + l;

            /* the norm before attention */
            rms_norm(x, layer->input_layernorm, m->eps, C, normed);

            /* query, key and value of this position, head by head, rotated; key and value go to the cache */
            SHARE(H + 2 * K, head) {
                if (head < H) project_query(m, layer, normed, head);
                else if (head < H + K) project_key(m, layer, normed, head - H, position);
                else project_value(m, layer, normed, head - H - K, position);
            }
#pragma omp barrier

            /* attention over all positions up to this one, a block of them at a time */
            SHARE(K * blocks, i) attend(m, layer, i % K, i / K, position);
#pragma omp barrier

            /* the output projection, added to the residual stream */
            merge(m, blocks, attended);
            multiply(&layer->o_proj, attended, y, c0, c1);
            for (int i = c0; i < c1; i++) x[i] += y[i];
#pragma omp barrier

            /* the norm before the MLP */
            rms_norm(x, layer->post_attention_layernorm, m->eps, C, normed);

            /* SwiGLU: silu(gate) * up, where silu(g) = g / (1 + e^-g) */
            multiply(&layer->gate_proj, normed, m->hidden, i0, i1);
            multiply(&layer->up_proj, normed, y, i0, i1);
            for (int i = i0; i < i1; i++) m->hidden[i] *= y[i] / (1.0f + expf(-m->hidden[i]));
#pragma omp barrier

            /* the down projection, added to the residual stream */
            multiply(&layer->down_proj, m->hidden, y, c0, c1);
            for (int i = c0; i < c1; i++) x[i] += y[i];
#pragma omp barrier
        }

        /* the last norm, and the head */
        rms_norm(x, m->norm, m->eps, C, normed);
        multiply(&m->head, normed, logits, v0, v1);
    }
}
