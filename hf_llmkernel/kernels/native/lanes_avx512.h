// Sixteen lanes on AVX512 with VNNI, BF16, VBMI2: the vocabulary that kernels.inl is written in.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr bool kExpands = true;    // packed values spread by a mask in one instruction
constexpr int32_t kWideOffset = 0;  // what dot_wide subtracts from its codes

constexpr bool kDotsPairs = true;   // bf16 in one instruction
constexpr int kWideVectors = 4;     // of a row that are summed at once, four rows at a time
constexpr int kTileBlocks = 2;    // of integers, multiplied by a tile at once
constexpr int kFewSums = 24;        // of few rows, which stay in registers
constexpr int kFloatRows = 8;      // of a tile, whose sums stay in registers
constexpr int kFloatBlocks = 3;    // of floats, the same

using Floats = __m512;
using Ints = __m512i;
using Codes = __m512i;  // 4 columns of 16 rows

inline Floats f_zero() { return _mm512_setzero_ps(); }
inline Floats f_set(float x) { return _mm512_set1_ps(x); }
inline Floats f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats f_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats f_sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats f_mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats f_div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats f_max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats f_min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats f_abs(Floats a) { return _mm512_abs_ps(a); }
inline Floats f_round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats f_fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Floats f_fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats f_of(Ints x) { return _mm512_cvtepi32_ps(x); }
inline float f_sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float f_largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats f_scale_by_power(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Floats f_load_some(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void f_store_some(float* p, Floats x, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }

inline Floats f_widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Floats f_load_bf16(const uint16_t* p) { return f_widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats f_load_bf16_some(const uint16_t* p, int64_t count) {
    return f_widen(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline Floats f_load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats f_load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats f_load_nibbles(const uint8_t* p) {  // of 8 bytes, low halves first
    const __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i nibbles = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(nibbles));
}
inline void f_store_bf16_some(uint16_t* p, Floats x, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
// Integers within ±127 of 16 lanes.
inline void f_store_codes(int8_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// Lane i of the result is the sum of x[i].
inline Floats f_sums(const Floats x[16]) {
    Floats a[8], b[4];
    for (int i = 0; i < 8; ++i) {  // pairs of lanes
        const Floats low = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), high = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
        a[i] = _mm512_add_ps(low, high);
    }
    for (int i = 0; i < 4; ++i) {  // within 128 bits: rows 4i .. 4i + 3
        const __m512d first = _mm512_castps_pd(a[2 * i]), second = _mm512_castps_pd(a[2 * i + 1]);
        const Floats low = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
        const Floats high = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
        b[i] = _mm512_add_ps(low, high);
    }
    const Floats c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    const Floats d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

// Sixteen vectors as a square, turned over its diagonal.
inline void f_turn(Floats x[16]) {
    Floats a[16], b[16];
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)  // b[4 i + c]: of every 128 bits, lane c of rows 4 i ... 4 i + 3
        for (int half = 0; half < 2; ++half) {
            const __m512d first = _mm512_castps_pd(a[4 * i + half]), second = _mm512_castps_pd(a[4 * i + 2 + half]);
            b[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
            b[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
        }
    for (int c = 0; c < 4; ++c) {
        const Floats even = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const Floats more = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), last = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        x[c] = _mm512_shuffle_f32x4(even, more, 0x88);
        x[4 + c] = _mm512_shuffle_f32x4(odd, last, 0x88);
        x[8 + c] = _mm512_shuffle_f32x4(even, more, 0xdd);
        x[12 + c] = _mm512_shuffle_f32x4(odd, last, 0xdd);
    }
}

inline Ints i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline int32_t four(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return x;
}

inline Codes c_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes c_low(Codes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Codes c_high(Codes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline Codes c_set(int32_t code) { return _mm512_set1_epi8(static_cast<char>(code)); }
inline Codes c_of_rows(const uint8_t* p) {  // one code a row
    return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                              _mm512_set1_epi32(0x01010101));
}
inline Floats f_column(Codes x, int column) {  // of the four, the codes of all rows
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, 8 * static_cast<unsigned>(column)), _mm512_set1_epi32(255)));
}
// acc + codes · four activations, of codes up to 15 and up to 255.
inline Ints dot_narrow(Ints acc, Codes codes, const int8_t* x) {
    return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(four(x)));
}
inline Ints dot_wide(Ints acc, Codes codes, const int8_t* x) { return dot_narrow(acc, codes, x); }

// The next values of a mask at their places, `fill` elsewhere; moves `p` behind them.
inline Codes expand_bytes(Codes fill, uint64_t mask, const uint8_t*& p) {
    const Codes codes = _mm512_mask_expand_epi8(fill, mask, _mm512_loadu_si512(p));
    p += __builtin_popcountll(mask);
    return codes;
}
inline Codes expand_nibbles(Codes fill, uint64_t mask, const uint8_t*& p) {
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
    p += (__builtin_popcountll(mask) + 1) / 2;
    return _mm512_mask_expand_epi8(fill, mask, nibbles);
}

// acc + the products of 32 columns, two a lane.
inline Floats dot_bf16(Floats acc, const uint16_t* w, const uint16_t* x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)),
                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
}
inline Floats dot_bf16_some(Floats acc, const uint16_t* w, const uint16_t* x, int64_t count) {
    const __mmask32 mask = static_cast<__mmask32>((1ull << count) - 1);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, w)),
                            reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, x)));
}
// acc + two columns of 16 rows by two activations.
inline Floats dot_pair(Floats acc, Floats words, const uint16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(words), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
}
// 32 floats as words, and acc + two products of words a lane.
inline Floats f_words(Floats low, Floats high) {
    return _mm512_castsi512_ps(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
inline Floats dot_words(Floats acc, Floats words, Floats others) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(words), reinterpret_cast<__m512bh>(others));
}
// Up to 32 words as they are, zero behind them; up to 16 words of two rows, one of each a lane.
inline Floats f_load_words(const uint16_t* p, int64_t count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p));
}
inline Floats f_pair_words(const uint16_t* p, int64_t count, const uint16_t* q, int64_t other_count) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(other_count), q));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// Two columns of 16 rows; the values as `expand_bytes`, zero elsewhere.
inline Floats expand_pairs(uint32_t mask, const uint8_t*& p) {
    const __m512i words = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(p));
    p += 2 * __builtin_popcount(mask);
    return _mm512_castsi512_ps(words);
}

// Into the second-level cache: to the first one only some twenty lines are on their way at a time, which is less than memory gives.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
