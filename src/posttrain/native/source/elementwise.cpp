// RMS norms (arXiv 1910.07467), SwiGLU (arXiv 2002.05202) and rotary embeddings (arXiv 2104.09864), forward and backward,
// each in one pass over memory; fp32 between.

#include "common.h"

extern "C" {

// y = x / rms(x) * w; `scale` (rows) takes one over the root mean square.
void posttrain_norm(const Number* x, const Number* w, Number* y, float* scale, long rows, long width, float epsilon) {
    in_shares(rows, [=](long begin, long end, long) {
        for (long row = begin; row < end; ++row) {
            const Number* in = x + row * width;
            __m512 sum = _mm512_setzero_ps();
            for (long i = 0; i < width; i += LANES) {
                const __m512 v = load(in + i, first(width - i));
                sum = _mm512_fmadd_ps(v, v, sum);
            }
            const float one_over = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / width + epsilon);
            if (scale != nullptr) scale[row] = one_over;
            for (long i = 0; i < width; i += LANES) {
                const __mmask16 some = first(width - i);
                const __m512 v = _mm512_mul_ps(load(in + i, some), _mm512_set1_ps(one_over));
                store(y + row * width + i, _mm512_mul_ps(v, load(w + i, some)), some);
            }
        }
    });
}

// `weight_grads` (threads, width), zeroed by the caller, takes each thread's share of the weight's gradient; or null.
void posttrain_norm_backward(const Number* grad, const Number* x, const Number* w, const float* scale, Number* grad_x,
                             float* weight_grads, long rows, long width, long threads) {
    const auto share = [=](long begin, long end, long thread) {
        float* own = weight_grads == nullptr ? nullptr : weight_grads + thread * width;
        for (long row = begin; row < end; ++row) {
            const Number *g = grad + row * width, *in = x + row * width;
            const __m512 s = _mm512_set1_ps(scale[row]);
            __m512 sum = _mm512_setzero_ps();
            for (long i = 0; i < width; i += LANES) {
                const __mmask16 some = first(width - i);
                const __m512 normed = _mm512_mul_ps(load(in + i, some), s), gi = load(g + i, some);
                sum = _mm512_fmadd_ps(_mm512_mul_ps(gi, load(w + i, some)), normed, sum);
                if (own != nullptr) {
                    const __m512 before = _mm512_maskz_loadu_ps(some, own + i);
                    _mm512_mask_storeu_ps(own + i, some, _mm512_fmadd_ps(gi, normed, before));
                }
            }
            const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
            for (long i = 0; i < width; i += LANES) {
                const __mmask16 some = first(width - i);
                const __m512 normed = _mm512_mul_ps(load(in + i, some), s);
                const __m512 gw = _mm512_mul_ps(load(g + i, some), load(w + i, some));
                store(grad_x + row * width + i, _mm512_mul_ps(_mm512_fnmadd_ps(normed, along, gw), s), some);
            }
        }
    };
    in_shares(rows, share, threads);
}

// y (rows, width) = silu(gate) * up, the rows of gate and up `stride` apart.
void posttrain_gated(const Number* gate, const Number* up_, Number* y, long rows, long width, long stride) {
    in_shares(rows, [=](long begin, long end, long) {
        for (long row = begin; row < end; ++row)
            for (long i = 0; i < width; i += LANES) {
                const __mmask16 some = first(width - i);
                const __m512 g = load(gate + row * stride + i, some), u = load(up_ + row * stride + i, some);
                store(y + row * width + i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u), some);
            }
    });
}

// From the product's gradient those of gate and up, the latter written over it; and the product again, unless null.
void posttrain_gated_backward(const Number* gate, const Number* up_, Number* grad, Number* grad_gate, Number* product,
                              long count) {
    const long blocks = (count + LANES - 1) / LANES;
    in_shares(blocks, [=](long begin, long end, long) {
        const __m512 one = _mm512_set1_ps(1.0f);
        for (long block = begin; block < end; ++block) {
            const long i = block * LANES;
            const __mmask16 some = first(count - i);
            const __m512 g = load(gate + i, some), u = load(up_ + i, some), d = load(grad + i, some);
            const __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s);
            if (product != nullptr) store(product + i, _mm512_mul_ps(silu, u), some);
            // silu'(g) = s (1 + g (1 - s))
            const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
            store(grad_gate + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), some);
            store(grad + i, _mm512_mul_ps(d, silu), some);
        }
    });
}

// y (rows, heads, size) = x turned by (cos, sin) (rows, size), x's rows `stride` apart; backwards with sign -1.
void posttrain_rotate(const Number* x, const Number* cos, const Number* sin, Number* y, long rows, long heads, long size,
                      long stride, float sign) {
    const long half = size / 2;
    in_shares(rows, [=](long begin, long end, long) {
        const __m512 signs = _mm512_set1_ps(sign);
        for (long row = begin; row < end; ++row)
            for (long head = 0; head < heads; ++head) {
                const Number* in = x + row * stride + head * size;
                Number* out = y + (row * heads + head) * size;
                for (long i = 0; i < half; i += LANES) {
                    const __mmask16 some = first(half - i);
                    const Number *c = cos + row * size + i, *s = sin + row * size + i;
                    const __m512 a = load(in + i, some), b = load(in + half + i, some);
                    // The slope of y by x, turned round: the second half's sine stands with the first half's input.
                    const __m512 down = _mm512_mul_ps(load(sign > 0 ? s : s + half, some), signs);
                    const __m512 over = _mm512_mul_ps(load(sign > 0 ? s + half : s, some), signs);
                    store(out + i, _mm512_fnmadd_ps(b, down, _mm512_mul_ps(a, load(c, some))), some);
                    store(out + half + i, _mm512_fmadd_ps(a, over, _mm512_mul_ps(b, load(c + half, some))), some);
                }
            }
    });
}
}
