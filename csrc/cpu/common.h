// Shared by the C++ kernels. Each source is compiled once per instruction set (PAR_XL_ISA), so everything with code in
// it sits in that namespace or is forced inline: a shared inline function could be linked from its AVX-512 copy.
#pragma once
#include <omp.h>
#if PAR_XL_X86
#include <immintrin.h>
#endif

#include <cstring>

#include "ops.h"

namespace par_xl::PAR_XL_ISA {

#define PAR_XL_INLINE inline __attribute__((always_inline))

struct half { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

template <class To, class From>
PAR_XL_INLINE To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}

// Arithmetic type of a storage type: fp64 for fp64, fp32 for the rest.
template <class T> struct acc { using type = float; };
template <> struct acc<double> { using type = double; };
template <class T> using acc_t = typename acc<T>::type;

// Conversions in integer arithmetic, so that loops over them vectorise without half-precision instructions.
PAR_XL_INLINE double load(double x) { return x; }
PAR_XL_INLINE float load(float x) { return x; }
PAR_XL_INLINE float load(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
PAR_XL_INLINE float load(half x) {
    uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
    float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;  // moves the exponent bias, subnormals included
    uint32_t special = 0x7f800000u | (magnitude << 13);          // inf and NaN
    return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(finite)));
}

template <class T, class A> PAR_XL_INLINE T store(A x);
template <> PAR_XL_INLINE double store<double>(double x) { return x; }
template <> PAR_XL_INLINE float store<float>(float x) { return x; }
template <> PAR_XL_INLINE bfloat16 store<bfloat16>(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <> PAR_XL_INLINE half store<half>(float x) {
    uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal numbers: move the bias and round to nearest even; a carry runs into the exponent, up to infinity.
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal numbers: adding 0.5 leaves the rounded result in the low bits of the sum.
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite))};
}

// Calls f(T{}) with the storage type of a dtype.
template <class F>
PAR_XL_INLINE void dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f16: return f(half{});
        case DType::bf16: return f(bfloat16{});
        case DType::f32: return f(float{});
        case DType::f64: return f(double{});
    }
}

template <class T>
PAR_XL_INLINE T* row(const Rows& x, int64_t b, int64_t t) {
    return static_cast<T*>(x.data) + b * x.batch_stride + t * x.time_stride;
}

constexpr int64_t STREAMED_BYTES = 8 << 20;  // results larger than this leave the caches before they are read

// 64 bytes past the caches: a plain store reads the line from memory first.
PAR_XL_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
#else
    memcpy(to, from, 64);
#endif
}

// A thread's streamed lines are visible to the others after this.
PAR_XL_INLINE void finish_streaming() {
#if PAR_XL_X86
    _mm_sfence();
#endif
}

// A row of results: to[i] = store(value(i)).
template <class T, class F>
struct Result {
    T* to;
    F value;

    PAR_XL_INLINE void write(int64_t i) const { to[i] = store<T>(value(i)); }
    PAR_XL_INLINE void write_line(int64_t i) const {
        T line[64 / sizeof(T)];
#pragma omp simd
        for (int64_t k = 0; k < int64_t(64 / sizeof(T)); ++k) line[k] = store<T>(value(i + k));
        stream_line(to + i, line);
    }
};

template <class T, class F>
PAR_XL_INLINE Result<T, F> result(T* to, F value) { return {to, value}; }

// Rows of results, written side by side so that what they are made of is read together; `stream` for results too large
// to be found in a cache when they are next read. Rows that lie otherwise to the cache lines are not streamed.
template <class T, class F, class... More>
PAR_XL_INLINE void write_rows(int64_t width, bool stream, const Result<T, F>& first, const More&... more) {
    constexpr int64_t LINE = 64 / sizeof(T);
    const auto place = [](const T* to) { return reinterpret_cast<uintptr_t>(to) % 64; };
    int64_t i = 0;
    if (stream && ((place(first.to) == place(more.to)) && ...)) {
        for (; i < width && place(first.to + i); ++i) first.write(i), (more.write(i), ...);
        for (; i + LINE <= width; i += LINE) first.write_line(i), (more.write_line(i), ...);
    }
#pragma omp simd
    for (int64_t k = i; k < width; ++k) first.write(k), (more.write(k), ...);
}

PAR_XL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PAR_XL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PAR_XL_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PAR_XL_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Threads worth starting for this many bytes: below about 64 KB a second thread costs more than it brings.
PAR_XL_INLINE int threads_for(int64_t bytes) {
    return int(max(1, min(omp_get_max_threads(), bytes >> 16)));
}

}  // namespace par_xl::PAR_XL_ISA
