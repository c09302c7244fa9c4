// Kernels that check the emulator itself: test_emulator.py calls them by ctypes, and gets what was thrown ("" for nothing).
#include <exception>

#include "tensor_core.cuh"

using namespace par_xl::cuda;

namespace {

template <class F>
const char* thrown(F launch) {
    static std::string message;
    message.clear();
    try {
        launch();
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}

__global__ void reverse(int* x, bool barrier) {
    __shared__ int of_thread[256];
    of_thread[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    x[threadIdx.x] = of_thread[255 - threadIdx.x];
}

__global__ void count_blocks(int* n) { ++*n; }

enum Mistake { exit_early, two_barriers, half_a_warp, two_shuffles, misaligned, outside_array, outside_shared, too_large };

__global__ void make(Mistake mistake, float* x) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float array[4];
    const int t = threadIdx.x;
    if (mistake == exit_early && t == 3) return;
    if (mistake == two_barriers && t == 3)
        __syncthreads();
    else
        __syncthreads();
    if (mistake == half_a_warp && t < 16) __shfl_sync(~0u, t, 0);
    if (mistake == two_shuffles) t < 16 ? __shfl_sync(~0u, t, 0)
                                        : __shfl_sync(~0u, t, 0);
    if (mistake == misaligned) reinterpret_cast<float4*>(x + 1)->x = 0;
    if (mistake == outside_array) array[t] = 0;
    if (mistake == outside_shared) memory[64] = 0;
}

__global__ void collectives(int* out) {
    const int t = threadIdx.x, lane = t % 32;
    const int got[] = {__shfl_sync(~0u, t, 5),
                       __shfl_sync(~0u, t, 3, 8),
                       __shfl_up_sync(~0u, t, 2),
                       __shfl_down_sync(~0u, t, 3, 16),
                       __shfl_xor_sync(~0u, t, 9),
                       int(__ballot_sync(~0u, t % 3 == 0)),
                       lane < 8 ? __any_sync(0xff, t == 34) : __all_sync(~0xffu, t > 35),
                       __syncthreads_count(t % 5 == 0),
                       __syncthreads_or(t == 63) + 2 * __syncthreads_and(t < 63)};
    for (int i = 0; i < 9; ++i) out[i * blockDim.x + t] = got[i];
}

__global__ void convert(const float* x, __half* half, __nv_bfloat16* bf16, float* back) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    half[i] = x[i], bf16[i] = x[i];
    back[i] = half[i], back[n + i] = bf16[i];
}

__global__ void load_matrices(const uint4* rows, uint32_t (*plain)[4], uint32_t (*transposed)[4]) {
    __shared__ uint4 shared[32];
    shared[threadIdx.x] = rows[threadIdx.x];
    __syncwarp();
    ldmatrix_x4(plain[threadIdx.x], shared + threadIdx.x);
    ldmatrix_x4_trans(transposed[threadIdx.x], shared + threadIdx.x);
}

template <class T>
__global__ void multiply(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*c)[4]) {
    mma_16816<T>(c[threadIdx.x], a[threadIdx.x], b[threadIdx.x]);
}

// Three copies in two groups, the last one not valid; what shared memory holds after waiting for all but `left` groups.
__global__ void copy(const uint4* from, uint4* to, int left) {
    __shared__ uint4 shared[3];
    cp_async_16(shared, from, true);
    cp_async_commit();
    cp_async_16(shared + 1, from + 1, true);
    cp_async_16(shared + 2, nullptr, false);
    cp_async_commit();
    left == 0 ? cp_async_wait<0>() : left == 1 ? cp_async_wait<1>() : cp_async_wait<2>();
    for (int i = 0; i < 3; ++i) to[i] = shared[i];
}

}  // namespace

#define CHECK(name, parameters, launch) \
    extern "C" const char* check_##name parameters { return thrown([&] { launch; }); }

CHECK(reverse, (int* x, bool barrier), (reverse<<<1, 256>>>(x, barrier)))
CHECK(count_blocks, (int* n), (count_blocks<<<dim3(2, 3, 4), 1>>>(n)))
CHECK(mistake, (int mistake, float* x), {
    make<<<1, 48, mistake == too_large ? 50000 : 64>>>(Mistake(mistake), x);
    if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("not launched");
})
CHECK(collectives, (int* out), (collectives<<<1, 64>>>(out)))
CHECK(convert, (const float* x, __half* half, __nv_bfloat16* bf16, float* back, int blocks),
      (convert<<<blocks, 256>>>(x, half, bf16, back)))
CHECK(load_matrices, (const uint4* rows, uint32_t (*plain)[4], uint32_t (*transposed)[4]),
      (load_matrices<<<1, 32>>>(rows, plain, transposed)))
CHECK(multiply, (const uint32_t (*a)[4], const uint32_t (*b)[2], float (*c)[4], bool bf16),
      (bf16 ? (multiply<__nv_bfloat16> <<<1, 32>>>(a, b, c)) : (multiply<__half> <<<1, 32>>>(a, b, c))))
CHECK(copy, (const uint4* from, uint4* to, int left), (copy<<<1, 1>>>(from, to, left)))
