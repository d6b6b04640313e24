// Causal attention of packed segments, forward and backward (arXiv 2205.14135 for what the backward pass keeps).
//
// A segment's tokens see those that it continues (a shared prompt's, and what that continues) and their own, up to
// themselves, and of these no more than the last `window` where there is one. Scores of a block of queries are written
// down in the processor's cache, never in memory, and only of what the block sees; of the soft-max one number a query is
// kept. Query heads of one key head are done by the same thread one after another. In the backward pass the segments
// that continue another are dealt out in parts (native/dealing.py), and what the parts make of its gradients is added up
// at the end, in their order.
//
// Heads are `size` wide, a multiple of 16. Tensors are given by strides of token and head, in elements.

#include <algorithm>
#include <numeric>
#include <vector>

#include "products.h"

namespace {

constexpr long BLOCK = 48;  // queries at a time

struct View {
    Number* data;
    long token, head;
    Number* at(long t, long h) const { return data + t * token + h * head; }
};

struct Segment {
    int32_t start, length, parent, before, part;  // `before`: how many tokens it continues
    long seen() const { return before + length; }
};

struct Shape {
    long heads, groups, size;
    float scale;
    long window;  // 0 where there is none
    const Segment* segments;
    long per_group() const { return heads / groups; }
    // The first place that the query at `place` sees.
    long low(long place) const { return window > 0 ? std::max(0L, place - window + 1) : 0; }
};

// Those of sixteen places from `i` on that are in [low, high).
inline __mmask16 within(long low, long high, long i) {
    if (high <= i || low >= i + LANES) return 0;
    const __mmask16 below = low <= i ? 0 : first(low - i);
    return first(high - i) & static_cast<__mmask16>(~below);
}

thread_local Scratch scratch;

// Keys or values that a segment sees, packed across or down; places up to `room` are zeros.
void gather_across(const View& x, const Segment& s, long head, const Shape& shape, uint32_t* out, long room) {
    if (s.parent >= 0) gather_across(x, shape.segments[s.parent], head, shape, out, room);
    pack_across(x.at(s.start, head), x.token, s.length, shape.size, out + s.before, room);
    for (long word = 0; word < words(shape.size); ++word)
        std::memset(out + word * room + s.seen(), 0, (room - s.seen()) * sizeof(uint32_t));
}

void gather_down(const View& x, const Segment& s, long head, const Shape& shape, uint32_t* out, long room) {
    const long size = shape.size;
    if (s.parent >= 0) gather_down(x, shape.segments[s.parent], head, shape, out, room);
    pack_down(x.at(s.start, head), x.token, s.length, size, out, size, s.before);
    std::memset(out + words(s.seen()) * size, 0, (words(room) - words(s.seen())) * size * sizeof(uint32_t));
}

// The soft-max of a row's scores in [low, high), zeros elsewhere up to `room`; returns the log of the sum of exponentials.
float softmax(const float* score, long low, long high, long room, float scale, Number* out) {
    const long begin = low / LANES * LANES;
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (long i = begin; i < high; i += LANES) {
        const __mmask16 some = within(low, high, i);
        // A NaN may get lost here; its own exponential below is NaN, and so is the sum.
        const __m512 v = _mm512_mask_loadu_ps(most, some, score + i);
        most = _mm512_max_ps(most, v);
    }
    const float top = _mm512_reduce_max_ps(most) * scale;
    const __m512 scales = _mm512_set1_ps(scale), tops = _mm512_set1_ps(top);
    float* kept = const_cast<float*>(score);
    __m512 sum = _mm512_setzero_ps();
    for (long i = begin; i < high; i += LANES) {
        const __mmask16 some = within(low, high, i);
        const __m512 e = _mm512_maskz_mov_ps(some, exponential(_mm512_fmsub_ps(_mm512_loadu_ps(score + i), scales, tops)));
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(kept + i, e);
    }
    const float total = _mm512_reduce_add_ps(sum);
    const __m512 inverse = _mm512_set1_ps(1.0f / total);
    for (long i = 0; i < room; i += LANES)
        store(out + i, i >= begin && i < high ? _mm512_mul_ps(_mm512_loadu_ps(kept + i), inverse) : _mm512_setzero_ps());
    return top + std::log(total);
}

void forward_item(const Segment& s, long group, const Shape& shape, const View& q, const View& k, const View& v,
                  const View& out, float* lse, long tokens) {
    const long size = shape.size, seen = s.seen(), room = up(seen, LANES);
    scratch.begin(Scratch::bytes<uint32_t>(words(size) * room) * 2 + Scratch::bytes<float>(BLOCK * room) +
                  Scratch::bytes<Number>(BLOCK * room) + Scratch::bytes<float>(BLOCK * size));
    uint32_t* keys = scratch.take<uint32_t>(words(size) * room);
    uint32_t* values = scratch.take<uint32_t>(words(size) * room);
    float* score = scratch.take<float>(BLOCK * room);
    Number* weight = scratch.take<Number>(BLOCK * room);
    float* sum = scratch.take<float>(BLOCK * size);
    gather_across(k, s, group, shape, keys, room);
    gather_down(v, s, group, shape, values, room);
    for (long h = group * shape.per_group(); h < (group + 1) * shape.per_group(); ++h)
        for (long begin = 0; begin < s.length; begin += BLOCK) {
            const long rows = std::min(BLOCK, s.length - begin), place = s.before + begin;
            const long from = shape.low(place) / LANES * LANES, width = up(place + rows, LANES) - from;
            product<false>(words_of(q.at(s.start + begin, h)), q.token / PER_WORD, 1, keys + from, room, score, width, rows,
                           width, words(size));
            for (long r = 0; r < rows; ++r)
                lse[h * tokens + s.start + begin + r] =
                    softmax(score + r * width, shape.low(place + r) - from, place + r + 1 - from, width, shape.scale,
                            weight + r * width);
            product<false>(words_of(weight), words(width), 1, values + words(from) * size, size, sum, size, rows, size,
                           words(width));
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < size; i += LANES)
                    store(out.at(s.start + begin + r, h) + i, _mm512_loadu_ps(sum + r * size + i));
        }
}

// What a query sees of the places that its block does.
struct Span {
    long low, high;
};

// Weights and the gradient of scores, of the queries of one word: as words for the products that sum over queries, and
// the scores' gradient by rows as well. A query that is not there gives zeros.
void softmax_backward(const float* score, const float* weight_grad, long reach, const Span* seen, int queries, float scale,
                      const float* lse, uint32_t* weight_words, uint32_t* score_words, Number* score_grad) {
    __m512 along[PER_WORD];
    float* weight = const_cast<float*>(score);
    for (int q = 0; q < queries; ++q) {
        const __m512 scales = _mm512_set1_ps(scale), logs = _mm512_set1_ps(lse[q]);
        along[q] = _mm512_setzero_ps();
        for (long i = 0; i < reach; i += LANES) {
            float* at = weight + q * reach + i;
            const __mmask16 some = within(seen[q].low, seen[q].high, i);
            const __m512 w =
                _mm512_maskz_mov_ps(some, exponential(_mm512_fmsub_ps(_mm512_loadu_ps(at), scales, logs)));
            along[q] = _mm512_fmadd_ps(w, _mm512_loadu_ps(weight_grad + q * reach + i), along[q]);
            _mm512_storeu_ps(at, w);
        }
        along[q] = _mm512_set1_ps(_mm512_reduce_add_ps(along[q]));
    }
    for (long i = 0; i < reach; i += LANES) {
        __m512 weights[PER_WORD], grads[PER_WORD];
        for (int q = 0; q < PER_WORD; ++q) weights[q] = grads[q] = _mm512_setzero_ps();
        for (int q = 0; q < queries; ++q) {
            const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(weight_grad + q * reach + i), along[q]);
            weights[q] = _mm512_loadu_ps(weight + q * reach + i);
            grads[q] = _mm512_mul_ps(weights[q], slope);
            store(score_grad + q * reach + i, grads[q]);
        }
        _mm512_storeu_si512(weight_words + i, joined(weights));
        _mm512_storeu_si512(score_words + i, joined(grads));
    }
}

struct Gradients {
    View q, k, v;
};

// One segment's share of everything; `key_grad` and `value_grad` (seen, size) are added to.
void backward_segment(const Segment& s, long group, const Shape& shape, const View& q, const View& k, const View& v,
                      const View& grad, const float* lse, long tokens, const Gradients& grads, float* key_grad,
                      float* value_grad) {
    const long size = shape.size, seen = s.seen(), room = up(seen, LANES);
    uint32_t* keys = scratch.take<uint32_t>(words(size) * room);
    uint32_t* values = scratch.take<uint32_t>(words(size) * room);
    uint32_t* keys_down = scratch.take<uint32_t>(words(size) * room);
    float* score = scratch.take<float>(BLOCK * room);
    float* weight_grad = scratch.take<float>(BLOCK * room);
    Number* score_grad = scratch.take<Number>(BLOCK * room);
    uint32_t* weight_words = scratch.take<uint32_t>(words(BLOCK) * room);
    uint32_t* score_words = scratch.take<uint32_t>(words(BLOCK) * room);
    uint32_t* queries_down = scratch.take<uint32_t>(words(BLOCK) * size);
    uint32_t* grads_down = scratch.take<uint32_t>(words(BLOCK) * size);
    float* query_grad = scratch.take<float>(BLOCK * size);
    gather_across(k, s, group, shape, keys, room);
    gather_across(v, s, group, shape, values, room);
    gather_down(k, s, group, shape, keys_down, room);
    const __m512 scales = _mm512_set1_ps(shape.scale);
    for (long h = group * shape.per_group(); h < (group + 1) * shape.per_group(); ++h)
        for (long begin = 0; begin < s.length; begin += BLOCK) {
            const long rows = std::min(BLOCK, s.length - begin), at = s.start + begin;
            const long place = s.before + begin, visible = place + rows;
            const long from = shape.low(place) / LANES * LANES, width = up(visible, LANES) - from;
            product<false>(words_of(q.at(at, h)), q.token / PER_WORD, 1, keys + from, room, score, width, rows, width,
                           words(size));
            product<false>(words_of(grad.at(at, h)), grad.token / PER_WORD, 1, values + from, room, weight_grad, width,
                           rows, width, words(size));
            for (long r = 0; r < rows; r += PER_WORD) {
                const int queries = static_cast<int>(std::min(PER_WORD, rows - r));
                Span seen_by[PER_WORD];
                for (int i = 0; i < queries; ++i) seen_by[i] = {shape.low(place + r + i) - from, place + r + i + 1 - from};
                softmax_backward(score + r * width, weight_grad + r * width, width, seen_by, queries, shape.scale,
                                 lse + h * tokens + at + r, weight_words + words(r) * width,
                                 score_words + words(r) * width, score_grad + r * width);
            }
            product<false>(words_of(score_grad), words(width), 1, keys_down + words(from) * size, size, query_grad, size,
                           rows, size, words(width));
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < size; i += LANES)
                    store(grads.q.at(at + r, h) + i, _mm512_mul_ps(_mm512_loadu_ps(query_grad + r * size + i), scales));
            pack_down(q.at(at, h), q.token, rows, size, queries_down, size, 0);
            pack_down(grad.at(at, h), grad.token, rows, size, grads_down, size, 0);
            product<true>(weight_words, 1, width, grads_down, size, value_grad + from * size, size, visible - from, size,
                          words(rows));
            product<true>(score_words, 1, width, queries_down, size, key_grad + from * size, size, visible - from, size,
                          words(rows));
        }
}

void write(const View& to, long start, long count, long head, long size, const float* from, float scale) {
    for (long n = 0; n < count; ++n)
        for (long i = 0; i < size; i += LANES)
            store(to.at(start + n, head) + i,
                  _mm512_mul_ps(_mm512_loadu_ps(from + n * size + i), _mm512_set1_ps(scale)));
}

// What one thread does of the backward pass for one key head: segments that continue `head`, and `head` itself or not.
struct Part {
    const Segment* head;
    std::vector<const Segment*> segments;
    // For each key head, its share of the gradients of keys and of values, of all tokens up to the head's last; null
    // where nobody else has any.
    float* shares = nullptr;
};

void backward_part(const Part& part, long group, const Shape& shape, const View& q, const View& k, const View& v,
                   const View& grad, const float* lse, long tokens, const Gradients& grads) {
    const long size = shape.size, before = part.head->seen();
    long longest = 0;
    for (const Segment* s : part.segments) longest = std::max(longest, s->seen());
    const long room = up(longest, LANES);
    scratch.begin(Scratch::bytes<float>(room * size) * 2 + Scratch::bytes<uint32_t>(words(size) * room) * 3 +
                  Scratch::bytes<float>(BLOCK * room) * 2 + Scratch::bytes<Number>(BLOCK * room) +
                  Scratch::bytes<uint32_t>(words(BLOCK) * room) * 2 + Scratch::bytes<uint32_t>(words(BLOCK) * size) * 2 +
                  Scratch::bytes<float>(BLOCK * size) + 4096);
    float* key_grad = scratch.take<float>(room * size);
    float* value_grad = scratch.take<float>(room * size);
    const Scratch::Mark mark = scratch.mark();
    std::memset(key_grad, 0, room * size * sizeof(float));
    std::memset(value_grad, 0, room * size * sizeof(float));
    for (const Segment* s : part.segments) {
        scratch.back_to(mark);
        backward_segment(*s, group, shape, q, k, v, grad, lse, tokens, grads, key_grad, value_grad);
        if (s == part.head) continue;
        const long own = before * size;  // what stands before it goes on growing
        write(grads.k, s->start, s->length, group, size, key_grad + own, shape.scale);
        write(grads.v, s->start, s->length, group, size, value_grad + own, 1.0f);
        std::memset(key_grad + own, 0, s->length * size * sizeof(float));
        std::memset(value_grad + own, 0, s->length * size * sizeof(float));
    }
    if (part.shares == nullptr) {
        write(grads.k, part.head->start, before, group, size, key_grad, shape.scale);
        write(grads.v, part.head->start, before, group, size, value_grad, 1.0f);
        return;
    }
    float* share = part.shares + 2 * group * before * size;
    std::memcpy(share, key_grad, before * size * sizeof(float));
    std::memcpy(share + before * size, value_grad, before * size * sizeof(float));
}

// The gradients of a segment that others continue: what all `parts` have of it, added up in their order.
void add_up(const Segment& s, const std::vector<const Part*>& parts, long group, const Shape& shape,
            const Gradients& grads) {
    const long size = shape.size, count = s.length * size;
    for (int of_values = 0; of_values < 2; ++of_values) {
        auto at = [&](const Part& part) {
            return part.shares + ((2 * group + of_values) * part.head->seen() + s.before) * size;
        };
        float* total = at(*parts[0]);
        for (size_t n = 1; n < parts.size(); ++n) {
            const float* more = at(*parts[n]);
            for (long x = 0; x < count; x += LANES)
                _mm512_storeu_ps(total + x, _mm512_add_ps(_mm512_loadu_ps(total + x), _mm512_loadu_ps(more + x)));
        }
        write(of_values ? grads.v : grads.k, s.start, s.length, group, size, total, of_values ? 1.0f : shape.scale);
    }
}

long cost(const Segment& s, const Shape& shape) {
    const long places = 2 * s.before + s.length;  // twice what a token sees on average
    return s.length * (shape.window > 0 ? std::min(places, 2 * shape.window) : places);
}

}  // namespace

extern "C" {

// `strides` are those of token and head of q, k, v and out in turn; `segments` (count, 5) as in
// native/dealing.py. `lse` (heads, tokens). `window` as in `Shape`.
void posttrain_attention(Number* q, Number* k, Number* v, Number* out, float* lse, const long* strides,
                         const int32_t* segments, long count, long tokens, long heads, long groups, long size,
                         long window, float scale) {
    const View qs{q, strides[0], strides[1]}, ks{k, strides[2], strides[3]}, vs{v, strides[4], strides[5]};
    const View outs{out, strides[6], strides[7]};
    const Segment* all = reinterpret_cast<const Segment*>(segments);
    const Shape shape{heads, groups, size, scale, window, all};
    std::vector<long> order(count);  // the longest first, so that threads end together
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return cost(all[a], shape) > cost(all[b], shape); });
    one_by_one(count * groups, [&](long i) {
        forward_item(all[order[i / groups]], i % groups, shape, qs, ks, vs, outs, lse, tokens);
    });
}

// `strides` of q, k, v, grad, and of the gradients of q, k and v. `shares` has room for those of all parts.
void posttrain_attention_backward(Number* q, Number* k, Number* v, Number* grad, const float* lse, Number* grad_q,
                                  Number* grad_k, Number* grad_v, const long* strides, float* shares,
                                  const int32_t* segments, long count, long tokens, long heads, long groups,
                                  long size, long window, float scale) {
    const View qs{q, strides[0], strides[1]}, ks{k, strides[2], strides[3]}, vs{v, strides[4], strides[5]};
    const View gs{grad, strides[6], strides[7]};
    const Gradients grads{{grad_q, strides[8], strides[9]}, {grad_k, strides[10], strides[11]},
                          {grad_v, strides[12], strides[13]}};
    const Segment* all = reinterpret_cast<const Segment*>(segments);
    const Shape shape{heads, groups, size, scale, window, all};
    std::vector<bool> is_continued(count, false);
    for (long i = 0; i < count; ++i)
        if (all[i].parent >= 0) is_continued[all[i].parent] = true;
    std::vector<Part> parts;
    for (long i = 0; i < count; ++i) {
        const Segment& s = all[i];
        if (s.part >= static_cast<long>(parts.size())) parts.resize(s.part + 1);
        parts[s.part].head = s.parent < 0 || is_continued[i] ? &s : &all[s.parent];
        parts[s.part].segments.push_back(&s);
    }
    std::vector<std::vector<const Part*>> sharing(count);  // the parts that have gradients of a segment
    for (const Part& part : parts)
        for (const Segment* s = part.head; s != nullptr; s = s->parent < 0 ? nullptr : &all[s->parent])
            sharing[s - all].push_back(&part);
    const long number = static_cast<long>(parts.size());
    for (Part& part : parts)
        if (is_continued[part.head - all]) {
            part.shares = shares;
            shares += 2 * groups * part.head->seen() * size;
        }
    std::vector<long> costs(number, 0), order(number), sums;
    for (long i = 0; i < number; ++i)
        for (const Segment* s : parts[i].segments) costs[i] += cost(*s, shape);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return costs[a] > costs[b]; });
    one_by_one(number * groups, [&](long i) {
        backward_part(parts[order[i / groups]], i % groups, shape, qs, ks, vs, gs, lse, tokens, grads);
    });
    for (long i = 0; i < count; ++i)
        if (!sharing[i].empty() && sharing[i][0]->shares != nullptr) sums.push_back(i);
    one_by_one(static_cast<long>(sums.size()) * groups, [&](long i) {
        const long index = sums[i / groups];
        add_up(all[index], sharing[index], i % groups, shape, grads);
    });
}
}
