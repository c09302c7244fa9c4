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

// A (batch, head, time, width) tensor whose last dimension is contiguous. A null pointer stands for an absent tensor.
struct Heads {
    void* data;
    int64_t batch_stride, head_stride, time_stride;
};

// Attention with relative positions over memory and segment; see par_xl/ops/rel_attention.py.
struct RelAttention {
    Heads q, k, v, r, k_memory, v_memory;      // r: batch_stride 0
    const void *content_bias, *position_bias;  // (heads, width), contiguous
    const int64_t* key_lengths;                // (batch,) or nullptr
    const int64_t* seed;                       // (1,), with dropout
    int64_t batch, heads, queries, keys, memory, positions, width;
    int64_t left, right;
    double scale, dropout_p;
    DType dtype;
};

// How the C++ kernels cut a call: threads, elements of workspace for each, and parts that the batch is dealt into.
struct RelAttentionCut {
    int64_t threads, workspace, parts;
};

}  // namespace par_xl

// C++ kernels are compiled once per instruction set, each copy in a namespace of its own.
#define PAR_XL_CPU_KERNELS                                                                     \
    void prefer_huge_pages(void* data, int64_t bytes);                                         \
    /* partial_sums: 2 doubles per part; loss (1), scale (2) in fp32, or fp64 for fp64 */      \
    int64_t ar_tar_parts(const ArTar& p);                                                      \
    void ar_tar_forward(const ArTar& p, double alpha, double beta, double* partial_sums, void* loss, void* scale); \
    void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw); \
    RelAttentionCut rel_attention_cut(const RelAttention& p, bool backward);                   \
    void rel_attention_forward(const RelAttention& p, int64_t threads, void* workspace, Heads out, void* lse); \
    /* d_keys_values: those of k, v, k_memory, v_memory. To be summed over the parts, with width padded to 16:          \
       dr (parts, heads, positions, width) and d_biases (parts, heads, 2, width) */            \
    void rel_attention_backward(const RelAttention& p, int64_t threads, void* workspace, Heads grad, Heads dq, \
                                const Heads* d_keys_values, void* dr, void* d_biases);

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
