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
    int64_t left, right, clamp_len;
    double scale, dropout_p;
    DType dtype;
};

// How the C++ kernels cut a call: threads, elements of workspace for each, and parts that the batch is dealt into.
struct RelAttentionCut {
    int64_t threads, workspace, parts;
};

// Which softmaxes the tokens of an adaptive softmax pass; see par_xl/ops/adaptive_softmax.py. Arrays are by token unless
// said otherwise.
struct AdaptiveBuckets {
    const int64_t *target, *ends;  // ends (tails + 1): the first class after the head and after each tail
    int64_t tokens, tails, ignore_index;
    bool descending;                   // the head's column of the first tail is its last one
    int64_t *head_column, *tail_column;  // the target's column in the head and in its tail; -1 for none
    int64_t *order, *offsets;            // order[offsets[i] .. offsets[i + 1]]: the tokens of tail i, in their order
    int64_t* bad;                        // on a GPU: takes a target that is no class, whose head_column is then -2
};

// Neighbouring classes of a softmax whose weights stand in one table. A null pointer: no bias, a gradient that is not wanted.
struct AdaptivePiece {
    const void *weight, *bias;  // (classes, width) with rows `stride` apart, (classes)
    int64_t classes, stride;
    void *d_weight, *d_bias;  // contiguous
};

// One softmax of it on the CPU: the losses of its rows, and the gradients if there is a `grad`.
struct AdaptiveSoftmax {
    AdaptivePiece pieces[2];  // the second may have no classes
    const void* h;            // (rows, width) with rows `stride` apart
    void* dh;                 // (rows, width), contiguous, or nullptr
    const int64_t* tokens;    // the token of each row, or nullptr: row i is token i
    const int64_t* column;    // by token: the target's column
    const void* grad;         // by token, or nullptr: no gradient is wanted
    void* nll;                // by token; the rows' losses are added to it
    int64_t rows, width, stride;
    int64_t workspace;  // bytes that logits may take
    int64_t parts;      // of bf16 that stand for a number of h, and with fp32 tables for any, on AMX (csrc/cpu/amx.h)
    double label_smoothing, z_loss;
    DType dtype;  // of the tables; all else is in its arithmetic type
};

// A block of rows of the head's logits on the GPU, which become the gradient of the rows' loss in place.
struct AdaptiveRows {
    void* logits;  // (rows, columns)
    int64_t rows, columns, stride;
    const void* bias;       // (columns) or nullptr
    const int64_t* column;  // (rows): the target's column; -1: no loss
    const void* grad;       // (rows)
    void* nll;              // (rows)
    double label_smoothing, z_loss;
    DType dtype;  // of the gradient; all else is in its arithmetic type
};

enum class Compressor : int { mean, max, most_used, given };

// memory (batch, steps, width) and compressed (batch, steps / rate, width); see par_xl/ops/compression.py. Forward reads
// memory and writes compressed; backward reads the gradient in compressed and writes the gradient in memory.
struct Compression {
    Rows memory, compressed;
    void* choice;  // max: (batch, steps / rate, width), the chosen row of the group, u8 (i32 for rate > 256);
                   // most_used: (batch, steps) i32, the row that a step is kept in, or -1
    int64_t batch, steps, width, rate;
    Compressor mode;
    DType dtype;
};

// state (batch, old_compressed + old_memory, width) and hidden (batch, segment, width) to out (batch, new_compressed +
// new_memory, width); see par_xl/ops/memory_update.py. Rows that leave the memory become fresh_rows compressed ones.
struct MemoryUpdate {
    Rows state, hidden, out;
    Rows fresh;  // mode given: (batch, fresh_rows, width); null otherwise
    int64_t batch, width, old_compressed, old_memory, segment, new_compressed, new_memory, fresh_rows, rate;
    Compressor mode;
    DType dtype;
};

// w_0 N(x + branch_0) + w_1 N(x + branch_1) + w_2 x over contiguous (rows, width); see par_xl/ops/mix.py.
struct Mix {
    const void *x, *branch[2];
    const void *weights, *gamma[2], *beta[2];  // (3), (width), in fp32, or fp64 for fp64
    void* stats;                               // (rows, 2, 2), likewise: each sum's mean and 1 / standard deviation
    int64_t rows, width;
    DType dtype;
};

// y = dropout of x, both contiguous; see par_xl/ops/dropout.py.
struct Dropout {
    const void* x;
    void* y;
    const int64_t* seed;
    int64_t size, plane;
    DType dtype;
    uint32_t threshold;
    double scale;
};

}  // namespace par_xl

// C++ kernels are compiled once per instruction set, each copy in a namespace of its own.
#define PAR_XL_CPU_KERNELS                                                                     \
    /* partial_sums: 2 doubles per part; loss (1), scale (2) in fp32, or fp64 for fp64 */      \
    int64_t ar_tar_parts(const ArTar& p);                                                      \
    void ar_tar_forward(const ArTar& p, double alpha, double beta, double* partial_sums, void* loss, void* scale); \
    void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw); \
    RelAttentionCut rel_attention_cut(const RelAttention& p, bool backward);                   \
    void rel_attention_forward(const RelAttention& p, int64_t threads, void* workspace, Heads out, void* lse); \
    /* received (batch, heads, memory + keys); lse may be that of a softmax over more keys than these */ \
    void rel_attention_received(const RelAttention& p, int64_t threads, void* workspace, const void* lse, void* received); \
    /* d_keys_values: those of k, v, k_memory, v_memory. To be summed over the parts, with width padded to 16:          \
       dr (parts, heads, positions, width) and d_biases (parts, heads, 2, width). out and lse: null, or those of a \
       softmax over more keys than these */                                                    \
    void rel_attention_backward(const RelAttention& p, int64_t threads, void* workspace, Heads out, const void* lse, \
                                Heads grad, Heads dq, const Heads* d_keys_values, void* dr, void* d_biases); \
    /* -1, or the first token whose target is no class */                                      \
    int64_t adaptive_buckets(const AdaptiveBuckets& p);                                        \
    int64_t adaptive_softmax_memory(const AdaptiveSoftmax& p); /* bytes */                     \
    void adaptive_softmax(const AdaptiveSoftmax& p, void* memory);                             \
    void compress_forward(const Compression& p, const float* usage);                           \
    void compress_backward(const Compression& p);                                              \
    void memory_update(const MemoryUpdate& p);                                                 \
    void mix_forward(const Mix& p, double eps, void* out);                                     \
    /* sums: (mix_parts, 4, width); results: the gradients of x, the branches, the weights, and of gamma and beta of each  \
       norm as (4, width) */                                                                   \
    int64_t mix_parts(const Mix& p);                                                           \
    void mix_backward(const Mix& p, const void* grad, void* sums, void* const* results);                    \
    void dropout(const Dropout& p, bool relu);                                                 \
    void relu_dropout_backward(const void* grad, const void* out, void* dx, int64_t size, DType dtype, double scale);

namespace par_xl::base { PAR_XL_CPU_KERNELS }
#if PAR_XL_X86
namespace par_xl::avx2 { PAR_XL_CPU_KERNELS }
namespace par_xl::avx512 { PAR_XL_CPU_KERNELS }
namespace par_xl::amx { PAR_XL_CPU_KERNELS }  // those of which setup.py compiles a copy
#endif

#if PAR_XL_CUDA
namespace par_xl::cuda {
int64_t ar_tar_parts(const ArTar& p);
void ar_tar_forward(const ArTar& p, double alpha, double beta, void* partial_sums, void* loss, void* scale, void* stream);
void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw, void* stream);
// fp16 and bf16, widths up to 128; lse (batch, heads, queries)
void rel_attention_forward(const RelAttention& p, Heads out, float* lse, void* stream);
int64_t adaptive_bucket_counts(const AdaptiveBuckets& p);
void adaptive_buckets(const AdaptiveBuckets& p, int64_t* counts, void* stream);
// stride: a multiple of 64; a narrower gradient starts where its row of logits does
void adaptive_rows(const AdaptiveRows& p, void* stream);
void compress_forward(const Compression& p, const float* usage, void* stream);
void compress_backward(const Compression& p, void* stream);
void memory_update(const MemoryUpdate& p, void* stream);
}  // namespace par_xl::cuda
#endif
