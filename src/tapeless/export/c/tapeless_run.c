/* See tapeless_run.h. */
#include "tapeless_run.h"

#include <math.h>

#include "tapeless_model.h"
#include "tapeless_ops.h"

/* ------------------------------------------------------------ random numbers */

#if TL_RANDOM == TL_PYTHON
/* Python's random: the Mersenne Twister of Matsumoto and Nishimura 1998, seeded by an array of one number. */

static uint32_t words[624];
static int next_word;

static void seed_random(uint32_t seed)
{
    words[0] = 19650218u;
    for (int i = 1; i < 624; i++)
        words[i] = 1812433253u * (words[i - 1] ^ (words[i - 1] >> 30)) + (uint32_t)i;
    int i = 1;
    for (int k = 0; k < 624; k++) {
        words[i] = (words[i] ^ ((words[i - 1] ^ (words[i - 1] >> 30)) * 1664525u)) + seed;
        if (++i == 624) {
            words[0] = words[623];
            i = 1;
        }
    }
    for (int k = 0; k < 623; k++) {
        words[i] = (words[i] ^ ((words[i - 1] ^ (words[i - 1] >> 30)) * 1566083941u)) - (uint32_t)i;
        if (++i == 624) {
            words[0] = words[623];
            i = 1;
        }
    }
    words[0] = 0x80000000u;
    next_word = 624;
}

static uint32_t random_word(void)
{
    if (next_word == 624) {
        for (int i = 0; i < 624; i++) {
            const uint32_t y = (words[i] & 0x80000000u) | (words[(i + 1) % 624] & 0x7fffffffu);
            words[i] = words[(i + 397) % 624] ^ (y >> 1) ^ (y & 1u ? 0x9908b0dfu : 0u);
        }
        next_word = 0;
    }
    uint32_t y = words[next_word++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

#if TL_GENERATES || TL_DRAWS_WEIGHTS
/* 53 random bits */
static uint64_t random_bits(void)
{
    const uint64_t high = random_word() >> 5;
    return (high << 26) | (random_word() >> 6);
}

static float uniform(void)
{
    return (float)random_bits() * 0x1p-53f;
}
#endif

#if TL_TRAINS
/* A whole number below n: as many bits as n has, until they are below it */
static uint32_t below(uint32_t n)
{
    int shift = 32;
    for (uint32_t m = n; m; m >>= 1)
        shift--;
    uint32_t r = random_word() >> shift;
    while (r >= n)
        r = random_word() >> shift;
    return r;
}
#endif

#elif TL_RANDOM == TL_XORSHIFT32
/* Marsaglia 2003, "Xorshift RNGs", section 4. Zero would stay zero. */

static uint32_t state;

static void seed_random(uint32_t seed)
{
    state = seed ? seed : 2463534242u;
}

static uint32_t random_word(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

#if TL_GENERATES || TL_DRAWS_WEIGHTS
static float uniform(void)
{
    return (float)random_word() * 0x1p-32f;
}
#endif

#if TL_TRAINS
static uint32_t below(uint32_t n)
{
    return random_word() % n;
}
#endif

#else
/* NumPy's PCG64, from where it stood after it drew the weights. O'Neill 2014, "PCG", section 6. */

static uint64_t state_high, state_low;

static void seed_random(uint32_t seed)
{
    state_high = TL_PCG_STATE_HIGH;
    state_low = TL_PCG_STATE_LOW;
    if (seed != TL_SEED)
        state_low ^= (uint64_t)seed * 0x9e3779b97f4a7c15u;
}

static uint64_t product_high(uint64_t a, uint64_t b)
{
    const uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
    const uint64_t middle = a1 * b0 + ((a0 * b0) >> 32), other = a0 * b1 + (middle & 0xffffffffu);
    return a1 * b1 + (middle >> 32) + (other >> 32);
}

static uint64_t random_bits(void)
{
    const uint64_t high = 0x2360ed051fc65da4u, low = 0x4385df649fccf645u; /* the multiplier */
    state_high = state_high * low + state_low * high + product_high(state_low, low) + TL_PCG_INC_HIGH;
    state_low *= low;
    state_low += TL_PCG_INC_LOW;
    state_high += state_low < TL_PCG_INC_LOW;
    const uint64_t folded = state_high ^ state_low;
    const int turn = (int)(state_high >> 58);
    return ((folded >> turn) | (folded << ((64 - turn) & 63))) >> 11;
}

#if TL_GENERATES
static float uniform(void)
{
    return (float)random_bits() * 0x1p-53f;
}
#endif

#if TL_TRAINS
static uint32_t below(uint32_t n)
{
    return (uint32_t)(random_bits() % n);
}
#endif
#endif

#if TL_DRAWS_WEIGHTS
/* Box and Muller: two numbers from the normal distribution out of two uniform ones */

static float spare;
static int has_spare;

float tl_gauss(void)
{
    if (has_spare) {
        has_spare = 0;
        return spare;
    }
#if TL_RANDOM == TL_PYTHON
    const float angle = 6.2831853f * uniform();
    const float r = sqrtf(-2.0f * logf((float)((UINT64_C(1) << 53) - random_bits()) * 0x1p-53f));
#else
    float u = uniform();
    while (u <= 1e-10f)
        u = uniform();
    const float angle = 6.2831853f * uniform();
    const float r = sqrtf(-2.0f * logf(u));
#endif
    spare = r * sinf(angle);
    has_spare = 1;
    return r * cosf(angle);
}
#endif

/* ------------------------------------------------------------ training */

#if TL_TRAINS
static uint32_t first_document;

/* Where document i begins, and how many of its positions are trained on */
static const tl_token *document(uint32_t i, int *n)
{
    const tl_token *d = tl_stream + tl_places[i / TL_PLACES_EVERY];
    for (uint32_t skip = i % TL_PLACES_EVERY; skip > 0; skip--)
        do
            d++;
        while (*d != TL_BOS);
    *n = 1;
    while (d[*n] != TL_BOS)
        (*n)++;
    return d;
}

/* The document at this place of the order. In flash they lie in shuffled order already. */
static uint32_t choose(uint32_t place)
{
#if TL_ORDER_DRAW
    int n;
    uint32_t i;
    (void)place;
    do {
        i = below(TL_DOCUMENTS);
        document(i, &n);
    } while (n > TL_BLOCK);
    return i;
#else
    return (first_document + place) % TL_DOCUMENTS;
#endif
}

/* See tapeless.optim.learning_rates. */
static float learning_rate(int step)
{
    float shape = 1.0f;
#if TL_SCHEDULE != TL_CONSTANT
    const float r = (float)(step - TL_WARMUP) / (float)(TL_STEPS > TL_WARMUP ? TL_STEPS - TL_WARMUP : 1);
#if TL_SCHEDULE == TL_LINEAR
    shape = 1.0f - r;
#else
    shape = 0.5f * (1.0f + cosf(3.1415927f * r));
#endif
#endif
#if TL_WARMUP > 0
    if (step < TL_WARMUP)
        return TL_LR * (float)(step + 1) / (float)TL_WARMUP;
#endif
    (void)step;
    return TL_MIN_LR + (TL_LR - TL_MIN_LR) * shape;
}

float tl_train(int step)
{
    static uint32_t chosen[TL_BATCH];
    int n, tokens = 0;
    float loss = 0;
    for (int i = 0; i < TL_BATCH; i++) {
        chosen[i] = choose((uint32_t)step * TL_BATCH + (uint32_t)i);
        document(chosen[i], &n);
        tokens += n > TL_BLOCK ? TL_BLOCK : n;
    }
    for (int i = 0; i < TL_BATCH; i++) {
        const tl_token *d = document(chosen[i], &n);
        loss += tl_step(d, n > TL_BLOCK ? TL_BLOCK : n, 1.0f / (float)tokens);
    }
    tl_optimise(learning_rate(step));
    return loss;
}
#endif

void tl_begin(uint32_t seed)
{
    seed_random(seed);
#if TL_DRAWS_WEIGHTS
    has_spare = 0;
#endif
#if TL_TRAINS
#if TL_SHUFFLE_DRAWS
    /* The shuffling is done, but its random numbers are used up. */
    for (uint32_t i = TL_DOCUMENTS; i > 1; i--)
        below(i);
#endif
    tl_weights_begin();
    first_document = seed == TL_SEED ? 0 : below(TL_DOCUMENTS);
#endif
}

/* ------------------------------------------------------------ generating */

#if TL_GENERATES
const char *tl_generate(void)
{
    static char text[TL_LONGEST_TEXT + 1];
    static tl_token last[TL_BLOCK]; /* the last tokens, which the next one is drawn from */
    int length = 0;
    last[0] = TL_START;
    for (int i = 0; i < TL_MAX_TOKENS; i++) {
        /* Learned positions end at the block: beyond it, all of the last tokens are read again. */
        float *logits = 0;
        for (int t = i < TL_BLOCK ? i : 0; t <= i && t < TL_BLOCK; t++)
            logits = tl_decode(last[t], t);
        const int token = tl_sample(logits, TL_TEMPERATURE, TL_TEMPERATURE > 0 ? uniform() : 0, TL_TOKENS);
        if (TL_IS_EOS(token))
            break;
        for (uint32_t k = tl_text_at[token]; k < tl_text_at[token + 1]; k++)
            text[length++] = (char)tl_text[k];
        if (i + 1 < TL_BLOCK) {
            last[i + 1] = (tl_token)token;
        } else {
            for (int t = 1; t < TL_BLOCK; t++)
                last[t - 1] = last[t];
            last[TL_BLOCK - 1] = (tl_token)token;
        }
    }
    text[length] = 0;
    return text;
}
#endif
