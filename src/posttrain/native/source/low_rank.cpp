// LoRA's products (arXiv 2106.09685), which are too slim for a library of matrix products: their time is that of reading
// the activations, so each is read once for two products, by blocks of rows that stay in the processor's cache.
//
// In bf16 only: in fp32 the libraries of matrix products are quicker.

#ifndef POSTTRAIN_FP32

#include <algorithm>

#include "products.h"

namespace {

constexpr long ROWS = 48, COLUMNS = 256;

thread_local Scratch scratch;  // of a thread's block
thread_local Scratch whole;    // of a call

// inner = x left, rounded; y += inner right. `left` (in / 2, rank) and `right` (rank / 2, out) are packed.
void both(const Number* x, const uint32_t* left, const uint32_t* right, Number* inner, Number* y, long rows, long in,
          long rank, long out) {
    in_shares((rows + ROWS - 1) / ROWS, [=](long first_block, long last_block, long) {
        const long widest = std::max(rank, COLUMNS);
        scratch.begin(Scratch::bytes<float>(ROWS * widest));
        float* sum = scratch.take<float>(ROWS * widest);
        for (long begin = first_block * ROWS; begin < std::min(rows, last_block * ROWS); begin += ROWS) {
            const long count = std::min(ROWS, rows - begin);
            Number* middle = inner + begin * rank;
            product<false>(words_of(x + begin * in), in / 2, 1, left, rank, sum, rank, count, rank, in / 2);
            for (long i = 0; i < count * rank; i += LANES) store(middle + i, _mm512_loadu_ps(sum + i));
            for (long column = 0; column < out; column += COLUMNS) {
                const long width = std::min(COLUMNS, out - column);
                product<false>(words_of(middle), rank / 2, 1, right + column, out, sum, width, count, width, rank / 2);
                for (long r = 0; r < count; ++r)
                    for (long i = 0; i < width; i += LANES) {
                        Number* at = y + (begin + r) * out + column + i;
                        store(at, _mm512_add_ps(load(at), _mm512_loadu_ps(sum + r * width + i)));
                    }
            }
        }
    });
}

}  // namespace

extern "C" {

// y (rows, out) += (x A') B', for A (rank, in) and B (out, rank); `inner` (rows, rank) takes x A'. All widths are
// multiples of 16.
void posttrain_low_rank(const Number* x, const Number* a, const Number* b, Number* inner, Number* y, long rows, long in,
                        long rank, long out) {
    whole.begin(Scratch::bytes<uint32_t>(in / 2 * rank) + Scratch::bytes<uint32_t>(rank / 2 * out));
    uint32_t* left = whole.take<uint32_t>(in / 2 * rank);
    uint32_t* right = whole.take<uint32_t>(rank / 2 * out);
    pack_across(a, in, rank, in, left, rank);
    pack_across(b, rank, out, rank, right, out);
    both(x, left, right, inner, y, rows, in, rank, out);
}

// The way back: grad_x (rows, in) += (grad B) A, and `inner` (rows, rank) takes grad B.
void posttrain_low_rank_backward(const Number* grad, const Number* a, const Number* b, Number* inner, Number* grad_x,
                                 long rows, long in, long rank, long out) {
    whole.begin(Scratch::bytes<uint32_t>(out / 2 * rank) + Scratch::bytes<uint32_t>(rank / 2 * in));
    uint32_t* left = whole.take<uint32_t>(out / 2 * rank);
    uint32_t* right = whole.take<uint32_t>(rank / 2 * in);
    pack_down(b, rank, out, rank, left, rank, 0);
    pack_down(a, in, rank, in, right, in, 0);
    both(grad, left, right, inner, grad_x, rows, out, rank, in);
}

// sums (rank, width) in fp32 = inner' x, over all rows in their order.
void posttrain_low_rank_sums(const Number* inner, const Number* x, float* sums, long rows, long rank, long width) {
    whole.begin(Scratch::bytes<uint32_t>(up(rows, 2) / 2 * rank));
    uint32_t* left = whole.take<uint32_t>(up(rows, 2) / 2 * rank);
    pack_down(inner, rank, rows, rank, left, rank, 0);
    in_shares(width / LANES, [=](long begin, long end, long) {
        scratch.begin(Scratch::bytes<uint32_t>(ROWS / 2 * COLUMNS));
        uint32_t* right = scratch.take<uint32_t>(ROWS / 2 * COLUMNS);
        for (long column = begin * LANES; column < end * LANES; column += COLUMNS) {
            const long count = std::min(COLUMNS, end * LANES - column);
            for (long r = 0; r < rank; ++r) std::memset(sums + r * width + column, 0, count * sizeof(float));
            for (long row = 0; row < rows; row += ROWS) {
                const long some = std::min(ROWS, rows - row);
                pack_down(x + row * width + column, width, some, count, right, count, 0);
                product<true>(left + row / 2 * rank, 1, rank, right, count, sums + column, width, rank, count,
                              (some + 1) / 2);
            }
        }
    });
}
}

#endif
