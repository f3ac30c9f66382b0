// The kernel layout of a weight.
//
// Sixteen rows are a block, and a block is one record that is read from its beginning to its end:
//
//   scales [G, 16] | zero points [G, 16] | values       each part begins at a multiple of 64 bytes
//
// Values are interleaved such that 64 bytes hold 4 columns of all 16 rows, as vpdpbusd takes them: byte `4 * row +
// column` (of int4, 8 columns: column c in the low half, column 4 + c in the high half; of bf16, 2 columns of words). A
// sparse record has, for every 32 columns, 64 bytes of masks, one bit for every value in that order, and behind them only
// the values whose bit is set, those of int4 two a byte and beginning at a whole byte for every 64: one stream, which the
// processor fetches ahead. In front of sparse records stands where each of them begins.
//
// Columns are padded such that every group begins at a multiple of 32, the columns that share a scale of the activations.
#pragma once

#include "llmkernel.h"

namespace llmk {

constexpr int64_t kBlock = 16;
constexpr int64_t kSegment = 32;
constexpr int64_t kLine = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t type_bytes(int32_t type) {
    return type == LLMK_TYPE_F32 ? 4 : type == LLMK_TYPE_NONE ? 0 : type == LLMK_TYPE_U8 ? 1 : 2;
}

inline bool is_row_major(int32_t kind) { return kind == LLMK_F32 || kind == LLMK_BF16; }
inline bool is_sparse(int32_t kind) { return kind >= LLMK_SPARSE_INT8; }
inline bool is_integer(int32_t kind) { return kind >= LLMK_INT8 && kind <= LLMK_SPARSE_INT4; }
inline bool is_int4(int32_t kind) { return kind == LLMK_INT4 || kind == LLMK_SPARSE_INT4; }

inline int64_t blocks(const llmk_matrix& w) { return ceil_div(w.rows, kBlock); }
inline int64_t groups(const llmk_matrix& w) { return ceil_div(w.columns, w.group); }

// Segments of a group, of the last one too where all groups are padded alike.
inline int64_t group_segments(const llmk_matrix& w) { return ceil_div(w.group, kSegment); }

inline int64_t padded_columns(int64_t columns, int64_t group) {
    const int64_t whole = columns / group, rest = columns % group;
    return whole * round_up(group, kSegment) + round_up(rest, kSegment);
}
inline int64_t padded_columns(const llmk_matrix& w) { return padded_columns(w.columns, w.group); }

// The group that the activations must be padded by, 0 where the columns need only follow each other.
inline int64_t padding_group(const llmk_matrix& w) {
    return w.group >= w.columns || w.group % kSegment == 0 ? 0 : w.group;
}

// Bytes of the parts of a record.
inline int64_t scale_bytes(const llmk_matrix& w) { return round_up(groups(w) * kBlock * type_bytes(w.scale_type), kLine); }
inline int64_t zero_bytes(const llmk_matrix& w) { return round_up(groups(w) * kBlock * type_bytes(w.zero_type), kLine); }
inline int64_t dense_bytes(const llmk_matrix& w) { return padded_columns(w) * kBlock / (is_int4(w.kind) ? 2 : 1); }
inline int64_t record_bytes(const llmk_matrix& w) { return scale_bytes(w) + zero_bytes(w) + dense_bytes(w); }
inline int64_t table_bytes(const llmk_matrix& w) {
    return is_sparse(w.kind) ? round_up((blocks(w) + 1) * (int64_t)sizeof(int64_t), kLine) : 0;
}

inline const uint8_t* record(const llmk_matrix& w, int64_t block) {
    if (is_sparse(w.kind)) return w.data + reinterpret_cast<const int64_t*>(w.data)[block];
    return w.data + block * record_bytes(w);
}

// Where a block of any kind begins; after the last one, the end of all.
inline const uint8_t* block_begin(const llmk_matrix& w, int64_t block) {
    if (!is_row_major(w.kind)) return record(w, block);
    return w.data + smaller(block * kBlock, w.rows) * w.columns * (w.kind == LLMK_F32 ? 4 : 2);
}

// Packed weights are asked for so many bytes before they are needed: the memory's latency at 40 GB/s and more. Nothing else
// fetches them ahead, least of all where a run of blocks begins.
constexpr int64_t kAhead = 8192;

inline void fetch_start(const llmk_matrix& w, int64_t block) {
    if (is_row_major(w.kind) || block >= blocks(w)) return;
    for (int64_t i = 0; i < kAhead; i += kLine) __builtin_prefetch(record(w, block) + i);
}

}  // namespace llmk
