// Products of many rows of activations: the tiles that they are cut into, and the sharing out of their products.
#pragma once

#include "inputs.h"
#include "pool.h"

namespace llmk {

constexpr int64_t kManyRows = 16;  // from here on tiles are faster than rows one by one

// Rows of activations as tiles, for all integer matrices that take them.
class TileSet {
  public:
    TileSet() = default;
    TileSet(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {}

    int64_t tiles() const { return ceil_div(rows_, kTile); }

    // Makes room for what a matrix takes; before any `fill_row`.
    void add(Arena& arena, const llmk_matrix& w) {
        if (find(w) != nullptr) return;
        Form& form = forms_[count_++];
        form = {padding_group(w), padded_columns(w) / kSegment, nullptr, nullptr, nullptr};
        const int64_t entries = tiles() * form.segments * kTile;
        form.codes = arena.take<int8_t>(entries * kSegment);
        form.scales = arena.take<float>(entries);
        form.sums = arena.take<int32_t>(entries);
    }

    void fill_row(int64_t row, const float* x) const {
        for (int i = 0; i < count_; ++i) {
            const Form& form = forms_[i];
            const int64_t at = row / kTile * form.segments * kTile + row % kTile;
            kernels().quantize(x, columns_, form.group, kTile, form.codes + at * kSegment, form.scales + at, form.sums + at);
        }
    }

    Tile of(const llmk_matrix& w, int64_t tile) const {
        const Form& form = *find(w);
        const int64_t at = tile * form.segments * kTile;
        return {smaller(kTile, rows_ - tile * kTile), form.codes + at * kSegment, form.scales + at, form.sums + at};
    }

  private:
    struct Form {
        int64_t group, segments;
        int8_t* codes;
        float* scales;
        int32_t* sums;
    };

    const Form* find(const llmk_matrix& w) const {
        for (int i = 0; i < count_; ++i)
            if (forms_[i].group == padding_group(w)) return &forms_[i];
        return nullptr;
    }

    int64_t rows_ = 0, columns_ = 0;
    int count_ = 0;
    Form forms_[3];  // of the matrices that take the same rows, at most three
};

// Runs `row(i)` for all rows, some at a time.
template <class Row>
void run_rows(Team& team, int64_t rows, Row&& row) {
    const int64_t some = larger(1, smaller(16, ceil_div(rows, team.threads() * 4)));
    team.run(ceil_div(rows, some), [] {}, [&](int64_t chunk) {
        for (int64_t i = chunk * some; i < smaller((chunk + 1) * some, rows); ++i) row(i);
    });
}

// A part of a product: rows of activations by rows of the matrix, sums[i * stride + o].
struct Part {
    int64_t first_row, rows, first_output, outputs;
    float* sums;
    int64_t stride;
};

// The product of a matrix, every part of it handed to `done` where it is computed. A run of blocks goes through all tiles
// before the next: weights are read once, activations stay near.
template <class Done>
void multiply_tiles(Team& team, const llmk_matrix& w, const TileSet& inputs, Done&& done) {
    static thread_local Arena arena;
    const int64_t tiles = inputs.tiles();
    const int64_t size = larger(1, smaller(8, ceil_div(blocks(w) * tiles, team.threads() * 4))), stride = size * kBlock;
    float* sums = nullptr;
    const auto prepare = [&] {
        arena.clear();
        sums = arena.take<float>(kTile * stride);
    };
    team.run(tiles * ceil_div(blocks(w), size), prepare, [&](int64_t chunk) {
        const int64_t tile = chunk % tiles, first = chunk / tiles * size, end = smaller(first + size, blocks(w));
        const Tile x = inputs.of(w, tile);
        kernels().multiply_tile(w, x, first, end, sums, stride);
        done(Part{tile * kTile, x.rows, first * kBlock, smaller(end * kBlock, w.rows) - first * kBlock, sums, stride});
    });
}

}  // namespace llmk
