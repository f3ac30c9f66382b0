// Products of many rows: included by kernels.inl.
//
// A segment of 32 columns of a block of 16 rows is expanded once, into registers where there are enough of them, and taken
// by every row of a tile of activations before the next one. The arithmetic of integers and its order are those of
// integer_block, so that a row's result is the same however many rows come with it.

// acc[b][r] + the 32 codes of row r, rows 32 bytes apart, by the weights of block b in a segment.
template <bool Narrow, int B, int R>
inline void dot_rows(Ints (*acc)[R], const Codes (*weights)[8], const int8_t* x) {
#ifdef LLMK_SEGMENT_LANES
    for (int b = 0; b < B; ++b) dot_segment<Narrow, R>(acc[b], weights[b], x);
#else
    for (int i = 0; i < 8; ++i)
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) {  // innermost: the activations are loaded once for all blocks
                if (Narrow) acc[b][r] = dot_narrow(acc[b][r], weights[b][i], x + 32 * r + 4 * i);
                else acc[b][r] = dot_wide(acc[b][r], weights[b][i], x + 32 * r + 4 * i);
            }
#endif
}

// A segment of B blocks: its codes, and the scales and zero points of their groups.
template <int B>
struct SegmentWeights {
    Codes codes[B][8];
    Floats scale[B], zero[B];
};

// What a segment of a tile adds to its sums [rows, B, 16], rows in fours; those behind the last are of no meaning.
template <bool Narrow, bool Symmetric, int B>
inline void segment_tile(const SegmentWeights<B>& weights, int32_t offset, const Tile& x, int64_t segment, float* out) {
    constexpr int R = 4;
    const int8_t* codes = x.codes + segment * kTile * kSegment;
    const float* scales = x.scales + segment * kTile;
    const int32_t* sums = x.sums + segment * kTile;
    for (int64_t m = 0; m < x.rows; m += R, codes += R * kSegment) {
        Ints acc[B][R];
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) acc[b][r] = i_set(offset * sums[m + r]);
        dot_rows<Narrow, B, R>(acc, weights.codes, codes);
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b, out += kBlock) {
                Floats product = f_of(acc[b][r]);
                if (!Symmetric) product = f_fnma(weights.zero[b], f_set(static_cast<float>(sums[m + r])), product);
                f_store(out, f_fma(f_mul(product, f_set(scales[m + r])), weights.scale[b], f_load(out)));
            }
    }
}

// The records of B blocks, read side by side.
template <class Reader, int B>
struct BlockReaders {
    const llmk_matrix* w = nullptr;
    const uint8_t *scales[B], *zeros[B];
    Reader readers[B];
    BlockReaders() = default;
    static const uint8_t* values(const llmk_matrix& w, int64_t block) { return record(w, block) + scale_bytes(w) + zero_bytes(w); }
    BlockReaders(const llmk_matrix& matrix, int64_t block) : w(&matrix) {
        for (int b = 0; b < B; ++b) {
            scales[b] = record(matrix, block + b);
            zeros[b] = scales[b] + scale_bytes(matrix);
            readers[b] = Reader(matrix, values(matrix, block + b));
        }
    }
    void group(SegmentWeights<B>& weights) {
        for (int b = 0; b < B; ++b) {
            readers[b].group(zeros[b]);
            weights.scale[b] = load_scales(scales[b], w->scale_type);
            weights.zero[b] = w->zero_type == LLMK_TYPE_NONE ? f_zero() : load_scales(zeros[b], w->zero_type);
            scales[b] += kBlock * type_bytes(w->scale_type);
            zeros[b] += kBlock * type_bytes(w->zero_type);
        }
    }
    void segment(SegmentWeights<B>& weights) {
        for (int b = 0; b < B; ++b) readers[b].segment([&](Codes codes, int column) { weights.codes[b][column / 4] = codes; });
    }
};

// Sums [rows, B, 16] of B blocks.
template <class Reader, int B>
inline void integer_tile(const llmk_matrix& w, int64_t block, const Tile& x, float* out) {
    BlockReaders<Reader, B> readers(w, block);
    SegmentWeights<B> weights;
    const int64_t segments = padded_columns(w) / kSegment, of_group = group_segments(w);
    const bool symmetric = w.zero_type == LLMK_TYPE_NONE;
    const int32_t offset = (Reader::kNarrow ? 0 : kWideOffset) - (symmetric ? (Reader::kNarrow ? 8 : 128) : 0);

    for (int64_t i = 0; i < round_up(x.rows, 4) * B; ++i) f_store(out + i * kBlock, f_zero());
    for (int64_t begin = 0; begin < segments; begin += of_group) {
        readers.group(weights);
        for (int64_t segment = begin; segment < smaller(begin + of_group, segments); ++segment) {
            readers.segment(weights);
            if (symmetric) segment_tile<Reader::kNarrow, true, B>(weights, offset, x, segment, out);
            else segment_tile<Reader::kNarrow, false, B>(weights, offset, x, segment, out);
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
        if (r < rows) prefetch(from + 8 * room);
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
    const llmk_matrix* w = nullptr;
    int64_t row = 0, column = 0;
    PairsOfRows() = default;
    PairsOfRows(const llmk_matrix& matrix, int64_t block) : w(&matrix), row(block * kBlock) {}
    void next(Floats* weights) {
        turn_rows<uint16_t>(*w, row, column, weights);
        column += kSegment;
    }
    static const uint16_t* inputs(const Tile& x) { return x.bf16; }
    static Floats dot(Floats acc, Floats weights, const uint16_t* x) { return dot_pair(acc, weights, x); }
};

struct FloatsOfRows {
    static constexpr int kParts = 2;  // of a segment
    const llmk_matrix* w = nullptr;
    int64_t row = 0, column = 0;
    FloatsOfRows() = default;
    FloatsOfRows(const llmk_matrix& matrix, int64_t block) : w(&matrix), row(block * kBlock) {}
    void next(Floats* weights) {
        turn_rows<float>(*w, row, column, weights);
        column += kSegment / kParts;
    }
    static const float* inputs(const Tile& x) { return x.floats; }
    static Floats dot(Floats acc, Floats weights, const float* x) { return f_fma(weights, f_set(*x), acc); }
};

// What integers stand for.
template <class Reader>
struct FloatsOfCodes {
    static constexpr int kParts = 2;
    const llmk_matrix* w = nullptr;
    BlockReaders<Reader, 1> records;
    SegmentWeights<1> weights;
    int64_t vectors = 0;
    FloatsOfCodes() = default;
    FloatsOfCodes(const llmk_matrix& matrix, int64_t block) : w(&matrix), records(matrix, block) {}
    void next(Floats* columns) {
        const int64_t part = vectors % 2, segment = vectors++ / 2;
        if (part == 0 && segment % group_segments(*w) == 0) records.group(weights);
        if (part == 0) records.segment(weights);
        const Floats zero = w->zero_type == LLMK_TYPE_NONE ? f_set(Reader::kNarrow ? 8.0f : 128.0f) : weights.zero[0];
        for (int i = 0; i < 16; ++i)
            columns[i] = f_mul(f_sub(f_column(weights.codes[0][4 * part + i / 4], i % 4), zero), weights.scale[0]);
    }
    static const float* inputs(const Tile& x) { return x.floats; }
    static Floats dot(Floats acc, Floats weights, const float* x) { return f_fma(weights, f_set(*x), acc); }
};

#ifdef LLMK_SPARSE_LANES
struct SparsePairs {
    static constexpr int kParts = 1;
    const uint8_t* values = nullptr;
    SparsePairs() = default;
    SparsePairs(const llmk_matrix& w, int64_t block) : values(record(w, block)) {}
    void next(Floats* weights) {
        Masks<uint32_t> masks(values);
        for (int i = 0; i < 16; ++i) weights[i] = expand_pairs(masks.next(), values);
    }
    static const uint16_t* inputs(const Tile& x) { return x.bf16; }
    static Floats dot(Floats acc, Floats weights, const uint16_t* x) { return dot_pair(acc, weights, x); }
};
#endif

// Sums [rows, B, 16] of B blocks. Weights of kDepth segments at a time are laid out in the first-level cache, vectors of all
// blocks side by side, and the sums of R rows stay in registers over them.
template <class Panel, int B>
inline void floating_tile(const llmk_matrix& w, int64_t block, const Tile& x, float* out) {
    constexpr int R = kFloatRows, columns = kSegment / Panel::kParts / 16;  // of a vector of weights
    constexpr int64_t kDepth = 8, kVectors = 16 * Panel::kParts;            // of a segment
    alignas(64) float laid[kDepth * kVectors * B * kBlock];
    Panel panels[B];
    for (int b = 0; b < B; ++b) panels[b] = Panel(w, block + b);
    for (int64_t i = 0; i < round_up(x.rows, R) * B; ++i) f_store(out + i * kBlock, f_zero());
    for (int64_t first = 0, segments = padded_columns(w) / kSegment; first < segments; first += kDepth) {
        const int64_t depth = smaller(kDepth, segments - first);
        for (int b = 0; b < B; ++b)
            for (int64_t v = 0; v < depth * kVectors; v += 16) {
                Floats weights[16];
                panels[b].next(weights);
                for (int i = 0; i < 16; ++i) f_store(laid + ((v + i) * B + b) * kBlock, weights[i]);
            }
        for (int64_t m = 0; m < x.rows; m += R) {
            Floats acc[R][B];
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) acc[r][b] = f_load(out + ((m + r) * B + b) * kBlock);
            const float* weights = laid;
            for (int64_t segment = first; segment < first + depth; ++segment) {
                const auto* inputs = Panel::inputs(x) + (segment * kTile + m) * kSegment;
                for (int64_t v = 0; v < kVectors; ++v, weights += B * kBlock, inputs += columns) {
                    Floats some[B];
                    for (int b = 0; b < B; ++b) some[b] = f_load(weights + b * kBlock);
                    for (int r = 0; r < R; ++r)
                        for (int b = 0; b < B; ++b) acc[r][b] = Panel::dot(acc[r][b], some[b], inputs + r * kSegment);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) f_store(out + ((m + r) * B + b) * kBlock, acc[r][b]);
        }
    }
}

// Sums [rows, B, 16] of B blocks of integers.
template <int B>
inline void integer_blocks(const llmk_matrix& w, int64_t block, const Tile& x, float* out) {
    switch (w.kind) {
        case LLMK_INT8: return integer_tile<DenseInt8, B>(w, block, x, out);
        case LLMK_INT4: return integer_tile<DenseInt4, B>(w, block, x, out);
#ifdef LLMK_SPARSE_LANES
        case LLMK_SPARSE_INT8: return integer_tile<Sparse<false>, B>(w, block, x, out);
        case LLMK_SPARSE_INT4: return integer_tile<Sparse<true>, B>(w, block, x, out);
#endif
        default: __builtin_trap();
    }
}

// The same by floating inputs.
template <int B>
inline void floating_blocks(const llmk_matrix& w, int64_t block, const Tile& x, float* out) {
    switch (w.kind) {
        case LLMK_F32: return floating_tile<FloatsOfRows, B>(w, block, x, out);
        case LLMK_BF16: return floating_tile<PairsOfRows, B>(w, block, x, out);
        case LLMK_INT8: return floating_tile<FloatsOfCodes<DenseInt8>, B>(w, block, x, out);
        case LLMK_INT4: return floating_tile<FloatsOfCodes<DenseInt4>, B>(w, block, x, out);
#ifdef LLMK_SPARSE_LANES
        case LLMK_SPARSE_INT8: return floating_tile<FloatsOfCodes<Sparse<false>>, B>(w, block, x, out);
        case LLMK_SPARSE_INT4: return floating_tile<FloatsOfCodes<Sparse<true>>, B>(w, block, x, out);
        case LLMK_SPARSE_BF16: return floating_tile<SparsePairs, B>(w, block, x, out);
#endif
        default: __builtin_trap();
    }
}

// Sums [rows, count, 16] of a tile to their places among those of all rows of the matrix.
inline void place_sums(const llmk_matrix& w, int64_t block, int count, const float* sums, int64_t m_count, float* out, int64_t stride) {
    for (int64_t m = 0; m < m_count; ++m)
        for (int b = 0; b < count; ++b, sums += kBlock) {
            const int64_t rows = smaller(kBlock, w.rows - (block + b) * kBlock);
            if (rows == kBlock) f_store(out + m * stride + b * kBlock, f_load(sums));
            else f_store_some(out + m * stride + b * kBlock, f_load(sums), rows);
        }
}

template <int B>
inline void multiply_blocks(const llmk_matrix& w, const Tile& x, int64_t& block, int64_t end, float*& out, int64_t stride) {
    alignas(64) float sums[B * kTile * kBlock];
    for (; block + B <= end; block += B, out += B * kBlock) {
        if (x.codes != nullptr) integer_blocks<B>(w, block, x, sums);
        else floating_blocks<B>(w, block, x, sums);
        place_sums(w, block, B, sums, x.rows, out, stride);
    }
}

void multiply_tile(const llmk_matrix& w, const Tile& x, int64_t first_block, int64_t end_block, float* out, int64_t stride) {
    int64_t block = first_block;
    if (kFloatBlocks > 2 && x.codes == nullptr) multiply_blocks<kFloatBlocks>(w, x, block, end_block, out, stride);
    if (kTileBlocks > 1) multiply_blocks<kTileBlocks>(w, x, block, end_block, out, stride);
    multiply_blocks<1>(w, x, block, end_block, out, stride);
}
