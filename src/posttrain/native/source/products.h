// Small matrix products with fp32 sums, and the packing that they want.
//
// They go word by word along the inner dimension: in bf16 a word holds two neighbours, which the processor multiplies and
// adds at once (vdpbf16ps), in fp32 one number. B is packed: row k holds word k of every column. A's word (m, k) stands
// at `a[m * rows + k * along]`, so that a plain row-major matrix (along = 1) and a packed one read across (rows = 1) will
// both do.

#pragma once

#include "common.h"

inline const uint32_t* words_of(const Number* p) { return reinterpret_cast<const uint32_t*>(p); }

#ifdef POSTTRAIN_FP32

using Words = __m512;

inline Words as_words(__m512i x) { return _mm512_castsi512_ps(x); }

inline __m512 dot(__m512 sum, Words a, Words b) { return _mm512_fmadd_ps(a, b, sum); }

// One vector for each number of a word.
inline __m512i joined(const __m512* x) { return _mm512_castps_si512(x[0]); }

#else

using Words = __m512bh;

inline Words as_words(__m512i x) { return reinterpret_cast<Words>(x); }

inline __m512 dot(__m512 sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, a, b); }

inline __m512i interleaved(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// One vector for each number of a word.
inline __m512i joined(const __m512* x) { return interleaved(narrow(x[0]), narrow(x[1])); }

#endif

inline Words load_words(const uint32_t* p) { return as_words(_mm512_loadu_si512(p)); }

inline Words everywhere(uint32_t word) { return as_words(_mm512_set1_epi32(static_cast<int>(word))); }

template <int R, int C, bool ADD>
inline void tile(const uint32_t* a, long rows, long along, const uint32_t* b, long ldb, float* c, long ldc, long count) {
    __m512 sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) sum[r][j] = ADD ? _mm512_loadu_ps(c + r * ldc + j * LANES) : _mm512_setzero_ps();
    for (long k = 0; k < count; ++k) {
        Words right[C];
        for (int j = 0; j < C; ++j) right[j] = load_words(b + k * ldb + j * LANES);
        for (int r = 0; r < R; ++r) {
            const Words left = everywhere(a[r * rows + k * along]);
            for (int j = 0; j < C; ++j) sum[r][j] = dot(sum[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * ldc + j * LANES, sum[r][j]);
}

template <int C, bool ADD>
inline void column(const uint32_t* a, long rows, long along, const uint32_t* b, long ldb, float* c, long ldc, long m,
                   long count) {
    for (; m >= 6; m -= 6, a += 6 * rows, c += 6 * ldc) tile<6, C, ADD>(a, rows, along, b, ldb, c, ldc, count);
    switch (m) {
        case 5: return tile<5, C, ADD>(a, rows, along, b, ldb, c, ldc, count);
        case 4: return tile<4, C, ADD>(a, rows, along, b, ldb, c, ldc, count);
        case 3: return tile<3, C, ADD>(a, rows, along, b, ldb, c, ldc, count);
        case 2: return tile<2, C, ADD>(a, rows, along, b, ldb, c, ldc, count);
        case 1: return tile<1, C, ADD>(a, rows, along, b, ldb, c, ldc, count);
        default: return;
    }
}

// C (m, n) = A B, or += with ADD; n a multiple of 16, `count` words in the inner dimension.
template <bool ADD>
inline void product(const uint32_t* a, long rows, long along, const uint32_t* b, long ldb, float* c, long ldc, long m,
                    long n, long count) {
    for (; n >= 4 * LANES; n -= 4 * LANES, b += 4 * LANES, c += 4 * LANES)
        column<4, ADD>(a, rows, along, b, ldb, c, ldc, m, count);
    switch (n / LANES) {
        case 3: return column<3, ADD>(a, rows, along, b, ldb, c, ldc, m, count);
        case 2: return column<2, ADD>(a, rows, along, b, ldb, c, ldc, m, count);
        case 1: return column<1, ADD>(a, rows, along, b, ldb, c, ldc, m, count);
        default: return;
    }
}

// Words along a row: x (n, size) to `out[word][row]`, `ld` of them a row. Sixteen rows at a time, as a transposition.
inline void pack_across(const Number* x, long stride, long n, long size, uint32_t* out, long ld) {
    const __m512i at = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(static_cast<int>(stride / PER_WORD)));
    for (long row = 0; row < n; row += LANES) {
        const __mmask16 some = first(n - row);
        const uint32_t* from = words_of(x + row * stride);
        for (long word = 0; word < size / PER_WORD; ++word)
            _mm512_mask_storeu_epi32(out + word * ld + row, some,
                                     _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), some, at, from + word, 4));
    }
}

// Words of neighbouring rows: x (n, size) to `out[row / PER_WORD][column]`; a missing last row counts as zeros. `at` is
// where it begins: its first row may be the second of a word that is there already.
inline void pack_down(const Number* x, long stride, long n, long size, uint32_t* out, long ld, long at) {
#ifdef POSTTRAIN_FP32
    for (long row = 0; row < n; ++row) std::memcpy(out + (at + row) * ld, x + row * stride, size * sizeof(Number));
#else
    for (long row = 0; row < n;) {
        uint32_t* to = out + (at + row) / 2 * ld;
        const bool joins = (at + row) % 2 == 1, single = joins || row + 1 == n;
        for (long i = 0; i < size; i += LANES) {
            const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + row * stride + i));
            if (joins) {
                const __m512i there = _mm512_loadu_si512(to + i);
                _mm512_storeu_si512(to + i, _mm512_or_si512(there, interleaved(_mm256_setzero_si256(), one)));
            } else {
                const Number* below = x + (row + 1) * stride + i;
                const __m256i two = single ? _mm256_setzero_si256()
                                           : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(below));
                _mm512_storeu_si512(to + i, interleaved(one, two));
            }
        }
        row += single ? 1 : 2;
    }
#endif
}
