// The C ABI of the native library: plain structs and pointers, nothing of torch, so that one build serves every version.
//
// Functions return NULL, or what is wrong in one line. Shapes: M rows of activations, O rows of a matrix, I its columns.
#pragma once

#include <cstdint>

#define LLMK_API extern "C" __attribute__((visibility("default")))
#define LLMK_ABI 5

enum llmk_kind : int32_t {
    LLMK_NONE = 0,
    LLMK_F32 = 1,          // row-major, as torch stores it
    LLMK_BF16 = 2,         // the same
    LLMK_INT8 = 3,         // blocks of 16 interleaved rows, see matrix.h
    LLMK_INT4 = 4,
    LLMK_SPARSE_INT8 = 5,  // the same by bitmask
    LLMK_SPARSE_INT4 = 6,
    LLMK_SPARSE_BF16 = 7,
};

enum llmk_type : int32_t {
    LLMK_TYPE_NONE = 0,
    LLMK_TYPE_F32 = 1,
    LLMK_TYPE_BF16 = 2,
    LLMK_TYPE_F16 = 3,
    LLMK_TYPE_U8 = 4,
};

// A weight [rows, columns] in kernel layout.
struct llmk_matrix {
    int32_t kind;
    int32_t rows;
    int32_t columns;
    int32_t group;      // columns that share a scale; `columns` where a row has one
    int32_t scale_type;
    int32_t zero_type;  // LLMK_TYPE_NONE: symmetric
    const uint8_t* data;
};

// A weight as the checkpoint stores it (see hf_llmkernel/model/linear_llm_kernel.py).
struct llmk_stored {
    int32_t rows;
    int32_t columns;
    int32_t bits;        // 16 (floating), 8 or 4
    int32_t value_type;  // of values of 16 bits and more: LLMK_TYPE_BF16 or LLMK_TYPE_F32
    int32_t group;
    int32_t scale_type;
    int32_t zero_type;
    int32_t row_values;  // stored of a row: `columns` where dense, fewer of N:M; 0 of a bitmask, which has any number
    const uint8_t* values;
    int64_t value_bytes;
    const uint8_t* mask;  // NULL where dense
    const uint8_t* scales;
    const uint8_t* zeros;
};

// y = x Wᵀ + bias; of a low rank, y = (x Aᵀ) Bᵀ + bias with A in `first` and B in `second`. What an adapter adds is
// (x adapter_aᵀ) adapter_bᵀ, its scaling within adapter_b; `llmk_apply` takes none.
struct llmk_linear {
    llmk_matrix first;
    llmk_matrix second;  // LLMK_NONE where there is one factor
    llmk_matrix adapter_a;  // floating; LLMK_NONE where there is no adapter
    llmk_matrix adapter_b;
    const float* bias;  // NULL where there is none
};

struct llmk_layer {
    int32_t attends;
    int32_t feeds;
    int32_t heads;
    int32_t key_value_heads;
    int32_t window;  // tokens seen, this one included; 0 for all
    int32_t gated;
    const float* input_norm;
    const float* post_norm;
    const float* query_norm;  // NULL where there is none
    const float* key_norm;
    llmk_linear query, key, value, output, gate, up, down;
};

struct llmk_model {
    int32_t layers;
    int32_t hidden;
    int32_t head_dim;
    int32_t activation;  // llmk_activation
    int32_t rounds_inputs;  // those of integer matrices to int8; else they stay floats, and every call is as one of many rows
    float epsilon;
    float rotary_scale;
    const float* rotary_frequencies;  // [head_dim / 2]
    const float* final_norm;
    const llmk_layer* layer;
    llmk_linear head;
    llmk_stored embedding;  // dense or integer, not sparse
};

enum llmk_activation : int32_t { LLMK_SILU = 0, LLMK_GELU = 1, LLMK_GELU_TANH = 2, LLMK_RELU = 3 };

// Keys and values of a layer, [batch, heads, tokens, head_dim] with strides counted in elements; as integers every head of
// a token is a record of bytes, which strides count then: codes [head_dim], of 4 bits two in a byte, the first one low;
// scales [head_dim / group]; lowest values [head_dim / group].
struct llmk_cache {
    int64_t keys;  // addresses
    int64_t values;
    int64_t batch_stride;
    int64_t head_stride;
    int64_t token_stride;
    int64_t length;       // tokens there are; the new one becomes the token of this index
    int64_t mask_offset;  // index in the mask of the first token here
    int64_t type;         // LLMK_TYPE_F32 or LLMK_TYPE_BF16; of integers that of their scales
    int64_t bits;         // 8 or 4; 0 where they are floating
    int64_t group;        // channels that share a scale
};

LLMK_API int llmk_abi();
// The instruction set in use: "avx512", "avx2" or "portable". LLMKERNEL_ISA lowers it.
LLMK_API const char* llmk_isa();
LLMK_API const char* llmk_set_isa(const char* name);

// The matrix that a stored weight becomes, without its data, and the bytes of that data; the data itself, in `data`.
LLMK_API const char* llmk_plan(const llmk_stored* stored, llmk_matrix* matrix, int64_t* bytes);
LLMK_API const char* llmk_pack(const llmk_stored* stored, const llmk_matrix* matrix, uint8_t* data, int threads);

// y [M, O] = x [M, I] by a linear; both contiguous, of type F32 or BF16. rounds_inputs as in llmk_model.
LLMK_API const char* llmk_apply(
    const llmk_linear* linear, const void* x, int32_t x_type, int64_t m, void* y, int32_t y_type, int32_t rounds_inputs,
    int threads);

// One token of every sequence through the whole model: logits [batch, vocabulary].
//   tokens, positions: [batch]
//   mask: NULL, or [batch, mask_stride] bytes, 0 where a token is not seen; the new token included
LLMK_API const char* llmk_decode(
    const llmk_model* model, const int64_t* tokens, const int64_t* positions, int64_t batch, const llmk_cache* caches,
    const uint8_t* mask, int64_t mask_stride, void* logits, int32_t logits_type, int threads);

// Some tokens of every sequence through the whole model, as many of each: logits [batch, kept, vocabulary] of the last ones.
//   tokens, positions: [batch, length]
//   mask: as above; a token sees what the mask shows of those up to itself
LLMK_API const char* llmk_read(
    const llmk_model* model, const int64_t* tokens, const int64_t* positions, int64_t batch, int64_t length,
    const llmk_cache* caches, const uint8_t* mask, int64_t mask_stride, int64_t kept, void* logits, int32_t logits_type,
    int threads);
