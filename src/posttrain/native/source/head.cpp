// What the head asks of a row of logits, in three passes over memory that is in the processor's cache.

#include "common.h"

extern "C" {

// Per row of `logits` (rows, size), taken `times`: log p of the target, whether it is the likeliest, the entropy, the
// mean logit and the log of the sum of squared probabilities; each but the first two may be null. Unless `factor` (rows)
// is null, `factor (p - onehot of the target)` is written over the logits.
void posttrain_head(Number* logits, const int64_t* target, const float* factor, float* logp, uint8_t* is_top,
                    float* entropy, float* mean, float* collision, long rows, long size, float times) {
    in_shares(rows, [=](long begin, long end, long) {
        const __m512 scale = _mm512_set1_ps(times);
        for (long row = begin; row < end; ++row) {
            Number* z = logits + row * size;
            __m512 most = _mm512_set1_ps(-INFINITY);
            for (long i = 0; i < size; i += LANES) {
                const __mmask16 some = first(size - i);
                most = _mm512_mask_max_ps(most, some, most, _mm512_mul_ps(load(z + i, some), scale));
            }
            const float top = _mm512_reduce_max_ps(most);
            const __m512 tops = _mm512_set1_ps(top);
            __m512 sum = _mm512_setzero_ps(), weighted = sum, squares = sum, plain = sum;
            for (long i = 0; i < size; i += LANES) {
                const __mmask16 some = first(size - i);
                const __m512 below = _mm512_sub_ps(_mm512_mul_ps(load(z + i, some), scale), tops);
                const __m512 e = _mm512_maskz_mov_ps(some, exponential(below));
                sum = _mm512_add_ps(sum, e);
                weighted = _mm512_fmadd_ps(e, _mm512_maskz_mov_ps(some, below), weighted);
                squares = _mm512_fmadd_ps(e, e, squares);
                plain = _mm512_add_ps(plain, _mm512_maskz_mov_ps(some, below));
            }
            const float total = _mm512_reduce_add_ps(sum), log_total = std::log(total);
            const float chosen = scalar(z[target[row]]) * times;
            logp[row] = chosen - top - log_total;
            is_top[row] = chosen >= top;
            if (entropy != nullptr) entropy[row] = log_total - _mm512_reduce_add_ps(weighted) / total;
            if (mean != nullptr) mean[row] = top + _mm512_reduce_add_ps(plain) / size;
            if (collision != nullptr) collision[row] = std::log(_mm512_reduce_add_ps(squares)) - 2 * log_total;
            if (factor == nullptr) continue;
            const __m512 shift = _mm512_set1_ps(top + log_total), factors = _mm512_set1_ps(factor[row]);
            for (long i = 0; i < size; i += LANES) {
                const __mmask16 some = first(size - i);
                const __m512 p = exponential(_mm512_fmsub_ps(load(z + i, some), scale, shift));
                store(z + i, _mm512_mul_ps(p, factors), some);
            }
            const float off = factor[row] * (std::exp(logp[row]) - 1.0f);
            store(z + target[row], _mm512_set1_ps(off), 1);
        }
    });
}
}
