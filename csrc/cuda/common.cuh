// Shared by the CUDA kernels: 16-byte vectors, conversions, fixed-order block sums, launch checks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace par_xl::cuda {

template <class T> struct acc { using type = float; };
template <> struct acc<double> { using type = double; };
template <class T> using acc_t = typename acc<T>::type;

// N consecutive elements, read and written in one instruction: N * sizeof(T) is 16, or N is 1.
template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <class T, int N>
__device__ __forceinline__ void load(const T* from, acc_t<T> (&to)[N]) {
    const auto word = *reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<acc_t<T>>(reinterpret_cast<const T*>(&word)[i]);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const acc_t<T> (&from)[N]) {
    typename Word<N * sizeof(T)>::type word;
#pragma unroll
    for (int i = 0; i < N; ++i) reinterpret_cast<T*>(&word)[i] = static_cast<T>(from[i]);
    __stwb(reinterpret_cast<decltype(word)*>(to), word);  // a plain assignment is split into 4-byte stores
}

template <class T>
__host__ __device__ __forceinline__ T* row(const Rows& x, int64_t b, int64_t t) {
    return static_cast<T*>(x.data) + b * x.batch_stride + t * x.time_stride;
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sum over a block of THREADS threads in a fixed order; the result is valid in thread 0.
template <int THREADS, class A>
__device__ __forceinline__ A block_sum(A x) {
    __shared__ A of_warp[THREADS / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < THREADS / 32; ++warp) x += of_warp[warp];
    __syncthreads();
    return x;
}

inline void check_launch(const char* kernel) {
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Calls f(T{}) with the storage type of a dtype.
template <class F>
void dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f16: return f(__half{});
        case DType::bf16: return f(__nv_bfloat16{});
        case DType::f32: return f(float{});
        case DType::f64: return f(double{});
    }
}

}  // namespace par_xl::cuda
