// How one softmax of adaptive_softmax is cut on the CPU: into rounds of rows, tiles of classes, and parts for the threads.
#pragma once
#include <type_traits>

#include "matmul.h"

namespace par_xl::PAR_XL_ISA {

constexpr int64_t least_classes = 48, most_classes = 96;
constexpr int64_t least_rows = 64, most_rows = 512;
constexpr int64_t margin = 16;  // behind the rows of a logit: those of two are not a power of two apart, where caches hold few
constexpr int64_t narrow = 64;  // a product of this width costs less than the way of its result to memory and back

// Deals out a piece of memory in whole cache lines; of no memory, only `size` comes of it.
struct Cut {
    char* memory;
    int64_t size = 0;

    template <class T>
    void take(T*& x, int64_t count) {
        x = reinterpret_cast<T*>(memory + size);
        size += round_up(count * int64_t(sizeof(T)), 64);
    }
};

// Classes of one piece: `count` of them from `first` on, which is `column` of the softmax.
struct Classes {
    const AdaptivePiece& piece;
    int64_t first, count, column;

    template <class X> const X* weight() const { return static_cast<const X*>(piece.weight) + first * piece.stride; }
    template <class T> T* d_weight(int64_t width) const { return static_cast<T*>(piece.d_weight) + first * width; }
};

// A tile has classes of one piece, and a part is a run of tiles.
template <class T>
struct AdaptivePlan {
    int64_t columns, rows, pitch, threads, team, classes, tiles_of[2], tiles, parts;  // rows of a round, their place in z
    bool kept;                                                                        // exp(z - m), between the passes

    // The products go in these steps of rows and classes, and their tiles share these bytes of rows of h.
    AdaptivePlan(const AdaptiveSoftmax& p, int64_t row_step, int64_t class_step, int64_t h_bytes)
        : columns(p.pieces[0].classes + p.pieces[1].classes) {
        const int64_t size = sizeof(T), fit = (p.workspace / size / columns - margin) / least_rows * least_rows;
        kept = p.grad && p.width > narrow && fit > 0;
        rows = (h_bytes / size / p.width + least_rows / 2) / least_rows * least_rows;
        rows = min(most_rows, max(least_rows, rows));
        if (kept) rows = min(rows, fit);
        rows = round_up(ceil_div(p.rows, ceil_div(p.rows, rows)), row_step);
        pitch = round_up(rows, panel<T>) + margin;
        threads = threads_for(rows * columns * size);
        team = max(2, threads);
        classes = min(most_classes, round_up(max(least_classes, ceil_div(columns, team)), class_step));
        for (int i = 0; i < 2; ++i) tiles_of[i] = ceil_div(p.pieces[i].classes, classes);
        tiles = tiles_of[0] + tiles_of[1];
        threads = min(threads, tiles);
        parts = min(tiles, 3 * team);
    }

    // Three parts for each thread, the second half as long as the first and the third half as long as that: a thread whose
    // core has other work leaves its last ones to the others.
    int64_t first_tile(int64_t part) const {
        if (tiles < 7 * team) return part * tiles / parts;
        const int64_t halves = max(0, part - team), quarters = max(0, part - 2 * team);  // 4, 2 and 1 of 7 shares
        return (4 * part - 2 * halves - quarters) * tiles / (7 * team);
    }

    // This thread's buffer of `width` numbers for each class of a tile.
    T* own(T* buffers, int64_t width) const { return buffers + omp_get_thread_num() * classes * width; }
};

}  // namespace par_xl::PAR_XL_ISA
