// What all kernels share: numbers in and out of fp32 vectors, exp, threads, scratch memory.
//
// One source for two libraries: tensors hold bf16, or fp32 with -DPOSTTRAIN_FP32. Sums are fp32 in both. What differs
// stands in the next section and in products.h, where a 32-bit word holds PER_WORD numbers: two neighbours, or one.
//
// Plain C functions over pointers, without a header of torch's, so that they compile in seconds and load into any torch.
// They need AVX-512, for bf16 with its products of pairs (AMD from Zen 4, Intel from Cooper Lake); build.py asks the
// processor first.
// Threads are those of the OpenMP library that torch has loaded, by its C interface, so that both share one pool.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
extern "C" int omp_get_max_threads();

constexpr long LANES = 16;  // fp32 numbers in a vector

inline long up(long n, long to) { return (n + to - 1) / to * to; }

// --- vectors ---------------------------------------------------------------------------------------------------------

inline __mmask16 first(long n) { return n >= LANES ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

#ifdef POSTTRAIN_FP32

using Number = float;

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

inline __m512 load(const float* p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }

inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

inline void store(float* p, __m512 x, __mmask16 some) { _mm512_mask_storeu_ps(p, some, x); }

inline __m512 rounded(__m512 x) { return x; }

inline float scalar(float x) { return x; }

#else

using Number = uint16_t;  // the upper half of an fp32 number

inline __m512 wide(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline __m512 load(const Number* p) { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline __m512 load(const Number* p, __mmask16 some) { return wide(_mm256_maskz_loadu_epi16(some, p)); }

inline void store(Number* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }

inline void store(Number* p, __m512 x, __mmask16 some) { _mm256_mask_storeu_epi16(p, some, narrow(x)); }

inline __m512 rounded(__m512 x) { return wide(narrow(x)); }

inline float scalar(Number x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

#endif

constexpr long PER_WORD = 4 / static_cast<long>(sizeof(Number));

// Words for so many numbers.
inline long words(long n) { return (n + PER_WORD - 1) / PER_WORD; }

// e^x to two units in the last place; NaN stays NaN. Above 1e9 or so the reduction has no digits left and infinity may
// come out with either sign, which a sigmoid turns into the same 0 (a test goes through all numbers of bf16).
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-105.0f), x);  // in this order NaN comes out
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695041f)), 8);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);  // Cephes' expf
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(f, f), _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// --- threads ---------------------------------------------------------------------------------------------------------

// f(begin, end, thread) on every thread, for consecutive shares of `count`: the same shares each time. On no more than
// `most` threads, unless 0.
template <class F>
void in_shares(long count, F f, long most = 0) {
    struct Job {
        F& f;
        long count;
    } job{f, count};
    auto work = [](void* given) {
        Job& job = *static_cast<Job*>(given);
        const long t = omp_get_thread_num(), n = omp_get_num_threads();
        const long begin = job.count * t / n, end = job.count * (t + 1) / n;
        if (begin < end) job.f(begin, end, t);
    };
    if (count <= 1 || most == 1 || omp_get_max_threads() == 1) {
        if (count > 0) f(0, count, 0);
        return;
    }
    GOMP_parallel(work, &job, static_cast<unsigned>(most), 0);
}

// f(i) for i below `count`, each on whichever thread is free. What f writes must not depend on who else has run.
template <class F>
void one_by_one(long count, F f) {
    std::atomic<long> next{0};
    struct Job {
        F& f;
        long count;
        std::atomic<long>& next;
    } job{f, count, next};
    auto work = [](void* given) {
        Job& job = *static_cast<Job*>(given);
        for (long i; (i = job.next.fetch_add(1)) < job.count;) job.f(i);
    };
    if (count <= 1 || omp_get_max_threads() == 1) {
        work(&job);
        return;
    }
    GOMP_parallel(work, &job, 0, 0);
}

// --- scratch ---------------------------------------------------------------------------------------------------------

// A thread's own memory, kept from call to call. `begin` forgets what was there and makes room; `take` hands out pieces.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }  // threads come and go
    void begin(size_t bytes) {
        at_ = 0;
        if (bytes <= size_) return;
        std::free(memory_);
        size_ = up(bytes, 4096);
        memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
        if (memory_ == nullptr) {
            std::fprintf(stderr, "posttrain: no memory for %zu bytes of scratch in a kernel\n", size_);
            std::abort();
        }
    }
    template <class T>
    T* take(long count) {
        T* piece = reinterpret_cast<T*>(memory_ + at_);
        at_ += bytes<T>(count);
        return piece;
    }
    using Mark = size_t;
    Mark mark() const { return at_; }
    void back_to(Mark mark) { at_ = mark; }
    template <class T>
    static size_t bytes(long count) {
        return up(count * sizeof(T), 64);
    }

  private:
    char* memory_ = nullptr;
    size_t size_ = 0, at_ = 0;
};
