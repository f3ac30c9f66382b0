// From the stored layout to the kernel layout.
#include <cstring>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace llmk {
namespace {

int64_t row_population(const llmk_stored& s, int64_t row) {
    const uint8_t* mask = s.mask + row * ceil_div(s.columns, 8);
    int64_t count = 0;
    for (int64_t i = 0; i < s.columns / 8; ++i) count += __builtin_popcount(mask[i]);
    if (s.columns % 8) count += __builtin_popcount(mask[s.columns / 8] & ((1 << (s.columns % 8)) - 1));
    return count;
}

int64_t value_capacity(const llmk_stored& s) {
    return s.bits == 4 ? s.value_bytes * 2 : s.bits == 8 ? s.value_bytes : s.value_bytes / type_bytes(s.value_type);
}

// Where the values of each row begin, counted in values; false where the mask asks for other values than there are.
bool find_rows(const llmk_stored& s, std::vector<int64_t>& starts) {
    starts.assign(static_cast<size_t>(s.rows) + 1, 0);
    const int64_t step = s.bits == 4 ? round_up(s.row_values, 2) : s.row_values;
    for (int64_t row = 0; row < s.rows; ++row) {
        const int64_t count = s.mask != nullptr ? row_population(s, row) : s.columns;
        if (s.row_values != 0 && count != s.row_values) return false;
        starts[row + 1] = starts[row] + (s.row_values != 0 ? step : count);
    }
    const int64_t used = s.bits == 4 ? round_up(starts[s.rows], 2) : starts[s.rows];
    return used == value_capacity(s);
}

// A row's codes (or bf16 words) and mask in padded columns, the code of zero where nothing is kept.
class RowReader {
  public:
    RowReader(const llmk_stored& s, const llmk_matrix& w, const std::vector<int64_t>& starts)
        : s_(s), starts_(starts), group_(padding_group(w)), padded_(padded_columns(w)),
          last_(value_capacity(s) - 1) {}

    template <class Value>
    void read(int64_t row, Value* values, uint8_t* kept_columns) const {
        std::memset(kept_columns, 0, static_cast<size_t>(padded_));
        std::memset(values, 0, static_cast<size_t>(padded_) * sizeof(Value));
        if (row >= s_.rows) return;
        int64_t next = starts_[row];
        const int64_t group = group_ == 0 ? s_.columns : group_;
        for (int64_t begin = 0; begin < s_.columns; begin += group) {
            const int64_t at = begin / group * round_up(group, kSegment);
            next = read_columns(row, begin, smaller(begin + group, s_.columns), next, values + at, kept_columns + at);
        }
    }

  private:
    // Without branches on the mask, which would be mispredicted half of the time; the index of the value behind the last.
    template <class Value>
    int64_t read_columns(int64_t row, int64_t begin, int64_t end, int64_t next, Value* values, uint8_t* kept_columns) const {
        const uint8_t* mask = s_.mask == nullptr ? nullptr : s_.mask + row * ceil_div(s_.columns, 8);
        for (int64_t column = begin; column < end; ++column) {
            const uint8_t is_kept = mask == nullptr ? 1 : (mask[column / 8] >> (column % 8)) & 1;
            const int32_t kept_value = last_ < 0 ? 0 : value(smaller(next, last_)), zero = code_of_zero(row, column);
            kept_columns[column - begin] = is_kept;
            values[column - begin] = static_cast<Value>(is_kept ? kept_value : zero);
            next += is_kept;
        }
        return next;
    }
    int32_t value(int64_t index) const {
        if (s_.bits == 4) return (s_.values[index / 2] >> (4 * (index % 2))) & 15;
        if (s_.bits == 8) return s_.zero_type == LLMK_TYPE_NONE ? s_.values[index] ^ 0x80 : s_.values[index];
        uint16_t word;
        std::memcpy(&word, s_.values + 2 * index, 2);
        return word;
    }
    int32_t code_of_zero(int64_t row, int64_t column) const {
        if (s_.bits == 16 || s_.mask == nullptr) return 0;
        if (s_.zero_type == LLMK_TYPE_NONE) return s_.bits == 4 ? 8 : 128;
        return s_.zeros[row * ceil_div(s_.columns, s_.group) + column / s_.group];
    }

    const llmk_stored& s_;
    const std::vector<int64_t>& starts_;
    int64_t group_, padded_, last_;
};

// Sixteen rows in padded columns.
template <class Value>
struct BlockRows {
    explicit BlockRows(const llmk_matrix& w)
        : padded(padded_columns(w)), values(static_cast<size_t>(padded * kBlock)), kept(values.size()) {}
    void read(const RowReader& reader, int64_t block) {
        for (int64_t r = 0; r < kBlock; ++r) reader.read(block * kBlock + r, &values[r * padded], &kept[r * padded]);
    }
    int64_t padded;
    std::vector<Value> values;
    std::vector<uint8_t> kept;
};

void write_dense(const llmk_matrix& w, const BlockRows<uint8_t>& rows, uint8_t* out) {
    if (w.kind == LLMK_INT8) {
        for (int64_t column = 0; column < rows.padded; column += 4)
            for (int64_t r = 0; r < kBlock; ++r, out += 4) std::memcpy(out, &rows.values[r * rows.padded + column], 4);
        return;
    }
    for (int64_t column = 0; column < rows.padded; column += 8)
        for (int64_t r = 0; r < kBlock; ++r)
            for (int64_t c = 0; c < 4; ++c) {
                const uint8_t* codes = &rows.values[r * rows.padded + column + c];
                *out++ = static_cast<uint8_t>(codes[0] | (codes[4] << 4));
            }
}

// One mask of a block and the values whose bit is set, those of int4 as a byte each.
template <class Value>
struct MaskedValues {
    static constexpr int64_t kColumns = 4 / sizeof(Value), kBits = kBlock * kColumns;
    uint64_t mask = 0;
    int64_t count = 0;
    Value values[kBits];
    MaskedValues(const BlockRows<Value>& rows, int64_t column) {
        for (int64_t r = 0; r < kBlock; ++r)
            for (int64_t c = 0; c < kColumns; ++c) {  // no branch, as above
                const int64_t at = r * rows.padded + column + c;
                values[count] = rows.values[at];
                mask |= static_cast<uint64_t>(rows.kept[at]) << (r * kColumns + c);
                count += rows.kept[at];
            }
    }
};

template <class Value>
int64_t values_bytes(const llmk_matrix& w, int64_t count) {
    return w.kind == LLMK_SPARSE_INT4 ? ceil_div(count, 2) : count * static_cast<int64_t>(sizeof(Value));
}

// Segments of masks and values.
template <class Value>
void write_sparse(const llmk_matrix& w, const BlockRows<Value>& rows, uint8_t* out) {
    using Some = MaskedValues<Value>;
    for (int64_t segment = 0; segment < rows.padded; segment += kSegment) {
        uint8_t* masks = out;
        out += kLine;
        for (int64_t column = segment; column < segment + kSegment; column += Some::kColumns, masks += Some::kBits / 8) {
            const Some some(rows, column);
            std::memcpy(masks, &some.mask, Some::kBits / 8);
            if (w.kind != LLMK_SPARSE_INT4) std::memcpy(out, some.values, static_cast<size_t>(some.count) * sizeof(Value));
            else
                for (int64_t i = 0; i < some.count; ++i) out[i / 2] = static_cast<uint8_t>(out[i / 2] | (some.values[i] << (4 * (i % 2))));
            out += values_bytes<Value>(w, some.count);
        }
    }
}

// Bytes of every record's masks and values.
template <class Value>
void measure_sparse(const llmk_stored& s, const llmk_matrix& w, const std::vector<int64_t>& starts, std::vector<int64_t>& bytes) {
    const int64_t masks = padded_columns(w) / kSegment * kLine;
    if (w.kind != LLMK_SPARSE_INT4) {  // as many values as the rows have
        for (int64_t block = 0; block < blocks(w); ++block) {
            const int64_t count = starts[smaller((block + 1) * kBlock, s.rows)] - starts[block * kBlock];
            bytes[block] = masks + values_bytes<Value>(w, count);
        }
        return;
    }
    const RowReader reader(s, w, starts);
    BlockRows<Value> rows(w);
    for (int64_t block = 0; block < blocks(w); ++block) {
        rows.read(reader, block);
        bytes[block] = masks;
        for (int64_t column = 0; column < rows.padded; column += MaskedValues<Value>::kColumns)
            bytes[block] += values_bytes<Value>(w, MaskedValues<Value>(rows, column).count);
    }
}

// Begin of every record, and behind the last one the end of all.
std::vector<int64_t> record_starts(const llmk_stored& s, const llmk_matrix& w, const std::vector<int64_t>& starts) {
    std::vector<int64_t> bytes(static_cast<size_t>(blocks(w)));
    if (w.kind == LLMK_SPARSE_BF16) measure_sparse<uint16_t>(s, w, starts, bytes);
    else measure_sparse<uint8_t>(s, w, starts, bytes);
    std::vector<int64_t> records{table_bytes(w)};
    for (int64_t value_bytes : bytes)
        records.push_back(records.back() + scale_bytes(w) + zero_bytes(w) + round_up(value_bytes, kLine));
    return records;
}

// Per-group entries of 16 rows, groups in order and rows within a group.
void write_groups(const llmk_stored& s, const uint8_t* from, int64_t bytes, int64_t block, uint8_t* out) {
    if (from == nullptr) return;
    const int64_t of_row = ceil_div(s.columns, s.group);
    for (int64_t g = 0; g < of_row; ++g)
        for (int64_t r = 0; r < kBlock; ++r, out += bytes) {
            const int64_t row = block * kBlock + r;
            if (row < s.rows) std::memcpy(out, from + (row * of_row + g) * bytes, static_cast<size_t>(bytes));
        }
}

template <class Value>
void write_record(const llmk_stored& s, const llmk_matrix& w, BlockRows<Value>& rows, const RowReader& reader, int64_t block,
                  uint8_t* out) {
    rows.read(reader, block);
    write_groups(s, s.scales, type_bytes(w.scale_type), block, out);
    write_groups(s, s.zeros, type_bytes(w.zero_type), block, out + scale_bytes(w));
    uint8_t* values = out + scale_bytes(w) + zero_bytes(w);
    if (is_sparse(w.kind)) write_sparse(w, rows, values);
    else if constexpr (sizeof(Value) == 1) write_dense(w, rows, values);
}

template <class Value>
void write_records(const llmk_stored& s, const llmk_matrix& w, const std::vector<int64_t>& starts, int threads) {
    const RowReader reader(s, w, starts);
    run_team(threads, [&](Team& team) {
        BlockRows<Value> rows(w);
        team.run(blocks(w), [&](int64_t block) {
            write_record(s, w, rows, reader, block, const_cast<uint8_t*>(record(w, block)));
        });
    });
}

const char* check(const llmk_stored& s) {
    if (s.rows < 1 || s.columns < 1 || s.group < 1) return "a weight has no rows, columns or groups";
    if (s.mask != nullptr && s.zero_type != LLMK_TYPE_NONE && s.zero_type != LLMK_TYPE_U8)
        return "sparse integers with floating zero points have no kernel layout";
    if (s.bits == 16 && (s.mask == nullptr || s.value_type != LLMK_TYPE_BF16 || !kernels().expands))
        return "floating values have a kernel layout where sparse, bfloat16, and on AVX512 only";
    return nullptr;
}

int32_t kind_of(const llmk_stored& s) {
    if (s.bits == 16) return LLMK_SPARSE_BF16;
    const int64_t bits = s.bits, all = static_cast<int64_t>(s.rows) * s.columns;
    const bool smaller_sparse = s.mask != nullptr && all + value_capacity(s) * bits < all * bits;
    if (kernels().expands && smaller_sparse) return bits == 8 ? LLMK_SPARSE_INT8 : LLMK_SPARSE_INT4;
    return bits == 8 ? LLMK_INT8 : LLMK_INT4;
}

}  // namespace
}  // namespace llmk

using namespace llmk;

LLMK_API const char* llmk_plan(const llmk_stored* stored, llmk_matrix* matrix, int64_t* bytes) {
    const llmk_stored& s = *stored;
    if (const char* fault = check(s)) return fault;
    *matrix = {kind_of(s), s.rows, s.columns, s.group, s.scale_type, s.zero_type, nullptr};
    std::vector<int64_t> starts;
    if (!find_rows(s, starts)) return "the mask and the number of values contradict each other";
    *bytes = is_sparse(matrix->kind) ? record_starts(s, *matrix, starts).back() : blocks(*matrix) * record_bytes(*matrix);
    *bytes += kLine;  // expanding reads a whole line, whatever is left
    return nullptr;
}

LLMK_API const char* llmk_pack(const llmk_stored* stored, const llmk_matrix* matrix, uint8_t* data, int threads) {
    const llmk_stored& s = *stored;
    llmk_matrix w = *matrix;
    if (const char* fault = check(s)) return fault;
    std::vector<int64_t> starts;
    if (!find_rows(s, starts)) return "the mask and the number of values contradict each other";
    w.data = data;
    if (is_sparse(w.kind)) {
        const std::vector<int64_t> records = record_starts(s, w, starts);
        std::memset(data, 0, static_cast<size_t>(records.back() + kLine));
        std::memcpy(data, records.data(), records.size() * sizeof(int64_t));
    } else {
        std::memset(data, 0, static_cast<size_t>(blocks(w) * record_bytes(w) + kLine));
    }
    if (w.kind == LLMK_SPARSE_BF16) write_records<uint16_t>(s, w, starts, threads);
    else write_records<uint8_t>(s, w, starts, threads);
    return nullptr;
}
