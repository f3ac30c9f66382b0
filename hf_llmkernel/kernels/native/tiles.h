// Products of many rows of activations: the tiles that they are cut into, and the sharing out of their products.
#pragma once

#include <cstring>

#include "inputs.h"
#include "pool.h"

namespace llmk {

// From here on tiles are faster than rows one by one, by what the product is of, about the same on AVX512 and AVX2.
inline int64_t many_rows(const llmk_matrix& w) { return w.kind == LLMK_BF16 || w.kind == LLMK_SPARSE_BF16 ? 28 : 12; }

// Rows of activations as tiles, for all matrices that take them.
class TileSet {
  public:
    TileSet() = default;
    // Inputs of integers are rounded to int8, or left as they are.
    TileSet(int64_t rows, int64_t columns, bool rounds) : rows_(rows), columns_(columns), rounds_(rounds) {}

    int64_t tiles() const { return ceil_div(rows_, kTile); }

    // Makes room for what a matrix takes; before any `fill_row`.
    void add(Arena& arena, const llmk_matrix& w) {
        if (find(w) != nullptr) return;
        Form& form = forms_[count_++];
        form.values = values_of(w);
        form.group = group_of(w);
        form.segments = padded_columns(columns_, form.group == 0 ? columns_ : form.group) / kSegment;
        const int64_t entries = tiles() * form.segments * kTile;
        if (form.values == Values::kWords) form.bf16 = arena.take<uint16_t>(entries * kSegment);
        if (form.values == Values::kFloats) form.floats = arena.take<float>(entries * kSegment);
        if (form.values != Values::kCodes) return;
        form.codes = arena.take<int8_t>(entries * kSegment);
        form.scales = arena.take<float>(entries);
        form.sums = arena.take<int32_t>(entries);
    }

    void fill_row(int64_t row, const float* x) const {
        for (int i = 0; i < count_; ++i) {
            const Form& form = forms_[i];
            const int64_t at = row / kTile * form.segments * kTile + row % kTile;
            if (form.values != Values::kCodes) {
                fill_segments(form, at, x);
                continue;
            }
            kernels().quantize(x, columns_, form.group, kTile, form.codes + at * kSegment, form.scales + at, form.sums + at);
            if (row == rows_ - 1) clear_missing(form, at);
        }
    }

    Tile of(const llmk_matrix& w, int64_t tile) const {
        const Form& form = *find(w);
        const int64_t at = tile * form.segments * kTile;
        Tile x;
        x.rows = smaller(kTile, rows_ - tile * kTile);
        if (form.values == Values::kWords) x.bf16 = form.bf16 + at * kSegment;
        if (form.values == Values::kFloats) x.floats = form.floats + at * kSegment;
        if (form.values != Values::kCodes) return x;
        x.codes = form.codes + at * kSegment;
        x.scales = form.scales + at;
        x.sums = form.sums + at;
        return x;
    }

  private:
    enum class Values { kCodes, kWords, kFloats };

    struct Form {
        Values values;
        int64_t group, segments;  // the padding group, 0 for none
        int8_t* codes;
        float* scales;
        int32_t* sums;
        uint16_t* bf16;
        float* floats;
    };

    Values values_of(const llmk_matrix& w) const {
        if (is_integer(w.kind)) return rounds_ ? Values::kCodes : Values::kFloats;
        return w.kind == LLMK_F32 ? Values::kFloats : Values::kWords;
    }
    static int64_t group_of(const llmk_matrix& w) { return is_integer(w.kind) ? padding_group(w) : 0; }

    const Form* find(const llmk_matrix& w) const {
        for (int i = 0; i < count_; ++i)
            if (forms_[i].values == values_of(w) && forms_[i].group == group_of(w)) return &forms_[i];
        return nullptr;
    }

    // Rows are multiplied by fours: those behind the last one are of sum zero.
    void clear_missing(const Form& form, int64_t last) const {
        for (int64_t segment = 0; segment < form.segments; ++segment)
            for (int64_t i = 1; i <= (-rows_ & 3); ++i) form.sums[last + segment * kTile + i] = 0;
    }

    void fill_segments(const Form& form, int64_t at, const float* x) const {
        const int64_t group = form.group == 0 ? columns_ : form.group;
        for (int64_t begin = 0; begin < columns_; begin += group) {
            const int64_t end = smaller(begin + group, columns_);
            for (int64_t column = begin; column < end; column += kSegment, at += kTile)
                fill_segment(form, at * kSegment, x + column, smaller(kSegment, end - column));
        }
    }

    static void fill_segment(const Form& form, int64_t at, const float* x, int64_t columns) {
        if (form.values == Values::kWords) return kernels().to_bf16(x, columns, kSegment, form.bf16 + at);
        for (int64_t i = 0; i < kSegment; ++i) form.floats[at + i] = i < columns ? x[i] : 0.0f;
    }

    int64_t rows_ = 0, columns_ = 0;
    bool rounds_ = true;
    int count_ = 0;
    Form forms_[5];  // of the matrices that take the same rows: integers of at most three groupings, words, floats
};

// Runs `row(i)` for all rows, some at a time.
template <class Row>
void run_rows(Team& team, int64_t rows, Row&& row) {
    const int64_t some = larger(1, smaller(16, ceil_div(rows, team.threads() * 4)));
    team.run(ceil_div(rows, some), [&](int64_t chunk) {
        for (int64_t i = chunk * some; i < smaller((chunk + 1) * some, rows); ++i) row(i);
    });
}

// A part of a product: rows of activations by rows of the matrix, sums[i * stride + o].
struct Part {
    int64_t first_row, rows, first_output, outputs;
    float* sums;
    int64_t stride;
};

// To its place in y [M, outputs].
inline void copy_part(const Part& part, float* y, int64_t outputs) {
    for (int64_t i = 0; i < part.rows; ++i)
        std::memcpy(y + (part.first_row + i) * outputs + part.first_output, part.sums + i * part.stride,
                    static_cast<size_t>(part.outputs) * sizeof(float));
}

// A matrix and the rows that it multiplies, and another of as many rows that is added to it.
struct Factor {
    const llmk_matrix* w;
    const TileSet* x;
    const llmk_matrix* added = nullptr;
    const TileSet* added_x = nullptr;
};

// Parts of products: a run of blocks goes through all tiles before the next, so that weights are read once.
class PartsOf {
  public:
    PartsOf(const Factor& factor, int threads)
        : factor_(factor), tiles_(factor.x->tiles()), blocks_(blocks(*factor.w)),
          size_(larger(1, smaller(16, ceil_div(blocks_ * tiles_, threads * 4)))) {}
    int64_t count() const { return tiles_ * ceil_div(blocks_, size_); }
    // `room` is as large as `sums`.
    Part multiply(int64_t index, float* sums, float* room) const {
        const int64_t tile = index % tiles_, first = index / tiles_ * size_, end = smaller(first + size_, blocks_);
        const Tile x = factor_.x->of(*factor_.w, tile);
        kernels().multiply_tile(*factor_.w, x, first, end, sums, size_ * kBlock);
        const int64_t rows = smaller(end * kBlock, factor_.w->rows);
        if (factor_.added != nullptr) {
            kernels().multiply_tile(*factor_.added, factor_.added_x->of(*factor_.added, tile), first, end, room, size_ * kBlock);
            for (int64_t i = 0; i < x.rows; ++i)
                kernels().add(room + i * size_ * kBlock, nullptr, rows - first * kBlock, sums + i * size_ * kBlock);
        }
        return {tile * kTile, x.rows, first * kBlock, rows - first * kBlock, sums, size_ * kBlock};
    }

  private:
    Factor factor_;
    int64_t tiles_, blocks_, size_;
};

constexpr int64_t kMostSums = kTile * 16 * kBlock;  // of a part

// Products, every part of them handed to `done(index of the factor, part)` where it is computed.
template <class Done>
void multiply_tiles(Team& team, const Factor* factors, int count, Done&& done) {
    static thread_local Arena arena;
    float* sums = nullptr;
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += PartsOf(factors[i], team.threads()).count();
    const auto prepare = [&] {
        arena.clear();
        sums = arena.take<float>(2 * kMostSums);
    };
    team.run(total, {}, prepare, [&](int64_t index) {
        for (int i = 0; i < count; ++i) {
            const PartsOf parts(factors[i], team.threads());
            if (index < parts.count()) return done(i, parts.multiply(index, sums, sums + kMostSums));
            index -= parts.count();
        }
    });
}

// The same for two matrices of one shape whose parts are needed together.
template <class Done>
void multiply_paired_tiles(Team& team, const Factor* factors, Done&& done) {
    static thread_local Arena arena;
    float* sums = nullptr;
    const PartsOf parts(factors[0], team.threads()), others(factors[1], team.threads());
    const auto prepare = [&] {
        arena.clear();
        sums = arena.take<float>(3 * kMostSums);
    };
    team.run(parts.count(), {}, prepare, [&](int64_t index) {
        float* room = sums + 2 * kMostSums;
        const Part first = parts.multiply(index, sums, room);
        done(first, others.multiply(index, sums + kMostSums, room));
    });
}

}  // namespace llmk
