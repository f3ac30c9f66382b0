// Products of many rows: included by kernels.inl.
//
// A segment of 32 columns of a block of 16 rows is expanded once, into registers where there are enough of them, and taken
// by every row of a tile of activations before the next one. The arithmetic of integers and its order are those of
// integer_block, so that a row's result is the same however many rows come with it.

// acc[r] + the 32 codes of row r, rows 32 bytes apart, by a segment's weights.
template <bool Narrow, int R>
inline void dot_rows(Ints* acc, const Codes* weights, const int8_t* x) {
#ifdef LLMK_SEGMENT_LANES
    dot_segment<Narrow, R>(acc, weights, x);
#else
    for (int i = 0; i < 8; ++i)
        for (int r = 0; r < R; ++r) {
            if (Narrow) acc[r] = dot_narrow(acc[r], weights[i], x + 32 * r + 4 * i);
            else acc[r] = dot_wide(acc[r], weights[i], x + 32 * r + 4 * i);
        }
#endif
}

// What a segment of a tile adds to its sums [rows, 16], rows in fours; those behind the last are of no meaning.
template <bool Narrow, bool Symmetric>
inline void segment_tile(const Codes* weights, Floats scale, Floats zero, int32_t offset, const Tile& x, int64_t segment,
                         float* out) {
    constexpr int R = 4;
    const int8_t* codes = x.codes + segment * kTile * kSegment;
    const float* scales = x.scales + segment * kTile;
    const int32_t* sums = x.sums + segment * kTile;
    for (int64_t m = 0; m < x.rows; m += R, codes += R * kSegment, out += R * kBlock) {
        Ints acc[R];
        for (int r = 0; r < R; ++r) acc[r] = i_set(offset * sums[m + r]);
        dot_rows<Narrow, R>(acc, weights, codes);
        for (int r = 0; r < R; ++r) {
            Floats product = f_of(acc[r]);
            if (!Symmetric) product = f_fnma(zero, f_set(static_cast<float>(sums[m + r])), product);
            f_store(out + r * kBlock, f_fma(f_mul(product, f_set(scales[m + r])), scale, f_load(out + r * kBlock)));
        }
    }
}

template <class Reader>
inline void integer_tile(const llmk_matrix& w, const uint8_t* record, const Tile& x, float* out) {
    const uint8_t* scales = record;
    const uint8_t* zeros = scales + scale_bytes(w);
    Reader reader(w, zeros + zero_bytes(w));
    const int64_t segments = padded_columns(w) / kSegment, of_group = group_segments(w);
    const int64_t scale_step = kBlock * type_bytes(w.scale_type), zero_step = kBlock * type_bytes(w.zero_type);
    const bool symmetric = w.zero_type == LLMK_TYPE_NONE;
    const int32_t offset = (Reader::kNarrow ? 0 : kWideOffset) - (symmetric ? (Reader::kNarrow ? 8 : 128) : 0);

    for (int64_t m = 0; m < round_up(x.rows, 4); ++m) f_store(out + m * kBlock, f_zero());
    for (int64_t begin = 0; begin < segments; begin += of_group, scales += scale_step, zeros += zero_step) {
        reader.group(zeros);
        const Floats scale = load_scales(scales, w.scale_type);
        const Floats zero = symmetric ? f_zero() : load_scales(zeros, w.zero_type);
        for (int64_t segment = begin; segment < smaller(begin + of_group, segments); ++segment) {
            Codes weights[8];
            reader.segment([&](Codes codes, int column) { weights[column / 4] = codes; });
            if (symmetric) segment_tile<Reader::kNarrow, true>(weights, scale, zero, offset, x, segment, out);
            else segment_tile<Reader::kNarrow, false>(weights, scale, zero, offset, x, segment, out);
        }
    }
}

// ---- floating matrices ----

// 64 bytes of every row of a block, from a column on, turned: vector i holds lane i of all rows.
template <class Value>
inline void turn_rows(const llmk_matrix& w, int64_t row, int64_t column, Floats* turned) {
    constexpr int64_t room = 64 / sizeof(Value);
    const Value* from = reinterpret_cast<const Value*>(w.data) + row * w.columns + column;
    const int64_t rows = smaller(kBlock, w.rows - row), count = smaller(room, w.columns - column);
    for (int64_t r = 0; r < kBlock; ++r, from += w.columns) {
        if (r < rows && count == room) {
            turned[r] = f_load(reinterpret_cast<const float*>(from));
            continue;
        }
        float some[16] = {};
        if (r < rows && count > 0) __builtin_memcpy(some, from, static_cast<size_t>(count) * sizeof(Value));
        turned[r] = f_load(some);
    }
    f_turn(turned);
}

struct PairsOfRows {  // bf16
    static constexpr int kParts = 1;
    const llmk_matrix& w;
    int64_t row, column = 0;
    PairsOfRows(const llmk_matrix& matrix, int64_t block) : w(matrix), row(block * kBlock) {}
    void next(Floats* weights) {
        turn_rows<uint16_t>(w, row, column, weights);
        column += kSegment;
    }
    static const uint16_t* inputs(const Tile& x) { return x.bf16; }
    static Floats dot(Floats acc, Floats weights, const uint16_t* x) { return dot_pair(acc, weights, x); }
};

struct FloatsOfRows {
    static constexpr int kParts = 2;  // of a segment
    const llmk_matrix& w;
    int64_t row, column = 0;
    FloatsOfRows(const llmk_matrix& matrix, int64_t block) : w(matrix), row(block * kBlock) {}
    void next(Floats* weights) {
        turn_rows<float>(w, row, column, weights);
        column += kSegment / kParts;
    }
    static const float* inputs(const Tile& x) { return x.floats; }
    static Floats dot(Floats acc, Floats weights, const float* x) { return f_fma(weights, f_set(*x), acc); }
};

#ifdef LLMK_SPARSE_LANES
struct SparsePairs {
    static constexpr int kParts = 1;
    const uint8_t* values;
    SparsePairs(const llmk_matrix& w, int64_t block) : values(record(w, block)) {}
    void next(Floats* weights) {
        Masks<uint32_t> masks(values);
        for (int i = 0; i < 16; ++i) weights[i] = expand_pairs(masks.next(), values);
    }
    static const uint16_t* inputs(const Tile& x) { return x.bf16; }
    static Floats dot(Floats acc, Floats weights, const uint16_t* x) { return dot_pair(acc, weights, x); }
};
#endif

template <class Panel>
inline void floating_tile(const llmk_matrix& w, int64_t block, const Tile& x, float* out) {
    constexpr int R = 4, columns = kSegment / Panel::kParts / 16;  // of a vector of weights
    Panel panel(w, block);
    for (int64_t m = 0; m < round_up(x.rows, R); ++m) f_store(out + m * kBlock, f_zero());
    for (int64_t segment = 0; segment < ceil_div(w.columns, kSegment); ++segment)
        for (int part = 0; part < Panel::kParts; ++part) {
            Floats weights[16];
            panel.next(weights);
            const auto* inputs = Panel::inputs(x) + segment * kTile * kSegment + part * 16 * columns;
            for (int64_t m = 0; m < x.rows; m += R) {
                Floats acc[R];
                for (int r = 0; r < R; ++r) acc[r] = f_load(out + (m + r) * kBlock);
                for (int i = 0; i < 16; ++i)
                    for (int r = 0; r < R; ++r) acc[r] = Panel::dot(acc[r], weights[i], inputs + (m + r) * kSegment + i * columns);
                for (int r = 0; r < R; ++r) f_store(out + (m + r) * kBlock, acc[r]);
            }
        }
}

inline void block_tile(const llmk_matrix& w, int64_t block, const Tile& x, float* out) {
    switch (w.kind) {
        case LLMK_F32: return floating_tile<FloatsOfRows>(w, block, x, out);
        case LLMK_BF16: return floating_tile<PairsOfRows>(w, block, x, out);
        case LLMK_INT8: return integer_tile<DenseInt8>(w, record(w, block), x, out);
        case LLMK_INT4: return integer_tile<DenseInt4>(w, record(w, block), x, out);
#ifdef LLMK_SPARSE_LANES
        case LLMK_SPARSE_INT8: return integer_tile<Sparse<false>>(w, record(w, block), x, out);
        case LLMK_SPARSE_INT4: return integer_tile<Sparse<true>>(w, record(w, block), x, out);
        case LLMK_SPARSE_BF16: return floating_tile<SparsePairs>(w, block, x, out);
#endif
        default: __builtin_trap();
    }
}

void multiply_tile(const llmk_matrix& w, const Tile& x, int64_t first_block, int64_t end_block, float* out, int64_t stride) {
    alignas(64) float sums[kTile * kBlock];
    for (int64_t block = first_block; block < end_block; ++block, out += kBlock) {
        block_tile(w, block, x, sums);
        const int64_t rows = smaller(kBlock, w.rows - block * kBlock);
        for (int64_t m = 0; m < x.rows; ++m) {
            if (rows == kBlock) f_store(out + m * stride, f_load(sums + m * kBlock));
            else f_store_some(out + m * stride, f_load(sums + m * kBlock), rows);
        }
    }
}
