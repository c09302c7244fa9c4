// What the kernels use of the CUDA language and its runtime, on the emulator.
#pragma once
#include <math.h>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // see emulator.h
#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block)
#define gridDim (emulator::grid)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

// The defaults are evaluated where the function is called.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline int __syncthreads_count(int predicate, EMULATOR_PLACE) {
    emulator::meet_block({file, line}, predicate, [](int** of) {
        int n = 0;
        for (int i = 0; i < emulator::threads; ++i) n += *of[i] != 0;
        for (int i = 0; i < emulator::threads; ++i) *of[i] = n;
    });
    return predicate;
}
inline void __syncthreads(EMULATOR_PLACE) { __syncthreads_count(0, file, line); }
inline int __syncthreads_or(int predicate, EMULATOR_PLACE) { return __syncthreads_count(predicate, file, line) > 0; }
inline int __syncthreads_and(int predicate, EMULATOR_PLACE) { return __syncthreads_count(!predicate, file, line) == 0; }

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
    unsigned votes = predicate != 0;
    emulator::meet_warp(mask, {file, line}, votes, [](unsigned** of) {
        unsigned all = 0;
        for (int i = 0; i < emulator::WARP; ++i) all |= of[i] ? *of[i] << i : 0;
        for (int i = 0; i < emulator::WARP; ++i)
            if (of[i]) *of[i] = all;
    });
    return votes;
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_PLACE) { __ballot_sync(mask, 0, file, line); }
inline int __any_sync(unsigned mask, int predicate, EMULATOR_PLACE) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATOR_PLACE) { return __ballot_sync(mask, !predicate, file, line) == 0; }

// Lane i gets x of lane source(i), within its group of `width` lanes; of a lane outside, its own.
template <class T, class Source>
T shuffle(unsigned mask, T x, int width, emulator::Place place, Source source) {
    struct Exchange {
        T x, got;
        int from;
    };
    const int lane = int(emulator::self - emulator::fibers) % emulator::WARP, first = lane / width * width;
    const int from = source(lane, first);
    Exchange mine{x, x, from >= first && from < first + width ? from : lane};
    emulator::meet_warp(mask, place, mine, [&](Exchange** of) {
        for (int i = 0; i < emulator::WARP; ++i)
            if (of[i]) {
                if (!of[of[i]->from]) emulator::fail(place.text() + ": a shuffle reads a lane outside the mask");
                of[i]->got = of[of[i]->from]->x;
            }
    });
    return mine.got;
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, EMULATOR_PLACE) {
    return shuffle(mask, x, width, {file, line}, [=](int, int first) { return first + (from & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATOR_PLACE) {
    return shuffle(mask, x, width, {file, line}, [=](int lane, int) { return lane - int(by); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATOR_PLACE) {
    return shuffle(mask, x, width, {file, line}, [=](int lane, int) { return lane + int(by); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with, EMULATOR_PLACE) {
    return shuffle(mask, x, 32, {file, line}, [=](int lane, int) { return lane ^ with; });
}

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class To, class From>
To reinterpret(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
inline unsigned __float_as_uint(float x) { return reinterpret<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return reinterpret<float>(x); }
template <class T>
T __ldg(const T* from) { return *from; }
template <class T>
void __stwb(T* to, T x) { *to = x; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline cudaError_t cudaGetLastError() { return std::exchange(emulator::launch_failed, false) ? cudaErrorInvalidConfiguration : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid launch configuration" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = emulator::MOST_SHARED, cudaSuccess; }
template <class Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute, int bytes) {
    if (size_t(bytes) > emulator::MOST_SHARED) return cudaErrorInvalidConfiguration;
    emulator::allowed_shared[reinterpret_cast<void*>(function)] = bytes;
    return cudaSuccess;
}
