// Sixteen lanes in plain C++: for any processor, and the reading of what the other levels do.
#include <cmath>
#include <cstdint>

namespace {

constexpr bool kExpands = false;
constexpr int32_t kWideOffset = 0;
constexpr bool kDotsPairs = false;
constexpr int kWideVectors = 1;
constexpr int kTileBlocks = 1;    // of integers, multiplied by a tile at once
constexpr int kFewSums = 6;        // of few rows, which stay in registers
constexpr int kFloatRows = 4;      // of a tile, whose sums stay in registers
constexpr int kFloatBlocks = 1;    // of floats, the same

struct Floats {
    float of[16];
};
struct Ints {
    int32_t of[16];
};
struct Codes {
    uint8_t of[64];
};

template <class Lane>
inline Floats each(Lane lane) {
    Floats y;
    for (int i = 0; i < 16; ++i) y.of[i] = lane(i);
    return y;
}

inline Floats f_set(float x) { return each([=](int) { return x; }); }
inline Floats f_zero() { return f_set(0); }
inline Floats f_load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void f_store(float* p, Floats x) {
    for (int i = 0; i < 16; ++i) p[i] = x.of[i];
}
inline Floats f_add(Floats x, Floats y) { return each([&](int i) { return x.of[i] + y.of[i]; }); }
inline Floats f_sub(Floats x, Floats y) { return each([&](int i) { return x.of[i] - y.of[i]; }); }
inline Floats f_mul(Floats x, Floats y) { return each([&](int i) { return x.of[i] * y.of[i]; }); }
inline Floats f_div(Floats x, Floats y) { return each([&](int i) { return x.of[i] / y.of[i]; }); }
inline Floats f_max(Floats x, Floats y) { return each([&](int i) { return x.of[i] > y.of[i] ? x.of[i] : y.of[i]; }); }
inline Floats f_min(Floats x, Floats y) { return each([&](int i) { return x.of[i] < y.of[i] ? x.of[i] : y.of[i]; }); }
inline Floats f_abs(Floats x) { return each([&](int i) { return fabsf(x.of[i]); }); }
inline Floats f_round(Floats x) { return each([&](int i) { return nearbyintf(x.of[i]); }); }
inline Floats f_fma(Floats x, Floats y, Floats z) { return each([&](int i) { return x.of[i] * y.of[i] + z.of[i]; }); }
inline Floats f_fnma(Floats x, Floats y, Floats z) { return each([&](int i) { return z.of[i] - x.of[i] * y.of[i]; }); }
inline Floats f_of(Ints x) { return each([&](int i) { return static_cast<float>(x.of[i]); }); }
inline float f_sum(Floats x) {
    float sum = 0;
    for (int i = 0; i < 16; ++i) sum += x.of[i];
    return sum;
}
inline float f_largest(Floats x) {
    float largest = x.of[0];
    for (int i = 1; i < 16; ++i) largest = x.of[i] > largest ? x.of[i] : largest;
    return largest;
}
inline Floats f_scale_by_power(Floats x, Floats power) {
    return each([&](int i) { return ldexpf(x.of[i], static_cast<int>(power.of[i])); });
}

inline Floats f_load_some(const float* p, int64_t count) { return each([=](int i) { return i < count ? p[i] : 0.0f; }); }
inline void f_store_some(float* p, Floats x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = x.of[i];
}
inline float of_bf16(uint16_t word) {
    const uint32_t bits = static_cast<uint32_t>(word) << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline float of_half(uint16_t word) {
    const uint32_t sign = (word & 0x8000u) << 16, exponent = (word >> 10) & 31, fraction = word & 1023;
    uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    if (exponent == 31) bits = sign | 0x7f800000 | (fraction << 13);
    float x;
    __builtin_memcpy(&x, &bits, 4);
    if (exponent == 0) x = (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
    return x;
}
inline uint16_t bf16_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline Floats f_load_bf16(const uint16_t* p) { return each([=](int i) { return of_bf16(p[i]); }); }
inline Floats f_load_bf16_some(const uint16_t* p, int64_t count) {
    return each([=](int i) { return i < count ? of_bf16(p[i]) : 0.0f; });
}
inline Floats f_load_half(const uint16_t* p) { return each([=](int i) { return of_half(p[i]); }); }
inline Floats f_load_u8(const uint8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }
inline Floats f_load_nibbles(const uint8_t* p) {  // of 8 bytes, low halves first
    return each([=](int i) { return static_cast<float>((p[i / 2] >> (4 * (i % 2))) & 15); });
}
inline void f_store_bf16_some(uint16_t* p, Floats x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = bf16_of(x.of[i]);
}
inline void f_store_codes(int8_t* p, Floats x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.of[i]);
}
inline Floats f_sums(const Floats x[16]) { return each([=](int i) { return f_sum(x[i]); }); }

inline void f_turn(Floats x[16]) {
    float square[16][16], column[16];
    for (int i = 0; i < 16; ++i) f_store(square[i], x[i]);
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) column[j] = square[j][i];
        x[i] = f_load(column);
    }
}

inline Ints i_set(int32_t x) {
    Ints y;
    for (int i = 0; i < 16; ++i) y.of[i] = x;
    return y;
}
inline Codes c_load(const uint8_t* p) {
    Codes codes;
    __builtin_memcpy(codes.of, p, 64);
    return codes;
}
inline Codes c_low(Codes x) {
    for (int i = 0; i < 64; ++i) x.of[i] &= 15;
    return x;
}
inline Codes c_high(Codes x) {
    for (int i = 0; i < 64; ++i) x.of[i] >>= 4;
    return x;
}
inline Floats f_column(Codes x, int column) {  // of the four, the codes of all rows
    return each([&](int i) { return static_cast<float>(x.of[4 * i + column]); });
}
inline Ints dot_narrow(Ints acc, Codes codes, const int8_t* x) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 4; ++column) acc.of[row] += codes.of[4 * row + column] * x[column];
    return acc;
}
inline Ints dot_wide(Ints acc, Codes codes, const int8_t* x) { return dot_narrow(acc, codes, x); }

inline Floats dot_bf16(Floats acc, const uint16_t* w, const uint16_t* x) {
    acc = f_fma(f_load_bf16(w), f_load_bf16(x), acc);
    return f_fma(f_load_bf16(w + 16), f_load_bf16(x + 16), acc);
}
inline Floats dot_bf16_some(Floats acc, const uint16_t* w, const uint16_t* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) acc.of[i % 16] += of_bf16(w[i]) * of_bf16(x[i]);
    return acc;
}
inline Floats dot_pair(Floats acc, Floats words, const uint16_t* x) {
    uint16_t pairs[32];
    __builtin_memcpy(pairs, words.of, 64);
    return each([&](int i) { return acc.of[i] + of_bf16(pairs[2 * i]) * of_bf16(x[0]) + of_bf16(pairs[2 * i + 1]) * of_bf16(x[1]); });
}

inline Floats f_load_words(const uint16_t* p, int64_t count) {
    float lanes[16] = {};
    if (count > 0) __builtin_memcpy(lanes, p, static_cast<size_t>(count) * 2);
    return f_load(lanes);
}
inline Floats f_pair_words(const uint16_t* p, int64_t count, const uint16_t* q, int64_t other_count) {
    uint16_t words[32] = {};
    for (int64_t i = 0; i < count; ++i) words[2 * i] = p[i];
    for (int64_t i = 0; i < other_count; ++i) words[2 * i + 1] = q[i];
    return f_load_words(words, 32);
}

inline void prefetch(const void*) {}

}  // namespace
