// A step of decoding: one new token of every row through all layers, in one call.
//
// What costs is reading the weights, so each is read once, as fast as memory gives them: in strips of 16 outputs
// (`linear`), with everything that belongs to a product done on the way - bias, adapters, what the result is added to.
//
// A page holds PAGE tokens for all layers; for one layer and key head first their keys packed across (size, PAGE), then
// their values packed down (PAGE, size), in 32-bit words (products.h). A row's pages are its prompt's, which
// its group shares, and its own; each says how many tokens are in it, and the new token is the last of the last page.

#include <algorithm>

#include "elementwise.h"
#include "products.h"

namespace {

constexpr long PAGE = 64;

thread_local Scratch scratch;  // of whoever attends
thread_local Scratch whole;    // of a call: it is there while others attend

struct Product {
    const uint32_t* weight;  // strips: (out / 16, words of in, 16), the last one filled up with zeros
    const Number* bias;      // or null
    const uint32_t *a, *b;   // adapters as strips too: (rank, in) and (out, rank); the rank a multiple of 16, or 0
    long in, out, rank;
};

struct Layer {
    const Number *norm, *query_norm, *key_norm, *second_norm;  // those of queries and keys may be null
    Product qkv, back, gate_up, down;
    float epsilon, head_epsilon, second_epsilon;
};

constexpr long ROWS = 16;  // at a time: as many sums as there are registers to spare

template <int R>
inline void strip_of(const uint32_t* x, long ld, const uint32_t* w, long count, __m512* sums) {
    __m512 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = sums[r];
    for (long k = 0; k < count; ++k) {
        const Words right = load_words(w + k * LANES);
        _mm_prefetch(reinterpret_cast<const char*>(w + (k + 64) * LANES), _MM_HINT_T0);
        for (int r = 0; r < R; ++r) sum[r] = dot(sum[r], everywhere(x[r * ld + k]), right);
    }
    for (int r = 0; r < R; ++r) sums[r] = sum[r];
}

template <int R>
inline void strip(long rows, const uint32_t* x, long ld, const uint32_t* w, long count, __m512* sums) {
    if (rows == R) return strip_of<R>(x, ld, w, count, sums);
    if constexpr (R > 1) strip<R - 1>(rows, x, ld, w, count, sums);
}

// y (rows, out) = x W' + bias + inner B' + plus, in fp32 until it is rounded; `plus` may be y.
void outputs(const Product& p, const Number* x, const Number* inner, const Number* plus, Number* y, long rows) {
    in_shares(up(p.out, LANES) / LANES, [&](long begin, long end, long) {
        for (long at = begin; at < end; ++at) {
            const long column = at * LANES;
            const __mmask16 some = first(p.out - column);
            const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : load(p.bias + column, some);
            for (long row = 0; row < rows; row += ROWS) {
                const long count = std::min(ROWS, rows - row);
                __m512 sums[ROWS];
                for (long r = 0; r < count; ++r)
                    sums[r] = plus == nullptr ? bias : _mm512_add_ps(bias, load(plus + (row + r) * p.out + column, some));
                strip<ROWS>(count, words_of(x + row * p.in), words(p.in), p.weight + at * LANES * words(p.in), words(p.in),
                            sums);
                if (inner != nullptr)
                    strip<ROWS>(count, words_of(inner + row * p.rank), words(p.rank), p.b + at * LANES * words(p.rank),
                                words(p.rank), sums);
                for (long r = 0; r < count; ++r) store(y + (row + r) * p.out + column, sums[r], some);
            }
        }
    });
}

// With the adapters' inner product, which is rounded, in `inner` (rows, rank).
void linear(const Product& p, const Number* x, const Number* plus, Number* y, long rows, Number* inner) {
    if (p.rank > 0) outputs(Product{p.a, nullptr, nullptr, nullptr, p.in, p.rank, 0}, x, nullptr, nullptr, inner, rows);
    outputs(p, x, p.rank > 0 ? inner : nullptr, plus, y, rows);
}

struct Heads {
    long heads, groups, size;
    float scale, epsilon;
    const Number *query_norm, *key_norm;
    long per_group() const { return heads / groups; }
};

// One head normed if there is a norm, turned by (cos, sin), and rounded.
void turn(const Number* x, const Number* norm, const Number* cos, const Number* sin, const Heads& h, Number* out) {
    const long half = h.size / 2;
    float one_over = 1.0f;
    if (norm != nullptr) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < h.size; i += LANES) {
            const __m512 v = load(x + i);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        one_over = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / h.size + h.epsilon);
    }
    auto read = [&](long i, __mmask16 some) {
        const __m512 v = load(x + i, some);
        if (norm == nullptr) return v;
        const __m512 normed = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(one_over)), load(norm + i, some));
        return rounded(normed);
    };
    for (long i = 0; i < half; i += LANES) {
        const __mmask16 some = first(half - i);
        const __m512 a = read(i, some), b = read(half + i, some);
        const __m512 c1 = load(cos + i, some), c2 = load(cos + half + i, some);
        store(out + i, _mm512_fnmadd_ps(b, load(sin + i, some), _mm512_mul_ps(a, c1)), some);
        store(out + half + i, _mm512_fmadd_ps(a, load(sin + half + i, some), _mm512_mul_ps(b, c2)), some);
    }
}

void put(const Number* key, const Number* value, long size, long slot, uint32_t* keys, uint32_t* values) {
    for (long word = 0; word < words(size); ++word) std::memcpy(keys + word * PAGE + slot, key + PER_WORD * word, 4);
    Number* to = reinterpret_cast<Number*>(values + slot / PER_WORD * size) + slot % PER_WORD;
    for (long i = 0; i < size; ++i) to[PER_WORD * i] = value[i];
}

// Scores of a page's first `count` places to exponentials; the others to zeros. Returns their sum.
float exponentials(float* score, long count, float scale, float top) {
    const __m512 scales = _mm512_set1_ps(scale), tops = _mm512_set1_ps(top);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < PAGE; i += LANES) {
        const __mmask16 some = count - i <= 0 ? 0 : first(count - i);
        const __m512 shifted = _mm512_fmsub_ps(_mm512_loadu_ps(score + i), scales, tops);
        const __m512 e = _mm512_maskz_mov_ps(some, exponential(shifted));
        _mm512_storeu_ps(score + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return _mm512_reduce_add_ps(sum);
}

float largest(const float* score, long count) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (long i = 0; i < count; i += LANES)
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, first(count - i), score + i));
    return _mm512_reduce_max_ps(most);
}

void attend(const Number* row, const Number* cos, const Number* sin, uint32_t* const* pages, const int32_t* counts,
            long most, long layer, long group, const Heads& h, Number* out) {
    const long size = h.size, members = h.per_group(), all_keys = words(PAGE) * size;
    long used = 0;
    while (used < most && counts[used] > 0) ++used;
    scratch.begin(Scratch::bytes<Number>((members + 1) * size) + Scratch::bytes<float>(members * used * PAGE) +
                  Scratch::bytes<Number>(members * used * PAGE) + Scratch::bytes<float>(members * size));
    Number* query = scratch.take<Number>((members + 1) * size);
    float* score = scratch.take<float>(members * used * PAGE);
    Number* weight = scratch.take<Number>(members * used * PAGE);
    float* sum = scratch.take<float>(members * size);
    for (long m = 0; m < members; ++m)
        turn(row + (group * members + m) * size, h.query_norm, cos, sin, h, query + m * size);
    Number* key = query + members * size;
    turn(row + (h.heads + group) * size, h.key_norm, cos, sin, h, key);
    const long at = (layer * h.groups + group) * 2 * all_keys;
    uint32_t* last = pages[used - 1] + at;
    put(key, row + (h.heads + h.groups + group) * size, size, counts[used - 1] - 1, last, last + all_keys);
    const long ld = used * PAGE;
    for (long p = 0; p < used; ++p)
        product<false>(words_of(query), words(size), 1, pages[p] + at, PAGE, score + p * PAGE, ld, members,
                       up(counts[p], LANES), words(size));
    for (long m = 0; m < members; ++m) {
        float *own = score + m * ld, top = -INFINITY, total = 0;
        for (long p = 0; p < used; ++p) top = std::max(top, largest(own + p * PAGE, counts[p]));
        for (long p = 0; p < used; ++p) total += exponentials(own + p * PAGE, counts[p], h.scale, top * h.scale);
        const __m512 inverse = _mm512_set1_ps(1.0f / total);
        for (long i = 0; i < ld; i += LANES) store(weight + m * ld + i, _mm512_mul_ps(_mm512_loadu_ps(own + i), inverse));
    }
    std::memset(sum, 0, members * size * sizeof(float));
    for (long p = 0; p < used; ++p)
        product<true>(words_of(weight + p * PAGE), words(ld), 1, pages[p] + at + all_keys, size, sum, size, members, size,
                      words(counts[p]));
    for (long m = 0; m < members; ++m)
        for (long i = 0; i < size; i += LANES)
            store(out + (group * members + m) * size + i, _mm512_loadu_ps(sum + m * size + i));
}

}  // namespace

extern "C" {

// y (rows, out) = x W' + bias + (x A') B' + plus; `bias` and `plus` may be null.
void posttrain_linear(const Number* x, const uint32_t* weight, const Number* bias, const uint32_t* a, const uint32_t* b,
                      const Number* plus, Number* y, long rows, long in, long out, long rank) {
    Scratch& own = whole;
    own.begin(Scratch::bytes<Number>(rows * rank));
    linear(Product{weight, bias, a, b, in, out, rank}, x, plus, y, rows, own.take<Number>(rows * rank));
}

// x (rows, width) through all layers, in place. `cos` and `sin` (rows, size); `pages` and `counts` (rows, most), unused
// places with a count of 0.
void posttrain_decode(Number* x, const Layer* layers, long count, const Number* cos, const Number* sin,
                      uint32_t* const* pages, const int32_t* counts, long rows, long width, long most, long heads,
                      long groups, long size, float scale) {
    long widest = 0, rank = 0, inner_width = 0;
    for (long i = 0; i < count; ++i) {
        widest = std::max({widest, layers[i].qkv.out, layers[i].gate_up.out});
        inner_width = std::max({inner_width, layers[i].back.in, layers[i].down.in});
        rank = std::max({rank, layers[i].qkv.rank, layers[i].back.rank, layers[i].gate_up.rank, layers[i].down.rank});
    }
    Scratch& own = whole;
    own.begin(Scratch::bytes<Number>(rows * width) + Scratch::bytes<Number>(rows * widest) +
              Scratch::bytes<Number>(rows * inner_width) + Scratch::bytes<Number>(rows * rank));
    Number* normed = own.take<Number>(rows * width);
    Number* joined = own.take<Number>(rows * widest);
    Number* between = own.take<Number>(rows * inner_width);
    Number* inner = own.take<Number>(rows * rank);
    for (long i = 0; i < count; ++i) {
        const Layer& layer = layers[i];
        const Heads h{heads, groups, size, scale, layer.head_epsilon, layer.query_norm, layer.key_norm};
        posttrain_norm(x, layer.norm, normed, nullptr, rows, width, layer.epsilon);
        linear(layer.qkv, normed, nullptr, joined, rows, inner);
        one_by_one(rows * groups, [&](long item) {
            const long row = item / groups;
            attend(joined + row * layer.qkv.out, cos + row * size, sin + row * size, pages + row * most,
                   counts + row * most, most, i, item % groups, h, between + row * heads * size);
        });
        linear(layer.back, between, x, x, rows, inner);
        posttrain_norm(x, layer.second_norm, normed, nullptr, rows, width, layer.second_epsilon);
        linear(layer.gate_up, normed, nullptr, joined, rows, inner);
        const long half = layer.gate_up.out / 2;
        posttrain_gated(joined, joined + half, between, rows, half, layer.gate_up.out);
        linear(layer.down, between, x, x, rows, inner);
    }
}
}
