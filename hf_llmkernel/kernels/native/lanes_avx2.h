// Sixteen lanes on AVX2 with FMA and F16C, as two registers of eight.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr bool kExpands = false;
constexpr int32_t kWideOffset = 128;
constexpr bool kDotsPairs = false;
constexpr int kWideVectors = 1;
constexpr int kTileBlocks = 1;    // of integers, multiplied by a tile at once
constexpr int kFewSums = 6;        // of few rows, which stay in registers
constexpr int kFloatRows = 4;      // of a tile, whose sums stay in registers
constexpr int kFloatBlocks = 1;    // of floats, the same

struct Floats {
    __m256 a, b;
};
struct Ints {
    __m256i a, b;
};
using Codes = Ints;

inline Floats f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats f_zero() { return f_set(0); }
inline Floats f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Floats f_add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats f_sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats f_mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats f_div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats f_max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats f_min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats f_abs(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats f_round(Floats x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
inline Floats f_fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats f_fnma(Floats x, Floats y, Floats z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline Floats f_of(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline float sum_eight(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float f_sum(Floats x) { return sum_eight(_mm256_add_ps(x.a, x.b)); }
inline float f_largest(Floats x) {
    const __m256 both = _mm256_max_ps(x.a, x.b);
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline __m256 scale_eight(__m256 x, __m256 power) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
inline Floats f_scale_by_power(Floats x, Floats power) { return {scale_eight(x.a, power.a), scale_eight(x.b, power.b)}; }

inline Floats f_load_some(const float* p, int64_t count) {
    float all[16] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = p[i];
    return f_load(all);
}
inline void f_store_some(float* p, Floats x, int64_t count) {
    float all[16];
    f_store(all, x);
    for (int64_t i = 0; i < count; ++i) p[i] = all[i];
}
inline __m256 widen_eight(const uint16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline Floats f_load_bf16(const uint16_t* p) { return {widen_eight(p), widen_eight(p + 8)}; }
inline Floats f_load_bf16_some(const uint16_t* p, int64_t count) {
    uint16_t all[16] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = p[i];
    return f_load_bf16(all);
}
inline Floats f_load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256i bytes_of_eight(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Floats f_load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(bytes_of_eight(p)), _mm256_cvtepi32_ps(bytes_of_eight(p + 8))};
}
inline Floats f_load_nibbles(const uint8_t* p) {  // of 8 bytes, low halves first
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    uint8_t nibbles[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(nibbles),
                     _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15)));
    return f_load_u8(nibbles);
}
inline uint16_t bf16_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void f_store_bf16_some(uint16_t* p, Floats x, int64_t count) {
    float all[16];
    f_store(all, x);
    for (int64_t i = 0; i < count; ++i) p[i] = bf16_of(all[i]);
}
inline void f_store_codes(int8_t* p, Floats x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i bytes = _mm256_packs_epi16(words, words);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}
inline Floats f_sums(const Floats x[16]) {
    float sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = f_sum(x[i]);
    return f_load(sums);
}

inline void f_turn(Floats x[16]) {
    float square[16][16], column[16];
    for (int i = 0; i < 16; ++i) f_store(square[i], x[i]);
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) column[j] = square[j][i];
        x[i] = f_load(column);
    }
}

inline Ints i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Codes c_load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline Codes c_low(Codes x) {
    const __m256i low = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
}
inline Codes c_high(Codes x) { return c_low({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }

inline Floats f_column(Codes x, int column) {  // of the four, the codes of all rows
    const auto of_eight = [&](__m256i codes) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, 8 * column), _mm256_set1_epi32(255)));
    };
    return {of_eight(x.a), of_eight(x.b)};
}

inline __m256i four(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}
inline __m256i dot_eight(__m256i acc, __m256i codes, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
inline Ints dot_narrow(Ints acc, Codes codes, const int8_t* x) {
    const __m256i all = four(x);
    return {dot_eight(acc.a, codes.a, all), dot_eight(acc.b, codes.b, all)};
}
// Codes up to 255 would saturate, so 128 is taken off them and their sign moves to the activations.
inline __m256i dot_signed(__m256i acc, __m256i codes, __m256i x) {
    const __m256i values = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return dot_eight(acc, _mm256_abs_epi8(values), _mm256_sign_epi8(x, values));
}
inline Ints dot_wide(Ints acc, Codes codes, const int8_t* x) {
    const __m256i all = four(x);
    return {dot_signed(acc.a, codes.a, all), dot_signed(acc.b, codes.b, all)};
}

#define LLMK_SEGMENT_LANES  // `dot_segment` for the rows of a segment is here

// Eight products of codes up to 15, two a lane, still fit into 16 bits.
template <int R>
inline void dot_narrow_segment(Ints* acc, const Codes* weights, const int8_t* x) {
    Ints sums[R];
    for (int r = 0; r < R; ++r) sums[r] = i_set(0);
    for (int i = 0; i < 8; ++i)
        for (int r = 0; r < R; ++r) {
            const __m256i all = four(x + 32 * r + 4 * i);
            sums[r].a = _mm256_add_epi16(sums[r].a, _mm256_maddubs_epi16(weights[i].a, all));
            sums[r].b = _mm256_add_epi16(sums[r].b, _mm256_maddubs_epi16(weights[i].b, all));
        }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < R; ++r) {
        acc[r].a = _mm256_add_epi32(acc[r].a, _mm256_madd_epi16(sums[r].a, ones));
        acc[r].b = _mm256_add_epi32(acc[r].b, _mm256_madd_epi16(sums[r].b, ones));
    }
}

// As dot_wide, the magnitudes of the weights computed once for all rows.
template <int R>
inline void dot_wide_segment(Ints* acc, const Codes* weights, const int8_t* x) {
    for (int i = 0; i < 8; ++i) {
        const __m256i a = _mm256_xor_si256(weights[i].a, _mm256_set1_epi8(-128)), large_a = _mm256_abs_epi8(a);
        const __m256i b = _mm256_xor_si256(weights[i].b, _mm256_set1_epi8(-128)), large_b = _mm256_abs_epi8(b);
        for (int r = 0; r < R; ++r) {
            const __m256i all = four(x + 32 * r + 4 * i);
            acc[r].a = dot_eight(acc[r].a, large_a, _mm256_sign_epi8(all, a));
            acc[r].b = dot_eight(acc[r].b, large_b, _mm256_sign_epi8(all, b));
        }
    }
}

template <bool Narrow, int R>
inline void dot_segment(Ints* acc, const Codes* weights, const int8_t* x) {
    if (Narrow) dot_narrow_segment<R>(acc, weights, x);
    else dot_wide_segment<R>(acc, weights, x);
}

inline Floats dot_bf16(Floats acc, const uint16_t* w, const uint16_t* x) {
    acc = f_fma(f_load_bf16(w), f_load_bf16(x), acc);
    return f_fma(f_load_bf16(w + 16), f_load_bf16(x + 16), acc);
}
inline Floats dot_bf16_some(Floats acc, const uint16_t* w, const uint16_t* x, int64_t count) {
    uint16_t some[32] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = w[i];
    return dot_bf16(acc, some, x);
}
inline __m256 pair_of_eight(__m256 acc, __m256 words, __m256 first, __m256 second) {
    const __m256i bits = _mm256_castps_si256(words);
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), first, acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536))), second, acc);
}
inline __m256 word_of_all(uint16_t word) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(word) << 16)); }
inline Floats dot_pair(Floats acc, Floats words, const uint16_t* x) {
    const __m256 first = word_of_all(x[0]), second = word_of_all(x[1]);
    return {pair_of_eight(acc.a, words.a, first, second), pair_of_eight(acc.b, words.b, first, second)};
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

// Into the second-level cache: to the first one only some twenty lines are on their way at a time, which is less than memory gives.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
