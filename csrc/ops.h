// The table of kernels: plain structs of raw pointers, sizes and strides (in elements), and one declaration per kernel.
// All checks live in par_xl/ops; nothing here knows torch.
#pragma once
#include <cstdint>

namespace par_xl {

enum class DType : int { f16, bf16, f32, f64 };

// A (batch, time, width) tensor whose last dimension is contiguous. A null pointer stands for an absent tensor.
struct Rows {
    void* data;
    int64_t batch_stride, time_stride;
};

// alpha * mean(output^2) + beta * mean((raw[:, 1:] - raw[:, :-1])^2); see par_xl/ops/ar_tar.py.
struct ArTar {
    Rows output, raw;        // raw.data == nullptr: raw is output
    const int64_t* lengths;  // (batch,) or nullptr
    int64_t batch, steps, width;
    DType dtype;
};

// A block of query rows of rel_attention, between its matrix products on the CPU; see par_xl/ops/rel_attention_cpu.py.
// Its keys are two parts, memory and segment; columns count over both. All arrays are contiguous.
struct RelRows {
    int64_t batches, heads, rows;
    void *scores[2], *d_weights[2];  // (batches, heads, rows, columns[i]): content products, and gradients of the weights
    int64_t columns[2];
    void* position;  // (heads, batches, rows, positions): position products; those of row a, column c stand at c - a + shift
    int64_t positions, shift;
    int64_t distance, left, right;  // row a, column c are d = distance + a - c steps apart, visible where -right <= d <= left
    double dropout_p;               // 0 for none
    uint64_t seed;
    int64_t offset, batch_offset, head_offset, row_offset;  // random number of row 0, column 0, and steps of the offset
    DType dtype;                                            // f32 or f64
};

}  // namespace par_xl

// C++ kernels are compiled once per instruction set, each copy in a namespace of its own.
#define PAR_XL_CPU_KERNELS                                                                     \
    void prefer_huge_pages(void* data, int64_t bytes);                                         \
    /* partial_sums: 2 doubles per part; loss (1), scale (2) in fp32, or fp64 for fp64 */      \
    int64_t ar_tar_parts(const ArTar& p);                                                      \
    void ar_tar_forward(const ArTar& p, double alpha, double beta, double* partial_sums, void* loss, void* scale); \
    void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw); \
    /* factor is (batches, heads, rows), contiguous; lse has these strides */                  \
    void rel_attention_forward(const RelRows& p, void* factor, void* lse, int64_t batch_stride, int64_t head_stride); \
    void rel_attention_backward(const RelRows& p, const void* lse, int64_t batch_stride, int64_t head_stride);

namespace par_xl::base { PAR_XL_CPU_KERNELS }
#if PAR_XL_X86
namespace par_xl::avx2 { PAR_XL_CPU_KERNELS }
namespace par_xl::avx512 { PAR_XL_CPU_KERNELS }
#endif

#if PAR_XL_CUDA
namespace par_xl::cuda {
int64_t ar_tar_parts(const ArTar& p);
void ar_tar_forward(const ArTar& p, double alpha, double beta, void* partial_sums, void* loss, void* scale, void* stream);
void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw, void* stream);
}  // namespace par_xl::cuda
#endif
