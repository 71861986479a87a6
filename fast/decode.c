/*
One token of a text, or of several, through SmolLM2 on a CPU: model.py's forward pass. step(), at the end, is all of it.

decode.py compiles this file when it is first needed and calls step(). It repeats the structs: change both. A token is
one walk over all weights, with two operations for each: in bf16 the processor waits for memory. PyTorch adds to that
some 700 calls of a few microseconds each and products made for many rows; here each thread reads its share of every
matrix from front to back. Activations are fp32, and int8 when they meet int8 weights.

Shapes: B texts, C hidden, I intermediate, H query heads, K key/value heads, G = H / K, D head dim, V vocabulary.
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

/* The loops that take the time get the kind as a constant, so that each inlined copy holds the code of one kind. */
enum { F32, BF16, INT8 };
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const void *data;   /* rows x columns, one row after the other */
    const float *scale; /* one factor per row for INT8, else NULL */
    int kind, rows, columns;
} Matrix;

typedef struct {
    const float *input_layernorm, *post_attention_layernorm;
    Matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
    void *keys, *values; /* (B, K, capacity, D): the cache of this layer */
} Layer;

typedef struct {
    int B, C, I, L, H, K, D, V, capacity, cache_kind, threads;
    float eps;
    const float *norm, *cos, *sin; /* (C), and (D) each for this position */
    Matrix embed_tokens, head;
    Layer *layers;
    float *x, *q, *hidden, *parts; /* what the threads share, each B times: C, H D, I, and for every BLOCK H (D + 2) */
} Model;

/* ---------------------------------------------------------------------------------------------------------------------
   numbers of each kind, and the sums of their products: the loops that take the time */

INLINE float load(int kind, const void *data, long i) {
    if (kind == F32) return ((const float *)data)[i];
    if (kind == INT8) return ((const int8_t *)data)[i];
    uint32_t word = (uint32_t)((const uint16_t *)data)[i] << 16; /* bf16 is the upper half of fp32 */
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE void store(int kind, void *data, long i, float value) { /* into the cache, which is fp32 or bf16 */
    uint32_t word;
    memcpy(&word, &value, 4);
    if (kind == F32) ((float *)data)[i] = value;
    else ((uint16_t *)data)[i] = (word + 0x7fff + (word >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

INLINE float dot(int kind, const void *data, long start, const float *x, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += load(kind, data, start + i) * x[i];
    return sum;
}

/* y[0], y[stride], ... = the products of one row of n weights with B vectors, which lie one after the other in x. Eight
   at a time read and widen each weight once. */
INLINE void dots(int kind, const void *row, int B, const float *x, int n, float *y, long stride) {
    for (; B >= 8; B -= 8, x += 8 * n, y += 8 * stride) {
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7)
        for (int i = 0; i < n; i++) {
            float w = load(kind, row, i);
            s0 += w * x[i], s1 += w * x[n + i], s2 += w * x[2 * n + i], s3 += w * x[3 * n + i];
            s4 += w * x[4 * n + i], s5 += w * x[5 * n + i], s6 += w * x[6 * n + i], s7 += w * x[7 * n + i];
        }
        y[0] = s0, y[stride] = s1, y[2 * stride] = s2, y[3 * stride] = s3;
        y[4 * stride] = s4, y[5 * stride] = s5, y[6 * stride] = s6, y[7 * stride] = s7;
    }
    for (; B > 0; B--, x += n, y += stride) *y = dot(kind, row, 0, x, n);
}

/* int8 weights meet activations that are int8 too, with a scale for every BYTES_BLOCK of them: four products of bytes
   and their sum are one instruction on most processors; widening the weights would take longer than reading them. */
#define BYTES_BLOCK 32
typedef float Floats __attribute__((vector_size(64), aligned(4))); /* GCC and Clang compute with these types, in */
typedef int32_t Ints __attribute__((vector_size(64), aligned(4))); /* whatever vectors the processor has */

INLINE Ints dot_of_four(Ints w, Ints x) { /* word by word: the sum of the products of its four signed bytes, exactly */
#if defined(__AVX512VNNI__) && !defined(PLAIN)
    /* the instruction wants w unsigned: w + 128 (xor 128), and the 128 x that this adds is taken off */
    __m512i a = (__m512i)w, b = (__m512i)x, zero = _mm512_setzero_si512(), top = _mm512_set1_epi8(-128);
    return (Ints)_mm512_dpbusd_epi32(zero, _mm512_xor_si512(a, top), b) - (Ints)_mm512_dpbusd_epi32(zero, top, b);
#elif defined(__AVX2__) && !defined(PLAIN)
    /* the sign of w goes to x; no w is -128 (quantize.py), so no sum of two products leaves 16 bits */
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

INLINE void to_bytes(const float *x, int n, int8_t *bytes, float *scale) { /* one scale for every four bytes: a lane */
    for (int from = 0; from < n; from += BYTES_BLOCK) {
        int to = from + BYTES_BLOCK < n ? from + BYTES_BLOCK : n;
        float largest = 0, nan = 0;
        for (int i = from; i < to; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest, nan += x[i] * 0;
        if (nan != 0) largest = 0; /* x * 0 is NaN if x is infinite or NaN: then the scale is NaN, too */
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

/* Return the address of a row of n numbers of `size` bytes, and prefetch what lies AHEAD bytes after it: the processor
   itself looks ahead only to the end of a page of 4 KB. Addresses behind the data do no harm. */
#define AHEAD 8192
INLINE const void *fetch(const void *data, long start, int n, int size) {
    const char *row = (const char *)data + start * size;
    for (long i = 0; i < n * size; i += 64) __builtin_prefetch((void *)((uintptr_t)row + AHEAD + i), 0, 2);
    return row;
}

/* rows from .. to - 1 of y = m x, for B vectors x of m->columns numbers and y of m->rows */
static void multiply(const Matrix *m, int B, const float *x, float *y, int from, int to) {
    int n = m->columns, N = m->rows, copied = m->kind == INT8 ? B * n : 4; /* no array may be empty */
    int8_t bytes[copied] ALIGNED;
    float scale[copied / 4] ALIGNED;
    for (int b = 0; b < B && m->kind == INT8; b++) to_bytes(x + b * n, n, bytes + b * n, scale + b * n / 4);
    for (long r = from; r < to && m->kind == F32; r++) dots(F32, fetch(m->data, r * n, n, 4), B, x, n, y + r, N);
    for (long r = from; r < to && m->kind == BF16; r++) dots(BF16, fetch(m->data, r * n, n, 2), B, x, n, y + r, N);
    for (long r = from; r < to && m->kind == INT8; r++) {
        const int8_t *row = fetch(m->data, r * n, n, 1);
        for (int b = 0; b < B; b++)
            y[(long)b * N + r] = dot_bytes(row, bytes + b * n, scale + b * n / 4, n) * m->scale[r];
    }
}

static void rms_norm(const float *x, int B, const float *weight, float eps, int n, float *y) {
    for (int b = 0; b < B; b++, x += n, y += n) {
        float scale = 1.0f / sqrtf(dot(F32, x, 0, x, n) / n + eps);
        for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
    }
}

static void rotate(float *x, const float *cos, const float *sin, int D) { /* RoPE: dimension i pairs with i + D/2 */
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

/* e^x for x <= 0, as 2^k e^r with a whole k and |r| <= ln(2) / 2: plain arithmetic, so that a loop of it is vectorised,
   which expf() would prevent. Off by at most 2e-7, relatively 5e-6, but no value is below e^-69: neither a softmax nor
   silu() sees the difference, and subnormal numbers would be slow. */
INLINE float exp_below_0(float x) {
    x = x < -69 ? -69 : x;
    int32_t k = x * 1.44269504f - 0.5f; /* to the nearest, x being negative */
    float r = x - k * 0.693147181f;
    float e = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041665795f + r * (0.0083334519f + r * 0.0013937f)))));
    int32_t power = (k + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return e * scale;
}

INLINE float silu(float x) {
    float e = exp_below_0(-fabsf(x));
    return x * (x < 0 ? e : 1) / (1 + e);
}

/* BLOCK positions are one piece of work. decode.py defines it; with the number of threads it would change the sums. */

INLINE void attend_in(int kind, int D, const Model *m, const Layer *layer, int b, int group, int block, int position) {
    /* One key/value head of text b with its G query heads over one block of positions, so that each is read once.
       Each query head leaves a part: the values weighted by e^(score - highest), the highest score, and the sum of the
       weights, which merge() puts together. That is FlashAttention's softmax (https://arxiv.org/abs/2205.14135). */
    int G = m->H / m->K, first = block * BLOCK, blocks = position / BLOCK + 1, size = kind == F32 ? 4 : 2;
    int n = position + 1 - first < BLOCK ? position + 1 - first : BLOCK;
    long row = ((long)(b * m->K + group) * m->capacity + first) * D;
    const float *q = m->q + (b * m->H + group * G) * D;
    float *parts = m->parts + ((long)(b * blocks + block) * m->H + group * G) * (D + 2), scale = 1.0f / sqrtf(D);
    float weights[G][BLOCK];
    for (int t = 0; t < n; t++) {
        const void *key = fetch(layer->keys, row + (long)t * D, D, size);
        for (int g = 0; g < G; g++) weights[g][t] = dot(kind, key, 0, q + g * D, D) * scale;
    }
    for (int g = 0; g < G; g++) {
        float highest = -INFINITY, sum = 0, *part = parts + g * (D + 2);
        for (int t = 0; t < n; t++) highest = weights[g][t] > highest ? weights[g][t] : highest;
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < n; t++) sum += weights[g][t] = exp_below_0(weights[g][t] - highest);
        memset(part, 0, sizeof(float) * D);
        part[D] = highest, part[D + 1] = sum;
    }
    for (int t = 0; t < n; t++) {
        const void *value = fetch(layer->values, row + (long)t * D, D, size);
        for (int g = 0; g < G; g++) {
            float weight = weights[g][t], *part = parts + g * (D + 2);
#pragma omp simd
            for (int i = 0; i < D; i++) part[i] += weight * load(kind, value, i);
        }
    }
}

static void attend(const Model *m, const Layer *layer, int b, int group, int block, int position) {
    if (m->cache_kind == F32) attend_in(F32, m->D, m, layer, b, group, block, position);
    if (m->cache_kind == BF16 && m->D == 64) attend_in(BF16, 64, m, layer, b, group, block, position);
    if (m->cache_kind == BF16 && m->D != 64) attend_in(BF16, m->D, m, layer, b, group, block, position);
}

static void merge(const Model *m, int b, int blocks, float *attended) { /* the parts of a text's blocks, to (H D) */
    int H = m->H, D = m->D;
    for (int head = 0; head < H; head++, attended += D) {
        long next = (long)H * (D + 2);
        const float *parts = m->parts + b * blocks * next + head * (D + 2);
        float highest = -INFINITY, sum = 0;
        for (int k = 0; k < blocks; k++) highest = fmaxf(highest, parts[k * next + D]);
        memset(attended, 0, sizeof(float) * D);
        for (int k = 0; k < blocks; k++) {
            const float *part = parts + k * next;
            float shrink = expf(part[D] - highest);
            sum += shrink * part[D + 1];
            for (int i = 0; i < D; i++) attended[i] += shrink * part[i];
        }
        for (int i = 0; i < D; i++) attended[i] /= sum;
    }
}

static void project(const Model *m, const Layer *layer, const float *x, int head, int position) {
    /* One head of the queries, keys or values, counted in this order: queries and keys are rotated, keys and values go
       to the cache. multiply() fills the rows of this head alone, at their place among all heads. */
    int D = m->D, H = m->H, K = m->K, query = head < H, key = !query && head < H + K;
    float own[m->B * K * D], *y = query ? m->q : own;
    int i = query ? head : (head - H) % K;
    multiply(query ? &layer->q_proj : key ? &layer->k_proj : &layer->v_proj, m->B, x, y, i * D, (i + 1) * D);
    for (int b = 0; b < m->B; b++) {
        float *one = y + (b * (query ? H : K) + i) * D;
        long row = ((long)(b * K + i) * m->capacity + position) * D;
        if (query || key) rotate(one, m->cos, m->sin, D);
        for (int j = 0; j < D && !query; j++) store(m->cache_kind, key ? layer->keys : layer->values, row + j, one[j]);
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   the whole: each thread does its share of the rows, and waits for the others when the next part needs all of them */

#define FROM_TO(n) (long)(n) * thread / threads, (long)(n) * (thread + 1) / threads /* two arguments: its share of n */
#define SHARE(n, i) for (long i = (long)(n) * thread / threads; i < (long)(n) * (thread + 1) / threads; i++)

void step(const Model *m, const int *tokens, int position, float *logits) { /* logits (B, V) */
    int B = m->B, C = m->C, I = m->I, H = m->H, K = m->K, blocks = position / BLOCK + 1;
    const Matrix *e = &m->embed_tokens;
    float *x = m->x; /* the residual stream */

    /* each token's row of the embedding; all texts are at the same position */
    for (int b = 0; b < B; b++)
        for (int i = 0; i < C; i++)
            x[b * C + i] = load(e->kind, e->data, (long)tokens[b] * C + i) * (e->scale ? e->scale[tokens[b]] : 1);
#pragma omp parallel num_threads(m->threads)
    {
        int thread = 0, threads = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
        /* a thread's own; of y it fills its share alone. Aligned: a vector across two cache lines costs double. */
        float normed[B * C] ALIGNED, attended[B * H * m->D] ALIGNED, y[B * (C > I ? C : I)] ALIGNED;

        for (int l = 0; l < m->L; l++) {
            const Layer *layer = m->layers + l;

            /* the norm before attention */
            rms_norm(x, B, layer->input_layernorm, m->eps, C, normed);

            /* query, key and value of this position, head by head, rotated; key and value go to the cache */
            SHARE(H + 2 * K, head) project(m, layer, normed, head, position);
#pragma omp barrier

            /* attention over all positions up to this one, a block of them at a time */
            SHARE(B * blocks * K, i) attend(m, layer, i / K / blocks, i % K, i / K % blocks, position);
#pragma omp barrier

            /* the output projection, added to the residual stream */
            for (int b = 0; b < B; b++) merge(m, b, blocks, attended + b * H * m->D);
            multiply(&layer->o_proj, B, attended, y, FROM_TO(C));
            for (int b = 0; b < B; b++) SHARE(C, i) x[b * C + i] += y[b * C + i];
#pragma omp barrier

            /* the norm before the MLP */
            rms_norm(x, B, layer->post_attention_layernorm, m->eps, C, normed);

            /* SwiGLU: silu(gate) * up, where silu(g) = g / (1 + e^-g) */
            multiply(&layer->gate_proj, B, normed, m->hidden, FROM_TO(I));
            multiply(&layer->up_proj, B, normed, y, FROM_TO(I));
            for (int b = 0; b < B; b++) SHARE(I, i) m->hidden[b * I + i] = silu(m->hidden[b * I + i]) * y[b * I + i];
#pragma omp barrier

            /* the down projection, added to the residual stream */
            multiply(&layer->down_proj, B, m->hidden, y, FROM_TO(C));
            for (int b = 0; b < B; b++) SHARE(C, i) x[b * C + i] += y[b * C + i];
#pragma omp barrier
        }

        /* the last norm, and the head */
        rms_norm(x, B, m->norm, m->eps, C, normed);
        multiply(&m->head, B, normed, logits, FROM_TO(m->V));
    }
}
