// The pybind11 table of par_xl._C. Tensors arrive as (data pointer, batch stride, time stride) or as bare addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ops.h"

namespace py = pybind11;
using namespace par_xl;
using Address = uintptr_t;
using RowsTuple = std::tuple<Address, int64_t, int64_t>;
using HeadsTuple = std::tuple<Address, int64_t, int64_t, int64_t>;

namespace {

template <class T = void>
T* at(Address address) { return reinterpret_cast<T*>(address); }

Rows rows(const RowsTuple& x) { return {at(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

Heads heads(const HeadsTuple& x) { return {at(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)}; }

#if PAR_XL_X86
enum Isa { base_set, avx2_set, avx512_set, amx_set };
constexpr const char* isa_names[] = {"base", "avx2", "avx512", "amx"};

// PAR_XL_ISA=base, avx2 or avx512 asks for an older set than the processor has (tests, comparisons).
Isa best_isa() {
    __builtin_cpu_init();
    const char* asked = std::getenv("PAR_XL_ISA");
    const auto most = std::find(isa_names, isa_names + amx_set, asked ? asked : std::string()) - isa_names;
    if (most < avx2_set || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return base_set;
    if (most < avx512_set || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return avx2_set;
#if PAR_XL_AMX
    if (most == amx_set && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16"))
        return amx_set;
#endif
    return avx512_set;
}
const Isa isa = best_isa();
// The copy of a C++ kernel for this processor.
#define CPU(kernel) (isa >= avx512_set ? &avx512::kernel : isa == avx2_set ? &avx2::kernel : &base::kernel)

#if PAR_XL_AMX
// Linux gives a process the tile registers on request. Its signal frames grow with them, so this is when they are needed.
bool has_amx() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool given = isa == amx_set && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return given;
#else
    return false;
#endif
}
#define CPU_OR_AMX(kernel) (has_amx() ? &amx::kernel : CPU(kernel))
#else
bool has_amx() { return false; }
#define CPU_OR_AMX(kernel) CPU(kernel)
#endif
const char* isa_name() { return has_amx() ? "amx" : isa_names[std::min(isa, avx512_set)]; }
#else
#define CPU(kernel) (&base::kernel)
#define CPU_OR_AMX(kernel) CPU(kernel)
const char* isa_name() { return "base"; }
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    using nogil = py::call_guard<py::gil_scoped_release>;
    m.def("isa", &isa_name);
    m.attr("has_cuda") = bool(PAR_XL_CUDA);
    m.attr("cuda_info") = PAR_XL_CUDA_INFO;

    py::class_<ArTar>(m, "ArTar").def(
        py::init([](RowsTuple output, RowsTuple raw, Address lengths, int64_t batch, int64_t steps, int64_t width, int dtype) {
            return ArTar{rows(output), rows(raw), at<const int64_t>(lengths), batch, steps, width, DType(dtype)};
        }));
    m.def("ar_tar_parts_cpu", [](const ArTar& p) { return CPU(ar_tar_parts)(p); });
    m.def("ar_tar_forward_cpu", [](const ArTar& p, double alpha, double beta, Address sums, Address loss, Address scale) {
        CPU(ar_tar_forward)(p, alpha, beta, at<double>(sums), at(loss), at(scale));
    }, nogil());
    m.def("ar_tar_backward_cpu", [](const ArTar& p, Address grad, Address scale, RowsTuple d_output, RowsTuple d_raw) {
        CPU(ar_tar_backward)(p, at(grad), at(scale), rows(d_output), rows(d_raw));
    }, nogil());

    py::class_<RelAttention>(m, "RelAttention")
        .def(py::init([](std::array<HeadsTuple, 6> x, std::array<Address, 4> y, std::array<int64_t, 7> n, int64_t left,
                         int64_t right, int64_t clamp_len, double scale, double dropout_p, int dtype) {
            return RelAttention{heads(x[0]), heads(x[1]), heads(x[2]), heads(x[3]), heads(x[4]), heads(x[5]),
                                at(y[0]), at(y[1]), at<const int64_t>(y[2]), at<const int64_t>(y[3]),
                                n[0], n[1], n[2], n[3], n[4], n[5], n[6], left, right, clamp_len, scale, dropout_p,
                                DType(dtype)};
        }));
    m.def("rel_attention_cut_cpu", [](const RelAttention& p, bool backward) {
        RelAttentionCut cut = CPU(rel_attention_cut)(p, backward);
        return std::make_tuple(cut.threads, cut.workspace, cut.parts);
    });
    m.def("rel_attention_forward_cpu", [](const RelAttention& p, int64_t threads, Address workspace, HeadsTuple out, Address lse) {
        CPU(rel_attention_forward)(p, threads, at(workspace), heads(out), at(lse));
    }, nogil());
    m.def("rel_attention_received_cpu", [](const RelAttention& p, int64_t threads, Address workspace, Address lse, Address received) {
        CPU(rel_attention_received)(p, threads, at(workspace), at(lse), at(received));
    }, nogil());
    m.def("rel_attention_backward_cpu", [](const RelAttention& p, int64_t threads, Address workspace, HeadsTuple out,
                                           Address lse, HeadsTuple grad, HeadsTuple dq, std::array<HeadsTuple, 4> d, Address dr, Address d_biases) {
        const Heads d_keys_values[] = {heads(d[0]), heads(d[1]), heads(d[2]), heads(d[3])};
        CPU(rel_attention_backward)(p, threads, at(workspace), heads(out), at(lse), heads(grad), heads(dq), d_keys_values,
                                    at(dr), at(d_biases));
    }, nogil());

    py::class_<AdaptiveBuckets>(m, "AdaptiveBuckets")
        .def(py::init([](Address target, Address ends, int64_t tokens, int64_t tails, int64_t ignore_index, bool descending,
                         Address head_column, Address tail_column, Address order, Address offsets, Address bad) {
            return AdaptiveBuckets{at<const int64_t>(target), at<const int64_t>(ends), tokens, tails, ignore_index, descending,
                                   at<int64_t>(head_column), at<int64_t>(tail_column), at<int64_t>(order),
                                   at<int64_t>(offsets), at<int64_t>(bad)};
        }));
    m.def("adaptive_buckets_cpu", [](const AdaptiveBuckets& p) { return CPU(adaptive_buckets)(p); }, nogil());
    py::class_<AdaptivePiece>(m, "AdaptivePiece")
        .def(py::init([](Address weight, Address bias, int64_t classes, int64_t stride, Address d_weight, Address d_bias) {
            return AdaptivePiece{at(weight), at(bias), classes, stride, at(d_weight), at(d_bias)};
        }));
    py::class_<AdaptiveSoftmax>(m, "AdaptiveSoftmax")
        .def(py::init([](const std::vector<AdaptivePiece>& pieces, std::array<Address, 6> x, std::array<int64_t, 5> n,
                         double label_smoothing, double z_loss, int dtype) {
            return AdaptiveSoftmax{{pieces.at(0), pieces.size() > 1 ? pieces[1] : AdaptivePiece{}}, at(x[0]), at(x[1]),
                                   at<const int64_t>(x[2]), at<const int64_t>(x[3]), at(x[4]), at(x[5]), n[0], n[1], n[2],
                                   n[3], n[4], label_smoothing, z_loss, DType(dtype)};
        }));
    m.def("adaptive_softmax_memory_cpu", [](const AdaptiveSoftmax& p) { return CPU_OR_AMX(adaptive_softmax_memory)(p); });
    m.def("adaptive_softmax_cpu", [](const AdaptiveSoftmax& p, Address memory) { CPU_OR_AMX(adaptive_softmax)(p, at(memory)); }, nogil());
    py::class_<AdaptiveRows>(m, "AdaptiveRows")
        .def(py::init([](Address logits, int64_t rows, int64_t columns, int64_t stride, Address bias, Address column,
                         Address grad, Address nll, double label_smoothing, double z_loss, int dtype) {
            return AdaptiveRows{at(logits), rows, columns, stride, at(bias), at<const int64_t>(column), at(grad), at(nll),
                                label_smoothing, z_loss, DType(dtype)};
        }));

    py::class_<Compression>(m, "Compression")
        .def(py::init([](RowsTuple memory, RowsTuple compressed, Address choice, int64_t batch, int64_t steps, int64_t width,
                         int64_t rate, int mode, int dtype) {
            return Compression{rows(memory), rows(compressed), at(choice), batch, steps, width, rate, Compressor(mode), DType(dtype)};
        }));
    m.def("compress_forward_cpu", [](const Compression& p, Address usage) { CPU(compress_forward)(p, at<float>(usage)); }, nogil());
    m.def("compress_backward_cpu", [](const Compression& p) { CPU(compress_backward)(p); }, nogil());

    py::class_<MemoryUpdate>(m, "MemoryUpdate")
        .def(py::init([](RowsTuple state, RowsTuple hidden, RowsTuple out, RowsTuple fresh, int64_t batch, int64_t width,
                         int64_t old_compressed, int64_t old_memory, int64_t segment, int64_t new_compressed,
                         int64_t new_memory, int64_t fresh_rows, int64_t rate, int mode, int dtype) {
            return MemoryUpdate{rows(state), rows(hidden), rows(out), rows(fresh), batch, width, old_compressed, old_memory,
                                segment, new_compressed, new_memory, fresh_rows, rate, Compressor(mode), DType(dtype)};
        }));
    m.def("memory_update_cpu", [](const MemoryUpdate& p) { CPU(memory_update)(p); }, nogil());

    py::class_<Mix>(m, "Mix").def(py::init([](std::array<Address, 9> x, int64_t rows, int64_t width, int dtype) {
        return Mix{at(x[0]), {at(x[1]), at(x[2])}, at(x[3]), {at(x[4]), at(x[6])}, {at(x[5]), at(x[7])}, at(x[8]),
                   rows, width, DType(dtype)};
    }));
    m.def("mix_parts_cpu", [](const Mix& p) { return CPU(mix_parts)(p); });
    m.def("mix_forward_cpu", [](const Mix& p, double eps, Address out) { CPU(mix_forward)(p, eps, at(out)); }, nogil());
    m.def("mix_backward_cpu", [](const Mix& p, Address grad, Address sums, std::array<Address, 5> d) {
        void* const results[] = {at(d[0]), at(d[1]), at(d[2]), at(d[3]), at(d[4])};
        CPU(mix_backward)(p, at(grad), at(sums), results);
    }, nogil());

    m.def("dropout_cpu", [](Address x, Address y, Address seed, int64_t size, int64_t plane, int dtype, uint32_t threshold,
                            double scale, bool relu) {
        CPU(dropout)({at(x), at(y), at<const int64_t>(seed), size, plane, DType(dtype), threshold, scale}, relu);
    }, nogil());
    m.def("relu_dropout_backward_cpu", [](Address grad, Address out, Address dx, int64_t size, int dtype, double scale) {
        CPU(relu_dropout_backward)(at(grad), at(out), at(dx), size, DType(dtype), scale);
    }, nogil());
#if PAR_XL_CUDA
    m.def("ar_tar_parts_cuda", &cuda::ar_tar_parts);
    m.def("ar_tar_forward_cuda", [](const ArTar& p, double alpha, double beta, Address sums, Address loss, Address scale, Address stream) {
        cuda::ar_tar_forward(p, alpha, beta, at(sums), at(loss), at(scale), at(stream));
    }, nogil());
    m.def("ar_tar_backward_cuda", [](const ArTar& p, Address grad, Address scale, RowsTuple d_output, RowsTuple d_raw, Address stream) {
        cuda::ar_tar_backward(p, at(grad), at(scale), rows(d_output), rows(d_raw), at(stream));
    }, nogil());
    m.def("rel_attention_forward_cuda", [](const RelAttention& p, HeadsTuple out, Address lse, Address stream) {
        cuda::rel_attention_forward(p, heads(out), at<float>(lse), at(stream));
    }, nogil());
    m.def("adaptive_bucket_counts_cuda", &cuda::adaptive_bucket_counts);
    m.def("adaptive_buckets_cuda", [](const AdaptiveBuckets& p, Address counts, Address stream) {
        cuda::adaptive_buckets(p, at<int64_t>(counts), at(stream));
    }, nogil());
    m.def("adaptive_rows_cuda", [](const AdaptiveRows& p, Address stream) { cuda::adaptive_rows(p, at(stream)); }, nogil());
    m.def("compress_forward_cuda", [](const Compression& p, Address usage, Address stream) {
        cuda::compress_forward(p, at<float>(usage), at(stream));
    }, nogil());
    m.def("compress_backward_cuda", [](const Compression& p, Address stream) { cuda::compress_backward(p, at(stream)); }, nogil());
    m.def("memory_update_cuda", [](const MemoryUpdate& p, Address stream) { cuda::memory_update(p, at(stream)); }, nogil());
#endif
}
