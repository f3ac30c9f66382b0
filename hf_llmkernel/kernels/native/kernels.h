// What every instruction set has to provide. One table an instruction set, one in use.
#pragma once

#include "matrix.h"

namespace llmk {

// Rows of activations as a matrix product takes them: those of its representations that the matrix needs are set.
struct Inputs {
    int64_t rows = 0;             // M
    const float* floats = nullptr;  // [M, columns]
    int64_t float_stride = 0;
    const uint16_t* bf16 = nullptr;  // [M, padded], zero behind the columns
    const int8_t* codes = nullptr;   // [M, padded], 32 columns sharing a scale
    const float* scales = nullptr;   // [M, padded / 32]
    const int32_t* sums = nullptr;   // of the 32 codes
    int64_t padded = 0;
};

constexpr int64_t kTile = 128;  // rows of activations of which a part and the sums stay in the first-level cache

// Rows of activations for products of many: a tile of them, 32 columns of all rows before the next 32. All parts have room
// for kTile rows.
struct Tile {
    int64_t rows = 0;
    const int8_t* codes = nullptr;    // [padded / 32, kTile, 32]
    const float* scales = nullptr;    // [padded / 32, kTile]
    const int32_t* sums = nullptr;    // the same
    const uint16_t* bf16 = nullptr;   // as codes, zero behind the columns
    const float* floats = nullptr;    // the same
};  // of integers: codes, or floats where inputs are not to be rounded

// How a head [head_dim] is kept as integers between the lowest and the highest value of each group (see llmk_cache).
struct Rounding {
    int64_t head_dim;
    int64_t bits;  // 0: it is not
    int64_t group;
    int32_t type;
    int64_t groups() const { return head_dim / group; }
    int64_t code_bytes() const { return head_dim * bits / 8; }
    int64_t record_bytes() const { return code_bytes() + 2 * groups() * type_bytes(type); }
};

constexpr int64_t kTokens = 64;  // a tile of cached ones, whose keys stay in the first-level cache for all heads

// Queries of the heads that share one head of keys and values, over a run of cached tokens.
struct Attention {
    const float* queries;  // [heads, head_dim], scaled
    int64_t heads;
    int64_t head_dim;
    const uint8_t* keys;  // of the first token
    const uint8_t* values;
    int64_t token_stride;
    int32_t type;
    int64_t tokens;
    const uint8_t* mask;  // NULL, or a byte a token, 0 where it is not seen
    float* output;        // [heads, head_dim]: the sum of exp(score - largest) * value
    float* largest;       // [heads]; -inf where no token is seen
    float* total;         // [heads]: the sum of exp(score - largest)
    Rounding rounding;
    int64_t stride;       // from one head's query and output to the next
    int64_t token_bytes;  // of a cached head
};

// A run of a prompt's tokens, of the heads that share one head of keys and values, over all cached tokens up to their own.
struct PromptAttention {
    const float* queries;  // [tokens, heads, head_dim], scaled
    int64_t query_stride;  // from one token to the next
    int64_t tokens;
    int64_t heads;
    int64_t head_dim;
    const uint8_t* keys;  // of the first cached token
    const uint8_t* values;
    int64_t token_stride;
    int32_t type;
    int64_t first;        // index in the cache of the first token here
    int64_t window;       // tokens seen, the own one included; 0 for all
    const uint8_t* mask;  // NULL, or a byte a cached token, 0 where it is not seen
    float* output;        // [tokens, heads, head_dim]
    int64_t output_stride;
    float* scratch;  // of `scratch_floats`
    static int64_t scratch_floats(int64_t tokens, int64_t heads, int64_t head_dim) {
        const int64_t padded = round_up(head_dim, 16), rows = round_up(tokens * heads, 8);
        return 64 * (head_dim + padded) + rows * (padded + 2 + round_up(head_dim, 32) / 2);
    }
};

struct Kernels {
    const char* name;
    bool expands;  // whether sparse layouts are understood
    // One row [columns] into codes, scales and sums, every group of columns padded to a multiple of 32 (0: none is); from
    // one segment to the next there are `step` entries.
    void (*quantize)(const float* x, int64_t columns, int64_t group, int64_t step, int8_t* codes, float* scales, int32_t* sums);
    void (*to_bf16)(const float* x, int64_t columns, int64_t padded, uint16_t* y);
    void (*to_floats)(const uint16_t* x, int64_t columns, float* y);
    // out[m * stride + row] for the rows of some blocks of 16; rows of the first block begin at out[0].
    void (*multiply)(const llmk_matrix& w, const Inputs& x, int64_t first_block, int64_t end_block, float* out, int64_t stride);
    // The same for a tile of rows.
    void (*multiply_tile)(const llmk_matrix& w, const Tile& x, int64_t first_block, int64_t end_block, float* out, int64_t stride);
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t columns, float* y);
    void (*add)(const float* x, const float* bias, int64_t columns, float* y);  // y += x (+ bias)
    void (*activate)(int32_t activation, const float* gate, const float* up, int64_t columns, float* y);
    void (*round_head)(const Rounding& r, const float* x, uint8_t* record);
    void (*restore_head)(const Rounding& r, const uint8_t* record, uint8_t* y);  // [head_dim] of its type
    void (*attend)(const Attention& a);
    void (*attend_prompt)(const PromptAttention& a);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

const Kernels& kernels();

}  // namespace llmk
