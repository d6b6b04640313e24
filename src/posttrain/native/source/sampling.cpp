// The next token of each row, drawn from its logits by one random number (rollout/sampling.py has the same in torch).

#include <algorithm>

#include "common.h"

namespace {

constexpr long BLOCK = 256;  // tokens whose probabilities are summed first

struct Row {
    const Number* logits;
    long count;
    __m512 temperature, top;

    __m512 scaled(long at, __mmask16 some) const {
        const __m512 z = _mm512_div_ps(load(logits + at, some), temperature);
        return _mm512_mask_blend_ps(some, _mm512_set1_ps(-INFINITY), z);
    }
    __m512 weights(long at) const {  // e to the scaled logits, less the largest; 0 beyond the end
        const __mmask16 some = first(count - at);
        return _mm512_maskz_mov_ps(some, exponential(_mm512_sub_ps(scaled(at, some), top)));
    }
    float largest() const {
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (long at = 0; at < count; at += LANES) most = _mm512_max_ps(most, scaled(at, first(count - at)));
        return _mm512_reduce_max_ps(most);
    }
    double block(long begin) const {
        __m512 sum = _mm512_setzero_ps();
        for (long at = begin; at < std::min(begin + BLOCK, count); at += LANES) sum = _mm512_add_ps(sum, weights(at));
        return _mm512_reduce_add_ps(sum);
    }
};

double below(double value, double end) { return std::min(value, std::nextafter(end, 0.0)); }

// The place of the last sum if all are NaN.
long place(const double* upto, long count, double target) {
    return std::min<long>(std::upper_bound(upto, upto + count, target) - upto, count - 1);
}

}  // namespace

extern "C" {

// `token` and its log-probability `logp` for each row of logits (rows, count); a row that is not finite has NaN there.
void posttrain_draw(const Number* logits, const double* number, int64_t* token, float* logp, long rows, long count,
                    float temperature) {
    const long blocks = (count + BLOCK - 1) / BLOCK;
    one_by_one(rows, [=](long i) {
        thread_local Scratch scratch;
        scratch.begin(Scratch::bytes<double>(blocks));
        double* upto = scratch.take<double>(blocks);
        Row row{logits + i * count, count, _mm512_set1_ps(temperature), _mm512_setzero_ps()};
        const float top = row.largest();
        row.top = _mm512_set1_ps(top);
        double total = 0;
        for (long b = 0; b < blocks; ++b) upto[b] = total += row.block(b * BLOCK);
        const double target = below(number[i] * total, total);
        const long chosen = place(upto, blocks, target), begin = chosen * BLOCK, size = std::min(BLOCK, count - begin);
        double inner[BLOCK], sum = 0;
        for (long at = 0; at < size; at += LANES) {
            float weight[LANES];
            _mm512_storeu_ps(weight, row.weights(begin + at));
            for (long j = 0; j < std::min(LANES, size - at); ++j) inner[at + j] = sum += weight[j];
        }
        token[i] = begin + place(inner, size, below(target - (chosen > 0 ? upto[chosen - 1] : 0.0), sum));
        logp[i] = scalar(logits[i * count + token[i]]) / temperature - top - std::log(total);
    });
}
}
