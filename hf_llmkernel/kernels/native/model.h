// What a decoding step and a prompt have in common: linears, embeddings, rotations.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace llmk {

// What `llmk_read` is given.
struct Call {
    const llmk_model& model;
    const int64_t* tokens;  // [batch, length]
    const int64_t* positions;
    int64_t batch, length;
    const llmk_cache* caches;
    const uint8_t* mask;
    int64_t mask_stride;
    int64_t kept;  // last tokens of each sequence that have logits
    void* logits;  // [batch, kept, vocabulary]
    int32_t logits_type;
    int threads;
};

// For calls of few rows.
void decode(const Call& call);

inline bool has_adapter(const llmk_linear& linear) { return linear.adapter_a.kind != LLMK_NONE; }
inline bool is_low_rank(const llmk_linear& linear) { return linear.second.kind != LLMK_NONE; }
inline const llmk_matrix& last_matrix(const llmk_linear& linear) { return is_low_rank(linear) ? linear.second : linear.first; }
inline int64_t out_features(const llmk_linear& linear) { return last_matrix(linear).rows; }

inline float half_to_float(uint16_t word) {
    const int exponent = (word >> 10) & 31, fraction = word & 1023;
    const float sign = word & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

inline float entry(const uint8_t* p, int32_t type, int64_t at) {
    if (type == LLMK_TYPE_U8) return p[at];
    float x;
    if (type == LLMK_TYPE_F32) {
        std::memcpy(&x, p + 4 * at, 4);
        return x;
    }
    uint16_t word;
    std::memcpy(&word, p + 2 * at, 2);
    if (type == LLMK_TYPE_F16) return half_to_float(word);
    const uint32_t bits = static_cast<uint32_t>(word) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void embed(const llmk_stored& table, int64_t token, float* y) {
    const int64_t columns = table.columns, of_row = ceil_div(columns, table.group);
    if (table.bits == 16) {
        for (int64_t i = 0; i < columns; ++i) y[i] = entry(table.values, table.value_type, token * columns + i);
        return;
    }
    const uint8_t* codes = table.values + token * (table.bits == 4 ? ceil_div(columns, 2) : columns);
    const bool symmetric = table.zero_type == LLMK_TYPE_NONE;
    for (int64_t i = 0; i < columns; ++i) {
        const int64_t group = token * of_row + i / table.group;
        const int code = table.bits == 4 ? (codes[i / 2] >> (4 * (i % 2))) & 15 : symmetric ? codes[i] ^ 0x80 : codes[i];
        const float zero = symmetric ? (table.bits == 4 ? 8.0f : 128.0f) : entry(table.zeros, table.zero_type, group);
        y[i] = (static_cast<float>(code) - zero) * entry(table.scales, table.scale_type, group);
    }
}

// Sines and cosines [head_dim / 2] of a position.
inline void rotation(const llmk_model& model, int64_t position, float* sines, float* cosines) {
    for (int64_t k = 0; k < model.head_dim / 2; ++k) {
        const float angle = static_cast<float>(position) * model.rotary_frequencies[k];
        sines[k] = std::sin(angle) * model.rotary_scale;
        cosines[k] = std::cos(angle) * model.rotary_scale;
    }
}

inline void rotate(float* x, const float* sines, const float* cosines, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[i] + first * sines[i];
    }
}

inline Rounding rounding_of(const llmk_cache& cache, int64_t head_dim) {
    return {head_dim, cache.bits, cache.group, static_cast<int32_t>(cache.type)};
}
inline int64_t element_bytes(const llmk_cache& cache) { return cache.bits != 0 ? 1 : type_bytes(static_cast<int32_t>(cache.type)); }
inline int64_t head_bytes(const llmk_cache& cache, int64_t head_dim) {
    return cache.bits != 0 ? rounding_of(cache, head_dim).record_bytes() : head_dim * element_bytes(cache);
}

// A head [head_dim] into the keys or values of a cache, `at` elements from their beginning.
inline void store_head(const llmk_cache& cache, int64_t states, int64_t at, const float* x, int64_t head_dim) {
    auto* to = reinterpret_cast<uint8_t*>(states + at * element_bytes(cache));
    if (cache.bits != 0) kernels().round_head(rounding_of(cache, head_dim), x, to);
    else if (cache.type == LLMK_TYPE_BF16) kernels().to_bf16(x, head_dim, head_dim, reinterpret_cast<uint16_t*>(to));
    else std::memcpy(to, x, static_cast<size_t>(head_dim) * sizeof(float));
}

// A head [head_dim], normalized where it has a norm, and rotated.
inline void prepare_head(const llmk_model& model, const float* norm, const float* sines, const float* cosines, float* x) {
    if (norm != nullptr) kernels().rms_norm(x, norm, model.epsilon, model.head_dim, x);
    rotate(x, sines, cosines, model.head_dim);
}

}  // namespace llmk
