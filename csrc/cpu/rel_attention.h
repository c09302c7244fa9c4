// How rel_attention is cut on the CPU: parts of the batch, blocks of query rows, and the keys and positions of a block.
#pragma once
#include "matmul.h"

namespace par_xl::PAR_XL_ISA {

constexpr int64_t max_rows = 96;            // of a block
constexpr int64_t score_bytes = 768 << 10;  // of a block's score buffers: most of a second-level cache
constexpr int64_t units_wanted = 32;        // of work, for the threads to share

// Query rows [begin, begin + rows) of a head; the keys and position rows that some of them see. If all of their keys are
// beyond the clamp, end_position may be less than first_position, which is 0 then.
struct Block {
    int64_t begin, rows, first_key, end_key, first_position, end_position;
    int64_t key0, position0;  // of the first column of a product: the same, rounded down to a panel
    int64_t pitch, shift;     // of the scores; position p of row 0 is at column p + shift

    int64_t columns() const { return end_key - key0; }
};

// The visible columns of a row, of which those before near_begin are beyond the clamp; and those which a product may read.
struct Span {
    int64_t begin, near_begin, end, read_begin, read_end;
};

// How a call is cut.
template <class T>
struct Plan {
    const RelAttention& p;
    int64_t n_keys, lag, far, width, rows, used_positions, scores;  // far: the distance of position 0

    Plan(const RelAttention& p, int64_t buffers)
        : p(p), n_keys(p.memory + p.keys), lag(n_keys - p.queries), far(min(n_keys - 1, p.clamp_len)),
          width(round_up(p.width, 16)), used_positions(far + 1 + min(p.queries - 1, p.right)) {
        const int64_t columns = max(1, min(n_keys, p.left + p.right + max_rows));
        const int64_t most = max(tile_rows, min(max_rows, score_bytes / buffers / int64_t(sizeof(T)) / columns));
        rows = min(round_up(ceil_div(p.queries, max(1, ceil_div(p.queries, most))), tile_rows), max_rows);
        scores = margin() + rows * pitch(columns + panel<T>) + panel<T>;
    }

    int64_t margin() const { return round_up(rows + panel<T>, lanes<T>); }
    int64_t pitch(int64_t columns) const { return round_up(columns, lanes<T>) + margin(); }
    int64_t real_keys(int64_t b) const { return p.memory + (p.key_lengths ? p.key_lengths[b] : p.keys); }

    // The rows of sequence b that see a key.
    int64_t first_row() const { return max(0, -lag - p.right); }
    int64_t end_row(int64_t b) const {
        const bool any = real_keys(b) > 0 && p.left + p.right >= 0;
        return any ? max(first_row(), min(p.queries, real_keys(b) - lag + p.left)) : first_row();
    }

    Block block(int64_t b, int64_t begin) const {
        Block x;
        x.begin = begin;
        x.rows = min(rows, end_row(b) - begin);
        const int64_t end = begin + x.rows;
        x.first_key = max(0, begin + lag - p.left);
        x.end_key = min(real_keys(b), end + lag + p.right);
        x.first_position = max(0, far - min(p.left, end - 1 + lag - x.first_key));
        x.end_position = far + 1 + min(p.right, x.end_key - 1 - begin - lag);
        x.key0 = x.first_key / panel<T> * panel<T>;
        x.position0 = x.first_position / panel<T> * panel<T>;
        x.pitch = pitch(x.columns());
        x.shift = begin + lag - far - x.key0;
        return x;
    }

    Span span(const Block& x, int64_t a) const {
        const int64_t key = x.begin + a + lag;  // at distance 0
        Span s;
        s.begin = min(max(x.first_key, key - p.left) - x.key0, x.columns());
        s.end = max(s.begin, min(x.end_key, key + p.right + 1) - x.key0);
        s.near_begin = min(max(s.begin, x.shift + a), s.end);
        s.read_begin = min(x.first_key - x.key0, x.first_position + x.shift + a);
        s.read_end = max(x.columns(), x.end_position + x.shift + a);
        return s;
    }

    // Sequences are dealt into parts; a part and a head are a unit of work.
    int64_t parts() const { return max(1, min(p.batch, ceil_div(units_wanted, max(1, p.heads)))); }
    int64_t first_sequence(int64_t part) const { return part * p.batch / parts(); }
};

}  // namespace par_xl::PAR_XL_ISA
